"""FlashAttention 2 (`flash_attn`) or 3 (`flash_attn_interface`) as the user built them.

Both write gradients into tensors that they are given, and both have soft-cap.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ..tiles import Tile
from .padding import cut_head, pad_head
from .request import Request


class Installed:
    """A backend over the private functions of one module; the argument names of its version are
    looked up once.
    """

    def __init__(self, name: str, module: str, majors: tuple[int, ...]) -> None:
        self.__name__ = name
        self.module = module
        self.majors = majors

    def refuses(self, request: Request) -> str | None:
        if request.device_type != "cuda":
            return "runs on GPUs"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return "needs float16 or bfloat16"
        if torch.cuda.get_device_capability()[0] not in self.majors:
            return "is not made for this GPU"
        if max(request.head_dim, request.v_head_dim) > 256:
            return "needs head dims up to 256"
        return self._unusable

    @functools.cached_property
    def _functions(self) -> Any:
        return importlib.import_module(self.module)

    @functools.cached_property
    def _unusable(self) -> str | None:
        try:
            _ = self._functions._flash_attn_forward, self._functions._flash_attn_backward
        except ImportError:
            return "is not installed"
        except Exception as error:
            return f"cannot be used ({error!r})"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        dim = v.shape[-1]
        q, k, v = self._padded(q, k, v)
        dense = tile.kind != "varlen"
        if dense:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        settings = self._settings(tile, q.device, scale, softcap)
        out, lse = self._call(self._pick("forward", dense), {"q": q, "k": k, "v": v, **settings})[
            :2
        ]
        out, lse = (out[0], lse[0]) if dense else (out, lse)
        return cut_head(out, dim), torch.where(lse == torch.inf, -torch.inf, lse)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tile: Tile,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = q.shape[-1], k.shape[-1], v.shape[-1]
        q, k, v, out, dout = self._padded(q, k, v, out, dout)
        lse = torch.where(lse == -torch.inf, torch.inf, lse).contiguous()
        dense = tile.kind != "varlen"
        if dense:
            dout, q, k, v, out, lse = (x.unsqueeze(0) for x in (dout, q, k, v, out, lse))
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        tensors = {
            "dout": dout.contiguous(),
            "q": q,
            "k": k,
            "v": v,
            "out": out.contiguous(),
            "softmax_lse": lse,
        }
        tensors.update(zip(("dq", "dk", "dv"), grads, strict=True))
        self._call(
            self._pick("backward", dense),
            {**tensors, **self._settings(tile, q.device, scale, softcap)},
        )
        dq, dk, dv = (cut_head(g[0] if dense else g, d) for g, d in zip(grads, dims, strict=True))
        return dq, dk, dv

    def _padded(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        widest = max(x.shape[-1] for x in tensors)
        return tuple(pad_head(x, 8, widest) for x in tensors)

    def _pick(self, direction: str, dense: bool) -> Any:
        # Version 2 has a function of its own for several documents, version 3 one function for
        # both.
        varlen = getattr(self._functions, f"_flash_attn_varlen_{direction}", None)
        return (
            varlen
            if varlen is not None and not dense
            else getattr(self._functions, f"_flash_attn_{direction}")
        )

    def _settings(
        self, tile: Tile, device: torch.device, scale: float, softcap: float | None
    ) -> dict[str, Any]:
        left = -1 if tile.window is None else tile.window
        right = 0 if tile.window is not None and tile.kind != "full" else -1
        settings: dict[str, Any] = {
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": tile.kind != "full",
            "is_causal": tile.kind != "full",
            "window_size_left": left,
            "window_size_right": right,
            "window_size": (left, right),
            "softcap": softcap or 0.0,
            "alibi_slopes": None,
            "return_softmax": False,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if tile.kind == "varlen":
            cu, longest = tile.cu_seqlens_on(device), tile.max_seqlen
            settings.update(
                cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest
            )
        return settings

    def _call(self, function: Any, arguments: dict[str, Any]) -> Any:
        names = _arguments(function)
        needed = {"causal", "is_causal"} & names, {"window_size", "window_size_left"} & names
        if not all(needed) or "softcap" not in names:
            raise RuntimeError(
                f"{self.module} has a version whose arguments are not known: {sorted(names)}."
            )
        return function(**{n: x for n, x in arguments.items() if n in names})


@functools.cache
def _arguments(function: Any) -> frozenset[str]:
    # A torch.library custom operator keeps its Python function.
    return frozenset(inspect.signature(getattr(function, "_init_fn", function)).parameters)


flash2 = Installed("flash2", "flash_attn.flash_attn_interface", (8, 9, 10, 12))
flash3 = Installed("flash3", "flash_attn_interface", (9,))
