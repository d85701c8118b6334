// @ts-check
/**
 * The login panel: in place of the message box while no user is signed in.
 *
 * Rules of this file:
 * 1. It shows and asks; what follows is decided in page.js.
 * 2. A password is in its field and in one request, and nowhere else.
 * 3. An open panel stays as it is: typed text is not lost.
 * 4. Screen readers: what went wrong is an alert, without the countdown, and the focus goes back to the password.
 */

import { signIn } from "./account.js";
import { adviceFor } from "./error-texts.js";
import { countDown, make } from "./dom.js";

/** @typedef {import("./account.js").Account} Account */
/** @typedef {Error & {code: string, status: number, retryAfter: number | null}} Failure as account.js throws it */

/** What the reader finds: no session yet, a session that has ended, or one ended by hand. */
/** @typedef {"new" | "ended" | "left"} Situation */

/** @type {Record<string, Record<Situation, string>>} */
const WORDS = {
  password: {
    new: "This chat asks for a password.",
    ended: "Your session has ended. Sign in again to go on.",
    left: "Sign in to use this chat again.",
  },
  oidc: {
    new: "Sign in to use this chat.",
    ended: "Your session has ended. Sign in again to go on.",
    left: "Sign in to use this chat again.",
  },
  header: {
    new: "Open this chat through your organisation's sign-in, then reload this page.",
    ended: "Your session has ended. Sign in with your organisation again, then reload this page.",
    left: "You are signed out of this chat. Your organisation's sign-in may still be open: sign out there too.",
  },
};

/** Where an unsent question waits in this tab, while its author is away to sign in. */
const DRAFT = "chat-proxy draft";

export class LoginPanel {
  #mode = "";
  #element;
  #onEnter;
  #onLeave;
  /** @type {HTMLElement | null} */
  #first = null;

  /**
   * @param {HTMLElement} element
   * @param {{onEnter: (account: Account) => void, onLeave: () => void}} handlers `onLeave`: to sign in, the user
   *   goes to another page or loads this one again
   */
  constructor(element, { onEnter, onLeave }) {
    this.#element = element;
    this.#onEnter = onEnter;
    this.#onLeave = onLeave;
  }

  get isOpen() {
    return this.#mode !== "";
  }

  /**
   * @param {string} mode of the session
   * @param {Situation} situation
   */
  open(mode, situation) {
    if (this.#mode === mode) return;
    this.#mode = mode;
    const ways = /** @type {Record<string, () => HTMLElement>} */ ({
      password: () => this.#form(),
      oidc: () => this.#link(),
      header: () => this.#reload(),
    });
    const known = Object.hasOwn(ways, mode) ? mode : "header";
    const title = make("h2", { id: "login-panel-title" }, situation === "left" ? "Signed out" : "Sign in");
    const text = make("p", { id: "login-panel-text" }, WORDS[known][situation]);
    this.#element.replaceChildren(title, text, ways[known]());
    this.#element.hidden = false;
  }

  close() {
    this.#mode = "";
    this.#first = null;
    this.#element.hidden = true;
    this.#element.replaceChildren(); // and with it a password
  }

  /** @param {{typing: boolean}} options whether a keyboard on the screen would not come up unasked */
  focus({ typing }) {
    (typing ? this.#first : this.#element)?.focus({ preventScroll: true });
  }

  #form() {
    const name = make("input", {
      id: "login-name",
      type: "text",
      name: "username",
      autocomplete: "username",
      autocapitalize: "none",
      spellcheck: "false",
      maxlength: "128",
      "aria-describedby": "login-hint",
    });
    const password = make("input", {
      id: "login-password",
      type: "password",
      name: "password",
      autocomplete: "current-password",
      required: "",
      "aria-describedby": "login-problem",
    });
    const problem = make("p", { id: "login-problem", role: "alert" });
    const button = make("button", { type: "submit", class: "go" }, "Sign in");
    const form = make(
      "form",
      { class: "login" },
      make(
        "div",
        { class: "field" },
        make("label", { for: "login-name" }, "Name"),
        name,
        make("small", { id: "login-hint" }, "Leave empty if you were given only a password"),
      ),
      make("div", { class: "field" }, make("label", { for: "login-password" }, "Password"), password),
      make("div", { class: "try" }, button, problem),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!button.disabled) void this.#enter({ name, password, problem, button });
    });
    this.#first = name;
    return form;
  }

  /**
   * @param {{name: HTMLInputElement, password: HTMLInputElement, problem: HTMLElement, button: HTMLButtonElement}} form
   */
  async #enter({ name, password, problem, button }) {
    const user = name.value.trim();
    button.disabled = true;
    button.textContent = "Signing in…";
    problem.replaceChildren();
    try {
      const account = await signIn({ ...(user ? { user } : {}), password: password.value });
      this.#onEnter(account);
    } catch (caught) {
      const { code, message, status, retryAfter } = /** @type {Failure} */ (caught);
      const advice = adviceFor({ code: status === 429 ? "too_many_tries" : code, message, status });
      problem.append(make("strong", {}, `${advice.title}.`), ` ${advice.text}`);
      if (status === 401) password.value = "";
      password.focus();
      countDown(button, retryAfter ?? 0, "Try again", "Sign in");
    }
  }

  #link() {
    const here = location.pathname + location.search + location.hash;
    const href = `/api/session/login?next=${encodeURIComponent(here)}`;
    return this.#leaving(make("a", { class: "go", href }, "Sign in"));
  }

  #reload() {
    const button = make("button", { type: "button", class: "go" }, "Reload");
    this.#leaving(button);
    button.addEventListener("click", () => location.reload());
    return button;
  }

  /**
   * @template {HTMLElement} T
   * @param {T} way out of this page
   * @returns {T}
   */
  #leaving(way) {
    way.addEventListener("click", () => this.#onLeave());
    this.#first = way;
    return way;
  }
}

/**
 * @param {unknown} url as `DELETE /api/session` gave it
 * @returns {string | null} where a browser may be sent to end the session over there; null for nowhere
 */
export function wayOut(url) {
  if (typeof url !== "string" || !URL.canParse(url)) return null;
  const { protocol, hostname, href } = new URL(url);
  const here = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(hostname);
  return protocol === "https:" || (protocol === "http:" && here) ? href : null;
}

/**
 * Keeps an unsent question over a login that leaves the page.
 * @param {string} text
 * @param {string} author the user while it was written; "" without a name
 */
export function keepDraft(text, author) {
  try {
    if (text.trim() !== "") sessionStorage.setItem(DRAFT, JSON.stringify({ text, author }));
  } catch {
    // the browser keeps nothing for this site, or not so much
  }
}

/**
 * @param {string} reader the current user
 * @returns {string} the kept text, once and for this user only; "" for none
 */
export function takeDraft(reader) {
  try {
    const { text, author } = JSON.parse(sessionStorage.getItem(DRAFT) ?? "{}");
    sessionStorage.removeItem(DRAFT);
    return typeof text === "string" && ["", reader].includes(author) ? text : "";
  } catch {
    return "";
  }
}
