"""What the demo model says: the texts, and the table that picks one of them.

Rules of this file:
1. Pure and deterministic: the same prompt always gets the same answer.
2. A paragraph is one line of the answer. A backslash at a line's end continues it in the source, because many
   pages turn a newline into a line break.
3. `{quote}` in a text becomes a little of what the user wrote; nothing else is filled in.
4. `ROUTES` is tried from the top, the first match wins, and `ABOUT` answers everything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import cycle

MAX_QUOTE_CHARS = 60
"""Enough to recognise one's own words; a whole pasted page would drown the answer."""

ABOUT = """\
# This is the demo model of `chat-proxy`

You wrote {quote}. I can quote that, but I did not understand it: there is **no real intelligence** here. I \
am a small program inside `chat-proxy` that picks a prepared answer and streams it to you token by token, \
*exactly the way a real model would*, so that you can see the whole path work without a key and without \
paying anything.

## Use a real model

Change these two settings in `chat-proxy.toml`:

```toml
[upstream]
base_url = "https://api.selamgpt.com/v1"

[policy]
models = ["selam-turbo"]
```

The key itself does not go into the file. Put it into the environment and start the server:

```sh
export CHAT_PROXY_UPSTREAM_API_KEY="..."
chat-proxy serve --config chat-proxy.toml
```

Your browser never sees that key. That is what `chat-proxy` is for. 🔑

## Things to ask me

- `hello`, a `joke` or a `story`
- a `table`, some `code`, a numbered `list`, or `markdown` for all of it at once
- `Amharic`, `Arabic` or `Hebrew`, or simply write in one of them
- a `long` essay, to try the Stop button and the scrolling

## Faults to stage

| write | and the model |
|---|---|
| `/cut` | breaks off in the middle of the answer |
| `/silent 90` | says nothing for 90 seconds in mid-answer |
| `/slow` | takes ten times as long to begin |
| `/error 429` | refuses with that status (any from 400 to 599) |

For example, try /cut and look at what your page shows.
"""

HELLO = """\
Hello! 👋 I am the demo model of `chat-proxy`. Ask me for a **table**, some **code** or a **long essay**, or \
ask *what is this?* to learn how to connect a real model.
"""

THANKS = """\
You are welcome! 😊 Anything else? A `table`, a `story`, or perhaps something in Amharic?
"""

JOKE = """\
Why did the token cross the network? 🐔

Because it was **streamed** to the other side. 🥁

*(I know only this one. A real model would know more, and some of them would be funny.)* 😄
"""

STORY = """\
## The lamp at the ford

Where the road from the hills meets the river there was once a ford, and beside the ford a hut, and in its \
window a lamp. An old woman named **Almaz** lit it every evening, although hardly anyone crossed at night.

One autumn the rains came early. A young trader stood on the far bank with two mules and could not see the \
stones. He was about to turn back when a small yellow light appeared across the water, and then, because the \
clouds had parted, a *second* one, trembling in the river just below the first.

"If I walk so that the two lights stay one above the other," he thought, "I walk straight." And so he \
crossed, step by step, with the mules grumbling behind him.

"Why do you light it, when nobody comes?" he asked her over a cup of coffee.

> "I don't know who comes," said Almaz. "That is why I light it."

In the morning he left a jar of oil on her doorstep. It was gone when he passed by again in spring, but the \
lamp was burning. 🪔
"""

LEARNING = """\
## Machine learning, simply

You asked: {quote}. Imagine teaching a child to tell **lemons** from **limes**. You do not hand over a rule \
book. You show many fruits, say which is which, and after a while the child gets it right. Machine learning \
does the same with numbers.

1. **Collect examples.** Thousands of fruits, each with its name.
2. **Let the program guess.** At first it is wrong about half of the time.
3. **Correct it a little.** Each mistake moves some numbers inside by a tiny step.
4. **Repeat**, until the guesses are good.
5. **Test with new fruits**, ones it has never seen. Only this shows whether it has *learned* \
or merely *memorised*.

| Word | What it means here |
|---|---|
| data | the fruits with their names |
| model | the numbers that are adjusted |
| training | steps 2 to 4 |
| inference | naming a new fruit 🍋 |

A language model is the same idea: its examples are texts, and what it guesses is `the next word`.
"""

