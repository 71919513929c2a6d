"""Every causal language model of the installed transformers, tiny and random: exact under sequence
parallelism, or refused.

    python -m longfactory_dev.families [model_type ...] [--size 2] [--write docs/models.md]
        [--gpus benchmarks/results/family_sweep.json]

With `--gpus` the page has a column of what `benchmarks/family_sweep.py` measured.

A family is built with four layers and a few thousand parameters, with windows, chunks and lengths
short enough to matter. A row of two documents is sharded over the ranks; logits and the gradient of
every parameter are compared with the model computing each document alone, unsharded, with its own
eager attention.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from longfactory.sp import guard as start_guard
from longfactory.sp import hf, indexer
from longfactory.sp.collectives import shard
from longfactory.sp.context import SequenceParallel, alignment
from longfactory.sp.distance import largest, worst
from longfactory.sp.layout import Segment
from longfactory.sp.plan import plan as make_plan
from longfactory.sp.recurrent import layers as recurrent
from longfactory.sp.text_model import idle, model_class
from longfactory_dev.tiny_models import OVERRIDES, tiny_model

IMAGES = "## Images and video"
Verdict = Literal["exact", "refused", "wrong", "not built"]
DOCUMENTS = (21, 38)
"""Lengths. With the padding, 64 tokens on 2 or 4 ranks."""
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Of the largest difference over the largest value. transformers computes norms and rotary angles
in float32, whatever the model's type.
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What the sweep found of one family."""

    family: str
    verdict: Verdict
    detail: str
    """What was checked, or why it was refused."""
    logits: float = math.nan
    gradients: float = math.nan
    aux_loss: bool = False
    """Whether the model can add a router's auxiliary loss of its own, which a shard would compute
    from its own tokens.
    """


