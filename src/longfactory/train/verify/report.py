"""What `longfactory verify` found: deviations of numbers and tensors, and the report of a step."""

from __future__ import annotations

import dataclasses

import torch

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

    @property
    def exact(self) -> bool:
        measures = (self.loss, self.grad_norm, self.logps, *self.parameters.values())
        return (
            bool(self.rows)
            and bool(self.parameters)
            and not self.reasons
            and all(m.exact for m in measures)
        )

    def table(self) -> str:
        lines = [self.title]
        for i, row in enumerate(self.rows):
            lines.append(
                f"row {i + 1}: {row.tokens} tokens, {row.documents} documents, {row.crossing} of"
                " them on several ranks"
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
        lines += [f"- {reason}" for reason in self.reasons]
        lines.append("The same." if self.exact else "NOT the same.")
        lines += self.notes
        if self.dtype != torch.float32:
            lines.append(
                "Half precision rounds. For the sharp proof add bf16=false fp16=false"
                " pure_bf16=false."
            )
        return "\n".join(lines)


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
