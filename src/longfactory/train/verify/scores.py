"""What the loss was given of each document, log-probabilities or values, and the loss: the run's
against the specification's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longfactory.data.row import Row
from longfactory.train.verify import alone
from longfactory.train.verify.alone import Step, Text
from longfactory.train.verify.report import (
    SMALLEST_SCORE,
    Deviation,
    TokenDistances,
    measured,
    relative,
)


def scores_of(
    row: Row, outputs: Tensor, texts: Sequence[Text], values: bool
) -> list[Tensor] | None:
    """What the loss was given of each text of a row that has scores; None where the row is not
    the expected one.
    """
    documents = [d for d in row.documents if d.role != "pad"]
    if [d.stop - d.start for d in documents] != [len(text.tokens) - text.before for text in texts]:
        return None
    found = []
    for d, text in zip(documents, texts, strict=True):
        if text.role == "prompt" or not (text.places or values):
            continue
        places = [d.stop - 1] if values else [d.start + t - text.before for t in text.places]
        found.append(outputs[places])
    return found


def compare_scores(
    outputs: Mapping[int, list[Tensor] | None],
    rows: Sequence[Sequence[Text]],
    groups: int,
    spec: Step,
    own: Step,
    *,
    values: bool,
    window: Any,
) -> tuple[Deviation, list[str], list[TokenDistances]]:
    """All log-probabilities (values), where they begin to differ, and the distance of each.

    Args:
        outputs: of each row what its documents got (`scores_of`).
        rows: the documents of each row.
        groups: that read a row each in one micro-batch.
        spec: the step of the specification. own: that of transformers' model in the run's
            precision.
        values: they are values.
        window: of the model's sliding attention, for the words.
    """
    found, expected, ours, places = [], [], [], []
    for i in range(len(rows)):
        scored = [
            (k, t) for k, t in enumerate(rows[i]) if t.role != "prompt" and (t.places or values)
        ]
        batch, first = i // groups, 0
        for other in range(batch * groups, i):
            first += sum(t.role != "prompt" and bool(t.places or values) for t in rows[other])
        given = outputs.get(i)
        if given is None:
            continue
        for j, (k, text) in enumerate(scored):
            found.append(given[j])
            expected.append(spec.logps[batch][first + j])
            ours.append(own.logps[batch][first + j])
            places.append((i, k, text))
    if not found:
        return Deviation(math.nan, math.nan, math.nan, 0.0, 0.0), [], []
    mine, rounding = alone.rms([found], [expected]), alone.rms([ours], [expected])
    norms = [math.sqrt(float((torch.cat(x).double() ** 2).mean())) for x in (found, expected)]
    measure = measured(norms[0], norms[1], mine, rounding, SMALLEST_SCORE * max(norms[1], 1.0))
    reasons = []
    if not measure.exact:
        for a, b, (i, k, text) in zip(found, expected, places, strict=True):
            off = ((a.double() - b.double()).abs() > 2 * measure.allowed).nonzero().flatten()
            if len(off):
                token = (text.places[int(off[0])] if not values else len(text.tokens) - 1) + 1
                agree = f"; {int(off[0])} before it agree" if off[0] else ""
                beyond = (
                    f" (its sliding window is {window})"
                    if isinstance(window, int) and token > window
                    else ""
                )
                reasons.append(
                    f"{'Values' if values else 'Log-probabilities'} differ in document {k + 1}"
                    f" of row {i + 1} from token {token} of {len(text.tokens)}"
                    f" on{beyond}{agree}."
                )
    distances = [
        TokenDistances(
            i,
            k,
            (len(text.tokens) - 1,) if values else tuple(text.places),
            tuple((a.double() - b.double()).abs().tolist()),
        )
        for a, b, (i, k, text) in zip(found, expected, places, strict=True)
    ]
    return measure, reasons[:3], distances


def loss_deviation(loss: float, spec: Step, own: Step) -> Deviation:
    """The run's loss against the specification's, and what the model's own arithmetic explains."""
    # A sum of errors may be near zero by chance: so far off is the loss if they all add up.
    bound = sum(
        float((slope.double().abs() * (a.double() - b.double()).abs()).sum())
        for slopes, x, y in zip(spec.sensitivity, own.logps, spec.logps, strict=True)
        for slope, a, b in zip(slopes, x, y, strict=True)
    )
    own_loss = max(relative(own.loss, spec.loss), bound / max(abs(spec.loss), 1e-12))
    return measured(loss, spec.loss, relative(loss, spec.loss), own_loss)
