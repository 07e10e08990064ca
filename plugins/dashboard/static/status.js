// What the page says of its connection: the line that is always there, the notice when there is something
// to do, and the door of who is not signed in.

import { $, el, say } from "./dom.js";
import { hourMinute } from "./words.js";

const LABELS = {
  starting: "Starting",
  signedOut: "Signed out",
  connecting: "Connecting",
  live: "Live",
  reconnecting: "Reconnecting",
  discordAway: "Discord is away",
  refused: "Refused",
  expiring: "Token ends soon",
  expired: "Token ended",
};

const REFUSALS = {
  malformed: "This is no token: it is cut off, or it was not copied whole.",
  signature: "This token was not made by this server: its signature does not fit.",
  claims: "This token lacks something: it needs discordId, access and role.",
  "Access denied": "You have been banned from this server. Its operator can say why.",
  "Too many connections": "There are too many connections from here. The page tries again by itself.",
};

const NO_GUILD =
  "There is no guild here that you may see. As soon as the bot is in a guild where you have the right to it," +
  " that guild appears by itself.";
const NO_GUILD_YET = "Discord is still to say which guilds there are. They appear by themselves.";
const MESSAGE_SECONDS = 10;
/** Milliseconds: a connection that is back before is no news. */
const PATIENCE = 2_000;

/** Where there is no picture. */
const initial = (user) => [...(user?.username ?? "")][0]?.toUpperCase() ?? "";

export class Status {
  #connection;
  #tokens;
  #message = ""; // what the server said last
  #messageUntil = 0;
  #face = null; // the picture shown last

  constructor(connection, tokens) {
    this.#connection = connection;
    this.#tokens = tokens;
    for (const form of document.querySelectorAll(".token-form")) form.addEventListener("submit", (event) => this.#submit(event));
    $("#leave").addEventListener("click", () => connection.signOut());
    connection.addEventListener("state", () => this.paint());
    connection.addEventListener("problem", ({ detail }) => this.#hear(detail));
  }

  paint() {
    const { state, guilds, listed, complete } = this.#connection;
    const door = state === "signedOut" || (state === "refused" && !listed) || (state === "expired" && !listed);
    document.body.dataset.state = state;
    document.body.dataset.door = door;
    say($("#state .words"), LABELS[state]);
    $("#door").hidden = !door;
    $("#main").hidden = door || !listed;
    $("#leave").hidden = door || !this.#tokens.held;
    say($("#leave span"), this.#tokens.user?.username ?? "");
    $("#face").hidden = door || !this.#tokens.user;
    this.#paintFace(this.#tokens.user);
    $(".picker").hidden = door || !guilds.length;
    $("#signin").hidden = !this.#tokens.signIn;
    $("#no-guild").hidden = guilds.length > 0;
    say($("#no-guild"), complete ? NO_GUILD : NO_GUILD_YET);
    if (door) say($("#door-why"), this.#whyAtTheDoor());
    this.#notice(door ? "" : this.#whatIsWrong());
  }

  /** The picture of who is signed in, from this server; until it is there, the first letter of the name. */
  #paintFace(user) {
    const key = user && `/signin/avatar?${user.id}&${user.avatar}`;
    if (key === this.#face) return;
    this.#face = key;
    say($("#face"), initial(user));
    if (!user?.avatar) return;
    const picture = el("img", { src: key, alt: "" });
    picture.addEventListener("load", () => key === this.#face && $("#face").replaceChildren(picture));
  }

  #notice(text) {
    const asksForToken = ["expiring", "expired", "refused"].includes(this.#connection.state);
    $("#notice").hidden = !text;
    $("#notice .token-form").hidden = !asksForToken;
    $("#notice .button").hidden = !asksForToken || !this.#tokens.signIn;
    say($("#notice p"), text);
  }

  /** A sentence on what to do, or nothing where there is nothing to do. */
  #whatIsWrong() {
    const { state, why, since } = this.#connection;
    const lasts = Date.now() - since > PATIENCE;
    switch (state) {
      case "connecting":
        return lasts ? "The server has not let this page in yet. The page tries again by itself." : "";
      case "reconnecting":
        return lasts ? "The server does not answer. The page tries again by itself; what is shown is from before." : "";
      case "discordAway":
        return "Discord is away: the server waits for it, and nothing new comes until it is back.";
      case "expiring":
        return `Your token ends at ${hourMinute(Date.parse(why))}. With a new one you stay connected.`;
      case "expired":
        return "Your token has ended, and nothing new comes until there is a new one.";
      case "refused":
        return REFUSALS[why] ?? `The server refused the connection: ${why}.`;
      default:
        return Date.now() < this.#messageUntil ? this.#message : "";
    }
  }

  #whyAtTheDoor() {
    const { state, why } = this.#connection;
    if (state === "refused") return REFUSALS[why] ?? `The server refused the connection: ${why}.`;
    if (state === "expired") return "This token has ended. Use a new one.";
    if (this.#tokens.status === 403 && this.#tokens.signIn) return REFUSALS["Access denied"];
    if (this.#tokens.status >= 500) return "The sign-in does not answer at the moment. Try again, or use a token.";
    if (this.#tokens.signIn) return "Sign in to see the guilds in which you have a say, or use a token.";
    return "To look in you need a token for this server.";
  }

  #hear({ message }) {
    this.#message = message;
    this.#messageUntil = Date.now() + MESSAGE_SECONDS * 1_000;
    this.paint();
  }

  #submit(event) {
    event.preventDefault();
    const { token } = event.target.elements;
    this.#connection.useToken(token.value);
    token.value = "";
  }
}
