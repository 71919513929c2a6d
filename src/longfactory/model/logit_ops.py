"""What is made of a chunk of logits, forward and backward, in one or two passes over it.

Plain functions of tensors, compiled on a GPU (`memory.compiled`). Numbers are float32 for 16-bit
logits (the type itself for the others), rounded once. Letters: n tokens, V vocabulary. `scale` and
`softcap` are those of `LogitTransform`: what a model does to its logits after the output layer.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from longfactory.memory.compiled import fused
from longfactory.memory.layer_ops import wide

log = logging.getLogger(__name__)


def transformed(z: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`softcap * tanh(scale * z / softcap)`, what a model does to its logits."""
    z = z * scale if scale != 1.0 else z
    return softcap * torch.tanh(z / softcap) if softcap else z


@fused("z", "labels")
def statistics(
    z: Tensor, labels: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V], labels [n] -> [n] each: log-sum-exp, the label's logit, the largest one."""
    zw = transformed(z.to(wide(z.dtype)), scale, softcap)
    return zw.logsumexp(1), zw.gather(1, labels[:, None])[:, 0], zw.amax(1)


def label_gradient(
    z: Tensor, lse: Tensor, labels: Tensor, g: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """The gradient of the logits of the layer, [n, V] in their type, from that of the label's
    log-probability, g [n]: g (onehot(label) - softmax). May be written over z.
    """
    label = z.gather(1, labels[:, None]).to(lse.dtype)
    slope = torch.ones_like(label)
    if softcap:
        t = torch.tanh(label * (scale / softcap))
        label, slope = softcap * t, scale * (1 - t * t)
    elif scale != 1.0:
        label, slope = label * scale, slope * scale
    own = (1 - torch.exp(label - lse[:, None])) * g[:, None] * slope
    p = _softmax_gradient(z, lse, g, scale, softcap)
    return p.scatter_(1, labels[:, None], own.to(p.dtype))


@fused("z", "lse", "g")
def _softmax_gradient(
    z: Tensor, lse: Tensor, g: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """-g softmax, times the slope of what is done to logits."""
    zw = z.to(lse.dtype)
    if softcap:
        t = torch.tanh(zw * (scale / softcap))
        slope = scale * (1 - t * t)
        p = (softcap * t).sub_(lse[:, None]).exp_() * slope
    elif scale != 1.0:
        p = (zw * scale).sub_(lse[:, None]).exp_().mul_(scale)
    else:
        p = zw.sub_(lse[:, None]).exp_()
    return p.mul_(-g[:, None]).to(z.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the type of `total`. On CUDA the matrix units do both from 16-bit
    factors, in one pass over `total` where PyTorch has that product.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif not a.is_cuda:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif _adds_on_cuda():
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


@functools.cache
def _adds_on_cuda() -> bool:
    """Whether PyTorch adds a product of 16-bit matrices to a float32 one in place, rightly: tried
    once.
    """
    total = torch.ones(16, 16, device="cuda")
    a = torch.eye(16, device="cuda", dtype=torch.bfloat16)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, total.dtype, out=total)
    except (RuntimeError, AttributeError, TypeError) as error:
        log.info("Gradients of the output layer are added in a pass of their own: %s", error)
        return False
    return torch.equal(total, 1 + torch.eye(16, device="cuda"))