STREAMING = """\
## Streaming, in simple terms

A language model writes its answer **one piece at a time**. Without streaming, the server waits for the last \
piece and sends everything at once: you look at nothing for ten seconds, then at a wall of text. With \
streaming, each piece travels the moment it exists, and you read along. ✍️

1. The page asks with `"stream": true`.
2. The model's server keeps the response open and sends *server-sent events*: lines that begin with `data:`.
3. Each event carries a few characters, the **delta**. The page appends it.
4. `data: [DONE]` says that the answer is complete. If the connection ends without it, the answer broke off.

```text
data: {"choices":[{"delta":{"content":"Hel"}}]}

data: {"choices":[{"delta":{"content":"lo"}}]}

data: [DONE]
```

> Two numbers tell how it feels: the *time to first token*, and the *tokens per second* after it. Both stand \
below this answer.
"""

CODE = """\
Here is a complete Python program. It talks to `chat-proxy` with the `openai` package; the key may be any \
word, because the real one stays on the server:

```python
import sys

from openai import OpenAI

proxy = OpenAI(base_url="http://127.0.0.1:8000/api/v1", api_key="not-needed")


def ask(question: str) -> None:
    \"\"\"Prints the answer while it is being written.\"\"\"
    answer = proxy.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": question}],
        stream=True,
    )
    for event in answer:
        for choice in event.choices:
            sys.stdout.write(choice.delta.content or "")
            sys.stdout.flush()


ask("Show me a table")
```

And the same from a page, with nothing but the browser:

```js
const response = await fetch("/api/chat", {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ messages: [{ role: "user", content: "Hello" }], stream: true }),
});
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  console.log(text); // server-sent events: "data: {...}" and a blank line
}
```

Note that `text` is a piece of the *stream*, not an event: one event may arrive in two pieces, so **buffer \
up to the blank line** before you parse.
"""

TABLE = """\
Here are three ways to connect a chat page with a model:

| Way | Where the key is | Who can spend it | Effort |
|:---|:---|:---|---:|
| Key in the page | in every browser | *everyone* | 5 min |
| A server of your own | on the server | whoever it lets in | 5 days |
| `chat-proxy` | on the server | **people with a session, up to a limit** | 15 min |

The last column is right-aligned, the first cell of the last row is `inline code`, and the table is wider \
than a phone, so this is a good moment to look at it on a small screen. 📱
"""

LIST = """\
A plan for {quote}, in the order in which it tends to go well:

1. **Write down what "done" means.** One sentence is enough.
2. **Collect what you need:**
   - time, honestly estimated
   - tools
   - one person who can help
3. **Begin with the part you know least about.** Surprises are cheaper early.
4. **Do a small piece from beginning to end** before you do everything by halves.
5. **Show it to someone** and listen.
6. **Repeat** steps 4 and 5 until the sentence from step 1 is true. ✅

And what to leave out:

- perfection on the first day
- tools that promise to do it for you
- lists with more than seven entries
"""

MARKDOWN = """\
# Everything at once

A paragraph with **bold**, *italics*, ***both***, ~~struck out~~, `inline code` and [a link to the Markdown \
reference](https://commonmark.org/help/). An address on its own: <https://example.org/a_b?c=d&e=f>. \
Characters that must survive as they are: < > & " '.

## Lists

- apples 🍏
- pears
  - green ones
  - yellow ones
- bread 🍞

1. first
2. second
   1. second, part one
   2. second, part two
3. third

- [x] a task that is done
- [ ] a task that is not

## Code

```python
def fibonacci(n: int) -> list[int]:
    numbers = [0, 1]
    while len(numbers) < n:
        numbers.append(numbers[-1] + numbers[-2])
    return numbers[:n]
```

```html
<script>alert("this must be shown, not run")</script>
```

### A table

| Left | Centre | Right |
|:---|:---:|---:|
| ሰላም | hello | 1 |
| שלום | مرحبا | 22 |
| 👩🏾‍💻 | 🇪🇹 | 333 |

#### A quotation

> Simple things should be simple, complex things should be possible.
>
> — Alan Kay

---

That was a rule, and this is the end.
"""

