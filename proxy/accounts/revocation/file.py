"""The control file: what `chat-proxy sessions revoke` has revoked, seen by every running server within a second.

It holds no secret. Whoever deletes it undoes what it says at the next start; running servers keep what they know.
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
        """What it says, if that may have changed since it was read last. Raises SettingsError; its last word stands."""
        try:
            seen = os.stat(self.path)
            signature = (seen.st_ino, seen.st_size, seen.st_mtime_ns)
            if signature == self._seen:
                return None
            decree = decode(self.path.read_bytes())
            self._seen = signature
            return decree
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self.fault(error) from error

    def change(self, change: Callable[[RevocationRules], RevocationRules]) -> None:
        """Rewrites it whole, so that nobody reads half of it. Raises SettingsError.

        Root may do so in a folder of the server's user: what that has put there leads to no file elsewhere.
        """
        try:
            with open(f"{self.path}.lock", "a", opener=open_no_link) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                decree = change(self.read() or RevocationRules())
                fresh = Path(f"{self.path}.new")
                fresh.unlink(missing_ok=True)
                with fresh.open("xb") as file:
                    file.write(msgspec.json.encode(decree))
                    self.give_to_its_readers(file.fileno())
                fresh.replace(self.path)
        except OSError as error:
            raise self.fault(error) from error

    def give_to_its_readers(self, fresh: int) -> None:
        """The server, under a user of its own, must be able to read what root has written."""
        if self.path.exists():
            before = self.path.stat()
            os.fchmod(fresh, before.st_mode & 0o777)
            if os.geteuid() == 0:
                os.fchown(fresh, before.st_uid, before.st_gid)
        else:
            os.fchmod(fresh, 0o644)

    def fault(self, error: Exception) -> SettingsError:
        what = "is not what `sessions revoke` writes; mend it, or remove it: a restart then forgets what it said"
        if isinstance(error, OSError):
            what = error.strerror or "cannot be used"
        return SettingsError([Fault("session.control_file", str(self.path), what)])


def open_no_link(path: str, flags: int) -> int:
    """Raises OSError where there is a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)
