"""Requests on the wire: valid ones, known attacks against parsers, and random damage to both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from proxy.server.protocol import MAX_FIELDS, MAX_HEAD_BYTES

SEED = 20

HOST = b"Host: localhost"
JSON = b"Content-Type: application/json"
CODED = b"Transfer-Encoding: chunked"
HOPELESS = b'{"model":"none","messages":[],"forbidden":1}'  # three faults: no single flipped bit makes it valid
LENGTH = b"Content-Length: %d" % len(HOPELESS)
CHUNK = b"%x\r\n%b\r\n" % (len(HOPELESS), HOPELESS)
CHUNKED = CHUNK + b"0\r\n\r\n"


def wire(start: bytes, *lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([start, *lines, b"", body])


def get(*lines: bytes, start: bytes = b"GET /api/v1/models HTTP/1.1", host: bytes = HOST) -> bytes:
    return wire(start, *([host] if host else []), *lines)


def post(*lines: bytes, body: bytes = HOPELESS, version: bytes = b"1.1") -> bytes:
    return wire(b"POST /api/chat HTTP/" + version, HOST, JSON, *lines, body=body)


def coded(body: bytes) -> bytes:
    return post(CODED, body=body)


def target(written: bytes) -> bytes:
    return get(start=b"GET %b HTTP/1.1" % written)


def each(build: Callable[[bytes], bytes], label: str, *written: bytes) -> dict[str, bytes]:
    """One request for each variant; `|` separates the variants."""
    return {f"{label} {variant!r}": build(variant) for variant in b"|".join(written).split(b"|")}


def every(build: Callable[[bytes], bytes], label: str, *codes: int) -> dict[str, bytes]:
    return {f"{code:#04x} in {label}": build(bytes([code])) for code in codes}


VALID = {  # with their answers
    "chat": ("app 400", post(LENGTH)),
    "chat in chunks": ("app 400", coded(CHUNKED)),
    "session": ("app 200", get(start=b"GET /api/session HTTP/1.1")),
    "logout": ("app 200", get(start=b"DELETE /api/session HTTP/1.1")),
    "page": ("server 200", get(start=b"GET / HTTP/1.1")),
    "probe": ("server 200", get(start=b"HEAD /healthz HTTP/1.1")),
}

REFUSED = {  # by the server, with 400: none is a valid request
    "length and coding": post(LENGTH, CODED, body=CHUNKED),
    "coding and length": post(CODED, LENGTH, body=CHUNKED),
    "coding and a length of 0": post(CODED, b"Content-Length: 0", body=CHUNKED),
    "two lengths": post(LENGTH, b"Content-Length: 5"),
    "one length twice": post(LENGTH, LENGTH),
    "one coding twice": post(CODED, CODED, body=CHUNKED),
    "chunked, then identity": post(CODED, b"Transfer-Encoding: identity", body=CHUNKED),
    "identity, then chunked": post(b"Transfer-Encoding: identity", CODED, body=CHUNKED),
    "coding in 1.0": post(CODED, body=CHUNKED, version=b"1.0"),
    "coding folded": post(b"Transfer-Encoding:\r\n chunked", body=CHUNKED),
    "coding folded on": post(b"Transfer-Encoding: chunked\r\n , identity", body=CHUNKED),
    "coding before a blank": post(LENGTH, b"Transfer-Encoding : chunked", body=CHUNKED),
    **each(
        lambda written: post(b"Content-Length: " + written, body=b"12345"),
        "length",
        b'5, 5|5,5|5 5|+5|-5|0x5|5;|5.0|1e1|five||"5"|\xd9\xa5|5\x0b|18446744073709551616|99999999999999999999999',
    ),
    **each(
        lambda written: post(b"Transfer-Encoding: " + written, body=CHUNKED),
        "coding",
        b"identity|gzip|gzip, chunked|chunked, gzip|chunked, chunked|chunked,|,chunked|xchunked|chunkedx|chunk|cow|",
        b'chunked;q=1|"chunked"|\x0bchunked|chunked\0|chunked, identity|identity, chunked|chunked chunked',
    ),
    "bare LF everywhere": get().replace(b"\r\n", b"\n"),
    "bare LF after the request line": get().replace(b"\r\n", b"\n", 1),
    "bare LF between fields": get(b"A: b\nC: d"),
    "bare LF at the end": get()[:-2] + b"\n",
    "bare CR between fields": get(b"A: b\rC: d"),
    "CR CR LF": get(b"A: b\r"),
    "a fold": get(b"A: b\r\n c"),
    "a fold first": get(host=b" Host: localhost"),
    **each(get, "field", b"A : b|A\t: b|A|: b|:| A: b"),
    **every(lambda byte: get(b"A: b%bc" % byte), "a value", *range(9), 11, 12, *range(14, 32), 127),
    **every(lambda byte: get(b"A%bB: c" % byte), "a name", *range(33), 127, 255, *b'"(),/;<=>?@[\\]{}'),
    **every(lambda byte: target(b"/a%bb" % byte), "a target", *range(9), 11, *range(14, 33), 127, 128, 255),
    **each(
        target,
        "target",
        b"http://localhost/api/v1/models|HTTP://localhost/|https://evil.example/|http://|://|*|localhost:80|localhost",
        b"api/v1/models|\\api|?a|/api/v1/models#a|/#|.|/a b||urn:x:y|[::1]",
    ),
    **each(
        lambda written: get(start=b"GET /api/v1/models " + written),
        "version",
        b"HTTP/0.9|HTTP/1.2|HTTP/1.9|HTTP/2.0|HTTP/3.0|HTTP/9.9|HTTP/1|HTTP/11|HTTP/1.10|HTTP/01.1|HTTP/1.1 |",
        b"HTTP/1.1 x|HTTP/-1.1|http/1.1|HTTP 1.1|HTTP/1,1|HTTP/|ICE/1.0|HTTPS/1.1|\tHTTP/1.1|HTTP/1.1\0|",
    ),
    **each(
        lambda written: get(start=written),
        "start",
        b"GET|GET |GET /| GET / HTTP/1.1|GET\t/\tHTTP/1.1|get / HTTP/1.1|Get / HTTP/1.1|BREW / HTTP/1.1|/ HTTP/1.1",
        b"G\0T / HTTP/1.1|GETGET / HTTP/1.1|CONNECT localhost:80 HTTP/1.1|CONNECT /api/chat HTTP/1.1|HTTP/1.1 200 OK",
        b"PRI * HTTP/2.0|OPTIONS * HTTP/1.1|TRACE * HTTP/1.1",
    ),
    "no Host": get(host=b""),
    "one Host twice": get(HOST),
    "two Hosts": get(b"Host: evil.example"),
    **each(
        lambda written: get(host=b"Host: " + written),
        "Host",
        b"|localhost, localhost|me@localhost|localhost/|http://localhost|localhost:x|local host|localhost:|",
        b"localhost:123456|[::1|::1|[::1]x|localhost?a|localhost#a|\xff|localhost\\|*",
    ),
    "h2c": get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    "h2c with a body": post(LENGTH, b"Connection: Upgrade", b"Upgrade: h2c"),
    "websocket": get(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
    "TLS by upgrade": get(b"Upgrade: TLS/1.0", b"Connection: upgrade"),
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    "TLS' ClientHello": bytes.fromhex("16030100d8010000d40303") + bytes(range(205)),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "SMTP": b"EHLO localhost\r\n",
    "Redis": b"*1\r\n$4\r\nPING\r\n",
    "PROXY protocol": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(),
    "zeros": bytes(100),
    **each(
        lambda written: coded(written + b"\r\n" + CHUNKED[4:]),
        "chunk size",
        b'-1|+2c|0x2c| 2c|2c ,||g|2c\0|2c\n|2c\x0b|2cg|\xff|2c;\0|2c;a\nb|2c;a="b|fffffffffffffffff|10000000000000000',
    ),
    "expecting 100 for no chunk": post(CODED, b"Expect: 100-continue", body=HOPELESS),
    **each(
        coded,
        "chunks",
        b"5\r\n123456\r\n0\r\n\r\n|6\r\n12345\r\n0\r\n\r\n|5\r\n123450\r\n\r\n|5\r\n12345\n0\r\n\r\n|5\n12345\r\n0\r\n\r\n",
        b"5\r\n12345\r\n0\n\n|" + HOPELESS + b"|0\r\nA\r\n\r\n|0\r\nA: \0\r\n\r\n|0\r\nA : b\r\n\r\n",
    ),
}

TOO_LARGE = {  # 431
    "one field too many": get(*[b"A: b"] * MAX_FIELDS),
    "a thousand fields": get(*[b"A: b"] * 1000),
    "long fields": get(*[b"A: " + b"b" * 1000] * 40),
    "a long value": get(b"A: " + b"b" * MAX_HEAD_BYTES),
    "a long name": get(b"A" * MAX_HEAD_BYTES + b": b"),
    "a long target": target(b"/" + b"a" * MAX_HEAD_BYTES),
    "a target without end": b"GET /" + b"a" * MAX_HEAD_BYTES,
    "a head without end": get(b"A: " + b"b" * MAX_HEAD_BYTES)[:-4],
}

ODD = {  # but unambiguously one request: the app answers with this status
    200: {
        "empty lines first": b"\r\n\r\n" + get(),
        "the most fields": get(*[b"A: b"] * (MAX_FIELDS - 1)),
        "a second blank in the request line": get(start=b"GET  /api/v1/models HTTP/1.1"),
        "a body that nobody wants": get(b"Content-Length: 3") + b"abc",
        **each(get, "field", b"A:|A:b|A: \t b|A: \xff\x80|Upgrade: h2c|Connection: ,, ,|Expect: 200-ok|TE: trailers"),
    },
    400: {
        "coding in capitals": post(b"TRANSFER-ENCODING: CHUNKED", body=CHUNKED),
        "coding with an underscore": post(LENGTH, b"Transfer_Encoding: chunked"),
        "length with an underscore": post(CODED, b"Content_Length: 3", body=CHUNKED),
        "length with zeros first": post(b"Content-Length: 00%d" % len(HOPELESS)),
        "expecting 100": post(LENGTH, b"Expect: 100-continue"),
        **each(
            coded,
            "chunks",
            b"000" + CHUNKED,
            b"0\r\n\r\n",
            b'5;a="b";c\r\n12345\r\n0\r\n\r\n',
            CHUNK + b"0\r\nA: b\r\n\r\n",
        ),
    },
    403: {
        "a foreign Host": get(host=b"Host: evil.example"),
        "1.0 without Host": get(start=b"GET /api/v1/models HTTP/1.0", host=b""),
    },
    404: each(
        target,
        "target",
        b"/%61pi/v1/models|/api%2fv1/models|/api//v1/models|/api/./v1/models|/api/v1/models/|/API/v1/models|/api/%|/api/%zz",
        b"/api/v1/models;a|/api/x/../v1/models|//api/v1/models|/api/v1/models%00|/api/v1/%6dodels|/api/v1/models%20|/api",
        b"/%2e%2e/api/v1/models|/api\\v1\\models|/..%2f..%2fetc%2fpasswd",
    ),
    405: each(
        lambda written: get(start=written + b" /api/v1/models HTTP/1.1"), "method", b"TRACE|OPTIONS|PUT|PROPFIND|QUERY"
    ),
}

TRAILERS = {  # as headers they would change the answer
    "Host": (400, coded(CHUNK + b"0\r\nHost: evil.example\r\n\r\n")),
    "Origin": (400, coded(CHUNK + b"0\r\nOrigin: https://evil.example\r\n\r\n")),
    "Content-Type": (415, coded(CHUNK + b"0\r\n" + JSON + b"\r\n\r\n").replace(JSON, b"A: b", 1)),
    "Cookie": (400, coded(CHUNK + b"0\r\nCookie: chat=forged\r\n\r\n")),
}

UNCLEAR = {  # none, one or two answers, depending on timing
    "two requests": get() + get(),
    "a request behind a chat": post(LENGTH) + get(),
    "a body longer than said": post(b"Content-Length: 5"),
    "a body shorter than said": post(b"Content-Length: 50"),
    "a chunk that does not end": coded(CHUNK[:-9]),
    "chunks that do not end": coded(CHUNK),
    "0.9": b"GET /api/v1/models\r\n",
    "nothing": b"\r\n",
}

# ---- the corpus ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The bytes that one client sends and, if certain, its answers. A `rude` client half-closes before them."""

    name: str
    pieces: list[bytes]
    rude: bool = False
    answers: tuple[str, ...] | None = None

    @property
    def sent(self) -> bytes:
        return b"".join(self.pieces)


