"""Families of transformers, tiny and random: forward and backward of a sharded row against the
unsharded model.
"""

import pathlib
import re

import pytest

from longfactory.sp import vision
from longfactory.testing import run_ranks
from longfactory_dev import families

pytestmark = pytest.mark.processes

# One of each kind: plain, window of the mask alone, soft-cap, sinks, chunks with temperature,
# latent attention, arguments dropped on the way, frequencies that depend on the row, a gated delta
# net.
REPRESENTATIVES = [
    "llama",
    "qwen2_moe",
    "gemma2",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "stablelm",
    "phi3 with longrope",
    "llama with dynamic NTK",
    "qwen3_next",
]

REFUSED = {
    "bloom": "does not pass through transformers' attention registry",
    "doge": "attention mask would be lost",
    "bert": "bidirectional attention",
    "zaya": "carry a state along the document",
    "qwen4_exp_text": "its indexer scores means of several keys",
    "deepseek_v4": "one compressed key for each group of tokens",
}


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_exact(name: str) -> None:
    for result in run_ranks(2, families.check_on_rank, name, 2):
        assert result.verdict == "exact", result


@pytest.mark.parametrize("name", ["llama with 1 key head", "qwen3 with 5 heads", "qwen3_5_text"])
def test_exact_on_four_ranks(name: str) -> None:
    for result in run_ranks(4, families.check_on_rank, name, 4):
        assert result.verdict == "exact", result


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    for result in run_ranks(2, families.check_on_rank, name, 2):
        assert result.verdict == "refused", result
        assert REFUSED[name] in result.detail


def test_vision_table_of_the_page_has_every_family() -> None:
    """What benchmarks/vision_families.py has measured is as near as the tests ask, and stays when
    the rest of the page is written anew.
    """
    page = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
    section = families.images_section(page)
    found = {
        kind: max(float(a), float(b))
        for kind, a, b in re.findall(
            r"^\| (\w+) \| [^|]+ \| (\S+) \| (\S+) \|$", section, re.MULTILINE
        )
    }
    known = {kind for family in vision.FAMILIES for kind in family.types}
    assert found.keys() == known and max(found.values()) < 1e-5
    assert page.read_text().endswith(section)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_family_is_wrong_and_none_is_lost() -> None:
    """Every family of the installed transformers. Those that docs/models.md calls exact are still
    exact.
    """
    results = {r.family: r for r in families.sweep([*families.families(), *families.VARIANTS], 2)}
    assert [r for r in results.values() if r.verdict == "wrong"] == []
    page = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()
    exact = re.findall(
        r"^\| ([^|]+) \|", page.split("## Exact")[1].split("## Refused")[0], re.MULTILINE
    )[1:]
    assert len(exact) > 100
    assert [name for name in exact if name in results and results[name].verdict != "exact"] == []
