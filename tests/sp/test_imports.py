from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


def test_engine_imports_torch_alone() -> None:
    """And the list of kernel names, which configurations share and which imports nothing."""
    code = (
        "import sys, longfactory.sp; bad = [m for m in sys.modules if m.startswith('longfactory.')"
        " and not m.startswith('longfactory.sp') or m == 'transformers'];"
        " bad.remove('longfactory.kernel_names'); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
