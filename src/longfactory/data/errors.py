"""Bad rows and how they are counted."""

from __future__ import annotations

import dataclasses
import logging

# Columns by names that usually hold something to train on, or to train with.
MEANINGFUL_COLUMNS = {
    *(
        "system",
        "tools",
        "functions",
        "history",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "prompt",
        "response",
    ),
    *(
        "chosen",
        "rejected",
        "images",
        "videos",
        "audios",
        "weight",
        "text",
        "documents",
        "reasoning",
        "reasoning_content",
        "thinking",
    ),
}


class BadRow(Exception):
    """One row that cannot be used. The message is the reason, shortened where it quotes the row at
    length; the place is added by whoever knows it.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= 400 else f"{text[:400]}..."


def bad_row_sentence(name: str, place: str, reason: str, hint: str = "") -> str:
    """What is said of a bad row where bad rows are errors."""
    more = f" {hint}" if hint else ""
    return f"Data set {name!r}, {place}: {reason}. Repair it, or set on_bad_row: skip.{more}"


@dataclasses.dataclass
class BadRows:
    """How many rows were skipped, by reason, and where the first ones stand.

    `places` holds (place, reason), place being "file:line" for line-based files and "file row n"
    for others, counted from 1. `hint` says once what would make them usable. `unread` holds, for
    each field that nothing reads (of rows that are used), the number of rows that have it and the
    place of the first.
    """

    count: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    places: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    keep: int = 1000
    hint: str = ""
    unread: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        kind = reason.split(":")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        if len(self.places) < self.keep:
            self.places.append((place, reason))

    def add_unread(self, field: str, place: str, rows: int = 1) -> None:
        """Counts rows with a field that nothing reads."""
        count, first = self.unread.get(field, (0, place))
        self.unread[field] = (count + rows, first)

    def merge(self, other: BadRows) -> None:
        self.count += other.count
        self.hint = self.hint or other.hint
        for field, (rows, place) in other.unread.items():
            self.add_unread(field, place, rows)
        for kind, n in other.reasons.items():
            self.reasons[kind] = self.reasons.get(kind, 0) + n
        self.places += other.places[: max(self.keep - len(self.places), 0)]

    def to_json(self) -> dict:
        return {
            "count": self.count,
            "reasons": self.reasons,
            "places": self.places,
            "hint": self.hint,
            "unread": self.unread,
        }

    @classmethod
    def from_json(cls, d: dict) -> BadRows:
        unread = {field: (int(rows), place) for field, (rows, place) in d.get("unread", {}).items()}
        return cls(
            d["count"],
            dict(d["reasons"]),
            [(p, r) for p, r in d["places"]],
            hint=d.get("hint", ""),
            unread=unread,
        )

    def describe(self, show: int = 5) -> str:
        """A few lines for a person: how many, why, and the first places."""
        why = ", ".join(
            f"{kind} ({n})" for kind, n in sorted(self.reasons.items(), key=lambda x: -x[1])
        )
        first = "".join(f"\n  {place}: {reason}" for place, reason in self.places[:show])
        more = f"\n  ... and {self.count - show} more" if self.count > show else ""
        hint = f"\n  {self.hint}" if self.hint else ""
        return f"{self.count} bad rows: {why}.{first}{more}{hint}"

    def tell_unread(
        self, name: str, log: logging.Logger, told: set[tuple[str, str]] | None = None
    ) -> None:
        """Says which fields of a data set nothing reads, in how many rows, and where each stands
        first; each once, as `told` says.

        Columns that any file may have beside its data (a number, a source) are information; fields
        of messages, and columns by the name of something that could be trained on, are a warning.
        """
        told = set() if told is None else told
        new = sorted(field for field in self.unread if (name, field) not in told)
        told |= {(name, field) for field in new}
        plain = [
            f
            for f in new
            if f.startswith("column ") and f[len("column ") :].strip("'") not in MEANINGFUL_COLUMNS
        ]
        for level, fields in (
            (logging.WARNING, [f for f in new if f not in plain]),
            (logging.INFO, plain),
        ):
            if fields:
                found = [
                    f"{field} ({self.unread[field][0]} rows, first {self.unread[field][1]})"
                    for field in fields
                ]
                log.log(level, f"Data set {name!r}: these fields are not used: {', '.join(found)}.")
