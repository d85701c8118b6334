// @ts-check
/**
 * One question and its answer on the screen.
 *
 * Rules of this file:
 * 1. It shows; what happens is decided in page.js. No request, no state of the conversation but its own text.
 * 2. Text that arrives is shown at once when it is the first, then in batches: an unseen frame costs the same.
 * 3. A broken answer carries its mark as long as it stands.
 * 4. What was answered before stays until the first word of another try: a refused retry takes nothing away.
 * 5. Screen readers: the growing answer is aria-busy and no live region; errors are an alert, without the countdown.
 */

import { adviceFor } from "./error-texts.js";
import { countDown, make } from "./dom.js";
import { elapsed, plural, rate } from "./format.js";
import { MarkdownView } from "./markdown.js";

/** @typedef {import("./chat/client.js").ChatError} ChatError */

/** Milliseconds between two updates of a growing answer. */
export const FLUSH = 50;
/** An update may take this share of the time, so that the page stays quick on a slow device or in a long answer. */
const FLUSH_SHARE = 0.2;
/** Milliseconds between two updates of the running figures: faster cannot be read. */
const FIGURES = 250;

export class Turn {
  /** What stands here of the answer. */
  text = "";
  /** Whether that is all of it. */
  whole = false;
  #pending = "";
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #countdown;
  #startedAt = 0;
  #firstAt = 0;
  #lastAt = 0;
  #tokens = 0;
  #figuresAt = 0;
  #onShown;

  /**
   * @param {string} question
   * @param {{onRetry: (turn: Turn) => void, onEdit: (turn: Turn) => void, onShown: () => void}} handlers `onShown`:
   *   something has grown
   */
  constructor(question, { onRetry, onEdit, onShown }) {
    this.question = question;
    this.#onShown = onShown;
    this.body = make("div", { class: "md" });
    this.mark = make("p", { class: "mark", hidden: "" });
    this.problem = make("div", { class: "problem", hidden: "" });
    this.figures = make("p", { class: "figures" });
    this.retry = make("button", { type: "button", class: "plain" }, "Retry");
    this.retry.addEventListener("click", () => onRetry(this));
    this.copy = make("button", { type: "button", class: "plain", "data-copy": "answer" }, "Copy");
    this.edit = make("button", { type: "button", class: "plain edit", "aria-label": "Edit question" }, "Edit");
    this.edit.addEventListener("click", () => onEdit(this));
    this.actions = make("div", { class: "actions" }, this.figures, make("div", {}, this.copy, this.retry));
    this.answer = make(
      "div",
      { class: "answer" },
      make("h2", { class: "sr" }, "Answer"),
      this.body,
      this.mark,
      this.problem,
      this.actions,
    );
    this.element = make(
      "article",
      { class: "turn" },
      make("h2", { class: "sr" }, "You"),
      make("div", { class: "asked" }, make("p", { class: "question", dir: "auto" }, question), this.edit),
      this.answer,
    );
    this.view = new MarkdownView(this.body);
    this.begin(performance.now());
  }

  /**
   * An answer of before, as it was kept.
   * @param {{text: string, whole: boolean}} answer
   */
  restore({ text, whole }) {
    this.text = text;
    this.whole = whole;
    this.view.append(text);
    this.#end();
    this.#settle();
    if (!whole) this.#showMark(text === "" ? "Not answered." : "This is a part of the answer.");
    this.#onShown();
  }

  /** @param {number} now milliseconds: the question goes out, perhaps again */
  begin(now) {
    clearInterval(this.#countdown);
    this.#startedAt = now;
    this.#firstAt = this.#lastAt = this.#tokens = this.#figuresAt = 0;
    this.answer.setAttribute("aria-busy", "true");
    this.answer.dataset.state = "waiting";
    this.problem.hidden = true;
    this.problem.replaceChildren();
    this.figures.replaceChildren();
    this.copy.hidden = this.retry.hidden = this.edit.hidden = true;
  }

  /** Nothing of an earlier try is left. */
  #clear() {
    this.text = "";
    this.whole = false;
    this.body.replaceChildren();
    this.view = new MarkdownView(this.body);
    this.mark.hidden = true;
  }

