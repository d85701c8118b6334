"""The fault table: the numbered faults that the server must survive. `conftest.py` fails if one has no test.

A test has a fault's number when it asserts, through the real server, every effect of that fault: the client's response,
the calls at the upstream, the settled tokens, the log line, and that nothing is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

fault = pytest.mark.fault

FAULTS = {
    1: "the upstream refuses the connection, resets it while it is made, or has no address",
    2: "connecting to the upstream hangs",
    3: "the upstream's TLS is bad, expired, or for another name",
    4: "the upstream takes the request and says nothing",
    5: "silence in mid-stream",
    6: "a reset in mid-stream",
    7: "the chunked framing is cut, or wrong",
    8: "the stream breaks off within an event",
    9: "the stream ends in good order without having said that it is over",
    10: "the stream has said why it is over, but not [DONE]",
    11: "the upstream puts an error event into the stream",
    12: "something else than an event stream comes",
    13: "the upstream does not take our key, and hands it back",
    14: "the upstream does not take the request",
    15: "the upstream is asked too much",
    16: "the upstream has a problem of its own",
    17: "the upstream points elsewhere",
    18: "a compressed answer, though none was asked for",
    19: "headers too large, too many, or not HTTP",
    20: "headers, interim answers and trailers that are not for the browser",
    21: "chunks, characters and line ends cut anywhere",
    22: "a single event of 10 MB",
    23: "a stream without end",
    24: "the upstream is faster than the client",
    25: "the client leaves while it sends its request",
    26: "the client leaves while a retry is waited for",
    27: "the client leaves while the upstream is connecting, thinking, talking, silent, or held up",
    28: "the client closes only its own direction",
    29: "the client stops reading, or its power fails",
    30: "a head, a body or a whole request that does not come",
    31: "the server is told to end while answers are live",
    32: "the time to end in is over, or a second signal comes",
    33: "one of several workers is killed",
    34: "the store of the limits is gone, frozen, slow, restarted or flushed",
    35: "the wall clock jumps by an hour",
    36: "descriptors run out",
    37: "nobody reads the log, or its pipe is closed",
    38: "the session secret or the upstream's key is changed",
    39: "requests that are malformed, or could be read in two ways",
    40: "a bug of our own",
    41: "a second request on a connection whose answer is live",
}


def numbered(cases: Mapping[str, Any]) -> list[Any]:
    """The cases as parameters. A number at the start of a label is the fault's number: "7 cut in a chunk"."""
    parameters = []
    for label, case in cases.items():
        number, _, _ = label.partition(" ")
        parameters.append(pytest.param(case, id=label, marks=[fault(int(number))] if number.isdigit() else []))
    return parameters
