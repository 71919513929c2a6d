"""Elementwise functions of tensors that torch compiles on a GPU: into one or two kernels each, for
the forms and lengths of arguments that come often.

A compiled function is compared with the function itself at its first call, on the tokens that it is
called with. The start-up guard, whose rows have lengths of their own, runs functions as they are:
what it proves is the formula, and nothing is compiled for it. Where the compiler is missing or
fails, or what it made is wrong, functions run as they are.
"""

from __future__ import annotations

import collections
import functools
import inspect
import logging
import os
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longfactory.sp import probe

log = logging.getLogger(__name__)

FORMS = 64
"""Forms of arguments for which a function is compiled by itself. Beyond them one compiled function
serves all others, of any widths, with slower kernels."""
FIRST_LENGTHS, LENGTHS = 2, 8
"""Numbers of tokens for which a form is compiled by itself: the first that come (of rows that are
alike), and others once they have come often, so many at most. The kernels of all lengths are
slower, a gate's 1.8 times (H200), and each that is compiled takes about half a second."""
OFTEN, IN_A_ROW = 256, 1024
"""A length has come often when it came back so many times after another one, or in so many calls
one after the other: more than one row has calls, in each layer or in each layer's chunks."""
SAMPLE = 61
"""Tokens, spread over all, on which a compiled function is compared; sums over tokens: on all, a
part at a time. No tensor's other sizes are equal to it, by which sums are told from rows."""
PART = 1 << 22
"""Numbers in such a part of a tensor."""
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-3, torch.float64: 1e-9}
"""Of a compiled function's results: the norm of the error over that of the result. Roundings within
a function are left out where it is compiled; a wrong kernel is off by more."""


def compiles(x: Tensor) -> bool:
    """Whether `fused` functions of x are compiled, as long as the compiler does not fail."""
    return x.is_cuda and os.environ.get("LONGFACTORY_COMPILE", "1") != "0"


def fused(*rows: str, unit: str | None = None) -> Callable[..., Callable[..., Any]]:
    """Compiles a function where its first argument is on a GPU. LONGFACTORY_COMPILE=0 turns it off.

    Args:
        rows: names of the arguments whose first size counts tokens, or a multiple of them. The
            function's results have a row for each token, or are sums over tokens.
        unit: name of an argument: so many rows of those tensors belong to one token.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(fn).parameters)
        places = tuple(names.index(name) for name in rows)
        unit_place = None if unit is None else names.index(unit)

        @functools.wraps(fn)
        def call(*arguments: Any) -> Any:
            # The guard's check is of the process, not of the thread: backward has its own.
            if not compiles(arguments[0]) or fn.__name__ in _failed or probe.proving():
                return fn(*arguments)
            try:
                copy = _copy_for(fn, arguments)
                given = arguments
                if copy.any_length and not copy.checked:
                    given = _of_any_length(arguments, places)
                if copy.checked or not len(arguments[0]):
                    return copy.run(*given)
                each = 1 if unit_place is None else arguments[unit_place]
                expected = _Expected(fn, arguments, places, each)
                versions = _versions(arguments)
                found = copy.run(*given)
                reason = expected.differs(found)
                copy.checked = True
                written = reason is not None and versions != _versions(arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the compiler's many errors have no common type
                lines = str(error).strip().splitlines()
                reason = lines[0] if lines else type(error).__name__
                written = False
            if reason is None:
                return found
            if written:
                raise RuntimeError(
                    f"{fn.__name__}: {reason}, and it has overwritten its inputs. Set "
                    "LONGFACTORY_COMPILE=0."
                )
            _failed.add(fn.__name__)
            log.warning("%s runs uncompiled: %s", fn.__name__, reason)
            return fn(*arguments)

        return call

    return decorate


_failed: set[str] = set()


class _Expected:
    """What a function gives for some tokens of a call, computed before the call: compiled or not,
    it may write over its arguments.
    """

    def __init__(
        self, fn: Callable[..., Any], arguments: tuple[Any, ...], places: tuple[int, ...], unit: int
    ) -> None:
        named = {i: arguments[i] for i in places if i < len(arguments)}
        tensors = {i: x for i, x in named.items() if isinstance(x, Tensor)}
        tokens = min(len(x) for x in tensors.values()) // unit

        def results(index: Tensor) -> list[Tensor]:
            """Of the tokens with these numbers."""
            given = list(arguments)
            for i, x in tensors.items():
                # [tokens * each, ...] -> [tokens, each, ...] -> [len(index) * each, ...]
                parts = x.reshape(tokens, len(x) // tokens, *x.shape[1:])
                given[i] = parts[index].flatten(0, 1)
            return _tensors(fn(*given))

        with torch.no_grad():
            device = arguments[0].device
            count = min(SAMPLE, tokens)
            self.index = torch.arange(count, device=device) * tokens // count
            self.results = results(self.index)
            self.is_sum = [x.dim() == 0 or len(x) != count for x in self.results]
            if any(self.is_sum):
                width = max(x.numel() // tokens for x in tensors.values())
                step = max(1, PART // max(width, 1))
                every = torch.arange(tokens, device=device)
                parts = [results(part) for part in every.split(step)]
                for i, is_sum in enumerate(self.is_sum):
                    if is_sum:
                        self.results[i] = torch.stack([part[i] for part in parts]).sum(0)

    @torch.no_grad()
    def differs(self, found: Any) -> str | None:
        """In which way the compiled function's results are others; None where they are not."""
        errors = []
        for value, expected, is_sum in zip(_tensors(found), self.results, self.is_sum, strict=True):
            a = (value if is_sum else value[self.index]).double()
            b = expected.double()
            if value.dtype != expected.dtype or a.shape != b.shape:
                return (
                    f"compiled it gives {value.dtype} {tuple(a.shape)}, uncompiled"
                    f" {expected.dtype} {tuple(b.shape)}"
                )
            known = b.isfinite()
            error, size = (a - b)[known].norm(), b[known].norm()
            errors.append(error / (TOLERANCE[value.dtype] * size).clamp(min=1e-300))
        worst = torch.stack(errors).max().item() if errors else 0.0  # NaN where one of them is
        return None if worst <= 1 else f"compiled it is {worst:.1f} times as far off as tolerated"


