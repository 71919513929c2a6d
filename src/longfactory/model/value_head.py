"""A scalar for each token in place of logits: the head of a reward model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longfactory.model.outputs import TokenOutputs

FILE = "value_head.safetensors"
# Names in the file, as LLaMA-Factory and trl's AutoModelForCausalLMWithValueHead write them.
WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"


class TokenValues:
    """Takes over a model's output layer: while `labels(...)` is open a forward gives one value a
    token.

    The new layer is a submodule of the model (`model.v_head`), so that it is trained, sharded and
    saved with it; the vocabulary's output layer is not used and, where it is not tied to the
    embedding, frozen.
    """

    def __init__(self, model: Any):
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise ValueError(
                f"{type(model).__name__} has no output layer to replace by a value head. Use a"
                " causal language model."
            )
        weight = self.head.weight
        hidden = getattr(self.head, "in_features", None) or weight.shape[-1]
        self.value = nn.Linear(hidden, 1, device=weight.device, dtype=torch.float32)
        nn.init.normal_(self.value.weight, std=1 / (hidden + 1) ** 0.5)
        nn.init.zeros_(self.value.bias)
        model.v_head = self.value
        embedding = model.get_input_embeddings()
        if embedding is None or getattr(embedding, "weight", None) is not weight:
            weight.requires_grad_(False)
        self._forward = self.head.forward
        self._on = False
        self._out: Tensor | None = None
        self.head.forward = self._values

    @contextlib.contextmanager
    def labels(self, labels: Tensor) -> Iterator[TokenValues]:
        self._on, self._out = True, None
        try:
            yield self
        finally:
            self._on, self._out = False, None

    def outputs(self, model_logits: Tensor | None = None) -> TokenOutputs:
        """[T] values in fp32, under the name that losses read."""
        if self._out is None:
            raise RuntimeError(
                "The model's forward did not call its output layer, so no values were made."
            )
        values = self._out
        if model_logits is not None and model_logits.requires_grad:
            values = values + 0.0 * model_logits.float().sum().to(values.dtype)
        return TokenOutputs(logps=values)

    def _values(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._on:
            return self._forward(hidden, *args, **kwargs)
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.reshape(-1, hidden.shape[-1])
            out = self.value(h.to(self.value.weight.dtype))[:, 0]
        self._out = out if out.dtype == torch.float64 else out.float()
        return self._out.view(*hidden.shape[:-1], 1)


def load_value_head(head: TokenValues, folder: str | Path) -> bool:
    """Gives a head the weights of `folder/value_head.safetensors`. Returns whether there is such a
    file.

    Raises:
        ValueError: it belongs to a model of another width.
    """
    from safetensors.torch import load_file

    path = Path(folder) / FILE
    if not path.is_file():
        return False
    found = load_file(path)
    with torch.no_grad():
        for name, parameter in ((WEIGHT, head.value.weight), (BIAS, head.value.bias)):
            if found[name].shape != parameter.shape:
                raise ValueError(
                    f"{path} holds {tuple(found[name].shape)} numbers, the model's head"
                    f" {tuple(parameter.shape)}."
                )
            parameter.copy_(found[name])
    return True
