// @ts-check
/**
 * Markdown to DOM nodes, while the text is still arriving.
 *
 * Rules of this file:
 * 1. Model output is hostile. `parse` turns text into a tree of plain objects, and only `build` makes nodes of it: from
 *    tag and attribute names written here, with text nodes for all the rest. There is no HTML in between.
 * 2. Links are absolute http and https addresses. Images are shown as links: fetching one would tell its server what
 *    was said here.
 * 3. Finished blocks are left alone. New text is parsed together with the last block only, and that block's nodes are
 *    patched, not replaced, so that a selection or a focused button in it survives.
 * 4. Every loop is linear in its input, and nesting has a bound; deeper text is shown as it is written.
 * 5. What the reader cannot know to be unfinished is shown as if finished: `**bold` is bold before its end arrives.
 *
 * The dialect is what models write: CommonMark's usual parts and tables. A line break is a line break. A formula in TeX
 * is shown as it is written, with every backslash. Left out: raw HTML (but for `<br>`, the only way to a new line in a
 * table), reference links, setext headings, indented code. tests/browser/test_commonmark.py has each deviation.
 *
 * Why not marked: its lexer (18.2.1, measured in December 2026) reads 560 of CommonMark's 652 cases where this file reads
 * 386, nearly all of the difference in what is left out here. But 5,000 nested quotes or lists overflow its stack,
 * `a**b` repeated takes four times as long for twice the text, half-finished text is shown as marks, it has 52 KB where
 * this file has 12 (both minified), and a page without a build step would have to carry a copy of it.
 */

/**
 * @typedef {object} VElement
 * @property {string} tag
 * @property {Record<string, string>} attrs
 * @property {VNode[]} children
 * @typedef {string | VElement} VNode a string is text
 * @typedef {{start: number, nodes: VNode[]}} Block `start` is its first line
 */

const MAX_DEPTH = 12; // lists in quotes in lists: people stop reading long before
const MAX_OPENERS = 100; // unclosed * and _ that one paragraph may keep open, and so the nesting of emphasis
const MAX_RUN = 6; // marks in a row: three have a meaning, a line of them is an ornament
const MAX_URL = 2048; // what every browser and server takes

/**
 * The whole of a text at once.
 * @param {string} source
 * @param {{open?: boolean}} [options] open: more is to come
 * @returns {VNode[]}
 */
export function parse(source, { open = false } = {}) {
  return blocks(source.split(/\r\n?|\n/), { open, depth: 0 }).flatMap((block) => block.nodes);
}

/** Keeps one element's content equal to a Markdown text that grows. */
export class MarkdownView {
  #root;
  #document;
  #tail = ""; // the source of the block that may still change
  #cr = false; // it ends in a CR, which may be half of a line end
  #settled = 0; // nodes before it
  /** @type {VNode[]} */
  #shown = []; // what stands after them

  /**
   * @param {HTMLElement} root empty, and not changed elsewhere
   * @param {Document} [document]
   */
  constructor(root, document = globalThis.document) {
    this.#root = root;
    this.#document = document;
  }

  /** @param {string} text what is new */
  append(text) {
    const whole = this.#cr ? `\r${text}` : text;
    this.#cr = whole.endsWith("\r");
    this.#tail += (this.#cr ? whole.slice(0, -1) : whole).replace(/\r\n?/g, "\n");
    this.#show(true);
  }

  /** No more text: what was shown on credit is shown as it stands. */
  finish() {
    this.#show(false);
  }

  /** @param {boolean} open */
  #show(open) {
    const tail = this.#tail.split("\n");
    const found = blocks(tail, { open, depth: 0 });
    const next = found.flatMap((block) => block.nodes);
    patch(this.#document, this.#root, this.#settled, this.#shown, next);
    this.#shown = next;
    this.#settle(found, tail);
  }

  /**
   * A block is settled when another one begins below it: nothing can join it any more. Two complete lines decide that
   * one begins, because the second one is what makes a table.
   * @param {Block[]} found
   * @param {string[]} tail
   */
  #settle(found, tail) {
    const last = found.findLastIndex((block) => block.start < tail.length - 2);
    if (last <= 0) return;
    const nodes = found.slice(0, last).reduce((count, block) => count + block.nodes.length, 0);
    this.#settled += nodes;
    this.#shown = this.#shown.slice(nodes);
    this.#tail = tail.slice(found[last].start).join("\n");
  }
}

