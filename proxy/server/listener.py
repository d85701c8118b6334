"""The listening socket: opened here, or by systemd (socket activation, sd_listen_fds(3)).

Rules:
1. The socket's options are set here, and accepted sockets inherit them: TCP_NODELAY; TCP_USER_TIMEOUT, with which the
   kernel closes a connection whose client does not read or has lost power; SO_KEEPALIVE, which detects the latter also
   while nothing is sent (tcp(7)). On a Unix socket nginx is the client, and has a send_timeout of its own.
2. LISTEN_FDS descriptors from 3 on belong to the process LISTEN_PID; LISTEN_FDNAMES names them. A descriptor named
   "metrics" is for the metrics; all others are for the server.
3. A descriptor that cannot be listened on fails at the start, not at the first request.
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

WRITE_DEADLINE = 30.0  # seconds a client may leave bytes unread: longer than any network hiccup


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
    """A Unix socket for its owner and group; a dead one of an earlier run is replaced.

    Raises PermissionError in a folder where every user could replace it.
    """
    folder = path.parent.stat().st_mode
    if folder & stat.S_IWOTH and not folder & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, "every user may write to its folder")
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
    """Whether a process listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def as_bound(settings: Settings, listener: socket.socket) -> Settings:
    """The settings with the port that the kernel chose, for port 0."""
    if settings.server.socket or settings.server.port:
        return settings
    return on_port(settings, listener.getsockname()[1])


FIRST = 3  # SD_LISTEN_FDS_START
SERVER = "server"
NAMED = ("metrics",)  # listeners that need their own name

BACKLOG = 2048


def activated_socket(environ: Mapping[str, str], pid: int, name: str, write_deadline: float) -> socket.socket | None:
    """The socket that systemd opened for this listener of process `pid`, with the options set; None without one.

    Raises OSError when there are several, or when it is not a listening stream socket.
    """
    numbers = [number for number, owner in activated_descriptors(environ, pid).items() if owner == name]
    if not numbers:
        return None
    if len(numbers) > 1:
        raise OSError(errno.EINVAL, f"{len(numbers)} sockets were passed for {name}, must be one")
    listener = listening_socket(numbers[0])
    tune(listener, write_deadline)
    return listener


def activated_descriptors(environ: Mapping[str, str], pid: int) -> dict[int, str]:
    """The listener that each descriptor is for; empty when they are for another process."""
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
    """The listening socket of a descriptor, not inheritable by child processes."""
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        raise OSError(errno.ENOTSOCK, f"descriptor {number}, which was passed, must be a socket")
    listener = socket.socket(fileno=number)
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise OSError(errno.EINVAL, f"descriptor {number}, which was handed over, is no listening stream socket")
    listener.set_inheritable(False)
    listener.listen(BACKLOG)
    return listener


def tune(listener: socket.socket, write_deadline: float) -> None:
    """Sets the options that accepted sockets inherit: no delay of small writes, and a deadline for unread bytes.

    While nothing is sent, the kernel probes the client from half that time on. Unix sockets have no such options; their
    clients have deadlines of their own.
    """
    if listener.family != socket.AF_UNIX:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(write_deadline * 1000))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(write_deadline / 2)))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(write_deadline / 6)))
