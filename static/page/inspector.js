// @ts-check
/**
 * "What the browser sees": the last request and its reply as this page sent and got them. Nothing is hidden here,
 * because there is nothing to hide: the key is not in the browser.
 */

import { make } from "./dom.js";

/** @typedef {import("../chat/client.js").SentRequest} SentRequest */

/** Characters of a body, and events, that are shown: enough to see what it is. */
const MAX_SHOWN = 6_000;
const LAST_EVENTS = 4;
/** What the browser adds by itself. The page can neither read the cookie nor change the others. */
const BY_THE_BROWSER = [
  ["cookie", "sent by the browser; HttpOnly, so no script can read it"],
  ["origin", location.origin],
  ["sec-fetch-site", "same-origin"],
];

export class Inspector {
  /** @type {SentRequest | null} */
  #request = null;
  /** @type {Response | null} */
  #response = null;
  /** @type {string[]} */
  #events = [];
  #count = 0;
  #stale = true; // more than the events has changed
  #tally = make("p", { class: "faint", hidden: "" });
  #listing = listing("", "Last events");
  #panel;
  #toggle;
  #body;
  #wide = matchMedia("(min-width: 72rem)");

  /**
   * @param {{panel: HTMLDialogElement, toggle: HTMLButtonElement, close: HTMLButtonElement, body: HTMLElement}} elements
   */
  constructor({ panel, toggle, close, body }) {
    this.#panel = panel;
    this.#toggle = toggle;
    this.#body = body;
    toggle.addEventListener("click", () => (panel.open ? this.close() : this.open()));
    close.addEventListener("click", () => this.close());
    panel.addEventListener("close", () => this.#closed());
    panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation(); // here Esc closes the panel; elsewhere it stops the answer
      this.close();
    });
    this.#wide.addEventListener("change", () => this.#reopen());
  }

  /** Beside the conversation where there is room, over it where there is not. */
  open() {
    if (this.#wide.matches) this.#panel.show();
    else this.#panel.showModal();
    this.#toggle.setAttribute("aria-expanded", "true");
    document.body.classList.toggle("with-inspector", this.#wide.matches);
    this.#stale = true;
    this.show();
  }

  close() {
    this.#panel.close();
  }

  #closed() {
    this.#toggle.setAttribute("aria-expanded", "false");
    document.body.classList.remove("with-inspector");
  }

  #reopen() {
    if (!this.#panel.open) return;
    this.#panel.close();
    this.open();
  }

  /** @param {SentRequest | null} request null: clears what was shown */
  sent(request) {
    this.#request = request;
    this.#response = null;
    this.#events = [];
    this.#count = 0;
    this.#stale = true;
    this.show();
  }

  /** @param {Response} response */
  answered(response) {
    this.#response = response;
    this.#stale = true;
    this.show();
  }

  /** @param {string} data of one event; `show` brings it to the screen */
  event(data) {
    this.#count += 1;
    this.#events.push(data);
    if (this.#events.length > LAST_EVENTS) this.#events.shift();
  }

  /** Shows what has changed, if it is open. */
  show() {
    if (!this.#panel.open) return;
    if (this.#stale) {
      this.#stale = false;
      const parts = [...this.#intro(), ...this.#sentParts(), ...this.#answeredParts()];
      this.#body.replaceChildren(...parts, this.#tally, this.#listing);
    }
    this.#tally.hidden = this.#listing.hidden = this.#count === 0;
    this.#tally.textContent = `${this.#count} events; the last of them, as they came`;
    this.#listing.textContent = shortened(this.#events.map((data) => `data: ${data}`).join("\n\n"));
  }

  #intro() {
    const cookie = document.cookie;
    return [
      make(
        "p",
        {},
        "This page asks ",
        make("code", {}, "/api/chat"),
        ", on the server it came from, and no other. It sends no key, because it has none: the server adds the key " +
          "on its own way to the model.",
      ),
      facts([
        ["document.cookie", cookie === "" ? '"" (the session cookie is HttpOnly)' : cookie],
        ["authorization", "none"],
      ]),
    ];
  }

  #sentParts() {
    if (!this.#request) return [make("p", { class: "faint" }, "Ask something, and the request is shown here.")];
    const { method, url, headers, body } = this.#request;
    return [
      make("h3", {}, "Sent"),
      make("p", { class: "line" }, make("b", {}, method), ` ${new URL(url, location.href).href}`),
      facts(Object.entries(headers)),
      make("p", { class: "faint" }, "and by the browser itself"),
      facts(BY_THE_BROWSER),
      listing(JSON.stringify(JSON.parse(body), null, 2), "Request body"),
    ];
  }

  #answeredParts() {
    if (!this.#response) return [];
    const { status, headers } = this.#response;
    return [
      make("h3", {}, "Received"),
      make("p", { class: "line" }, make("b", {}, String(status)), ` ${headers.get("content-type") ?? ""}`),
      facts([...headers].filter(([name]) => name !== "content-type")),
    ];
  }
}

/** @param {string[][]} pairs */
function facts(pairs) {
  const rows = pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  return make("dl", { class: "facts" }, ...rows);
}

/**
 * @param {string} text
 * @param {string} label
 */
function listing(text, label) {
  return make("pre", { tabindex: "0", role: "group", "aria-label": label }, shortened(text));
}

/** @param {string} text */
function shortened(text) {
  const left = text.length - MAX_SHOWN;
  return left > 0 ? `${text.slice(0, MAX_SHOWN)}\n… ${left} more characters` : text;
}
