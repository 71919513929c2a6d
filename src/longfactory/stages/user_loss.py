"""`loss_path: file.py:function`: a loss that a user wrote, in a file of their own.

The file is a program and is run as one, with all that its process may do: a trust boundary like
`trust_remote_code`. Nothing is run but what the key names.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from longfactory.config.loss_facts import split_loss_path
from longfactory.errors import UserError

log = logging.getLogger("longfactory")


@dataclasses.dataclass(frozen=True)
class LossContract:
    """What a function must take and may say of itself."""

    arguments: tuple[str, ...]
    attributes: Mapping[str, Any]
    """Attributes that the function may have, and what they are where it has not."""
    items: str
    """What it returns a number for, in words."""


@dataclasses.dataclass(frozen=True)
class UserLoss:
    """A loss from a file. Called like a built-in one; what it returns is checked."""

    path: str
    """As the user wrote it."""
    function: Callable[..., Tensor]
    contract: LossContract
    attributes: Mapping[str, Any]
    """All of the contract's."""
    digest: str
    """Of the file's content."""

    def __call__(self, like: Tensor, *arguments: Any) -> Tensor:
        """[items] the loss of each item.

        Args:
            like: a vector of the length, the type and the device of what is to be returned.
            arguments: those of the contract.
        Raises:
            UserError: the function returned something else.
        """
        loss = self.function(*arguments)
        expected = (
            f"expected {list(like.shape)} {like.dtype}, a number for each {self.contract.items}"
        )
        if not isinstance(loss, Tensor):
            raise UserError(f"loss_path: {self.path} returned {type(loss).__name__}; {expected}.")
        if loss.shape != like.shape or loss.dtype != like.dtype:
            found = f"{list(loss.shape)} {loss.dtype}"
            raise UserError(f"loss_path: {self.path} returned a tensor {found}; {expected}.")
        if like.requires_grad and not loss.requires_grad:
            raise UserError(
                f"loss_path: {self.path} returned a tensor without gradient, from which nothing is"
                " learnt. Compute it from the log-probabilities, without detach() or item()."
            )
        return loss


def load_user_loss(loss_path: str, contract: LossContract) -> UserLoss:
    """Runs the file and looks at the function that `loss_path` names. A file is run once.

    Raises:
        ConfigError: `loss_path` is not file.py:function.
        UserError: there is no such file or function, the file cannot be run, or the function takes
            other arguments.
    """
    path, name = split_loss_path(loss_path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"loss_path: {path} cannot be read ({error.strerror}).") from error
    module = _module(path.absolute(), text)
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        functions = [f for f in vars(module).values() if inspect.isfunction(f)]
        there = [f.__name__ for f in functions if f.__module__ == module.__name__]
        raise UserError(
            f"loss_path: {path} has no function {name}. It has {', '.join(there) or 'none'}."
        )
    signature = inspect.signature(function)
    try:
        signature.bind(*contract.arguments)
    except TypeError as error:
        raise UserError(
            f"loss_path: found {name}{signature} in {path}, expected"
            f" {name}({', '.join(contract.arguments)}): it is called with these"
            f" {len(contract.arguments)} arguments ({error})."
        ) from error
    said = {n: v for n, v in vars(function).items() if not n.startswith("_")}
    for attribute, value in said.items():
        default = contract.attributes.get(attribute)
        if attribute not in contract.attributes:
            raise UserError(
                f"loss_path: {name}.{attribute} has no meaning. A function can have"
                f" {', '.join(contract.attributes)}."
            )
        if not isinstance(value, type(default)):
            raise UserError(
                f"loss_path: {name}.{attribute} is {value!r}, expected a"
                f" {type(default).__name__} like {default!r}."
            )
    attributes = {**contract.attributes, **said}
    return UserLoss(loss_path, function, contract, attributes, digest_of(text))


@functools.cache
def _module(path: Path, text: bytes) -> ModuleType:
    """The module that the file is, once it has run. Nothing is written beside the file."""
    digest = digest_of(text)
    log.info(f"loss_path: running the code of {path} (sha256 {digest}).")
    module = ModuleType(f"longfactory_loss_{digest}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        del sys.modules[module.__name__]
        raise UserError(
            f"loss_path: running {path} failed: {type(error).__name__}: {error}."
        ) from error
    return module


def digest_of(text: bytes) -> str:
    """Sixteen letters that tell two files apart."""
    return hashlib.sha256(text).hexdigest()[:16]
