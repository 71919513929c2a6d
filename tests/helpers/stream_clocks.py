"""Streams and events of a GPU where there is none: everything is computed at once, and each stream
knows what it comes after. What would be a race on a GPU is found without one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import ClassVar

_numbers = itertools.count()
Moment = tuple[int, int]  # a stream, and how much was done on it


class Event:
    def __init__(self) -> None:
        self.clock: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> Event:
        self.clock = dict((stream or Device.current_stream()).clock)
        return self


class Stream:
    def __init__(self, priority: int = 0) -> None:
        self.number, self.clock = next(_numbers), dict[int, int]()

    def work(self) -> Moment:
        """Something is done on this stream."""
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.number, self.clock[self.number]

    def is_after(self, moment: Moment) -> bool:
        stream, count = moment
        return self.clock.get(stream, 0) >= count

    def wait_event(self, event: Event) -> None:
        for stream, count in event.clock.items():
            self.clock[stream] = max(count, self.clock.get(stream, 0))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(Event().record(stream))

    def record_event(self) -> Event:
        return Event().record(self)


class Device:
    """What torch.cuda has of streams."""

    Stream, Event = Stream, Event
    entered: ClassVar[list[Stream]] = [Stream()]

    @classmethod
    def current_stream(cls, device: object = None) -> Stream:
        return cls.entered[-1]

    @classmethod
    @contextlib.contextmanager
    def stream(cls, stream: Stream) -> Iterator[None]:
        cls.entered.append(stream)
        try:
            yield
        finally:
            cls.entered.pop()


class Memory:
    """Reads and writes of named tensors by the current stream. `races`: those that do not come
    after what they need; `early`: what was read before the last write of all.
    """

    def __init__(self) -> None:
        self.written: dict[str, Moment] = {}
        self.read_at: dict[str, list[Moment]] = {}
        self.last: Moment = (-1, 0)
        self.races: list[str] = []
        self.early: set[str] = set()

    def read(self, name: str) -> None:
        stream = Device.current_stream()
        if name in self.written and not stream.is_after(self.written[name]):
            self.races.append(f"{name} is read before it was written")
        if not stream.is_after(self.last):
            self.early.add(name)
        self.read_at.setdefault(name, []).append(stream.work())

    def write(self, name: str) -> None:
        stream = Device.current_stream()
        if not all(stream.is_after(moment) for moment in self.read_at.pop(name, [])):
            self.races.append(f"{name} is written before it was read")
        self.written[name] = self.last = stream.work()
