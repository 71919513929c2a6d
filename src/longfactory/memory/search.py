"""The settings that are fastest among those that fit, and the longest row that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from longfactory.memory.budget import MARGIN, Budget, budget, fits
from longfactory.memory.seconds import seconds
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Technique, techniques

CAREFUL = 0.80  # above this share settings must be faster to be chosen
HOST_SHARE = 0.85  # of the host's memory, for optimizer states and offloaded activations together


def choose(
    job: TrainingJob,
    mode: str = "auto",
    host_share: float = HOST_SHARE,
    fixed: Mapping[str, Any] | None = None,
) -> tuple[MemorySettings, Budget, bool]:
    """The fastest settings that fit and agree with what the user fixed.

    Args:
        mode: "auto", "fast" or "long" (see `candidates`).
        host_share: share of the host's memory that may be used.
        fixed: as in `with_fixed`.

    Returns:
        The settings (their `pool_bytes` is 0), their budget, and True. Where none fits: those that
        need the least of what is short, and False.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("auto", "fast", "long"):
        raise ValueError(f"memory: got {mode!r}, expected auto, fast or long.")
    best: tuple[float, MemorySettings, Budget] | None = None
    least: tuple[float, MemorySettings] | None = None
    ordered = sorted((t for t in techniques() if t.ordered), key=lambda technique: technique.depth)
    found = _agreeing(candidates(job, mode, "first"), fixed, mode)
    first = [(seconds(job, settings), settings) for settings in found]
    for least_seconds, fastest in sorted(first, key=lambda each: each[0]):
        if best is not None and least_seconds >= best[0]:
            break  # nothing that is only leaner is faster, nor are the others
        for leanest in _agreeing(_nested(job, mode, fastest, ordered, "last"), fixed, mode):
            needs = budget(job, leanest, timed=False)
            if fits(job, needs, host_share):
                break
            short = needs.gpu_total / (MARGIN * job.machine.gpu_bytes)
            if job.machine.host_bytes:
                short = max(short, needs.host_total / (host_share * job.machine.host_bytes))
            if least is None or short < least[0]:
                least = (short, leanest)
        else:
            continue  # nor does anything that takes more fit
        for settings in _agreeing(_nested(job, mode, fastest, ordered, "all"), fixed, mode):
            taken = seconds(job, settings)
            if best is not None and taken >= best[0]:
                continue
            needs = budget(job, settings, timed=False)
            if not fits(job, needs, host_share):
                continue
            # Of equals, the one that leaves more room. The last eighth is taken for a gain of some
            # percent, not for less: peaks are planned within an eighth, and what a first step
            # leaves free is used from the second on (`corrected`).
            # The host's counts alike: pinning it takes a second for some gigabytes.
            full = needs.gpu_total / job.machine.gpu_bytes
            pinned = needs.host_total / job.machine.host_bytes if job.machine.host_bytes else 0.0
            room = 0.002 * (full + pinned)
            key = taken * (1 + room + 0.03 * max(0.0, full - CAREFUL) / (MARGIN - CAREFUL))
            if best is None or key < best[0]:
                best = (key, settings, dataclasses.replace(needs, seconds=taken))
    if best is not None:
        return best[1], best[2], True
    assert least is not None
    return least[1], budget(job, least[1]), False


def longest(
    job: TrainingJob,
    mode: str = "auto",
    host_share: float = HOST_SHARE,
    unit: int = 8192,
    fixed: Mapping[str, Any] | None = None,
) -> int:
    """Tokens of the longest row, in multiples of `unit`, for which some settings that agree with
    what the user fixed fit. 0 if none do.
    """
    most = 2**14

    def fit(settings: MemorySettings, units: int) -> bool:
        longer = dataclasses.replace(job, tokens=units * unit)
        return fits(longer, budget(longer, settings, timed=False), host_share)

    low = 0
    # A chunk that is longer than a row is the whole row: the candidates of the longest row are all
    # that there are. The leanest come last. A candidate is looked at further only where it fits a
    # longer row than those before it.
    leanest = candidates(dataclasses.replace(job, tokens=most * unit), mode, "last")
    of_longest = list(_agreeing(leanest, fixed, mode))
    for settings in reversed(of_longest):
        high = low + 1
        while high < most and fit(settings, high):
            low, high = high, min(high * 2, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fit(settings, middle) else (low, middle)
    return low * unit


def candidates(
    job: TrainingJob, mode: str, which: Literal["all", "first", "last"] = "all"
) -> Iterator[MemorySettings]:
    """Settings to consider. `fast`: nothing leaves the GPU. `long`: the leanest layer. `auto`:
    all. Their `pool_bytes` is 0: the budget of the settings says what the pool must hold.

    Args:
        which: values of techniques that are `ordered`: all; or the first one alone, the fastest;
            or the last one alone, the leanest.
    """
    nested = sorted(techniques(), key=lambda technique: technique.depth)
    return _nested(job, mode, MemorySettings(), nested, which)


def _nested(
    job: TrainingJob,
    mode: str,
    settings: MemorySettings,
    rest: list[Technique],
    which: Literal["all", "first", "last"],
) -> Iterator[MemorySettings]:
    """`settings` with every combination of the values of the other techniques."""
    if not rest or settings.checkpoint == "none":
        yield settings
        return
    technique = rest[0]
    values = technique.values(job, mode, settings)
    if technique.ordered and which != "all":
        values = values[:1] if which == "first" else values[-1:]
    for value in values:
        yield from _nested(job, mode, _with_value(settings, technique.key, value), rest[1:], which)


def _with_value(settings: MemorySettings, key: str, value: Any) -> MemorySettings:
    return (
        dataclasses.replace(settings, **{key: value})
        if getattr(settings, key) != value
        else settings
    )


def with_fixed(
    settings: MemorySettings, fixed: Mapping[str, Any], mode: str
) -> MemorySettings | None:
    """A candidate with what the user fixed in place of its own values; None where the two
    contradict each other.

    Args:
        fixed: fields of MemorySettings; `offload: "any"` is any but none.
    """
    keys = dict(fixed)
    if keys.get("offload") == "any":
        if settings.offload == "none" and mode != "fast":
            return None
        keys["offload"] = settings.offload if settings.offload != "none" else "inputs"
    if keys.get("checkpoint", settings.checkpoint) == "none" and (
        keys.get("keep_attention", settings.keep_attention)
        or keys.get("keep_mlp", settings.keep_mlp)
        or keys.get("offload", settings.offload) != "none"
        or keys.get("segment_layers", settings.segment_layers) > 1
    ):
        return None
    return dataclasses.replace(settings, **keys)


def _agreeing(
    found: Iterator[MemorySettings], fixed: Mapping[str, Any] | None, mode: str
) -> Iterator[MemorySettings]:
    """Candidates with what the user fixed, each once; without those that contradict it."""
    if not fixed:
        yield from found
        return
    changed = (with_fixed(settings, fixed, mode) for settings in found)
    yield from dict.fromkeys(settings for settings in changed if settings is not None)
