// Prints the numbers of the CommonMark cases that static/markdown/markdown.js reads differently, as JSON.
//
//     node cases.mjs PARSER
//
// The HTML that CommonMark expects and the tree of the parser are brought into one form, in which these are the same,
// since the page shows them differently everywhere:
//
// 1. A line break in a paragraph is a line break, hard or soft.
// 2. Headings begin at h3: the page has h1 and h2.
// 3. An image is a link to it, or a part of the link around it. A link has no title of its own: it shows where it goes.
// 4. The first paragraph of a list item has no element, be the list tight or loose: an item that stands would move when
//    the next one arrives.
// 5. An address that is shown as it is written is a link, with < > around it or without.

import { createRequire } from "node:module";

const BASE = "https://spec.example/base/";
const Real = globalThis.URL;

/** The cases have relative addresses, of which the page makes no links. Here these have a base. */
class BasedURL extends Real {
  /** @param {string} url */
  constructor(url) {
    super(url, BASE);
  }
  /** @param {string} url */
  static canParse(url) {
    return Real.canParse(url, BASE);
  }
}
globalThis.URL = BasedURL;

const { tests } = createRequire(import.meta.url)("commonmark-spec");
const { parse } = await import(process.argv[2]);

/** @param {string} text */
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
/** @param {string} text */
const unescaped = (text) =>
  text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&quot;/g, '"').replace(/&amp;/g, "&");

/** @param {string} address as it stands in HTML */
const resolved = (address) => {
  const plain = unescaped(address).replace(/[\\[\]]/g, encodeURIComponent);
  return escaped(URL.canParse(plain) ? new URL(plain).href : plain);
};

const BLOCK = /\n?(<\/?(?:p|h[1-6]|hr|blockquote|ul|ol|li|pre)\b[^>]*>)\n?/g;

/** @param {string} html as CommonMark's cases write it */
function wanted(html) {
  return common(
    html
      .replace(/<img src="([^"]*)" alt="([^"]*)"(?: title="[^"]*")? \/>/g, '<a href="$1">Image: $2</a>')
      .replace(/<a href="([^"]*)"(?: title="[^"]*")?>/g, (_, href) => `<a href="${resolved(href)}">`)
      .replace(/<(\/?)h([1-6])>/g, (_, slash, level) => `<${slash}h${Math.min(6, Number(level) + 2)}>`)
      .replace(/<br \/>\n/g, "\n")
      .replace(/\n<\/code><\/pre>/g, "</code></pre>")
      .replace(BLOCK, "$1")
      .replace(/&quot;/g, '"'),
  );
}

/** @param {any[]} nodes a tree of ours */
function shown(nodes) {
  return common(nodes.map(written).join(""));
}

/** @param {any} node */
function written(node) {
  if (typeof node === "string") return escaped(node);
  const { tag, attrs, children } = node;
  const inner = children.map(written).join("");
  if (tag === "br") return "\n";
  if (tag === "hr") return "<hr />";
  if (tag === "figure") return codeBlock(children);
  if (tag === "code" && attrs.class === "math") return inner;
  const isImage = tag === "a" && typeof children[0] === "string" && children[0].startsWith("Image: ");
  if (tag === "a") return `<a href="${resolved(attrs.href)}">${isImage ? escaped(text(node)) : inner}</a>`;
  return `<${tag}${attrs.start ? ` start="${attrs.start}"` : ""}>${inner}</${tag}>`;
}

/** @param {any[]} children */
function codeBlock([caption, pre]) {
  const language = text(caption.children[0]);
  const named = language === "text" ? "" : ` class="language-${escaped(language)}"`;
  return `<pre><code${named}>${escaped(text(pre))}</code></pre>`;
}

/** @param {any} node @returns {string} */
function text(node) {
  return typeof node === "string" ? node : node.children.map(text).join("");
}

/** @param {string} html */
function common(html) {
  return html
    .replace(/<li><p>(.*?)<\/p>/gs, "<li>$1")
    .replace(/(<a [^>]*>[^<]*)<a [^>]*>([^<]*)<\/a>([^<]*<\/a>)/g, "$1$2$3")
    .replace(/<a href="([^"]*)">([^<]*)<\/a>/g, (link, href, label) => (resolved(label) === href ? label : link))
    .trim();
}

const differs = ({ markdown, html }) => {
  const [source, specified] = [markdown, html].map((text) => text.replaceAll("→", "\t"));
  return shown(parse(source)) !== wanted(specified);
};
console.log(JSON.stringify({ cases: tests.length, differ: tests.filter(differs).map(({ number }) => number) }));
