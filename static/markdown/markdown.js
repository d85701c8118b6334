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
 *    patched, not replaced, so that a selection or a focused button in it survives. One thing waits for the end of the
 *    text: a reference link that stands above its definition becomes a link.
 * 4. Every loop is linear in its input, and nesting has a bound; deeper text is shown as it is written.
 * 5. What the reader cannot know to be unfinished is shown as if finished: `**bold` is bold before its end arrives.
 *
 * The dialect is what models write: CommonMark's usual parts and tables. A line break is a line break. A formula in TeX
 * is shown as it is written, with every backslash. Left out: raw HTML (but for `<br>`, the only way to a new line in a
 * table), indented code, and `---` below a heading. tests/browser/test_commonmark.py has each deviation.
 *
 * Why not marked: its lexer (18.2.1, measured in December 2026) reads 550 of CommonMark's 652 cases where this file
 * reads 487; nearly all of the difference is what is left out here. But `> ` repeated overflows its stack at 16 KB, and
 * `a**b` repeated takes four times as long for twice the text. While a text grows, it takes back what it has shown three
 * times as often. It has 51 KB where this file has 15 (both minified), and a page without a build step would have to
 * carry a copy of it.
 */

/**
 * @typedef {object} VElement
 * @property {string} tag
 * @property {Record<string, string>} attrs
 * @property {VNode[]} children
 * @typedef {string | VElement} VNode a string is text
 * @typedef {{start: number, nodes: VNode[]}} Block `start` is its first line
 * @typedef {Map<string, string>} References addresses by label
 * @typedef {{open: boolean, depth: number, references: References}} Context `open`: more text is to come
 */

const MAX_DEPTH = 12; // lists in quotes in lists: people stop reading long before
const MAX_OPENERS = 100; // unclosed * and _ that one paragraph may keep open, and so the nesting of emphasis
const MAX_RUN = 6; // marks in a row: three have a meaning, a line of them is an ornament
const MAX_URL = 2048; // what every browser and server takes
const MAX_LINK = MAX_URL + 1200; // with a label or a title

/**
 * The whole of a text at once.
 * @param {string} source
 * @param {{open?: boolean}} [options] open: more is to come
 * @returns {VNode[]}
 */
export function parse(source, { open = false } = {}) {
  /** @type {Context} */
  const context = { open, depth: 0, references: new Map() };
  const lines = source.split(/\r\n?|\n/);
  const once = nodesOf(blocks(lines, context));
  return context.references.size ? nodesOf(blocks(lines, context)) : once; // a link may stand above its definition
}

/** Keeps one element's content equal to a Markdown text that grows. */
export class MarkdownView {
  #root;
  #document;
  #source = "";
  #tail = ""; // the source of the block that may still change
  #cr = false; // it ends in a CR, which may be half of a line end
  /** @type {VNode[]} */
  #settled = []; // what stands before it
  /** @type {VNode[]} */
  #shown = []; // what stands after that
  /** @type {References} */
  #references = new Map();

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
    const added = (this.#cr ? whole.slice(0, -1) : whole).replace(/\r\n?/g, "\n");
    this.#source += added;
    this.#tail += added;
    this.#show(true);
  }

