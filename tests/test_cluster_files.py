"""The files of examples/cluster: read by the tools' own parsers where those are installed, and what
they run are words that the command knows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from longfactory.config import from_mapping
from longfactory.config.read import read
from longfactory.config.translate import is_switch

pytestmark = pytest.mark.processes
# Not imported here: that sets variables of the environment for good.
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the package ray"
)

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time",
    "signal", "requeue", "open-mode", "output",
}  # fmt: skip
"""Options of sbatch that the script may have."""


def commands(text: str) -> list[str]:
    """The words after `longfactory train` in a script."""
    (line,) = [line for line in text.splitlines() if "longfactory train" in line and line[0] != "#"]
    return line.split("longfactory train", 1)[1].split()


def test_slurm() -> None:
    """The shell takes it, its options are sbatch's, and with a stand-in for srun each machine
    starts one command with its place.
    """
    path = FOLDER / "slurm.sbatch"
    text = path.read_text()
    options = re.findall(r"^#SBATCH --([a-z-]+)", text, flags=re.M)
    assert set(options) <= SBATCH and "ntasks-per-node" in options
    assert re.search(r"^#SBATCH --ntasks-per-node=1$", text, flags=re.M)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("status", [0, 75, 3])
def test_slurm_starts_each_machine_and_goes_on_after_a_stop(status: int, tmp_path: Path) -> None:
    stand_ins = {
        "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> log; fi',
        "srun": 'shift; SLURM_NODEID=1 "$@"',
        "longfactory": f'echo "$NODE_RANK of $NNODES at $MASTER_ADDR: $@" >> log; exit {status}',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{Path(str(shutil.which('bash'))).parent}:/usr/bin:/bin",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "17",
    }
    done = subprocess.run(
        ["bash", FOLDER / "slurm.sbatch", "run.yaml", "seed=3"],
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    log = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == status
    assert log[0] == "1 of 2 at first: train run.yaml seed=3"
    assert log[1:] == (["requeue 17"] if status == 75 else [])


def keys_of(words: list[str]) -> None:
    """The words behind a file resolve."""
    given = read(["stage=sft", *words[1:]], is_switch)
    run = {"model_name_or_path": "m", "dataset": "d", "dry_run": True, "output_dir": "o", **given}
    from_mapping(run, world_size=16)


def test_kubeflow() -> None:
    """The models that Kubeflow Trainer generates from its schema take it."""
    given = yaml.safe_load((FOLDER / "kubeflow_trainjob.yaml").read_text())
    (script,) = given["spec"]["trainer"]["args"]
    words = commands(script)
    assert words[0] == "/shared/run.yaml"
    keys_of(words)
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = models.TrainerV1alpha1TrainJob.from_dict(given)
    assert job.spec.trainer.num_nodes == 2 and job.spec.runtime_ref.name == "torch-distributed"
    read_back = job.to_dict()["spec"]["trainer"]
    assert set(read_back) == set(given["spec"]["trainer"])


def test_skypilot() -> None:
    given = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    known = {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run"}
    assert set(given) == known
    keys_of(commands(given["run"]))
    assert subprocess.run(["bash", "-n", "-c", given["run"]], check=False).returncode == 0
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(given, schemas.get_task_schema())
    resources = given["resources"]
    jsonschema.validate(resources, schemas.get_resources_schema())


def test_ray_machines() -> None:
    """Workers by machine, neighbours together, that of the first worker first."""
    from longfactory.errors import UserError
    from longfactory.ray_launch import by_machine

    found = [("b", "10.0.0.2", ["0"]), ("a", "10.0.0.1", ["3"]), ("b", "10.0.0.2", ["1"])]
    with pytest.raises(UserError, match=r"Ray placed 2 on 10\.0\.0\.2, 1 on 10\.0\.0\.1"):
        by_machine(found)
    assert by_machine([*found, ("a", "10.0.0.1", ["2"])]) == [
        ("10.0.0.2", [0, 2], ["0", "1"]),
        ("10.0.0.1", [1, 3], ["3", "2"]),
    ]


def on_ray(folder: Path, **changes: Any) -> subprocess.CompletedProcess[str]:
    """A run of two processes that share each sequence, started by Ray on this machine."""
    from small_runs import write_model

    write_model(folder / "model", 0)
    rows = [{"input_ids": list(range(3, 40 + i)), "mask": [0] + [1] * (36 + i)} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "model_name_or_path": folder / "model",
        "stage": "rl",
        "rl_loss": "nll",
        "dataset": folder / "rows.jsonl",
        "finetuning_type": "full",
        "output_dir": folder / "out",
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "sequence_parallel_size": 2,
        "ray_num_workers": 2,
        "ray_init_kwargs": json.dumps({"num_cpus": 2, "include_dashboard": False}),
        **changes,
    }
    return subprocess.run(
        [sys.executable, "-m", "longfactory.cli", "train", *(f"{k}={v}" for k, v in words.items())],
        env={**os.environ, "USE_RAY": "1", "LONGFACTORY_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@needs_ray
def test_ray_runs_two_workers(tmp_path: Path) -> None:
    done = on_ray(tmp_path, placement_strategy="STRICT_PACK")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runs 2 workers (machine 1 of 1, found by Ray)" in done.stderr
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


@pytest.mark.slow
@needs_ray
def test_ray_gives_the_status_of_a_run_that_fails(tmp_path: Path) -> None:
    """Its reason is in the command's own output."""
    (tmp_path / "bad.jsonl").write_text('{"input_ids": "no ids"}\n')
    done = on_ray(tmp_path, dataset=tmp_path / "bad.jsonl")
    assert done.returncode not in (0, None)
    said = done.stdout + done.stderr
    assert "bad.jsonl" in said.split("found by Ray)", 1)[1], said[-3000:]
