"""What `hf.prepare` puts on a model: hooks, and forwards in place of a module's own. One object for
each model owns them and takes them off; nothing is written on the model's modules.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class ModelHooks:
    """The hooks and replaced forwards of one model. Each module gets each of them once, however
    often it is asked for.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._done: weakref.WeakKeyDictionary[nn.Module, set[Callable[..., Any]]] = (
            weakref.WeakKeyDictionary()
        )
        self._replaced: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Runs `hook(module, args, kwargs)` before the module's forward."""
        if self._is_new(module, hook):
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        always: bool = False,
        with_kwargs: bool = False,
    ) -> None:
        """Runs `hook(module, args, output)` after it, with `with_kwargs` `hook(module, args,
        kwargs, output)`; `always`: also where it raised.
        """
        if self._is_new(module, hook):
            handle = module.register_forward_hook(hook, always_call=always, with_kwargs=with_kwargs)
            self._handles.append(handle)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Calls `forward(module, ...)` in place of the forward of the module's class."""
        if self._is_new(module, forward):
            module.forward = types.MethodType(forward, module)
            self._replaced.add(module)

    def remove(self) -> None:
        """Takes everything off: the modules compute as their classes say."""
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        self._handles.clear()
        self._replaced.clear()
        self._done.clear()

    def _is_new(self, module: nn.Module, hook: Callable[..., Any]) -> bool:
        done = self._done.setdefault(module, set())
        if hook in done:
            return False
        done.add(hook)
        return True
