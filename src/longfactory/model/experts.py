"""Adapters on routed experts, whose weights are one stacked parameter for all experts of a layer.

PEFT puts an adapter on a parameter by a wrapper around the module that holds it (`ParamWrapper`,
one around the other where a module holds several). Its own forward adds `B A` to the weights of all
experts before each use: a second copy of a layer's experts, and in the backward pass the gradient
of all of it. Here the wrapper computes

    y = x W_e + scaling * (x A_e) B_e            of each token x and the expert e that it is sent to

with grouped products over tokens sorted by expert: the adapter costs 2 r (in + out) operations a
token, and the frozen weights have no gradient. What PEFT keeps, saves and merges is untouched.

Full training runs through the same function instead of transformers' (`install_grouped`). It sorts
tokens as that does, with adjoints that are gathers and sums; those that autograd makes add up by
index. And autocast does not reach grouped products, which take the type of the weights: with fp32
masters they would run in fp32, one expert after the other. Here they get the weights that autocast
gives linear layers.

Letters in shapes: S pairs of a token and an expert, E experts, r rank.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfactory.memory.expert_forms import gates_clamped, gates_plainly, of_interface
from longfactory.model import expert_ops
from longfactory.sp.text_model import Idle

EXPERT_NAMES = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
}
"""What old transformers named the linear maps of each expert -> the stacked parameter of today."""
PARTNERS = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}
"""Linear maps of an expert that share a stacked parameter."""
PROCESSORS = 24
"""Streaming multiprocessors that NCCL's sum of gradients occupies, between two H200."""
_ALIGNED = 16
"""Bytes that CUDA's grouped product wants rows to be a multiple of."""


