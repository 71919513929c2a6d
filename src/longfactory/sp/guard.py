"""Before training: the model as it will be trained, sharded, against the same model unsharded, on a few tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import hf, hybrid, rope
from .collectives import gather, shard
from .context import SequenceParallel, alignment
from .layout import Segment
from .plan import plan as make_plan
from .probe import Probe, probe

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Nats, of the median over the last half of a document of |log-probability - reference|; for hidden states, relative. In bfloat16 exact
models are within 0.04, with experts 0.11 (tokens that change experts); a document that sees the one before it is off by 0.3 in a model
with fresh random weights, and more in a trained one."""


def guard(model: nn.Module, ctx: SequenceParallel) -> None:
    """Proves on a few tokens that the sharded model is the model. Collective: every process of the world calls it.

    One row of two documents goes through the engine; then each document alone through the model's own attention. Three plain forward
    passes without gradients, of the model as it is wrapped (DDP, FSDP2, ZeRO-3, PEFT); at size 1 too, where they prove that documents
    are isolated. The documents are longer than the sliding window or the attention chunk where that is at most 128 tokens.

    Raises:
        ValueError: an attention layer was not reached, an argument is not implemented, or the log-probabilities differ. Names the
            model type, the reason and what to do. Raised on every rank.
    """
    inner = hf.unwrap(model)
    config = inner.config.get_text_config()
    device = _device(inner)
    documents = [_tokens(n, i, inner, device) for i, n in enumerate(_lengths(config))]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with probe() as seen, _Executed(inner) as executed:
                sharded = _sharded(model, inner, documents, ctx)
            with _own_attention(inner):
                alone = [_scores(model, inner, {"input_ids": ids[None], "use_cache": False}, ids.roll(-1)) for ids in documents]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does without the mask, the cache or the arguments that it expects
        what = str(error) if isinstance(error, ValueError) else f"its forward pass fails with {type(error).__name__}: {error}"
        raise ValueError(f"Models of type {config.model_type} cannot be trained here: {what}") from error
    finally:
        model.train(training)
    reason = _not_reached(inner, seen, executed) or _different(sharded, alone, seen)
    if _anyone(reason is not None, device):
        raise ValueError(
            f"Models of type {config.model_type} cannot be trained here: {reason or 'another rank refused it'}. "
            "Choose a model type that docs/models.md marks exact."
        )
    if seen.heads:
        ctx.set_heads(math.gcd(*(h for h, _ in seen.heads)), math.gcd(*(h for _, h in seen.heads)))


def _sharded(model: nn.Module, inner: PreTrainedModel, documents: list[Tensor], ctx: SequenceParallel) -> list[Tensor]:
    """Scores of each document, from one row that is spread over the ranks."""
    lengths = [len(ids) for ids in documents]
    if pad := -sum(lengths) % alignment(ctx):
        lengths.append(pad)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    padding = [documents[0].new_zeros(pad)] if pad else []
    row = {
        "input_ids": torch.cat(documents + padding),
        "position_ids": torch.cat([torch.arange(n, device=documents[0].device) for n in lengths]),
    }
    labels = torch.cat([ids.roll(-1) for ids in documents] + padding)
    plan = make_plan(ends[-1], [Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)], ctx)
    scores = gather(_scores(model, inner, hf.inputs(row, plan), shard(labels, plan)), plan)
    return list(scores.split(lengths))[: len(documents)]


def _scores(model: nn.Module, inner: PreTrainedModel, inputs: dict, labels: Tensor) -> Tensor:
    """[S, 1] log-probabilities of the labels; of a model without a language head [S, h] last hidden states, or [S, 1] values."""
    hidden: list[Tensor] = []
    hook = None
    if inner.get_output_embeddings() is None:
        hook = inner.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    try:
        output = model(**inputs)
    finally:
        if hook is not None:
            hook.remove()
    if hidden:
        return hidden[0][0].float()
    logits = output.logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[-1] == 1:
        return logits  # a value head
    return logits.log_softmax(-1).gather(1, labels[:, None])


