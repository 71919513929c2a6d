"""What the preference stages read from a row: sums of log-probabilities per document, and which
documents belong together.

All sums are float64. The log-probability of an answer of 100,000 tokens is near -100,000, where
neighbouring fp32 numbers are 0.008 apart: a log-ratio taken there would be mostly rounding. Sums in
float64 also do not depend on where in a row a document lies, so a number computed before training
is the same number in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from longfactory.data.row import IGNORE, Row
from longfactory.errors import UserError
from longfactory.sp.pinned import copied


def document_sums(x: Tensor, row: Row) -> Tensor:
    """[T] -> [D] float64: the sum of `x` over the trained tokens of each document. Differentiable.

    One reduction a document, never an indexed addition: the order of additions, hence the last bit,
    is always the same.
    """
    trained = torch.where(row.labels != IGNORE, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return torch.stack(
        [
            part.sum(dtype=torch.float64)
            for part in trained.split([d.stop - d.start for d in row.documents])
        ]
    )


def document_logps(logps: Tensor, row: Row, ld_alpha: float | None = None) -> Tensor:
    """[T] -> [D] float64: each document's log-probability, the number that preference losses
    compare.

    Args:
        logps: [T] log-probabilities of the labels.
        ld_alpha: length-desensitised DPO (arXiv 2409.06411): in a pair, tokens of the longer answer
            beyond the shorter one's length weigh `ld_alpha`. Applied to policy and reference alike,
            as in TRL.
    """
    if ld_alpha is None:
        return document_sums(logps, row)
    limit = [d.trained for d in row.documents]
    for chosen, rejected in find_pairs(row):
        limit[chosen] = limit[rejected] = min(limit[chosen], limit[rejected])
    before, seen = [], 0  # trained tokens of the row before each document
    for d in row.documents:
        before.append(seen)
        seen += d.trained
    ends = torch.tensor([b + n for b, n in zip(before, limit, strict=True)])
    end = copied(ends, logps.device)
    place = torch.cumsum(row.labels != IGNORE, 0)  # 1 at the row's first trained token
    return document_sums(torch.where(place <= end[row.document_ids], logps, logps * ld_alpha), row)


def find_pairs(row: Row) -> list[tuple[int, int]]:
    """Indices (chosen, rejected) into `row.documents`, one tuple a pair: the documents of one
    sample with these two roles.

    Raises:
        UserError: a sample with a chosen document and no rejected one, or the reverse.
    """
    sides: dict[int, tuple[list[int], list[int]]] = {}
    for i, d in enumerate(row.documents):
        if d.role in ("chosen", "rejected"):
            sides.setdefault(d.sample, ([], []))[d.role == "rejected"].append(i)
    found: list[tuple[int, int]] = []
    for sample, (chosen, rejected) in sides.items():
        if len(chosen) != len(rejected):
            raise UserError(
                f"Sample {sample} has {len(chosen)} chosen and {len(rejected)} rejected answers in"
                " its row. A preference stage needs one of each; for single answers with a label"
                " use `stage: kto`."
            )
        found += zip(chosen, rejected, strict=True)
    return found


def of_role(row: Row, role: str) -> list[int]:
    """Indices of the documents with this role."""
    return [i for i, d in enumerate(row.documents) if d.role == role]


def pick(x: Tensor, indices: Sequence[int]) -> Tensor:
    """`x[indices]` for indices that are known on the host; an empty choice stays attached to the
    graph of `x`.
    """
    return x[copied(torch.tensor(indices, dtype=torch.int64), x.device)]


def reference_logps(
    reference: Tensor | None, row: Row, indices: Sequence[int], like: Tensor, ld_alpha: float | None
) -> Tensor:
    """[len(indices)] float64: the reference's log-probability of these documents, from the
    reference's token log-probabilities of this row where they were computed, else from the numbers
    that the documents carry.

    Raises:
        UserError: there is neither.
    """
    if reference is not None:
        return pick(document_logps(reference.detach(), row, ld_alpha), indices)
    numbers = [row.documents[i].reference_logp for i in indices]
    if None in numbers:
        document = row.documents[indices[numbers.index(None)]]
        raise UserError(
            f"The {document.role} answer of sample {document.sample} has no reference"
            " log-probability, and no reference model was run. Set `precompute_ref_log_probs:"
            " true`, name a `ref_model`, or train with LoRA (its reference is the model without"
            " adapter)."
        )
    return copied(torch.tensor(numbers, dtype=torch.float64), like.device)


@dataclasses.dataclass(frozen=True)
class PairLogps:
    """P pairs. `chosen` and `rejected` are the policy's log-probabilities, [P] float64; lengths are
    trained tokens, [P] float64.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor | None
    rejected_reference: Tensor | None
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log policy - log reference of the chosen answers (the policy alone where there is no
        reference).
        """
        return self.chosen if self.chosen_reference is None else self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        return (
            self.rejected
            if self.rejected_reference is None
            else self.rejected - self.rejected_reference
        )

    @property
    def margin(self) -> Tensor:
        """chosen_ratio - rejected_ratio. Each difference is taken first: equal models give exactly
        0.
        """
        return self.chosen_ratio - self.rejected_ratio

    def per_token(self) -> PairLogps:
        """The same pairs with means over trained tokens in place of sums. Lengths are those of
        whole documents.
        """

        def mean(x: Tensor | None, n: Tensor) -> Tensor | None:
            return None if x is None else x / n

        c, r = self.chosen_length.clamp(min=1), self.rejected_length.clamp(min=1)
        return dataclasses.replace(
            self,
            chosen=self.chosen / c,
            rejected=self.rejected / r,
            chosen_reference=mean(self.chosen_reference, c),
            rejected_reference=mean(self.rejected_reference, r),
        )
