// The connection to the server: one socket, its states, and which guilds it hears of. Knows no page.
//
//   starting ─┬─▶ signedOut ◀─────────── no token, signed out, refused by the sign-in
//             └─▶ connecting ─▶ live ◀─▶ discordAway
//                     ▲  │        │  └─▶ expiring: a minute is left, and the page has no way to a new token
//                     │  ▼        ▼
//                     │ refused  reconnecting ─▶ (as connecting)
//                     └ expired ◀─ the token has ended, and there is no way to another

import { io } from "./socket.io.js";

const ROOMS = ["guild", "analytics", "history"];
const OWN = new Set(["session", "guilds:update", "auth:expiring", "error"]);
const ASK_AGAIN = 5_000;
const HEALTH_INTERVAL = 5_000;
const STILL_SIGNED_IN = "You are still signed in: the server could not end your session. Try again in a moment.";

export class Connection extends EventTarget {
  state = "starting";
  /** The code or message of a refusal, or when the token ends; since when it is in that state. */
  why = "";
  since = Date.now();
  guilds = [];
  /** Whether the list of guilds has come; whether Discord has named them all. */
  listed = false;
  complete = false;

  #socket;
  #tokens;
  #watched = new Set();
  #pending = new Set(); // rooms about which Discord has not said enough
  #discordAway = false;
  #viewer = null;
  #heard = 0; // when the server said anything last
  #lostAt = null;
  #reconnecting; // timers
  #asking;
  #renewing;
  #tabs = new BroadcastChannel("spywatcher"); // the same page in other tabs of this browser

