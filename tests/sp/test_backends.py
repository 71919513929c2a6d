"""One contract for every backend that runs here: log-sum-exp, gradients from the whole row's out
and lse, refusals.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longfactory import config, kernel_names
from longfactory.sp import SequenceParallel, backends, hf
from longfactory.sp.backends import operators, start
from longfactory.sp.backends.installed import Installed
from longfactory.sp.backends.selftest import tile_for
from longfactory.sp.merge import merge_
from longfactory.sp.tiles import Tile
from longfactory.testing import tiny_model
from plain_attention import plain_attention, random_inputs
from simulated_ring import relative_rms, simulated_ring

RUN = {"model_name_or_path": "m", "dataset": "d", "output_dir": "nowhere/out", "dry_run": True}
TILES = {
    "full": Tile(slice(0, 12), slice(0, 20), "full"),
    "causal": Tile(slice(0, 24), slice(0, 24), "causal"),
    "varlen": Tile(slice(0, 24), slice(0, 24), "varlen", (0, 1, 9, 24)),
    "causal window": Tile(slice(0, 24), slice(0, 24), "causal", window=5),
    "varlen window": Tile(slice(0, 24), slice(0, 24), "varlen", (0, 3, 24), window=5),
    "window, more keys": Tile(slice(0, 12), slice(0, 20), "full", window=3),
    "window, more queries": Tile(slice(0, 20), slice(0, 12), "full", window=9),
}


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("block", [512, 5])
def test_backend_is_plain_attention(
    name: str, tile: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.math, "BLOCK", block)
    monkeypatch.setattr(backends.math, "KEY_BLOCK", block)
    backend, t = backends.BACKENDS[name], TILES[tile]
    q, _, _, dout = random_inputs(t.q_len, 4, 2, 8)
    _, k, v, _ = random_inputs(t.k_len, 4, 2, 8, seed=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*leaves, t.mask(), 0.5)  # type: ignore[arg-type]
    expected.backward(dout)
    out, lse = backend.forward(q, k, v, t, 0.5, None)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.5
    torch.testing.assert_close(
        lse, scores.masked_fill(~t.mask(), -torch.inf).logsumexp(-1), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for found, leaf in zip(
        backend.backward(dout, q, k, v, out, lse, t, 0.5, None), leaves, strict=True
    ):
        torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-13)


@pytest.mark.processes
def test_triton_kernels_are_the_formulas_where_they_are_interpreted() -> None:
    """All of `TILES` with and without a soft-cap, heads that fill their blocks and such that do
    not. Triton looks at the environment when it is imported.
    """
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import test_backends; test_backends.interpreted()"]
    folder = Path(__file__).parent
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def interpreted() -> None:
    """Compares, in a process in which Triton interprets; raises where something differs."""
    from longfactory.sp.backends import tile_calls as kernels

    small = {"forward": (16, 16), "keys": (16, 16), "queries": (16, 32)}
    for kernel, (m, n) in small.items():
        kernels.SETTINGS[kernel] = {256: kernels.Blocks(m, n, 4, 2)}
    shapes = ((4, 2, 16, 16), (3, 1, 20, 12))
    for (name, t), softcap, (heads, kv_heads, dim, value) in itertools.product(
        TILES.items(), (None, 7.0), shapes
    ):
        q, _, _, dout = random_inputs(t.q_len, heads, kv_heads, dim, value, torch.float16)
        _, k, v, _ = random_inputs(t.k_len, heads, kv_heads, dim, value, torch.float16, seed=1)
        wide = [x.double() for x in (q, k, v)]
        out, lse = kernels.forward(q, k, v, t, 0.5, softcap)
        true_out, true_lse = backends.math.forward(*wide, t, 0.5, softcap)
        assert (lse - true_lse).abs().max() <= 1e-3, name
        # as much probability lies outside of the tile as inside
        found = (out, *kernels.backward(dout, q, k, v, out * 0.5, lse + 0.69, t, 0.5, softcap))
        grads = backends.math.backward(
            dout.double(), *wide, out.double() * 0.5, true_lse + 0.69, t, 0.5, softcap
        )
        for a, b in zip(found, (true_out, *grads), strict=True):
            assert float((a.double() - b).norm()) <= 3e-3 * float(b.norm()), (name, softcap, dim)


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_results(name: str, dtype: torch.dtype) -> None:
    backend, t = backends.BACKENDS[name], TILES["causal"]
    q, k, v, dout = random_inputs(24, 4, 2, 8, dtype=dtype)
    out, lse = backend.forward(q, k, v, t, 0.5, None)
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, (4, 24))
    assert {g.dtype for g in backend.backward(dout, q, k, v, out, lse, t, 0.5, None)} == {dtype}


def test_selection() -> None:
    q, v = torch.zeros(24, 4, 8), torch.zeros(24, 2, 8)
    t = TILES["causal"]
    assert backends.select("auto", t, q, v, None) is backends.cpu
    assert backends.select("auto", t, q, v, 30.0) is backends.math
    assert backends.select("auto", t, q, v[..., :4], None) is backends.math
    assert backends.select("math", t, q, v, None) is backends.math
    assert backends.select("cpu", t, q, v, 30.0) is backends.math, (
        "what the named backend cannot do goes to one that can"
    )
    with pytest.raises(ValueError, match="flash runs on GPUs"):
        backends.select("flash", t, q, v, None)
    with pytest.raises(ValueError, match="Choose one of: auto"):
        backends.select("fast", t, q, v, None)


def test_every_name_means_the_same_in_a_run_and_in_the_engine() -> None:
    """Each name that a run's file may hold reaches the engine as a backend, and the engine takes
    the other spellings too.
    """
    assert set(backends.BACKENDS) == set(kernel_names.KERNELS), "one list"
    for name in ("auto", *kernel_names.KERNELS, *kernel_names.OTHER_NAMES, "FA2"):
        found = config.from_mapping({**RUN, "attention_backend": name}).parallel.attention_backend
        assert found == kernel_names.canonical(name.lower()) and found in (
            "auto",
            *backends.BACKENDS,
        )
        assert SequenceParallel.create(backend=name.lower()).backend == found
    assert kernel_names.canonical("fa2") == "flash2" and kernel_names.canonical("fa3") == "flash3"
    # What LLaMA-Factory's key may hold passes: it has no effect here, and that is said of all but
    # its default.
    for name in ("auto", "disabled", "sdpa", "fa2", "fa3"):
        notes = config.from_mapping({**RUN, "flash_attn": name}).notes
        assert any("attention_backend chooses" in n for n in notes) == (name != "auto")
    with pytest.raises(config.ConfigError, match="Choose from auto, fa4, flash3"):
        config.from_mapping({**RUN, "attention_backend": "fast"})


def test_a_package_of_the_same_name_is_not_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 2 and 4 share the package flash_attn."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    importlib.invalidate_caches()
    assert kernel_names.not_installed("fa4") is None
    assert "pip install flash-attn" in (kernel_names.not_installed("flash2") or "")
    assert "FlashAttention 3" in (kernel_names.not_installed("flash3") or "")
    assert kernel_names.not_installed("cudnn") is None
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("")
    assert kernel_names.not_installed("flash2") is None


KINDS = [
    ("full", False),
    ("full", True),
    ("causal", False),
    ("causal", True),
    ("varlen", False),
    ("varlen", True),
]


@pytest.mark.parametrize(("kind", "window"), KINDS)
def test_self_test_passes_what_is_right(kind: str, window: bool) -> None:
    for dtype, dim in (
        (torch.float64, 20),
        (torch.float32, 64),
        (torch.bfloat16, 20),
        (torch.float16, 16),
    ):
        request = backends.Request(
            "cpu", dtype, dim, dim, kind, window, False, False, group=1 + dim % 3
        )
        assert backends.selftest(backends.cpu, request) is None
        assert backends.selftest(backends.math, request._replace(softcap=True)) is None


class Faulty:
    """The formulas, with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def refuses(self, request: backends.Request) -> str | None:
        return None

    def _tile(self, tile: Tile) -> Tile:
        if self.fault == "window" and tile.window is not None:
            return dataclasses.replace(tile, window=None)
        if self.fault == "documents" and tile.kind == "varlen":
            return dataclasses.replace(tile, kind="causal", cu_seqlens=None)
        return tile

    def forward(self, q, k, v, tile, scale, softcap):  # type: ignore[no-untyped-def]
        if self.fault == "raises":
            raise RuntimeError("no kernel image\nis available")
        out, lse = backends.math.forward(q, k, v, self._tile(tile), scale, softcap)
        return out, lse / 0.6931 if self.fault == "base 2" else lse

    def backward(self, dout, q, k, v, out, lse, tile, scale, softcap):  # type: ignore[no-untyped-def]
        if self.fault == "own lse":  # a backward that cannot be given the whole row's
            out, lse = backends.math.forward(q, k, v, tile, scale, softcap)
        dq, dk, dv = backends.math.backward(
            dout, q, k, v, out, lse, self._tile(tile), scale, softcap
        )
        return dq, (dk.roll(1, 1) if self.fault == "heads" else dk), dv


