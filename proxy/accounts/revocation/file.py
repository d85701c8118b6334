"""The control file: the rules that `chat-proxy sessions revoke` writes, read by every server within a second.

It contains no secret. Deleting it undoes its rules at the next start; running servers keep them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from proxy.accounts.revocation.rules import RevocationRules
from proxy.settings import Fault, SettingsError

DEFAULT_NAME = "chat-proxy.revoked.json"

decode = msgspec.json.Decoder(RevocationRules).decode


class ControlFile:
    """One file, named in the settings, or DEFAULT_NAME in $STATE_DIRECTORY or the current folder."""

    def __init__(self, configured: str) -> None:
        folder = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        self.path = Path(configured or Path(folder, DEFAULT_NAME)).absolute()
        self._seen: tuple[int, int, int] | None = None

    def read(self) -> RevocationRules | None:
        """The rules in the file; None when it is absent or has not changed since. Raises SettingsError."""
        try:
            seen = os.stat(self.path)
            signature = (seen.st_ino, seen.st_size, seen.st_mtime_ns)
            if signature == self._seen:
                return None
            rules = decode(self.path.read_bytes())
            self._seen = signature
            return rules
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.fault(error) from error

    def change(self, change: Callable[[RevocationRules], RevocationRules]) -> None:
        """Replaces the file atomically. Raises SettingsError.

        Root may run this in a folder of the server's user, so symbolic links in it are not followed.
        """
        try:
            with open(f"{self.path}.lock", "a", opener=open_no_link) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                rules = change(self.read() or RevocationRules())
                fresh = Path(f"{self.path}.new")
                fresh.unlink(missing_ok=True)
                with fresh.open("xb") as file:
                    file.write(msgspec.json.encode(rules))
                    self.set_owner(file.fileno())
                fresh.replace(self.path)
        except OSError as error:
            raise self.fault(error) from error

    def set_owner(self, fresh: int) -> None:
        """Makes a file that root writes readable for the server's own user."""
        if self.path.exists():
            before = self.path.stat()
            os.fchmod(fresh, before.st_mode & 0o777)
            if os.geteuid() == 0:
                os.fchown(fresh, before.st_uid, before.st_gid)
        else:
            os.fchmod(fresh, 0o644)

    def fault(self, error: Exception) -> SettingsError:
        what = "must be a file that `sessions revoke` wrote; repair or remove it (a restart then forgets its rules)"
        if isinstance(error, OSError):
            what = error.strerror or "cannot be used"
        return SettingsError([Fault("session.control_file", str(self.path), what)])


def open_no_link(path: str, flags: int) -> int:
    """Raises OSError for a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)
