"""Which difference a failing comparison follows: the run is verified again with one thing left out
at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from longfactory.config import RunConfig
from longfactory.config.adapter_facts import trains_adapters
from longfactory.errors import UserError
from longfactory.memory.settings import PARTS_OF_CHECKPOINTING
from longfactory.train.verify.report import Cause, VerifyReport

LARGEST_FULL = 2 * 10**9
"""Parameters up to which a run is verified without its adapter: all of them are trained then."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run with one thing left out."""

    left_out: str
    cfg: RunConfig
    rows: int
    tokens: int
    apart: bool = False
    """One sample a row."""


def variants(
    cfg: RunConfig,
    *,
    rows: int,
    tokens: int,
    several: bool,
    windows: Sequence[int],
    parameters: int,
) -> list[Variant]:
    """What can be left out of a run, by what the run has.

    Args:
        several: a row holds several samples.
        windows: sizes that the verified rows exceed.
        parameters: of the whole model.
    """
    found = []

    def without(what: str, run: RunConfig = cfg, **more: int | bool) -> None:
        found.append(Variant(what, run, **{"rows": rows, "tokens": tokens, **more}))  # type: ignore[arg-type]

    size = cfg.sequence_parallel_size
    if size > 1:
        parallel = dataclasses.replace(
            cfg.parallel,
            sequence_parallel_size=1,
            sequence_parallel_mode="zigzag-ring",
            sequence_parallel_ulysses_degree=None,
            sequence_parallel_ring_degree=None,
        )
        without("sequence parallelism", dataclasses.replace(cfg, parallel=parallel))
    if several:
        without("packing (one sample a row)", apart=True)
    if windows:
        without(
            f"the window (no document longer than {min(windows)} tokens)",
            tokens=min(tokens, min(windows)),
            apart=True,
        )
    if rows > 1:
        without("accumulation (one micro-batch)", rows=1)
    if cfg.memory.disable_gradient_checkpointing is False:
        memory = dataclasses.replace(
            cfg.memory, disable_gradient_checkpointing=True, **PARTS_OF_CHECKPOINTING
        )
        without(
            "memory techniques (checkpointing, hand-written layers, chunks)",
            dataclasses.replace(cfg, memory=memory),
        )
    if trains_adapters(cfg.method) and parameters <= LARGEST_FULL:
        method = dataclasses.replace(cfg.method, finetuning_type="full")
        model = dataclasses.replace(cfg.model, adapter_name_or_path=())
        without("LoRA", dataclasses.replace(cfg, method=method, model=model))
    return found


def trace(
    found: Sequence[Variant], verified: Callable[[Variant], VerifyReport]
) -> tuple[Cause, ...]:
    """Verifies each variant. Collective."""
    causes = []
    for variant in found:
        release_memory()
        with _quiet_log():
            try:
                report = verified(variant)
            except (UserError, ValueError, RuntimeError) as error:
                told = (str(error).strip().splitlines() or [type(error).__name__])[0]
                causes.append(Cause(variant.left_out, None, told))
                continue
        causes.append(Cause(variant.left_out, report.exact))
    return tuple(causes)


def release_memory() -> None:
    """What an earlier run held is given back before the next is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    from accelerate.state import AcceleratorState, GradientState

    # They would keep the sharding and the precision of the run before.
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """What a run says at its start has been said once."""
    logger = logging.getLogger("longfactory")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.disabled = disabled
