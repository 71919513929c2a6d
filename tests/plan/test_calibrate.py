"""Rates of a machine: measured, written, read, and taken in place of those of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from known_sizes import qwen_7b
from longfactory.errors import UserError
from longfactory.memory import calibration
from longfactory.memory.calibration import IN_A_STEP, Calibration
from longfactory.memory.seconds import seconds
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, TrainingJob, machine
from longfactory.plan import calibrate, command
from longfactory.train import memory_plan
from longfactory.train.survival import agreement

MEASURED = Calibration(
    host_memory=20e9,
    cores=16,
    gpu="NVIDIA H100 80GB HBM3",
    products=700e12,
    attention_forward=500e12,
    attention_backward=400e12,
    wide_heads=0.5,
    copies=25e9,
    links=150e9,
    gpus=8,
)


@pytest.fixture(autouse=True)
def no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(calibration.VARIABLE, raising=False)
    monkeypatch.setenv("LONGFACTORY_CACHE", str(tmp_path / "cache"))


def test_rates_are_work_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the clock: a call of half a second."""
    calls: list[str] = []

    def half(call, device):
        call()
        calls.append(device.type)
        return 0.5

    monkeypatch.setattr(calibrate, "seconds_of", half)
    for name, value in (("SIDE", 16), ("TOKENS", 32), ("COPIED", 64), ("UPDATED", 128)):
        monkeypatch.setattr(calibrate, name, value)
    cpu = torch.device("cpu")
    assert calibrate.products(cpu) == 2 * 16**3 / 0.5
    causal = 2 * 32**2 * 32 * 128  # both products of half of the scores
    assert calibrate.attention(cpu, 128) == (causal / 0.5, 2.5 * causal / 0.5)
    assert calibrate.copies(cpu) == 64 / 0.5
    assert calibrate.host_update(1) == 28 * 128 / 0.5
    assert len(calls) == 6


def test_seconds_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 0.01

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    assert calibrate.seconds_of(call, torch.device("cpu")) == pytest.approx(0.01)
    assert now[0] >= calibrate.SECONDS


def test_a_call_that_is_far_too_slow_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []

    def call() -> None:
        calls.append(0)
        now[0] += 19.0

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    assert calibrate.seconds_of(call, torch.device("cpu")) == 19.0 and len(calls) == 1


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [({1: 4.0, 2: 2.0, 4: 1.0}, 1.0, [1, 2, 4]), ({1: 3.0, 2: 5.0, 4: 19.0}, 3.0, [1, 2])],
    ids=["idle", "cores that others hold"],
)
def test_the_host_is_measured_with_as_many_threads_as_are_fastest(
    seconds: dict[int, float], best: float, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def taken(call: object, device: object) -> float:
        threads.append(torch.get_num_threads())
        return seconds[threads[-1]]

    before = torch.get_num_threads()
    monkeypatch.setattr(calibrate, "seconds_of", taken)
    monkeypatch.setattr(calibrate, "UPDATED", 128)
    assert calibrate.host_update(4) == 28 * 128 / best
    assert threads == tried and torch.get_num_threads() == before


def test_without_a_gpu_the_host_alone_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(calibrate, "SECONDS", 0.01)
    monkeypatch.setattr(calibrate, "UPDATED", 2**16)
    assert command.main(["--calibrate"]) == 0
    path = tmp_path / "cache" / "calibration.json"
    out = capsys.readouterr().out
    assert f"written to {path}" in out and "No GPU is visible" in out
    found = calibration.read(path)
    assert found.gpu is None and found.products is None and found.host_memory > 0
    plain = machine("H100", 8, 2**40)
    measured = found.of_machine(plain)
    assert measured.host_memory == found.host_memory and measured.gemm == plain.gemm
    other = tmp_path / "other.json"
    assert command.main(["--calibrate", str(other)]) == 0 and other.is_file()


def test_the_plan_takes_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    calibration.write(MEASURED, path)
    plain = machine("H100", 8, 2**40)
    here = calibration.of_file(path, plain, "H100")
    assert (here.gemm, here.copies, here.links) == (IN_A_STEP * 700e12, 25e9, 150e9)
    assert (here.host_memory, here.gpu_bytes) == (20e9, plain.gpu_bytes)
    job = TrainingJob(ModelShape.of(qwen_7b()), plain, 65536, sp=8)
    slow = TrainingJob(ModelShape.of(qwen_7b()), here, 65536, sp=8)
    settings = MemorySettings(keep_attention=1.0)
    assert seconds(slow, settings) > 1.1 * seconds(job, settings)
    with pytest.raises(UserError, match=r"measured on NVIDIA H100 .* plan is for A100"):
        calibration.of_file(path, machine("A100", 8, 2**40), "A100")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold measured rates"),
        ('{"host_memory": 1e9, "cores": 4, "fast": 1}', "not known: fast"),
        ('{"host_memory": -1, "cores": 4}', "host_memory: got -1, expected a number above 0"),
        ('{"host_memory": 1e9, "cores": 4, "copies": NaN}', "copies: got nan"),
    ],
)
def test_files_that_are_not_rates(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        calibration.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        calibration.read(tmp_path / "nothing.json")


def test_training_takes_the_file_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    plain = machine("NVIDIA H100 80GB HBM3", 8, 2**40)

    def taken(gpu: str | None = "NVIDIA H100 80GB HBM3", world: int = 8) -> bool:
        return memory_plan.with_calibration(plain, gpu, world) != plain

    assert not taken()
    path = calibration.default_path()
    calibration.write(MEASURED, path)
    assert taken() and taken("NVIDIA H100 PCIe")
    assert not taken(world=16), "a machine's own file is not for runs on two"
    assert not taken(None)
    assert not taken("NVIDIA A100-SXM4-80GB") and "was measured on NVIDIA H100" in caplog.text
    shared = tmp_path / "shared.json"
    shared.write_text(json.dumps({"host_memory": 1e9, "cores": 8}))
    monkeypatch.setenv(calibration.VARIABLE, str(shared))
    assert taken(world=16) and memory_plan.with_calibration(plain, "A100", 8).host_memory == 1e9
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path / "gone.json"))
    with pytest.raises(UserError, match="which is not a file"):
        taken()


def test_ranks_compare_the_file_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longfactory.config import from_mapping

    path = tmp_path / "rates.json"
    calibration.write(MEASURED, path)
    cfg = from_mapping(
        {
            "model_name_or_path": str(tmp_path),
            "stage": "pt",
            "finetuning_type": "full",
            "output_dir": "unused",
            "use_cpu": True,
            "dataset": "some",
        }
    )
    monkeypatch.setattr(agreement, "data_files", lambda options: [])
    name = f"{calibration.VARIABLE}, the file"
    assert name not in agreement.facts(cfg)
    monkeypatch.setenv(calibration.VARIABLE, str(path))
    before = agreement.facts(cfg)[name]
    path.write_text(path.read_text().replace("16", "17"))
    assert agreement.facts(cfg)[name] != before
