"""Listening sockets that systemd has opened, in all ways they can be passed. Real processes: deploy/test_systemd.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.harness import PATIENCE

from proxy.server import listener as handed

PID = 4711


@contextmanager
def listening(
    family: socket.AddressFamily = socket.AF_INET, place: str | tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[int]:
    """The descriptor of a listening socket."""
    listener = socket.socket(family)
    listener.bind(place)
    listener.listen(1)
    yield listener.detach()  # whoever takes it over closes it


def told(count: int, names: str | None = None, pid: int = PID) -> dict[str, str]:
    said = {"LISTEN_FDS": str(count), "LISTEN_PID": str(pid)}
    return said if names is None else {**said, "LISTEN_FDNAMES": names}


OWNERS: dict[str, tuple[dict[str, str], dict[int, str]]] = {
    "nothing said": ({}, {}),
    "another process": (told(1, pid=PID + 1), {}),
    "no process": ({"LISTEN_FDS": "1"}, {}),
    "none": (told(0), {}),
    "one without a name": (told(1), {3: "server"}),
    "one with an empty name": (told(1, ""), {3: "server"}),
    "one with its unit's name": (told(1, "chat-proxy@1.socket"), {3: "server"}),
    "metrics alone": (told(1, "metrics"), {3: "metrics"}),
    "both": (told(2, "server:metrics"), {3: "server", 4: "metrics"}),
    "both, the other way round": (told(2, "metrics:web"), {3: "metrics", 4: "server"}),
    "fewer names than sockets": (told(2, "metrics"), {3: "metrics", 4: "server"}),
    "more names than sockets": (told(1, "a:b:metrics"), {3: "server"}),
}


@pytest.mark.parametrize("label", OWNERS)
def test_whose_a_socket_is(label: str) -> None:
    """Each descriptor belongs to the listener that its name selects, or to the server; to none in another process."""
    said, expected = OWNERS[label]
    assert handed.activated_descriptors(said, PID) == expected


def test_a_count_that_is_none() -> None:
    """A number that cannot be read is told, not taken for none."""
    with pytest.raises(OSError, match="LISTEN_FDS"):
        handed.activated_socket({"LISTEN_PID": str(PID), "LISTEN_FDS": "-1"}, PID, "server", 1.0)


def test_a_socket_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens as before, has the options of our own listeners, and is not for our children."""
    with listening() as number:
        monkeypatch.setattr(handed, "FIRST", number)
        os.set_inheritable(number, True)
        assert handed.activated_socket(told(1), PID, "metrics", 1.0) is None
        listener = handed.activated_socket(told(1), PID, "server", 12.5)
    assert listener is not None
    with listener, socket.create_connection(listener.getsockname(), PATIENCE):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_500
        assert not listener.get_inheritable()


def test_a_path_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket of a path, which has no options."""
    path = str(tmp_path / "s")
    with listening(socket.AF_UNIX, path) as number:
        monkeypatch.setattr(handed, "FIRST", number)
        listener = handed.activated_socket(told(1), PID, "server", 1.0)
    assert listener is not None
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_several_are_too_many() -> None:
    """One listener has one socket; a second one would not be served."""
    with pytest.raises(OSError, match="2 sockets"):
        handed.activated_socket(told(2), PID, "server", 1.0)


@pytest.mark.parametrize("what", ["a file", "a connection", "datagrams", "nothing"])
def test_what_cannot_be_listened_on(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything but a listening stream socket is refused at once, and left open."""
    if what == "a file":
        number = os.open(tmp_path / "file", os.O_CREAT)
    else:
        kind = socket.SOCK_DGRAM if what == "datagrams" else socket.SOCK_STREAM
        number = socket.socket(socket.AF_INET, kind).detach()
    monkeypatch.setattr(handed, "FIRST", number)
    if what == "nothing":
        os.close(number)
    with pytest.raises(OSError):  # noqa: PT011  # its text is shown by the command's own test
        handed.activated_socket(told(1), PID, "server", 1.0)
    if what != "nothing":
        os.close(number)