@contextlib.contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model computes its attention itself."""
    held: list[Any] = [m.config for m in model.modules() if getattr(m, "config", None) is not None]
    configs = {id(c): c for c in held if getattr(c, "_attn_implementation", None) == hf.ATTENTION}
    try:
        for c in configs.values():
            c._attn_implementation_internal = "eager"
        yield
    finally:
        for c in configs.values():
            c._attn_implementation_internal = hf.ATTENTION


class _Executed:
    """Attention modules, by their class name, that ran inside the block."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules: dict[int, tuple[str, nn.Module]] = {}
        self._candidates = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Attention")]

    def __enter__(self) -> _Executed:
        self._hooks = [m.register_forward_pre_hook(self._note(n)) for n, m in self._candidates]
        return self

    def _note(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.modules[id(module)] = (name, module)

        return hook

    def __exit__(self, *error: object) -> None:
        for h in self._hooks:
            h.remove()

    def missed(self, reached: set[int]) -> list[str]:
        """Names of those that neither called the attention function nor hold or belong to a module that did."""
        names = [n for i, (n, _) in self.modules.items() if i in reached]
        return [
            name
            for i, (name, module) in self.modules.items()
            if not any(id(m) in reached for m in module.modules()) and not any(name.startswith(n + ".") for n in names)
        ]


def _not_reached(model: PreTrainedModel, seen: Probe, executed: _Executed) -> str | None:
    """A layer or a window that did not arrive at the engine."""
    if not seen.calls:
        return "none of its layers pass through transformers' attention registry"
    if missed := executed.missed(seen.modules):
        return f"{len(missed)} of its attention layers do not pass through transformers' attention registry ({missed[0]})"
    types = hf.layer_types(model.config.get_text_config())
    linear = sum(t in hybrid.LAYERS for t in types)
    if len(seen.linear) < linear:
        return f"{len(seen.linear)} of its {linear} linear-attention layers are computed over the whole row"
    asked = {size for kind, size in seen.masks if kind == "window"}
    if wrong := seen.windows - asked:
        return f"its attention names a sliding window of {min(wrong)} tokens that its own mask does not have"
    if asked - seen.windows and not set(types) <= {"full_attention", *hybrid.LAYERS}:
        return f"its sliding window of {min(asked - seen.windows)} tokens does not reach the attention function"
    if rope.depends_on_length(model) and not seen.rows:
        return "its rotary frequencies depend on the length of the row, which does not reach them"
    return None


def _different(sharded: list[Tensor], alone: list[Tensor], seen: Probe) -> str | None:
    tolerance = max(_TOLERANCE.get(t, 0.05) for t in seen.dtypes)
    for i, (a, b) in enumerate(zip(sharded, alone, strict=True)):
        error = (a - b).norm(dim=-1)
        if a.shape[-1] > 1:
            error = error / b.norm(dim=-1).clamp(min=1e-6)
        worst = error[len(error) // 2 :].median().item()
        if not worst <= tolerance:  # also NaN
            return f"sharded and unsharded log-probabilities of document {i + 1} differ by {worst:.1e}, tolerated are {tolerance:.0e}"
    return None


def _anyone(refused: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return refused
    flag = torch.tensor(float(refused), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def _lengths(config: object) -> tuple[int, int]:
    small = [v for key in ("sliding_window", "attention_chunk_size") if (v := getattr(config, key, None)) and v <= 128]
    longest = 2 * max(small, default=8) + 8
    limit = getattr(config, "max_position_embeddings", None) or longest
    return min(16, limit), min(longest, limit)


def _device(model: PreTrainedModel) -> torch.device:
    device = next(model.parameters()).device
    if device.type == "cpu" and dist.is_initialized() and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())  # parameters that are offloaded to the host
    return device


def _tokens(n: int, seed: int, model: PreTrainedModel, device: torch.device) -> Tensor:
    """The same on every rank. Away from both ends of the vocabulary, where special tokens are."""
    embedding = model.get_input_embeddings()
    vocabulary = getattr(embedding, "base_layer", embedding).num_embeddings  # it may have an adapter
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary // 8, max(vocabulary // 8 + 2, vocabulary // 2), (n,), generator=generator).to(device)
