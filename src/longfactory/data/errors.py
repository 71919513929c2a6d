"""Bad rows and how they are counted."""

from __future__ import annotations

import dataclasses

from longfactory.errors import UserError


class DataError(UserError, ValueError):
    """A data set that cannot be used, told in one sentence or two."""


class BadRow(Exception):
    """One row that cannot be used. The message is the reason; the place is added by whoever knows it."""


@dataclasses.dataclass
class BadRows:
    """How many rows were skipped, by reason, and where the first ones stand.

    `places` holds (place, reason), place being "file:line" for line-based files and "file row n" for others, counted from 1.
    """

    count: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    keep: int = 1000

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        kind = reason.split(":")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        if len(self.places) < self.keep:
            self.places.append((place, reason))

    def merge(self, other: BadRows) -> None:
        self.count += other.count
        for kind, n in other.reasons.items():
            self.reasons[kind] = self.reasons.get(kind, 0) + n
        self.places += other.places[: max(self.keep - len(self.places), 0)]

    def to_json(self) -> dict:
        return {"count": self.count, "reasons": self.reasons, "places": self.places}

    @classmethod
    def from_json(cls, d: dict) -> BadRows:
        return cls(d["count"], dict(d["reasons"]), [(p, r) for p, r in d["places"]])

    def describe(self, show: int = 5) -> str:
        """A few lines for a person: how many, why, and the first places."""
        why = ", ".join(f"{kind} ({n})" for kind, n in sorted(self.reasons.items(), key=lambda x: -x[1]))
        first = "".join(f"\n  {place}: {reason}" for place, reason in self.places[:show])
        more = f"\n  ... and {self.count - show} more" if self.count > show else ""
        return f"{self.count} bad rows: {why}.{first}{more}"