  /**
   * @param {string} text
   * @param {number} now
   */
  add(text, now) {
    if (this.#firstAt === 0) this.#clear();
    this.text += text;
    this.#pending += text;
    this.#tokens += 1;
    this.#lastAt = now;
    if (this.#firstAt === 0) {
      this.#firstAt = now;
      this.answer.dataset.state = "streaming";
      this.#flush();
    } else if (this.#timer === undefined) {
      this.#later(FLUSH);
    }
  }

  /** @param {number} milliseconds */
  #later(milliseconds) {
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#flush();
    }, milliseconds);
  }

  #flush() {
    if (this.#pending === "") return;
    const began = performance.now();
    this.view.append(this.#pending);
    this.#pending = "";
    if (began - this.#figuresAt >= FIGURES) {
      this.#figuresAt = began;
      this.#showFigures(began, this.#tokens);
    }
    this.#onShown();
    const cost = performance.now() - began;
    if (this.#timer === undefined) this.#later(Math.max(FLUSH, cost / FLUSH_SHARE));
  }

  /** What has arrived is shown, and nothing comes any more. */
  #end() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (this.#pending !== "") this.view.append(this.#pending);
    this.#pending = "";
    this.view.finish();
    this.answer.removeAttribute("aria-busy");
    this.copy.hidden = this.text === "";
    this.retry.hidden = this.edit.hidden = false;
  }

  /** What stands here now is how it stays. */
  #settle() {
    this.answer.dataset.state = this.whole ? "complete" : "stopped";
    this.#name(this.whole ? "Regenerate" : "Ask again");
  }

  /**
   * @param {{finishReason: string | null, metrics: import("./chat/client.js").Metrics, now: number}} facts
   */
  complete({ finishReason, metrics, now }) {
    if (this.#firstAt === 0) this.#clear();
    this.whole = true;
    this.#end();
    this.#settle();
    this.#showFigures(now, metrics.tokens, metrics.tokens_per_s);
    if (finishReason === "length") this.#showMark("Ended at the length limit: ask it to go on for the rest.");
    else if (finishReason === "content_filter") this.#showMark("Ended by the model's content filter.");
    else if (this.text === "") this.#showMark("The model answered with nothing.");
    this.#onShown();
  }

  /** @param {number} now */
  stopped(now) {
    this.#end();
    this.#settle();
    if (this.text === "") this.#showMark("Stopped before the first word.");
    else if (this.#firstAt !== 0) this.#showMark("Stopped: this is a part of the answer.");
    this.#showFigures(now, this.#tokens);
    this.#onShown();
  }

  /**
   * @param {ChatError} error
   * @param {number} now
   */
  failed(error, now) {
    this.#end();
    const advice = adviceFor(error);
    this.answer.dataset.state = "failed";
    if (this.#firstAt !== 0) this.#showMark("Interrupted: this is only a part of the answer.");
    this.#showFigures(now, this.#tokens);
    this.problem.hidden = false;
    this.problem.dataset.tone = advice.retry ? "passing" : "lasting";
    const alert = make("div", { role: "alert" });
    this.problem.replaceChildren(alert);
    alert.append(make("strong", {}, advice.title), make("p", { dir: "auto" }, advice.text));
    if (error.requestId) this.problem.append(make("p", { class: "request-id" }, `Request ${error.requestId}`));
    this.retry.hidden = !advice.retry;
    this.#name("Retry");
    if (advice.retry && error.retryAfter) this.#countdown = countDown(this.retry, error.retryAfter, "Retry");
    this.#onShown();
  }

  /** @param {string} label of the button that asks again */
  #name(label) {
    this.retry.textContent = label;
    this.retry.disabled = false;
    this.retry.classList.toggle("first", label === "Retry");
    this.retry.classList.toggle("again", label === "Regenerate");
  }

  /** @param {string} text */
  #showMark(text) {
    this.mark.textContent = text;
    this.mark.hidden = false;
  }

  /**
   * @param {number} now
   * @param {number} tokens
   * @param {number | null} [speed]
   */
  #showFigures(now, tokens, speed = rate(tokens, this.#lastAt - this.#firstAt)) {
    if (this.#firstAt === 0) {
      this.figures.replaceChildren();
      return;
    }
    const parts = [
      figure("first token", elapsed(this.#firstAt - this.#startedAt), "ttft"),
      ...(speed === null ? [] : [figure("", `${speedWords(speed)} tokens/s`, "rate")]),
      figure("", plural(tokens, "token"), "tokens"),
      figure("", elapsed(now - this.#startedAt), "total"),
    ];
    this.figures.replaceChildren(...parts);
  }

  /** Gone from the screen: nothing of it goes on. */
  dispose() {
    clearTimeout(this.#timer);
    clearInterval(this.#countdown);
    this.element.remove();
  }
}

/** @param {number} speed */
function speedWords(speed) {
  return speed < 10 ? speed.toFixed(1) : Math.round(speed).toLocaleString("en");
}

/**
 * @param {string} label
 * @param {string} value
 * @param {string} name
 */
function figure(label, value, name) {
  return make("span", { "data-figure": name }, ...(label ? [`${label} `] : []), make("b", {}, value));
}
