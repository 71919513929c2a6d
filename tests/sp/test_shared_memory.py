"""Kernels on GPUs with less shared memory than those that they were tuned on."""

from __future__ import annotations

import collections
import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.sp import shared_memory
from longfactory.sp.recurrent import computed
from longfactory.sp.shared_memory import run_what_fits
from longfactory.sp.tiles import Tile


class NoRoomError(Exception):
    pass


def test_the_first_settings_that_fit_are_taken_and_remembered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried: list[int] = []

    def run(size: int) -> None:
        tried.append(size)
        if size > 99:
            raise NoRoomError(f"{size} of 99 KB")

    with caplog.at_level(logging.INFO, "longfactory.sp.shared_memory"):
        for _ in range(3):
            run_what_fits(("sums", "a"), (227, 163, 99, 50), run, NoRoomError)
    assert tried == [227, 163, 99, 99, 99], "what does not fit is compiled once"
    assert len(caplog.records) == 2 and "sums is launched with 99" in caplog.text
    tried.clear()
    run_what_fits(("sums", "a"), (99, 50), run, NoRoomError)
    run_what_fits(("sums", "b"), (227, 99), run, NoRoomError)
    assert tried == [99, 227, 99], "other settings and other calls begin anew"
    for _ in range(2):
        with pytest.raises(NoRoomError, match="163 of 99 KB"):
            run_what_fits(("sums", "c"), (227, 163), run, NoRoomError)
    with pytest.raises(ZeroDivisionError):  # only room is looked for
        run_what_fits(("sums", "d"), (1, 2), lambda size: size // 0, NoRoomError)


ROOM = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes that a program may take, by compute capability."""

RECURRENCES = {
    "gated delta net": ("delta", 128, 128, False, torch.bfloat16),
    "gated delta net, float32": ("delta", 128, 128, False, torch.float32),
    "Kimi delta attention": ("delta", 128, 128, True, torch.bfloat16),
    "Kimi delta attention, float32": ("delta", 128, 128, True, torch.float32),
    "widest": ("delta", 256, 256, False, torch.bfloat16),
    "Mamba 2": ("plain", 256, 64, False, torch.bfloat16),
}


class Compiler:
    """In place of Triton's launches: what would be launched is compiled for a GPU that need not be
    there, up to its shared memory, and refused as Triton refuses it. Nothing is computed.

    Attributes:
        whole: kernels that are compiled to the end.
        local: the bytes of each thread that those keep in local memory.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, capability: int, room: int
    ) -> None:
        triton = pytest.importorskip("triton")
        from triton.backends.nvidia import compiler
        from triton.runtime.jit import JITFunction

        self.triton, self.capability, self.room, self.folder = triton, capability, room, folder
        self.whole: set[str] = set()
        self.local: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.settings: dict[str, tuple[int, int]] = {}
        monkeypatch.setattr(shared_memory, "_refused", collections.Counter())
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        monkeypatch.setattr(
            JITFunction, "run", lambda fn, *args, **options: self(fn, args, options)
        )

        backend = compiler.CUDABackend
        made = backend.make_ptx, backend.make_cubin

        def ptx(own: Any, source: Any, metadata: dict[str, Any], *rest: Any) -> str:
            if self.name in self.whole:
                return made[0](own, source, metadata, *rest)
            metadata["name"] = "none"
            return ""

        def cubin(own: Any, source: str, *rest: Any) -> bytes:
            return made[1](own, source, *rest) if source else b""

        monkeypatch.setattr(backend, "make_ptx", ptx)
        monkeypatch.setattr(backend, "make_cubin", cubin)

    def __call__(self, fn: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.errors import OutOfResources

        launch = {
            name: options.pop(name) for name in ("num_warps", "num_stages") if name in options
        }
        given = dict(zip(fn.arg_names, args, strict=False)) | options
        types, constants, divisible = {}, {}, {}
        for place, parameter in enumerate(fn.params):
            name, value = parameter.name, given[parameter.name]
            number = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or (number and value == 1):
                types[name], constants[(place,)] = "constexpr", value
                continue
            pointer = isinstance(value, torch.Tensor)
            if pointer:
                types[name] = f"*{triton_name(value.dtype)}"
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
            if (value.data_ptr() if pointer else value) % 16 == 0 and (pointer or number):
                divisible[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn, types, constexprs=constants, attrs=divisible)
        target = GPUTarget("cuda", self.capability, 32)
        self.name = name = fn.fn.__name__
        kernel = self.triton.compile(source, target=target, options=launch)
        found = kernel.metadata
        if found.shared > self.room:
            raise OutOfResources(found.shared, self.room, "shared memory")
        if name in self.whole:
            self.local[name] = max(self.local_memory(kernel.asm["cubin"]), self.local.get(name, 0))
        self.taken[name] = max(found.shared, self.taken.get(name, 0))
        self.settings[name] = found.num_warps, found.num_stages

    def local_memory(self, code: bytes) -> int:
        """Bytes of a thread, as the tool that Triton brings reads them."""
        tool = Path(self.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        file = self.folder / "kernel.cubin"
        file.write_bytes(code)
        words = subprocess.run(
            [tool, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
        return int(words.split("STACK:")[1].split()[0])


def triton_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32"}
    return names[dtype]


def compiled_recurrence(
    name: str,
    capability: int,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    whole: Sequence[str] = (),
) -> Compiler:
    """All kernels of a recurrence, with the settings that `room` bytes are enough for."""
    compiler = Compiler(monkeypatch, folder, capability, room)
    compiler.whole.update(whole)
    from longfactory.sp.recurrent import chunk_kernels

    monkeypatch.setattr(chunk_kernels, "from_registers", lambda device: room < ROOM[90])
    monkeypatch.setattr(computed, "are_right", lambda _, kernels, *rest: kernels())
    kind, key_dim, value_dim, per_channel, dtype = RECURRENCES[name]
    cpu = torch.device("cpu")
    computed._are_right.__wrapped__(cpu, dtype, kind, key_dim, value_dim, per_channel, False)  # type: ignore[arg-type]
    assert {"chunk_scan", "chunk_outputs", "chunk_output_gradients", "chunk_reverse"} <= set(
        compiler.taken
    )
    return compiler


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", ROOM)
@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences_fit_in_the_shared_memory_of_every_gpu(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled, not run. With 227 KB the settings that were tuned are taken."""
    compiler = compiled_recurrence(name, capability, ROOM[capability], monkeypatch, tmp_path)
    from longfactory.sp.recurrent import chunk_kernels

    if capability == 90:
        kernels = {f"chunk_{kernel}": kernel for kernel in chunk_kernels.SMALLER}
        for kernel in kernels.keys() & compiler.settings.keys():
            assert compiler.settings[kernel] == chunk_kernels.SETTINGS[kernels[kernel]][:2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in RECURRENCES if name != "widest"])
def test_recurrences_fit_in_99_kb_as_hopper_would_run_them(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Hopper's machine code takes other amounts of shared memory than that of GPUs with 99 KB, and
    tests/gpu tells a Hopper GPU of 99 KB, and that it multiplies from registers.
    """
    compiled_recurrence(name, 90, ROOM[89], monkeypatch, tmp_path)


SUMS = ("chunk_value_gradients", "chunk_key_gradients", "channel_squares")
"""Kernels that kept 0.8 to 6 KB of each thread in local memory where tensor cores multiply from
registers, before they took their sums one after another.
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize("name", RECURRENCES)
def test_sums_of_recurrences_are_held_in_registers(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """But for at most 128 bytes of a thread, and 512 in float32. Compiled, not run."""
    room = ROOM[capability]
    compiler = compiled_recurrence(name, capability, room, monkeypatch, tmp_path, SUMS)
    most = 512 if "float32" in name else 128
    assert len(compiler.local) == 2, "a decay of each channel has kernels of its own"
    assert max(compiler.local.values()) <= most, compiler.local


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", ROOM)
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (256, 256)])
def test_attention_with_a_soft_cap_fits_in_the_shared_memory_of_every_gpu(
    dims: tuple[int, int], capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As `test_recurrences_fit_in_the_shared_memory_of_every_gpu`."""
    compiler = Compiler(monkeypatch, tmp_path, capability, ROOM[capability])
    from longfactory.sp.backends import tile_calls

    def zeros(heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(256, heads, dim, dtype=torch.bfloat16)

    q, k, v = zeros(8, dims[0]), zeros(4, dims[0]), zeros(4, dims[1])
    rows = slice(0, 256)
    for tile in (Tile(rows, rows, "causal"), Tile(rows, rows, "varlen", (0, 100, 256), 64)):
        out, lse = tile_calls.forward(q, k, v, tile, 0.1, 50.0)
        tile_calls.backward(out, q, k, v, out, lse, tile, 0.1, 50.0)
    assert {"_forward", "_keys_backward", "_queries_backward"} <= set(compiler.taken)
