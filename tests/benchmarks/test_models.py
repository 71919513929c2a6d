"""What the benchmarks of models, kernels and families count."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import _many_runs
import _model_rows
import _parts
import _profile
import family_sweep
import first_step
import kernels
import models
import plan_accuracy
from _many_commands import environment
from _table import of_visible
from longfactory import sp
from longfactory.memory.layer_kinds import kinds_of
from longfactory.sp.text_model import model_class
from longfactory_dev import families
from longfactory_dev.tiny_models import real_heads, tiny_config
from plan_accuracy import FULL, LORA, PT, Setting, write_shape

ROOT = Path(__file__).resolve().parent.parent.parent
ONE = {"forward": 1.0, "input": 2.0, "weight": 4.0}
RATES: dict[str, Any] = {
    "linear": ONE,
    "experts": {},
    "adapters": {},
    "head": ONE,
    "attention": {
        "100": {"forward": 10.0, "backward": 20.0},
        "200": {"forward": 40.0, "backward": 80.0},
    },
    "bandwidth": 32.0,
    "layer_parameters": 5,
    "head_parameters": 3,
}
SAVED = "every layer recomputed; attention outputs saved in 50% of layers; optimizer on the gpu"


@pytest.mark.parametrize(
    ("shown", "numbers", "want"),
    [("2,3", [0], "2"), ("2,3", ["1", "0"], "3,2"), ("", [0, 1], "0,1"), (None, ["3"], "3")],
)
def test_gpus_are_counted_among_the_visible_ones(
    shown: str | None, numbers: list[Any], want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is given a part of a machine stays on it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert of_visible(numbers) == want
    got = environment(Path("home"), numbers)["CUDA_VISIBLE_DEVICES"]
    assert got == want


def test_the_roofline_counts_what_a_run_computes_twice() -> None:
    at = Setting("tiny", None, 100, PT | FULL)
    stored = models.roofline(at, 1, RATES, "every activation stored; optimizer on the gpu")
    assert stored == {
        "products": 7.0,
        "experts": 0.0,
        "adapters": 0.0,
        "attention": 30.0,
        "output layer": 8.0,
        "optimizer": 8.0,
    }
    again = models.roofline(at, 1, RATES, SAVED)
    assert again["products"] == 8.0 and again["attention"] == 35.0
    kept = f"{SAVED}; MLP activations saved in 50% of layers"
    rates = RATES | {"experts": ONE, "mlp_forward": 0.5, "norms_after": True}
    saved = models.roofline(at, 1, rates, kept, split=True)
    assert saved["products"] == 8.0 - 0.25 and saved["experts"] == 7.5 and saved["optimizer"] == 7.0
    dense = models.roofline(at, 1, rates | {"experts": {}}, kept)
    assert dense["products"] == pytest.approx(8.0 - 0.5 * 2 / 3 * 0.5)
    two = models.roofline(at, 2, RATES, SAVED)  # 200 tokens, half of them on each GPU
    assert two["attention"] == (1.5 * 40 + 80) / 2 and two["optimizer"] == 4.0
    frozen = models.roofline(at._replace(keys=PT | LORA), 1, RATES, SAVED)
    assert frozen["products"] == 4.0 and frozen["optimizer"] == 0.0
    assert frozen["output layer"] == 4.0


def test_the_ideal_of_two_gpus_is_one_gpu_with_longer_attention() -> None:
    at = Setting("tiny", None, 100, PT | FULL)
    one = {"seconds": 200.0}
    # 2 s a token, 0.3 of them attention; in a row of 200 attention takes 0.6
    speed = models.ideal(at, 2, RATES, one, "every activation stored")
    assert speed == pytest.approx(1 / 2.3)


def test_a_table_of_results() -> None:
    about = {"kernel": "auto", "tokens": 256, "gpus": 1, "name": "tiny-full"}
    results = [
        {**about, "row": "ours", "seconds": 2.0, "peak": 2**30, "settings": "", "loss": 1.0},
        {**about, "row": "hf", "seconds": 4.0, "peak": 2**31, "liger": True},
        {**about, "row": "hf-stored", "error": "out of memory"},
    ]
    table = models.render(results)
    assert "| tiny-full | 256 | 1 | LongFactory | 2.000 | 128 | 2.00x |" in table
    assert "transformers alone with Liger | 4.000 | 64 |" in table
    assert "nothing recomputed | out of memory |" in table
    elsewhere = models.render([{**results[0], "run": "a"}, {**results[1], "run": "b"}])
    assert "| 2.000 | 128 |  |" in elsewhere


def test_which_process_measures_what(tmp_path: Path) -> None:
    """Together: one for all but Unsloth, which has one for each model."""
    jobs = [
        {"row": row, "name": name, "model": "a"}
        for row in ("rates", "hf", "unsloth")
        for name in ("short", "long")
    ]
    together = [[(j["row"], j["name"]) for j in each] for each in models.in_processes(jobs, True)]
    assert together == [
        [("rates", "short"), ("rates", "long"), ("hf", "short"), ("hf", "long")],
        [("unsloth", "short"), ("unsloth", "long")],
    ]
    assert len(list(models.in_processes(jobs, False))) == 5
    at = models.ROWS["7b-lora-8k"]
    assert models.runs_beside("unsloth", "7b-lora-8k", at, 1)
    assert not models.runs_beside("unsloth", "7b-lora-8k", at, 2)
    assert not models.runs_beside("unsloth", "7b-full-8k", models.ROWS["7b-full-8k"], 1)
    assert models.runs_beside("rates", "moe-qlora-64k", models.ROWS["moe-qlora-64k"], 1)


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of its own: what it changes is not there for the next."""
    from longfactory import cli

    def train(words: list[str]) -> int:
        if words == ["fails"]:
            raise ValueError(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}")
        assert "CHANGED" not in os.environ
        os.environ["CHANGED"] = "yes"
        return 0

    monkeypatch.setattr(cli, "train", train)
    for _ in range(2):
        job = {"command": "train", "words": ["runs"]}
        assert _many_runs.in_processes(job, 2, tmp_path, True) is None
    failed = _many_runs.in_processes({"command": "train", "words": ["fails"]}, 2, tmp_path, True)
    assert failed in ("ValueError: rank 0 of 2", "ValueError: rank 1 of 2")
    anew = _many_runs.in_processes({"command": "none", "words": []}, 1, tmp_path, False)
    assert anew == "KeyError: 'none'"


