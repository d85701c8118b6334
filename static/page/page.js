// @ts-check
/**
 * The page: what happens when. What it looks like is in index.html and style/, the conversation in
 * chat/conversation.js, its turns on the screen in transcript.js, the message box in composer.js.
 *
 * Rules of this file:
 * 1. One answer at a time, from `run` to its end.
 * 2. The conversation is the turns on the screen. A reload forgets it, unless its owner has switched on storage.js.
 * 3. A question that needs a login first is not lost: it waits in the message box, behind the login panel.
 * 4. Signing out leaves nothing on the screen, in any tab; nor does one user for the next.
 * 5. `visitor` is all that the page knows about its visitor.
 */

import { Conversation } from "../chat/conversation.js";
import { fetchAccount, needsLogin, showAccount, signOut } from "./account.js";
import { Composer } from "./composer.js";
import { byId, copy, make } from "./dom.js";
import { adviceFor } from "./error-texts.js";
import { Follower } from "./follow.js";
import { duration, plural } from "./format.js";
import { Inspector } from "./inspector.js";
import { LoginPanel, keepDraft, takeDraft, wayOut } from "./login.js";
import * as storage from "./storage.js";
import { Transcript, answerTo } from "./transcript.js";
import { UNKNOWN, signedOut, staysOut, withAccount, withoutSession } from "./visitor.js";

/** @typedef {import("./account.js").Account} Account */
/** @typedef {import("./visitor.js").Visitor} Visitor */
/** @typedef {import("../chat/client.js").ChatError} ChatError */

const scroller = byId("scroller", HTMLElement);
const welcome = byId("welcome", HTMLElement);
const turnList = byId("turns", HTMLElement);
const status = byId("status", HTMLElement);
const notice = byId("notice", HTMLElement);
const latest = byId("latest", HTMLButtonElement);
const keep = byId("keep", HTMLInputElement);
const card = byId("account", HTMLDetailsElement);
const model = byId("model", HTMLSelectElement);
const signOutButton = byId("sign-out", HTMLButtonElement);
const inspector = new Inspector({
  panel: byId("inspector", HTMLDialogElement),
  toggle: byId("inspector-toggle", HTMLButtonElement),
  close: byId("inspector-close", HTMLButtonElement),
  body: byId("inspector-body", HTMLElement),
});
const loginPanel = new LoginPanel(byId("login-panel", HTMLElement), { onEnter: entered, onLeave: () => keepDraft(composer.text, visitor.user) });
const composer = new Composer(
  {
    form: byId("composer", HTMLFormElement),
    message: byId("message", HTMLTextAreaElement),
    send: byId("send", HTMLButtonElement),
    editing: byId("editing", HTMLElement),
    cancel: byId("edit-cancel", HTMLButtonElement),
  },
  { onAsk: askOrEdit, onStop: () => chat.stop(), onEditEnd: editEnded },
);
const follower = new Follower(scroller, latest);
const tabs = new BroadcastChannel("chat-proxy signed out");

const chat = new Conversation();
const transcript = new Transcript(turnList, chat, { onRetry: askAgain, onEdit: edit, onNew: turnAdded, onShown: shown });

let visitor = UNKNOWN;
let isBusy = false; // an answer is under way

// ---- asking

/** @param {string} question */
function ask(question) {
  void run(() => chat.send(question));
}

function turnAdded() {
  welcome.hidden = true;
  follower.toEnd();
}

/**
 * @param {string} question
 * @param {boolean} edited it takes the place of the last one
 */
function askOrEdit(question, edited) {
  const last = chat.snapshot().messages.findLast(({ role }) => role === "user");
  if (edited && last) remove(last.id);
  ask(question);
}

/** @param {string} id of a question, which goes away with its answer */
function remove(id) {
  chat.remove(id);
  turnList.classList.remove("editing");
  welcome.hidden = !transcript.isEmpty;
}

/** @param {string} id */
function textOf(id) {
  return chat.snapshot().messages.find((message) => message.id === id)?.text ?? "";
}

/** @param {string} id of the last question, which is to be put differently */
function edit(id) {
  if (isBusy || loginPanel.isOpen) return;
  composer.edit(textOf(id));
  turnList.classList.add("editing");
  composer.focus();
  say("Editing. Esc cancels.");
}

function editEnded() {
  turnList.classList.remove("editing");
  say("");
  toMessage();
}

/** @param {string} id of a question */
function askAgain(id) {
  if (isBusy) return;
  if (composer.isEditing) stopEditing();
  toMessage(); // its button goes away
  if (!loginPanel.isOpen) void run(() => chat.regenerate(id));
}

