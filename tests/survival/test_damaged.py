"""Whole runs over damaged checkpoints; that each damage to each file is found is told in
`tests/train/checkpoint/test_choose.py`. `benchmarks/survival.py --part damaged` is the long form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import _survival_damaged as damaged

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    "case", damaged.cases(3, 8), ids=lambda c: f"{c['run']}-{c['file']}-{c['how']}"
)
def test_it_is_named_and_the_one_before_is_taken(case: dict[str, Any], tmp_path: Path) -> None:
    result = damaged.run_case(case, tmp_path)
    assert result["ok"], result["end"]