// ---- blocks

const FENCE = /^( *)(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const TASK = /^\[([ xX])\] (?=\S)/;
const DELIMITER_CELL = /^:?-+:?$/;
/** A last line that may yet become a marker: not shown until it is known. */
const HALF_A_MARKER = /^ *(?:#{1,6}|[-*+]{1,2}|_{1,2}|\d{1,3}[.)]|`{1,2}|~{1,2}|>|\|)$/;

/**
 * @param {string[]} source lines; the last one has no end yet
 * @param {{open: boolean, depth: number}} context
 * @returns {Block[]}
 */
function blocks(source, { open, depth }) {
  /** @type {Block[]} */
  const found = [];
  for (let at = 0; at < source.length; ) {
    if (source[at].trim() === "") {
      at += 1;
      continue;
    }
    const block = blockAt(source, at, { open, depth });
    if (block.nodes.length) found.push({ start: at, nodes: block.nodes });
    at = block.end;
  }
  return found;
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {{open: boolean, depth: number}} context
 * @returns {{end: number, nodes: VNode[]}}
 */
function blockAt(source, at, context) {
  const line = source[at];
  const last = context.open && at === source.length - 1;
  if (last && HALF_A_MARKER.test(line)) return { end: at + 1, nodes: [] };
  const deeper = context.depth < MAX_DEPTH;
  if (isFence(line)) return last ? { end: at + 1, nodes: [] } : fence(source, at, context.open);
  if (HEADING.test(line)) return heading(line, at, last);
  if (RULE.test(line)) return { end: at + 1, nodes: [element("hr")] };
  if (deeper && QUOTE.test(line)) return quote(source, at, context);
  if (deeper && isItem(line)) return list(source, at, context);
  if (isTable(source, at, context.open)) return table(source, at, context.open);
  return paragraph(source, at, context);
}

/** @param {string} line */
function isFence(line) {
  const match = FENCE.exec(line);
  return match !== null && match[1].length <= 3;
}

/** @param {string} line */
function isItem(line) {
  const match = ITEM.exec(line);
  return match !== null && match[1].length <= 3 && !RULE.test(line);
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {number} depth
 * @returns {boolean} whether a paragraph ends above this line
 */
function interrupts(source, at, depth) {
  const line = source[at];
  if (isFence(line) || HEADING.test(line) || RULE.test(line)) return true;
  if (depth < MAX_DEPTH && (QUOTE.test(line) || isItem(line))) return !/^ *\d/.test(line) || /^ *1[.)]/.test(line);
  return isTable(source, at, false);
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {boolean} open
 */
function fence(source, at, open) {
  const [, indent, mark, info] = /** @type {RegExpExecArray} */ (FENCE.exec(source[at]));
  const text = [];
  let end = at + 1;
  let closed = false;
  for (; end < source.length && !closed; end += 1) {
    closed = closesFence(source[end], mark);
    if (!closed) text.push(dedent(source[end], indent.length));
  }
  const last = text.at(-1) ?? "";
  if (!closed && (last === "" || (open && half(last, mark)))) text.pop();
  return { end, nodes: [code(text.join("\n"), info.trim().split(/\s/, 1)[0])] };
}

/**
 * @param {string} line
 * @param {string} mark
 */
function closesFence(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text === mark[0].repeat(text.length) && indentOf(line) <= 3;
}

/**
 * @param {string} line the last one of an open fence
 * @param {string} mark
 * @returns {boolean} whether it may be the beginning of the closing fence
 */
function half(line, mark) {
  const text = line.trim();
  return text.length < mark.length && text === mark[0].repeat(text.length);
}

/**
 * @param {string} text
 * @param {string} language as the model named it
 * @returns {VElement}
 */
function code(text, language) {
  const name = language.slice(0, 30);
  return element("figure", { class: "code" }, [
    element("figcaption", {}, [
      element("span", {}, [name || "text"]),
      element("button", { type: "button", "data-copy": "code" }, ["Copy"]),
    ]),
    element("pre", { tabindex: "0", dir: "ltr", role: "group", "aria-label": name ? `Code, ${name}` : "Code" }, [
      element("code", {}, [text]),
    ]),
  ]);
}

/**
 * @param {string} line
 * @param {number} at
 * @param {boolean} open
 */
function heading(line, at, open) {
  const [, marks, rest = ""] = /** @type {RegExpExecArray} */ (HEADING.exec(line));
  const words = rest.trim().split(" ");
  if (/^#+$/.test(words.at(-1) ?? "")) words.pop(); // the optional closing marks
  const tag = `h${Math.min(6, marks.length + 2)}`; // the page has h1 and h2
  return { end: at + 1, nodes: [element(tag, { dir: "auto" }, inline(words.join(" "), { open }))] };
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {{open: boolean, depth: number}} context
 */
function quote(source, at, { open, depth }) {
  const inner = [];
  let end = at;
  for (; end < source.length; end += 1) {
    const marked = QUOTE.test(source[end]);
    if (!marked && (source[end].trim() === "" || !continues(source, end, depth))) break;
    inner.push(marked ? source[end].replace(QUOTE, "") : source[end]);
  }
  const more = open && end === source.length;
  const nodes = blocks(inner, { open: more, depth: depth + 1 }).flatMap((block) => block.nodes);
  return { end, nodes: [element("blockquote", { dir: "auto" }, directing(nodes))] };
}

/**
 * An element with a direction of its own is not looked at when that of its parent is found (HTML, `dir=auto`).
 * @param {VNode[]} nodes
 * @returns {VNode[]} the same; the first one has the direction of what it stands in, and so decides about it
 */
function directing(nodes) {
  const [first, ...rest] = nodes;
  if (typeof first !== "object" || first.tag !== "p") return nodes;
  return [element("p", {}, first.children), ...rest];
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {{open: boolean, depth: number}} context
 */
function list(source, at, context) {
  const kind = markerKind(source[at]);
  /** @type {VNode[]} */
  const items = [];
  let end = at;
  while (end < source.length && isItem(source[end]) && markerKind(source[end]) === kind) {
    const found = item(source, end, context);
    items.push(found.item);
    end = found.end;
  }
  const number = parseInt(source[at].trim(), 10);
  const ordered = !Number.isNaN(number);
  const attrs = { dir: "auto", ...(ordered && number !== 1 ? { start: String(number) } : {}) };
  return { end, nodes: [element(ordered ? "ol" : "ul", attrs, items)] };
}

/** @param {string} line an item @returns {string} what items of one list have in common */
function markerKind(line) {
  const [, , marker] = /** @type {RegExpExecArray} */ (ITEM.exec(line));
  return marker.length > 1 ? marker.slice(-1) : marker;
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {{open: boolean, depth: number}} context
 * @returns {{end: number, item: VElement}}
 */
function item(source, at, { open, depth }) {
  const [, indent, marker, space = " ", text = ""] = /** @type {RegExpExecArray} */ (ITEM.exec(source[at]));
  const width = indent.length + marker.length + (space.length > 4 ? 1 : space.length);
  const least = Math.min(width, indent.length + 2); // models often indent by two under "1."
  const inner = [text.replace(TASK, (_, done) => (done === " " ? "☐ " : "☑ "))];
  let end = at + 1;
  for (; end < source.length; end += 1) {
    const line = source[end];
    const blank = line.trim() === "";
    if (!blank && indentOf(line) < least && !continues(source, end, depth)) break;
    inner.push(dedent(line, width));
  }
  const kept = withoutBlankEnd(inner); // its blank lines stay in `end`: they separate nothing
  const more = open && end === source.length;
  const children = blocks(kept, { open: more, depth: depth + 1 }).flatMap((block) => block.nodes);
  return { end, item: element("li", {}, tight(children)) };
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {number} depth
 * @returns {boolean} whether a line without indent still belongs to the paragraph above it
 */
function continues(source, at, depth) {
  const above = source[at - 1].replace(QUOTE, "");
  return above.trim() !== "" && !isFence(above.trim()) && !ITEM.test(withoutTabs(source[at])) && !interrupts(source, at, depth);
}

/** @param {string[]} source */
function withoutBlankEnd(source) {
  return source.slice(0, source.findLastIndex((line) => line.trim() !== "") + 1);
}

/**
 * @param {VNode[]} children of an item
 * @returns {VNode[]} the same, its first paragraph without its element
 */
function tight(children) {
  const [first, ...rest] = children;
  const plain = typeof first === "object" && first.tag === "p";
  return plain ? merge([...first.children, ...rest]) : children;
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {boolean} open then a table may be shown before its second line is complete
 */
function isTable(source, at, open) {
  const header = source[at];
  if (!header.includes("|")) return false;
  const rule = source[at + 1];
  const guess = open && header.trim().startsWith("|");
  if (rule === undefined) return guess;
  if (guess && at + 2 === source.length && /^[ \t|:-]*$/.test(rule)) return true;
  const marks = cells(rule);
  return marks.every((cell) => DELIMITER_CELL.test(cell)) && marks.length === cells(header).length;
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {boolean} open
 */
function table(source, at, open) {
  const header = cells(source[at]);
  const sides = cells(source[at + 1] ?? "").map(side);
  const rows = [];
  let end = Math.min(at + 2, source.length);
  for (; end < source.length && source[end].includes("|"); end += 1) {
    if (!(open && end === source.length - 1 && HALF_A_MARKER.test(source[end]))) rows.push(cells(source[end]));
  }
  const node = element("table", { dir: "auto" }, [
    element("thead", {}, [row("th", header, header.length, sides)]),
    element("tbody", {}, rows.map((texts) => row("td", texts, header.length, sides))),
  ]);
  const attrs = { class: "table", tabindex: "0", role: "group", "aria-label": "Table" };
  return { end, nodes: [element("div", attrs, [node])] };
}

/**
 * @param {"th" | "td"} tag
 * @param {string[]} texts
 * @param {number} width
 * @param {string[]} sides
 */
function row(tag, texts, width, sides) {
  const filled = Array.from({ length: width }, (_, column) => texts[column] ?? "");
  return element(
    "tr",
    {},
    filled.map((text, column) => {
      /** @type {Record<string, string>} */
      const attrs = tag === "th" ? { scope: "col" } : {};
      if (sides[column]) attrs.class = sides[column];
      return element(tag, attrs, inline(text));
    }),
  );
}

/** @param {string} rule @returns {string} a class */
function side(rule) {
  if (!rule.endsWith(":")) return "";
  return rule.startsWith(":") ? "center" : "end";
}

/** @param {string} line of a table @returns {string[]} */
function cells(line) {
  const text = line.trim().replace(/^\|/, "");
  const found = text.replace(/\\[\\|]|\|/g, (mark) => (mark === "|" ? "\n" : mark === "\\|" ? "|" : mark)).split("\n");
  if (found.length > 1 && found.at(-1)?.trim() === "") found.pop();
  return found.map((cell) => cell.trim());
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {{open: boolean, depth: number}} context
 */
function paragraph(source, at, { open, depth }) {
  let end = at + 1;
  while (end < source.length && source[end].trim() !== "" && !interrupts(source, end, depth)) end += 1;
  const kept = source.slice(at, end);
  const more = open && end === source.length;
  if (more && HALF_A_MARKER.test(kept[kept.length - 1])) kept.pop();
  const children = inline(kept.map((line) => line.trimStart()).join("\n"), { open: more });
  return { end, nodes: children.length ? [element("p", { dir: "auto" }, children)] : [] };
}

/** @param {string} line */
function indentOf(line) {
  const spaced = withoutTabs(line);
  return spaced.length - spaced.trimStart().length;
}

/** @param {string} line @returns {string} its indent in spaces: a tab goes on to the next of every fourth column */
function withoutTabs(line) {
  const indent = /^[ \t]*/.exec(line)?.[0] ?? "";
  if (!indent.includes("\t")) return line;
  let columns = 0;
  for (const char of indent) columns += char === "\t" ? 4 - (columns % 4) : 1;
  return " ".repeat(columns) + line.slice(indent.length);
}

/**
 * @param {string} line
 * @param {number} width
 */
function dedent(line, width) {
  return width === 0 ? line : withoutTabs(line).slice(Math.min(width, indentOf(line)));
}

// ---- inline

/** What ends a formula, by what begins it. */
const FORMULA = /** @type {Record<string, string>} */ ({ "\\(": "\\)", "\\[": "\\]", $$: "$$", $: "$" });

/** @typedef {{char: string, count: number, opens: boolean, closes: boolean}} Run emphasis marks */
/** @typedef {VNode | Run} Item */

const TOKEN = /\\[([]|\$\$?|\\[!-/:-@[-`{-~]|`+|\*+|_+|~+|!?\[|\]|<(?=https?:)|<[bB][rR] ?\/?>|\bhttps?:\/\/|\\?\n|&(?:amp|lt|gt|quot|nbsp|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});/g;
const ENTITIES = /** @type {Record<string, string>} */ ({
  "&amp;": "&",
  "&lt;": "<",
  "&gt;": ">",
  "&quot;": '"',
  "&nbsp;": "\u00A0",
});

/** @param {string} reference a numeric one, like &#39; @returns {string} its character */
function character(reference) {
  const digits = reference.slice(2, -1);
  const code = /^x/i.test(digits) ? parseInt(digits.slice(1), 16) : parseInt(digits, 10);
  return code === 0 || code > 0x10ffff ? "\uFFFD" : String.fromCodePoint(code);
}

/**
 * @param {string} source
 * @param {{open?: boolean}} [options]
 * @returns {VNode[]}
 */
function inline(source, { open = false } = {}) {
  return emphasis(new Scanner(source, open).items(), open);
}

/** From text to items: words, code, links and line breaks are found, emphasis marks are left to be paired. */
class Scanner {
  #source;
  #open;
  #ticks;
  /** @type {Set<string>} ends of formulas that are not to come any more */
  #unclosed = new Set();
  /** @type {Item[]} */
  #items = [];
  /** @type {{at: number, from: number, image: boolean}[]} brackets that nothing closed yet */
  #brackets = [];
  #from = 0; // what is before this is in #items

  /**
   * @param {string} source
   * @param {boolean} open
   */
  constructor(source, open) {
    this.#source = source;
    this.#open = open;
    this.#ticks = tickRuns(source);
  }

  /** @returns {Item[]} */
  items() {
    const token = new RegExp(TOKEN);
    for (let match = token.exec(this.#source); match; match = token.exec(this.#source)) {
      const before = this.#source.slice(this.#from, match.index);
      this.#items.push(match[0].endsWith("\n") ? before.trimEnd() : before);
      this.#from = match.index + match[0].length;
      this.#take(match[0], match.index);
      token.lastIndex = this.#from;
    }
    this.#items.push(this.#source.slice(this.#from));
    return this.#items;
  }

  /**
   * @param {string} token
   * @param {number} at
   */
  #take(token, at) {
    const first = token[0];
    if (token.endsWith("\n") || /^<b/i.test(token)) this.#items.push(element("br"));
    else if (this.#formula(token, at)) return;
    else if (first === "\\") this.#items.push(token[1]);
    else if (first === "&") this.#items.push(ENTITIES[token] ?? character(token));
    else if (first === "`") this.#code(token);
    else if ("*_~".includes(first)) this.#items.push(run(this.#source, at, token));
    else if (token.endsWith("[")) this.#bracket(token);
    else if (token === "]") this.#link();
    else this.#address(token, at);
  }

  /** @param {string} token */
  #code(token) {
    const end = closingTicks(this.#ticks, token.length, this.#from) ?? (this.#open ? this.#source.length : null);
    if (end === null) {
      this.#items.push(token);
      return;
    }
    const text = this.#source.slice(this.#from, end);
    if (text !== "") this.#items.push(element("code", {}, [codeText(text)]));
    this.#from = Math.min(this.#source.length, end + token.length);
  }

  /**
   * @param {string} token
   * @param {number} at
   * @returns {boolean} whether one begins here
   */
  #formula(token, at) {
    if (!Object.hasOwn(FORMULA, token)) return false;
    const end = this.#formulaEnd(token, at);
    if (end === null) return false;
    this.#items.push(element("code", { class: "math" }, [this.#source.slice(at, end)]));
    this.#from = end;
    return true;
  }

  /**
   * @param {string} token
   * @param {number} at
   * @returns {number | null} null: it is none
   */
  #formulaEnd(token, at) {
    const mark = FORMULA[token];
    if (token === "\\[" && at > 0 && this.#source[at - 1] !== "\n") return null; // brackets that are meant as such
    const close = this.#unclosed.has(mark) ? -1 : this.#source.indexOf(mark, this.#from);
    if (close < 0) {
      this.#unclosed.add(mark); // never looked for again
      return this.#open && token !== "$" ? this.#source.length : null;
    }
    const end = close + mark.length;
    // Between two sums of money there is a space before the second, or its digits come after the sign.
    const isMoney = token === "$" && !/^[^\s$]([^$]*[^\s$\\])?\$\D?$/.test(this.#source.slice(this.#from, end + 1));
    return isMoney ? null : end;
  }

  /** @param {string} token */
  #bracket(token) {
    this.#brackets.push({ at: this.#items.length, from: this.#from, image: token[0] === "!" });
    this.#items.push(token);
  }

  #link() {
    const bracket = this.#brackets.pop();
    const link = bracket && destination(this.#source, this.#from, this.#open);
    if (!bracket || !link) {
      this.#items.push("]");
      return;
    }
    const [, ...items] = this.#items.splice(bracket.at);
    const inner = items.flatMap((item) => /** @type {Item[]} */ (isLink(item) ? item.children : [item]));
    const written = this.#source.slice(bracket.from - 1, link.end);
    this.#items.push(...linked(link.url, emphasis(inner, false), written, bracket.image));
    this.#brackets = []; // a link holds no link, and is in none
    this.#from = link.end;
  }

  /**
   * @param {string} token
   * @param {number} at
   */
  #address(token, at) {
    const angled = token === "<";
    const begin = angled ? this.#from : at;
    const url = bareUrl(this.#source, begin);
    if (url === "") {
      this.#items.push(token);
      return;
    }
    this.#items.push(...linked(url, [url], url, false));
    this.#from = begin + url.length + (angled && this.#source[begin + url.length] === ">" ? 1 : 0);
  }
}

/** @param {Item} item @returns {item is VElement} */
function isLink(item) {
  return typeof item === "object" && "tag" in item && item.tag === "a";
}

/**
 * @param {string} source
 * @returns {Map<number, number[]>} where the runs of backticks are, by length, last first
 */
function tickRuns(source) {
  /** @type {Map<number, number[]>} */
  const found = new Map();
  for (const match of source.matchAll(/`+/g)) {
    const places = found.get(match[0].length) ?? [];
    found.set(match[0].length, places);
    places.push(match.index);
  }
  for (const places of found.values()) places.reverse();
  return found;
}

/**
 * @param {Map<number, number[]>} ticks
 * @param {number} length
 * @param {number} from
 * @returns {number | null} where the run begins that closes this one
 */
function closingTicks(ticks, length, from) {
  const places = ticks.get(length) ?? [];
  while (places.length && places[places.length - 1] < from) places.pop(); // never asked for again
  return places.at(-1) ?? null;
}

/** @param {string} text @returns {string} without the one space that lets code begin or end with a backtick */
function codeText(text) {
  const flat = text.replace(/\n/g, " ");
  return flat.startsWith(" ") && flat.endsWith(" ") && flat.trim() !== "" ? flat.slice(1, -1) : flat;
}

/**
 * What follows a `]`.
 * @param {string} source
 * @param {number} from
 * @param {boolean} open
 * @returns {{url: string, end: number} | null}
 */
function destination(source, from, open) {
  if (source[from] !== "(") return null;
  let depth = 0;
  const limit = Math.min(source.length, from + MAX_URL + 200); // with a title
  for (let at = from; at < limit; at += 1) {
    if (source[at] === "\n") return null;
    if (source[at] === "\\") at += 1;
    else if (source[at] === "(") depth += 1;
    else if (source[at] === ")" && (depth -= 1) === 0) {
      const [url = ""] = source.slice(from + 1, at).trim().split(/\s/, 1);
      return { url: url.replace(/^<(.*)>$/, "$1"), end: at + 1 };
    }
  }
  return open && limit === source.length ? { url: "", end: limit } : null; // its end is on its way: the text alone
}

/**
 * @param {string} url
 * @param {VNode[]} inner
 * @param {string} written as it stands in the source
 * @param {boolean} image
 * @returns {VNode[]}
 */
function linked(url, inner, written, image) {
  if (url === "") return inner;
  const href = safeUrl(url);
  if (href === null) return [image ? `!${written}` : written];
  const shown = inner.length ? inner : [url];
  return [element("a", { href }, merge(image ? ["Image: ", ...shown] : shown))];
}

/**
 * @param {string} url
 * @returns {string | null} the address, if a page may link to it
 */
export function safeUrl(url) {
  if (url.length > MAX_URL || !URL.canParse(url)) return null;
  const { protocol, username, password, href } = new URL(url);
  if (protocol !== "http:" && protocol !== "https:") return null;
  return username || password ? null : href; // https://your.bank@evil.example is no address that people read right
}

/**
 * @param {string} source
 * @param {number} at
 * @returns {string} the address that begins here, without the punctuation of the sentence around it
 */
function bareUrl(source, at) {
  const end = /[\s<>"`*|[\]]|$/g;
  end.lastIndex = at;
  let url = source.slice(at, Math.min(end.exec(source)?.index ?? source.length, at + MAX_URL));
  url = url.replace(/[.,;:!?'_~]+$/, "");
  while (url.endsWith(")") && count(url, ")") > count(url, "(")) url = url.slice(0, -1).replace(/[.,;:!?'_~]+$/, "");
  return /^https?:\/\/[^/]/.test(url) ? url : "";
}

/**
 * @param {string} text
 * @param {string} char
 */
function count(text, char) {
  return text.split(char).length - 1;
}

/** Scripts that put no space between words: there is none beside a mark, either. */
const DENSE = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u;

/**
 * CommonMark 0.31, 6.2: which marks can open and which can close.
 * @param {string} source
 * @param {number} at
 * @param {string} token
 * @returns {Run | string}
 */
function run(source, at, token) {
  const char = token[0];
  if (token.length > MAX_RUN || (char === "~" && token.length !== 2)) return token;
  const before = source[at - 1] ?? " ";
  const after = source[at + token.length] ?? " ";
  const [spaceBefore, spaceAfter] = [before, after].map((side) => /\s/.test(side));
  const [markBefore, markAfter] = [before, after].map((side) => /[\p{P}\p{S}]/u.test(side));
  const [denseBefore, denseAfter] = [before, after].map((side) => DENSE.test(side));
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore || denseBefore);
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter || denseAfter);
  const word = char === "_";
  return {
    char,
    count: token.length,
    opens: left && (!word || !right || markBefore),
    closes: right && (!word || !left || markAfter),
  };
}

/**
 * Pairs the marks. One stack of open marks with what stands after each; a closing mark takes the nearest fitting one.
 * @param {Item[]} items
 * @param {boolean} open
 * @returns {VNode[]}
 */
function emphasis(items, open) {
  /** @type {{run: Run, children: VNode[]}[]} */
  const stack = [{ run: { char: "", count: 0, opens: false, closes: false }, children: [] }];
  const top = () => stack[stack.length - 1].children;
  const end = items.findLastIndex((item) => item !== "");
  items.forEach((item, at) => {
    if (typeof item === "string" || "tag" in item) {
      top().push(item);
      return;
    }
    const left = item.closes ? close(stack, item) : item.count;
    if (left === 0) return;
    if (item.opens && stack.length <= MAX_OPENERS) stack.push({ run: { ...item, count: left }, children: [] });
    else if (!(open && at === end)) top().push(item.char.repeat(left));
  });
  while (stack.length > 1) collapse(stack, open);
  return merge(stack[0].children);
}

/**
 * @param {{run: Run, children: VNode[]}[]} stack
 * @param {Run} run
 * @returns {number} marks that found no partner
 */
function close(stack, run) {
  let left = run.count;
  while (left > 0) {
    const at = stack.findLastIndex((open) => open.run.char === run.char && pairs(open.run, run, left));
    if (at < 0) return left;
    while (stack.length - 1 > at) collapse(stack, false);
    const open = stack[at];
    const width = Math.min(2, left, open.run.count);
    const tag = run.char === "~" ? "del" : width === 2 ? "strong" : "em";
    const node = element(tag, {}, merge(open.children));
    left -= width;
    open.run.count -= width;
    if (open.run.count > 0) open.children = [node];
    else {
      stack.pop();
      stack[at - 1].children.push(node);
    }
  }
  return 0;
}

/**
 * @param {Run} open
 * @param {Run} close
 * @param {number} left
 * @returns {boolean} CommonMark's rule of three, so that `*foo**bar*` is one emphasis
 */
function pairs(open, close, left) {
  if (!open.closes && !close.opens) return true;
  return (open.count + left) % 3 !== 0 || (open.count % 3 === 0 && left % 3 === 0);
}

/**
 * Takes the last open mark off the stack: nothing closes it.
 * @param {{run: Run, children: VNode[]}[]} stack
 * @param {boolean} open then a strong one is taken for closed: its end is on its way
 */
function collapse(stack, open) {
  const { run, children } = /** @type {{run: Run, children: VNode[]}} */ (stack.pop());
  const parent = stack[stack.length - 1].children;
  const strong = open && run.count === 2 && run.char === "*";
  if (strong) parent.push(...(children.length ? [element("strong", {}, merge(children))] : []));
  else parent.push(run.char.repeat(run.count), ...children);
}

// ---- the tree, and its nodes

/**
 * @param {string} tag
 * @param {Record<string, string>} [attrs]
 * @param {VNode[]} [children]
 * @returns {VElement}
 */
function element(tag, attrs = {}, children = []) {
  return { tag, attrs, children };
}

/**
 * @param {VNode[]} nodes
 * @returns {VNode[]} the same without empty texts and with neighbouring texts joined
 */
function merge(nodes) {
  /** @type {VNode[]} */
  const merged = [];
  for (const node of nodes) {
    if (node === "") continue;
    const last = merged.at(-1);
    if (typeof node === "string" && typeof last === "string") merged[merged.length - 1] = last + node;
    else merged.push(node);
  }
  return merged;
}

/**
 * @param {Document} document
 * @param {VNode} node
 * @returns {Text | HTMLElement}
 */
function build(document, node) {
  if (typeof node === "string") return document.createTextNode(node);
  const made = document.createElement(node.tag);
  for (const [name, value] of Object.entries(node.attrs)) made.setAttribute(name, value);
  if (node.tag === "a") {
    made.setAttribute("target", "_blank");
    made.setAttribute("rel", "noopener noreferrer nofollow");
    made.setAttribute("title", node.attrs.href); // where it really goes
  }
  for (const child of node.children) made.append(build(document, child));
  return made;
}

/**
 * Makes the children of `parent` from `offset` on, which show `old`, show `next`.
 * @param {Document} document
 * @param {globalThis.Node} parent
 * @param {number} offset
 * @param {VNode[]} old
 * @param {VNode[]} next
 */
function patch(document, parent, offset, old, next) {
  const shared = Math.min(old.length, next.length);
  for (let at = 0; at < shared; at += 1) {
    patchOne(document, parent.childNodes[offset + at], old[at], next[at]);
  }
  for (let at = old.length; at > shared; at -= 1) parent.removeChild(parent.childNodes[offset + at - 1]);
  for (const node of next.slice(shared)) parent.appendChild(build(document, node));
}

/**
 * @param {Document} document
 * @param {globalThis.ChildNode} shown
 * @param {VNode} old
 * @param {VNode} next
 */
function patchOne(document, shown, old, next) {
  if (old === next) return;
  if (typeof old === "string" && typeof next === "string") {
    const text = /** @type {Text} */ (shown);
    if (next.startsWith(old)) text.appendData(next.slice(old.length));
    else text.data = next;
  } else if (typeof old === "object" && typeof next === "object" && sameShell(old, next)) {
    patch(document, shown, 0, old.children, next.children);
  } else {
    shown.replaceWith(build(document, next));
  }
}

/**
 * @param {VElement} a
 * @param {VElement} b
 */
function sameShell(a, b) {
  const names = Object.keys(a.attrs);
  return (
    a.tag === b.tag &&
    names.length === Object.keys(b.attrs).length &&
    names.every((name) => a.attrs[name] === b.attrs[name])
  );
}