def families() -> list[str]:
    """Model types that continue a text, of text alone and of several kinds of input."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})


def check(
    family: str,
    ctx: SequenceParallel,
    reference: Literal["documents", "row"] = "documents",
    **overrides: Any,
) -> Result:
    """Builds a family and compares. Collective over the world. Never raises for what the family
    does.

    `reference`: the model on each document alone, or on the whole row, where rotary frequencies
    depend on the row.
    """
    with contextlib.suppress(Exception):  # the default configuration of some families is not valid
        kinds = (
            {"layer_types": OVERRIDES[family]["layer_types"]}
            if "layer_types" in OVERRIDES.get(family, {})
            else {}
        )
        default = CONFIG_MAPPING[family](**kinds)
        if reason := hf.unsupported(default):
            return Result(family, "refused", reason)
        try:
            model_class(default)
        except ValueError as error:
            return Result(family, "refused", _line(error))
    last = ""
    for dtype in (torch.float64, torch.float32):
        try:
            model = tiny_model(family, dtype, **overrides)
        except Exception as error:  # a family that the rules do not fit is reported, not hidden
            return Result(family, "not built", _line(error))
        try:
            plain = copy.deepcopy(model)
            recurrent.as_reference(plain)
            alone = _alone(plain, reference)
        except Exception as error:
            last = _line(error)
            continue
        return _compare(family, model, alone, ctx, dtype)
    return Result(family, "not built", f"its own forward or backward fails: {last}")


def _compare(
    family: str,
    model: PreTrainedModel,
    alone: tuple[Tensor, dict[str, Tensor]],
    ctx: SequenceParallel,
    dtype: torch.dtype,
) -> Result:
    aux = "load_balancing_loss_func" in vars(sys.modules[type(model).__module__])
    try:
        hf.prepare(model, ctx)
        start_guard.guard(model, ctx)
    except ValueError as error:
        return Result(family, "refused", _line(error), aux_loss=aux)
    logits, gradients = _sharded(model, ctx)
    expected, reference = alone
    error_logits = largest(logits, expected) / expected.abs().max()
    scale = max(g.abs().max() for g in reference.values())
    error_gradients = worst(largest(gradients[n], g) for n, g in reference.items()) / scale
    tolerance = TOLERANCE[dtype]
    good = bool(
        error_logits <= tolerance
        and error_gradients <= tolerance
        and gradients.keys() == reference.keys()
    )
    return Result(
        family,
        "exact" if good else "wrong",
        _features(model),
        error_logits.item(),
        error_gradients.item(),
        aux,
    )


def _documents(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in DOCUMENTS]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    kept = labels >= 0
    return torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")


def _shifted(ids: Tensor) -> Tensor:
    return torch.cat([ids[1:], ids.new_full((1,), -100)])


def _vocabulary(model: PreTrainedModel) -> int:
    return min(model.get_input_embeddings().num_embeddings, 200)


def _alone(model: PreTrainedModel, reference: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [T, V] of the documents one after another, and the gradients of the sum of their
    losses. Unsharded.
    """
    documents = _documents(_vocabulary(model))
    labels = torch.cat([_shifted(ids) for ids in documents])
    if reference == "row":
        positions = torch.cat([torch.arange(len(ids)) for ids in documents])
        logits = model(
            input_ids=torch.cat(documents)[None], position_ids=positions[None], use_cache=False
        ).logits[0]
    else:
        logits = torch.cat(
            [model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents]
        )
    _loss(logits, labels).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _sharded(model: PreTrainedModel, ctx: SequenceParallel) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from one row of the documents and some padding, sharded over the ranks."""
    documents = _documents(_vocabulary(model))
    labels = [_shifted(ids) for ids in documents]
    used = sum(DOCUMENTS)
    if pad := -used % max(alignment(ctx), 8):
        documents.append(documents[0].new_zeros(pad))
        labels.append(documents[0].new_full((pad,), -100))
    ends = list(itertools.accumulate(len(ids) for ids in documents))
    plan = make_plan(
        ends[-1],
        [Segment(end - len(ids), end) for ids, end in zip(documents, ends, strict=True)],
        ctx,
    )
    row = {
        "input_ids": torch.cat(documents),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents]),
    }
    logits = model(**hf.inputs(row, plan)).logits[0]
    # A rank without a label stays attached to the graph.
    (_loss(logits, shard(torch.cat(labels), plan)) + 0.0 * logits.sum()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = logits.new_zeros(ends[-1], logits.shape[1])
    whole[plan.index] = logits.detach()
    if ctx.size > 1:
        dist.all_reduce(whole, group=ctx.group)
        for g in gradients.values():
            dist.all_reduce(g, group=ctx.group)
    return whole[:used], gradients


def _features(model: PreTrainedModel) -> str:
    """What the checked model has that sequence parallelism could lose, and what text does not
    reach.
    """
    config = model.config.get_text_config()
    types = set(hf.layer_types(config))
    out = []
    if getattr(config, "sliding_window", None) and (
        types & {"sliding_attention"} or not getattr(config, "layer_types", None)
    ):
        out.append("sliding window")
    if "chunked_attention" in types:
        out.append("chunked attention")
    out += recurrent.names(model)
    if indexer.indexers(model):
        out.append("indexer")
    if getattr(config, "attn_logit_softcapping", None):
        out.append("soft-cap")
    if any("sink" in n for n, _ in model.named_parameters()):
        out.append("sinks")
    if getattr(config, "kv_lora_rank", None):
        out.append("latent attention")
    if any("experts" in n for n, _ in model.named_parameters()):
        out.append("experts")
    parts = idle(model)
    if parts.modules:
        out.append(
            "frozen: "
            + ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", m) for m in parts.modules))
        )
    lost = [n for n, p in model.named_parameters() if p.grad is None and n not in parts.parameters]
    if lost and any(p.grad is not None for p in model.parameters()):  # after a backward
        out.append(f"{len(lost)} parameters get no gradient ({lost[0]})")
    if reached := [
        n for n, p in model.named_parameters() if p.grad is not None and n in parts.parameters
    ]:
        out.append(f"{len(reached)} frozen parameters would get a gradient ({reached[0]})")
    return ", ".join(out)


def _line(error: Exception) -> str:
    """The message in one line, without what every refusal begins and ends with."""
    text = re.sub(r"^Models of type \S+ cannot be trained here: ", "", " ".join(str(error).split()))
    text = text.partition(" Choose a model type that docs/models.md marks exact")[0].removesuffix(
        "."
    )
    return text[:300] if text else type(error).__name__


_SHORT, _LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], [2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4]


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


_ORIGINAL = {"original_max_position_embeddings": 32}
_LONGROPE: dict[str, Any] = {"short_factor": _SHORT, "long_factor": _LONG, **_ORIGINAL}

VARIANTS: dict[str, tuple[str, Literal["documents", "row"], dict[str, Any]]] = {
    "phi3 with longrope": ("phi3", "row", _rope("longrope", **_LONGROPE) | _ORIGINAL),
    "phimoe with longrope": (
        "phimoe",
        "row",
        _rope("longrope", short_mscale=1.1, long_mscale=1.3, **_LONGROPE),
    ),
    "llama with dynamic NTK": (
        "llama",
        "row",
        _rope("dynamic", factor=2.0) | {"max_position_embeddings": 32},
    ),
    "llama with YaRN": ("llama", "documents", _rope("yarn", factor=4.0, **_ORIGINAL)),
    "llama 3 frequencies": (
        "llama",
        "documents",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_ORIGINAL),
    ),
    "llama with 1 key head": ("llama", "documents", {"num_key_value_heads": 1}),
    "qwen3 with 5 heads": (
        "qwen3",
        "documents",
        {"num_attention_heads": 5, "num_key_value_heads": 5},
    ),
    "gemma2 with tied embeddings": ("gemma2", "documents", {"tie_word_embeddings": True}),
}
"""Settings that a family's default configuration leaves out: name -> (family, reference, fields).
"""


def check_on_rank(name: str, size: int) -> Result:
    """`check` of a family or a variant, on every rank of a pool."""
    transformers.logging.set_verbosity_error()
    ctx = SequenceParallel.create(size)
    family, reference, fields = VARIANTS.get(name, (name, "documents", {}))
    return dataclasses.replace(check(family, ctx, reference, **fields), family=name)


def sweep(names: Sequence[str], size: int, seconds: float = 60.0) -> list[Result]:
    """Checks each on a pool of `size` processes. A family that fails, hangs or takes longer than
    `seconds` is reported as not built.
    """
    from longfactory.testing import RankError, RankPool

    pool, results = RankPool(size), []
    try:
        for name in names:
            try:
                answers = pool.run(check_on_rank, name, size, timeout=seconds)
                result = next((r for r in answers if r.verdict == "wrong"), answers[0])
            except RankError as error:
                result = Result(name, "not built", str(error).strip().splitlines()[-1][:200])
            results.append(result)
            print(
                f"{result.verdict:10} {name:28} {result.logits:8.1e} {result.gradients:8.1e} "
                f" {result.detail[:160]}",
                flush=True,
            )
    finally:
        pool.stop()
    return results


ON_GPUS = "bf16 on GPUs"
"""Title of the column of what `benchmarks/family_sweep.py` measured."""


ABOUT_GPUS = """
The last column of the exact families was measured on GPUs in bf16 (`benchmarks/family_sweep.py`): tiny models with the head dims of the family's default
configuration, a row of one document and one of two. It is the distance of logits and gradients from float32, divided by that of the model's own attention in bf16 (sdpa, or eager
if it has no other): root mean squares, the largest of the medians of five seeds. 1 means as close as the model's own; empty: not measured.
"""


NOT_REACHED = "not reached in time"
"""What the sweep writes of a family that its time was too short for."""


def on_gpus(path: pathlib.Path) -> dict[str, str]:
    """What that column says of each family, by the file that the sweep on GPUs wrote."""
    cells = {}
    for found in json.loads(path.read_text())["families"]:
        if "ratio" in found:
            degrees = map(str, found["sp"])
            heads = ", ".join(found["dims"]) or "none"
            cell = f"{found['ratio']:.2f} (heads of {heads}; SP {', '.join(degrees)})"
        elif found.get("failed") == NOT_REACHED:
            cell = ""
        else:
            cell = found.get("skipped") or "failed"
        cells[found["family"]] = cell
    return cells


def table(results: Sequence[Result], size: int, measured: Mapping[str, str] | None = None) -> str:
    """docs/models.md, with the column of `on_gpus` where it is given."""
    by = {
        v: [r for r in results if r.verdict == v]
        for v in ("exact", "wrong", "refused", "not built")
    }
    rows = {v: "\n".join(_row(r, measured if v == "exact" else None) for r in by[v]) for v in by}
    lengths = " and ".join(map(str, DOCUMENTS))
    head = f"""# Models

