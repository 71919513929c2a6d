"""What the benchmark of many GPUs counts and writes; its parts as two CPU processes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import _device_time
import _many_commands
import _many_length
import _many_parity
import _many_peers
import _many_table
from _peer_bench import make_config
from _peer_passes import passes
from _table import Clock

MADE = {"machine": "2 x H200", "command": "c", "date": "2026-11-27", "versions": "torch 2"}
ROOT = Path(__file__).resolve().parents[2]


def test_messages_that_nothing_hides() -> None:
    sent = _device_time.union([(4.0, 6.0), (0.0, 2.0), (1.0, 3.0)])
    busy = _device_time.union([(2.5, 5.0), (5.5, 9.0)])
    assert sent == [(0.0, 3.0), (4.0, 6.0)]
    assert _device_time.shared(sent, busy) == 0.5 + 1.0 + 0.5
    assert _device_time.shared(busy, sent) == 2.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "messages"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd>", "attention"),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_NNT", "products"),
        ("void at::native::vectorized_elementwise_kernel<4>", "rest"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert _device_time.kind(name) == kind


def test_samples_have_the_tokens_that_are_asked_for(tmp_path: Path) -> None:
    """By a tokenizer of bytes; a pair is its prompt and both answers."""
    _many_length.make_long(tmp_path, 5000, 2, pairs=False)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [len(line["output"].encode()) for line in lines] == [5000, 5000]
    _many_length.make_long(tmp_path, 5000, 1, pairs=True)
    pair = json.loads((tmp_path / "samples.jsonl").read_text())
    total = sum(len(pair[key].encode()) for key in ("instruction", "chosen", "rejected"))
    assert 4900 < total <= 5000 and len(pair["chosen"]) == 125


def test_the_log_of_a_run_is_read() -> None:
    text = (
        "[08:00:00] Memory plan (memory: auto): 7.62 B parameters, rows of 1,048,576 tokens\n"
        "  every layer recomputed; optimizer on the gpu\n  peak memory of one GPU\n"
        "  predicted: 1,396.4 s per row, 661 tokens/s per GPU (95% of the roofline)\n"
    )
    row = _many_commands.planned(text)
    assert row == {
        "settings": "every layer recomputed; optimizer on the gpu",
        "predicted s": 1396.4,
    }


def test_tables_from_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one part, the last of a name in its first place; other parts' and noise are passed
    over.
    """
    made = {"machine": "4 x H200", "date": "2026-11-27", "versions": "torch 2"}
    lines = []
    for part, rows in (
        ("scaling", [{"row": "SP 1", "x": 1.5}, {"row": "SP 4", "x": 2}, {"row": "SP 1", "x": 3}]),
        ("parity", [{"row": "seed 0", "ratio": 1.0}]),
    ):
        command = f"python benchmarks/many_gpus.py --gpus 4 --part {part}"
        lines += ["ABOUT " + json.dumps({**made, "command": command}), "noise"]
        lines += [json.dumps(row) for row in rows]
    (tmp_path / "log").write_text("\n".join(lines))
    given = argparse.Namespace(
        part="scaling", log=tmp_path / "log", out=tmp_path, gpus=4, smoke=False, title="T", notes=[]
    )
    monkeypatch.setattr(_many_table, "_ABOUT", {})
    _many_table.from_log(given)
    text = (tmp_path / "many_gpus_scaling_4xH200.md").read_text()
    assert "| SP 1 | 3 |\n| SP 4 | 2 |" in text and "seed" not in text
    assert "--part scaling` (2026-11-27, 4 x H200, torch 2)" in text


def test_what_another_system_needs_more_is_divided() -> None:
    spent = {"attention": 100.0, "products": 50.0, "messages": 9.0, "exposed": 1.0, "idle": 0.0}
    ours = {"seconds": 1.0, "peak": 2**30, "kernels": ["cudnn"], "device_ms": spent}
    theirs = {**ours, "seconds": 1.5, "device_ms": {**spent, "attention": 135.0, "exposed": 5.0}}
    theirs["versions"] = {"torch": "2", "deepspeed": "0.19"}
    first = _many_peers.peer_row(ours, 1000, 2, None)
    row = _many_peers.peer_row(theirs, 1000, 2, first)
    assert (first["tokens/s a GPU"], first["peak GiB"]) == (500.0, 1.0)
    assert row["LongFactory is"] == "1.50x"
    assert row["version"] == "0.19" and "version" not in first
    assert row["more than LongFactory"] == (
        "attention ms +35, products ms +0, exposed ms +4, idle ms +0"
    )
    assert _many_peers.peer_row({"error": "out of memory"}, 1000, 2, first) == {
        "error": "out of memory"
    }


