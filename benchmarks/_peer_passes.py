"""How often a step multiplies by each of a model's matrices."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")


class Products(TorchDispatchMode):
    """While open, counts the multiplications of products of matrices, by the parts of the model that
    a size of the product names.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.sizes = {config.intermediate_size: "MLP", config.vocab_size: "output layer"}
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in PRODUCTS:
            first, second = [x for x in args if isinstance(x, Tensor) and x.dim() > 1][-2:]
            sizes = (*first.shape[-2:], second.shape[-1])
            parts = [part for size, part in self.sizes.items() if size in sizes]
            self.found[parts[0] if parts else "projections"] += first.numel() * second.shape[-1]
        return function(*args, **(kwargs or {}))


def passes(step: Callable[[], object], config: Any, tokens: int) -> dict[str, float]:
    """Multiplications of a step on this process, in units of one pass of its tokens over the MLP, over
    attention's projections and over the output layer: 3 are a forward and a backward that compute
    nothing twice.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    keys = hidden // heads * config.num_key_value_heads
    layers = config.num_hidden_layers
    of_a_token = {
        "MLP": 3 * hidden * config.intermediate_size * layers,
        "projections": (2 * hidden * hidden + 2 * hidden * keys) * layers,
        "output layer": hidden * config.vocab_size,
    }
    with Products(config) as products:
        step()
    return {part: products.found[part] / (tokens * size) for part, size in of_a_token.items()}
