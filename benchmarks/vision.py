"""Training steps of a vision-language model on long rows of images and of video, sharded over the
GPUs of one machine and on one GPU at the same local length.

    python benchmarks/vision.py --gpus 2 --out benchmarks/results

Qwen3-VL-8B's shape with random weights in bf16, fewer text layers (`--layers`), the whole tower,
which is frozen but for `--train-tower`. A step is one forward and one backward pass of a row: 32
images of 1024 x 1024 in 64k tokens, and a video of 512 frames of 512 x 1024 (131,072 tokens of
frames). Pixels are random and in host memory, as a loader gives them.

Ideal: a step of one GPU on a row of half the length with half the images, and attention scaled to
the whole length: each of n GPUs computes n times the attention of its own length, at the rate
measured in the same process. Beside it transformers' own forward and backward on one GPU, with its
own checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longfactory import sp
from longfactory.data.media.units import LoadedMedia, MediaReference, MediaUnit
from longfactory.data.row import Row, TokenizedDocument, make_row
from longfactory.memory.apply import apply_memory
from longfactory.memory.settings import MemorySettings
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.model.vision import RowImages
from longfactory.sp import hf, vision
from longfactory.sp.text_model import decoder_layers

ROOT = Path(__file__).resolve().parent.parent

TEXT = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
    },
}
TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
SMALL_TEXT = TEXT | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
SMALL_TOWER = TOWER | {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}


def make_config(layers: int, small: bool) -> Any:
    from transformers.models.qwen3_vl import Qwen3VLConfig

    text, tower = (SMALL_TEXT, SMALL_TOWER) if small else (TEXT, TOWER)
    vocabulary = text["vocab_size"]
    return Qwen3VLConfig(
        text_config=text | {"num_hidden_layers": layers},
        vision_config=tower,
        image_token_id=vocabulary - 4,  # type: ignore[operator]
        video_token_id=vocabulary - 3,  # type: ignore[operator]
        tie_word_embeddings=False,
    )


def make_example(kind: str, share: int, small: bool, config: Any) -> Row:
    """A row of which one n-th (`share`) is taken: 32 images, or 256 pairs of frames."""
    draw = torch.Generator().manual_seed(0)
    side = 4 if small else 64
    count = (8 if small else 32) // share
    steps = (16 if small else 256) // share
    text = 24 if small else 1024
    ids: list[Tensor] = []
    units: list[MediaUnit] = []
    length = 0

    def add(tokens: Tensor) -> None:
        nonlocal length
        ids.append(tokens)
        length += len(tokens)

    def words(n: int) -> None:
        add(torch.randint(3, config.text_config.vocab_size - 8, (n,), generator=draw))

    if kind == "images":
        each = side * side // 4
        for i in range(count):
            words(text)
            units.append(_unit("image", i, (1, side, side), ((length, each),)))
            add(torch.full((each,), config.image_token_id))
    else:
        grid = (steps, side // 2, side)
        each = grid[1] * grid[2] // 4
        words(text)
        spans = []
        for _ in range(steps):
            words(8)  # a time stamp
            spans.append((length, each))
            add(torch.full((each,), config.video_token_id))
        units.append(_unit("video", 0, grid, tuple(spans)))
        words(text)
    tokens = torch.cat(ids).tolist()
    return make_row([TokenizedDocument(tokens, tokens, media=tuple(units))])


def _unit(
    kind: Any, number: int, grid: tuple[int, int, int], spans: tuple[tuple[int, int], ...]
) -> MediaUnit:
    reference = MediaReference(path=f"{kind}-{number}")
    return MediaUnit(kind, reference, grid, spans, steps=grid[0], seconds_per_step=None)


def load(row: Row, images: RowImages, patch: int, pin: bool) -> Row:
    """The row with random pixels of what this rank was dealt."""
    import dataclasses

    pixels = []
    for dealt in images.dealing(row):
        unit = row.media[dealt.unit]
        patches = (dealt.last - dealt.first) * unit.grid[1] * unit.grid[2]
        pixels.append(LoadedMedia(dealt, {"pixel_values": torch.rand(patches, patch)}))
    row = dataclasses.replace(row, pixels=tuple(pixels))
    return row.pin_memory() if pin else row


class Clock:
    """Seconds and peak memory of calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, call: Callable[[], Any], repeats: int) -> dict[str, float]:
        call()
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        self._wait()
        seconds = (time.perf_counter() - started) / repeats
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return {"seconds": seconds, "peak_gib": peak / 2**30}