@pytest.fixture
def nothing_chosen() -> Iterator[None]:
    """A process that has chosen no backend yet; afterwards too, for what was chosen among
    stand-ins.
    """
    backends.forget_choices()
    yield
    backends.forget_choices()


@pytest.mark.parametrize(
    ("fault", "kind", "window", "words"),
    [
        ("window", "causal", True, "log-sum-exp of a causal tile in a window"),
        ("documents", "varlen", False, "log-sum-exp of a varlen tile"),
        ("base 2", "full", False, "log-sum-exp of a full tile"),
        ("own lse", "full", False, "dq of a full tile, head dim 16, torch.float32 is off by"),
        ("heads", "causal", False, "dk of a causal tile, head dim 16, torch.float32 is off by"),
        ("raises", "causal", False, "RuntimeError: no kernel image)"),
    ],
)
def test_a_backend_that_fails_its_self_test_is_not_used(
    fault: str,
    kind: str,
    window: bool,
    words: str,
    nothing_chosen: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", Faulty(fault))
    tile = tile_for(backends.Request("cpu", torch.float32, 16, 16, kind, window, False, False))
    q, v = torch.zeros(tile.q_len, 4, 16), torch.zeros(tile.k_len, 2, 16)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert backends.select("auto", tile, q, v, None) is backends.math
    lines = [r.getMessage() for r in caplog.records]
    assert (
        len(lines) == 1
        and words in lines[0]
        and lines[0].startswith("attention_backend cpu is not used: it fails its self-test")
    )
    with pytest.raises(
        ValueError, match=r"attention_backend: cpu fails its self-test.*Use attention_backend: auto"
    ):
        backends.select("cpu", tile, q, v, None)


CHANGED = {
    "an argument is gone": ("Tensor out, ", "", "has no 'Tensor out'"),
    "an argument may be absent": ("Tensor out", "Tensor? out", "has no 'Tensor out'"),
    "a new one is needed": ("*, ", "int tail, *, ", "also needs 'int tail'"),
    "another order": (
        "Tensor query, Tensor key",
        "Tensor key, Tensor query",
        "in the order Tensor grad_out",
    ),
    "fewer results": ("(Tensor grad_query, ", "(", r"gives \(Tensor, Tensor\), expected"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_an_operator_whose_backward_changed_is_refused_before_its_forward(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    operator = "_scaled_dot_product_flash_attention_for_cpu"
    before, after, expected = CHANGED[change]
    found = operators.schema(f"{operator}_backward")
    assert found is not None and before in found
    changed = {f"{operator}_backward": found.replace(before, after)}
    plain = operators.schema
    monkeypatch.setattr(operators, "schema", lambda name: changed.get(name, plain(name)))
    operators._found.cache_clear()
    backends.forget_choices()
    x = torch.zeros(2, 1, 8)
    sentence = f"the operator {operator}_backward of PyTorch .* than expected: .*{expected}"
    with pytest.raises(RuntimeError, match=sentence):
        backends.cpu.forward(x, x, x, TILES["full"], 1.0, None)
    # and the run goes on with another kernel, or is refused where its file names this one
    assert backends.select("auto", TILES["full"], x, x, None) is backends.math
    with pytest.raises(ValueError, match="attention_backend: cpu fails its self-test"):
        backends.select("cpu", TILES["full"], x, x, None)
    monkeypatch.undo()
    operators._found.cache_clear()
    backends.forget_choices()


def test_an_operator_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = (operators.Signature("Tensor query", "Tensor"),) * 2
    monkeypatch.setitem(operators.OPERATORS, "_no_such_attention", both)
    with pytest.raises(RuntimeError, match="has no operator _no_such_attention_forward"):
        operators.forward("_no_such_attention", query=torch.zeros(1))


def test_an_argument_added_behind_the_known_ones_is_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "_flash_attention_forward"
    found = operators.schema(name)
    assert found is not None
    changed = found.replace(") -> (", ", bool new=False) -> (")
    monkeypatch.setattr(operators, "schema", lambda name: changed)
    assert operators.difference(name, operators.OPERATORS["_flash_attention"][0]) is None


def version_2(plain: Any) -> types.ModuleType:
    """The private functions of flash_attn.flash_attn_interface 2.8, computed by the formulas."""

    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):  # type: ignore[no-untyped-def]
        tile = stand_in_tile(q[0], k[0], causal, window_size_left, window_size_right)
        out, lse = plain.forward(q[0], k[0], v[0], tile, softmax_scale, softcap or None)
        return out[None], flipped(lse)[None], None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tile = stand_in_tile(q, k, causal, window_size_left, window_size_right, cu_seqlens_q)
        out, lse = plain.forward(q, k, v, tile, softmax_scale, softcap or None)
        return out, flipped(lse), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, deterministic, rng_state=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tile = stand_in_tile(q[0], k[0], causal, window_size_left, window_size_right)
        inputs = (x[0] for x in (dout, q, k, v, out))
        write(
            (dq[0], dk[0], dv[0]),
            plain.backward(*inputs, flipped(softmax_lse[0]), tile, softmax_scale, softcap or None),
        )

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tile = stand_in_tile(q, k, causal, window_size_left, window_size_right, cu_seqlens_q)
        write(
            (dq, dk, dv),
            plain.backward(
                dout, q, k, v, out, flipped(softmax_lse), tile, softmax_scale, softcap or None
            ),
        )

    return module_of(
        _flash_attn_forward,
        _flash_attn_varlen_forward,
        _flash_attn_backward,
        _flash_attn_varlen_backward,
    )


def version_3(plain: Any) -> types.ModuleType:
    """The private functions of flash_attn_interface 3 (the repository's hopper folder), computed by
    the formulas.
    """

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None,
        seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
        rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        dense = cu_seqlens_q is None
        q, k, v = (x[0] for x in (q, k, v)) if dense else (q, k, v)
        tile = stand_in_tile(q, k, causal, window_size_left, window_size_right, cu_seqlens_q)
        out, lse = plain.forward(q, k, v, tile, softmax_scale, softcap or None)
        return (out[None], lse[None], None, None) if dense else (out, lse, None, None)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None,
        max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tensors = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
        if cu_seqlens_q is None:
            tensors = tuple(x[0] for x in tensors)
        dout, q, k, v, out, lse, dq, dk, dv = tensors
        tile = stand_in_tile(q, k, is_causal, window_size_left, window_size_right, cu_seqlens_q)
        write(
            (dq, dk, dv),
            plain.backward(dout, q, k, v, out, flipped(lse), tile, softmax_scale, softcap or None),
        )

    return module_of(_flash_attn_forward, _flash_attn_backward)


def stand_in_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    left: int,
    right: int,
    cu: torch.Tensor | None = None,
) -> Tile:
    """The mask that FlashAttention's arguments mean."""
    assert right == (0 if left >= 0 and causal else -1), "a window with causal is (left, 0)"
    window = left if left >= 0 else None
    kind = "full" if not causal else "causal" if cu is None else "varlen"
    return Tile(
        slice(0, len(q)), slice(0, len(k)), kind, None if cu is None else tuple(cu.tolist()), window
    )  # type: ignore[arg-type]


def flipped(lse: torch.Tensor) -> torch.Tensor:
    """FlashAttention 2 marks rows that saw nothing with +inf."""
    return torch.where(lse.isinf(), -lse, lse)


def write(into: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(into, values, strict=True):
        a.copy_(b)


def module_of(*functions: Any) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    for function in functions:
        setattr(module, function.__name__, function)
    return module


@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize(("kind", "window"), KINDS)
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_2_and_3_by_a_module_with_their_signature(
    version: int, kind: str, window: bool, softcap: bool
) -> None:
    """Their kernels run on GPUs alone. Here: what they are called with means the tile, and what
    they give back is understood.
    """
    backend = Installed(f"flash{version}", "stand_in", (9,))
    backend.__dict__["_functions"] = {2: version_2, 3: version_3}[version](backends.math)
    for dims in ((64, 64), (20, 12)):
        request = backends.Request("cpu", torch.float32, *dims, kind, window, softcap, True)
        assert backends.selftest(backend, request) is None


def test_requests_of_tiles_are_those_that_were_tested_at_the_start() -> None:
    """What a layer asks for is found among the kinds that the start went through: nothing is tested
    in the middle of a step.
    """
    requests = hf.kernel_requests(tiny_model("mistral").config, SequenceParallel(), torch.float32)
    q, v = torch.zeros(20, 4, 16), torch.zeros(20, 2, 16)
    for tile in TILES.values():
        asked = backends.request_for(tile, q, v, None)
        assert any(asked._replace(aligned=False) == r for r in requests)


def test_merge_of_blocks_that_see_nothing() -> None:
    out, lse = torch.zeros(3, 1, 2), torch.tensor([[-torch.inf, -torch.inf, 0.5]])
    block, block_lse = torch.ones(3, 1, 2), torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    merge_(out, lse, block, block_lse)
    assert out[:, 0, 0].tolist() == [0.0, 1.0, 0.0]
    assert lse[0].tolist() == [-torch.inf, 1.0, 0.5]


@pytest.mark.parametrize("ranks", [2, 32])
def test_error_does_not_grow_with_the_number_of_ranks(ranks: int) -> None:
    """bfloat16 rms error of out, dq, dk, dv of a ring of so many ranks, against one call, both
    measured from float64.
    """
    q, k, v, dout = random_inputs(512, 4, 2, 64, dtype=torch.bfloat16)
    exact = simulated_ring(1, q.double(), k.double(), v.double(), dout.double())
    one = relative_rms(simulated_ring(1, q, k, v, dout), exact)
    many = relative_rms(simulated_ring(ranks, q, k, v, dout), exact)
    assert all(m <= 1.2 * o for m, o in zip(many, one, strict=True)), (many, one)


@pytest.mark.parametrize("operator", operators.OPERATORS)
def test_private_operators_have_the_known_schema(operator: str) -> None:
    """A failure here means: read the operator's new contract before trusting it."""
    for name, expected in zip(
        operators.names(operator), operators.OPERATORS[operator], strict=True
    ):
        assert operators.difference(name, expected) is None


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, major: int = 9) -> None:
    """Backends choose as on a GPU; none is run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (major, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(backends, "selftest", lambda backend, request: None)
    monkeypatch.setattr(start, "foreign_cudnn", lambda: None)


def start_lines(
    name: str, dtype: torch.dtype, dim: int = 128, windows: bool = False, softcap: bool = False
) -> list[str]:
    return start.lines(
        name, start.requests_of("cuda", dtype, [(dim, dim)], windows=windows, softcap=softcap)
    )


def test_one_line_says_which_kernels_run(
    nothing_chosen: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    on_a_gpu(monkeypatch)
    faster = "Faster: fa4 is not installed (pip install 'longfactory[fa4]')."
    assert start_lines("auto", torch.bfloat16) == [
        "Attention kernels (bfloat16, head dim 128): cudnn (about 540 TFLOP/s) for causal tiles,"
        f" rectangles; flash (about 320 TFLOP/s) for documents of less than 2,048 tokens. {faster}"
    ]
    assert start_lines("auto", torch.bfloat16, 256) == [
        "Attention kernels (bfloat16, head dim 256): cudnn (about 430 TFLOP/s) for causal tiles,"
        f" rectangles; flash (about 270 TFLOP/s) for documents of less than 2,048 tokens. {faster}"
    ]
    assert start_lines("flash", torch.bfloat16) == [
        "Attention kernel (bfloat16, head dim 128): flash (about 320 TFLOP/s)."
    ]
    assert start_lines("cudnn", torch.float16) == [
        "Attention kernels (float16, head dim 128): cudnn (about 540 TFLOP/s) for causal tiles,"
        " rectangles; flash (about 320 TFLOP/s) for documents of less than 2,048 tokens. cudnn does"
        " not compute documents of less than 2,048 tokens: it is slow on packed documents."
    ]
    # float32 has a kernel that is not O(T^2) in memory, and what is slow is said.
    assert start_lines("auto", torch.float32) == [
        "Attention kernel (float32, head dim 128): efficient. float32 is slow: set bf16: true."
    ]
    assert start_lines("auto", torch.float32, softcap=True)[0].startswith(
        "Attention kernel (float32, head dim 128): math."
    )
    with pytest.raises(ValueError, match="fa4 is not installed"):
        start_lines("fa4", torch.bfloat16)
    # The tiles that come are of kinds that were told: nothing more is said.
    caplog.clear()
    for request in start.requests_of(
        "cuda", torch.bfloat16, [(128, 128)], windows=False, softcap=False
    ):
        backends._select("auto", request)
    assert not caplog.records
    backends._select("auto", request._replace(window=True))
    assert [r.getMessage() for r in caplog.records] == [
        "attention kernel flash for full tiles in a window, torch.bfloat16, head dim 128"
    ]


def test_kernels_of_layers_with_windows(
    nothing_chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    (line,) = start_lines("auto", torch.bfloat16, 256, windows=True)
    assert line.startswith(
        "Attention kernels (bfloat16, head dim 256): cudnn (about 430 TFLOP/s) for causal tiles,"
        " rectangles; flash (about 270 TFLOP/s) for causal tiles in a window, rectangles in a"
        " window, documents of less than 2,048 tokens, several documents in a window."
    )


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ((128, 128), "cudnn"),
        ((64, 64), "cudnn"),
        ((192, 128), "cudnn"),  # latent attention
        ((192, 192), "flash"),
        ((128, 64), "flash"),
        ((256, 256), "cudnn"),  # 433 TFLOP/s, FlashAttention 2 has 272
        ((256, 128), "flash"),
        ((160, 160), "flash"),
        ((512, 512), "efficient"),
    ],
)
def test_kernels_by_head_dims(
    dims: tuple[int, int],
    expected: str,
    nothing_chosen: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_gpu(monkeypatch)
    requests = start.requests_of("cuda", torch.bfloat16, [dims], windows=False, softcap=False)
    assert backends.resolve("auto", requests[0])[0] == expected


@pytest.mark.parametrize(
    ("change", "major", "expected"),
    [
        ({}, 9, "cudnn"),
        ({}, 10, "flash"),  # not measured
        ({}, 8, "flash"),
        ({"window": True}, 9, "flash"),
        ({"softcap": True}, 9, "triton"),
        ({"softcap": True, "window": True}, 8, "triton"),
        ({"softcap": True, "dtype": torch.float32}, 9, "math"),
        ({"deterministic": True}, 9, "flash"),
        ({"aligned": False}, 9, "flash"),
        ({"kind": "varlen", "aligned": False}, 9, "flash"),
        ({"dtype": torch.float32}, 9, "efficient"),
    ],
)
def test_heads_of_256_go_to_cudnn_where_it_computes_what_is_asked(
    change: dict[str, Any],
    major: int,
    expected: str,
    nothing_chosen: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_a_gpu(monkeypatch, major)
    monkeypatch.setattr(backends.triton_tiles, "_installed", lambda: True)
    request = start.requests_of("cuda", torch.bfloat16, [(256, 256)], windows=False, softcap=False)[
        0
    ]
    assert backends.resolve("auto", request._replace(**change))[0] == expected


def test_heads_of_256_stay_with_flash_where_cudnn_fails_its_self_test(
    nothing_chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(
        backends,
        "selftest",
        lambda backend, request: "fails" if backend is backends.BACKENDS["cudnn"] else None,
    )
    request = start.requests_of("cuda", torch.bfloat16, [(256, 256)], windows=False, softcap=False)[
        0
    ]
    assert backends.resolve("auto", request)[0] == "flash"
    assert not backends.cuts_documents("auto", request._replace(kind="varlen", aligned=False))


@pytest.mark.parametrize(
    ("name", "dim", "change", "expected"),
    [
        ("auto", 128, {}, True),
        ("auto", 256, {}, True),
        ("auto", 160, {}, False),
        ("auto", 128, {"window": True}, False),
        ("auto", 128, {"softcap": True}, False),
        ("auto", 128, {"deterministic": True}, False),
        ("flash", 128, {}, False),
        ("cudnn", 128, {}, True),
    ],
)
def test_long_documents_get_calls_of_their_own(
    name: str,
    dim: int,
    change: dict[str, Any],
    expected: bool,
    nothing_chosen: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where cuDNN has one document and FlashAttention 2 has several."""
    on_a_gpu(monkeypatch)
    requests = start.requests_of("cuda", torch.bfloat16, [(dim, dim)], windows=False, softcap=False)
    (documents,) = (r for r in requests if r.kind == "varlen")
    assert backends.cuts_documents(name, documents._replace(**change)) is expected


def test_kernels_of_a_configuration() -> None:
    ctx = SequenceParallel()
    kinds = {
        "llama": ({(16, 16)}, False, False),
        "mistral": ({(16, 16)}, True, False),
        "gemma2": ({(16, 16)}, True, True),
    }
    for family, (dims, windows, softcap) in kinds.items():
        requests = hf.kernel_requests(tiny_model(family).config, ctx, torch.float32)
        assert {(r.head_dim, r.v_head_dim) for r in requests} == dims
        assert any(r.window for r in requests) == windows and all(
            r.softcap == softcap for r in requests
        )
        assert {r.group for r in requests} == {2}
    latent = types.SimpleNamespace(
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        hidden_size=64,
        num_attention_heads=4,
    )
    latent.get_text_config = lambda: latent
    assert {(r.head_dim, r.v_head_dim) for r in hf.kernel_requests(latent, ctx, torch.float32)} == {
        (192, 128)
    }  # type: ignore[arg-type]


def test_a_cudnn_that_is_not_pytorchs_own_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "nvidia" / "cudnn"
    (tmp_path / "nvidia_cudnn_cu13-9.19.0.56.dist-info").mkdir()
    line = "7f00-7f01 r-xp 00000000 08:01 123   {}\n"
    mine = line.format(own / "lib" / "libcudnn.so.9") + line.format("/usr/lib/libc.so.6")
    assert start.foreign_cudnn(mine, own, 91900) is None
    found = start.foreign_cudnn(
        mine + line.format("/usr/local/cuda/lib64/libcudnn_graph.so.9"), own, 90100
    )
    assert (
        found == "cuDNN 9.1.0 is loaded from /usr/local/cuda/lib64, not PyTorch's own (9.19.0.56 in"
        f" {own}): attention may run at half speed. Remove that folder from LD_LIBRARY_PATH."
    )
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    assert start.foreign_cudnn(mine, None, None) is None, "a PyTorch without cuDNN"


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_plain_attention_needs_no_memory_that_grows_with_the_row(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of queries and keys: the largest tensor of a forward and backward pass is an input,
    not scores of all keys.
    """
    monkeypatch.setattr(backends.math, "BLOCK", 16)
    monkeypatch.setattr(backends.math, "KEY_BLOCK", 16)
    largest = []
    for rows in (128, 256):
        tile = Tile(slice(0, rows), slice(0, rows), kind)  # type: ignore[arg-type]
        q, k, v, dout = random_inputs(rows, 2, 1, 4, dtype=torch.float32)
        with Largest() as seen:
            out, lse = backends.math.forward(q, k, v, tile, 0.5, None)
            backends.math.backward(dout, q, k, v, out, lse, tile, 0.5, None)
        largest.append(seen.numbers)
        assert seen.numbers <= max(q.numel(), 2 * 16 * 16)
    assert largest[1] == 2 * largest[0]


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operator gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out
