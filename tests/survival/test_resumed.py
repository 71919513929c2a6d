"""What a run may change between its starts: refused, applied and told, or nothing at all.
`benchmarks/survival.py --part resumed` runs the same changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import _survival_resumed as resumed

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    "case", resumed.cases(0, 100), ids=lambda c: f"{c['run']}-{c['changed']}-{c['ends']}"
)
def test_a_change(case: dict[str, Any], tmp_path: Path) -> None:
    result = resumed.run_case(case, tmp_path)
    assert result["ok"], result["end"]
