// @ts-check
/**
 * One question and its answer on the screen.
 *
 * Rules of this file:
 * 1. It shows; what happens is decided in page.js, and what is said in the conversation.
 * 2. A long answer is drawn less often, so that the page stays quick.
 * 3. A broken answer carries its mark as long as it stands.
 * 4. What was answered before stays until the first word of another try: a refused retry takes nothing away.
 * 5. Screen readers: the growing answer is aria-busy and no live region; errors are an alert, without the countdown.
 */

import { MarkdownView } from "../markdown/markdown.js";
import { adviceFor } from "./error-texts.js";
import { countDown, make } from "./dom.js";
import { elapsed, plural } from "./format.js";

/** @typedef {import("../chat/client.js").ChatError} ChatError */
/** @typedef {import("../chat/client.js").Metrics} Metrics */
/** @typedef {import("../chat/conversation.js").ShownMessage} ShownMessage */

/** Drawing may take this share of the time, so that the page stays quick on a slow device or in a long answer. */
const DRAWING_SHARE = 0.2;
/** Milliseconds between two updates of the running figures: faster cannot be read. */
const FIGURES = 250;

export class Turn {
  #text = ""; // what is shown of the answer, or is about to be
  #drawn = 0; // characters of it
  /** @type {ReturnType<typeof setTimeout> | undefined} until it may be drawn again */
  #timer;
  /** @type {ReturnType<typeof setInterval> | undefined} */
  #countdown;
  #hasBegun = false; // the answer of this try
  #isWhole = false; // the answer that stands here
  /** @type {Metrics | null} */
  #metrics = null;
  #figuresAt = 0;
  #onShown;

  /**
   * @param {string} question
   * @param {{onRetry: () => void, onEdit: () => void, onShown: () => void}} handlers `onShown`: something has grown
   */
  constructor(question, { onRetry, onEdit, onShown }) {
    this.#onShown = onShown;
    this.body = make("div", { class: "md" });
    this.mark = make("p", { class: "mark", hidden: "" });
    this.problem = make("div", { class: "problem", hidden: "" });
    this.figures = make("p", { class: "figures" });
    this.retry = make("button", { type: "button", class: "plain" }, "Retry");
    this.retry.addEventListener("click", onRetry);
    this.copy = make("button", { type: "button", class: "plain", "data-copy": "answer" }, "Copy");
    this.edit = make("button", { type: "button", class: "plain edit", "aria-label": "Edit question" }, "Edit");
    this.edit.addEventListener("click", onEdit);
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
    this.begin();
  }

  /** @param {ShownMessage} [answer] of before, as it was kept; none where the question was not answered */
  restore(answer) {
    this.#draw(answer?.text ?? "");
    this.#end();
    this.#settle(answer?.state === "complete");
    if (!answer) this.#showMark("Not answered.");
    else if (answer.state !== "complete") this.#showMark("This is a part of the answer.");
    this.#onShown();
  }

  /** The question goes out, perhaps again. */
  begin() {
    clearInterval(this.#countdown);
    this.#hasBegun = false;
    this.#figuresAt = 0;
    this.answer.setAttribute("aria-busy", "true");
    this.answer.dataset.state = "waiting";
    this.problem.hidden = true;
    this.problem.replaceChildren();
    this.figures.replaceChildren();
    this.copy.hidden = this.retry.hidden = this.edit.hidden = true;
  }

  /**
   * @param {string} text of the answer so far
   * @param {Metrics} metrics
   */
  grow(text, metrics) {
    if (!this.#hasBegun) this.#clear();
    if (text === "") return; // the model is thinking
    this.answer.dataset.state = "streaming";
    this.#text = text;
    this.#metrics = metrics;
    if (this.#timer === undefined) this.#update();
  }

  /** Nothing of an earlier try is left. */
  #clear() {
    this.#hasBegun = true;
    this.#isWhole = false;
    this.#text = "";
    this.#drawn = 0;
    this.body.replaceChildren();
    this.view = new MarkdownView(this.body);
    this.mark.hidden = true;
  }

  /** Draws what has come, and again after a pause that is in proportion to what it took. */
  #update() {
    this.#timer = undefined;
    if (this.#drawn === this.#text.length) return;
    const began = performance.now();
    this.#draw(this.#text);
    if (began - this.#figuresAt >= FIGURES) {
      this.#figuresAt = began;
      this.#showFigures(this.#metrics);
    }
    this.#onShown();
    this.#timer = setTimeout(() => this.#update(), (performance.now() - began) / DRAWING_SHARE);
  }

  /** @param {string} text of the answer so far */
  #draw(text) {
    this.#text = text;
    this.view.append(text.slice(this.#drawn));
    this.#drawn = text.length;
  }

  /** What has arrived is shown, and nothing comes any more. */
  #end() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (this.#drawn < this.#text.length) this.#draw(this.#text);
    this.view.finish();
    this.answer.removeAttribute("aria-busy");
    this.copy.hidden = this.#text === "";
    this.retry.hidden = this.edit.hidden = false;
  }

  /** @param {boolean} whole what stands here, and stays */
  #settle(whole) {
    this.answer.dataset.state = whole ? "complete" : "stopped";
    this.#name(whole ? "Regenerate" : "Ask again");
    this.#isWhole = whole;
  }

  /**
   * @param {ShownMessage} answer
   * @param {Metrics} metrics
   */
  complete({ text, finishReason }, metrics) {
    if (!this.#hasBegun) this.#clear();
    this.#text = text;
    this.#end();
    this.#settle(true);
    this.#showFigures(metrics);
    if (finishReason === "length") this.#showMark("Ended at the length limit: ask it to go on for the rest.");
    else if (finishReason === "content_filter") this.#showMark("Ended by the model's content filter.");
    else if (text === "") this.#showMark("The model answered with nothing.");
    this.#onShown();
  }

  /** @param {Metrics | null} metrics null: nothing had come */
  stopped(metrics) {
    this.#end();
    this.#settle(this.#isWhole);
    if (this.#text === "") this.#showMark("Stopped before the first word.");
    else if (this.#hasBegun) this.#showMark("Stopped: this is a part of the answer.");
    this.#showFigures(metrics);
    this.#onShown();
  }

  /**
   * @param {ChatError} error
   * @param {Metrics | null} metrics null: nothing had come
   */
  failed(error, metrics) {
    this.#end();
    const advice = adviceFor(error);
    this.answer.dataset.state = "failed";
    if (this.#hasBegun && this.#text !== "") this.#showMark("Interrupted: this is only a part of the answer.");
    this.#showFigures(metrics);
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

  /** @param {Metrics | null} metrics shown once there is text */
  #showFigures(metrics) {
    if (!this.#hasBegun || this.#text === "" || !metrics || metrics.ttft_ms === null) {
      this.figures.replaceChildren();
      return;
    }
    const { ttft_ms, tokens_per_s, tokens, total_ms } = metrics;
    const parts = [
      figure("first token", elapsed(ttft_ms), "ttft"),
      ...(tokens_per_s === null ? [] : [figure("", `${speedWords(tokens_per_s)} tokens/s`, "rate")]),
      figure("", plural(tokens, "token"), "tokens"),
      figure("", elapsed(total_ms), "total"),
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