def expert_maps(model: nn.Module, parts: Idle) -> list[str]:
    """Whole names of the routed experts' stacked linear maps that take an adapter, each [E, ., .].

    Args:
        model: a transformers model, not inside PEFT.
        parts: what text does not pass through.
    """
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if name not in parts and "Expert" in type(module).__name__
        for own, parameter in module.named_parameters(recurse=False)
        if "bias" not in own and len(whole_shape(parameter)) == 3
    ]


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the numbers that a parameter stands for, which packed weights do not have
    (hqq's say it: `model.hqq`) and those under ZeRO-3 have between their uses alone.
    """
    if hasattr(parameter, "stands_for"):
        return tuple(parameter.stands_for)
    state = getattr(parameter, "quant_state", None)
    shape = parameter.shape if state is None else getattr(state, "shape", parameter.shape)
    return tuple(getattr(parameter, "ds_shape", shape))


def wrapped_parameters(wrapper: nn.Module) -> Iterator[Any]:
    """A `ParamWrapper` of PEFT and those inside it, outermost first: one for each parameter."""
    layer: Any = wrapper
    while is_wrapper(layer):
        yield layer
        layer = layer.base_layer


def is_wrapper(module: Any) -> bool:
    """Whether a module is PEFT's wrapper around a parameter."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(module, ParamWrapper)


def install(model: nn.Module) -> None:
    """Replaces the forward of PEFT's wrappers around parameters. A second call changes nothing.

    Args:
        model: inside PEFT, not yet wrapped by FSDP2, DDP or DeepSpeed.
    """
    inner = {id(w.base_layer) for w in model.modules() if is_wrapper(w)}
    for module in model.modules():
        if is_wrapper(module) and id(module) not in inner and "forward" not in vars(module):
            module.forward = functools.partial(_forward, module)


def _forward(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """What the module inside a wrapper computes, with the adapters of its parameters."""
    adapters = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.disable_adapters or wrapper.merged or len(adapters) != 1:
        return type(wrapper).forward(wrapper, *args, **kwargs)
    base = wrapper.get_base_layer()
    wrappers = {w.parameter_name: w for w in wrapped_parameters(wrapper)}
    if type(base) is nn.Linear:
        return _linear(wrapper, base, adapters[0], *args)
    if of_interface(base):
        return _experts(base, wrappers, adapters[0], *args, **kwargs)
    return _with_sums(base, wrappers, adapters[0], *args, **kwargs)


def install_grouped(model: nn.Module) -> None:
    """Modules of transformers' experts interface compute by `_experts` wherever they would compute
    by transformers' grouped products, in training and out of it; the other implementations
    (`eager`, with which the guard compares) stay. A second call changes nothing.

    Args:
        model: not yet wrapped by FSDP2, DDP or DeepSpeed, with or without PEFT.
    """
    for module in model.modules():
        if of_interface(module) and "forward" not in vars(module):
            module.forward = functools.partial(_grouped_or_own, module)


def beside_messages(model: nn.Module) -> None:
    """Experts whose backward pass begins while the gradients of the layer above are summed over
    GPUs: the first two of its four products are of that time, and leave processors to the messages.

    A grouped product has one block on each processor. One that finds 24 of 132 occupied waits for
    them with the share of work that is theirs, and takes twice as long; with 24 blocks fewer it
    takes a fifth longer (PyTorch's `_SMCarveout_EXPERIMENTAL`).
    """
    if hasattr(torch._C, "_set_sm_carveout_experimental"):
        for module in model.modules():
            if of_interface(module):
                module.beside_messages = True  # type: ignore[assignment]


def _leave_processors(x: Tensor, y: Tensor) -> None:
    """The products between the gradient of `y` and that of `x`, from which it was made."""
    if x.requires_grad:
        y.register_hook(lambda grad: torch._C._set_sm_carveout_experimental(PROCESSORS))
        x.register_hook(lambda grad: torch._C._set_sm_carveout_experimental(None))


def _grouped_or_own(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module of experts whose weights are parameters of its own."""
    grouped = module.config._experts_implementation == "grouped_mm"
    if grouped and not getattr(module, "_is_expert_parallel", False):
        return _experts(module, {}, "", *args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _computed_in(weight: Any) -> torch.dtype:
    """The type of a product with the weight."""
    if hasattr(weight, "quant_state"):
        return weight.quant_state.dtype  # type: ignore[no-any-return]
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    ):
        return torch.get_autocast_dtype(kind)
    return weight.dtype  # type: ignore[no-any-return]


def in_autocast(weight: Tensor) -> Tensor:
    """The weight in the type in which autocast would have a product computed; itself where autocast
    is off, and where it changes no type (float64).
    """
    return weight.to(_computed_in(weight))


def _linear(wrapper: Any, base: nn.Linear, adapter: str, x: Tensor) -> Tensor:
    """An ordinary layer whose weight PEFT adapts as a parameter."""
    down, up = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
    result = base(x)
    low = up(down(x.to(down.weight.dtype)))
    return result + (low * wrapper.scaling[adapter]).to(result.dtype)


def _with_sums(
    base: nn.Module, wrappers: dict[str, Any], adapter: str, *args: Any, **kwargs: Any
) -> Any:
    """A module with a forward of its own: it is given the sums of its weights and their adapters,
    as PEFT gives them.
    """
    sums = {}
    for name, wrapper in wrappers.items():
        weight = getattr(base, name)
        with torch.autocast(weight.device.type, enabled=False):
            sums[name] = weight + wrapper.get_delta_weight(adapter).reshape(weight.shape)
    # What stands in the instance's own dictionary is found before its parameters.
    vars(base).update(sums)
    try:
        return base(*args, **kwargs)
    finally:
        for name in sums:
            del vars(base)[name]


def _experts(
    base: Any,
    wrappers: dict[str, Any],
    adapter: str,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Experts as transformers computes them by grouped products, with adapters.

    Args:
        base: a module of transformers' experts interface.
        hidden_states: [tokens, H].
        top_k_index: [tokens, K] experts.
        top_k_weights: [tokens, K].
    Returns:
        [tokens, H].
    """
    picks = top_k_index.shape[1]
    expert, order = torch.sort(top_k_index.reshape(-1))
    bins = torch.arange(base.num_experts, device=expert.device)
    offsets = torch.searchsorted(expert, bins, right=True).to(torch.int32)

    def product(x: Tensor, name: str) -> Tensor:
        """[S, in] -> [S, out]"""
        weight = getattr(base, name)
        if hasattr(weight, "quant_state"):
            x = x.to(_computed_in(weight))
            y = _FourBitProduct.apply(x, weight, offsets, base.is_transposed)
        else:
            weight = in_autocast(weight)
            x = x.to(weight.dtype)
            y = grouped_mm(x, weight if base.is_transposed else weight.transpose(1, 2), offsets)
        if name in wrappers:
            y += low_rank(wrappers[name], adapter, x, offsets)  # in place: it is [S, out], too
        return y

    def bias(name: str) -> Tensor | None:
        """[E, out]"""
        return in_autocast(getattr(base, f"{name}_bias")) if base.has_bias else None

    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    first = "gate_up_proj" if base.has_gate else "up_proj"
    x = _Sent.apply(hidden_states, order, back, picks, _computed_in(getattr(base, first)))
    x = product(x, first)
    if gates_clamped(base):
        x = _Clamped.apply(x, bias(first), expert, float(base.alpha), float(base.limit))
    else:
        x = _plus(x, bias(first), expert)
        if gates_plainly(base):
            x = _Gated.apply(x)
        else:
            x = base._apply_gate(x) if base.has_gate else base.act_fn(x)
    gated = x
    x, last = product(x, "down_proj"), bias("down_proj")
    if getattr(base, "beside_messages", False):
        _leave_processors(gated, x)
    if getattr(base, "has_post_expert_norm", False):  # transformers 5.17 has none
        x, last = base.post_expert_norm(_plus(x, last, expert)), None
    return _Combined.apply(x, top_k_weights, last, top_k_index, expert, order, back, hidden_states)


def _plus(y: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
    """[S, out] + [E, out] of each pair's expert [S]."""
    return y if bias is None else y + bias[expert]


class _Sent(torch.autograd.Function):
    """[tokens, H] -> [S, H]: a token for each of the experts that it is sent to, sorted by expert,
    in the type that they compute in.

    Its adjoint is a gather and a sum; autograd's own adds up by index.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, order: Tensor, back: Tensor, picks: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.picks, ctx.dtype = picks, x.dtype
        ctx.save_for_backward(back)
        return x.to(dtype)[order // picks]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        dx = expert_ops.sum_over_picks(dy, back, ctx.picks, ctx.dtype)
        return dx, None, None, None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up of [S, 2 I]; the input alone is stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return expert_ops.gated(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return expert_ops.gated_backward(dy, x)  # type: ignore[no-any-return]


def _bias_gradient(dy: Tensor, expert: Tensor, experts: int) -> Tensor:
    """Of [S, out] and each pair's expert [S]: [E, out], the sums over each expert's pairs.

    A product with a matrix of ones: autograd's own adds up by index, one pair after the other where
    experts are few.
    """
    # [E, S]
    sent = torch.arange(experts, device=expert.device).unsqueeze(1) == expert
    return sent.to(dy.dtype) @ dy


class _Clamped(torch.autograd.Function):
    """gpt-oss's gate of [S, 2 I] and the bias [E, 2 I] of each pair's expert [S]; the input without
    the bias is stored.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, bias: Tensor | None, expert: Tensor, alpha: float, limit: float
    ) -> Tensor:
        ctx.save_for_backward(x, bias, expert)
        ctx.alpha, ctx.limit = alpha, limit
        return expert_ops.clamped(x, expert, alpha, limit, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, bias, expert = ctx.saved_tensors
        dx = expert_ops.clamped_backward(dy, x, expert, ctx.alpha, ctx.limit, bias)
        own = _bias_gradient(dx, expert, len(bias)) if ctx.needs_input_grad[1] else None
        return dx, own, None, None, None


class _Combined(torch.autograd.Function):
    """[S, H] sorted by expert -> [T, H]: the weighted sum over each token's experts, with the bias
    [E, H] of each, in the type of `like`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        chosen: Tensor,
        expert: Tensor,
        order: Tensor,
        back: Tensor,
        like: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weights, bias, expert, order, back)
        return expert_ops.weighted_sum(x, weights, back, like, chosen, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, weights, bias, expert, order, back = ctx.saved_tensors
        dx, own = expert_ops.weighted_sum_backward(
            dout.contiguous(), x, weights, order, expert, bias
        )
        dweights = own[back].view_as(weights).to(weights.dtype)
        dbias = _bias_gradient(dx, expert, len(bias)) if ctx.needs_input_grad[2] else None
        return dx, dweights, dbias, None, None, None, None, None


def low_rank(wrapper: Any, adapter: str, x: Tensor, offsets: Tensor) -> Tensor:
    """scaling * (x A_e) B_e: [S, in] -> [S, out].

    Args:
        wrapper: PEFT's. Its A is [E r, in], its B [out, r E].
        x: sorted by expert.
        offsets: [E] int32, where each expert's tokens end.
    """
    first, second = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    experts = wrapper.num_experts
    # [E r, in] -> [E, r, in] -> [E, in, r]
    a = first.view(experts, -1, first.shape[1]).transpose(1, 2).to(x.dtype)
    # [out, r E] -> [out, r, E] -> [E, r, out]
    b = second.view(second.shape[0], -1, experts).permute(2, 1, 0).to(x.dtype)
    b = b * wrapper.scaling[adapter]
    missing = -a.shape[2] % (_ALIGNED // x.element_size())
    if missing and x.is_cuda:
        a, b = F.pad(a, (0, missing)), F.pad(b, (0, 0, 0, missing))
    return grouped_mm(grouped_mm(x, a.contiguous(), offsets), b.contiguous(), offsets)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[S, in] sorted by expert, [E, in, out] -> [S, out]: each token times its expert's matrix."""
    if x.is_cuda:
        return F.grouped_mm(x, weight, offs=offsets)
    # torch's product for CPUs takes neither float64 nor every stride
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    matrices = weight.unbind(0)
    return torch.cat([x[i:j] @ matrix for i, j, matrix in zip(starts, ends, matrices, strict=True)])


# ---- weights of four bits ------------------------------------------------------------------------


class _FourBitProduct(torch.autograd.Function):
    """`grouped_mm` with frozen weights of four bits. They are made whole for the product, in both
    directions, and not kept between.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Any, offsets: Tensor, transposed: bool
    ) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        ctx.save_for_backward(offsets)
        whole = dequantised(weight)
        return grouped_mm(x, whole if transposed else whole.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (offsets,) = ctx.saved_tensors
        whole = dequantised(ctx.weight)
        dx = grouped_mm(
            dy.contiguous(), whole.transpose(1, 2) if ctx.transposed else whole, offsets
        )
        return dx, None, None, None


def dequantised(weight: Any) -> Tensor:
    """The numbers that a four-bit weight stands for, in their own shape and type."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


@contextlib.contextmanager
def experts_in_four_bits() -> Iterator[None]:
    """While open, transformers loads routed experts in four bits too, one parameter after the
    other, where it loads linear layers so. By itself it leaves them in half precision.

    Those with a forward of their own stay as they are; so do all where FSDP2 or ZeRO-3 shards the
    weights.
    """
    from transformers.core_model_loading import ConversionOps
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizers_utils import get_module_from_name

    name = "bitsandbytes_4bit"
    own = AUTO_QUANTIZER_MAPPING[name]

    def is_expert(quantizer: Any, model: Any, parameter: str) -> bool:
        storage = quantizer.quantization_config.bnb_4bit_quant_storage
        if storage != torch.uint8 or is_deepspeed_zero3_enabled():
            return False
        module, end = get_module_from_name(model, parameter)
        return (
            of_interface(module)
            and "bias" not in end
            and isinstance(whole := getattr(module, end, None), nn.Parameter)
            and whole.dim() == 3
        )

    class Quantize(ConversionOps):
        """Of linear layers as transformers does it; of experts in place of their parameter."""

        def __init__(self, quantizer: Any) -> None:
            self.quantizer, self.linear = quantizer, own.get_quantize_ops(quantizer)

        def convert(self, input_dict: Any, model: Any = None, **kwargs: Any) -> Any:
            if not any(is_expert(self.quantizer, model, n) for n in input_dict):
                return self.linear.convert(input_dict, model=model, **kwargs)
            return {
                n: self.four_bits(value[0] if isinstance(value, list) else value)
                for n, value in input_dict.items()
            }

        def four_bits(self, value: Tensor) -> Any:
            from bitsandbytes.nn import Params4bit

            config = self.quantizer.quantization_config
            return Params4bit(
                value.contiguous(),
                requires_grad=False,
                quant_type=config.bnb_4bit_quant_type,
                compress_statistics=config.bnb_4bit_use_double_quant,
            ).to(value.device)

    class Quantizer(own):  # type: ignore[misc, valid-type]
        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            linear = super().param_needs_quantization(model, param_name, **kwargs)
            return linear or is_expert(self, model, param_name)

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

    AUTO_QUANTIZER_MAPPING[name] = Quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[name] = own


def install_four_bits(model: nn.Module) -> int:
    """Gives experts in four bits a forward that computes with them. Returns how many numbers they
    hold.
    """
    numbers = 0
    for module in model.modules():
        if of_interface(module):
            packed = [p for p in module.parameters(recurse=False) if hasattr(p, "quant_state")]
            numbers += sum(torch.Size(whole_shape(p)).numel() for p in packed)
            if packed:
                module.forward = functools.partial(_experts, module, {}, "")
    return numbers


@contextlib.contextmanager
def whole_shapes(model: nn.Module, ends: Iterable[str]) -> Iterator[None]:
    """While open, stacked parameters of four bits have the shape of the numbers that they stand
    for, as PEFT looks at them to make its adapters; their values are not there. (Linear layers of
    four bits it knows.)

    Args:
        ends: of the parameters' names.
    """
    ends = tuple(ends)
    swapped = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            continue
        for own, p in list(module.named_parameters(recurse=False)):
            whole = f"{name}.{own}"
            if hasattr(p, "quant_state") and any(f".{whole}".endswith(f".{end}") for end in ends):
                shape, dtype = whole_shape(p), p.quant_state.dtype
                one = torch.zeros(1, dtype=dtype, device=p.device).expand(shape)
                module._parameters[own] = nn.Parameter(one, requires_grad=False)
                swapped.append((module, own, p))
    try:
        yield
    finally:
        for module, own, p in swapped:
            module._parameters[own] = p
