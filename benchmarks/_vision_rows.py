"""What `vision.py` measures in processes that stay: runs of `longfactory train`, attention's
seconds on one GPU, transformers' own loop.
"""

from __future__ import annotations

import collections
import gc
import logging
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ATTENTION_ROWS = 2


class _Said(logging.Handler):
    """What a run says, and after how many seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = time.time()
        self.lines: list[str] = []
        self.after: list[tuple[float, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.lines.append(message)
        self.note(message)

    def note(self, message: str) -> None:
        self.after.append((time.time() - self.begun, message.strip().split("\n")[0][:60]))


class _Watch:
    """In what functions this thread is, asked four times a second: where a run's start goes."""

    def __init__(self) -> None:
        self.found: collections.Counter[str] = collections.Counter()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._ask, args=(threading.get_ident(),), daemon=True)
        self.thread.start()

    def _ask(self, of: int) -> None:
        while not self.over.wait(0.25):
            frame = sys._current_frames().get(of)
            name = ""
            while frame is not None:
                code = frame.f_code
                if any(part in code.co_filename for part in _TELLING):
                    own = Path(code.co_filename)
                    name = f"{own.parent.name}/{own.stem}.{code.co_name}"
                    break
                frame = frame.f_back
            self.found[name] += 1

    def end(self) -> list[tuple[float, str]]:
        """(seconds, function), those of most first."""
        self.over.set()
        self.thread.join()
        return [(count / 4, f"in {name}") for name, count in self.found.most_common(14)]


_TELLING = ("/longfactory/", "/torch/_dynamo/", "/torch/_inductor/", "/torch/utils/data/")


def _prepare() -> None:
    """Before a row: this process may have loader processes, and holds nothing of the last row."""
    import torch
    import torch.distributed as dist

    multiprocessing.set_start_method("fork", force=True)  # as in a process of the command
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else a second row's lengths are compiled as lengths of any size
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tokenise(words: list[str], cache: str) -> str:
    """Imports what rows need, and tokenises a run's data into the cache, as the run itself would."""
    import peft  # noqa: F401
    import transformers.models.qwen3_vl  # noqa: F401

    from longfactory.config import load_config
    from longfactory.model import load
    from longfactory.train.prepare import load_data

    _prepare()
    os.environ["LONGFACTORY_CACHE"] = cache
    cfg = load_config(words)
    load_data(cfg, load.load_tokenizer(cfg.model))
    return "ready"


