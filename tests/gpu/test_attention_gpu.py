"""The engine on GPUs: every backend's contract, the fused merge, and the schedules over NCCL.
bfloat16 against float64.
"""

from __future__ import annotations

import time

import pytest
import torch

from longfactory import sp
from longfactory.sp import Segment, backends
from longfactory.sp.backends import start
from longfactory.sp.measure import Measure
from longfactory.sp.merge import merge_
from longfactory.sp.tiles import Tile
from longfactory.testing import run_ranks
from plain_attention import context, random_inputs
from simulated_ring import relative_rms, simulated_ring

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # a first call compiles kernels
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

SQUARE = slice(0, 512)
TILES = {
    "full": Tile(slice(0, 256), SQUARE, "full"),
    "causal": Tile(SQUARE, SQUARE, "causal"),
    "varlen": Tile(SQUARE, SQUARE, "varlen", (0, 1, 200, 512)),
    "causal window": Tile(SQUARE, SQUARE, "causal", window=100),
    "varlen window": Tile(SQUARE, SQUARE, "varlen", (0, 100, 512), window=60),
    "window, more keys": Tile(slice(0, 256), SQUARE, "full", window=70),
    "window, equal sides": Tile(slice(0, 256), slice(0, 256), "full", window=0),
    "odd rectangle": Tile(slice(0, 77), slice(0, 333), "full"),
}
SHAPES = {
    "GQA 128": (28, 4, 128, 128),
    "MHA 64": (4, 4, 64, 64),
    "MQA 20": (4, 1, 20, 20),
    "MLA": (4, 4, 192, 128),
    "256": (4, 2, 256, 256),
}


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "name", ["fa4", "flash3", "cudnn", "flash2", "flash", "efficient", "triton"]
)
def test_backend_contract(name: str, tile: str, shape: str, softcap: float | None) -> None:
    heads, kv_heads, dim, v_dim = SHAPES[shape]
    t, backend, exact = TILES[tile], backends.BACKENDS[name], backends.BACKENDS["math"]
    aligned = t.q_len % 128 == 0 and t.k_len % 128 == 0
    request = backends.Request(
        "cuda",
        torch.bfloat16,
        dim,
        v_dim,
        t.kind,
        t.window is not None,
        softcap is not None,
        aligned,
    )
    reason = backend.refuses(request)
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    q, _, _, dout = (
        x.cuda() for x in random_inputs(t.q_len, heads, kv_heads, dim, v_dim, torch.bfloat16)
    )
    _, k, v, _ = (
        x.cuda()
        for x in random_inputs(t.k_len, heads, kv_heads, dim, v_dim, torch.bfloat16, seed=1)
    )
    scale = dim**-0.5
    out, lse = backend.forward(q, k, v, t, scale, softcap)
    wide = [x.double() for x in (q, k, v)]
    true_out, true_lse = exact.forward(*wide, t, scale, softcap)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
        dout.shape,
        torch.bfloat16,
        (heads, t.q_len),
        torch.float32,
    )
    assert (lse - true_lse).abs().max() <= 2e-3
    # The tile is a part of a mask: as much probability lies outside of it as inside.
    whole, whole_out = lse + 0.6931, out * 0.5
    found = [out, *backend.backward(dout, q, k, v, whole_out, whole, t, scale, softcap)]
    expected = [
        true_out,
        *exact.backward(
            dout.double(), *wide, whole_out.double(), true_lse + 0.6931, t, scale, softcap
        ),
    ]
    assert max(relative_rms(found, expected)) <= 8e-3, relative_rms(found, expected)


FLOAT32_SHAPES = {**SHAPES, "odd": (6, 3, 20, 12), "over 256": (2, 1, 320, 320)}


