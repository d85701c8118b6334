// @ts-check
/**
 * The page: what happens when. What it looks like is in index.html and style.css, one question and its answer in
 * turn.js, the message box in composer.js, the way to the server in chat/client.js.
 *
 * Rules of this file:
 * 1. One answer at a time. `live` is its request; everything that ends it goes through its AbortController.
 * 2. The conversation is the turns on the screen. A reload forgets it, unless its owner has switched on storage.js.
 * 3. What broke before its first word is not sent along again: a message refused once would be refused for ever.
 * 4. A question that needs a login first is not lost: it waits in the message box, behind the login panel.
 * 5. Signing out leaves nothing on the screen, in any tab; nor does one user for the next.
 */

import { fetchAccount, needsLogin, showAccount, signOut } from "./account.js";
import { adviceFor } from "./error-texts.js";
import { streamChat } from "./chat/client.js";
import { Composer } from "./composer.js";
import { byId, copy, make } from "./dom.js";
import { duration, plural } from "./format.js";
import { Follower } from "./follow.js";
import * as storage from "./storage.js";
import { LoginPanel, keepDraft, takeDraft, wayOut } from "./login.js";
import { Turn } from "./turn.js";
import { Inspector } from "./inspector.js";

/** @typedef {import("./account.js").Account} Account */
/** @typedef {import("./account.js").SessionFacts} SessionFacts */
/** @typedef {import("./login.js").Situation} Situation */
/** @typedef {import("./chat/client.js").ChatError} ChatError */
/** @typedef {import("./chat/client.js").Message} Message */

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
const loginPanel = new LoginPanel(byId("login-panel", HTMLElement), { onEnter: entered, onLeave: () => keepDraft(composer.text, user) });
const composer = new Composer(
  {
    form: byId("composer", HTMLFormElement),
    message: byId("message", HTMLTextAreaElement),
    send: byId("send", HTMLButtonElement),
    editing: byId("editing", HTMLElement),
    cancel: byId("edit-cancel", HTMLButtonElement),
  },
  { onAsk: askOrEdit, onStop: stop, onEditEnd: editEnded },
);
const follower = new Follower(scroller, latest);
const tabs = new BroadcastChannel("chat-proxy signed out");

/** @type {Turn[]} */
const turns = [];
/** @type {AbortController | null} the request under way */
let live = null;
/** @type {Account | null} from the latest response of the server */
let account = null;
let accountVersion = 0; // how often the account was asked for or set: only the latest answer counts
let user = ""; // the last user with a name who signed in here
let stayedSignedOut = false; // signed out by hand, where asking would sign in again
let owner = ""; // whose kept conversation was looked for last

// ---- asking

/** @param {string} question */
function ask(question) {
  void run(addTurn(question));
}

/**
 * @param {string} question
 * @returns {Turn} on the screen
 */
function addTurn(question) {
  const turn = new Turn(question, { onRetry: askAgain, onEdit: edit, onShown: shown });
  turns.push(turn);
  welcome.hidden = true;
  turnList.append(turn.element);
  follower.toEnd();
  return turn;
}

/**
 * @param {string} question
 * @param {boolean} edited it takes the place of the last one
 */
function askOrEdit(question, edited) {
  const last = turns.at(-1);
  if (edited && last) remove(last);
  ask(question);
}

/** @param {Turn} turn the last one, whose question is to be put differently */
function edit(turn) {
  if (live || loginPanel.isOpen) return;
  composer.edit(turn.question);
  turnList.classList.add("editing");
  composer.focus();
  say("Editing. Esc cancels.");
}

function editEnded() {
  turnList.classList.remove("editing");
  say("");
  toMessage();
}

/** @param {Turn} turn */
function remove(turn) {
  turns.splice(turns.indexOf(turn), 1);
  turn.dispose();
  turnList.classList.remove("editing");
  welcome.hidden = turns.length > 0;
}

/** @param {Turn} turn */
function askAgain(turn) {
  if (live) return;
  if (composer.isEditing) stopEditing();
  toMessage(); // its button goes away
  if (!loginPanel.isOpen) void run(turn);
}

/** @param {Turn} turn its answer is asked for, perhaps again */
async function run(turn) {
  if (live) return;
  const controller = new AbortController();
  setLive(controller);
  turn.begin(performance.now());
  keepTurns();
  say("Waiting for the first word…");
  shown();
  const answer = streamChat({
    messages: history(turn),
    model: model.value || undefined,
    signal: controller.signal,
    onRequest: (request) => inspector.sent(request),
    onResponse: (response) => inspector.answered(response),
    onEvent: ({ data }) => inspector.event(data),
    onRetry: ({ delay }) => say(`Busy. Asking again in ${duration(delay / 1000)}.`),
  });
  try {
    for await (const delta of answer) {
      if (delta.type === "text") {
        say("Answering…");
        turn.add(delta.text, performance.now());
      } else if (delta.type === "reasoning" && answer.text === "") {
        say("The model is thinking…");
      }
    }
    if (live !== controller) return; // it was whole when a new conversation began
    const { finishReason, metrics } = answer;
    turn.complete({ finishReason, metrics, now: performance.now() });
    say(`Complete: ${plural(metrics.tokens, "token")}.`);
  } catch (caught) {
    const error = /** @type {ChatError} */ (caught);
    const shutOut = live === controller && (await isShutOut(error));
    if (live !== controller) return; // a new conversation has begun
    if (shutOut) takeBack(turn);
    else broke(turn, error);
  }
  if (live !== controller) return;
  setLive(null);
  keepTurns();
  inspector.show();
  if (!loginPanel.isOpen) void refresh();
}