KNOWN: list[tuple[str, bytes, tuple[str, ...] | None]] = [
    *((name, sent, ("server 400",)) for name, sent in REFUSED.items()),
    *((name, sent, ("server 431",)) for name, sent in TOO_LARGE.items()),
    *((name, sent, (f"app {status}",)) for status, table in ODD.items() for name, sent in table.items()),
    *((name, sent, (answer,)) for name, (answer, sent) in VALID.items()),
    *((name, sent, None) for name, sent in UNCLEAR.items()),
]
GOOD_ONES = [sent for _, sent in VALID.values()]


def mutant(dice: random.Random, sent: bytes) -> bytes:
    """Damages the request in one to three places."""
    data = bytearray(sent)
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(data) + 1)
        end = min(len(data), start + dice.choice((1, 1, 2, 8, 40)))
        accident = dice.randrange(6)
        if accident == 0 and start < len(data):
            data[start] ^= 1 << dice.randrange(8)
        elif accident == 1:
            data[start:start] = dice.choice(
                (dice.randbytes(end - start), b"\r\n", b"\n", b" ", b":", b"\0", b"\r\n\r\n")
            )
        elif accident == 2:
            del data[start:end]
        elif accident == 3:
            data[start:start] = data[start:end]
        elif accident == 4:
            del data[start:]
        else:
            data[start:] = dice.choice(GOOD_ONES)[dice.randrange(30) :]
    return bytes(data)


def cut_up(dice: random.Random, sent: bytes, most: int = 4) -> list[bytes]:
    places = sorted(dice.randrange(len(sent) + 1) for _ in range(dice.randint(1, most)))
    pieces = [sent[start:end] for start, end in zip([0, *places], [*places, len(sent)], strict=True)]
    return [piece for piece in pieces if piece]


def case_at(number: int) -> Case:
    """In turn a known trick, a damaged trick and two damaged valid requests; whole or in pieces, rude or not."""
    dice = random.Random(SEED * 10**9 + number)
    name, sent, answers = KNOWN[number // 4 % len(KNOWN)]
    if number % 4:
        answers = None
        sent = mutant(dice, sent if number % 4 == 1 else dice.choice(GOOD_ONES))
        name = "a mutant"
    pieces = cut_up(dice, sent) if dice.random() < 0.5 else [sent]
    return Case(f"{name} ({number} of seed {SEED})", pieces, dice.random() < 0.4, answers)
