"""Listening sockets that whoever started us has opened already: socket activation, as sd_listen_fds(3) describes it.

Rules:
1. The environment says it: LISTEN_FDS descriptors from 3 on, meant for the process LISTEN_PID, with LISTEN_FDNAMES.
2. One that is named like a listener of ours ("metrics") is that listener's; all others are the server's.
3. What cannot be listened on is told at start, not found out by the first visitor.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

from proxy.settings import Server as ServerSettings
from proxy.settings import Settings, on_port

WRITE_DEADLINE = 30.0  # seconds a client may leave our bytes untaken: longer than any hiccup, short of a leak


def listen(server: ServerSettings) -> socket.socket:
    """The listening socket. Raises OSError."""
    if server.socket:
        return listen_on_path(Path(server.socket))
    family, kind, proto, _, address = socket.getaddrinfo(
        server.host, server.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tune(listener, WRITE_DEADLINE)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def listen_on_path(path: Path) -> socket.socket:
    """A Unix socket that its owner and group may use; a dead one of an earlier run is replaced.

    Not where anybody could put another in its place.
    """
    folder = path.parent.stat().st_mode
    if folder & stat.S_IWOTH and not folder & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, "everybody may write to its folder")
    if path.is_socket() and not is_alive(path):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o117)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def is_alive(path: Path) -> bool:
    """Does somebody listen there?"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def as_bound(settings: Settings, listener: socket.socket) -> Settings:
    """The settings with the port that the kernel chose, when it was asked to."""
    if settings.server.socket or settings.server.port:
        return settings
    return on_port(settings, listener.getsockname()[1])


FIRST = 3  # SD_LISTEN_FDS_START
SERVER = "server"
NAMED = ("metrics",)  # listeners that are handed over under their own name only

BACKLOG = 2048


def activated_socket(environ: Mapping[str, str], pid: int, name: str, write_deadline: float) -> socket.socket | None:
    """The socket that process `pid` was handed for this listener, with our options; None without one.

    Raises OSError where there are several, or something else than a listening stream socket.
    """
    numbers = [number for number, owner in activated_descriptors(environ, pid).items() if owner == name]
    if not numbers:
        return None
    if len(numbers) > 1:
        raise OSError(errno.EINVAL, f"{len(numbers)} sockets were handed over for {name}, where one is wanted")
    listener = listening_socket(numbers[0])
    tune(listener, write_deadline)
    return listener


def activated_descriptors(environ: Mapping[str, str], pid: int) -> dict[int, str]:
    """Which of our listeners each descriptor is for; empty when none is, or they are somebody else's."""
    if environ.get("LISTEN_PID") != str(pid):
        return {}
    count = environ.get("LISTEN_FDS", "")
    if not count.isdecimal():
        raise OSError(errno.EINVAL, "LISTEN_FDS is not a number")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    named = dict(enumerate(names, FIRST))
    return {
        number: name if (name := named.get(number)) in NAMED else SERVER for number in range(FIRST, FIRST + int(count))
    }


def listening_socket(number: int) -> socket.socket:
    """The listening socket behind a descriptor, which no child of ours inherits by itself."""
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        raise OSError(errno.ENOTSOCK, f"descriptor {number}, which was handed over, is no socket")
    listener = socket.socket(fileno=number)
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise OSError(errno.EINVAL, f"descriptor {number}, which was handed over, is no listening stream socket")
    listener.set_inheritable(False)
    listener.listen(BACKLOG)
    return listener


def tune(listener: socket.socket, write_deadline: float) -> None:
    """What accepted sockets inherit: small writes go at once, and what is not taken in time ends the connection.

    Where there is nothing to take, the kernel asks from half that time on whether anybody is still there. Sockets of a
    path have none of this; who connects there has deadlines of its own.
    """
    if listener.family != socket.AF_UNIX:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(write_deadline * 1000))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(write_deadline / 2)))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(write_deadline / 6)))
