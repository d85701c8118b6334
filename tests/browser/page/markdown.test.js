// Markdown: the dialect, hostile input, and a text that grows. The document is a stand-in: what a real one does with
// the nodes is test_page.py's to see.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { MarkdownView, parse, safeUrl } from "../../../static/markdown/markdown.js";
import { randomCuts, seeded } from "./random.js";

// ---- a document, as far as markdown.js goes

class FakeText {
  constructor(data) {
    this.data = data;
  }
  appendData(more) {
    this.data += more;
  }
  replaceWith(other) {
    this.parent.childNodes[this.parent.childNodes.indexOf(this)] = other;
    other.parent = this.parent;
  }
  get html() {
    return this.data.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  }
}

class FakeElement extends FakeText {
  attrs = {};
  childNodes = [];
  constructor(tag) {
    super("");
    this.tag = tag;
  }
  setAttribute(name, value) {
    this.attrs[name] = value;
  }
  append(child) {
    child.parent = this;
    this.childNodes.push(child);
  }
  appendChild(child) {
    this.append(child);
  }
  removeChild(child) {
    this.childNodes.splice(this.childNodes.indexOf(child), 1);
  }
  get html() {
    const attrs = Object.entries(this.attrs).map(([name, value]) => ` ${name}="${value}"`).join("");
    return `<${this.tag}${attrs}>${this.childNodes.map((child) => child.html).join("")}</${this.tag}>`;
  }
  get all() {
    return this.childNodes.flatMap((child) => (child instanceof FakeElement ? [child, ...child.all] : []));
  }
}

const document = {
  createElement: (tag) => new FakeElement(tag),
  createTextNode: (data) => new FakeText(data),
};

/** @param {string[]} pieces @returns {FakeElement} what stands there in the end */
function shown(pieces) {
  const root = new FakeElement("div");
  const view = new MarkdownView(root, document);
  for (const piece of pieces) view.append(piece);
  view.finish();
  return root;
}

const brief = (node) => {
  if (typeof node === "string") return node;
  const attrs = ["href", "start", "class"].filter((name) => node.attrs[name]).map((name) => ` ${name}=${node.attrs[name]}`);
  return `<${node.tag}${attrs.join("")}>${node.children.map(brief).join("")}</${node.tag}>`;
};
const html = (source, options) => parse(source, options).map(brief).join("");
const codeBlock = (name, text) =>
  `<figure class=code><figcaption><span>${name}</span><button>Copy</button></figcaption><pre><code>${text}</code></pre></figure>`;

// ---- the dialect