def test_the_printed_lines_are_enough(tmp_path: Path) -> None:
    result = {"row": "ours", "kernel": "auto", "tokens": 256, "gpus": 1, "name": "tiny-full"}
    printed = tmp_path / "printed.log"
    printed.write_text(f'step 1\n{json.dumps(result)}\n{{"other": 1}}\n{{no json\n')
    assert models.results_of(printed) == {"results": [result]}


@pytest.mark.parametrize(
    ("shape", "layers", "experts"),
    [("qwen3-30b-a3b", 2, 2), ("gpt-oss-20b", 2, 2), ("deepseek-v2-lite", 3, 2)],
)
def test_the_shapes_of_a_model(shape: str, layers: int, experts: int, tmp_path: Path) -> None:
    """Every weight of a layer is in one of the products."""
    config = _model_rows.make_config(str(write_shape(shape, layers, tmp_path)))
    found = _model_rows.shapes_of(config)
    assert sum(found.attention.values()) == layers
    assert sum(found.experts.values()) == experts
    counted = sum(n * given * got for (given, got), n in found.linear.items())
    counted += sum(
        n * e.count * sum(given * got for given, got in e.maps) for e, n in found.experts.items()
    )
    # what is left are norms, biases and sinks
    assert 0 <= found.layer_parameters - counted < 0.001 * found.layer_parameters


def test_random_weights_are_a_checkpoint(tmp_path: Path) -> None:
    """Every parameter is read, from several files."""
    config = plan_accuracy.FURTHER["qwen3-30b-a3b"] | {
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    sizes = plan_accuracy.SHARD, plan_accuracy.BLOCK
    plan_accuracy.SHARD, plan_accuracy.BLOCK = 5000, 1000
    try:
        folder = plan_accuracy.write_weights(tmp_path / "model", tmp_path / "weights")
    finally:
        plan_accuracy.SHARD, plan_accuracy.BLOCK = sizes
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(found.values())
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
        else:
            assert 0.01 < p.std() < 0.03, name


def test_pairs_of_a_mask() -> None:
    for case in kernels.CASES:
        small = case._replace(window=None if case.window is None else 7)
        tile = kernels.whole_tile(small, 96)
        assert kernels.pairs(small, 96) == int(tile.mask().sum()), case.name


def test_a_column_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text((ROOT / "docs" / "models.md").read_text().replace(families.ABOUT_GPUS, ""))
    names = family_sweep.exact_families(page)
    assert {"llama", "gemma3_text", "llama with YaRN"} <= set(names)
    found = {"ratio": 1.034, "dims": ["64", "128"], "sp": [1, 2]}
    results = tmp_path / "sweep.json"
    results.write_text(json.dumps({"families": [{"family": "llama", **found}]}))
    before = page.read_text()
    for _ in range(2):  # a second time it is put in the same place
        family_sweep.column(results, page)
        text = page.read_text()
        row = next(line for line in text.splitlines() if line.startswith("| llama |"))
        assert row.endswith(" | 1.03 (heads of 64, 128; SP 1, 2) |")
        assert family_sweep.exact_families(page) == names
        assert text.count("\n") == before.count("\n") + families.ABOUT_GPUS.count("\n")
    late = {"family": "qwen2", "failed": families.NOT_REACHED}
    results.write_text(json.dumps({"families": [{"family": "llama", **found}, late]}))
    assert families.on_gpus(results)["qwen2"] == ""  # not measured, which is no failure
    made = families.table([families.Result("llama", "exact", "")], 2, families.on_gpus(results))
    assert families.ABOUT_GPUS in made and row.rpartition(" | ")[2] in made
    after = text.partition("\n## Refused")[2]
    assert after == before.partition("\n## Refused")[2]


def test_distances_want_every_gradient() -> None:
    exact = (torch.zeros(2), {"a.attn": torch.zeros(2), "b": torch.zeros(2)})
    ours = (torch.ones(2), {"a.attn": torch.full((2,), 2.0), "b": torch.zeros(2)})
    found = family_sweep.distances(ours, exact)
    assert found["logits"] == 1.0 and found["attention's gradients"] == 2.0
    assert found["gradients"] == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="gradients of other parameters"):
        family_sweep.distances((ours[0], {"b": torch.zeros(2)}), exact)


