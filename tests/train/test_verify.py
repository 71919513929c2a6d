"""`longfactory verify` passes an exact engine and finds a broken one, for every kind of row."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from embedded_model import needs_embedded_model
from families_here import is_made_here
from longfactory.data.assemble import Rules
from longfactory.data.kinds import KINDS
from longfactory.data.row import TokenizedDocument, make_row
from longfactory.errors import UserError
from longfactory.testing import RankPool, run_ranks
from longfactory.train.verify import (
    RowShape,
    VerifyReport,
    choose,
    crossed,
    mask_reasons,
    measured,
    row_reason,
    truncate,
)
from longfactory.train.verify.alone import texts_of
from longfactory.train.verify.cost import _shape
from longfactory.train.verify.rows import exercises, lengthened, padded, parted, windows_of
from longfactory_dev.tiny_models import tiny_config
from planted import LORA
from small_runs import write_model
from verify_faults import healthy, told, with_family
from verify_ranks import ZERO, sharded, verified

ROOT = Path(__file__).resolve().parents[2]


CASES = {
    "sft": {},
    "ulysses, lora, hand-written layers off": {
        "sequence_parallel_mode": "ulysses",
        "finetuning_type": "lora",
    },
    "packed": {"packing": True},
    "dpo, shared prompt": {"stage": "dpo", "dataset": "manual_dpo", "pref_share_prompt": True},
    "rm": {"stage": "rm", "dataset": "manual_dpo"},
    "experts in bf16": {"family": "qwen3_moe", "bf16": True, "moe_aux_loss_coef": 0.01},
    "two data-parallel groups": {"sequence_parallel_size": 1},
    "layers that differ in their heads": {"family": "gemma4_text"},
}


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", list(CASES))
def test_an_exact_engine_passes(case: str, sft_keys: dict[str, Any]) -> None:
    for exact, table, parameters in run_ranks(
        2, verified, with_family(sft_keys, CASES[case]), timeout=250
    ):
        assert exact, table
        assert len(parameters) > 10
        assert "The same." in table and "grad_norm" in table
        assert ("auxiliary loss (moe_aux_loss_coef) is left out" in table) == ("experts" in case)
    assert not Path(sft_keys["output_dir"]).exists()


HEALTHY = list(healthy())


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "changes"), HEALTHY, ids=[f"{n} of {told(changes)}" for n, changes in HEALTHY]
)
def test_no_healthy_run_gives_an_alarm(
    processes: int, changes: dict[str, Any], sft_keys: dict[str, Any]
) -> None:
    keys = with_family(sft_keys, changes)
    exact, table, _ = run_ranks(processes, verified, keys, timeout=250)[0]
    assert exact, table


def test_healthy_runs_are_many() -> None:
    assert len(HEALTHY) >= 30


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_their_choices_replayed_experts_in_bf16_are_not_the_same(
    sft_keys: dict[str, Any],
) -> None:
    """The routers of small random weights are nearly undecided: what is replayed is what makes the
    comparison.
    """
    exact, table, _ = run_ranks(
        2, verified, with_family(sft_keys, CASES["experts in bf16"]), "routers", timeout=250
    )[0]
    assert not exact, table


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("sharding", ["fsdp2", "deepspeed"])
def test_sharded_parameters_are_compared_whole(sharding: str, sft_keys: dict[str, Any]) -> None:
    pool = RankPool(2, keep_groups=sharding == "deepspeed")
    pairs = {"dataset": "manual_dpo"}
    cases: list[dict[str, Any]] = [{}, {"stage": "rm", **pairs}, {**LORA, "stage": "dpo", **pairs}]
    if sharding == "deepspeed":  # with bf16 on GPUs alone: transformers refuses it here
        cases = [*({**case, "deepspeed": ZERO[3]} for case in cases), {"deepspeed": ZERO[2]}]
    else:
        cases.append({"bf16": True})
    try:
        reports = pool.run(sharded, sft_keys, cases, sharding, timeout=350)
        found = pool.run(
            sharded, sft_keys, cases[:1], sharding, "gather sums in backward", timeout=100
        )
    finally:
        pool.stop()
    for rank in reports:
        assert len(rank) == len(cases)
        for exact, table in rank:
            assert exact, table
    for ((exact, table),) in found:
        assert not exact and "Every gradient is 2 times what it should be." in table, table


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("broken", "memory"),
    [("gradient", {"disable_gradient_checkpointing": True}), ("isolation", {})],
)
def test_a_broken_engine_is_found(
    broken: str, memory: dict[str, Any], sft_keys: dict[str, Any]
) -> None:
    for exact, table, parameters in run_ranks(
        2, verified, {**sft_keys, **memory}, broken, timeout=250
    ):
        assert not exact and "NOT the same." in table, table
        assert max(parameters.values()) > 1e-3


def test_long_documents_keep_their_ends_in_proportion() -> None:
    samples = [
        [TokenizedDocument(list(range(n)), list(range(n)), sample=i) for n in (300, 100)]
        for i in range(2)
    ]
    cut = truncate(samples, 200)
    assert [[len(d.input_ids) for d in s] for s in cut] == [[75, 25]] * 2
    assert cut[0][1].input_ids == list(range(75, 100)) == cut[0][1].labels
    assert truncate(samples, 800) == samples


def report(**changes: Any) -> VerifyReport:
    same = measured(1.0, 1.0, 1e-6, 0.0)
    given: dict[str, Any] = {
        "loss": same,
        "grad_norm": same,
        "logps": same,
        "parameters": {"a": same, "b": same},
    }
    rows = (RowShape(4, 1, 1),)
    return VerifyReport(
        **{
            "rows": rows,
            **given,
            "reasons": (),
            "notes": (),
            "dtype": torch.float32,
            "title": "",
            **changes,
        }
    )


def test_a_number_that_is_none_is_not_exact() -> None:
    assert report().exact and "The same." in report().table()
    assert not report(rows=()).exact and not report(parameters={}).exact
    nan = measured(float("nan"), 1.0, float("nan"), 0.0)
    for name in ("loss", "grad_norm", "logps"):
        assert not report(**{name: nan}).exact
    assert not report(parameters={"a": measured(1.0, 1.0, 0.0, 0.0), "b": nan}).exact
    assert (
        not report(reasons=("Something is wrong.",)).exact
        and "- Something is wrong." in report(reasons=("Something is wrong.",)).table()
    )
    off = measured(1.001, 1.0, 1e-3, 0.0)
    assert not report(loss=off).exact
    # As much as FACTOR times what transformers' own attention is off in this precision, and no
    # more.
    assert report(loss=measured(1.001, 1.0, 1e-3, 4e-4), dtype=torch.bfloat16).exact
    assert not report(loss=measured(1.001, 1.0, 1e-3, 3e-4), dtype=torch.bfloat16).exact
    assert "bf16=false" in report(dtype=torch.bfloat16).table()


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_the_command(sft_keys: dict[str, Any], tmp_path: Path) -> None:
    import json
    import os
    import subprocess

    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    env |= {
        "LONGFACTORY_CACHE": sft_keys["cache"],
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    words = [
        f"{k}={str(v).lower() if isinstance(v, bool) else v}"
        for k, v in sft_keys.items()
        if k != "cache"
    ]
    command = [sys.executable, "-m", "longfactory.cli", "verify", *words, "nproc_per_node=2"]
    done = subprocess.run(
        [
            *command,
            "verify_rows=1",
            "--verify_tokens=120",
            "--json",
            str(tmp_path / "report.json"),
            f"--html={tmp_path / 'report.html'}",
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("The same.") == 1
        and "row 2" not in done.stdout
        and "2 ranks, zigzag-ring" in done.stdout
    )
    assert not Path(sft_keys["output_dir"]).exists()
    samples = done.stdout.split("sample 0 (first): ")[1].splitlines()
    assert "tokens are trained, [[like this]]:" in samples[0] and len(samples) <= 40
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exact"] and {check["state"] for check in report["checks"]} == {"passed"}
    assert [check["name"] for check in report["checks"]] == [
        "tokens of each layer",
        "rows and labels",
        "untrained tokens",
        "documents and later tokens",
    ]
    assert (tmp_path / "report.html").read_text().count("<svg") == 4
    wrong = subprocess.run(
        [*command, "verify_rows=none"], capture_output=True, text=True, env=env, timeout=100
    )
    assert wrong.returncode == 2 and "verify_rows=N with a whole number" in wrong.stderr


# -- what is read of a row, and of the data --------------------------------------------------------


def documents() -> list[TokenizedDocument]:
    """A shared prompt with two answers, and a text of which two tokens are trained."""
    return [
        TokenizedDocument([5, 6, 7], [-100] * 3, "prompt", 0),
        TokenizedDocument([8, 9, 2], [-100, 9, 2], "chosen", 0, parent=0),
        TokenizedDocument([8, 4, 3, 2], [-100, 4, 3, 2], "rejected", 0, parent=0),
        TokenizedDocument([1, 2, 3, 4], [-100, -100, 3, 4], "text", 1),
    ]


def read(keys: dict[str, Any]) -> list[list[str]]:
    """Body of a rank: the files of each time that a checkpoint is read."""
    import os

    from transformers import PreTrainedModel

    import cpu_sharding
    from longfactory.config import from_mapping
    from longfactory.train.verify import verify

    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    cpu_sharding.reset()
    files: list[list[str]] = []
    own = PreTrainedModel._load_pretrained_model

    def load(model: Any, state_dict: Any, checkpoint_files: list[str], *args: Any) -> Any:
        files.append([Path(file).name for file in checkpoint_files])
        return own(model, state_dict, checkpoint_files, *args)

    with mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load)):
        cfg = from_mapping({k: v for k, v in keys.items() if k != "cache"})
        assert verify(cfg, rows=2, tokens=160).exact
    return files


@pytest.mark.processes
def test_the_checkpoint_is_read_once(sft_keys: dict[str, Any], tmp_path: Path) -> None:
    """The specification takes its values from the run's model: reading them again took a third of
    the time of a small model.
    """
    write_model(tmp_path / "model", 0)
    keys = {**sft_keys, "model_name_or_path": str(tmp_path / "model"), "train_from_scratch": False}
    for files in run_ranks(2, read, keys, timeout=250):
        assert files == [["model.safetensors"]]


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_embedded_model
def test_the_quickstart_is_verified(tmp_path: Path) -> None:
    """Its real model, on two processes."""
    words = [ROOT / "examples" / "quickstart.yaml", "nproc_per_node=2"]
    words += [f"output_dir={tmp_path / 'out'}", f"dataset_dir={ROOT / 'data'}"]
    done = subprocess.run(
        [sys.executable, "-m", "longfactory.cli", "verify", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The same." in done.stdout


def test_documents_are_read_with_their_parents_and_labels_moved_by_one() -> None:
    texts = texts_of(documents())
    assert [text.tokens for text in texts] == [
        (5, 6, 7),
        (5, 6, 7, 8, 9, 2),
        (5, 6, 7, 8, 4, 3, 2),
        (1, 2, 3, 4),
    ]
    assert texts[1].targets == (-100, -100, -100, 9, 2, -100) and texts[3].targets == (
        -100,
        3,
        4,
        -100,
    )
    assert [text.before for text in texts] == [0, 3, 3, 0] and texts[2].places == [3, 4, 5]


def test_what_a_row_has_that_its_documents_do_not() -> None:
    texts = texts_of(documents())
    row = make_row(documents()).padded(8, 0)
    assert row_reason(row, texts, 1) is None
    moved = row.position_ids.clone()
    moved[3:6] = torch.arange(3)
    twice = torch.cat([row.labels[1:], row.labels.new_full((1,), -100)])
    twice[:10] = row.labels[:10]  # of the last document alone
    for changes, sentence in (
        (
            {"position_ids": moved},
            "The position at token 1 of document 2 of row 1 is 0; by its document it is 3.",
        ),
        ({"labels": row.input_ids}, "labels are trained,"),
        ({"labels": twice}, "labels are shifted twice"),
        ({"input_ids": row.input_ids.flip(0)}, "The token at token 1 of document 1"),
        ({"documents": row.documents[1:]}, "Row 1 has 3 documents, its samples have 4."),
    ):
        reason = row_reason(dataclasses.replace(row, **changes), texts, 1)
        assert reason is not None and sentence in reason, reason


def test_a_row_that_no_document_crosses_is_made_to_have_one() -> None:
    ctx = SimpleNamespace(size=2)
    trainer: Any = SimpleNamespace(ctx=ctx, collate=None, pad_id=0)
    shapes = iter([0, 0, 1])
    lengths = []

    def collate(items: Any, multiple: int, pad_id: int) -> None:
        lengths.append(len(items[0][0].input_ids))

    trainer.collate = collate
    items = [[TokenizedDocument(list(range(40)), list(range(40)))]]
    with (
        mock.patch(
            "longfactory.train.verify.rows.row_shape",
            lambda row, ctx: SimpleNamespace(crossing=next(shapes)),
        ),
        mock.patch("longfactory.train.verify.rows.sp.alignment", lambda ctx: 4),
    ):
        crossed(items, trainer)
    assert lengths == [40, 30, 20] and items[0][0].input_ids == list(range(20, 40))


def test_a_row_without_padding_loses_a_token() -> None:
    trainer: Any = SimpleNamespace(ctx=None)
    items = [[TokenizedDocument([1] * n, [1] * n)] for n in (3, 5)]
    with mock.patch("longfactory.train.verify.rows.sp.alignment", lambda ctx: 4):
        padded(items, trainer)
        assert [len(item[0].input_ids) for item in items] == [3, 4]
        padded(items, trainer)
    assert [len(item[0].input_ids) for item in items] == [3, 4]


def test_an_item_is_made_longer_than_a_window() -> None:
    pair = documents()[:3]
    longer = lengthened(pair, 20, [pair])
    assert [len(d.input_ids) for d in longer] == [3 + 37, 3, 4]  # the prompt, for both answers
    assert not exercises(texts_of(pair), 20) and exercises(texts_of(longer), 20)
    assert all(text.places[-1] > 20 for text in texts_of(longer) if text.places)
    assert set(longer[0].labels) == {-100} and list(longer[0].input_ids[-3:]) == [5, 6, 7]
    text = [TokenizedDocument([1, 2], [-100, 2])]
    (single,) = lengthened(text, 8, [pair, text])
    assert list(single.labels[-2:]) == [-100, 2] and set(single.labels[:-2]) == {-100}
    assert lengthened([single], 8, [pair]) == [single]


def test_windows_are_those_that_a_layer_has() -> None:
    full = ["full_attention"] * 2
    for given, expected in (
        ({"sliding_window": 140}, {"sliding_window": 140}),
        ({"sliding_window": None}, {}),
        ({"sliding_window": 140, "layer_types": full}, {}),
        (
            {"sliding_window": 140, "layer_types": [*full, "sliding_attention"]},
            {"sliding_window": 140},
        ),
        (
            {"attention_chunk_size": 64, "layer_types": ["chunked_attention"]},
            {"attention_chunk_size": 64},
        ),
    ):
        assert windows_of(SimpleNamespace(**given)) == expected


@pytest.mark.parametrize(
    ("family", "shape", "windows"),
    [
        ("gemma4_text", (4, 4, 512), {"sliding_window": 8}),
        pytest.param(
            *("dots3_note_text", (8, 4, 32), {"sliding_window": 8}),
            marks=pytest.mark.skipif(
                not is_made_here("dots3_note_text"), reason="not in this transformers"
            ),
        ),
    ],
)
def test_layers_that_differ_count_as_the_largest(
    family: str, shape: tuple[int, int, int], windows: dict[str, int]
) -> None:
    """Their configuration names no value for all layers, and reading one raises."""
    config = tiny_config(family).get_text_config()
    assert _shape(config) == shape and windows_of(config) == windows
    each = [SimpleNamespace(sliding_window=size) for size in (64, None, 256)]
    differ = SimpleNamespace(is_heterogeneous=True, per_layer_config=each)
    assert windows_of(differ) == {"sliding_window": 256}


def test_a_packed_block_is_parted_into_its_samples() -> None:
    block = [documents()[3], *(dataclasses.replace(d, sample=7) for d in documents()[:1])]
    block += [dataclasses.replace(d, sample=7, parent=1) for d in documents()[1:3]]
    assert [[d.parent for d in sample] for sample in parted(block)] == [[-1], [-1, 0, 0]]
    rows = choose([block], rows=2, batch=1, tokens=100, apart=True)
    assert [[d.sample for d in row[0]] for row in rows] == [[1], [7, 7, 7]]


def test_nothing_is_evaluated_or_saved() -> None:
    from longfactory.config import from_mapping
    from longfactory.train.verify.command import quiet

    given = {
        "model_name_or_path": "model",
        "stage": "sft",
        "dataset": "manual_sft",
        "dataset_dir": str(Path(__file__).parents[2] / "data"),
        "eval_dataset": "manual_sft_eval",
        "template": "chatml",
        "output_dir": "out",
        "do_eval": True,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "gradient_accumulation_steps": 8,
        "deepspeed": ZERO[3],
    }
    found = quiet(from_mapping(given), "folder", 3).trainer
    assert not (found.do_eval or found.eval_on_start or found.load_best_model_at_end)
    assert (found.eval_strategy, found.save_strategy, found.output_dir) == ("no", "no", "folder")
    assert (found.max_steps, found.gradient_accumulation_steps) == (1, 3)
    assert found.deepspeed["zero_optimization"] == {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert "optimizer" not in found.deepspeed and found.deepspeed["gradient_clipping"] == "auto"


def test_rows_are_chosen_that_train_and_one_has_two_samples() -> None:
    def sample(i: int, trained: bool = True) -> list[TokenizedDocument]:
        return [TokenizedDocument([i] * 6, [-100] * 3 + [i if trained else -100] * 3, sample=i)]

    data = [sample(0, trained=False), sample(1), sample(2), sample(3)]
    rows = choose(data, rows=2, batch=1, tokens=100)
    assert [[d.sample for d in row[0]] for row in rows] == [[1], [2, 0]]
    assert [
        [d.sample for item in row for d in item]
        for row in choose(data, rows=1, batch=2, tokens=100)
    ] == [[0, 1]]
    # Fewer samples than a row takes: they are taken again, as other samples.
    (row,) = choose(data[:2], rows=1, batch=3, tokens=100)
    assert len(row) == 3 and len({d.sample for item in row for d in item}) == 3
    with pytest.raises(UserError, match="nothing can be compared"):
        choose([sample(0, trained=False)], rows=1, batch=1, tokens=100)


def test_prompts_that_are_trained_are_found_by_the_stored_parts() -> None:
    store: Any = SimpleNamespace(parts=lambda i: [[1] * 4, [2] * 3, [1] * 2, [2] * 2])

    def found(
        labels: list[int], eos: int | None = None, cutoff: int = 100, **rules: Any
    ) -> list[str]:
        data = SimpleNamespace(
            kind=KINDS["sft"],
            stores=[store],
            entries=[[0, 0]],
            rules=Rules(cutoff, eos=eos, **rules),
        )
        return mask_reasons(data, [TokenizedDocument([1] * len(labels), labels, sample=0)])

    right = [-100] * 4 + [2] * 3 + [-100] * 2 + [2] * 2
    assert not found(right)
    wrong = found([-100] * 3 + right[4:5] + right[4:])
    assert wrong == ["Sample 0 trains 1 of the 6 tokens of its prompt; train_on_prompt is not set."]
    assert not found([1] * len(right), train_on_prompt=True)
    # Where answers end by eos, the first token of a later turn teaches it, and the document has one
    # token more.
    assert not found([*right[:7], 0, *right[8:], 0], eos=0)
    assert found([*right[:7], 0, 1, *right[9:], 0], eos=0)
    # The beginning is cut off: places are counted from the end.
    assert not found(right[3:]) and found([1, *right[4:]])
    # cutoff_len leaves 3 tokens of the first prompt and 2 of its answer.
    assert not found([-100] * 3 + [2] * 2, cutoff=5) and found([-100] * 2 + [2] * 3, cutoff=5)
