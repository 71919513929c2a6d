"""Large weights and gradients that FSDP2 sends without copying them first.

FSDP2 makes one message of all parameters of a layer: it copies the shards of the weights into a
buffer and what was gathered out of another, and copies all gradients into a third, on the stream
that computes. With Shard(0) and a first dim that the processes divide evenly, the part of each
process is contiguous in the tensor itself: it can be gathered where it is used, and summed where
autograd left it. That takes a message of its own for each such tensor, and less memory.

FSDP2 has no setting for it. `begin` replaces three functions of its private modules, each by one
that takes the large tensors away and calls it for the rest.
"""

from __future__ import annotations

import functools
import inspect
import logging
import typing
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

log = logging.getLogger(__name__)

LEAST_BYTES = 32 << 20
"""Of a tensor that is a message of its own: below, a copy takes less than another message."""

EXPECTED = {
    "foreach_all_gather": (
        "fsdp_params group async_op all_gather_copy_in_stream all_gather_stream device"
        " all_gather_comm"
    ),
    "foreach_all_gather_copy_out": "all_gather_result fsdp_params group",
    "foreach_reduce": (
        "fsdp_params unsharded_grads reduce_scatter_group reduce_scatter_stream reduce_scatter_comm"
        " orig_dtype reduce_dtype device gradient_divide_factor all_reduce_group all_reduce_stream"
        " all_reduce_grads partial_reduce_output all_reduce_hook force_sum_reduction_for_comms"
    ),
}
"""Function of `_fsdp_param_group` -> its parameters, the same in torch 2.11 to 2.13."""

_gathered: weakref.WeakSet[Any] = weakref.WeakSet()  # FSDP2's parameters that `gather` was told of
_under_way: weakref.WeakSet[Any] = weakref.WeakSet()  # of them, those gathered and not yet used


def begin() -> bool:
    """From now on large gradients are summed without a copy, in all models of this process.

    Returns:
        False, with a warning, where FSDP2's functions are not those that would be replaced: it
        copies then, as it does by itself.
    """
    of_torch: Any = _fsdp_param_group
    if getattr(of_torch.foreach_reduce, "uncopied", False):
        return True
    difference = _difference(of_torch)
    if difference is not None:
        log.warning(
            "torch %s: FSDP2's %s. FSDP2 copies weights and gradients before it sends them, which"
            " takes longer.",
            torch.__version__,
            difference,
        )
        return False
    replaced = {
        "foreach_all_gather": _gather,
        "foreach_all_gather_copy_out": _copy_out,
        "foreach_reduce": _reduce,
    }
    for name, function in replaced.items():
        original = getattr(of_torch, name)
        replacement: Any = functools.wraps(original)(functools.partial(function, original))
        replacement.uncopied = True
        setattr(of_torch, name, replacement)
    return True


def _difference(of_torch: Any) -> str | None:
    """What is not as expected of the functions that are replaced."""
    for name, parameters in EXPECTED.items():
        found = " ".join(inspect.signature(getattr(of_torch, name)).parameters)
        if found != parameters:
            return f"{name} takes {found}; LongFactory knows it with {parameters}"
    if _results(of_torch.foreach_reduce) not in (6, 7):
        return "foreach_reduce returns other values than LongFactory knows"
    return None