@pytest.mark.parametrize(
    ("family", "dims"),
    [
        ("gemma3_text", {(256, 256)}),
        ("deepseek_v3", {(192, 128)}),
        ("gpt_oss", {(64, 64)}),
        ("gpt2", {(64, 64)}),
        ("llama", {(128, 128)}),
        ("mamba", {(0, 0)}),
        ("bamba", {(0, 0), (128, 128)}),
        ("qwen2_vl", {(128, 128)}),
        ("mistral4", {(128, 128)}),
        ("qwen3_next", {(0, 0), (256, 256)}),
    ],
)
def test_tiny_models_with_real_heads(family: str, dims: set[tuple[int, int]]) -> None:
    config = tiny_config(family, **real_heads(family))
    with torch.device("meta"):
        model = model_class(config).from_config()
    kinds = kinds_of(model, config)
    assert {(kind.head_dim, kind.value_dim) for kind in kinds} == dims
    assert sum(p.numel() for p in model.parameters()) < 6_000_000
    widths = {m.head_v_dim for m in model.modules() if hasattr(m, "head_v_dim")}
    assert widths == ({128} if family == "qwen3_next" else set())


@pytest.mark.parametrize(
    ("family", "found"),
    [("helium", {"head_dim": 128, "hidden_size": 512}), ("granite_docling", {})],
)
def test_heads_that_a_family_runs_with(family: str, found: dict[str, int]) -> None:
    """Tiny ones, and why, where the family's own do not run."""
    fields, why = family_sweep.with_real_heads(family, {}, torch.device("cpu"))
    assert fields == found and why.startswith("tiny head dims: ") is (not found)