def _of_any_length(arguments: tuple[Any, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    """The arguments, with the first size of tensors marked as one that varies: else torch compiles
    for the first one that it sees, and anew for the second. The marks are on aliases: a tensor that
    comes again (a row's rotary angles, in each layer) would keep its own, and what is compiled for
    its length later would be compiled for all, 1.8 times slower (H200).
    """
    import torch._dynamo as dynamo

    tensors = {
        id(a): a
        for a in (arguments[i] for i in places if i < len(arguments))
        if isinstance(a, Tensor)
    }
    aliases = {number: _alias(x) for number, x in tensors.items()}
    for alias in aliases.values():
        dynamo.maybe_mark_dynamic(alias, 0)
    # Two that are one stay one: torch compiles for that, too.
    return tuple(aliases.get(id(a), a) for a in arguments)


def _alias(x: Tensor) -> Tensor:
    """Of the same memory, and as trained: for others than it has seen torch compiles anew. A weight
    is itself, as torch takes its sizes for constant whatever is marked; so is what has a gradient,
    which an alias would lose.
    """
    if isinstance(x, torch.nn.Parameter) or (x.requires_grad and torch.is_grad_enabled()):
        return x
    return x.detach().requires_grad_(x.requires_grad)


def _versions(arguments: tuple[Any, ...]) -> list[int]:
    """Numbers that a write into an argument raises."""
    return [x._version for x in arguments if isinstance(x, Tensor)]


def _tensors(results: Any) -> list[Tensor]:
    every = results if isinstance(results, tuple) else (results,)
    return [x for x in every if x is not None]


# ---- which compiled copy of a function serves a call ---------------------------------------------


def form_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a compiled function may take for constant: all but the first size of tensors, which
    counts tokens.
    """
    return tuple(
        (a.dtype, a.shape[1:], a.stride()) if isinstance(a, Tensor) else a for a in arguments
    )


class _Copy:
    """A compiled copy of a function, under a name of its own, by which torch remembers what sizes
    it has seen.
    """

    def __init__(self, fn: Callable[..., Any], name: str, dynamic: bool | None) -> None:
        _raise_limit()
        code = fn.__code__.replace(co_name=name)
        copy = types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)
        self.run = torch.compile(copy, dynamic=dynamic)
        self.any_length = dynamic is None
        self.checked = False


def _raise_limit() -> None:
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, FORMS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 64 * FORMS)


class _Form:
    """A function compiled for one form of arguments.

    torch takes a size for variable that it has seen with two values. Norms of hidden states and of
    heads, layers and models of other widths would make widths variable, and kernels slow. So each
    form has copies of the function: of several numbers of tokens, and one of all others.

    Args:
        most: copies for a number of tokens at most.
    """

    def __init__(self, fn: Callable[..., Any], name: str, most: int) -> None:
        self.fn, self.name, self.most = fn, name, most
        self.own: dict[int, _Copy] = {}
        self.others: _Copy | None = None
        self.came: collections.Counter[int] = collections.Counter()
        self.last, self.repeated = -1, 0

    def for_length(self, length: int) -> _Copy:
        """The copy for this many tokens."""
        self.repeated = self.repeated + 1 if length == self.last else 1
        if length != self.last:
            self.came[length] += 1
            self.last = length
        if length in self.own:
            return self.own[length]
        first = not _lengths_vary and len(self.own) < FIRST_LENGTHS
        often = self.came[length] > OFTEN or self.repeated > IN_A_ROW
        if (first or often) and len(self.own) < self.most:
            name = f"{self.name}_{len(self.own)}"
            self.own[length] = _Copy(self.fn, name, dynamic=False)
            return self.own[length]
        if self.others is None:
            self.others = _Copy(self.fn, f"{self.name}_any", dynamic=None)
        return self.others


def start_workers() -> None:
    """Starts torch's compile workers. They import torch, for seconds, while the run is prepared;
    until they are ready this process compiles by itself.
    """
    if os.environ.get("LONGFACTORY_COMPILE", "1") == "0":
        return
    try:
        from torch._inductor.async_compile import maybe_warm_pool
    except ImportError:
        return  # of another release: they start at the first function
    maybe_warm_pool()


_lengths_vary = False


def expect(lengths: Sequence[int]) -> None:
    """Says which rows will come in this process, by their numbers of tokens. Where no length is
    that of half of them, functions are not compiled for the first ones by themselves.
    """
    global _lengths_vary
    found = collections.Counter(lengths)
    _lengths_vary = 2 * max(found.values(), default=0) < len(lengths)


_compiled: dict[tuple[Any, ...], _Form] = {}


def _copy_for(fn: Callable[..., Any], arguments: tuple[Any, ...]) -> _Copy:
    """`fn`, compiled for the form of these arguments."""
    name = fn.__name__
    key = (name, *form_of(arguments))
    if key not in _compiled:
        number = sum(other[0] == name for other in _compiled)
        most = LENGTHS
        if number >= FORMS:
            key, most = (name, "all others"), 0
        if key not in _compiled:
            _compiled[key] = _Form(fn, f"{name}_{number}", most)
    return _compiled[key].for_length(len(arguments[0]))
