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
  ["*foo**bar*", "<p><em>foo**bar</em></p>"],
  ["2 * 3 * 4, snake_case_word, a ~ b, **", "<p>2 * 3 * 4, snake_case_word, a ~ b, **</p>"],
  ["重点是**「强调」**后面，**句。**다음 *あ。*い", "<p>重点是<strong>「强调」</strong>后面，<strong>句。</strong>다음 <em>あ。</em>い</p>"],
  ["\\*a\\* \\` \\[x\\](y)", "<p>*a* ` [x](y)</p>"],
  ["`a*b*` `` c`d `` `open", "<p><code>a*b*</code> <code>c`d</code> `open</p>"],
  ["\\(x\\,y_1 * \\{z_1*2\\}\\) and \\(open", "<p><code class=math>\\(x\\,y_1 * \\{z_1*2\\}\\)</code> and (open</p>"],
  ["a:\n\\[\n  a \\\\\n  b\n\\]\n$$c*d*$$", "<p>a:<br></br><code class=math>\\[\na \\\\\nb\n\\]</code><br></br><code class=math>$$c*d*$$</code></p>"],
  ["$a\\,*b*$, $5 or $6*, $5/$6, 7 $ or $ 7, US$x\\$y", "<p><code class=math>$a\\,*b*$</code>, $5 or $6*, $5/$6, 7 $ or $ 7, US$x$y</p>"],
  ["&lt;b&gt; &amp;amp; &copy;", "<p><b> &amp; &copy;</p>"],
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

/** 30,000 or more characters each, made to cost more than they are worth. */
const COSTLY = [
  "[".repeat(30_000), "](".repeat(15_000), "*a ".repeat(10_000), "a* ".repeat(10_000), "**a*".repeat(8_000), "`".repeat(30_000),
  "> ".repeat(15_000), "- ".repeat(15_000), "|".repeat(30_000), "https://".repeat(4_000), `${" ".repeat(30_000)}x`,
  `\`\`\`${" ".repeat(30_000)}\``, "[a](https://b.c) ".repeat(2_000), "_".repeat(30_000), `${"*".repeat(15_000)}a${"*".repeat(15_000)}`,
  `\` ${"a".repeat(30_000)}\``, `${"- a\n".repeat(8_000)}`, "\\".repeat(30_000), "&amp;".repeat(6_000), "![".repeat(15_000), `- ${"\t".repeat(30_000)}x\n${"\t".repeat(30_000)}y`, "- a\n\t".repeat(8_000),
  "\\(".repeat(15_000), "\n\\[".repeat(10_000), "$a".repeat(15_000), "$$ ".repeat(10_001), `${"\\(".repeat(15_000)}\\)`,
];

for (const source of COSTLY) {
  test(`costly: ${JSON.stringify(source).slice(0, 30)}`, () => {
    const before = process.cpuUsage();
    shown([source]);
    parse(source, { open: true });
    const { user, system } = process.cpuUsage(before); // microseconds of our own: others may use the machine, too
    assert.ok(user + system < 3_000_000);
  });
}

// ---- a text that grows

const ALPHABET = ["a", "b ", "*", "**", "_", "`", "```", "\n", "\n\n", "# ", "- ", "1. ", "2. ", "  ", "    ", "\t", "> ", "|", "|-|", "---", "[", "](", ")", "https://e.org", "\r\n", "\r", "\\", "<i>", "é", "- [ ] ", "$", "$$", "\\(", "\\)", "\\[", "\\]"];

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
