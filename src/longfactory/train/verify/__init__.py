"""`longfactory verify`: `comparison` (the step, and the command's function), `alone` (its
specification), `rows` (what is compared), `gradients`, `report`.
"""

from longfactory.train.verify.comparison import Comparison, verify
from longfactory.train.verify.report import FACTOR, RowShape, VerifyReport, measured
from longfactory.train.verify.rows import choose, crossed, mask_reasons, row_reason, truncate

__all__ = [
    "FACTOR",
    "Comparison",
    "RowShape",
    "VerifyReport",
    "choose",
    "crossed",
    "mask_reasons",
    "measured",
    "row_reason",
    "truncate",
    "verify",
]
