"""One decoder layer of the sharded run against transformers' own layer: the rule by which the guard
judges, and the layer to judge by.

Two numbers are compared, both of them distances to the same layer in a wider type (float32 for half
precision, float64 for float32):

    ratio = error(the run's layer)
            / error(transformers' layer with its own attention, in the run's precision)

on the same input, the same weights and the same gradient of the output. An exact layer rounds as
often as the model's own, so its ratio is near 1 whatever the model, its weights and the precision;
benchmarks/results/guard_ratios.md has the distribution, of exact layers and of planted faults.
Before a layer is refused the model's own error is sampled again, on inputs that differ by a
rounding (`perturbed`), and its largest counts. Tokens count by the median of a block of them: a
router that is undecided sends a few tokens to other experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import routers
from .distance import difference, distance
from .probe import Asked
from .routers import Choices

LIMIT = 3.0
"""Largest ratio of an exact layer's error to that of the model's own, in half precision."""
FULL_LIMIT = 30.0
"""The same in float32 and float64: errors depend on the order in which kernels add, and those of
faults are thousands of times larger.
"""
BLOCK = 64
"""Tokens whose median counts."""
FLOOR = 0.125
"""Of a unit of rounding, relative to the block's values: errors below are no errors. Rounding alone
is 0.2.
"""
SAMPLES = 16
"""Of the model's own error, at most, before a layer is refused: it is a random number, and of one
that is made up of a few roundings (of a scalar weight's gradient, of the neurons at the kink of a
ReLU) one sample may be near zero."""
FEW = 256
"""Numbers whose errors average out. Of fewer, such as a head's attention sinks, the floor is
higher.
"""


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """The wider type that a computation in `dtype` is held against."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def limit(dtype: torch.dtype) -> float:
    """The largest ratio of an exact layer that multiplies in `dtype`."""
    return LIMIT if dtype in (torch.bfloat16, torch.float16) else FULL_LIMIT


def rounding(dtype: torch.dtype) -> float:
    """Relative unit of a computation in `dtype`. Of float64 it is that of the norms, softmaxes and
    rotary angles, which transformers computes in float32 whatever the type: its own layer has them
    in the reference too, and so no error to be compared with."""
    return 16 * torch.finfo(torch.float32).eps if dtype == torch.float64 else torch.finfo(dtype).eps


def token_ratio(
    run: Tensor, own: Tensor, reference: Tensor, lengths: Sequence[int], unit: float
) -> float:
    """The largest ratio among blocks of tokens.

    Args:
        run, own, reference: [T, ...], one value per token and channel, documents one after another.
        lengths: of the documents; a block does not cross their ends.
        unit: `rounding` of the run's precision.
    """
    error, own_error, size = (token_errors(x, reference, lengths) for x in (run, own, None))
    return _ratio(error, own_error, size, unit)


def token_errors(x: Tensor | None, reference: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T, ...] -> [blocks]: how far `x` is from the reference, the median of each block of tokens.
    None stands for zeros.
    """
    errors = difference(None if x is None else x.flatten(1), reference.flatten(1)).norm(dim=1)
    documents = errors.split(list(lengths))
    return torch.stack(
        [part.median() for d in documents for part in d.tensor_split(max(1, len(d) // BLOCK))]
    )


def weight_ratio(run: Tensor, own: Tensor, reference: Tensor, unit: float) -> float:
    """The ratio of a parameter's gradient as a whole."""
    error, own_error, size = (_distance(x, reference) for x in (run, own, None))
    return _ratio(error, own_error, size, _unit_of_few(unit, reference.numel()))


def _distance(x: Tensor | None, reference: Tensor) -> Tensor:
    """[...] -> [1]: how far `x` is from the reference as a whole. None stands for zeros."""
    return distance(x, reference)[None]


def _unit_of_few(unit: float, numbers: int) -> float:
    return unit * max(1.0, math.sqrt(FEW / numbers))


def _ratio(error: Tensor, own: Tensor, size: Tensor, unit: float) -> float:
    """The largest ratio of [n] errors. Infinite where the run has no number."""
    # No error: both of no tokens, or of a gradient that is zero. An own error that is not finite:
    # the model's own layer overflows in this precision, and there is no measure.
    measured = (error != 0) & torch.isfinite(own)
    ratios = (error / torch.maximum(own, FLOOR * unit * size).clamp(min=1e-30))[measured]
    if torch.isnan(ratios).any():
        return math.inf
    return float(ratios.max()) if len(ratios) else 0.0


