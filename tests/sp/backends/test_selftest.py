"""The self-test of a backend passes what is right, and what is wrong is not used."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kinds_of_tiles import KINDS, TILES
from longfactory.sp import SequenceParallel, backends, hf
from longfactory.sp.backends.selftest import tile_for
from longfactory.sp.tiles import Tile
from longfactory.testing import tiny_model


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


def test_requests_of_tiles_are_those_that_were_tested_at_the_start() -> None:
    """What a layer asks for is found among the kinds that the start went through: nothing is tested
    in the middle of a step.
    """
    requests = hf.kernel_requests(tiny_model("mistral").config, SequenceParallel(), torch.float32)
    q, v = torch.zeros(20, 4, 16), torch.zeros(20, 2, 16)
    for tile in TILES.values():
        asked = backends.request_for(tile, q, v, None)
        assert any(asked._replace(aligned=False) == r for r in requests)
