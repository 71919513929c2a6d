"""`longfactory verify`: `command` (its function), `comparison` (the step), `alone` (its
specification), `cost` (what that may take), `rows` (what is compared), `probes` (what is watched),
`gradients`, `causes` (what a failure follows), `samples` (the data as text), `report`, `page` (JSON
and HTML).
"""

from longfactory.train.verify.command import verify
from longfactory.train.verify.comparison import Comparison
from longfactory.train.verify.page import as_html, as_json
from longfactory.train.verify.report import FACTOR, RowShape, VerifyReport, measured
from longfactory.train.verify.rows import choose, crossed, mask_reasons, row_reason, truncate

__all__ = [
    "FACTOR",
    "Comparison",
    "RowShape",
    "VerifyReport",
    "as_html",
    "as_json",
    "choose",
    "crossed",
    "mask_reasons",
    "measured",
    "row_reason",
    "truncate",
    "verify",
]