class Turns(NamedTuple):
    """Of a run that starts while another one runs: after its first step it makes the file `ready`,
    and waits for the file `go` before the steps that are timed, at most `limit` seconds.
    """

    ready: str
    go: str
    limit: float

    def callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        turns = self

        class Wait(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step != 1:
                    return
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                Path(turns.ready).touch()
                begun = time.time()
                while not Path(turns.go).exists() and time.time() - begun < turns.limit:
                    time.sleep(0.05)

        return Wait()


def train(
    words: list[str], cache: str, turns: Turns | None = None
) -> tuple[str, list[tuple[float, str]]]:
    """What every process of `longfactory train` calls. Returns what its run said, and when."""
    from longfactory.config import load_config
    from longfactory.train import run as module
    from longfactory.train.loader import end_processes

    _prepare()
    os.environ["LONGFACTORY_CACHE"] = cache
    make_trainer = module.make_trainer
    if turns is not None:

        def waiting(*args: Any, **kwargs: Any) -> Any:
            trainer = make_trainer(*args, **kwargs)
            trainer.add_callback(turns.callback())
            return trainer

        module.make_trainer = waiting
    said = _Said()
    watch = _Watch()
    logger = logging.getLogger("longfactory")
    logger.addHandler(said)
    try:
        module.run(load_config(words))
    finally:
        module.make_trainer = make_trainer
        logger.removeHandler(said)
        end_processes()
        said.note("end")
        said.after += watch.end()
    return "\n".join(said.lines), said.after


def measured(call: Callable[[], Any], repeats: int, device: Any) -> tuple[float, float]:
    """Seconds of a call after one that is not counted, and GiB that it took at most."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    seconds = (time.perf_counter() - started) / repeats
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return seconds, peak / 2**30


def _device(smoke: bool) -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and not smoke else "cpu")


def attention(model: str, length: int, smoke: bool) -> dict[str, float]:
    """Seconds of the attention of all layers over a row of `length` on one GPU."""
    import torch
    from transformers import AutoConfig

    from longfactory import sp

    _prepare()
    device = _device(smoke)
    text = AutoConfig.from_pretrained(model).text_config
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ctx = sp.SequenceParallel.create(1, device_type=device.type)
    plan = sp.plan(length, (sp.Segment(0, length),), ctx)
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    q, k, v = (torch.randn(length, n, text.head_dim, device=device, dtype=dtype) for n in heads)
    out, lse = sp.attention_forward(q, k, v, plan)
    calls = {
        "forward": lambda: sp.attention_forward(q, k, v, plan),
        "backward": lambda: sp.attention_backward(out, q, k, v, out, lse, plan),
    }
    found: dict[str, float] = {"length": length}
    for name, call in calls.items():
        seconds = measured(call, ATTENTION_ROWS, device)[0]
        found[name] = text.num_hidden_layers * seconds
    return found


def tower(model: str, side: tuple[int, int], video: bool, smoke: bool) -> dict[str, float]:
    """Seconds of a frozen tower on a batch of images of `side` (width, height), on one GPU."""
    import torch
    from transformers import AutoConfig
    from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration

    from longfactory.sp import vision

    _prepare()
    device = _device(smoke)
    config = AutoConfig.from_pretrained(model)
    config.text_config.num_hidden_layers = 1
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        made: Any = Qwen3VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    grid = (1, side[1] // 16, side[0] // 16)
    each = grid[1] * grid[2]
    number = max(1, (512 if smoke else vision.BATCH) // each)
    pixels = torch.rand(each, 3 * 2 * 16 * 16)
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    images = [vision.Images("video" if video else "image", grid, pixels)] * number

    def run() -> None:
        with torch.no_grad():
            vision.families.grid_features(vision.base_of(made), images, device)

    seconds = measured(run, 4, device)[0]
    return {"patches": number * each, "seconds": seconds}


def peer(
    model: str,
    video: bool,
    pictures: int,
    side: tuple[int, int],
    tokens: int,
    steps: int,
    smoke: bool,
) -> dict[str, Any]:
    """transformers' own forward and backward of a row on one GPU, with PEFT's adapters.

    Args:
        pictures, side: of the row, width and height.
        tokens: of the row, about.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig
    from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration

    _prepare()
    device = _device(smoke)
    config = AutoConfig.from_pretrained(model)
    config.use_cache = False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        made: Any = Qwen3VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    maps = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    made = get_peft_model(made, LoraConfig(r=8, target_modules=maps))
    made.train()
    made.gradient_checkpointing_enable({"use_reentrant": False})
    made.enable_input_require_grads()
    each = side[0] * side[1] // 32**2
    parts = pictures // 2 if video else pictures
    between = max(1, tokens // parts - each)
    begun = parts
    while True:
        step = _own_step(made, config, device, dtype, video, parts, side, between)
        try:
            seconds, peak = measured(step, max(1, steps - 2), device)
            break
        except torch.OutOfMemoryError as error:
            # Half of the row, as often as it must be.
            if parts < begun // 2 or parts < 2:
                said = re.sub(r"\s+", " ", str(error))[:120]
                return {"error": f"{parts * (each + between):,} tokens: out of memory: {said}"}
            print(
                f"transformers' own: {parts * (each + between):,} tokens: out of memory", flush=True
            )
            parts //= 2
        del step
        gc.collect()
        torch.cuda.empty_cache()
    length = parts * (each + between)
    found = {
        "tokens": length,
        "seconds": seconds,
        "tokens_per_s_gpu": length / seconds,
        "peak_gib": peak,
    }
    if parts < begun:
        found["settings"] = f"of {begun * (each + between):,} tokens it runs out of memory"
    return found


def _own_step(
    made: Any,
    config: Any,
    device: Any,
    dtype: Any,
    video: bool,
    parts: int,
    side: tuple[int, int],
    between: int,
) -> Callable[[], None]:
    """Forward and backward of a row of `parts` images or pairs of frames, with `between` tokens of
    text before each.
    """
    import torch

    rows, columns = (length // 16 for length in reversed(side))
    each = rows * columns // 4
    token = config.video_token_id if video else config.image_token_id
    ids = torch.cat(
        [
            x
            for _ in range(parts)
            for x in (torch.randint(7, 263, (between,)), torch.full((each,), token))
        ]
    )
    kinds = (ids == token).long() * (2 if video else 1)
    pixels = torch.rand(parts * rows * columns, 3 * 2 * 16 * 16)
    grid = [[parts, rows, columns]] if video else [[1, rows, columns]] * parts
    name = (
        ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    )

    def step() -> None:
        out = made(
            input_ids=ids[None].to(device),
            mm_token_type_ids=kinds[None].to(device),
            labels=ids[None].to(device),
            use_cache=False,
            **{name[0]: pixels.to(device, dtype), name[1]: torch.tensor(grid, device=device)},
        )
        out.loss.backward()
        made.zero_grad(set_to_none=True)

    return step
