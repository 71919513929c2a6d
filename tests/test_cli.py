"""The command line as a person meets it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher import without_launcher
from longfactory import __version__, cli, launch
from longfactory.errors import ConfigError, UserError

pytestmark = pytest.mark.usefixtures("as_a_command")

RUN = ["model_name_or_path=m", "dataset=d", "output_dir=nowhere/out"]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    without_launcher(monkeypatch)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert all(f"longfactory {name}" in out for name in cli.COMMANDS)
        assert "sequence_parallel_size: 8" in out


def test_help_on_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "cutoff_len: 2048" in out and "learning_rate: 5e-05" in out
    assert cli.main(["train", "--help", "badam_mask_mode"]) == 0
    assert "badam_mask_mode is refused: entries that are drawn" in capsys.readouterr().out
    assert cli.main(["train", "--help", "evaluation_strategy"]) == 0
    assert "evaluation_strategy is another name of eval_strategy" in capsys.readouterr().out
    assert cli.main(["train", "--help", "no such thing"]) == 0
    assert "No key has" in capsys.readouterr().out
    assert cli.main(["verify", "--help"]) == 0
    out = capsys.readouterr().out
    assert "verify_rows=2" in out and "verify_tokens=2048" in out and "cutoff_len: 2048" in out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "longfactory plan run.yaml" in out and "--host-gib" in out


@pytest.mark.processes
def test_version_and_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "- torch " in out and "- transformers " in out and "cpu cores" in out


def test_plan_takes_its_words_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("longfactory.plan.command.main", lambda argv: given.append(argv) or 3)
    assert cli.main(["plan", "run.yaml", "bf16=true", "--gpus", "2"]) == 3
    assert cli.main(["plan", "--help"]) == 3
    assert given == [["run.yaml", "bf16=true", "--gpus", "2"], ["--help"]]


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert (
        "no command 'trian'. It has init, train, plan, verify, teach, eval, export"
        in capsys.readouterr().err
    )
    assert cli.main(["dpo", "run.yaml"]) == 2  # a command of LLaMA-Factory's v1
    assert "To train this stage: longfactory train ... stage=dpo." in capsys.readouterr().err


def test_dry_run_prints_the_run_and_stops(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_look", lambda cfg: [])  # tests/test_dry_run.py
    words = [
        "train",
        *RUN,
        "sequence_parallel_size=2",
        "nproc_per_node=4",
        "flash_attn=fa2",
        "--dry_run",
    ]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert "# processes: 4 = 2 groups x sequence_parallel_size 2" in out
    assert yaml.safe_load(out)["model_name_or_path"] == "m"
    assert out.splitlines()[-1].startswith("# No problem was found.")
    assert err.startswith("note: flash_attn: fa2 has no effect")
    assert not Path("nowhere").exists()
    assert cli.main([*words, "nproc_per_node=3"]) == 2
    assert "does not divide the 3 processes" in capsys.readouterr().err


def test_more_parallel_than_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "device_count", lambda: 0)
    assert cli.main(["train", *RUN, "sequence_parallel_size=2"]) == 2
    assert "or nproc_per_node: 2 (on a machine without GPUs)" in capsys.readouterr().err


@pytest.mark.processes
def test_errors_are_one_message_without_a_stack_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longfactory.cli", "train", *RUN, "stage=sftt"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("longfactory: stage: 'sftt' is not a choice.")
        and done.stderr.count("\n") == 1
    )
    env = {**os.environ, "LONGFACTORY_DEBUG": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "longfactory.cli", "train", *RUN, "stage=sftt"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_only_the_first_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setattr(cli, "die_with_parent", lambda: None)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cli.main(["train", *RUN, "stage=sftt"]) == 2
    # The second process waits to be ended, and speaks only if it lives.
    assert waits == [3]
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("longfactory: stage:") and second.startswith(
        "longfactory: Process 1: stage:"
    )


def test_a_worker_does_not_start_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    ran: list[object] = []
    module = types.ModuleType("longfactory.train.run")
    module.run = lambda cfg, watch: ran.append(cfg)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "longfactory.train.run", module)
    monkeypatch.setattr(cli, "die_with_parent", lambda: None)
    monkeypatch.setattr(launch, "start", lambda *words, **limits: pytest.fail("started again"))
    for name, value in (
        ("LOCAL_RANK", "0"),
        ("RANK", "0"),
        ("WORLD_SIZE", "4"),
        ("NPROC_PER_NODE", "4"),
    ):
        monkeypatch.setenv(name, value)
    assert cli.main(["train", *RUN, "sequence_parallel_size=2", "--local_rank=0"]) == 0
    assert len(ran) == 1


def test_several_processes_go_through_torchrun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, list[str], int]] = []
    out = tmp_path / "out"

    def start(module: str, argv: list[str], local: int, **limits: object) -> int:
        calls.append((module, argv, local))
        assert (out / "_longfactory.lock").is_file()
        return 5

    monkeypatch.setattr(launch, "device_count", lambda: 0)
    monkeypatch.setattr(launch, "start", start)
    words = [*RUN, f"output_dir={out}", "nproc_per_node=2"]
    assert cli.main(["train", *words]) == 5
    assert calls == [("longfactory.cli", ["train", *words], 2)]
    assert not out.exists()  # it was made for the lock alone


@pytest.mark.processes
def test_an_error_in_two_processes_is_told_once(tmp_path: Path) -> None:
    """Through torchrun itself: an error that only the workers can find."""
    (tmp_path / "longfactory_failing.py").write_text(
        "import sys, types\n"
        "from longfactory import cli\nfrom longfactory.errors import UserError\n"
        "def run(cfg, watch): raise UserError('the data set is empty. Give another.')\n"
        "module = types.ModuleType('longfactory.train.run'); module.run = run\n"
        "sys.modules['longfactory.train.run'] = module\n"
        f"sys.exit(cli.main(['train', *{RUN!r}]))\n"
    )
    code = (
        "import sys; from longfactory import launch;"
        " sys.exit(launch.start('longfactory_failing', [], 2))"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.count("the data set is empty. Give another.") == 1
    assert "Traceback" not in done.stderr


def test_config_errors_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError) and issubclass(ConfigError, ValueError)


@pytest.mark.processes
def test_training_by_path() -> None:
    script = Path(__file__).parents[1] / "src" / "train.py"
    done = subprocess.run(
        [sys.executable, str(script), "--model_name_or_path", "m"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "output_dir is missing" in done.stderr and "dataset is missing" in done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), "/out/x: No space left"),
        (OSError(errno.EROFS, "Read-only file system", "/out"), "/out: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "/c"), "/c: Permission denied"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "Make room"),
    ],
)
def test_a_disk_is_told_without_a_stack_trace(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fails)
    assert cli.main(["train"]) == 2
    assert words in capsys.readouterr().err
    monkeypatch.setenv("LONGFACTORY_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["train"])


def test_other_errors_keep_their_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(argv: list[str]) -> int:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setitem(cli.COMMANDS, "train", fails)
    with pytest.raises(ConnectionRefusedError):
        cli.main(["train"])


def test_verify_reads_no_predictable_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever another user has put into the system's temporary folder."""
    seen = []
    monkeypatch.setattr(cli, "_start", lambda command, cfg, argv: seen.append(cfg) or 0)
    given = [f"model_name_or_path={tmp_path}", "dataset=d"]
    assert cli.main(["verify", *given]) == 0
    out = seen[0].output_dir
    assert not out.exists() and not out.parent.is_dir()
    with pytest.raises(OSError):
        out.mkdir(parents=True)
