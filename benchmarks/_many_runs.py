"""Several runs of LongFactory's commands, one after another in the same processes, so that a GPU does
not wait for Python to start.

    torchrun --nproc_per_node 4 benchmarks/_many_runs.py JOBS.json
    python benchmarks/_many_runs.py JOBS.json           # one process
    python benchmarks/_many_runs.py JOBS.json FILE      # begins when there is such a file

Run by `many_gpus.py`. A job is {"name", "command", "words"}: each process calls what
`longfactory COMMAND WORDS...` calls in it. The first process prints a line `RESULT {...}` after each.
A run that fails ends all: other processes may wait for it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> int:
    import longfactory.train.run  # noqa: F401  what a run imports, before the GPUs are free
    from longfactory import cli

    while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.1)
    commands = {"train": cli.train, "verify": cli.verify}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        begun = time.time()
        try:
            commands[job["command"]](job["words"])
            found = {}
        except BaseException as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        sys.stderr.flush()
        if "error" in found or os.environ.get("RANK", "0") == "0" or not LAUNCHED:
            found |= {"name": job["name"], "seconds": time.time() - begun}
            print("RESULT " + json.dumps(found), flush=True)
        if "error" in found:
            os._exit(1)
        forget()
    return 0


def forget() -> None:
    """What a run leaves in its process."""
    if dist.is_initialized() and not LAUNCHED:
        dist.destroy_process_group()
        for name in OF_A_GROUP:
            os.environ.pop(name, None)
    torch._dynamo.reset()  # functions compiled for other shapes count towards its limit
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    sys.exit(main())
