"""`USE_RAY=1`: the run's machines are those on which Ray finds room for its workers.

Ray reserves a bundle for each worker (`ray_num_workers`, `resources_per_worker`,
`placement_strategy`); on every machine that has some, one of them runs the ordinary `longfactory
train` with its place among the machines. So everything behind that, restarts and stops included, is
as without Ray.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longfactory.errors import UserError

if TYPE_CHECKING:
    from longfactory.config import RunConfig

PASSED = (
    "LONGFACTORY_",
    "MAX_RESTARTS",
    "ALLOW_EXTRA_ARGS",
    "NCCL_",
    "TORCH_",
    "PYTHONPATH",
    "HF_",
)
"""Beginnings of the environment variables that machines are given from the command's own."""
WAIT = 600
"""Seconds in which Ray must find room."""


class Place:
    """On a machine: holds what was reserved, and runs the command. A Ray actor."""

    def where(self) -> tuple[str, str, list[str]]:
        """The machine's id, its address, and the GPUs that Ray gave this worker."""
        import ray

        context = ray.get_runtime_context()
        ids = [str(i) for i in ray.get_gpu_ids()]
        return context.get_node_id(), ray.util.get_node_ip_address(), ids

    def free_port(self) -> int:
        """A port that is free on this machine now."""
        with socket.socket() as s:
            s.bind(("", 0))
            return int(s.getsockname()[1])

    def run(self, words: Sequence[str], environment: dict[str, str], folder: str) -> int:
        """`longfactory train` with these words; its exit status."""
        command = [sys.executable, "-m", "longfactory.cli", "train", *words]
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, cwd=folder)
        return self.process.wait()

    def stop(self, number: int) -> None:
        """Passes a signal on."""
        process = getattr(self, "process", None)
        if process is not None and process.poll() is None:
            process.send_signal(number)


def start_on_ray(cfg: RunConfig, argv: Sequence[str]) -> int:
    """Runs `longfactory train` on the machines that Ray chooses, and returns the exit status: the
    first one that is not 0.

    Args:
        cfg: the run, for its ray keys.
        argv: the words of the command.
    Raises:
        UserError: Ray is not installed, has no room, or placed other numbers of workers on
            different machines.
    """
    try:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    except ImportError as error:
        raise UserError(
            'USE_RAY is set, and ray is not installed. Run: pip install "longfactory[ray]"'
        ) from error
    keys = cfg.parallel
    each = dict(keys.resources_per_worker or {"CPU" if cfg.trainer.use_cpu else "GPU": 1})
    ray.init(ignore_reinit_error=True, log_to_driver=True, **(keys.ray_init_kwargs or {}))
    group = placement_group([each] * keys.ray_num_workers, strategy=keys.placement_strategy)
    try:
        if not group.wait(WAIT):
            raise UserError(
                f"Ray has no resources for {keys.ray_num_workers} workers of {each} "
                f"({keys.placement_strategy}); it has {ray.cluster_resources()}. Set "
                "ray_num_workers or resources_per_worker."
            )
        kind = ray.remote(Place)
        places = [
            kind.options(  # type: ignore[attr-defined]
                num_cpus=each.get("CPU", 0),
                num_gpus=each.get("GPU", 0),
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=i
                ),
            ).remote()
            for i in range(keys.ray_num_workers)
        ]
        machines = by_machine(ray.get([p.where.remote() for p in places]))
        first = places[machines[0][1][0]]
        port = ray.get(first.free_port.remote())
        words = [w for w in argv if not w.lstrip("-").startswith("nproc_per_node=")]
        running = {}
        for rank, (address, numbers, gpus) in enumerate(machines):
            environment = {
                **{k: v for k, v in os.environ.items() if k.startswith(PASSED)},
                "USE_RAY": "0",
                "NNODES": str(len(machines)),
                "NODE_RANK": str(rank),
                "MASTER_ADDR": machines[0][0],
                "MASTER_PORT": str(port),
                **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            }
            mine = [*words, f"nproc_per_node={len(numbers)}"]
            place = places[numbers[0]]
            running[place.run.remote(mine, environment, os.getcwd())] = place
            print(
                f"longfactory: {address} runs {len(numbers)} workers (machine {rank + 1} of"
                f" {len(machines)}, found by Ray).",
                file=sys.stderr,
                flush=True,
            )
        return _ended(ray, running)
    finally:
        ray.util.remove_placement_group(group)
        ray.shutdown()


def by_machine(
    found: Sequence[tuple[str, str, list[str]]],
) -> list[tuple[str, list[int], list[str]]]:
    """(address, numbers of its workers, its GPUs) of each machine, that of the first worker first.

    Raises:
        UserError: machines have different numbers of workers.
    """
    machines: dict[str, tuple[str, list[int], list[str]]] = {}
    for number, (node, address, gpus) in enumerate(found):
        _, numbers, held = machines.setdefault(node, (address, [], []))
        numbers.append(number)
        held += gpus
    counts = {len(numbers) for _, numbers, _ in machines.values()}
    if len(counts) > 1:
        shown = ", ".join(f"{len(n)} on {address}" for address, n, _ in machines.values())
        raise UserError(
            f"Ray placed {shown}: every machine of a run has as many workers. Choose a"
            " ray_num_workers that fills machines, or placement_strategy: STRICT_PACK."
        )
    return list(machines.values())


def _ended(ray: Any, running: dict[Any, Any]) -> int:
    """Waits for all; signals go to every machine. The first status that is not 0."""

    def passed(number: int, frame: Any) -> None:
        for place in running.values():
            place.stop.remote(number)

    before = {n: signal.signal(n, passed) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    status = 0
    waiting = list(running)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            for reference in done:
                status = status or ray.get(reference)
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