def test_rows_that_start_at_once_take_their_steps_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No steps before both are ready, and those of one after the other; a row that fails before it
    is ready does not hold the other.
    """
    steps: list[str] = []

    def row(job, gpus, clock, log):  # type: ignore[no-untyped-def]
        if job["row"] == "broken":
            return [{"error": "no package"}]
        folder, name = Path(job["turn"]), job["row"]
        time.sleep(0.3 if name == "second" else 0.0)
        (folder / f"{name}-ready").touch()
        while not (folder / f"{name}-begins").exists():
            time.sleep(0.01)
        steps.append(f"{name}, {len(list(folder.glob('*-ready')))} ready")
        time.sleep(0.2)
        steps.append(f"{name} ended")
        return [{"seconds": 1.0}]

    monkeypatch.setattr(_many_peers, "run_row", row)

    def names(rows: list[str]) -> list[str]:
        jobs = [{"row": row} for row in rows]
        return [name for name, _ in _many_peers.in_turn(jobs, 2, Clock(60.0), tmp_path)]

    assert names(["first", "second"]) == ["first", "second"]
    assert steps == ["first, 2 ready", "first ended", "second, 2 ready", "second ended"]
    assert names(["broken", "second"]) == ["broken", "second"]


def test_what_messages_expose_is_said_by_operation() -> None:
    kernels = [
        _device_time.Kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 0, 4000),
        _device_time.Kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgs)", 3000, 9000),
        _device_time.Kernel("nvjet_sm90_tst_192x192", 2000, 6000),
        _device_time.Kernel("void at::native::vectorized_elementwise_kernel<4>", 10000, 12000),
    ]
    assert _device_time.exposed_by_operation(kernels) == {"AllGather": 3.0, "SendRecv": 2.0}
    found = _device_time.divided(kernels)
    assert (found["messages"], found["exposed"], found["idle"]) == (9.0, 5.0, 1.0)
    assert (found["products"], found["rest"], found["attention"]) == (4.0, 2.0, 0.0)
    assert _device_time.longest(kernels, "products") == {"nvjet_sm90_tst_192x192": 4.0}
    assert _device_time.longest(kernels, "rest") == {"vectorized_elementwise_kernel": 2.0}
    add = "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float>, 4>(int)"
    short = _device_time.short_name(add)
    assert short == "unrolled_elementwise_kernel (CUDAFunctor_add)"


@pytest.mark.parametrize("checkpoint", [False, True])
def test_products_of_a_step_are_counted(checkpoint: bool) -> None:
    """A forward and a backward are three passes; with layers computed again four of theirs, less the
    MLP's last product, which no gradient needs.
    """
    from transformers import AutoModelForCausalLM

    config = make_config("tiny", 2)
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, config.vocab_size, (1, 96))

    def step() -> None:
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()

    found = passes(step, config, 96)
    assert found["MLP"] == pytest.approx(11 / 3 if checkpoint else 3)
    # older versions of transformers multiply positions by frequencies as matrices
    assert found["projections"] == pytest.approx(4.0 if checkpoint else 3.0, rel=2e-4)
    assert found["output layer"] == 3.0


def test_parity_keeps_a_row_when_its_three_runs_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps a run: SP is twice as far from float32 as one GPU for seed 0; a run of seed 1
    failed.
    """
    losses = {"float32": [2.0, 1.0], "one GPU": [2.1, 0.9], "all": [2.2, 1.2]}

    def runs(home, devices, jobs, end, tell, after):  # type: ignore[no-untyped-def]
        for job in jobs:
            kind, _, seed = job.name.partition("-")
            if kind == "gradients":
                parameters = {"w": {"difference": 2e-7}}
                nothing = {"difference": 0.0}
                report = {"exact": True, "parameters": parameters}
                report |= {"loss": nothing, "grad_norm": nothing}
                (home / f"verify-{seed}.json").write_text(json.dumps(report))
                tell(job.name, {})
            elif (kind, seed) == ("all", "1"):
                tell(job.name, {"error": "out of memory"})
            else:
                tell(job.name, {"losses": losses[kind]})
        return {}

    monkeypatch.setattr(_many_parity, "in_one_group", runs)
    for name in ("model_folder", "make_data", "make_model"):
        monkeypatch.setattr(_many_parity, name, lambda *given, **more: tmp_path)
    monkeypatch.setattr(_many_table, "_ABOUT", {"machine": "2 x H200"})
    given = argparse.Namespace(
        part="parity", out=None, gpus=2, small=False, smoke=False, end=0.0, after=None, repeats=5
    )
    given.only = None
    assert _many_parity.parity(given) == 1, "a run failed"
    printed = capsys.readouterr().out.splitlines()
    rows = {row["row"]: row for row in map(json.loads, printed)}
    assert len(rows) == 10, "five seeds, four modes, the median"
    first = rows["seed 0, 20 steps of 4,096 tokens"]
    assert first["ratio"] == pytest.approx(2.0) and first["last loss"] == 1.0
    assert rows["seed 1, 20 steps of 4,096 tokens"]["error"] == "out of memory"
    assert rows["float32, usp: gradients"]["worst gradient"] == 2e-7
    assert rows["median of 4"]["ratio"] == pytest.approx(2.0)

    # a seed that an earlier command did not finish, alone: the median is of all
    given.out, given.title, given.notes = tmp_path, "T", []
    (tmp_path / "many_gpus_parity_2xH200.json").write_text(
        json.dumps({"rows": [*({**row, "made": MADE} for row in rows.values())], "remarks": ["R."]})
    )
    losses["all"], given.only = [2.1, 1.1], ["seed 3"]
    monkeypatch.setattr(_many_table, "_ABOUT", MADE)
    assert _many_parity.parity(given) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = {row["row"]: row for row in map(json.loads, printed)}
    assert len(rows) == 2 and rows["median of 4"]["ratio"] == pytest.approx(2.0)
    page = (tmp_path / "many_gpus_parity_2xH200.md").read_text()
    assert page.count("median") == 1 and page.endswith("R.\n") and page.count("| seed") == 5


@pytest.mark.slow
@pytest.mark.parametrize("part", ["packed", "scaling", "resume", "parity"])
def test_parts_run_on_cpus(part: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "many_gpus.py"), "--smoke"]
    done = subprocess.run(
        [*command, "--part", part, "--out", str(tmp_path), "--limit", "240"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert rows and not [row for row in rows if "error" in row]
