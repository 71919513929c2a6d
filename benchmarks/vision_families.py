"""Every family of vision-language models whose images are trained on, tiny and random: rows with
images sharded over four processes against transformers' own forward of each document in one.

    python benchmarks/vision_families.py --write docs/models.md      # CPU, a minute or two

A row of one document and one of several (packed), of text, images and, where a family takes them,
frames, under two layouts of the sharded row. The errors are the largest difference of the loss or of
the gradient of any parameter (tower, projector, text) over max(1, the largest value), in float64,
norms, rotary angles and softmax included, which transformers computes in float32 otherwise. The
comparison is that of `tests/sp/test_vision.py`. The other families of transformers that have a
vision tower are listed with the reason for which their images are refused.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for part in ("src", "tests/helpers", "tests/sp"):
    sys.path.insert(0, str(ROOT / part))

import test_vision as compared  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import vision_models as tiny  # noqa: E402
from longfactory.sp import vision  # noqa: E402
from longfactory.sp.distance import worst  # noqa: E402
from longfactory.testing import RankError, RankPool  # noqa: E402

TITLE = "## Images and video"
MODES = ("zigzag-ring", "ulysses")
PARTS = {"gemma3": "images", "internvl": "images", "llava_onevision": "tiles, frames"}
RANKS = 4


def errors_of(pool: RankPool, family: str) -> dict[str, float | str]:
    """Of a row of one document and of a packed one: the larger error of the layouts, or why there
    is none.
    """
    out: dict[str, float | str] = {}
    for row in ("dense", "packed"):
        errors = [0.0]
        try:
            for mode in MODES:
                found = pool.run(compared.on_rank, family, row, mode, None, timeout=200)
                errors += (float(f["difference"]) for f in found)
            out[row] = worst(errors)
        except RankError as error:
            out[row] = [x for x in str(error).splitlines() if x.strip()][-1][:120]
    return out


def refused() -> dict[str, list[str]]:
    """Reason -> the other model types that take images beside text, and are trained on text or not
    at all.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    known = {kind for family in vision.FAMILIES for kind in family.types}
    out: dict[str, list[str]] = {}
    for name in sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        if name in known or name not in CONFIG_MAPPING:
            continue
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # some cannot be made without their fields
            continue
        if getattr(config, "vision_config", None) is None:
            continue
        reason = vision.refusal(config).partition("cannot be trained on: ")[2].partition(". ")[0]
        out.setdefault(reason, []).append(name)
    return out


def section(errors: dict[str, dict[str, float | str]]) -> str:
    """That part of docs/models.md."""

    def cell(value: float | str) -> str:
        return f"{value:.0e}" if isinstance(value, float) else value

    kinds = {kind: family for family in vision.FAMILIES for kind in family.types}
    lines = [
        TITLE,
        "",
        f"Written by `python benchmarks/vision_families.py --write docs/models.md` with transformers"
        f" {transformers.__version__} and",
        f"torch {torch.__version__.split('+')[0]}. Rows with images of these are sharded over"
        f" {RANKS} processes ({' and '.join(MODES)}), and compared with",
        "transformers' own forward of each document in one process: the largest difference of the"
        " loss and of any gradient of tower,",
        "projector and text over max(1, the largest value). Both compute in float64, norms, rotary"
        " angles and softmax included, which transformers",
        "computes in float32 otherwise: what is left is the order of sums.",
        "",
        "| model type | parts that are dealt to processes | one document | packed |",
        "|---|---|---|---|",
    ]
    for kind in kinds:
        found = errors.get(kind)
        if found is None:
            raise SystemExit(f"{kind} is a family of longfactory.sp.vision and was not compared")
        parts = PARTS.get(kind, "images, pairs of frames")
        lines.append(f"| {kind} | {parts} | {cell(found['dense'])} | {cell(found['packed'])} |")
    lines += ["", "Rows with images of other families are refused before training:", ""]
    for reason, names in sorted(refused().items(), key=lambda item: len(item[1])):
        lines.append(f"- {', '.join(names)}: {reason}.")
    return "\n".join(lines) + "\n"


def put(page: Path, text: str) -> None:
    """The section in its page: in place of an earlier one, or at the end."""
    whole = page.read_text()
    found = re.search(rf"^{TITLE}\n.*?(?=^## |\Z)", whole, re.MULTILINE | re.DOTALL)
    if found:
        whole = (
            whole[: found.start()]
            + text
            + ("\n" if found.end() < len(whole) else "")
            + (whole[found.end() :])
        )
    else:
        whole = whole.rstrip("\n") + "\n\n" + text
    page.write_text(whole)


def main() -> int:
    """Returns 1 where a family is not that of one process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="model types; all by default")
    parser.add_argument("--write", type=Path, help="the page that holds the table")
    args = parser.parse_args()
    pool = RankPool(RANKS)
    errors: dict[str, Any] = {}
    wrong = False
    for family in args.families or tiny.MODELS:
        begun = time.time()
        errors[family] = found = errors_of(pool, family)
        wrong |= any(isinstance(x, str) or not x < compared.EXACT for x in found.values())
        print(f"{family}: {found}, {time.time() - begun:.0f} s", flush=True)
    pool.stop()
    if args.write:
        put(args.write, section(errors))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