/**
 * Whether it was refused for want of a session. Then the login panel is open now.
 * @param {ChatError} error
 */
async function isShutOut({ status, code }) {
  const mode = account?.session.mode;
  if (mode === "anonymous") return false; // a session without a login is replaced without a word
  const redirected = mode === "header" && code === "network_error"; // perhaps: to the sign-in in front of the server
  if (status !== 401 && !redirected) return false;
  await refresh();
  return loginPanel.isOpen;
}

/** @param {Turn} turn whose question goes back to where it was written */
function takeBack(turn) {
  remove(turn);
  composer.putBack(turn.question);
  say("Your question is kept.");
}

/** @param {AbortController | null} controller */
function setLive(controller) {
  live = controller;
  document.body.classList.toggle("busy", live !== null);
  composer.setBusy(live !== null);
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

function stopEditing() {
  composer.endEdit();
  turnList.classList.remove("editing");
}

function startAnew() {
  stop();
  setLive(null);
  stopEditing();
  for (const turn of [...turns]) remove(turn);
  follower.reset();
  keepTurns();
  say("New conversation.");
  toMessage();
}

// ---- the conversation, kept in this browser on request

/** Writes down what is on the screen, where that is switched on. */
function keepTurns() {
  const now = turns.map(({ question, text, whole }) => ({ question, text, whole }));
  if (!storage.save(owner, now)) say("This conversation is too long to be kept in this browser.");
}

/** @param {SessionFacts} session of a user that may chat */
function findKept(session) {
  const mine = storage.ownerOf(session);
  const found = storage.load(mine);
  keep.checked = found !== null;
  if (mine === owner) return; // it was found before, and what is on the screen is newer
  owner = mine;
  if (turns.length > 0) return;
  for (const { question, ...answer } of found ?? []) addTurn(question).restore(answer);
}

function switchKeeping() {
  if (!keep.checked) storage.switchOff(owner);
  else if (storage.switchOn(owner, [])) keepTurns();
  else {
    keep.checked = false;
    say("This browser keeps nothing for this site.");
  }
}

// ---- the account

async function refresh() {
  accountVersion += 1;
  const mine = accountVersion;
  let found;
  try {
    found = await fetchAccount();
  } catch (caught) {
    if (mine !== accountVersion) return;
    const error = /** @type {any} */ (caught);
    const advice = adviceFor(error);
    if (error.status === 401) accept(accountWithoutSession("header")); // not from our server: from a proxy in front of it
    else if (!model.options.length) showNotice(advice.title, advice.text, () => void refresh());
    return; // later, what is shown is good enough until the next answer
  }
  if (mine === accountVersion) accept(found);
}

/**
 * @param {string} [mode]
 * @returns {Account} the account without a session
 */
function accountWithoutSession(mode = account?.session.mode ?? "header") {
  return { session: { mode, user: null, expires_at: null }, models: account?.models ?? [], limits: [] };
}

/**
 * @param {Account} found is how it is from now on
 * @param {Situation} [situation] of a visitor without a session
 */
function accept(found, situation = account && !needsLogin(account.session) ? "ended" : "new") {
  accountVersion += 1;
  stayedSignedOut = false;
  const { session } = found;
  if (session.user !== null) {
    if (user !== "" && user !== session.user) forget();
    user = session.user;
  }
  account = found;
  const elements = {
    card,
    tightest: byId("tightest", HTMLElement),
    list: byId("limits", HTMLElement),
    state: byId("session-state", HTMLElement),
    signOut: signOutButton,
  };
  showAccount(elements, found, Date.now() / 1000);
  byId("welcome-state", HTMLElement).textContent = elements.state.textContent;
  showModels(found.models);
  notice.hidden = true;
  showDoor(session, situation);
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
 * @param {SessionFacts} session
 * @param {Situation} situation
 */
function showDoor(session, situation) {
  const away = needsLogin(session);
  const moves = away !== loginPanel.isOpen;
  if (away) {
    loginPanel.open(session.mode, situation);
    storage.forgetNameless();
  } else {
    loginPanel.close();
    composer.fill(() => takeDraft(session.user ?? ""));
    findKept(session);
  }
  composer.lock(away);
  document.body.classList.toggle("locked", away);
  const skip = byId("skip", HTMLAnchorElement);
  skip.href = away ? "#login-panel" : "#message";
  skip.textContent = away ? "Skip to the sign-in" : "Skip to the message box";
  if (moves) toMessage();
}

/** @param {Account} found after a password was right */
function entered(found) {
  accept(found);
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
  signedOut();
  const next = wayOut(url);
  if (next) location.assign(next);
}

/** Here, or in another tab. */
function signedOut() {
  if (!account) return;
  forget();
  storage.switchOff(owner);
  card.open = false;
  accept(accountWithoutSession(), "left");
  stayedSignedOut = account.session.mode === "header";
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
  return turns.find((turn) => turn.copy === button)?.text ?? "";
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (card.open) closeCard();
  else if (live) stop();
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
  if (button.dataset.prompt && !live) {
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
  if (live) keepTurns(); // with what has arrived of the answer; the rest is kept already, perhaps by another tab
});

signOutButton.addEventListener("click", () => void leave());
tabs.addEventListener("message", signedOut);

addEventListener("offline", () => say("You are offline."));
addEventListener("online", () => {
  if (live) return;
  say("You are online again.");
  void refresh();
});

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && !live && !stayedSignedOut) void refresh();
});

toMessage();
void refresh();
