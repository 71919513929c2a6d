"""The stages by name: what each of them is, `config/stage_facts.py` says."""

from __future__ import annotations

import importlib

import torch

from longfactory.config.arguments import FinetuningArguments
from longfactory.config.stage_facts import STAGES, StageFacts
from longfactory.errors import ConfigError
from longfactory.stages.base import Stage


def stage_class(facts: StageFacts) -> type[Stage]:
    """The class that computes a stage."""
    module, name = facts.computed_by.split(".")
    found: type[Stage] = getattr(importlib.import_module(f"longfactory.stages.{module}"), name)
    return found


def make_stage(
    stage: str, args: FinetuningArguments, precision: torch.dtype = torch.float32
) -> Stage:
    """The stage that a configuration names.

    Args:
        stage: pt, sft, rm, dpo or kto.
        args: the run's keys; which of them the stage reads, `from_arguments` of its class says.
        precision: in which the model computes.
    Raises:
        ConfigError: an unknown stage or loss, or options that contradict each other.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage: {stage} is not known. Choose one of {', '.join(STAGES)}.")
    for problem in STAGES[stage].problems(args):
        raise ConfigError(problem)
    return stage_class(STAGES[stage]).from_arguments(stage, args, precision)
