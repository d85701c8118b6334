"""Packages from the npm registry, in folders outside the repository that are kept between runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

INSTALLING = 300.0  # seconds


def installed(name: str, files: Iterable[Path]) -> Path:
    """A folder with these files, package-lock.json among them, and what that says: made once for this user and them."""
    files = sorted(files)
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
    name = f"chat-proxy-{name}-{os.getuid()}-{digest}"
    kept = Path(tempfile.gettempdir(), name)
    if not kept.exists():
        fresh = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        for file in files:
            shutil.copy(file, fresh)
        npm = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(npm, cwd=fresh, check=True, timeout=INSTALLING)
        try:
            fresh.rename(kept)
        except OSError:  # another session was faster
            shutil.rmtree(fresh)
    assert kept.stat().st_uid == os.getuid(), "somebody else made this folder"
    return kept
