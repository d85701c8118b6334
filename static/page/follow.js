// @ts-check
/** The view stays at the end of a growing conversation, but only for a reader at the end. */

/** Pixels from the end within which a reader counts as reading the end. */
const AT_END = 40;
/** Pixels that may be missing at the very end: heights are whole numbers, and where a zoomed view stands is none. */
const ROUNDING = 2;

export class Follower {
  #scroller;
  #latest;
  #following = true;
  #top = 0; // where the view was last
  #room = new ResizeObserver(() => this.grown()); // a keyboard on the screen leaves less of it

  /**
   * @param {HTMLElement} scroller
   * @param {HTMLButtonElement} latest leads a reader elsewhere to the end
   */
  constructor(scroller, latest) {
    this.#scroller = scroller;
    this.#latest = latest;
    const scrolled = () => {
      const { scrollTop, scrollHeight, clientHeight } = scroller;
      const left = scrollHeight - scrollTop - clientHeight;
      // Any scrolling up stops following, by a line or a finger's breadth; nothing else does.
      this.#following = scrollTop < this.#top ? left <= ROUNDING : this.#following || left <= AT_END;
      this.#top = scrollTop;
      latest.hidden = this.#following;
    };
    scroller.addEventListener("scroll", scrolled, { passive: true });
    latest.addEventListener("click", () => this.toEnd());
  }

  toEnd() {
    this.#room.observe(this.#scroller);
    this.#following = true;
    this.grown();
  }

  /** There is nothing to be followed yet. */
  reset() {
    this.#room.disconnect();
    this.#following = this.#latest.hidden = true;
  }

  /** Something has grown: stay at the end, or offer the way there. */
  grown() {
    if (this.#following) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#top = this.#scroller.scrollTop;
    this.#latest.hidden = this.#following;
  }
}