def make_model(config: Any, attention: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=hf.of_text(config, attention)
        )
    return model.train()


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """One case on all processes that were started; the first one's numbers."""
    cuda = torch.cuda.is_available() and not args.smoke
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    ctx = sp.SequenceParallel.create(world, mode=args.mode, device_type=device.type)
    dtype = torch.bfloat16 if cuda else torch.float32
    config = make_config(args.layers, args.smoke)
    model = make_model(config, hf.ATTENTION, device, dtype)
    hf.prepare(model, ctx)
    vision.install(model)
    if not args.train_tower:
        model.model.visual.requires_grad_(False)
    head = TokenLogprobs(model)
    settings = MemorySettings(keep_attention=1.0, mlp_chunk=8192)
    apply_memory(model, settings, device)
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world,))
        for layer in decoder_layers(model)[1]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    images = RowImages(model, ctx)
    row = make_example(args.case, args.share, args.smoke, config)
    row = row.padded(sp.alignment(ctx) * (1 if args.smoke else 64), 0)
    vision_config = config.vision_config
    patch = 3 * vision_config.temporal_patch_size * vision_config.patch_size**2
    started = time.perf_counter()
    row = load(row, images, patch, cuda)
    loaded = time.perf_counter() - started
    host: list[float] = []

    def step() -> None:
        started = time.perf_counter()
        positions = images.positions(row).to(device, non_blocking=True)
        plan = sp.plan(len(row), images.segments(row), ctx)
        inputs = hf.inputs({"input_ids": row.input_ids.to(device), "position_ids": positions}, plan)
        inputs["sp_media"] = images.media(row, plan, device)
        host.append(time.perf_counter() - started)
        labels = row.labels[plan.index]
        with head.labels(labels):
            out = model(**inputs)
            loss = -head.outputs(out.logits).logps.sum() / row.trained_tokens
        (loss * ctx.size).backward()
        model.zero_grad(set_to_none=True)

    clock = Clock(device)
    found: dict[str, Any] = {
        "case": args.case,
        "gpus": world,
        "share": args.share,
        "tokens": len(row),
        **clock.measure(step, args.repeats),
    }
    found["tokens_per_s_gpu"] = len(row) / world / found["seconds"]
    found["host_seconds"] = sum(host[1:]) / max(1, len(host) - 1)
    found["make_pixels_seconds"] = loaded
    found["embeddings_gib"] = len(row) / world * config.text_config.hidden_size * 2 / 2**30
    if world == 1:
        media = images.media(row, sp.plan(len(row), images.segments(row), ctx), device)
        assert media is not None

        def tower() -> None:
            with torch.no_grad():
                for batch in media.batches:
                    vision.features_of(model, batch, device)

        found["tower_seconds"] = clock.measure(tower, 1)["seconds"]
        found["attention_seconds"] = args.layers * attention_seconds(len(row), config, ctx, clock)
    if world > 1:
        dist.barrier()
    return found