  /** No more text: what was shown on credit is shown as it stands, and links above their definitions become links. */
  finish() {
    this.#show(false);
    if (this.#references.size === 0) return;
    const whole = parse(this.#source);
    patch(this.#document, this.#root, 0, [...this.#settled, ...this.#shown], whole);
    this.#settled = [];
    this.#shown = whole;
    this.#tail = this.#source;
  }

  /** @param {boolean} open */
  #show(open) {
    const tail = this.#tail.split("\n");
    const found = blocks(tail, { open, depth: 0, references: this.#references });
    const next = nodesOf(found);
    patch(this.#document, this.#root, this.#settled.length, this.#shown, next);
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
    const settled = nodesOf(found.slice(0, last));
    pushAll(this.#settled, settled);
    this.#shown = this.#shown.slice(settled.length);
    this.#tail = tail.slice(found[last].start).join("\n");
  }
}

// ---- blocks

const FENCE = /^( *)(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const UNDERLINE = /^ {0,3}=+[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const INTERRUPTING_ITEM = /^ *(?:[-*+]|1[.)])[ \t]+\S/;
const TASK = /^\[([ xX])\] (?=\S)/;
const DELIMITER_CELL = /^:?-+:?$/;
/** A last line that may yet become a marker: not shown until it is known. */
const HALF_A_MARKER = /^ *(?:#{1,6}|[-*+]{1,2}|_{1,2}|=+|\d{1,3}[.)]?|\[[ xX]?\]?|`{1,2}|~{1,2}|>|\|) *$/;
const HALF_A_DEFINITION = /^ {0,3}\[[^[\]]+\]:[ \t]*<?(?:https?:.*|h?t?t?p?s?)$/i;

/** After a `[label]:`, and in parentheses after a `[text]`: an address, and perhaps a title, which is not shown. */
const ADDRESS = String.raw`(?:<((?:[^<>\n\\]|\\.)*)>|((?!<)(?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.|\([^\s()]*\))*\))*))`;
const TITLE = String.raw`(?:\s+(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\((?:[^()\\]|\\.)*\)))?`;
const LABEL = String.raw`\[((?:[^[\]\\]|\\.){0,999})\]`;
const DEFINITION = new RegExp(String.raw`^ {0,3}${LABEL}:[ \t]*${ADDRESS}${TITLE}[ \t]*$`);
const DESTINATION = new RegExp(String.raw`^\(\s*${ADDRESS}${TITLE}\s*\)`);
const HALF_A_DESTINATION = /^\(\s*(?:<[^<>\n]*|\S*)(?:\s+["'(][^\n]*)?$/;
const REFERENCE = new RegExp(LABEL, "sy");

/**
 * @param {string[]} source lines; the last one has no end yet
 * @param {Context} context
 * @returns {Block[]}
 */
function blocks(source, context) {
  /** @type {Block[]} */
  const found = [];
  for (let at = 0; at < source.length; ) {
    if (source[at].trim() === "") {
      at += 1;
      continue;
    }
    const block = blockAt(source, at, context);
    if (block.nodes.length) found.push({ start: at, nodes: block.nodes });
    at = block.end;
  }
  return found;
}

/** @param {Block[]} found */
function nodesOf(found) {
  return found.flatMap((block) => block.nodes);
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {Context} context
 * @returns {{end: number, nodes: VNode[]}}
 */
function blockAt(source, at, context) {
  const line = source[at];
  const last = context.open && at === source.length - 1;
  if (last && (HALF_A_MARKER.test(line) || HALF_A_DEFINITION.test(line))) return { end: at + 1, nodes: [] };
  const deeper = context.depth < MAX_DEPTH;
  if (isFence(line)) return last ? { end: at + 1, nodes: [] } : fence(source, at, context.open);
  if (HEADING.test(line)) return heading(line, at, { ...context, open: last });
  if (RULE.test(line)) return { end: at + 1, nodes: [element("hr")] };
  if (deeper && QUOTE.test(line)) return quote(source, at, context);
  if (deeper && isItem(line)) return list(source, at, context);
  if (isTable(source, at, context.open)) return table(source, at, context);
  if (defines(line, context.references)) return { end: at + 1, nodes: [] };
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
  if (depth < MAX_DEPTH && (QUOTE.test(line) || (isItem(line) && INTERRUPTING_ITEM.test(line)))) return true;
  return isTable(source, at, false);
}

/**
 * @param {string} line
 * @param {References} references gets what the line defines
 * @returns {boolean} whether it does: one that no link may lead to, such as `[Alice]: hello`, is text
 */
function defines(line, references) {
  if (line.length > MAX_LINK) return false;
  const [, label = "", angled, bare] = DEFINITION.exec(line) ?? [];
  const name = nameOf(label);
  const url = unescaped(angled ?? bare ?? "");
  if (name === "" || url === "" || safeUrl(url) === null) return false;
  if (!references.has(name)) references.set(name, url);
  return true;
}

/** @param {string} label @returns {string} the same for labels that mean the same */
function nameOf(label) {
  return label.trim().replace(/\s+/g, " ").toLowerCase().toUpperCase();
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
  return { end, nodes: [code(text.join("\n"), unescaped(info.trim().split(/\s/, 1)[0]))] };
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
 * @param {Context} context
 */
function heading(line, at, context) {
  const [, marks, rest = ""] = /** @type {RegExpExecArray} */ (HEADING.exec(line));
  const words = rest.trim().split(" ");
  if (/^#+$/.test(words.at(-1) ?? "")) words.pop(); // the optional closing marks
  const tag = `h${Math.min(6, marks.length + 2)}`; // the page has h1 and h2
  return { end: at + 1, nodes: [element(tag, { dir: "auto" }, inline(words.join(" ").trimEnd(), context))] };
}

/**
 * @param {string[]} source
 * @param {number} at
 * @param {Context} context
 */
function quote(source, at, context) {
  const inner = [];
  let end = at;
  for (; end < source.length; end += 1) {
    const marked = QUOTE.test(source[end]);
    if (!marked && (source[end].trim() === "" || !continues(source, end, context.depth))) break;
    inner.push(marked ? source[end].replace(QUOTE, "") : source[end]);
  }
  const nodes = nodesOf(blocks(inner, within(context, end === source.length)));
  return { end, nodes: [element("blockquote", { dir: "auto" }, directing(nodes))] };
}

/**
 * @param {Context} context
 * @param {boolean} last whether what is inside goes on to the end of the text
 * @returns {Context} that of what is inside
 */
function within({ open, depth, references }, last) {
  return { open: open && last, depth: depth + 1, references };
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
 * @param {Context} context
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
 * @param {Context} context
 * @returns {{end: number, item: VElement}}
 */
function item(source, at, context) {
  const [, indent, marker, space = " ", text = ""] = /** @type {RegExpExecArray} */ (ITEM.exec(source[at]));
  const width = indent.length + marker.length + (space.length > 4 ? 1 : space.length);
  const least = Math.min(width, indent.length + 2); // models often indent by two under "1."
  const inner = [text.replace(TASK, (_, done) => (done === " " ? "☐ " : "☑ "))];
  let end = at + 1;
  for (; end < source.length; end += 1) {
    const line = source[end];
    const blank = line.trim() === "";
    if (!blank && indentOf(line) < least && !continues(source, end, context.depth)) break;
    inner.push(dedent(line, width));
  }
  const kept = withoutBlankEnd(inner); // its blank lines stay in `end`: they separate nothing
  const children = nodesOf(blocks(kept, within(context, end === source.length)));
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
 * @param {Context} context
 */
function table(source, at, { open, references }) {
  const header = cells(source[at]);
  const sides = cells(source[at + 1] ?? "").map(side);
  const rows = [];
  let end = Math.min(at + 2, source.length);
  for (; end < source.length && source[end].includes("|"); end += 1) {
    if (!(open && end === source.length - 1 && HALF_A_MARKER.test(source[end]))) rows.push(cells(source[end]));
  }
  const growing = open && end === source.length ? rows.at(-1) : undefined;
  /** @param {string[]} texts of a row */
  const contents = (texts) =>
    header.map((_, column) => {
      const last = texts === growing && column === texts.length - 1;
      return inline(texts[column] ?? "", { open: last, references });
    });
  const node = element("table", { dir: "auto" }, [
    element("thead", {}, [row("th", contents(header), sides)]),
    element("tbody", {}, rows.map((texts) => row("td", contents(texts), sides))),
  ]);
  const attrs = { class: "table", tabindex: "0", role: "group", "aria-label": "Table" };
  return { end, nodes: [element("div", attrs, [node])] };
}

/**
 * @param {"th" | "td"} tag
 * @param {VNode[][]} contents of its cells
 * @param {string[]} sides
 */
function row(tag, contents, sides) {
  return element(
    "tr",
    {},
    contents.map((content, column) => {
      /** @type {Record<string, string>} */
      const attrs = tag === "th" ? { scope: "col" } : {};
      if (sides[column]) attrs.class = sides[column];
      return element(tag, attrs, content);
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
 * @param {Context} context
 */
function paragraph(source, at, { open, depth, references }) {
  let end = at + 1;
  while (source[end]?.trim() && !UNDERLINE.test(source[end]) && !interrupts(source, end, depth)) end += 1;
  const kept = source.slice(at, end);
  const underlined = UNDERLINE.test(source[end] ?? "");
  if (underlined) end += 1;
  const last = open && end === source.length; // so its last line may yet become something else
  if (last && HALF_A_MARKER.test(kept[kept.length - 1])) kept.pop();
  const text = kept.map((line) => line.trimStart()).join("\n");
  const children = inline(text.trimEnd(), { open: last, references });
  const tag = underlined && !last ? "h3" : "p";
  return { end, nodes: children.length ? [element(tag, { dir: "auto" }, children)] : [] };
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

const TOKEN = /\\[([]|\$\$?|\\[!-/:-@[-`{-~]|`+|\*+|_+|~+|!?\[|\]|<(?=https?:)|<[bB][rR] ?\/?>|\bhttps?:\/\/|\\?\n|&[#\w]{1,31};/g;
const ANGLED = /https?:\/\/[^/\s<>][^\s<>]*(>|$)/y;

/** The names that people write: all 2,125 of HTML's would weigh more than this module. */
const ENTITIES = new Map(
  (
    "amp& lt< gt> quot\" apos' nbsp\u00A0 copy© reg® trade™ hellip… mdash— ndash– lsquo‘ rsquo’ ldquo“ rdquo” " +
    "laquo« raquo» bull• middot· times× divide÷ plusmn± minus− deg° micro\u00B5 sect§ para¶ euro€ pound£ yen¥ " +
    "cent¢ frac12½ frac14¼ frac34¾ larr← rarr→ uarr↑ darr↓ harr↔ lArr⇐ rArr⇒ hArr⇔ le≤ ge≥ ne≠ asymp≈ equiv≡ " +
    "infin∞ sum∑ radic√ alphaα betaβ gammaγ deltaδ lambdaλ muμ piπ sigmaσ omegaω DeltaΔ SigmaΣ OmegaΩ auml\u00E4 " +
    "ouml\u00F6 uuml\u00FC Auml\u00C4 Ouml\u00D6 Uuml\u00DC szligß agrave\u00E0 eacute\u00E9 egrave\u00E8 " +
    "ccedil\u00E7 ntilde\u00F1 check✓ cross✗"
  )
    .split(" ")
    .map((pair) => [pair.slice(0, -1), pair.slice(-1)]),
);

/** @param {string} entity `&name;`, `&#10;` or `&#xA;` @returns {string} its character, or itself */
function character(entity) {
  const name = entity.slice(1, -1);
  const [, hex, decimal] = /^#(?:x([\da-f]{1,6})|(\d{1,7}))$/i.exec(name) ?? [];
  if (!hex && !decimal) return ENTITIES.get(name) ?? entity;
  const code = hex ? parseInt(hex, 16) : Number(decimal);
  const exists = code > 0 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff);
  return exists ? String.fromCodePoint(code) : "\uFFFD";
}

/** @param {string} text as an address or a name of a language is written @returns {string} what it means */
function unescaped(text) {
  return text.replace(/\\([!-/:-@[-`{-~])|&[#\w]{1,31};/g, (found, mark) => mark ?? character(found));
}

/**
 * @param {string} source
 * @param {Pick<Context, "open" | "references">} context
 * @returns {VNode[]}
 */
function inline(source, context) {
  return emphasis(new Scanner(source, context).items(), context.open);
}

/** From text to items: words, code, links and line breaks are found, emphasis marks are left to be paired. */
class Scanner {
  #source;
  #open;
  #references;
  #ticks;
  /** @type {Set<string>} ends of formulas that are not to come any more */
  #unclosed = new Set();
  /** @type {Item[]} */
  #items = [];
  /** @type {{at: number, from: number, kind: "link" | "image"}[]} brackets that nothing closed yet */
  #brackets = [];
  /** How many of them, from the first one, begin nothing any more: no link holds a link, and no image an image. */
  #idle = { link: 0, image: 0 };
  #from = 0; // what is before this is in #items

  /**
   * @param {string} source
   * @param {Pick<Context, "open" | "references">} context
   */
  constructor(source, { open, references }) {
    this.#source = source;
    this.#open = open;
    this.#references = references;
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
    else if (first === "&") this.#items.push(character(token));
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
    if (close === this.#from) return null; // nothing is in it
    const end = close + mark.length;
    // Between two sums of money there is a space before the second, or its digits come after the sign.
    const isMoney = token === "$" && !/^[^\s$]([^$]*[^\s$\\])?\$\D?$/.test(this.#source.slice(this.#from, end + 1));
    return isMoney ? null : end;
  }

  /** @param {string} token */
  #bracket(token) {
    this.#brackets.push({ at: this.#items.length, from: this.#from, kind: token[0] === "!" ? "image" : "link" });
    this.#items.push(token);
  }

  #link() {
    const bracket = this.#brackets.pop();
    const depth = this.#brackets.length;
    const link = bracket && depth >= this.#idle[bracket.kind] ? this.#target(bracket.from) : null;
    this.#idle = { link: Math.min(depth, this.#idle.link), image: Math.min(depth, this.#idle.image) };
    if (!bracket || !link) {
      this.#items.push("]");
      return;
    }
    const [, ...items] = this.#items.splice(bracket.at);
    const inner = items.flatMap((item) => /** @type {Item[]} */ (isLink(item) ? item.children : [item]));
    const written = this.#source.slice(bracket.from - 1, link.end);
    pushAll(this.#items, linked(link.url, emphasis(inner, false), written, bracket.kind === "image"));
    this.#idle[bracket.kind] = depth;
    this.#from = link.end;
  }

  /** @param {number} from where the text in the brackets begins */
  #target(from) {
    return (
      destination(this.#source, this.#from, this.#open) ??
      reference(this.#source, { from, end: this.#from }, this.#references)
    );
  }

  /**
   * @param {string} token
   * @param {number} at
   */
  #address(token, at) {
    const begin = token === "<" ? this.#from : at;
    const url = token === "<" ? this.#angled(begin) : bareUrl(this.#source, begin);
    if (url === "") {
      this.#items.push(token);
      return;
    }
    pushAll(this.#items, linked(url, [url], url, false));
    this.#from = begin + url.length + (token === "<" && this.#source[begin + url.length] === ">" ? 1 : 0);
  }

  /** @param {number} begin @returns {string} the address from here to a `>` */
  #angled(begin) {
    ANGLED.lastIndex = begin;
    const [all = "", end = ""] = ANGLED.exec(this.#source) ?? [];
    return end === ">" || this.#open ? all.slice(0, all.length - end.length) : "";
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
 * The address in parentheses after a `]`.
 * @param {string} source
 * @param {number} from
 * @param {boolean} open
 * @returns {{url: string, end: number} | null}
 */
function destination(source, from, open) {
  if (source[from] !== "(") return null;
  const rest = source.slice(from, from + MAX_LINK);
  const match = DESTINATION.exec(rest);
  if (match) return { url: unescaped(match[1] ?? match[2]), end: from + match[0].length };
  const half = open && from + rest.length === source.length && HALF_A_DESTINATION.test(rest);
  return half ? { url: "", end: source.length } : null; // its end is on its way: the text alone
}

/**
 * The address that another line defines, for a label after the `]` or for the text itself.
 * @param {string} source
 * @param {{from: number, end: number}} text with its closing bracket
 * @param {References} references
 * @returns {{url: string, end: number} | null}
 */
function reference(source, { from, end }, references) {
  if (references.size === 0 || end - from > MAX_LINK) return null;
  REFERENCE.lastIndex = end;
  const [written = "", label] = REFERENCE.exec(source) ?? [];
  const url = references.get(nameOf(label || source.slice(from, end - 1)));
  return url === undefined ? null : { url, end: end + written.length };
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
  const [word] = source.slice(at, at + MAX_URL + 1).split(/[\s<>"`*|[\]]/, 1);
  let url = word.replace(/[.,;:!?'_~]+$/, "");
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

/** @typedef {Run & {at: number}} Opener an open mark; `at` is where its text stands among the nodes */

/**
 * Pairs the marks; a closing mark takes the nearest fitting one. An open mark is text until then, and stays so.
 * @param {Item[]} items
 * @param {boolean} open
 * @returns {VNode[]}
 */
function emphasis(items, open) {
  /** @type {VNode[]} */
  const nodes = [];
  /** @type {Opener[]} */
  const openers = [];
  const end = items.findLastIndex((item) => item !== "");
  items.forEach((item, at) => {
    if (typeof item === "string" || "tag" in item) {
      nodes.push(item);
      return;
    }
    const last = open && at === end;
    if (last && halfCloses(openers, item)) return;
    const left = item.closes ? close(nodes, openers, item) : item.count;
    if (left === 0) return;
    const opens = item.opens && openers.length < MAX_OPENERS;
    if (opens) openers.push({ ...item, count: left, at: nodes.length });
    if (opens || !last) nodes.push(item.char.repeat(left));
  });
  if (open) closeStrong(nodes, openers);
  return merge(nodes);
}

/**
 * @param {Opener[]} openers
 * @param {Run} run the last thing in a text that goes on
 * @returns {boolean} whether it may be the first of two marks that close, as in `**bold*`
 */
function halfCloses(openers, run) {
  const opener = openers.at(-1);
  return run.closes && run.count === 1 && opener?.char === run.char && opener.count === 2;
}

/**
 * @param {VNode[]} nodes
 * @param {Opener[]} openers
 * @param {Run} run
 * @returns {number} marks that found no partner
 */
function close(nodes, openers, run) {
  let left = run.count;
  while (left > 0) {
    const index = openers.findLastIndex((opener) => opener.char === run.char && pairs(opener, run, left));
    if (index < 0) return left;
    openers.length = index + 1;
    const opener = openers[index];
    const width = Math.min(2, left, opener.count);
    const tag = run.char === "~" ? "del" : width === 2 ? "strong" : "em";
    const node = element(tag, {}, merge(nodes.splice(opener.at + 1)));
    left -= width;
    opener.count -= width;
    nodes[opener.at] = opener.char.repeat(opener.count);
    if (opener.count === 0) openers.pop();
    nodes.push(node);
  }
  return 0;
}

/**
 * In a text that goes on, an open strong mark is taken for closed: its end is on its way.
 * @param {VNode[]} nodes
 * @param {Opener[]} openers
 */
function closeStrong(nodes, openers) {
  for (const { at, char, count } of openers.reverse()) {
    if (char !== "*" || count !== 2) continue;
    const children = nodes.splice(at + 1);
    nodes[at] = children.length ? element("strong", {}, merge(children)) : "";
  }
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
 * As `list.push(...more)`, whose arguments have to fit on the stack.
 * @template T
 * @param {T[]} list
 * @param {T[]} more
 */
function pushAll(list, more) {
  for (const one of more) list.push(one);
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