/** @param {() => Promise<boolean>} begin asks, and waits for the end of the answer */
async function run(begin) {
  if (isBusy) return;
  setBusy(true);
  chat.configure({
    model: model.value || undefined,
    onRequest: (request) => inspector.sent(request),
    onResponse: (response) => inspector.answered(response),
    onEvent: ({ data }) => inspector.event(data),
    onRetry: ({ delay }) => say(`Busy. Asking again in ${duration(delay / 1000)}.`),
  });
  const answered = begin();
  const { question } = chat.snapshot();
  const isOver = () => chat.snapshot().question !== question; // a new conversation has begun
  keepTurns();
  shown();
  await answered;
  if (isOver()) return;
  const { error } = chat.snapshot();
  const shutOut = error !== null && (await isShutOut(error));
  if (isOver()) return;
  if (shutOut && question) takeBack(question);
  else settle();
  setBusy(false);
  keepTurns();
  inspector.show();
  if (!loginPanel.isOpen) void refresh();
}

/** Says in the status line how far the answer is. */
function sayProgress() {
  const { messages, status, question } = chat.snapshot();
  if (status === "submitted") say("Waiting for the first word…");
  if (status !== "streaming") return;
  say(answerTo(messages, question)?.text === "" ? "The model is thinking…" : "Answering…");
}

function settle() {
  const { messages, question, error, metrics } = chat.snapshot();
  transcript.settle();
  if (error) say(""); // the alert says it
  else if (answerTo(messages, question)?.state === "complete" && metrics) say(`Complete: ${plural(metrics.tokens, "token")}.`);
  else say("Stopped.");
}

/**
 * Whether it was refused for want of a session. Then the login panel is open now.
 * @param {ChatError} error
 */
async function isShutOut({ status, code }) {
  const mode = visitor.account?.session.mode;
  if (mode === "anonymous") return false; // a session without a login is replaced without a word
  const redirected = mode === "header" && code === "network_error"; // perhaps: to the sign-in in front of the server
  if (status !== 401 && !redirected) return false;
  await refresh();
  return loginPanel.isOpen;
}

/** @param {string} id of a question, which goes back to where it was written */
function takeBack(id) {
  const question = textOf(id);
  remove(id);
  composer.putBack(question);
  say("Your question is kept.");
}

/** @param {boolean} busy */
function setBusy(busy) {
  isBusy = busy;
  document.body.classList.toggle("busy", busy);
  composer.setBusy(busy);
}

function stopEditing() {
  composer.endEdit();
  turnList.classList.remove("editing");
}

function startAnew() {
  chat.reset();
  setBusy(false);
  stopEditing();
  welcome.hidden = false;
  follower.reset();
  keepTurns();
  say("New conversation.");
  toMessage();
}

// ---- the conversation, kept in this browser on request

/** Writes down what is on the screen, where that is switched on. */
function keepTurns() {
  if (!storage.save(visitor.owner, transcript.kept)) say("This conversation is too long to be kept in this browser.");
}

/** @param {Visitor} before the value before `visitor`, which may chat */
function findKept(before) {
  const found = storage.load(visitor.owner);
  keep.checked = found !== null;
  if (visitor.owner === before.owner) return; // it was found before, and what is on the screen is newer
  if (transcript.isEmpty && found) transcript.restore(found);
}

function switchKeeping() {
  if (!keep.checked) storage.switchOff(visitor.owner);
  else if (storage.switchOn(visitor.owner, [])) keepTurns();
  else {
    keep.checked = false;
    say("This browser keeps nothing for this site.");
  }
}

// ---- the account

async function refresh() {
  const asked = (visitor = { ...visitor }); // only the latest answer counts, so only this one may be replaced by it
  let found;
  try {
    found = withAccount(asked, await fetchAccount());
  } catch (caught) {
    if (visitor !== asked) return;
    const error = /** @type {any} */ (caught);
    const advice = adviceFor(error);
    if (error.status === 401) welcomeVisitor(withoutSession(asked, "header")); // from a proxy in front of our server
    else if (!model.options.length) showNotice(advice.title, advice.text, () => void refresh());
    return; // later, what is shown is good enough until the next answer
  }
  if (visitor === asked) welcomeVisitor(found);
}

