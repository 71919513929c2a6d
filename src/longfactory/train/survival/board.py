"""What the processes of a run write for each other outside of collectives: short values by name, in
torch's key-value store, which the launcher (or the first process) holds.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

ATTEMPT = "LONGFACTORY_ATTEMPT"
"""Environment variable of the workers of our launcher: 0, and one more after each restart."""


class KeyValues(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, value: str) -> bytes: ...


class Board:
    """Names and JSON values that every rank of this attempt reads and writes. No call waits for
    another rank.
    """

    def __init__(self, store: KeyValues, rank: int, world: int):
        self.store, self.rank, self.world = store, rank, world

    def put(self, name: str, value: Any) -> None:
        self.store.set(name, json.dumps(value))

    def first(self, name: str, value: Any) -> Any:
        """Writes unless somebody has; returns what stands there then."""
        return json.loads(self.store.compare_set(name, "", json.dumps(value)))

    def has(self, *names: str) -> bool:
        """Whether all of these are written."""
        return self.store.check(list(names))

    def get(self, name: str) -> Any:
        """The value, None where there is none yet."""
        return json.loads(self.store.get(name)) if self.has(name) else None

    def get_all(self, name: str) -> list[Any] | None:
        """`name/RANK` of every rank, None as long as one is missing."""
        names = [f"{name}/{rank}" for rank in range(self.world)]
        if not self.has(*names):
            return None
        return [json.loads(value) for value in self.store.multi_get(names)]

    def present(self, name: str) -> dict[int, Any]:
        """`name/RANK` of the ranks that have written it."""
        found = {rank: self.get(f"{name}/{rank}") for rank in range(self.world)}
        return {rank: value for rank, value in found.items() if value is not None}


def attempt() -> int:
    """How often this run's processes were started again: by our launcher, or by torchrun."""
    ours = int(os.environ.get(ATTEMPT, "0"))
    return max(ours, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def prefix() -> str:
    """Before the names of an attempt: the launcher's store outlives it, and must not answer with
    old values. A store of the first rank ends with it (and an elastic run's machines count their
    restarts each for itself).
    """
    outlives = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"longfactory/{attempt() if outlives else 0}"


def address() -> tuple[str, int]:
    """Where the store is."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def open_store(rank: int, world: int, seconds: float) -> Any:
    """The store of this attempt, from the launcher's environment. The first rank holds it where the
    launcher does not.

    Args:
        seconds: how long to wait for whoever holds it, and later for a value.
    """
    from torch.distributed import PrefixStore, rendezvous

    timeout = datetime.timedelta(seconds=seconds)
    store, _, _ = next(iter(rendezvous("env://", rank, world, timeout=timeout)))
    return PrefixStore(prefix(), store)


def connect(rank: int, world: int, seconds: float) -> Board:
    """Another connection to the store, for a thread: on a connection one waits for the other."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = address()
    store = TCPStore(
        host,
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=seconds),
    )
    return Board(PrefixStore(prefix(), store), rank, world)


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """Calls, ten times a second, until the result is not None or the time is up; returns the last
    result.
    """
    end = time.monotonic() + seconds
    while (found := condition()) is None and time.monotonic() < end:
        time.sleep(0.1)
    return found
