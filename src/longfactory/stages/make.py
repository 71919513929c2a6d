"""The stages by name."""

from __future__ import annotations

import torch

from longfactory.config.arguments import FinetuningArguments
from longfactory.config.stage_facts import STAGES
from longfactory.errors import ConfigError
from longfactory.stages.base import Stage
from longfactory.stages.kto import KTOStage
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.reward import RewardStage
from longfactory.stages.tokens import TokenStage

CLASSES: tuple[type[Stage], ...] = (
    TokenStage,
    RewardStage,
    PreferenceStage,
    KTOStage,
)
"""What is known of each without torch is in `config/stage_facts.py`."""


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
    stage_class = next(c for c in CLASSES if stage in c.names)
    return stage_class.from_arguments(stage, args, precision)
