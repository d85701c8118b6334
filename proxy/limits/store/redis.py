"""Counters and revocations on Redis, for several machines: one script an operation.

Needs Redis 7: a store that is full must still count (allow-oom).

Kinds of counters, by their key:

    moving   sorted set: an entry for each event, its time as score              requests
    fixed    hash: used, held, ends; sorted set `:h`: reservations by expiry      tokens
    held     sorted set: leases by expiry                                        live streams
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from proxy.limits.store.charges import Charge, ChargeResult, CounterState, Revoked

PREFIX = "{chat-proxy}:"  # braces: one slot of a cluster, since a script needs all of its keys there
REVOCATIONS = [f"{PREFIX}revoked", f"{PREFIX}decree"]

HERE = Path(__file__).parent
TAKE, KEEP, EXCHANGE, REPLACE = ((HERE / f"{name}.lua").read_text() for name in ("take", "keep", "exchange", "replace"))
FUNCTIONS = (HERE / "functions.lua").read_text()  # of take and keep


class Client(Protocol):
    """The part of redis.asyncio.Redis that is used."""

    connection_pool: Any

    def register_script(self, script: str) -> Any: ...
    async def aclose(self) -> None: ...


class RedisEngine:
    """One Redis, as `shared.Engine`."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.take_script = client.register_script(FUNCTIONS + TAKE)
        self.keep_script = client.register_script(FUNCTIONS + KEEP)
        self.exchange_script = client.register_script(EXCHANGE)
        self.replace_script = client.register_script(REPLACE)

    async def take(self, charges: list[Charge], holder: str, spent: int, *, hold: int, again: bool) -> ChargeResult:
        arguments: list[str | int] = [holder, hold * 1000, spent, int(again)]
        for charge in charges:
            arguments += [charge.kind, charge.amount, charge.limit, charge.seconds * 1000]
        keys = [mark_of(holder), *(PREFIX + charge.key for charge in charges)]
        booked, *numbers = map(int, await self.take_script(keys=keys, args=arguments))
        counters = [CounterState(used, free / 1000) for used, free in zip(numbers[::2], numbers[1::2], strict=True)]
        return ChargeResult(booked == 1, counters)

    async def keep(self, what: str, used: list[tuple[Charge, int]], holder: str, *, hold: int) -> None:
        arguments: list[str | int] = [holder, hold * 1000, what]
        keys = [mark_of(holder)]
        for charge, amount in used:
            keys.append(PREFIX + charge.key)
            arguments += [charge.kind, charge.amount, amount, charge.seconds * 1000]
        await self.keep_script(keys=keys, args=arguments)

    async def exchange(self, since: int, keep: int, page: int, ids: list[bytes]) -> Revoked:
        now, entries, rules = await self.exchange_script(keys=REVOCATIONS, args=[since, keep, page, *ids])
        return Revoked(
            int(now),
            [(id_, int(float(stored))) for id_, stored in zip(entries[::2], entries[1::2], strict=True)],
            rules or b"",
        )

    async def replace_rules(self, before: bytes, after: bytes) -> bool:
        return int(await self.replace_script(keys=REVOCATIONS[1:], args=[before, after])) == 1

    async def reconnect(self) -> None:
        await self.client.connection_pool.disconnect(inuse_connections=False)

    async def aclose(self) -> None:
        await self.client.aclose()


def mark_of(holder: str) -> str:
    """The key that marks a holder as ended."""
    return f"{PREFIX}ended:{holder}"


def open_redis(url: str) -> RedisEngine:
    """Opens the store at a URL of the `limits` package: redis://, rediss://, redis+unix://, redis+sentinel://.

    The packages are imported here since only such a store needs them.
    """
    from limits.storage import storage_from_string
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    options: dict[str, Any] = {
        "implementation": "redispy",
        "retry": Retry(NoBackoff(), 0),
    }
    storage: Any = storage_from_string(f"async+{url}", **options)
    return RedisEngine(storage.bridge.get_connection())
