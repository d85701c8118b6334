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

FIRST = 3  # SD_LISTEN_FDS_START
SERVER = "server"
NAMED = ("metrics",)  # listeners that are handed over under their own name only

BACKLOG = 2048


def handed(environ: Mapping[str, str], pid: int, name: str, write_deadline: float) -> socket.socket | None:
    """The socket that process `pid` was handed for this listener, with our options; None without one.

    Raises OSError where there are several, or something else than a listening stream socket.
    """
    numbers = [number for number, owner in owners(environ, pid).items() if owner == name]
    if not numbers:
        return None
    if len(numbers) > 1:
        raise OSError(errno.EINVAL, f"{len(numbers)} sockets were handed over for {name}, where one is wanted")
    listener = taken(numbers[0])
    tune(listener, write_deadline)
    return listener


def owners(environ: Mapping[str, str], pid: int) -> dict[int, str]:
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


def taken(number: int) -> socket.socket:
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
