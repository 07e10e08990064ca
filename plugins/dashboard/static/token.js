// Where tokens come from: the address (#token=…), Discord's sign-in, or what was pasted. A token is
// kept in this page's memory alone: not in the address, not in any storage.

/** Milliseconds before its end in which a token is not used for a new connection if there is a way to another. */
const TOO_OLD = 30_000;

/** The token in the address, which is taken out of it and of the browser's history; or null. */
export function tokenInAddress() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const token = fragment.get("token");
  if (token === null) return null;
  fragment.delete("token");
  const rest = fragment.toString().replace(/=(?=&|$)/g, ""); // "now", not "now="
  history.replaceState(null, "", location.pathname + location.search + (rest && `#${rest}`));
  return token;
}

/** `discordId` of a token as it says itself: the server alone knows whether it is true. */
function viewerOf(token) {
  try {
    return JSON.parse(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"))).discordId;
  } catch {
    return null;
  }
}

/** Whether somebody has signed in here; to ask for a token in vain is an error in the console. */
const signedInHere = () => /(^|; )spywatcher_signed_in=1/.test(document.cookie);

export class Tokens {
  #token = null;
  #ends = Infinity; // ms since 1970 by this computer's clock, of tokens from the sign-in
  #half = 0; // when half of its life is over
  /** Who is signed in through Discord: {id, username}; null with any other token. */
  user = null;
  /** Whether this server has a sign-in; null until it was asked. */
  signIn = null;
  /** What the sign-in last said: an HTTP status, or 0 when there was no answer. */
  status = 0;

  /** Whom the token is for; null without one, or if it cannot be read. */
  get viewer() {
    return viewerOf(this.#token);
  }

  use(token) {
    this.#token = token.trim() || null;
    this.#ends = Infinity;
    this.#half = 0;
    this.user = null;
  }

  forget() {
    this.use("");
  }

  /** Milliseconds in which the token is too young to be replaced: one that lasts less than a minute
   *  is said to end soon from its first moment on, and would be asked for without end.
   */
  get young() {
    return Math.max(0, this.#half - Date.now());
  }

  get held() {
    return this.#token !== null;
  }

  /** What to connect with now: the token held, or a new one where it is about to end; null without any. */
  async current() {
    const fresh = this.#token !== null && (this.young > 0 || Date.now() < this.#ends - TOO_OLD);
    if (!fresh && (this.#token === null || this.user)) await this.renew();
    return this.#token;
  }

  /** Ask the sign-in for a token; whether there is a new one. */
  async renew() {
    const answer = await this.askSignIn();
    if (answer?.status !== 200) return false;
    const { token, expiresAt, user } = await answer.json();
    const life = Date.parse(expiresAt) - Date.parse(answer.headers.get("Date")); // both by the server's clock
    this.use(token);
    this.#ends = Date.now() + (life || Infinity);
    this.#half = Date.now() + (life / 2 || 0);
    this.user = user;
    return true;
  }

  /** The answer of the sign-in, and with it whether there is one; null without an answer.
   *  It holds a token only for who has signed in.
   */
  async askSignIn() {
    const method = signedInHere() ? "POST" : "OPTIONS";
    const answer = await fetch("/signin/token", { method }).catch(() => null);
    this.status = answer?.status ?? 0;
    if (answer) this.signIn = answer.status !== 404 && answer.status !== 405;
    return answer;
  }

  /** End the session at the sign-in, if there is one; whether that is done. */
  async signOut() {
    const answer = this.user && (await fetch("/signout", { method: "POST" }).catch(() => null));
    if (this.user && !answer?.ok) return false;
    this.forget();
    return true;
  }
}