AMHARIC = """\
ሰላም! 👋 ጤና ይስጥልኝ።

እርስዎ የጻፉት፦ {quote}። እኔ የ`chat-proxy` የማሳያ ሞዴል ነኝ። እውነተኛ ሰው ሠራሽ አስተውሎት የለኝም፤ መልሶቼ ሁሉ አስቀድመው የተጻፉ ናቸው። ነገር ግን \
ገጹ አማርኛን በትክክል ማሳየቱን ለማረጋገጥ እጠቅማለሁ።

## ስለ ቡና

በኢትዮጵያ ብዙ ሰዎች ቀናቸውን የሚጀምሩት በቡና ነው። ቡናው መጀመሪያ ይታጠባል፣ ከዚያ ይቆላል፣ ይወቀጣል፣ በመጨረሻም በጀበና ይፈላል። ጎረቤቶች ተሰብስበው ስለ ቤተሰብ፣ \
ስለ ሥራና ስለ ኑሮ እያወሩ አብረው ይጠጣሉ። የመጀመሪያው ዙር **አቦል**፣ ሁለተኛው **ቶና**፣ ሦስተኛው ደግሞ **በረካ** ይባላል። ቡና መጠጣት ብቻ ሳይሆን አብሮ \
መቀመጥም ትልቅ ደስታ ነው።

1. **ማጠብ**፦ ጥሬው ቡና በንጹህ ውሃ ይታጠባል።
2. **መቁላት**፦ በምጣድ ላይ ቡናማ እስኪሆን ድረስ ይቆላል።
3. **መውቀጥ**፦ በሙቀጫ ይወቀጣል።
4. **ማፍላት**፦ በጀበና ይፈላል፤ ከዚያም በሲኒ ይቀርባል። ☕

እውነተኛ ሞዴል ለመጠቀም `base_url` እና `models` የሚሉትን ሁለት ቅንብሮች ይቀይሩ። ሌላ ጥያቄ ካለዎት ይጠይቁኝ። መልካም ቀን!
"""

ARABIC = """\
مرحبًا! 👋

كتبتَ: {quote}. أنا النموذج التجريبي المرفق مع `chat-proxy`. لا أملك ذكاءً حقيقيًا، وكل إجاباتي مكتوبة مسبقًا.

## النص من اليمين إلى اليسار

تساعدك هذه الفقرة على التأكد من أن الصفحة تعرض النص العربي بشكل صحيح، حتى عندما تظهر فيه كلمات إنجليزية مثل \
`max_tokens` أو أرقام مثل 1234.

1. **نص عريض** و*نص مائل*.
2. رابط إلى [موقع يونيكود](https://home.unicode.org/).
3. شيفرة قصيرة: `print("مرحبا")`.

لاستخدام نموذج حقيقي غيّر الإعدادين `base_url` و`models`. شكرًا لك! 🌙
"""

HEBREW = """\
שלום! 👋

כתבת: {quote}. אני מודל ההדגמה של `chat-proxy`. אין לי בינה אמיתית, וכל התשובות שלי נכתבו מראש.

## טקסט מימין לשמאל

הפסקה הזאת עוזרת לבדוק שהדף מציג עברית כראוי, גם כשמופיעות בה מילים באנגלית כמו \
`max_tokens` או מספרים כמו 1234.

1. **טקסט מודגש** וגם *טקסט נטוי*.
2. קישור אל [אתר יוניקוד](https://home.unicode.org/).
3. קוד קצר: `print("שלום")`.

כדי להשתמש במודל אמיתי יש לשנות שתי הגדרות: `base_url` וגם `models`. תודה! 🌿
"""