/** [source, tree] */
const DIALECT = [
  ["# A\n###### B ##", "<h3>A</h3><h6>B</h6>"],
  ["#hashtag", "<p>#hashtag</p>"],
  ["a\nb  \nc\\\nd", "<p>a<br></br>b<br></br>c<br></br>d</p>"],
  ["a\r\n\r\nb\rc", "<p>a</p><p>b<br></br>c</p>"],
  ["**b** *i* ***bi*** ~~s~~ __b__ _i_", "<p><strong>b</strong> <em>i</em> <em><strong>bi</strong></em> <del>s</del> <strong>b</strong> <em>i</em></p>"],
  ["*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"],
  ["*a **b* c** *a __b* c* d__", "<p><em>a <em><em>b</em> c</em></em> <em>a __b</em> c* d__</p>"],
  ["*foo**bar*", "<p><em>foo**bar</em></p>"],
  ["2 * 3 * 4, snake_case_word, a ~ b, **", "<p>2 * 3 * 4, snake_case_word, a ~ b, **</p>"],
  ["重点是**「强调」**后面，**句。**다음 *あ。*い", "<p>重点是<strong>「强调」</strong>后面，<strong>句。</strong>다음 <em>あ。</em>い</p>"],
  ["\\*a\\* \\` \\[x\\](y)", "<p>*a* ` [x](y)</p>"],
  ["`a*b*` `` c`d `` `open", "<p><code>a*b*</code> <code>c`d</code> `open</p>"],
  ["\\(x\\,y_1 * \\{z_1*2\\}\\) and \\(open", "<p><code class=math>\\(x\\,y_1 * \\{z_1*2\\}\\)</code> and (open</p>"],
  ["a:\n\\[\n  a \\\\\n  b\n\\]\n$$c*d*$$", "<p>a:<br></br><code class=math>\\[\na \\\\\nb\n\\]</code><br></br><code class=math>$$c*d*$$</code></p>"],
  ["$a\\,*b*$, $5 or $6*, $5/$6, 7 $ or $ 7, US$x\\$y", "<p><code class=math>$a\\,*b*$</code>, $5 or $6*, $5/$6, 7 $ or $ 7, US$x$y</p>"],
  ["&lt;b&gt; &amp;amp; &copy; &mdash; &#8364;&#x20ac; &#0;&#xd800;&#1114112; &constructor; &x", "<p><b> &amp; © — €€ \uFFFD\uFFFD\uFFFD &constructor; &x</p>"],
  ["\\(\\) \\[\\]", "<p>() []</p>"],
  ["Title\n=====\ntext\n---\nmore", "<h3>Title</h3><p>text</p><hr></hr><p>more</p>"],
  ["# A  ##", "<h3>A</h3>"],
  ["a\n-\n1.", "<p>a<br></br>-<br></br>1.</p>"],
  ["~~~ a ``` ~~~\nb\n~~~", codeBlock("a", "b")],
  ["[a](https://e.org/b\\_c&amp;d 'e') [a](<https://e.org/b c>) [a](https://e.org/b c)", "<p><a href=https://e.org/b_c&d>a</a> <a href=https://e.org/b%20c>a</a> [a](<a href=https://e.org/b>https://e.org/b</a> c)</p>"],
  ["[![a](https://e.org/b)](https://e.org/c)", "<p><a href=https://e.org/c>Image: a</a></p>"],
  ["![a [b](https://e.org/c)](https://e.org/d) [a [b](https://e.org/c)](https://e.org/d)", "<p><a href=https://e.org/d>Image: a b</a> [a <a href=https://e.org/c>b</a>](<a href=https://e.org/d>https://e.org/d</a>)</p>"],
  [`https://e.org/${"x".repeat(3_000)} y`, `<p>https://e.org/${"x".repeat(3_000)} y</p>`],
  ["<https://e.org/a b>", "<p><<a href=https://e.org/a>https://e.org/a</a> b></p>"],
  ["[a][B] [b][] [b] [a][c]\n\n[b]: https://e.org 'x'\n[b]: https://f.org", "<p><a href=https://e.org/>a</a> <a href=https://e.org/>b</a> <a href=https://e.org/>b</a> [a][c]</p>"],
  ["| [b] |\n|---|\n# [b]\n> - [b]: <https://e.org>", "<div class=table><table><thead><tr><th><a href=https://e.org/>b</a></th></tr></thead><tbody></tbody></table></div><h3><a href=https://e.org/>b</a></h3><blockquote><ul><li></li></ul></blockquote>"],
  ["[Alice]: hello\n[Bob]: javascript:x\n\n[Bob]", "<p>[Alice]: hello<br></br>[Bob]: javascript:x</p><p>[Bob]</p>"],
  ["[a *b*](https://e.org/x_(y)) [t](https://e.org 'title')", "<p><a href=https://e.org/x_(y)>a <em>b</em></a> <a href=https://e.org/>t</a></p>"],
  ["see https://e.org/a_b_c?d=e. (http://f.org)", "<p>see <a href=https://e.org/a_b_c?d=e>https://e.org/a_b_c?d=e</a>. (<a href=http://f.org/>http://f.org</a>)</p>"],
  ["<https://e.org/x> **https://f.org**", "<p><a href=https://e.org/x>https://e.org/x</a> <strong><a href=https://f.org/>https://f.org</a></strong></p>"],
  ["[https://a.org](https://b.org)", "<p><a href=https://b.org/>https://a.org</a></p>"],
  ["![alt](https://e.org/x.png)", "<p><a href=https://e.org/x.png>Image: alt</a></p>"],
  ["- a\n- b\n  - c\n\n  d\n* e", "<ul><li>a</li><li>b<ul><li>c</li></ul><p>d</p></li></ul><ul><li>e</li></ul>"],
  ["3. a\n4. b\n   1. c", "<ol start=3><li>a</li><li>b<ol><li>c</li></ol></li></ol>"],
  ["1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"],
  ["- a\n\t- b\n\t\t- c\n\n\td\n- e", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul><p>d</p></li><li>e</li></ul>"],
  ["1. a\n\t```make\n\tb:\n\t```\n2. c", `<ol><li>a${codeBlock("make", "b:")}</li><li>c</li></ol>`],
  ["```make\nb:\n\tc\n```", codeBlock("make", "b:\n\tc")],
  ["- [x] a\n- [ ] b\n- [y] c", "<ul><li>☑ a</li><li>☐ b</li><li>[y] c</li></ul>"],
  ["in\n1986. a year", "<p>in<br></br>1986. a year</p>"],
  ["> a\nb\n> > c\n\nd", "<blockquote><p>a<br></br>b</p><blockquote><p>c</p></blockquote></blockquote><p>d</p>"],
  ["```py\na\n\n  b\n```\nc", `${codeBlock("py", "a\n\n  b")}<p>c</p>`],
  ["````\n```\n````", codeBlock("text", "```")],
  ["~~~ x y\n`\n~~~~", codeBlock("x", "`")],
  ["```\nnever closed\n", codeBlock("text", "never closed")],
  ["1. a\n   ```\n   x\n   ```\n2. b", `<ol><li>a${codeBlock("text", "x")}</li><li>b</li></ol>`],
  ["---\n***\n_ _ _", "<hr></hr><hr></hr><hr></hr>"],
  [
    "a\n| x | y |\n|:-:|--:|\n| 1 | `a\\|b` |\n| 2 |\nb",
    "<p>a</p><div class=table><table><thead><tr><th class=center>x</th><th class=end>y</th></tr></thead><tbody>" +
      "<tr><td class=center>1</td><td class=end><code>a|b</code></td></tr><tr><td class=center>2</td><td class=end></td></tr>" +
      "</tbody></table></div><p>b</p>",
  ],
  ["a<br>b `<br>` <br/>c<BR />\n\n| x<br>y |\n|---|", "<p>a<br></br>b <code><br></code> <br></br>c<br></br></p><div class=table><table><thead><tr><th>x<br></br>y</th></tr></thead><tbody></tbody></table></div>"],
  ["a | b\n--|--\nc | d", "<div class=table><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>c</td><td>d</td></tr></tbody></table></div>"],
  ["a | b\n--|--|--", "<p>a | b<br></br>--|--|--</p>"],
  ["<b>x</b>", "<p><b>x</b></p>"],
  ["", ""],
];

for (const [source, tree] of DIALECT) {
  test(`dialect: ${JSON.stringify(source)}`, () => assert.equal(html(source), tree));
}

/** [source, tree]: what is shown before the end of it is there */
const UNFINISHED = [
  ["a **bo", "<p>a <strong>bo</strong></p>"],
  ["a **", "<p>a </p>"],
  ["a `co", "<p>a <code>co</code></p>"],
  ["a \\(x\\,", "<p>a <code class=math>\\(x\\,</code></p>"],
  ["a $$x", "<p>a <code class=math>$$x</code></p>"],
  ["a $x*y*z", "<p>a $x<em>y</em>z</p>"],
  ["a [te](htt", "<p>a te</p>"],
  ["a\n-", "<p>a</p>"],
  ["a\n#", "<p>a</p>"],
  ["a\n- ", "<p>a</p>"],
  ["a\n==", "<p>a</p>"],
  ["a\n2", "<p>a</p>"],
  ["- [x]", "<ul><li></li></ul>"],
  ["a **bo*", "<p>a <strong>bo</strong></p>"],
  ["a [te](https://e.org \"ti", "<p>a te</p>"],
  ["a <https://e.or", "<p>a <a href=https://e.or/>https://e.or</a></p>"],
  ["[te]: https://e.or", ""],
  [`[te](${"x".repeat(5_000)} y`, `<p>[te](${"x".repeat(5_000)} y</p>`],
  ["[Alice]: hel", "<p>[Alice]: hel</p>"],
  ["``", ""],
  ["```p", ""],
  ["```py\nx\n``", codeBlock("py", "x")],
  ["| a | b", "<div class=table><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody></tbody></table></div>"],
  ["| a |\n|-", "<div class=table><table><thead><tr><th>a</th></tr></thead><tbody></tbody></table></div>"],
];

for (const [source, tree] of UNFINISHED) {
  test(`unfinished: ${JSON.stringify(source)}`, () => assert.equal(html(source, { open: true }), tree));
}

// ---- hostile input

/** Texts that a model may be talked into writing; each that could run would set window.pwned. */
const HOSTILE = JSON.parse(readFileSync(new URL("hostile.json", import.meta.url), "utf8"));
const TAGS = new Set(
  "h3 h4 h5 h6 p br hr strong em del code a ul ol li blockquote figure figcaption span button pre div table thead tbody tr th td".split(" "),
);
const ATTRS = new Set("class dir href start target rel title tabindex role aria-label type data-copy scope".split(" "));

for (const source of HOSTILE) {
  test(`hostile: ${JSON.stringify(source).slice(0, 60)}`, () => {
    for (const wrapped of [source, `- ${source}`, `> ${source}`, `| ${source} |\n|---|\n| ${source} |`, `**${source}**`, `\`\`\`${source}\n${source}`]) {
      for (const node of shown([wrapped]).all) {
        assert.ok(TAGS.has(node.tag), node.tag);
        for (const name of Object.keys(node.attrs)) assert.ok(ATTRS.has(name), name);
        if ("href" in node.attrs) assert.match(node.attrs.href, /^https?:\/\/[^@/]+\//);
      }
    }
  });
}

/** [address, what becomes of it] */
const ADDRESSES = [
  ["https://e.org", "https://e.org/"],
  ["HTTP://E.org/x", "http://e.org/x"],
  ["javascript:alert(1)", null],
  ["JaVaScRiPt:alert(1)", null],
  ["\u0001javascript:alert(1)", null],
  ["java\tscript:alert(1)", null],
  ["data:text/html,<script>alert(1)</script>", null],
  ["vbscript:x", null],
  ["file:///etc/passwd", null],
  ["blob:https://e.org/x", null],
  ["//e.org", null],
  ["/api/session", null],
  ["https://", null],
  ["https://bank.example@evil.example/", null],
  [`https://e.org/${"x".repeat(3000)}`, null],
];

for (const [address, expected] of ADDRESSES) {
  test(`address: ${JSON.stringify(address).slice(0, 60)}`, () => assert.equal(safeUrl(address), expected));
}

/** Texts of about n characters, made to cost more than they are worth. */
const COSTLY = {
  "brackets": (n) => "[".repeat(n),
  "brackets, closed": (n) => "[".repeat(n / 2) + "]".repeat(n / 2),
  "half links": (n) => "](".repeat(n / 2),
  "links": (n) => "[a](https://b.c) ".repeat(n / 17),
  "links without their end": (n) => "[a](https://b.c \"".repeat(n / 18),
  "links in <": (n) => "[a](<b".repeat(n / 6),
  "links with parentheses": (n) => "[a](((".repeat(n / 6),
  "half links before a space": (n) => `${"[a](b".repeat(n / 5)} c`,
  "images": (n) => "![".repeat(n / 2),
  "images in images": (n) => "![*a*".repeat(n / 20) + "](https://b.c)".repeat(n / 20),
  "images in links": (n) => "[![*a*".repeat(n / 34) + "](https://b.c)](https://b.c)".repeat(n / 34),
  "definitions": (n) => Array.from({ length: n / 30 }, (_, at) => `[a${at}]: https://b.c/${at}`).join("\n"),
  "references": (n) => `[a]: https://b.c\n\n${"[b][a] [a] [b] ".repeat(n / 15)}`,
  "brackets beside a definition": (n) => `[a]: https://b.c\n\n${"[".repeat(n / 2)}${"]".repeat(n / 2)}`,
  "a definition of parentheses": (n) => `[a]: ${"(".repeat(n)}`,
  "a definition of backslashes": (n) => `[a]: ${"\\".repeat(n)}`,
  "emphasis that opens": (n) => "*a ".repeat(n / 3),
  "emphasis that closes": (n) => "a* ".repeat(n / 3),
  "two kinds of emphasis": (n) => "*a_ ".repeat(n / 4),
  "emphasis in words": (n) => "a**b".repeat(n / 4),
  "strong and emphasis": (n) => "**a*".repeat(n / 4),
  "underscores": (n) => "_".repeat(n),
  "stars around": (n) => `${"*".repeat(n / 2)}a${"*".repeat(n / 2)}`,
  "struck out": (n) => "~~a ".repeat(n / 4),
  "backticks": (n) => "`".repeat(n),
  "runs of backticks": (n) => Array.from({ length: Math.sqrt(2 * n) }, (_, at) => "`".repeat(at)).join(" "),
  "long code": (n) => `\` ${"a".repeat(n)}\``,
  "a fence that is none": (n) => `\`\`\`${" ".repeat(n)}\``,
  "quotes in quotes": (n) => "> ".repeat(n / 2),
  "quotes": (n) => "> a\n\n".repeat(n / 5),
  "a quote that goes on": (n) => `> a\n${"b\n".repeat(n / 2)}`,
  "lists in lists": (n) => "- ".repeat(n / 2),
  "a list": (n) => "- a\n".repeat(n / 4),
  "lists in lists, by lines": (n) => Array.from({ length: Math.sqrt(n) }, (_, at) => `${" ".repeat(2 * at)}- a\n`).join(""),
  "tabs": (n) => `- ${"\t".repeat(n / 2)}x\n${"\t".repeat(n / 2)}y`,
  "items with tabs": (n) => "- a\n\t".repeat(n / 5),
  "underlines": (n) => "a\n=\n".repeat(n / 4),
  "spaces": (n) => `${" ".repeat(n)}x`,
  "bars": (n) => "|".repeat(n),
  "lines with bars": (n) => "a | b\n".repeat(n / 6),
  "a table": (n) => `a | b\n--|--\n${"c | d\n".repeat(n / 6)}`,
  "addresses": (n) => "https://".repeat(n / 8),
  "addresses that are none": (n) => "https:///".repeat(n / 9),
  "addresses in <": (n) => "<https://a".repeat(n / 10),
  "backslashes": (n) => "\\".repeat(n),
  "entities": (n) => "&amp;".repeat(n / 5),
  "formulas": (n) => "\\(".repeat(n / 2),
  "one closed formula": (n) => `${"\\(".repeat(n / 2)}\\)`,
  "formulas on lines": (n) => "\n\\[".repeat(n / 3),
  "dollars": (n) => "$a".repeat(n / 2),
  "an odd number of dollars": (n) => "$$ ".repeat(2 * Math.floor(n / 6) + 1),
};

/** @param {string} source @returns {number} milliseconds of our own: others may use the machine, too */
function cost(source) {
  const before = process.cpuUsage();
  shown([source]);
  parse(source, { open: true });
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1_000;
}

for (const [name, make] of Object.entries(COSTLY)) {
  test(`costly: ${name}`, () => {
    const small = Math.min(cost(make(20_000)), cost(make(20_000)));
    const large = cost(make(80_000));
    // Four times where the cost is linear, sixteen times where it is quadratic; a garbage collection is in the sum.
    assert.ok(large < 9 * small + 150, `${small} ms, then ${large} ms`);
  });
}

test("a text of any length has a place on the stack", () => {
  for (const source of ["*a_ ".repeat(70_000), "a\n\n".repeat(130_000), `[${"*a* ".repeat(70_000)}]()`, `[a]: ${"x".repeat(1e7)}`]) {
    assert.doesNotThrow(() => shown([source, "end"]));
  }
});

// ---- a text that grows

const ALPHABET = ["a", "b ", "*", "**", "_", "`", "```", "\n", "\n\n", "# ", "- ", "1. ", "2. ", "  ", "    ", "\t", "> ", "|", "|-|", "---", "[", "](", ")", "https://e.org", "\r\n", "\r", "\\", "<i>", "é", "- [ ] ", "[a]", "[a]: https://e.org", "===", "&lt;", "$", "$$", "\\(", "\\)", "\\[", "\\]"];

test("in whatever pieces a text arrives, the same stands there in the end", () => {
  const random = seeded("growing");
  const texts = Array.from({ length: 1_500 }, () =>
    Array.from({ length: 1 + Math.floor(random() * 40) }, () => ALPHABET[Math.floor(random() * ALPHABET.length)]).join(""),
  );
  for (const text of [...DIALECT.map(([source]) => source), ...texts]) {
    const whole = new FakeElement("div");
    const view = new MarkdownView(whole, document);
    view.append(text);
    view.finish();
    assert.equal(shown(randomCuts(text, random)).html, whole.html, JSON.stringify(text));
    assert.equal(shown(text.split("")).html, whole.html, JSON.stringify(text));
  }
});

test("what stands is what a parse of the whole text gives", () => {
  for (const [source] of DIALECT) {
    const brief = (node) => (typeof node === "string" ? node : `<${node.tag}>${node.children.map(brief).join("")}</${node.tag}>`);
    const there = (node) =>
      node instanceof FakeElement ? `<${node.tag}>${node.childNodes.map(there).join("")}</${node.tag}>` : node.data;
    assert.equal(shown(source.split("")).childNodes.map(there).join(""), parse(source).map(brief).join(""));
  }
});

test("finished blocks are never touched again, and the last one keeps its nodes", () => {
  const root = new FakeElement("div");
  const view = new MarkdownView(root, document);
  view.append("# A\n\npara\n\n- x\n");
  const [title, paragraph, list] = root.childNodes;
  const first = list.childNodes[0];
  view.append("- y **z**\n- ");
  view.append("more\n\nend");
  assert.deepEqual(root.childNodes.slice(0, 3).map((node) => node.tag), ["h3", "p", "ul"]);
  assert.ok(root.childNodes[0] === title && root.childNodes[1] === paragraph && root.childNodes[2] === list);
  assert.equal(list.childNodes[0], first);
});

test("a flush costs what the last block costs, not what the answer has become", () => {
  const view = new MarkdownView(new FakeElement("div"), document);
  const paragraph = `${"some **words** and `code` ".repeat(10)}\n\n`;
  const cost = () => {
    const before = process.cpuUsage(); // not the time, of which others take their share
    for (let round = 0; round < 300; round += 1) view.append(paragraph);
    return process.cpuUsage(before).user / 1_000;
  };
  cost(); // warm
  const early = cost();
  for (let round = 0; round < 10; round += 1) cost();
  assert.ok(cost() < early * 5 + 50);
});

test("a link above its definition is one when the text is complete, and all other nodes stay", () => {
  const root = new FakeElement("div");
  const view = new MarkdownView(root, document);
  view.append("# A\n\nsee [b]\n\n- c\n\nend\n\n[b]: https://e.org\n");
  const [title, , list] = root.childNodes;
  assert.equal(root.childNodes[1].html, '<p dir="auto">see [b]</p>');
  view.append("[b]");
  view.finish();
  const there = root.childNodes.map((node) => node.tag);
  assert.deepEqual(there, ["h3", "p", "ul", "p", "p"]);
  assert.ok(root.childNodes[0] === title && root.childNodes[2] === list);
  for (const at of [1, 4]) assert.equal(root.childNodes[at].all[0].attrs.href, "https://e.org/");
  view.append(" more");
  view.finish();
  assert.equal(root.childNodes[1].childNodes.length, 2);
  assert.equal(root.childNodes[4].childNodes[1].data, " more");
  assert.equal(root.childNodes.length, 5);
});

/** What models write, with most of what may look like something else before its end is there. */
const ANSWER = `A **step-by-step** guide.

## First

- Node (\`node --version\`)
  - a [link](https://e.org/a_b "title"), then
  - **bold** and more

1. **Clone:**

   \`\`\`bash
   git clone https://e.org/app.git
   \`\`\`

2. **Install** – see [the docs][1]

| Option | Meaning |
|:-------|--------:|
| a | **b** |

> It *works*.

- [x] clone
- [ ] deploy

Title
=====

[1]: https://e.org/docs
`;

test("while a text grows, hardly anything that stands is taken back", () => {
  const text = (node) => (typeof node === "string" ? node : node.tag === "button" ? "" : node.children.map(text).join(""));
  const back = [];
  let before = "";
  for (let end = 1; end <= ANSWER.length; end += 1) {
    const now = parse(ANSWER.slice(0, end), { open: true }).map(text).join("");
    if (!now.startsWith(before)) back.push(ANSWER.slice(0, end).split("\n").at(-1));
    before = now;
  }
  // Brackets, a single star and a label may be meant as such. The last is the end of the definition's line.
  assert.deepEqual(back, ["  - a [link](", "> It *works*", "[1]:", ""]);
});