/** @param {Visitor} found takes the place of `visitor` */
function welcomeVisitor(found) {
  const before = visitor;
  if (before.user !== "" && found.user !== before.user) forget();
  visitor = found;
  const { account } = found;
  if (!account) return;
  const elements = {
    card,
    tightest: byId("tightest", HTMLElement),
    list: byId("limits", HTMLElement),
    state: byId("session-state", HTMLElement),
    signOut: signOutButton,
  };
  showAccount(elements, account, Date.now() / 1000);
  byId("welcome-state", HTMLElement).textContent = elements.state.textContent;
  showModels(account.models);
  notice.hidden = true;
  showDoor(before, account);
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

/**
 * Shows the login panel in place of the message box, or hides it.
 * @param {Visitor} before the value that `visitor` replaced
 * @param {Account} account
 */
function showDoor(before, { session }) {
  const away = needsLogin(session);
  const moves = away !== loginPanel.isOpen;
  if (away) {
    const { state } = visitor;
    loginPanel.open(session.mode, state === "left" || state === "ended" ? state : "new");
    storage.forgetNameless();
  } else {
    loginPanel.close();
    composer.fill(() => takeDraft(session.user ?? ""));
    findKept(before);
  }
  composer.lock(away);
  document.body.classList.toggle("locked", away);
  const skip = byId("skip", HTMLAnchorElement);
  skip.href = away ? "#login-panel" : "#message";
  skip.textContent = away ? "Skip to the sign-in" : "Skip to the message box";
  if (moves) toMessage();
}

/** @param {Account} account after a password was right */
function entered(account) {
  welcomeVisitor(withAccount(visitor, account));
  say("Signed in.");
  composer.focus();
}

async function leave() {
  signOutButton.disabled = true;
  let url;
  try {
    ({ logout_url: url } = await signOut());
  } catch (error) {
    const advice = adviceFor(/** @type {any} */ (error));
    showNotice("You are still signed in", `${advice.title}. ${advice.text}`, () => void leave());
    return;
  } finally {
    signOutButton.disabled = false;
  }
  tabs.postMessage(null);
  goodbye();
  const next = wayOut(url);
  if (next) location.assign(next);
}

/** Signed out, here or in another tab. */
function goodbye() {
  if (!visitor.account) return;
  forget();
  storage.switchOff(visitor.owner);
  card.open = false;
  welcomeVisitor(signedOut(visitor));
  say("");
}

/** Clears everything, unsent text included: the next reader may be another person. */
function forget() {
  takeDraft("");
  inspector.sent(null);
  startAnew();
  composer.clear();
}

/**
 * @param {string} title
 * @param {string} text
 * @param {() => void} retry
 */
function showNotice(title, text, retry) {
  const button = make("button", { type: "button", class: "plain first" }, "Retry");
  button.addEventListener("click", () => {
    toMessage(); // its button goes away
    retry();
  });
  notice.replaceChildren(make("span", { role: "alert" }, make("strong", {}, `${title}.`), ` ${text}`), button);
  notice.hidden = false;
}

// ---- what the reader does

/** @param {string} text for the status line */
function say(text) {
  if (status.textContent !== text) status.textContent = text; // or it might be read out again
}

/** Something has grown. */
function shown() {
  follower.grown();
  inspector.show();
}

/** Moves the focus where a click lost it; not on a touch screen, where the keyboard would appear. */
function toMessage() {
  const typing = matchMedia("(hover: hover)").matches;
  if (loginPanel.isOpen) loginPanel.focus({ typing });
  else if (typing) composer.focus();
  else if (navigator.userActivation?.hasBeenActive) scroller.focus({ preventScroll: true });
}

/** Closed by key: the focus returns to its handle. */
function closeCard() {
  const wasInside = card.contains(document.activeElement);
  card.open = false;
  if (wasInside) card.querySelector("summary")?.focus();
}

/** @param {HTMLButtonElement} button one that copies @returns {string} what it copies */
function textToCopy(button) {
  if (button.dataset.copy === "code") return button.closest("figure")?.querySelector("code")?.textContent ?? "";
  return transcript.textToCopy(button);
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (card.open) closeCard();
  else if (isBusy) chat.stop();
  else if (composer.isEditing) {
    stopEditing();
    editEnded();
  }
});

document.addEventListener("click", (event) => {
  const target = /** @type {Element} */ (event.target);
  if (card.open && !card.contains(target)) card.open = false;
  const button = target.closest("button");
  if (!button) return;
  if (button.dataset.prompt && !isBusy) {
    ask(button.dataset.prompt);
    toMessage();
  } else if (button.dataset.copy) {
    void copy(button, textToCopy(button));
  }
});

latest.addEventListener("click", toMessage);
byId("fresh", HTMLButtonElement).addEventListener("click", startAnew);
keep.addEventListener("change", switchKeeping);
addEventListener("pagehide", () => {
  if (isBusy) keepTurns(); // with what has arrived of the answer; the rest is kept already, perhaps by another tab
});

signOutButton.addEventListener("click", () => void leave());
tabs.addEventListener("message", goodbye);

addEventListener("offline", () => say("You are offline."));
addEventListener("online", () => {
  if (isBusy) return;
  say("You are online again.");
  void refresh();
});

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && !isBusy && !staysOut(visitor)) void refresh();
});

chat.subscribe(sayProgress);
toMessage();
void refresh();