STAGED = """\
You asked for a staged fault, so here it comes. This text is only long enough to give it a middle: **the \
first half** arrives as usual, and then the thing you asked for happens, if it is one that happens in the \
middle.

- After `/cut` you will never read the end of this list, and your page should say that the answer \
**broke off**.
- After `/silent` there is a pause now, and then it goes on. Does your page show that it is still waiting? ⏳
- After `/slow` the wait came before the first word.

If you can read this line, the answer arrived whole. You can also write more after \
the knob: `/cut a long essay`.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """One stretch of the long answer: its title, the word for its subject, and what there is to know."""

    title: str
    subject: str
    facts: str


ESSAY_OPENING = """\
# How a word crosses the world

You asked for something long ({quote}), so here is an essay in many short sections. It is long enough to try \
the **Stop** button, to scroll up while the text keeps arriving, and to see whether your page stays smooth \
to the end.
"""

ESSAY_SECTIONS = (
    Section(
        "Clay",
        "the clay tablet",
        "The oldest writing that we can read was pressed into wet clay in Mesopotamia more than five "
        "thousand years ago. Most of the early tablets are not poems but receipts: so much barley, so many "
        "sheep, so many days of work. Somebody wanted to be sure that a promise would still be the same "
        "promise after the harvest. Writing began as a way of not having to trust anyone's memory, and it "
        "has never quite lost that purpose.",
    ),
    Section(
        "Parchment and Ge'ez",
        "the manuscript",
        "In the highlands of Ethiopia scribes wrote on goatskin with black ink and red, and some of the "
        "books they made have been read aloud for more than a thousand years. The Ge'ez script has a sign "
        "for every syllable: a family of basic letters, each with seven forms, one for every vowel. A child "
        "who learns Amharic today recites the same rows, *ሀሁሂሃሄህሆ*, that the scribes once recited.",
    ),
    Section(
        "The royal road",
        "the courier",
        "Twenty-five centuries ago a road of some two and a half thousand kilometres ran from Sardis to "
        "Susa. On foot it took about three months. The king's letters took little more than a week, because "
        "every station along the way kept a fresh horse and a rested rider. No single rider was fast. The "
        "*handover* was fast, and that is a lesson which every network since has had to learn again.",
    ),
    Section(
        "Paper",
        "paper",
        "Paper was made in China some two thousand years ago out of bark, rags and old fishing nets. It "
        "went west slowly, by way of Samarkand and Baghdad, and reached the mills of Europe many centuries "
        "later. Parchment needed the skins of a flock for one large book; paper needed water, rags and "
        "patience. When the material became cheap, people began to write down things that had not seemed "
        "worth a sheep.",
    ),
    Section(
        "Movable type",
        "the printing press",
        "Printers in China and Korea set movable type long before Gutenberg did so in Mainz in the middle "
        "of the fifteenth century. What he added was a whole workshop: a metal that cast well, an ink that "
        "clung to it, a press, and a way of making ten thousand equal letters. A page could now be wrong in "
        "exactly the same way five hundred times, and so for the first time it was worth correcting it.",
    ),
    Section(
        "Towers with arms",
        "the semaphore",
        "In 1794 a chain of towers carried news from Lille to Paris faster than any horse. On each roof "
        "stood a mast with movable arms, and in each tower sat a man with a telescope who copied what his "
        "neighbour showed. Fog stopped it, night stopped it, and a tired man could spoil a message for "
        "everyone behind him. The answer was a code book, a signal for *repeat that*, and another for *I am "
        "ready*.",
    ),
    Section(
        "The stamp",
        "the postage stamp",
        "Before 1840 it was usual for the one who received a letter to pay for it, by distance and by the "
        "sheet. People put their news into secret marks on the outside, looked at them, and refused the "
        "letter. The British reform made it one price, paid in advance, whatever the distance, with a small "
        "black piece of gummed paper as the proof. The traffic doubled within a year or so, and the postman "
        "no longer had to knock.",
    ),
    Section(
        "The wire",
        "the telegraph",
        "In May 1844 a line between Washington and Baltimore carried its first public message, and for the "
        "first time news could travel much faster than any messenger. Railways put the wires beside their "
        "tracks, newspapers shared the cost of a report, and towns that had each lived by their own sun "
        "began to agree on what time it was. The world did not become smaller, but it began to keep the "
        "same clock.",
    ),
    Section(
        "Dots and dashes",
        "Morse code",
        "The commonest letter in English, *e*, is a single dot. The rare ones are long. It is said that the "
        "lengths were chosen by counting the pieces of type in a printer's case, where the letters in "
        "demand fill the biggest boxes. That is compression, a century before the word: say often-needed "
        "things briefly, and let the unusual take its time. Every language model cuts text into pieces by "
        "the same thrift.",
    ),
    Section(
        "Under the sea",
        "the undersea cable",
        "The first cable across the Atlantic, in 1858, worked for a few weeks. One greeting of fewer than a "
        "hundred words took most of a day, and then somebody raised the voltage and the line was dead. In "
        "1866 a better one was laid and stayed. Even now nearly all that passes between the continents goes "
        "through cables on the sea floor, some of them no thicker than a garden hose, and ships are out in "
        "every season to mend them.",
    ),
    Section(
        "The switchboard",
        "the telephone exchange",
        "The first telephones came in pairs, like tin cans on a string. To call a *second* friend one "
        "needed a second line, and so there had to be a room where lines met. For decades people sat in "
        "that room and joined voices by hand. An undertaker from Kansas City, sure that the operators were "
        "sending his customers to a rival, invented a switch that nobody could bribe, and the dial was born "
        "of suspicion.",
    ),
    Section(
        "Into the air",
        "radio",
        "A wire goes to one place, a wave goes everywhere. That was the trouble with radio at first, since "
        "anyone could listen, and a little later it was the whole point. Ships could call for help from "
        "beyond the horizon. Farmers heard the same concert as ministers. And because all shared one sky, "
        "there had to be rules about who may speak, on which frequency, how loudly, and who has to be "
        "silent when someone is in distress.",
    ),
    Section(
        "A mirror in the sky",
        "the satellite",
        "A satellite that is to hang still above one spot must fly at almost thirty-six thousand "
        "kilometres. Up and down again takes light about a quarter of a second, and every telephone call "
        "over such a satellite has that pause in it, in which two polite people begin to speak at once. "
        "Satellites in low orbits answer sooner but do not stay, so that the call must be passed on from "
        "one to the next: the rested rider and the fresh horse again.",
    ),
    Section(
        "Packets",
        "the packet",
        "In the nineteen-sixties several people had the same idea independently: cut every message into "
        "small pieces, put the address on each, and let each find its own way. In October 1969 somebody in "
        "Los Angeles began to type *login* to a computer near Stanford. It crashed after two letters, and "
        "so the first message of the network that became the Internet was *lo*. An hour later it worked.",
    ),
    Section(
        "In order, without gaps",
        "TCP",
        "Pieces that travel separately arrive late, twice, in the wrong order, or not at all. The remedy "
        "from 1974 is as simple as a good post office: number the pieces, say which have come, send the "
        "missing ones again, and slow down when the other side cannot keep up. Nothing in between has to "
        "remember anything. All the care is taken at the two ends, and what lies in the middle may be as "
        "careless as the weather.",
    ),
    Section(
        "The sign in the middle",
        "electronic mail",
        "In 1971 an engineer needed a character that appears in nobody's name, and so he took the one that "
        "means *at*. Nobody had asked him for mail between computers; when he showed it to a colleague he "
        "is said to have added that it was not what they were supposed to be working on. Within a few years "
        "most of the traffic on the network was mail. People had been given a way to compute together, and "
        "they used it to write letters.",
    ),
    Section(
        "Light in glass",
        "the optical fibre",
        "In 1966 it was worked out that glass, if only it were pure enough, could carry light for many "
        "kilometres. The glass of the day swallowed almost everything within a few metres. Four years later "
        "it was good enough. Light in a fibre goes at about two thirds of its full speed, two hundred "
        "thousand kilometres in a second, and so a word from Addis Ababa to Tokyo and back cannot take less "
        "than about a tenth of a second, however clever we are.",
    ),
    Section(
        "Pages that point",
        "the web",
        "The proposal of 1989 came back from a superior with a note calling it vague but exciting. It asked "
        "for something modest: that a document should be able to point to another one, on another machine, "
        "belonging to somebody else, without asking anyone's leave. A link might be broken, and that was "
        "all right. Earlier systems had insisted on perfect links and had therefore remained small.",
    ),
    Section(
        "A number for every letter",
        "Unicode",
        "For a long time every country had its own table of characters, and a letter from abroad could turn "
        "into a row of question marks. Unicode gave each character of each script one number; the Ethiopic "
        "letters came in 1999. UTF-8, sketched in 1992 in a diner in New Jersey, writes those numbers in "
        "one to four bytes, so that a stream can be cut anywhere and the reader can still find the "
        "beginning of the next letter.",
    ),
    Section(
        "A hundred and sixty",
        "the text message",
        "The first text message, in December 1992, wished somebody a merry Christmas. The limit of a "
        "hundred and sixty characters was found by a man who typed out ordinary sentences, counted, and saw "
        "that most of what people want to say fits. The messages went through a corner of the network that "
        "was built for signalling and mostly stood empty. Something left over turned out to be what "
        "everybody wanted.",
    ),
    Section(
        "Money by telephone",
        "the mobile phone",
        "In much of Africa the mobile phone was not the second telephone but the first, and soon it was "
        "also the bank. In Kenya, from 2007, a message could carry money: a trader in Nairobi sent her "
        "mother something for the school fees and walked on. No branch, no cheque, no queue. What had to be "
        "right was only this, that a payment which was not confirmed had not happened, and that one which "
        "was confirmed had happened once.",
    ),
    Section(
        "Word by word",
        "the stream",
        "A language model does not know its sentence before it has said it. It writes one piece, reads "
        "everything again, and writes the next. One could wait until it has finished, as one waits for a "
        "letter; but a reader takes in only a few words a second, so why not hand over each piece at once? "
        "That is what you are looking at. Every piece of this text is an event of its own, and if you press "
        "Stop, the next one need never be written.",
    ),
)

ESSAY_REFLECTIONS = (
    "What strikes one about {subject} is how little of it was planned. It solved a problem that was in "
    "front of someone, with what was at hand, and the larger consequences arrived later and from an "
    "unexpected side. Those who had made it were often the last to see what it was good for.",
    "It would be easy to tell this as a story of progress, and it would be half of the truth. With "
    "{subject} something was also lost: a craft, a slowness, sometimes a kind of privacy. People noticed, "
    "complained, got used to it, and in the end complained when it was taken away again.",
    "Look at it from the receiving side for a moment. What did {subject} change for the person who "
    "*waited*? Until then, waiting had meant not knowing. Afterwards it meant knowing that an answer was on "
    "its way, which is a different thing altogether and much easier to bear.",
    "There is a question of cost in all this. Whoever paid for {subject} decided who could use it, and for "
    "what, and how long they might speak. Whenever the price fell to a tenth, the users did not merely "
    "become ten times as many. They became other people, with other things to say.",
    "Engineers like to point out that {subject} works by *agreement*. The material parts are the smaller "
    "half; the larger half is that both ends mean the same thing by the same sign, know what to do when a "
    "sign is missing, and know when to stop. An agreement costs nothing to copy, which is why it travels "
    "further than any machine.",
    "And then there are the failures. Every account of {subject} has a chapter about the day when it did "
    "not work, and it tends to be the best chapter, because it shows what people had begun to rely on "
    "without noticing. A thing that never fails teaches nobody how it is made.",
)

ESSAY_ASIDES = (
    "> A message that broke off must never look like a message that has ended.\n>\n> - a rule for "
    "{subject}, and for everything after it",
    "Three things to keep from {subject}:\n\n1. **Hand over early.** Whoever keeps a message delays it.\n"
    "2. **Say when it is over.** Silence is not an ending.\n3. **Stop when nobody listens.** Speaking on "
    "costs something and helps no one.",
    "Put in a line of code, {subject} would look rather plain:\n\n```python\nwhile somebody_listens():\n    "
    "hand_over(next_piece())\n```",
    "| | before | after {subject} |\n|---|---|---|\n| distance | decides everything | decides the price |\n"
    "| the wait | uncertain | measured ⏱️ |\n| the reader | somebody known | anybody |",
    "So much for {subject}. It is tempting to go on at once to what came next, but most people who lived at "
    "the time did nothing of the kind. They used it for birthdays, debts, the weather and the price of "
    "grain, as people had used everything before it and have used everything since.",
)

ESSAY_CLOSING = """\
## The end of the line