def gather(module: FSDPModule, uncopied: bool) -> None:
    """Whether large weights of a module are gathered where they are used.

    That is for modules whose gather begins when the one before them has been computed: the memory
    comes from the stream that computes, which the gather waits for.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    for parameter in group.fsdp_params if group is not None else ():
        if uncopied:
            _gathered.add(parameter)
        else:
            _gathered.discard(parameter)


@torch.no_grad()
def _gather(
    original: Callable,
    fsdp_params: list[Any],
    group: dist.ProcessGroup,
    async_op: bool,
    copy_in_stream: torch.Stream,
    stream: torch.Stream,
    device: torch.device,
    comm: Any,
) -> Any:
    large = [p for p in fsdp_params if p in _gathered and _is_large_weight(p, group.size())]
    rest = [p for p in fsdp_params if p not in large]
    if async_op or not large or not rest:
        return original(fsdp_params, group, async_op, copy_in_stream, stream, device, comm)
    for parameter in large:
        shard = parameter._sharded_param_data
        parameter.init_all_gather_outputs([shard.numel()], [shard.dtype], group.size(), device)
        parameter.alloc_all_gather_outputs()
    stream.wait_stream(torch.get_device_module(device).current_stream())
    with torch.get_device_module(device).stream(stream):
        for parameter in large:
            whole = parameter.all_gather_outputs[0]
            with torch.autograd._unsafe_preserve_version_counter(whole):
                comm(
                    output_tensor=whole,
                    input_tensor=parameter._sharded_param_data,
                    group=group,
                    async_op=False,
                )
            _under_way.add(parameter)
    # the event of the last message is that of all before it
    return original(rest, group, async_op, copy_in_stream, stream, device, comm)


def _copy_out(
    original: Callable, result: Any, fsdp_params: list[Any], group: dist.ProcessGroup
) -> None:
    rest = [p for p in fsdp_params if p not in _under_way]
    for parameter in fsdp_params:
        _under_way.discard(parameter)
    original(result, rest, group)


def _is_large_weight(parameter: Any, processes: int) -> bool:
    """The shard is what other processes get, in its dtype, and lies in the whole as it is."""
    shard = parameter._sharded_param_data
    return (
        parameter.sharded_state == ShardedState.SHARDED
        and type(parameter._sharded_local_tensor) is Tensor
        and not parameter.offload_to_cpu
        and parameter.param_dtype in (None, shard.dtype)
        and parameter.fsdp_placement.dim == 0
        and parameter._orig_size.numel() == shard.numel() * processes
        and shard.nbytes * processes >= LEAST_BYTES
    )


@torch.no_grad()
def _reduce(
    original: Callable,
    fsdp_params: list[Any],
    unsharded_grads: list[Tensor],
    group: dist.ProcessGroup | None,
    stream: torch.Stream,
    comm: Any,
    orig_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    device: torch.device,
    divide_factor: float | None,
    all_reduce_group: dist.ProcessGroup | None,
    all_reduce_stream: torch.Stream,
    all_reduce_grads: bool,
    partial_reduce_output: Tensor | None,
    all_reduce_hook: Callable[[Tensor], None] | None,
    force_sum: bool = False,
) -> Any:
    def by_torch(parameters: list[Any], grads: list[Tensor]) -> Any:
        return original(
            parameters,
            grads,
            group,
            stream,
            comm,
            orig_dtype,
            reduce_dtype,
            device,
            divide_factor,
            all_reduce_group,
            all_reduce_stream,
            all_reduce_grads,
            partial_reduce_output,
            all_reduce_hook,
            force_sum,
        )

    dtypes = {g.dtype for g in unsharded_grads}
    plain = (
        group is not None
        and group.size() > 1
        and all_reduce_group is None
        and all_reduce_hook is None
        and len(dtypes) == 1
        and {reduce_dtype, orig_dtype} <= {None, *dtypes}
    )
    if not plain:
        return by_torch(fsdp_params, unsharded_grads)
    assert group is not None
    before, after, operation, _ = _fsdp_collectives._get_gradient_divide_factors(
        group, None, dtypes.pop(), device.type, divide_factor, force_sum
    )
    pairs = list(zip(fsdp_params, unsharded_grads, strict=True))
    large = [(p, g) for p, g in pairs if _is_large_gradient(p, g, group.size())]
    if not large or {before, after} - {None, 1}:
        return by_torch(fsdp_params, unsharded_grads)
    rest = [(p, g) for p, g in pairs if all(p is not one for one, _ in large)]
    # as in FSDP2's own function: the caller's list would keep gradients that are copied below
    del pairs
    unsharded_grads.clear()
    on = torch.get_device_module(device)
    stream.wait_stream(on.current_stream())
    with on.stream(stream):
        for parameter, grad in large:
            shard = comm.allocate((grad.numel() // group.size(),), dtype=grad.dtype, device=device)
            comm(output_tensor=shard, input_tensor=grad.view(-1), group=group, op=operation)
            _give(parameter, shard.view(parameter.sharded_size))
        event = stream.record_event()
    held = [g for _, g in large]  # FSDP2 holds them until the stream that computes has waited
    if rest:
        result = by_torch([p for p, _ in rest], [g for _, g in rest])
        return ((held, result[0]), *result[1:])
    # torch 2.11 returns two events, later ones the stream of the second between them
    events = (event, event) if _results(original) == 6 else (event, stream, event)
    return (held, *events, None, None, None)


def _is_large_gradient(parameter: Any, grad: Tensor, processes: int) -> bool:
    return (
        grad.nbytes >= LEAST_BYTES
        and grad.is_contiguous()
        and not parameter.offload_to_cpu
        and parameter.fsdp_placement.dim == 0
        and grad.shape[0] % processes == 0
    )


def _give(parameter: Any, shard: Tensor) -> None:
    """What FSDP2 does with the sum of a gradient: adds it to what is there, and calls hooks."""
    sharded = parameter.sharded_param
    if sharded.grad is None:
        sharded.grad = parameter.to_sharded_dtensor(shard)
    else:
        sharded.grad._local_tensor += shard
    for hook in (getattr(sharded, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(sharded)


def _results(original: Callable) -> int:
    """How many values FSDP2's function returns."""
    return len(typing.get_args(inspect.signature(original).return_annotation))
