// @ts-check
/** The view stays at the end of a growing conversation, but only for a reader who is there. */

/** Pixels from the end within which a reader counts as reading the end. */
const AT_END = 40;

export class Follower {
  #scroller;
  #latest;
  #following = true;

  /**
   * @param {HTMLElement} scroller
   * @param {HTMLButtonElement} latest the way to the end, for who is not there
   */
  constructor(scroller, latest) {
    this.#scroller = scroller;
    this.#latest = latest;
    const scrolled = () => {
      this.#following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight <= AT_END;
      latest.hidden = this.#following;
    };
    scroller.addEventListener("scroll", scrolled, { passive: true });
    latest.addEventListener("click", () => this.toEnd());
  }

  toEnd() {
    this.#following = true;
    this.grown();
  }

  /** There is nothing to be followed yet. */
  reset() {
    this.#following = this.#latest.hidden = true;
  }

  /** Something has grown: stay at the end, or offer the way there. */
  grown() {
    if (this.#following) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#latest.hidden = this.#following;
  }
}