Written by `python -m longfactory_dev.families --write docs/models.md` with transformers {transformers.__version__} and
torch {torch.__version__.split("+")[0]}: every family that `AutoModelForCausalLM` or `AutoModelForMultimodalLM` knows.

Families with a vision or an audio tower are trained on text, through their text decoder. They are loaded and saved with the checkpoint's
own class. Parts that text does not pass through are frozen (the column "checked with" names them), get no adapter and are saved unchanged.
Where parameters of other parts get no gradient (zamba2), a run of several processes with DDP is refused before the first step, naming them:
`ddp_find_unused_parameters: true` trains it as one process does.

For each family a tiny model with random weights is built, with windows, chunks and lengths short enough to take effect. A row of two documents
({lengths} tokens) is sharded over {size} processes. Logits and the gradient of every parameter are compared with those of the
unsharded model with its own eager attention, on each document alone (on the whole row if rotary frequencies depend on the row's
length: longrope and dynamic NTK). Errors are the largest difference divided by the largest value, in float64; the remaining errors come from
the models' own float32 norms and rotary angles. At the start of every run the guard compares the layers of your model, as they will
be trained, with transformers' own, forward and backward, on a few tokens.
{"" if measured is None else ABOUT_GPUS}
{len(by["exact"])} exact, {len(by["wrong"])} wrong, {len(by["refused"])} refused, {len(by["not built"])} not checked.

