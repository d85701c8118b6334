// @ts-check
/**
 * The page: what happens when. What it looks like is in index.html and style.css, one question and its answer in
 * turn.js, the way to the server in chat/client.js.
 *
 * Rules of this file:
 * 1. One answer at a time. `live` is its request; everything that ends it goes through its AbortController.
 * 2. The conversation is the turns on the screen, and is nowhere else: a reload forgets it, the session stays.
 * 3. What broke before its first word is not sent along again: a message refused once would be refused for ever.
 */

import { fetchAccount, needsLogin, showAccount } from "./account.js";
import { adviceFor } from "./advice.js";
import { streamChat } from "./chat/client.js";
import { byId, copy, make } from "./dom.js";
import { duration, plural } from "./figures.js";
import { Turn } from "./turn.js";
import { Wire } from "./wire.js";

/** @typedef {import("./account.js").Account} Account */
/** @typedef {import("./chat/client.js").ChatError} ChatError */
/** @typedef {import("./chat/client.js").Message} Message */

/** Pixels from the end within which a reader counts as reading the end. */
const AT_END = 40;

const scroller = byId("scroller", HTMLElement);
const welcome = byId("welcome", HTMLElement);
const turnList = byId("turns", HTMLElement);
const composer = byId("composer", HTMLFormElement);
const message = byId("message", HTMLTextAreaElement);
const send = byId("send", HTMLButtonElement);
const status = byId("status", HTMLElement);
const notice = byId("notice", HTMLElement);
const latest = byId("latest", HTMLButtonElement);
const model = byId("model", HTMLSelectElement);
const wire = new Wire({
  panel: byId("wire", HTMLDialogElement),
  toggle: byId("wire-toggle", HTMLButtonElement),
  close: byId("wire-close", HTMLButtonElement),
  body: byId("wire-body", HTMLElement),
});

/** @type {Turn[]} */
const turns = [];
/** @type {AbortController | null} the request under way */
let live = null;
let following = true; // the reader is at the end, and stays there

// ---- asking

/** @param {string} question */
function ask(question) {
  const turn = new Turn(question, { onRetry: askAgain, onShown: shown });
  turns.push(turn);
  welcome.hidden = true;
  turnList.append(turn.element);
  following = true;
  void run(turn);
}

/** @param {Turn} turn */
function askAgain(turn) {
  if (live) return;
  toMessage(); // its button goes away
  void run(turn);
}

/** @param {Turn} turn its answer is asked for, perhaps again */
async function run(turn) {
  if (live) return;
  const controller = new AbortController();
  setLive(controller);
  turn.begin(performance.now());
  say("Waiting for the first word…");
  shown();
  const answer = streamChat({
    messages: history(turn),
    model: model.value || undefined,
    signal: controller.signal,
    onRequest: (request) => wire.sent(request),
    onResponse: (response) => wire.answered(response),
    onEvent: ({ data }) => wire.event(data),
    onRetry: ({ delay }) => say(`Busy. Asking again in ${duration(delay / 1000)}.`),
  });
  try {
    for await (const text of answer) {
      if (turn.text === "") say("Answering…");
      turn.add(text, performance.now());
    }
    const tokens = answer.usage?.completion_tokens ?? answer.deltas;
    turn.complete({ finishReason: answer.finishReason, tokens, now: performance.now() });
    say(`Complete: ${plural(tokens, "token")}.`);
  } catch (error) {
    if (live === controller) broke(turn, /** @type {ChatError} */ (error)); // else a new conversation has begun
  }
  if (live !== controller) return;
  setLive(null);
  wire.show();
  void refresh();
}

/** @param {AbortController | null} controller */
function setLive(controller) {
  live = controller;
  document.body.classList.toggle("busy", live !== null);
  send.setAttribute("aria-label", live ? "Stop" : "Send");
  send.title = live ? "Stop (Esc)" : "Send (Enter)";
}

/**
 * @param {Turn} turn
 * @param {ChatError} error
 */
function broke(turn, error) {
  if (error.ending === "aborted") {
    turn.stopped(performance.now());
    say("Stopped.");
    return;
  }
  turn.failed(error, performance.now());
  say(""); // the alert says it
}

function stop() {
  live?.abort();
}

/**
 * @param {Turn} turn
 * @returns {Message[]} the conversation up to its question
 */
function history(turn) {
  const before = turns.slice(0, turns.indexOf(turn)).filter((earlier) => earlier.text !== "");
  return [
    ...before.flatMap(({ question, text }) => /** @type {Message[]} */ ([
      { role: "user", content: question },
      { role: "assistant", content: text },
    ])),
    { role: "user", content: turn.question },
  ];
}