def attention_seconds(length: int, config: Any, ctx: Any, clock: Clock) -> float:
    """Forward and backward of one layer's attention over a whole row of one GPU."""
    text, device = config.text_config, clock.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plan = sp.plan(length, (sp.Segment(0, length),), ctx)
    heads = (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    tensors = [
        torch.randn(length, n, text.head_dim, device=device, dtype=dtype, requires_grad=True)
        for n in heads
    ]

    def run() -> None:
        out = sp.attention(*tensors, plan)
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    return clock.measure(run, 2)["seconds"]


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' own forward and backward on one GPU, with its own checkpointing."""
    cuda = torch.cuda.is_available() and not args.smoke
    device = torch.device("cuda") if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    config = make_config(args.layers, args.smoke)
    model = make_model(config, "sdpa", device, dtype)
    model.model.visual.requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    row = make_example(args.case, args.share, args.smoke, config)
    kind = row.media[0].kind
    patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    pixels = torch.rand(sum(u.patches for u in row.media), patch)
    kinds = torch.zeros_like(row.input_ids)
    for unit in row.media:
        for start, count in unit.spans:
            kinds[start : start + count] = 1 if kind == "image" else 2
    names = ("pixel_values", "image_grid_thw")
    if kind == "video":
        names = ("pixel_values_videos", "video_grid_thw")

    def step() -> None:
        out = model(
            input_ids=row.input_ids[None].to(device),
            mm_token_type_ids=kinds[None].to(device),
            labels=row.input_ids[None].to(device),
            use_cache=False,
            **{
                names[0]: pixels.to(device, dtype),
                names[1]: torch.tensor([u.grid for u in row.media], device=device),
            },
        )
        out.loss.backward()
        model.zero_grad(set_to_none=True)

    found: dict[str, Any] = {"case": args.case, "gpus": 1, "share": args.share, "peer": True}
    found |= {"tokens": len(row), **Clock(device).measure(step, args.repeats)}
    found["tokens_per_s_gpu"] = len(row) / found["seconds"]
    return found


def start(args: argparse.Namespace, case: str, gpus: int, share: int, peer: bool) -> dict[str, Any]:
    """One case in processes of its own; its error where it fails."""
    command = [sys.executable]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command += [__file__, "--worker", "--case", case, "--share", str(share)]
    command += ["--layers", str(args.layers), "--repeats", str(args.repeats), "--mode", args.mode]
    flags = (
        ("--peer", peer),
        ("--smoke", args.smoke),
        ("--train-tower", args.train_tower and not peer),
    )
    command += [flag for flag, on in flags if on]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=args.limit, env=environment
        )
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        if lines:
            return json.loads(lines[-1].removeprefix("RESULT "))
        error = (done.stderr or done.stdout).strip()
        reasons = [x for x in error.splitlines() if "Error" in x]
        reason = (reasons or error.splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired:
        reason, error = f"more than {args.limit} s", ""
    print(error[-3000:], file=sys.stderr, flush=True)
    return {"case": case, "gpus": gpus, "share": share, "peer": peer, "error": reason[:200]}


def table(rows: list[dict[str, Any]], header: str) -> str:
    out = [
        header,
        "",
        "| row | GPUs | tokens | s a step | tokens/s a GPU | of the ideal | peak GiB | embeddings GiB"
        " | tower s | attention s | host s |",
        "|" + "---|" * 11,
    ]
    base = {r["case"]: r for r in rows if r["gpus"] == 1 and not r.get("peer") and "error" not in r}
    for r in rows:
        name = f"{r['case']}, transformers' own" if r.get("peer") else r["case"]
        if "error" in r:
            out.append(f"| {name} | {r['gpus']} | failed: {r['error']} |" + " |" * 8)
            continue
        share = "-"
        if r["gpus"] > 1 and (one := base.get(r["case"])) is not None:
            ideal = one["seconds"] + (r["gpus"] - 1) * one["attention_seconds"]
            share = f"{ideal / r['seconds'] * r['tokens'] / r['gpus'] / one['tokens']:.2f}"
        cells = [
            name,
            r["gpus"],
            f"{r['tokens']:,}",
            f"{r['seconds']:.2f}",
            f"{r['tokens_per_s_gpu']:,.0f}",
            share,
            f"{r['peak_gib']:.1f}",
        ]
        for key in ("embeddings_gib", "tower_seconds", "attention_seconds", "host_seconds"):
            cells.append(f"{r[key]:.2f}" if key in r else "-")
        out.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="text layers, of 36")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--mode", default="zigzag-ring")
    parser.add_argument("--cases", nargs="*", default=["images", "video"])
    parser.add_argument("--peer-cases", nargs="*", default=["images"])
    parser.add_argument("--train-tower", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--limit", type=int, default=75, help="seconds for one case")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--case", default="images", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = peer(args) if args.peer else worker(args)
        if int(os.environ.get("RANK", "0")) == 0:
            print("RESULT " + json.dumps(found), flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    import transformers

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    trained = "tower trained" if args.train_tower else "tower frozen"
    header = (
        f"Qwen3-VL-8B's shape, {args.layers} of 36 text layers, {trained}, {args.mode},"
        f" {args.gpus} x {gpu}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    rows: list[dict[str, Any]] = []
    for case in args.cases:
        for gpus, share, is_peer in (
            (1, args.gpus, False),
            (args.gpus, 1, False),
            (1, args.gpus, True),
        ):
            if is_peer and case not in args.peer_cases:
                continue
            row = start(args, case, gpus, share, is_peer)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if not args.smoke:
                args.out.mkdir(parents=True, exist_ok=True)
                name = f"vision_{args.gpus}_gpus{'_tower' if args.train_tower else ''}"
                text = json.dumps({"header": header, "rows": rows}, indent=1)
                (args.out / f"{name}.json").write_text(text)
                (args.out / f"{name}.md").write_text(table(rows, header))
    print(table(rows, header), flush=True)


if __name__ == "__main__":
    main()