## Exact

| model type | checked with | logits | gradients |{"" if measured is None else f" {ON_GPUS} |"}
|---|---|---|---|{"" if measured is None else "---|"}
{rows["exact"]}

"""
    if by["wrong"]:
        head += (
            "## Wrong\n\n| model type | checked with | logits | gradients"
            f" |\n|---|---|---|---|\n{rows['wrong']}\n\n"
        )
    aux = ", ".join(r.family for r in by["exact"] if r.aux_loss)
    return f"""{head}## Refused

Refused before training, with this reason.

| model type | reason |
|---|---|
{rows["refused"]}

## Not checked

The sweep could not build a tiny model. The guard decides when a run starts.

| model type | why |
|---|---|
{rows["not built"]}

## Router losses

These families have an auxiliary loss for their routers (`moe_aux_loss_coef`, [experts.md](experts.md#router-losses)): {aux}.
"""


def _row(r: Result, measured: Mapping[str, str] | None = None) -> str:
    detail = r.detail.replace("|", "\\|")
    last = "" if measured is None else f" {measured.get(r.family, '')} |"
    return (
        f"| {r.family} | {detail} | {r.logits:.0e} | {r.gradients:.0e} |{last}"
        if r.verdict in ("exact", "wrong")
        else f"| {r.family} | {detail} |"
    )


def images_section(page: pathlib.Path) -> str:
    """What `benchmarks/vision_families.py` has put at the end of the page."""
    text = page.read_text() if page.exists() else ""
    start = text.find(f"\n{IMAGES}\n")
    return "" if start < 0 else text[start:]


def main() -> int:
    """Returns 1 where a family is wrong: neither exact nor refused."""
    parser = argparse.ArgumentParser(
        description=(
            "Which families of the installed transformers are exact under sequence parallelism."
        )
    )
    parser.add_argument(
        "families", nargs="*", help="model types or variants; all of them by default"
    )
    parser.add_argument("--size", type=int, default=2, help="processes that share the row")
    parser.add_argument("--write", type=pathlib.Path, help="write the table to this file")
    parser.add_argument(
        "--gpus", type=pathlib.Path, help="what benchmarks/family_sweep.py wrote, for the table"
    )
    args = parser.parse_args()
    results = sweep(args.families or [*families(), *VARIANTS], args.size)
    if args.write:
        measured = None if args.gpus is None else on_gpus(args.gpus)
        written_elsewhere = images_section(args.write)
        args.write.write_text(table(results, args.size, measured) + written_elsewhere)
    return int(any(r.verdict == "wrong" for r in results))


if __name__ == "__main__":
    sys.exit(main())