function startAnew() {
  stop();
  setLive(null);
  for (const turn of turns.splice(0)) turn.dispose();
  welcome.hidden = false;
  latest.hidden = true;
  following = true;
  say("New conversation.");
  toMessage();
}

// ---- the account

async function refresh() {
  let account;
  try {
    account = await fetchAccount();
  } catch (error) {
    const advice = adviceFor(/** @type {any} */ (error));
    if (!model.options.length) showNotice(advice.title, advice.text, () => void refresh());
    return; // later, what is shown is good enough until the next answer
  }
  const elements = {
    card: byId("account", HTMLDetailsElement),
    tightest: byId("tightest", HTMLElement),
    list: byId("limits", HTMLElement),
    state: byId("session-state", HTMLElement),
  };
  showAccount(elements, account, Date.now() / 1000);
  byId("welcome-state", HTMLElement).textContent = elements.state.textContent;
  showModels(account.models);
  showLogin(account);
}

/** @param {string[]} names */
function showModels(names) {
  const known = [...model.options].map((option) => option.value);
  if (known.join("\n") === names.join("\n")) return;
  const chosen = model.value;
  model.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(chosen)) model.value = chosen;
  byId("picker", HTMLElement).hidden = names.length < 2;
}

/** @param {Account} account */
function showLogin({ session }) {
  const away = needsLogin(session);
  send.disabled = away;
  document.body.classList.toggle("locked", away);
  if (!away) {
    notice.hidden = true;
    return;
  }
  const ways = /** @type {Record<string, string>} */ ({
    password: "This chat asks for a password, which this page cannot do yet.",
    oidc: "This chat is for people who are signed in.",
    header: "This chat is for people who are signed in with the site around it.",
  });
  notice.replaceChildren(make("span", {}, make("strong", {}, "You need to sign in."), ` ${ways[session.mode] ?? ""}`));
  if (session.mode === "oidc") notice.append(make("a", { href: "/api/session/login" }, "Sign in"));
  notice.hidden = false;
}

/**
 * @param {string} title
 * @param {string} text
 * @param {() => void} retry
 */
function showNotice(title, text, retry) {
  const button = make("button", { type: "button", class: "plain first" }, "Retry");
  button.addEventListener("click", retry);
  notice.replaceChildren(make("span", { role: "alert" }, make("strong", {}, `${title}.`), ` ${text}`), button);
  notice.hidden = false;
}

// ---- what the reader does

/** @param {string} text for the status line */
function say(text) {
  status.textContent = text;
}

/** Something has grown: stay at the end, or offer the way there. */
function shown() {
  if (following) scroller.scrollTop = scroller.scrollHeight;
  latest.hidden = following;
  wire.show();
}

/** Where a click left no focus behind. On a touch screen the keyboard would come up, and nobody asked for it. */
function toMessage() {
  if (matchMedia("(hover: hover)").matches) message.focus();
  else scroller.focus({ preventScroll: true });
}

function submit() {
  const question = message.value.trim();
  if (question === "" || live || send.disabled) return;
  message.value = "";
  grow();
  ask(question);
}

/** Where the browser does not do it by itself (field-sizing), the box grows with its text. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (live) stop();
  else submit();
});

send.addEventListener("click", (event) => {
  if (live && event.detail > 1) event.preventDefault(); // the second half of a double click on Send
});

message.addEventListener("keydown", (event) => {
  const composing = event.isComposing || event.keyCode === 229; // Enter that ends an input method's word
  if (event.key !== "Enter" || event.shiftKey || composing) return;
  event.preventDefault();
  submit();
});

message.addEventListener("input", grow);

/** @param {HTMLButtonElement} button one that copies @returns {string} what it copies */
function textOf(button) {
  if (button.dataset.copy === "code") return button.closest("figure")?.querySelector("code")?.textContent ?? "";
  return turns.find((turn) => turn.copy === button)?.text ?? "";
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  const account = byId("account", HTMLDetailsElement);
  if (account.open) account.open = false;
  else stop();
});

document.addEventListener("click", (event) => {
  const target = /** @type {Element} */ (event.target);
  const account = byId("account", HTMLDetailsElement);
  if (account.open && !account.contains(target)) account.open = false;
  const button = target.closest("button");
  if (!button) return;
  if (button.dataset.prompt && !live) {
    ask(button.dataset.prompt);
    toMessage();
  } else if (button.dataset.copy) {
    void copy(button, textOf(button));
  }
});

scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight <= AT_END;
  latest.hidden = following;
}, { passive: true });

latest.addEventListener("click", () => {
  following = true;
  shown();
  toMessage();
});

byId("fresh", HTMLButtonElement).addEventListener("click", startAnew);

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && !live) void refresh();
});

toMessage();
void refresh();