@pytest.mark.parametrize("shape", FLOAT32_SHAPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", ["efficient", "math"])
def test_float32_contract(name: str, tile: str, shape: str) -> None:
    """The kernels that float32 has, against float64, with a part of the mask's probability outside
    of the tile.
    """
    heads, kv_heads, dim, v_dim = FLOAT32_SHAPES[shape]
    t, backend, exact = TILES[tile], backends.BACKENDS[name], backends.BACKENDS["math"]
    request = backends.Request(
        "cuda", torch.float32, dim, v_dim, t.kind, t.window is not None, False, False
    )
    reason = backend.refuses(request) or backends.failure(name, request)
    if t.window is None:
        assert reason is None, reason
    elif reason is not None:
        pytest.skip(f"{name} {reason}")
    q, _, _, dout = (
        x.cuda() for x in random_inputs(t.q_len, heads, kv_heads, dim, v_dim, torch.float32)
    )
    _, k, v, _ = (
        x.cuda() for x in random_inputs(t.k_len, heads, kv_heads, dim, v_dim, torch.float32, seed=1)
    )
    out, lse = backend.forward(q, k, v, t, dim**-0.5, None)
    wide = [x.double() for x in (q, k, v)]
    true_out, true_lse = exact.forward(*wide, t, dim**-0.5, None)
    assert (out.dtype, lse.shape, lse.dtype) == (torch.float32, (heads, t.q_len), torch.float32)
    assert (lse - true_lse).abs().max() <= 1e-4
    whole, whole_out = lse + 0.6931, out * 0.5
    found = [out, *backend.backward(dout, q, k, v, whole_out, whole, t, dim**-0.5, None)]
    expected = [
        true_out,
        *exact.backward(
            dout.double(), *wide, whole_out.double(), true_lse + 0.6931, t, dim**-0.5, None
        ),
    ]
    assert max(relative_rms(found, expected)) <= 2e-5, relative_rms(found, expected)


def test_float32_needs_no_memory_of_the_square_of_the_row() -> None:
    """16k tokens, 8 heads: scores would be 8 GiB. The efficient kernel and the plain formulas in
    blocks take less than 1 GiB.
    """
    rows = 16384
    square = Tile(slice(0, rows), slice(0, rows), "causal")
    q, k, v, dout = (x.cuda() for x in random_inputs(rows, 8, 2, 64, dtype=torch.float32))
    assert backends.select("auto", square, q, v, None) is backends.BACKENDS["efficient"]
    results = []
    for name in ("efficient", "math"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = backends.BACKENDS[name].forward(q, k, v, square, 0.125, None)
        results.append(
            [out, *backends.BACKENDS[name].backward(dout, q, k, v, out, lse, square, 0.125, None)]
        )
        assert torch.cuda.max_memory_allocated() - before <= 2**30
    assert max(relative_rms(*results)) <= 2e-5


def test_every_kernel_of_a_model_passes_its_self_test() -> None:
    """None of PyTorch's own operators is refused by its self-test on this GPU: a kernel too strict
    to be used would be slow silently.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dims in ((128, 128), (64, 64), (80, 80), (256, 256), (192, 128)):
            for request in start.requests_of("cuda", dtype, [dims], windows=True, softcap=False):
                for name in ("cudnn", "flash", "efficient"):
                    if backends.BACKENDS[name].refuses(request) is None:
                        assert backends.failure(name, request) is None
    for line in start.lines(
        "auto", start.requests_of("cuda", torch.bfloat16, [(128, 128)], windows=True, softcap=False)
    ):
        print(line)


def test_automatic_choice_serves_every_tile() -> None:
    for tile in TILES.values():
        for heads, _, dim, v_dim in SHAPES.values():
            q = torch.zeros(tile.q_len, heads, dim, dtype=torch.bfloat16, device="cuda")
            v = torch.zeros(tile.k_len, heads, v_dim, dtype=torch.bfloat16, device="cuda")
            assert backends.select("auto", tile, q, v, None) is not backends.BACKENDS["math"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [20, 128])
def test_fused_merge_is_the_plain_one(dtype: torch.dtype, dim: int) -> None:
    g = torch.Generator().manual_seed(0)
    out, block = (
        torch.randn(333, 3, dim, generator=g).to(dtype),
        torch.randn(300, 3, dim, generator=g).bfloat16(),
    )
    lse, block_lse = torch.randn(3, 333, generator=g), torch.randn(3, 300, generator=g)
    lse[0, 20] = block_lse[1, 5] = lse[1, 18] = -torch.inf
    block_lse[1, 1] = -torch.inf
    fused, fused_lse = out.cuda(), lse.cuda()
    merge_(fused[13:313], fused_lse[:, 13:313], block.cuda(), block_lse.cuda())
    merge_(out[13:313], lse[:, 13:313], block, block_lse)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(fused.cpu().float(), out.float(), rtol=0, atol=tolerance)
    torch.testing.assert_close(fused_lse.cpu(), lse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_merge_is_repeatable(dtype: torch.dtype) -> None:
    """Many blocks at once, many times: a write that overtakes another warp's read shows as a
    different bit now and then.
    """
    g = torch.Generator(device="cuda").manual_seed(0)
    out = torch.randn(16384, 28, 128, device="cuda", generator=g).to(dtype)
    block = torch.randn(16384, 28, 128, device="cuda", generator=g).bfloat16()
    lse, block_lse = torch.randn(2, 28, 16384, device="cuda", generator=g) * 3
    weight = torch.sigmoid(block_lse - lse).t()[..., None]
    expected = torch.lerp(out.float(), block.float(), weight)
    for _ in range(20):
        fused, fused_lse = out.clone(), lse.clone()
        merge_(fused, fused_lse, block, block_lse)
        torch.testing.assert_close(
            fused.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 4e-2
        )
        torch.testing.assert_close(fused_lse, torch.logaddexp(lse, block_lse), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 32])
def test_error_of_a_ring_simulated_on_one_gpu(ranks: int) -> None:
    q, k, v, dout = (x.cuda() for x in random_inputs(8192, 8, 2, 128, dtype=torch.bfloat16))
    exact = simulated_ring(1, q.double(), k.double(), v.double(), dout.double())
    one = relative_rms(simulated_ring(1, q, k, v, dout), exact)
    many = relative_rms(simulated_ring(ranks, q, k, v, dout), exact)
    assert all(m <= 1.25 * o for m, o in zip(many, one, strict=True)), (many, one)


def test_a_last_document_that_is_padded_is_as_exact_as_one_call_for_all() -> None:
    """3,000 tokens at the end of the row: cuDNN has 3,072 of them."""
    segments = [Segment(0, 500), Segment(500, 3500)]
    tensors = [x.cuda() for x in random_inputs(3500, 28, 4, 128, dtype=torch.bfloat16)]

    def run(backend: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        plan = sp.plan(3500, segments, sp.SequenceParallel(device_type="cuda", backend=backend))
        *leaves, dout = (x.clone().requires_grad_() for x in tensors)
        out = sp.attention(*leaves, plan)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    exact = run("math", [x.double() for x in tensors])
    one, many = (relative_rms(run(name, tensors), exact) for name in ("flash", "auto"))
    assert all(m <= 1.25 * o for m, o in zip(many, one, strict=True)), (many, one)


def schedule_errors(
    mode: str, heads: int, kv_heads: int, window: int | None, packed: bool
) -> tuple[list[float], list[float], bool]:
    """Relative errors of the schedule and of one GPU, and whether a second run has the same output
    to the last bit.
    """
    ctx = context(mode, heads=heads, kv=kv_heads)
    assert ctx.device_type == "cuda"
    length = 4096
    segments = [Segment(0, 1500), Segment(1500, 1501), Segment(1501, length)] if packed else None
    tensors = [x.cuda() for x in random_inputs(length, heads, kv_heads, 128, dtype=torch.bfloat16)]
    alone = sp.plan(length, segments, sp.SequenceParallel(device_type="cuda"))
    plan = sp.plan(length, segments, ctx)

    def run(plan: sp.RowPlan, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        q, k, v, dout = (sp.shard(x, plan) for x in tensors)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = sp.attention(*leaves, plan, window=window)
        return [sp.gather(x, plan) for x in (out.detach(), *torch.autograd.grad(out, leaves, dout))]

    exact = run(alone, [x.double() for x in tensors])
    many = run(plan, tensors)
    again = run(plan, tensors)
    return (
        relative_rms(many, exact),
        relative_rms(run(alone, tensors), exact),
        torch.equal(many[0], again[0]),
    )


@two_gpus
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("heads", [(28, 4), (8, 1), (8, 8)])
@pytest.mark.parametrize("mode", ["zigzag-ring", "ulysses", "llama3", "auto"])
def test_schedules_over_two_gpus(
    mode: str, heads: tuple[int, int], window: int | None, packed: bool
) -> None:
    for many, one, same in run_ranks(
        2, schedule_errors, mode, *heads, window, packed, timeout=500, process_group="nccl"
    ):
        assert all(m <= 1.25 * o for m, o in zip(many, one, strict=True)), (many, one)
        assert same


def measured_choice() -> tuple[object, float]:
    """What `auto` keeps for a row after it has timed the schedules, and the seconds that this took."""
    ctx = context("auto", heads=28, kv=4)
    measure = Measure(
        ctx, 128, 128, torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    )
    began = time.perf_counter()
    measure(16384, [Segment(0, 10000), Segment(10000, 16384)])
    (kept,) = ctx.measured.values()
    return kept, time.perf_counter() - began


@two_gpus
def test_auto_measures_and_all_ranks_agree() -> None:
    answers = run_ranks(2, measured_choice, timeout=500, process_group="nccl")
    assert len({kept for kept, _ in answers}) == 1
    assert max(seconds for _, seconds in answers) <= 60
