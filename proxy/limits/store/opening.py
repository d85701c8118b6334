"""Opens the store that `limits.store` names."""

from __future__ import annotations

from collections.abc import Callable

from proxy.limits.store.redis import open_redis
from proxy.limits.store.shared import Engine, SharedStore
from proxy.limits.store.sqlite import SqliteEngine, check_file

SQLITE = "sqlite://"


def open_store(url: str, clock: Callable[[], float], report: Callable[[str | None], None]) -> SharedStore:
    """`report` and `clock` are those of SharedStore. Raises SettingsError for a file that cannot be used."""
    return SharedStore(open_engine(url), clock, report)


def open_engine(url: str) -> Engine:
    if url.startswith(SQLITE):
        path = url.removeprefix(SQLITE)
        check_file(path)
        return SqliteEngine(path)
    return open_redis(url)