  constructor(tokens) {
    super();
    this.#tokens = tokens;
    this.#tabs.onmessage = () => this.#tokens.user && this.#leaveAll();
    this.#socket = io({
      auth: async (give) => give({ token: await tokens.current() }),
      autoConnect: false,
      transports: ["websocket", "polling"],
    });
    this.#listen();
    setInterval(() => this.#lookAround(), HEALTH_INTERVAL);
  }

  get connected() {
    return this.#socket.connected;
  }

  /** Connect, with a token if there is one; a page without any is signed out. */
  async start() {
    if (!(await this.#tokens.current())) return this.#signedOut();
    this.#set("connecting");
    this.#socket.disconnect().connect();
  }

  /** Use this token from now on; a live connection stays as it is. */
  async useToken(token) {
    if (this.connected && (await this.#refresh(token))) return this.#tokens.use(token);
    this.#tokens.use(token);
    return this.start();
  }

  async signOut() {
    const throughDiscord = this.#tokens.user !== null;
    if (!(await this.#tokens.signOut())) return this.#tell("problem", { message: STILL_SIGNED_IN });
    if (throughDiscord) this.#tabs.postMessage("signed out");
    this.#leaveAll();
  }

  #leaveAll() {
    this.#socket.disconnect();
    this.#tokens.forget();
    this.#forgetGuilds();
    this.#signedOut();
  }

  /** Whoever looks next may not see what the one before saw. */
  #forgetGuilds() {
    this.guilds = [];
    this.listed = false;
    this.#watched.clear();
    this.#lostAt = null;
    this.#tell("guilds", []);
  }

  /** Hear of these guilds, and of no others. */
  watch(ids) {
    const wanted = new Set(ids);
    for (const id of this.#watched) if (!wanted.has(id)) this.#leave(id);
    const added = ids.filter((id) => !this.#watched.has(id));
    this.#watched = wanted;
    if (this.connected) for (const id of added) this.#enter(id);
  }

  #listen() {
    const socket = this.#socket;
    socket.on("connect", () => this.#onConnect());
    socket.on("disconnect", (reason) => this.#onDisconnect(reason));
    socket.on("connect_error", (error) => this.#onRefusal(error));
    socket.on("session", ({ recovered, rooms }) => recovered && this.#enterMissing(rooms));
    socket.on("guilds:update", ({ guilds }) => this.#onGuilds({ guilds, complete: true }));
    socket.on("auth:expiring", ({ expiresAt }) => this.#onExpiring(expiresAt));
    socket.on("error", (error) => this.#onError(error));
    socket.onAny((name, data) => this.#onEvent(name, data));
    socket.io.on("ping", () => (this.#heard = Date.now()));
  }

  #onConnect() {
    clearTimeout(this.#reconnecting);
    this.#heard = Date.now();
    if (this.#viewer !== this.#tokens.viewer) this.#forgetGuilds();
    this.#viewer = this.#tokens.viewer;
    if (!this.#socket.recovered) this.#beginAnew();
    this.#lostAt = null;
    this.#setLive();
    this.#askForGuilds();
  }

  /** A new session: it is in no room yet, and what happened since the last one is lost. */
  #beginAnew() {
    this.#pending.clear();
    if (this.#lostAt) this.#tell("gap", { from: this.#lostAt });
    for (const id of this.#watched) this.#enter(id);
  }

  /** Rights are judged anew on a return: ask once more for the rooms that are missing, to be told why. */
  #enterMissing(rooms) {
    for (const id of this.#watched) {
      for (const kind of ROOMS) if (!rooms.includes(`${kind}:${id}`)) this.#subscribe(kind, id);
    }
  }

  #onDisconnect(reason) {
    this.#lostAt ??= this.#heard; // a laptop that slept learns of it when it wakes up
    clearTimeout(this.#renewing); // it is said again on the return
    this.#pending.clear();
    if (reason === "io client disconnect") return;
    if (this.state !== "expired") this.#set("reconnecting");
    // After a DISCONNECT of the server the stock client does not try again by itself.
    if (reason === "io server disconnect") this.#again(1_000);
  }

  async #onRefusal(error) {
    if (this.#socket.active) return this.#set(this.#lostAt ? "reconnecting" : "connecting");
    const { code, retryAfter } = error.data ?? {};
    if (error.message === "Authentication required") return this.#signedOut();
    if (code === "expired") {
      if (this.#tokens.user && (await this.#tokens.renew())) return this.#again(1_000);
      return this.#tokenEnded();
    }
    this.#turnedAway("refused", code ?? error.message);
    if (retryAfter) this.#again(retryAfter * 1_000);
  }

  #onError({ message, code }) {
    // The transport closes next; with a sign-in the client comes back by itself with a new token.
    if (code === "forbidden") this.#pending.clear();
    if (code === "expired" && !this.#tokens.user) this.#tokenEnded();
    else if (code !== "expired" && code !== "unknown_event") this.#tell("problem", { message, code });
  }

  #onEvent(name, data) {
    this.#heard = Date.now();
    if (OWN.has(name) || !data?.guildId || !this.#watched.has(data.guildId)) return;
    if (this.#pending.delete(data.guildId)) this.#setLive();
    this.#tell("event", { name, data });
  }

  #onGuilds({ guilds, complete }) {
    this.guilds = guilds;
    this.listed = true;
    this.complete = complete ?? true;
    this.#setLive();
    this.#tell("guilds", guilds);
  }

  async #askForGuilds() {
    const answer = await this.#request("guilds:list");
    if (answer?.guilds) this.#onGuilds(answer);
    // A server that tells of no changes is asked again while there is nothing to see.
    clearTimeout(this.#asking);
    if (!this.guilds.length) this.#asking = setTimeout(() => this.connected && this.#askForGuilds(), ASK_AGAIN);
  }

  #enter(id) {
    for (const kind of ROOMS) this.#subscribe(kind, id);
  }

  async #subscribe(kind, id) {
    if (!this.#watched.has(id)) return;
    const answer = await this.#request(`subscribe:${kind}`, id);
    if (!this.#watched.has(id)) return;
    if (answer?.pending && kind === "guild") this.#pending.add(id);
    if (answer?.error?.code === "rate_limited") setTimeout(() => this.#subscribe(kind, id), ASK_AGAIN);
    else if (answer?.error) this.#tell("unavailable", { kind, id, ...answer.error });
    this.#setLive();
  }

  #leave(id) {
    this.#pending.delete(id);
    if (this.connected) for (const kind of ROOMS) this.#socket.emit(`unsubscribe:${kind}`, id);
  }

  /** The answer, or null when the connection was lost before. */
  async #request(...request) {
    return this.connected ? this.#socket.timeout(10_000).emitWithAck(...request).catch(() => null) : null;
  }

  #onExpiring(expiresAt) {
    clearTimeout(this.#renewing);
    this.#renewing = setTimeout(() => this.#renew(expiresAt), this.#tokens.young);
  }

  async #renew(expiresAt) {
    if (this.#tokens.user && (await this.#tokens.renew())) {
      // Another one has signed in, in another tab: what this one sees is that viewer's from now on.
      if (this.#tokens.viewer !== this.#viewer) return this.start();
      if (await this.#refresh(await this.#tokens.current())) return;
    }
    this.#turnedAway("expiring", expiresAt);
  }

  /** Hand a new token to the live connection; whether it was taken. */
  async #refresh(token) {
    const answer = await this.#request("auth:refresh", token);
    if (answer?.ok) this.#setLive(true);
    return answer?.ok === true;
  }

  #tokenEnded() {
    if (!this.#tokens.user) this.#tokens.forget();
    this.#turnedAway("expired");
    this.#socket.disconnect();
  }

  /** Whoever has to do something is told of the sign-in too, if there is one. */
  async #turnedAway(state, why = "") {
    this.#set(state, why);
    if (this.#tokens.signIn !== null) return;
    await this.#tokens.askSignIn();
    this.#tell("state", state);
  }

  #signedOut() {
    this.#set("signedOut");
  }

  /** Discord's side as the server's health tells it: a quiet guild and a lost Discord look the same from here. */
  async #lookAround() {
    if (!this.connected || document.hidden) return;
    const health = await fetch("/health/ready").then((answer) => answer.json()).catch(() => null);
    this.#discordAway = health?.parts?.gateway?.ok === false;
    this.#setLive();
  }

  #setLive(renewed = false) {
    if (!this.connected || (this.state === "expiring" && !renewed)) return;
    const away = this.#discordAway || this.#pending.size > 0 || (this.listed && !this.complete);
    this.#set(away ? "discordAway" : "live");
  }

  #set(state, why = "") {
    if (this.state === state && this.why === why) return;
    Object.assign(this, { state, why, since: Date.now() });
    this.#tell("state", state);
  }

  #again(milliseconds) {
    clearTimeout(this.#reconnecting);
    this.#reconnecting = setTimeout(() => this.connected || this.#socket.connect(), milliseconds);
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