def test_a_family_whose_bf16_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores so large that a query sees one key: the model itself is far from float32, and a ratio
    of two such distances is noise. With the multiplier of trained models it is near.
    """
    monkeypatch.setattr(family_sweep, "LAYOUTS", {"one document": (96,)})
    monkeypatch.setattr(family_sweep, "TOTAL", 96)
    one, cpu = [sp.SequenceParallel.create(1)], torch.device("cpu")
    near = family_sweep.check("granite", one, cpu, 1)
    assert near["own"] < 0.03 and near["ratio"] < 1.5
    own = family_sweep.with_real_heads

    def hot(*args: Any) -> tuple[dict[str, Any], str]:
        fields, note = own(*args)
        return {**fields, "attention_multiplier": 30.0}, note

    monkeypatch.setattr(family_sweep, "with_real_heads", hot)
    found = family_sweep.check("granite", one, cpu, 1)
    assert "tells nothing" in found["failed"] and "ratio" not in found


def test_gpu_time_of_a_step_by_parts(tmp_path: Path) -> None:
    """A trace of two overlapping kernels, a copy of the optimizer and a wait of the host."""

    def event(cat: str, name: str, ts: float, dur: float, external: int | None = None) -> Any:
        args = {} if external is None else {"External id": external}
        return {
            "ph": "X",
            "cat": cat,
            "name": name,
            "ts": ts,
            "dur": dur,
            "tid": cat,
            "args": args,
        }

    def host(name: str, ts: float, dur: float, external: int | None = None) -> Any:
        return {**event("cpu_op", name, ts, dur, external), "tid": 1}

    events = [
        {**event("user_annotation", "ProfilerStep#3", 0, 5000), "tid": 1},
        host("aten::_scaled_dot_product_cudnn_attention", 10, 20, 1),
        host("autograd::engine::evaluate_function: GroupedMmBackward0", 100, 100),
        host("aten::_grouped_mm", 120, 30, 2),
        {**event("user_annotation", "Optimizer.step#SplitAdamW.step", 300, 200), "tid": 1},
        host("aten::copy_", 310, 20, 3),
        host("FSDP::pre_forward (model.layers.0)", 700, 90),
        host("aten::_foreach_copy_", 710, 20, 4),
        event("kernel", "cudnn_generated_fort_native_sdpa", 1000, 2000, 1),
        event("kernel", "cutlass_device_kernel", 2500, 1000, 2),
        event("gpu_memcpy", "Memcpy DtoD", 4000, 500, 3),
        event("kernel", "multi_tensor_apply_kernel", 4500, 300, 4),
        event("cuda_runtime", "cudaStreamSynchronize", 600, 10),
        event("cuda_runtime", "cudaMemcpyAsync", 620, 150),
        event("cuda_runtime", "cudaMemcpyAsync", 800, 250),
    ]
    trace = tmp_path / "trace_rank0_step3.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    text = _profile.table(trace)
    assert text.startswith(
        "GPU busy 3.3 ms of 3.8 ms (the host's step 5.0 ms), 4 kernels and copies;"
        " 2 cudaMemcpyAsync, 1 cudaStreamSynchronize\n"
        "The host in calls of CUDA, ms: cudaMemcpyAsync 0.4, cudaStreamSynchronize 0.0\n"
    )
    assert "| attention | 2.0 | 0.0 | 0.0 |" in text
    assert "| experts: products | 0.0 | 1.0 | 0.0 |" in text
    assert "| optimizer | 0.0 | 0.0 | 0.5 |" in text
    assert "| copies and casts | 0.3 | 0.0 | 0.0 |" in text
    assert "| experts: products | GroupedMmBackward0 | aten::_grouped_mm |" in text


def test_where_the_gpu_waits_between_kernels() -> None:
    """Of two kernels that overlap and one after a wait, launched 0.4 ms after the device had ended."""

    def row(name: str, at: float, began: float, ms: float) -> Any:
        return _parts.Item(name, at, 1, ms, began), "Norm", "forward", "mul"

    rows = [
        row("late", 2900.0, 3000.0, 1.0),
        row("a", 0.0, 1000.0, 1.0),
        row("b", 1.0, 1500.0, 1.0),
    ]
    assert _parts.waits(rows) == [
        "the device waits 0.5 ms between kernels; the longest: ms, launched ms late",
        "      0.50     0.40  b -> Norm, forward, mul, late",
    ]


LINE = (
    "[16:04:16] From the command to the end of the first step: 37.1 s: imports 0.3, guard 2.3,"
    " first step 30.3 (of these 23.3 compiling). Compiled: 19 functions by torch, 2 Triton kernels{}."
)


def test_what_a_start_compiled_is_read_from_its_line() -> None:
    """Kernels that came from their cache are counted apart, with and without others."""
    more = ", 3 more Triton kernels from their cache"
    for line, made, stored in (
        (LINE.format(""), 2, 0),
        (LINE.format(more), 2, 3),
        (LINE.format(more).replace("2 Triton kernels, ", ""), 0, 3),
        ("no such line", 0, 0),
    ):
        found = first_step.counted(f"before\n{line}\nafter")
        assert (found["kernels"], found["stored"]) == (made, stored)
        assert found["functions"] == (19 if "19" in line else 0)


def test_a_start_is_shown_by_its_parts() -> None:
    row = {"name": "moe-6-layers-16k", "gpus": 1, "kernel": "auto", "tokens": 16384}
    parts = {"launcher": 1.0, "imports": 4.0, "data": 0.5, "guard": 2.0, "first step": 30.0}
    results = [
        {**row, "row": "again", "error": "ended with 1 after 3 s"},
        {
            **row,
            "row": "empty caches",
            "startup": {**parts, "of these compiling": 21.5},
            **{"functions": 19, "kernels": 2, "stored": 0},
        },
    ]
    lines = first_step.render(results).splitlines()[2:]
    start = "| moe-6-layers-16k | 1 |"
    assert lines[0] == f"{start} empty caches | 37.5 | 5.0 | 2.0 | 30.0 | 0.5 | 21.5 | 19 | 2, 0 |"
    assert lines[1].startswith(f"{start} again | ended with 1 after 3 s |")