From clay to streams the means have changed completely and the wish has not: that what I say here may be \
read there, *whole*, soon, and by the one it is meant for. Each of the steps above made one of these a \
little easier and usually made another a little harder, and then somebody sat down and repaired that.

You have reached the end of the long answer. If it arrived without a stutter, your page is in good shape. 🎉
"""


def essay() -> str:
    """The long answer, several thousand words; sections take their turn at the reflections and the asides."""
    parts = [ESSAY_OPENING]
    turns = zip(ESSAY_SECTIONS, cycle(ESSAY_REFLECTIONS), cycle(ESSAY_ASIDES), strict=False)
    for section, *templates in turns:
        paragraphs = [template.replace("{subject}", section.subject) for template in templates]
        parts.append("\n\n".join((f"## {section.title}", section.facts, *paragraphs)) + "\n")
    return "\n".join((*parts, ESSAY_CLOSING))


@dataclass(frozen=True, slots=True)
class Route:
    """A prompt that `asks` finds something in is answered with `text`."""

    asks: re.Pattern[str]
    text: str


def _route(pattern: str, text: str) -> Route:
    return Route(re.compile(pattern, re.IGNORECASE), text)


ROUTES = (
    _route("[\u1200-\u139f\u2d80-\u2ddf\uab00-\uab2f]|amharic|ethiopic", AMHARIC),
    _route("[\u0600-\u06ff\u0750-\u077f]|\\b(arabic|rtl|right.to.left)\\b", ARABIC),
    _route("[\u0590-\u05ff]|\\bhebrew\\b", HEBREW),
    _route(r"(?<!how )\blong(er)?\b|\bessays?\b", essay()),
    _route(r"\b(markdown|formatting|everything)\b", MARKDOWN),
    _route(r"\bstream(s|ed|ing)?\b|\bsse\b", STREAMING),
    _route(r"\b(api.?key|chat-proxy|proxy|config\w*|settings?|base_url|real model|selam.?gpt)\b", ABOUT),
    _route(r"\b(code|coding|python|javascript|typescript|react|function|program|script)\b", CODE),
    _route(r"\b(table|compare|comparison|versus|vs|difference)\b", TABLE),
    _route(r"\b(story|tale)\b", STORY),
    _route(r"\b(jokes?|funny|emojis?|laugh)\b", JOKE),
    _route(r"\b(machine learning|deep learning|neural|language models?|ai)\b", LEARNING),
    _route(r"\b(lists?|steps?|plan|recipe|checklist|to.?do|how (do|can|to))\b", LIST),
    _route(r"^\W*(thanks|thank you|thx)\b", THANKS),
    _route(r"^\W*(hi|hello|hey|selam|good (morning|day|afternoon|evening))\b.{0,40}$", HELLO),
)


def choose(prompt: str) -> str:
    """The answer to `prompt`, in Markdown, without a final newline."""
    text = next((route.text for route in ROUTES if route.asks.search(prompt)), ABOUT)
    return text.replace("{quote}", quote(prompt)).rstrip("\n")


def quote(prompt: str) -> str:
    """The beginning of `prompt` on one line; a code span if Markdown would act upon any of it."""
    words = " ".join(prompt.split())
    if not words:
        return '"..."'
    if len(words) > MAX_QUOTE_CHARS:
        words = words[:MAX_QUOTE_CHARS].rstrip() + "..."
    if re.search(r"[`*_<>\[\]|\\~#&$:/]", words):
        return "`" + words.replace("`", "'") + "`"
    return f'"{words}"'
