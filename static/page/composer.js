// @ts-check
/**
 * Where a question is written: the message box, the one button beside it that sends or stops, and the line above it
 * while the last question is edited.
 *
 * Rules of this file:
 * 1. It takes and gives text; what becomes of it is decided in page.js.
 * 2. No typed text is lost: an edit sets a draft aside, and its end brings it back.
 * 3. The button stays in its place and keeps the focus: only its name and picture change.
 */

export class Composer {
  #form;
  #message;
  #send;
  #editing;
  #busy = false;
  #locked = false;
  /** @type {string | null} what was in the box before the edit under way; null: there is none */
  #draft = null;

  /**
   * @param {object} elements
   * @param {HTMLFormElement} elements.form
   * @param {HTMLTextAreaElement} elements.message
   * @param {HTMLButtonElement} elements.send
   * @param {HTMLElement} elements.editing the line that says so
   * @param {HTMLButtonElement} elements.cancel ends the edit
   * @param {object} handlers
   * @param {(question: string, edited: boolean) => void} handlers.onAsk
   * @param {() => void} handlers.onStop
   * @param {() => void} handlers.onEditEnd the question stays as it was
   */
  constructor({ form, message, send, editing, cancel }, { onAsk, onStop, onEditEnd }) {
    this.#form = form;
    this.#message = message;
    this.#send = send;
    this.#editing = editing;

    const ask = () => {
      const question = this.text;
      if (question === "" || this.#busy || this.#locked) return;
      const edited = this.#draft !== null;
      this.#show(this.#draft ?? "");
      onAsk(question, edited);
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#busy) onStop();
      else ask();
    });
    send.addEventListener("click", (event) => {
      if (this.#busy && event.detail > 1) event.preventDefault(); // the second half of a double click on Send
    });
    message.addEventListener("keydown", (event) => {
      const composing = event.isComposing || event.keyCode === 229; // Enter that ends an input method's word
      if (event.key !== "Enter" || event.shiftKey || composing) return;
      event.preventDefault();
      ask();
    });
    message.addEventListener("input", () => this.#grow());
    cancel.addEventListener("click", () => {
      this.endEdit();
      onEditEnd();
    });
  }

  get text() {
    return this.#message.value.trim();
  }

  get isEditing() {
    return this.#draft !== null;
  }

  /** @param {string} question that is to be asked anew, in other words */
  edit(question) {
    const draft = this.#draft ?? this.#message.value;
    this.#show(question);
    this.#draft = draft;
    this.#editing.hidden = false;
  }

  /** The draft comes back, if an edit had set one aside. */
  endEdit() {
    if (this.#draft !== null) this.#show(this.#draft);
  }

  /** @param {string} question that was not answered: it comes before what was written since */
  putBack(question) {
    this.endEdit();
    this.#show([question, this.text].filter(Boolean).join("\n\n"));
  }

  /** @param {() => string} find a draft from elsewhere, asked for only where it would overwrite nothing */
  fill(find) {
    if (this.#message.value === "") this.#show(find());
  }

  clear() {
    this.#show("");
  }

  focus() {
    this.#message.focus();
  }

  /** @param {boolean} busy an answer is under way: the button stops it */
  setBusy(busy) {
    this.#busy = busy;
    this.#send.setAttribute("aria-label", busy ? "Stop" : "Send");
    this.#send.title = busy ? "Stop (Esc)" : "Send (Enter)";
  }

  /** @param {boolean} locked no question is allowed: the box is hidden */
  lock(locked) {
    this.#locked = locked;
    this.#form.hidden = locked;
    if (locked) this.#editing.hidden = true;
    else this.#editing.hidden = this.#draft === null;
    this.#grow(); // it could not while it was hidden
  }

  /** @param {string} text an edit ends with it */
  #show(text) {
    this.#draft = null;
    this.#editing.hidden = true;
    this.#message.value = text;
    this.#grow();
  }

  /** Where the browser does not do it by itself (field-sizing), the box grows with its text. */
  #grow() {
    if (CSS.supports("field-sizing", "content")) return;
    this.#message.style.height = "auto";
    this.#message.style.height = `${this.#message.scrollHeight}px`;
  }
}
