// @ts-check
/** Making and finding elements, so that the rest of the page reads as what it shows. */

import { duration } from "./format.js";

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, string>} [attrs] `class`, `type`, `aria-…`: anything but styles and handlers
 * @param {...(string | Node)} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function make(tag, attrs = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attrs)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * An element that index.html has.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new TypeError(`index.html has no ${kind.name} #${id}`);
  return found;
}

/** Milliseconds between two looks at a countdown. */
const TICK = 250;

/**
 * Closes a button until it makes sense to press it.
 * @param {HTMLButtonElement} button
 * @param {number} seconds
 * @param {string} waiting its label until then, "… in 12 seconds"
 * @param {string} [ready] its label from then on
 * @returns {ReturnType<typeof setInterval>} to be cleared when that is not wanted any more
 */
export function countDown(button, seconds, waiting, ready = waiting) {
  const end = performance.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `${waiting} in ${duration(left)}` : ready;
    if (left <= 0) clearInterval(timer);
  };
  const timer = setInterval(tick, TICK);
  tick();
  return timer;
}

/** Milliseconds that a copy button says how it went. */
const COPY_NOTE = 1_600;

/**
 * @param {HTMLButtonElement} button says for a moment how it went
 * @param {string} text
 */
export async function copy(button, text) {
  const label = button.dataset.label ?? (button.dataset.label = button.textContent ?? "");
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // the browser, or the reader, said no
  }
  setTimeout(() => {
    button.textContent = label;
  }, COPY_NOTE);
}
