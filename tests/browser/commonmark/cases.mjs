// Prints the numbers of the CommonMark cases that static/markdown/markdown.js reads differently, as a JSON list.
//
//     node cases.mjs PARSER
//
// Both trees are brought into one form that leaves out how the page shows a thing: line breaks are spaces, a paragraph
// in an item is its text, headings begin at h3, an image is a link to it. The addresses of the cases are made absolute,
// since the page links to nothing else.

import { createRequire } from "node:module";

const { tests } = createRequire(import.meta.url)("commonmark-spec");
const { parse } = await import(process.argv[2]);

const NAMES = { lt: "<", gt: ">", amp: "&", quot: '"' };
const unescape = (text) => text.replace(/&(lt|gt|amp|quot);/g, (_, name) => NAMES[name]);
const absolute = (text) => text.replace(/(?<![\w:/.])\/(ur[li]\d?)/g, "http://h/$1");

/** The tree of the HTML that the specification gives. */
function fromHtml(html) {
  const stack = [{ tag: "", attrs: {}, children: [] }];
  for (const [, end, tag, written, text] of html.matchAll(/<(\/?)([a-z]\w*)((?:\s+[a-z]+="[^"]*")*)\s*\/?>|([^<]+|<)/g)) {
    const parent = stack.at(-1);
    if (text !== undefined) parent.children.push(unescape(text));
    else if (end) stack.length = Math.max(1, stack.findLastIndex((open) => open.tag === tag));
    else {
      const attrs = Object.fromEntries([...written.matchAll(/([a-z]+)="([^"]*)"/g)].map(([, name, value]) => [name, unescape(value)]));
      const node = { tag, attrs, children: [] };
      parent.children.push(node);
      if (!["br", "hr", "img"].includes(tag)) stack.push(node);
    }
  }
  return stack[0].children;
}

const textOf = (node) => (typeof node === "string" ? node : node.tag === "br" ? "\n" : node.children.map(textOf).join(""));
const link = (href, text) => `<a ${URL.canParse(href) ? new URL(href).href : href}>${text}</a>`;
const spaced = (text) => text.replace(/\s+/g, " ");

/** What stands in one line. */
function inline(node) {
  if (typeof node === "string") return node;
  const { tag, attrs, children } = node;
  const inner = children.map(inline).join("");
  if (tag === "br") return "\n";
  if (tag === "code") return `<code ${JSON.stringify(spaced(textOf(node)))}>`;
  if (tag === "a") return link(attrs.href, inner);
  if (tag === "img") return link(attrs.src, `Image: ${attrs.alt}`);
  return `<${tag}>${inner}</${tag}>`;
}

const INLINE = ["br", "code", "a", "img", "em", "strong", "del"];

/** One form for both trees. `first` is the heading that `# ` makes. */
function normal(nodes, first) {
  const found = [];
  let line = "";
  const flush = () => {
    if (line.trim()) found.push(spaced(line).trim());
    line = "";
  };
  for (const node of nodes) {
    if (typeof node === "string" || INLINE.includes(node.tag)) {
      line += inline(node);
      continue;
    }
    flush();
    const { tag, attrs, children } = node;
    const level = /^h([1-6])$/.exec(tag)?.[1];
    if (tag === "pre") found.push({ pre: textOf(node).replace(/\n+$/, "") });
    else if (tag === "figure") found.push(...normal(children.slice(1), first));
    else if (tag === "p") found.push(...normal(children, first));
    else if (level) found.push({ heading: Math.min(6, Number(level) - first + 3), in: normal(children, first) });
    else found.push({ tag, start: attrs.start ?? "1", in: normal(children, first) });
  }
  flush();
  return found;
}

const differs = ({ markdown, html }) => {
  const [source, wanted] = [markdown, html].map((text) => absolute(text.replace(/→/g, "\t")));
  return JSON.stringify(normal(parse(source), 3)) !== JSON.stringify(normal(fromHtml(wanted), 1));
};
console.log(JSON.stringify({ cases: tests.length, differ: tests.filter(differs).map(({ number }) => number) }));
