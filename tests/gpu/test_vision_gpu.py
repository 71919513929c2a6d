"""Whole runs on rows with images through the command on two GPUs, in float32: they take the steps of
one GPU, with copies, FSDP2 and ZeRO-3; bf16 runs of packed rows in two modes are near them.

    python -m pytest -q -s tests/gpu/test_vision_gpu.py     # about a minute on two GPUs

What the tests that were asked for need is started at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import vision_models as tiny
from longfactory import sp
from longfactory.sp import hf, media, text_model, vision
from small_runs import keys, steps
from vision_runs import TRAINED, of_run, write_data, write_model, write_zero3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.timeout(200),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ROOT = Path(__file__).resolve().parents[2]
BF16 = TRAINED | {"bf16": True, "packing": True, "per_device_train_batch_size": 1}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, TRAINED),
    "ddp": (2, TRAINED | {"sharding": "ddp"}),
    "fsdp2": (2, TRAINED | {"sharding": "fsdp2"}),
    "deepspeed": (2, TRAINED | {"deepspeed": "zero3.json"}),
    "bf16_one": (1, BF16),
    "bf16_zigzag-ring": (2, BF16 | {"sequence_parallel_mode": "zigzag-ring"}),
    "bf16_ulysses": (2, BF16 | {"sequence_parallel_mode": "ulysses"}),
}
"""Of a run: GPUs, which share its rows, and further keys."""
SHARDED = ("ddp", "fsdp2", "deepspeed")


GROUPS = (("one", "bf16_one"), ("deepspeed", "bf16_zigzag-ring"), ("fsdp2", "bf16_ulysses", "ddp"))
"""Runs one after another, in processes forked from one that has imported what they need: most of a
command's time would be Python's. The groups run side by side.
"""


class Started(NamedTuple):
    """A group that runs, what it writes, and where the output of its runs is."""

    process: subprocess.Popen[bytes]
    said: Path
    home: Path


def words_of(home: Path, name: str) -> list[str]:
    size, changes = RUNS[name]
    changes = {k: home / v if k == "deepspeed" else v for k, v in changes.items()}
    given = keys(home, name, sequence_parallel_size=size, **of_run(home, name, **changes))
    given |= {"use_cpu": False, "tf32": False, "nproc_per_node": size}
    return [f"{k}={v}" for k, v in given.items()]


def start(home: Path, names: Sequence[str]) -> Started:
    """What `longfactory train` calls in each of its processes, for one run after another."""
    jobs = [{"name": n, "command": "train", "words": words_of(home, n)} for n in names]
    file, said = home / f"{names[0]}.jobs.json", home / f"{names[0]}.txt"
    file.write_text(json.dumps(jobs))
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "LONGFACTORY_CACHE": str(home / f"cache_{names[0]}"),
        "TQDM_DISABLE": "1",
        # Compiling takes nearly all of a first step, and what it makes is compared elsewhere.
        "LONGFACTORY_COMPILE": "0",
        # DeepSpeed would want CUDA's compiler, which it does not need here.
        "DS_IGNORE_CUDA_DETECTION": "1",
    }
    runs = ROOT / "benchmarks" / "_many_runs.py"
    command = [sys.executable, "-u", str(runs), str(RUNS[names[0]][0]), str(file)]
    with said.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    return Started(process, said, home)


@pytest.fixture(scope="module")
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Started]]:
    home = tmp_path_factory.mktemp("vision")
    write_model(home / "qwen3_vl", "qwen3_vl")
    write_data(home)
    write_zero3(home)
    asked = " ".join(item.name for item in request.session.items)
    chosen = {name for name in RUNS if name.removeprefix("bf16_") in asked}
    if "bf16" in asked:
        chosen.add("bf16_one")
    if chosen & set(SHARDED):
        chosen.add("one")
    if importlib.util.find_spec("deepspeed") is None:
        chosen.discard("deepspeed")
    runs: dict[str, Started] = {}
    for group in GROUPS:
        if names := [name for name in group if name in chosen]:
            runs |= dict.fromkeys(names, start(home, names))
    yield runs
    for run in runs.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()


def log_of(started: dict[str, Started], name: str, limit: float = 150.0) -> list[dict[str, float]]:
    """The steps of a run that ended well."""
    begun, run = time.monotonic(), started[name]
    found: dict[str, Any] | None = None
    while found is None:
        over = run.process.poll() is not None or time.monotonic() - begun > limit
        said = run.said.read_text(errors="replace")
        results = [json.loads(x[7:]) for x in said.splitlines() if x.startswith("RESULT ")]
        found = next((r for r in results if r["name"] == name), None)
        if found is None and over:
            found = {"error": f"no result after {time.monotonic() - begun:.0f} s", "seconds": 0.0}
        time.sleep(0.1)
    if "error" in found:
        print(name, said[-8000:], flush=True)
        pytest.fail(f"{name}: {found['error']}")
    state = json.loads((run.home / name / "trainer_state.json").read_text())
    log = steps(state["log_history"])
    told = [(h["loss"], h["grad_norm"]) for h in log]
    print(name, told, f"{found['seconds']:.0f} s", flush=True)
    return log


def same(one: list[dict[str, float]], two: list[dict[str, float]], error: float) -> None:
    assert len(one) == len(two) > 0
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=error), key


@two_gpus
@pytest.mark.parametrize("sharding", SHARDED)
def test_vision_runs_on_two_gpus(started: dict[str, Started], sharding: str) -> None:
    if sharding not in started:
        pytest.skip("needs deepspeed")
    same(log_of(started, "one"), log_of(started, sharding), 1e-4)
    named = {"ddp": "(ddp)", "fsdp2": "(fsdp2)", "deepspeed": "as deepspeed's file says"}[sharding]
    assert named in started[sharding].said.read_text().lower()


@two_gpus
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses"])
def test_vision_runs_in_bf16(started: dict[str, Started], mode: str) -> None:
    same(log_of(started, "bf16_one"), log_of(started, f"bf16_{mode}"), 2e-2)


def row_on_gpu(model: Any, frames: int, side: int) -> tuple[dict[str, Any], vision.Media]:
    """A document of one video: inputs of the model, and what is computed of its frames."""
    device = torch.device("cuda")
    document = tiny.document("qwen3_vl", [4, (frames, side, side), 5], dtype=torch.float32)
    ctx = sp.SequenceParallel.create(1, device_type="cuda")
    length = len(document.ids)
    plan = sp.plan(length, (sp.Segment(0, length),), ctx)
    parts = [media.Part(tuple(places), len(places)) for places in document.places]
    route = media.Route.make(parts, [0] * len(parts), plan).to(device)
    images = [
        dataclasses.replace(image, pixels=image.pixels.pin_memory()) for image in document.images
    ]
    batches = vision.batches_of(images, vision.TRAINED_BATCH)
    positions = torch.arange(length).expand(4, -1)
    inputs = hf.inputs({"input_ids": document.ids, "position_ids": positions}, plan)
    moved = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    return moved, vision.Media(route, batches)


@pytest.fixture
def on_gpu() -> Iterator[Any]:
    model = tiny.model("qwen3_vl", torch.float32, attention="sdpa").to("cuda")
    hf.prepare(model, sp.SequenceParallel.create(1, device_type="cuda"))
    vision.install(model)
    yield model
    vision.release(model)
    hf.release(model)


def test_vision_merge_does_not_wait_for_the_device(on_gpu: Any) -> None:
    """Neither the tower nor the merge. What follows is the text decoder's own: transformers looks
    for packed rows in the position ids, which waits once.
    """
    inputs, given = row_on_gpu(on_gpu, frames=6, side=4)
    on_gpu(**inputs, sp_media=given)
    torch.cuda.synchronize()
    begun: list[int] = []

    def decoder_begins(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        begun.append(1)

    # Behind the hook of the merge, which `install` has put on the same module.
    hook = text_model.decoder(on_gpu).register_forward_pre_hook(decoder_begins)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu(**inputs, sp_media=given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert begun == [1]


def test_vision_memory_of_a_trained_tower_does_not_grow_with_a_video(on_gpu: Any) -> None:
    """Of further frames only their features are held: by the parts, all together, and twice again
    in the backward pass. What autograd stores of a frame is some forty times that.
    """
    peaks, features = {}, 0
    for frames in (16, 16, 64):  # the first holds what libraries allocate once
        _, given = row_on_gpu(on_gpu, frames, side=16)
        embeddings = torch.zeros(1, 1, 64, device="cuda")
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = vision.installed._features(on_gpu, given, embeddings)
        assert made is not None
        made.sum().backward()
        features = made.numel() * made.element_size() // frames
        del made
        torch.cuda.synchronize()
        peaks[frames] = torch.cuda.max_memory_allocated() - held
        on_gpu.zero_grad(set_to_none=True)
    grown = (peaks[64] - peaks[16]) / 48
    print(
        f"peak {peaks}, {grown:,.0f} bytes a further frame, its features {features:,}", flush=True
    )
    assert grown < 6 * features
    assert peaks[16] > 20 * features, "the tower stores nothing, and this test shows nothing"