@dataclasses.dataclass
class LayerRun:
    """What one layer of the run was given and returned: first this rank's tokens, then (`gathered`)
    the whole row's, tokens first.
    """

    layer: nn.Module
    index: int
    dim: int = 0
    """The tensor dimension of the tokens in the layer's hidden states."""
    call: int = 0
    """How often the layer had run before."""
    x: Tensor | None = None
    y: Tensor | None = None
    dx: Tensor | None = None
    dy: Tensor | None = None
    autocast: torch.dtype | None = None
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """The layer's parameters and buffers as it computed with them, whole."""
    trained: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """The parameters that are differentiated, in the run's graph."""
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Of `trained`, of this rank's tokens; summed over ranks when they are compared."""
    choices: Choices = dataclasses.field(default_factory=lambda: Choices({}))
    """The experts that its routers chose, and the keys that its indexers chose."""
    previous: Tensor | None = None
    """[T, K]: the keys that an earlier layer's indexer chose for it."""

    @property
    def dtype(self) -> torch.dtype:
        """In which the layer multiplies."""
        if self.autocast is not None:
            return self.autocast
        assert self.x is not None
        return self.x.dtype


def plain_layer(
    layer: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> nn.Module:
    """transformers' own layer with these weights: without hooks, wrappers and functions that were
    put in its place.

    Shares what is not changed with `layer`. `dtype`: of every floating-point weight and buffer, or
    None for those they have.
    """
    memo: dict[int, Any] = {}

    def cast(t: Tensor, packed: bool = False) -> Tensor:
        if id(t) not in memo:
            # quantised weights carry their scales with them
            own = t.detach() if type(t) in (Tensor, nn.Parameter) else t
            memo[id(t)] = (
                own.to(dtype)
                if dtype is not None and own.is_floating_point() and not packed
                else own
            )
        return memo[id(t)]

    def plain(module: nn.Module, prefix: str) -> nn.Module:
        if id(module) in memo:
            return memo[id(module)]
        whole = None if dtype is None else _unpacked(module)
        if whole is not None:
            memo[id(module)] = _linear(whole.to(dtype), getattr(module, "bias", None))
            return memo[id(module)]
        kind: Any = next(k for k in type(module).__mro__ if not _is_wrapper(k))
        if dtype is not None and hasattr(module, "linear_mm_config"):
            kind = nn.Linear  # torchao's layer, which rounds what it multiplies to eight bits
        new = memo[id(module)] = kind.__new__(kind)
        fields = {k: v for k, v in module.__dict__.items() if k != "forward"}
        for name, value in fields.items():
            if name.endswith("_hooks") or "_hooks_" in name:
                fields[name] = type(value)()
            elif isinstance(value, Tensor):
                fields[name] = cast(value)
        if dtype is not None and isinstance(fields.get("compute_dtype"), torch.dtype):
            fields["compute_dtype"] = dtype  # quantised linears multiply in it
        if "gradient_checkpointing" in fields:
            fields["gradient_checkpointing"] = False
        new.__dict__.update(fields)
        for kept in ("_parameters", "_buffers"):
            held = {
                n: weights.get(prefix + n, t) if t is not None else None
                for n, t in module.__dict__[kept].items()
            }
            if not isinstance(module, nn.Linear):
                # stacked experts of four bits, with which transformers' own module cannot compute
                held |= {
                    n: _dequantised(t)
                    for n, t in module.__dict__[kept].items()
                    if getattr(t, "quant_state", None) is not None
                }
            new.__dict__[kept] = {
                n: None if t is None else cast(t, _is_packed(module, n)) for n, t in held.items()
            }
        new.__dict__["_modules"] = {
            n: None if m is None else plain(m, f"{prefix}{n}.") for n, m in module._modules.items()
        }
        return new

    return plain(layer, "")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer with these numbers, in the weight's type."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return linear


def _unpacked(module: nn.Module) -> Tensor | None:
    """[out, in]: the numbers that the packed weight of a linear layer of hqq stands for, whose own
    products are in the type of its scales alone; None for all other modules.
    """
    if not hasattr(module, "W_q"):
        return None
    layer: Any = module
    whole: Tensor = layer.dequantize()
    return whole


def _is_packed(module: nn.Module, name: str) -> bool:
    """Whether a parameter holds weights of four bits in the words of a float type, whose numbers
    mean nothing.
    """
    states = (
        getattr(module, "quant_state", None),
        getattr(module._parameters.get(name), "quant_state", None),
    )
    return name == "weight" and any(state is not None for state in states)


def _dequantised(weight: Any) -> Tensor:
    """The numbers that a weight of four bits stands for."""
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return whole


def _is_wrapper(kind: type) -> bool:
    """FSDP2 puts a class of its own before a module's."""
    return any(k.__name__ == "FSDPModule" for k in kind.__mro__)


def perturbed(run: LayerRun, seed: int) -> LayerRun:
    """The same layer on an input and a gradient of the output whose every number is moved by at
    most one unit of rounding.

    Roundings fall differently there, and so do the sides of a kink (ReLU) on which numbers near it
    come to lie: one more sample of the error of a computation in the run's precision.
    """
    draw = torch.Generator().manual_seed(seed)

    def moved(t: Tensor) -> Tensor:
        noise = (torch.rand(t.shape, generator=draw) * 2 - 1).to(t.device)
        return (t.to(reference_dtype(t.dtype)) * (1 + rounding(run.dtype) * noise)).to(t.dtype)

    assert run.x is not None and run.dy is not None
    return dataclasses.replace(run, x=moved(run.x), dy=moved(run.dy))


class OwnCall(NamedTuple):
    """The arguments of a layer's call on one document alone. `hidden`: the place among `args`, or
    the keyword, of its hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: int | str


class Alone(NamedTuple):
    """A layer on the documents, one at a time: [T, ...] outputs and gradients of the inputs, and
    the gradients of its parameters.
    """

    y: Tensor
    dx: Tensor
    gradients: dict[str, Tensor]
    free: Tensor
    """[T, ...] outputs where its routers choose by themselves."""


def run_alone(
    layer: nn.Module,
    run: LayerRun,
    calls: Sequence[OwnCall],
    lengths: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Alone:
    """transformers' own layer, each document by itself.

    Args:
        layer: of `plain_layer`.
        run: the whole row's input and gradient of the output, [T, ...].
        dtype: everything is computed in it; None for the run's precision.
    """
    assert run.x is not None and run.dy is not None
    parameters = {n: p.requires_grad_() for n, p in layer.named_parameters() if n in run.trained}
    outputs, inputs, free, start = [], [], [], 0
    sums: dict[str, Tensor] = {}

    def to(t: Any) -> Any:
        return (
            t.to(dtype)
            if dtype is not None and isinstance(t, Tensor) and t.is_floating_point()
            else t
        )

    low = run.autocast if dtype is None else None
    for call, length in zip(calls, lengths, strict=True):
        document = slice(start, start + length)
        start += length
        # [S, ...] -> the layer's own order
        x, dy = (to(t[document]).movedim(0, run.dim).detach() for t in (run.x, run.dy))
        x.requires_grad_()
        args, kwargs = list(tree_map(to, call.args)), tree_map(to, call.kwargs)
        if isinstance(call.hidden, int):
            args[call.hidden] = x
        else:
            kwargs[call.hidden] = x
        if run.previous is not None:
            own = kwargs["prev_topk_indices"]
            given = run.previous[document].to(own.device)
            # Of another width: every key is seen.
            kwargs["prev_topk_indices"] = given[None] if given.shape == own.shape[1:] else own
        autocast = torch.autocast(device.type, dtype=low, enabled=low is not None)
        with routers.replay(layer, run.choices.take(document)):
            with autocast, torch.enable_grad():
                y = first(layer(*args, **kwargs))
            grads = torch.autograd.grad(
                y, [x, *parameters.values()], dy.to(y.dtype), allow_unused=True
            )
        if run.choices.of:
            # Recorded, so that they do not draw.
            with routers.record(layer), autocast, torch.no_grad():
                free.append(first(layer(*args, **kwargs)).movedim(run.dim, 0))
        outputs.append(y.detach().movedim(run.dim, 0))
        inputs.append(
            torch.zeros_like(x).movedim(run.dim, 0)
            if grads[0] is None
            else grads[0].movedim(run.dim, 0)
        )
        wide = reference_dtype(y.dtype)
        for name, g in zip(parameters, grads[1:], strict=True):
            if g is not None:
                sums[name] = sums[name] + g.to(wide) if name in sums else g.to(wide)
    return Alone(torch.cat(outputs), torch.cat(inputs), sums, torch.cat(free or outputs))


def is_finite(alone: Alone) -> bool:
    """Whether every number of a layer on the documents is finite."""
    return all(
        bool(torch.isfinite(t).all()) for t in (alone.y, alone.dx, *alone.gradients.values())
    )


def first(output: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    return output if isinstance(output, Tensor) else output[0]


Errors = dict[str, Tensor]
"""How far a layer is from the reference: of each thing that is compared, [blocks] of tokens or [1]
for a gradient of weights.
"""


def errors(
    y: Tensor, dx: Tensor, gradients: Mapping[str, Tensor], reference: Alone, lengths: Sequence[int]
) -> Errors:
    """Of a layer's output, of the gradient of its input [T, ...], and of the gradients of its
    modules' parameters.
    """
    return {
        "output": token_errors(y, reference.free, lengths),
        "gradient of the input": token_errors(dx, reference.dx, lengths),
        # A bias and its weight as one: the gradient of a key's bias is zero in exact arithmetic.
        **{
            f"gradient of {module}": (
                torch.stack(
                    [_distance(_of(gradients, n, reference), reference.gradients[n]) for n in names]
                ).norm(dim=0)
            )
            for module, names in _by_module(reference).items()
        },
    }


def own_errors(own: Alone, reference: Alone, lengths: Sequence[int]) -> Errors:
    """Of transformers' own layer in the run's precision."""
    return errors(own.free, own.dx, own.gradients, reference, lengths)


def larger(first: Errors, second: Errors) -> Errors:
    """The larger of each two errors. One of `second` that is not finite does not count."""
    return {
        what: torch.maximum(e, torch.where(second[what].isfinite(), second[what], e))
        for what, e in first.items()
    }


def judge(run: LayerRun, own: Errors, reference: Alone, lengths: Sequence[int]) -> dict[str, float]:
    """The ratios of a layer: of its output, of the gradient of its input, and of the gradients of
    its modules' parameters.
    """
    unit = rounding(run.dtype)
    assert run.y is not None and run.dx is not None
    found = errors(run.y, run.dx, run.gradients, reference, lengths)
    numbers = {
        f"gradient of {m}": sum(reference.gradients[n].numel() for n in names)
        for m, names in _by_module(reference).items()
    }
    sizes = errors(
        torch.zeros_like(reference.free), torch.zeros_like(reference.dx), {}, reference, lengths
    )
    return {
        what: _ratio(
            found[what],
            own[what],
            sizes[what],
            _unit_of_few(unit, numbers[what]) if what in numbers else unit,
        )
        for what in found
    }


def _by_module(reference: Alone) -> dict[str, list[str]]:
    modules: dict[str, list[str]] = {}
    for name in reference.gradients:
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return modules


def _of(gradients: Mapping[str, Tensor], name: str, reference: Alone) -> Tensor:
    return gradients[name] if name in gradients else torch.zeros_like(reference.gradients[name])


def plain_attention(q: Tensor, k: Tensor, v: Tensor, asked: Asked, sinks: Tensor | None) -> Tensor:
    """Attention of one document as models write it down: [S, H, D], [S, Hk, D], [S, Hk, Dv] -> [S,
    H, Dv], all in the inputs' type but for the softmax, which is float32 at least."""
    groups = q.shape[1] // k.shape[1]
    # [S, H, D] -> [H, S, D]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * asked.scale
    if asked.softcap is not None:
        scores = torch.tanh(scores / asked.softcap) * asked.softcap
    places = torch.arange(q.shape[1], device=q.device)
    distance = places[:, None] - places
    seen = distance >= 0
    if asked.window is not None:
        seen = seen & (distance < asked.window)
    if asked.chunk is not None:
        seen = seen & (places[:, None] // asked.chunk == places // asked.chunk)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.to(scores.dtype)[:, None, None].expand(-1, q.shape[1], 1)], dim=-1
        )
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores.softmax(-1, dtype=wide).to(v.dtype)[..., : q.shape[1]] @ v).transpose(0, 1)
