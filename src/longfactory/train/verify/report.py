"""What `longfactory verify` found: deviations of numbers and tensors, and the report of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from longfactory.data.samples import DecodedSample, told
from longfactory.sp import compare

FACTOR = compare.LIMIT
"""How many times as far from the wider precision as transformers' own attention in the run's
precision a step may be: as for the start-up guard."""
SMALLEST = 1e-4
"""A relative difference that counts as none: float32 numbers that are added in another order."""
SMALLEST_SCORE = 2e-5
"""The same for log-probabilities, which no sum over tokens has gone into yet."""
FLOOR = 1e-3
"""A gradient that is zero in exact arithmetic (the bias of a key projection) is noise: differences
count against at least this share of the whole gradient's norm."""


@dataclasses.dataclass(frozen=True)
class Deviation:
    """One number or tensor: `split` as trained, `alone` in the wider precision, to which
    differences are relative.

    `own`: the difference of transformers' own attention in the run's precision. `allowed`: what the
    step's may be.
    """

    split: float
    alone: float
    difference: float
    own: float
    allowed: float

    @property
    def exact(self) -> bool:
        return self.difference <= self.allowed  # false for NaN


@dataclasses.dataclass(frozen=True)
class RowShape:
    """How large a verified row is."""

    tokens: int
    documents: int
    crossing: int
    """Documents of which several ranks hold a part."""
    padding: int = 0
    """Tokens at the end of the row that belong to no sample."""
    placed: tuple[tuple[int, int, int, str, int], ...] = ()
    """(start, stop, index of the parent or -1, role, sample) of each document."""
    ranks: tuple[tuple[tuple[int, int], ...], ...] = ()
    """The intervals of the row that each rank holds."""


State = Literal["passed", "failed", "not exercised"]


@dataclasses.dataclass(frozen=True)
class Check:
    """What was looked at, and what came of it."""

    name: str
    state: State
    words: str
    """What was found, or why it was not exercised."""


@dataclasses.dataclass(frozen=True)
class TokenDistances:
    """How far the log-probabilities (values) of a document's tokens are from the specification."""

    row: int
    document: int
    places: tuple[int, ...]
    """Tokens of the document (with its parents) after which a token is predicted."""
    distances: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Cause:
    """What became of a difference when one thing was left out of the run."""

    left_out: str
    gone: bool | None
    """None: the run could not be made without it."""
    words: str = ""
    """Why not."""


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """One optimizer step, both ways. `parameters`: by name, the worst first. `reasons`: what is
    wrong, in sentences.
    """

    rows: tuple[RowShape, ...]
    loss: Deviation
    grad_norm: Deviation
    logps: Deviation
    """Root mean square over all tokens to predict (or values); absolute differences."""
    parameters: dict[str, Deviation]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    dtype: torch.dtype
    title: str
    checks: tuple[Check, ...] = ()
    causes: tuple[Cause, ...] = ()
    """Of a failing comparison: what became of it without one thing or another."""
    samples: tuple[DecodedSample, ...] = ()
    tokens: tuple[TokenDistances, ...] = ()
    windows: tuple[int, ...] = ()
    """Sizes of the model's sliding windows or chunks that these rows exceed."""
    parameter_count: int = 0
    longest_row: int = 0
    """Tokens that a row had at most."""

    @property
    def exact(self) -> bool:
        measures = (self.loss, self.grad_norm, self.logps, *self.parameters.values())
        return (
            bool(self.rows)
            and bool(self.parameters)
            and not self.reasons
            and all(check.state != "failed" for check in self.checks)
            and all(m.exact for m in measures)
        )

    def table(self, colour: bool = False) -> str:
        """The report for a terminal. `colour`: trained text is green."""
        lines = [self.title]
        for i, row in enumerate(self.rows):
            lines.append(
                f"row {i + 1}: {row.tokens} tokens, {row.documents} documents, {row.crossing} "
                "of them sharded over several ranks"
            )
        lines.append(
            f"{'':32}{'split':>14}{'alone':>14}{'difference':>12}{'own':>10}{'allowed':>10}"
        )
        lines += [
            _line(name, m, 30) for name, m in (("loss", self.loss), ("grad_norm", self.grad_norm))
        ]
        m = self.logps
        lines.append(
            f"  {'log-probabilities':<58}{m.difference:>12.1e}{m.own:>10.1e}{m.allowed:>10.1e}"
        )
        lines.append(f"gradients of {len(self.parameters)} parameters; the worst:")
        for name, m in list(self.parameters.items())[:5]:
            lines.append(f"  {name:<58}{m.difference:>12.1e}{m.own:>10.1e}{m.allowed:>10.1e}")
        lines += [f"  {check.state:<13} {check.name}: {check.words}" for check in self.checks]
        lines += [f"- {reason}" for reason in self.reasons]
        lines.append("The same." if self.exact else "NOT the same.")
        lines += [f"  without {cause.left_out}: {outcome(cause)}" for cause in self.causes]
        if self.causes:
            lines.append(conclusion(self.causes))
        lines += self.notes
        lines += told(self.samples, colour)
        if self.dtype != torch.float32:
            lines.append(
                "This comparison includes half-precision rounding. For a strict one add "
                "bf16=false fp16=false pure_bf16=false."
            )
        return "\n".join(lines)


def outcome(cause: Cause) -> str:
    """What became of the difference, in words."""
    if cause.gone is None:
        return f"not compared ({cause.words})"
    return "the same" if cause.gone else "NOT the same"


def conclusion(causes: Sequence[Cause]) -> str:
    """Which difference the failure follows, in one sentence."""

    def named(chosen: Iterable[Cause]) -> list[str]:
        return [cause.left_out.split(" (")[0] for cause in chosen]

    gone = named(cause for cause in causes if cause.gone)
    tried = named(cause for cause in causes if cause.gone is not None)
    if gone:
        alone = "either" if len(gone) == 2 else "any of them"
        without = alone if len(gone) > 1 else "it"
        return f"The difference follows {' and '.join(gone)}: it is gone without {without}."
    if tried:
        return (
            f"The difference remains without each of {', '.join(tried)}: look at the model, "
            "the data, the loss or the gradient reduction."
        )
    return "No part of the run could be switched off to find the cause of the difference."


def _line(name: str, m: Deviation, width: int) -> str:
    measures = f"{m.difference:>12.1e}{m.own:>10.1e}{m.allowed:>10.1e}"
    return f"  {name:<{width}}{m.split:>14.7g}{m.alone:>14.7g}{measures}"


def relative(a: float, b: float) -> float:
    """|a - b| / |b|, and 0 where both are 0."""
    return abs(a - b) / max(abs(b), 1e-12) if a != b else 0.0


def measured(
    split: float, alone: float, difference: float, own: float, at_least: float = SMALLEST
) -> Deviation:
    """The deviation of `split` from `alone`: allowed are `FACTOR` times the own one, and
    `at_least` in any case.
    """
    return Deviation(split, alone, difference, own, max(FACTOR * own, at_least))
