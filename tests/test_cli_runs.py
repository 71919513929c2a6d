"""`longfactory train` in processes of its own, from the command to the files, with and against the
user.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
from make_model import make_model  # noqa: E402

pytestmark = pytest.mark.processes

EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*_*.yaml"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes any example small: a tiny model, short texts, two steps."""
    model = make_model("tiny", tmp_path_factory.mktemp("model") / "model", vocabulary=600)
    sizes = (
        "cutoff_len=256 max_samples=12 max_steps=2 gradient_accumulation_steps=1 logging_steps=1"
        " disable_tqdm=true"
    )
    return [
        f"model_name_or_path={model}",
        f"dataset_dir={ROOT / 'data'}",
        "train_from_scratch=true",
        *sizes.split(),
    ]


def longfactory(
    *words: str, cache: Path, start: tuple[str, ...] = ("-m", "longfactory.cli"), **variables: str
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    env |= {
        "LONGFACTORY_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    } | variables
    return subprocess.run(
        [sys.executable, *start, *words],
        capture_output=True,
        text=True,
        env=env,
        timeout=280,
        cwd=cache.parent,
    )


@pytest.mark.timeout(600)
def test_train_and_refuse(small: list[str], tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    words = [
        "train",
        str(ROOT / "examples" / "sft_full.yaml"),
        *small,
        f"output_dir={out}",
        "overwrite_output_dir=false",
        "save_steps=1",
    ]
    words += ["eval_steps=2", "sequence_parallel_size=2", "nproc_per_node=2", "save_total_limit=1"]
    words += ["dataloader_num_workers=1"]  # its processes end with the run
    done = longfactory(*words, cache=cache)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] and lines[-1]["current_steps"] == 2
    start = lines[0]["startup"]
    assert {"launcher", "imports", "data", "model", "guard", "first step"} <= start.keys()
    (told,) = re.findall(r"end of the first step: ([0-9.]+) s: launcher", done.stderr)
    assert float(told) == pytest.approx(sum(start.values()), abs=0.1)
    assert not any("startup" in line for line in lines[1:])
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2"]
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "longfactory.yaml",
        "train_results.json",
        "eval_results.json",
        "training_loss.png",
    ):
        assert (out / name).is_file(), name

    # what the workers would find is told once, before they are started
    other = longfactory(*words, "stage=pt", "dataset=manual_pt", cache=cache)
    assert other.returncode == 2
    assert other.stderr.count("holds another run (its stage is sft, this run's pt") == 1
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_torchrun_with_one_process_goes_on(small: list[str], tmp_path: Path) -> None:
    """No group is opened, and nothing is averaged over nobody."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    words = ["train", str(ROOT / "examples" / "sft_full.yaml"), *small, f"output_dir={out}"]
    words += ["overwrite_output_dir=false", "save_steps=1", "eval_strategy=no"]
    for steps in (2, 3):
        done = longfactory(*words, f"max_steps={steps}", cache=cache, FORCE_TORCHRUN="1")
        assert done.returncode == 0, done.stderr
        assert "parameters: not sharded (one process)" in done.stderr
        assert ("Resuming from" in done.stderr) == (steps == 3)
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] == steps


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stream_that_other_processes_tokenise(small: list[str], tmp_path: Path) -> None:
    words = [
        "train",
        str(ROOT / "examples" / "sft_lora.yaml"),
        *(w for w in small if not w.startswith("max_samples")),
        "eval_strategy=no",
    ]
    words += [
        "streaming=true",
        "buffer_size=8",
        "preprocessing_batch_size=10",
        "max_steps=4",
        "gradient_accumulation_steps=3",
    ]
    words += [
        "per_device_train_batch_size=2",
        "lora_dropout=0.1",
        "save_strategy=no",
        "logging_steps=1",
    ]
    curves = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        done = longfactory(
            *words,
            f"output_dir={out}",
            f"dataloader_num_workers={workers}",
            cache=tmp_path / "cache",
        )
        assert done.returncode == 0, done.stderr
        # The kernels that run are one line, before the bar of the steps.
        (kernels,) = re.findall(r"^.*\] Attention kernel.*$", done.stderr, re.MULTILINE)
        assert (
            kernels.endswith(": cpu.")
            and "/4 [" not in done.stderr[: done.stderr.index(kernels) + len(kernels)]
        )
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        curves.append([(h["loss"], h["grad_norm"]) for h in log if "loss" in h])
    assert len(curves[0]) == 4 and curves[0] == curves[1]


def under_zero3(tmp_path: Path, example: str, *words: str) -> subprocess.CompletedProcess[str]:
    """An example in one process with the ZeRO-3 file; its output is in `tmp_path`/out."""
    pytest.importorskip("deepspeed")
    places = [
        f"output_dir={tmp_path / 'out'}",
        f"deepspeed={ROOT / 'examples' / 'deepspeed' / 'ds_z3_config.json'}",
    ]
    done = longfactory(
        "train",
        str(ROOT / "examples" / f"{example}.yaml"),
        *words,
        *places,
        cache=tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_loader_processes_that_are_no_copies_of_this_one(small: list[str], tmp_path: Path) -> None:
    """Python 3.14's way on Linux: what such a process needs is sent to it. A preference loss also
    attaches the reference's numbers there, which are made after the loader is.
    """
    code = (
        "import multiprocessing, sys; multiprocessing.set_start_method('forkserver');"
        " from longfactory.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", str(ROOT / "examples" / "dpo_full.yaml"), *small, "eval_strategy=no"]
    losses = []
    for workers in (0, 1):
        out = tmp_path / f"out{workers}"
        given = [f"output_dir={out}", f"dataloader_num_workers={workers}", "save_strategy=no"]
        done = longfactory(*words, *given, cache=tmp_path / "cache", start=("-c", code))
        assert done.returncode == 0, done.stderr
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deepspeed_s_launcher_with_a_hostfile(small: list[str], tmp_path: Path) -> None:
    """Two machines of one process each: `deepspeed` is started on both, as its `--no_ssh` asks."""
    pytest.importorskip("deepspeed")
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [*small, f"output_dir={tmp_path / 'out'}", "sequence_parallel_size=2", "use_cpu=true"]
    keys = "stage=sft do_train=true finetuning_type=full dataset=manual_sft save_strategy=no"
    flags = [f"--{word}" for word in [*given, *keys.split()]]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"LONGFACTORY_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts)),
                *("--no_ssh", "--node_rank", str(rank), "--master_addr", "127.0.0.1"),
                *("--master_port", str(port), str(ROOT / "src" / "train.py"), *flags),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "World size: 2 (sequence parallel) x 1 (data parallel) = 2" in said[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_whose_weights_zero3_has_taken_apart(small: list[str], tmp_path: Path) -> None:
    done = under_zero3(
        tmp_path, "sft_full", *small, "eval_strategy=no", "save_strategy=no", "max_steps=1"
    )
    assert re.search(r"Trainable parameters: ([1-9][\d,]+) of \1 ", done.stderr)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 100_000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_reference_of_weights_that_zero3_has_taken_apart_without_training(
    small: list[str], tmp_path: Path
) -> None:
    under_zero3(tmp_path, "dpo_full", *small, "do_train=false", "do_eval=true", "val_size=4")
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())[
        "eval_loss"
    ] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(["dataset=manual_sfd"], "'manual_sfd' is not in dataset_info.json", id="data"),
        pytest.param(
            ["model_name_or_path=./absent"], "the folder ./absent does not exist", id="model"
        ),
        pytest.param(["lora_target=q_prj"], "q_prj not found in the model", id="modules"),
        pytest.param(["train_from_scratch=false"], "holds no weights", id="weights"),
    ],
)
def test_what_only_the_workers_can_find_is_told_once(
    change: list[str], expected: str, small: list[str], tmp_path: Path
) -> None:
    words = [
        "train",
        str(ROOT / "examples" / "sft_lora.yaml"),
        *small,
        f"output_dir={tmp_path / 'out'}",
        "nproc_per_node=2",
    ]
    done = longfactory(*words, "sequence_parallel_size=2", *change, cache=tmp_path / "cache")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(expected) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_runs(path: Path, small: list[str], tmp_path: Path) -> None:
    words = [
        "train",
        str(path),
        *small,
        f"output_dir={tmp_path / 'out'}",
        "sequence_parallel_size=2",
        "nproc_per_node=2",
        "eval_steps=2",
    ]
    done = longfactory(*words, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "train_results.json").is_file()
