"""The memory and time of a training step, predicted: the same code behind `longfactory plan` and `memory: auto`. Imports no torch."""

from longfactory.plan.command import main

__all__ = ["main"]
