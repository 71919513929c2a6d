"""What became of the rows of a data set."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Report:
    """What became of the rows. `lost_tokens` are tokens cut away (or dropped with their sample);
    `efficiency` is the share of the packed rows' room that holds tokens. `bad_rows` holds for each
    data set the count, the reasons and the first places."""

    rows_read: int = 0
    bad_rows: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    samples: int = 0
    tokens: int = 0
    truncated: int = 0
    lost_tokens: int = 0
    dropped: int = 0
    untrained: int = 0
    last_answer_only: int = 0
    equal_pairs: int = 0
    unanswered: int = 0
    with_media: int = 0
    media_cut: int = 0
    packed_rows: int = 0
    efficiency: float | None = None

    @property
    def bad(self) -> int:
        return sum(b["count"] for b in self.bad_rows.values())

    def add(self, other: Report) -> None:
        """Counts another part of the same data too (its samples; packing is that of one part)."""
        for name in (
            "samples",
            "tokens",
            "truncated",
            "lost_tokens",
            "dropped",
            "untrained",
            "last_answer_only",
            "equal_pairs",
            "unanswered",
            "with_media",
            "media_cut",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def describe(self) -> str:
        """One line for the log."""
        text = f"{self.samples} samples, {self.tokens} tokens"
        if self.bad:
            text += f"; {self.bad} of {self.rows_read} rows were bad"
        if self.truncated:
            text += (
                f"; {self.truncated} samples were truncated to cutoff_len and lost "
                f"{self.lost_tokens} tokens"
            )
        if self.dropped:
            text += (
                f"; {self.dropped} samples longer than cutoff_len were dropped ({self.lost_tokens}"
                " tokens)"
            )
        if self.untrained:
            text += f"; {self.untrained} samples have no trained token left"
        if self.last_answer_only:
            text += f"; in {self.last_answer_only} conversations only the last answer is trained"
        if self.equal_pairs:
            text += f"; in {self.equal_pairs} pairs both answers are the same"
        if self.unanswered:
            text += f"; {self.unanswered} samples have no answer and are for do_predict alone"
        if self.with_media:
            text += f"; {self.with_media} samples have images or videos"
        if self.media_cut:
            text += (
                f"; {self.media_cut} samples were dropped, because cutoff_len cuts through an image"
                " or a video"
            )
        if self.efficiency is not None:
            text += f"; packed into {self.packed_rows} rows, {100 * self.efficiency:.1f} % full"
        return text


def of_truncation(what: str, report: Report, cutoff: int, strategy: str, keeps_all: int) -> str:
    """What was cut, what that means, and what keeps it.

    Args:
        what: the data are for: training, or an evaluation.
        cutoff, strategy: the keys `cutoff_len` and `cutoff_strategy`.
        keeps_all: the `cutoff_len` that cuts nothing.
    """
    if not report.truncated:
        return f"{report.untrained} {what} samples have no trained token."
    lost = {
        "llamafactory": " from their ends. In a long prompt that is the part next to the "
        "answer, often the question itself",
        "keep_tail": " from the middle of their prompts",
    }.get(strategy, "")
    text = (
        f"{report.truncated} {what} samples are longer than cutoff_len ({cutoff}) and lost"
        f" {report.lost_tokens} tokens{lost}."
    )
    if report.untrained:
        text += f" {report.untrained} of them have no trained token left."
    text += f" To keep all of them, set cutoff_len: {keeps_all}"
    if strategy == "llamafactory":
        text += ", or keep the end of each prompt and cut its middle: cutoff_strategy: keep_tail"
    return f"{text}."
