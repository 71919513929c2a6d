"""Which kernels a run computes with, by its model, its dtype and its GPU; told in one line."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.sp import SequenceParallel, backends, hf
from longfactory.sp.backends import start
from longfactory.testing import tiny_model


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
