"""A stage is made of a run's arguments: what is refused, and what each of them becomes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from longfactory.config.loss_facts import PREFERENCE_FACTS
from longfactory.config.stage_facts import STAGES
from longfactory.errors import ConfigError
from longfactory.stages import losses
from longfactory.stages.kto import KTOStage
from longfactory.stages.make import make_stage
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.reward import RewardStage
from longfactory.stages.tokens import TokenStage
from oracles import (
    smoothing,
)


def arguments(**kw) -> SimpleNamespace:
    base = dict(
        pref_loss="sigmoid",
        pref_beta=0.1,
        pref_ftx=0.0,
        simpo_gamma=0.5,
        dpo_label_smoothing=0.0,
        ld_alpha=None,
        pref_bco_weight=0.0,
        kto_chosen_weight=1.0,
        kto_rejected_weight=1.0,
        use_dft_loss=False,
        use_asft_loss=False,
        asft_alpha=0.1,
        use_eaft_loss=False,
        eaft_alpha=1.0,
        label_smoothing_factor=0.0,
        compute_accuracy=False,
        discopop_tau=0.05,
        precompute_ref_log_probs=False,
        loss_path=None,
        ref_model=None,
        ref_model_adapters=(),
        ref_model_quantization_bit=None,
        finetuning_type="full",
        pissa_init=False,
        init_lora_weights=None,
        rl_loss="clip",
        rl_normalization="token",
        rl_constant_length=None,
        rl_ratio="token",
        rl_clip_low=0.2,
        rl_clip_high=None,
        rl_dual_clip=None,
        rl_is_cap=None,
        rl_kl_beta=0.0,
        teacher_model="teacher",
        distill_loss="forward",
        distill_js_beta=0.5,
        distill_alpha=1.0,
    )
    return SimpleNamespace(**(base | kw))


@pytest.mark.parametrize(
    ("stage", "kw", "message"),
    [
        ("dpo", {"pref_loss": "sigmoyd"}, "sigmoyd is not known. Choose one of sigmoid, hinge"),
        ("dpo", {"pref_loss": "exo_pair"}, "is infinite without dpo_label_smoothing"),
        (
            "dpo",
            {"pref_loss": "hinge", "dpo_label_smoothing": 0.1},
            "has no effect with pref_loss: hinge",
        ),
        ("dpo", {"dpo_label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ("dpo", {"pref_beta": 0.0}, "must be above 0"),
        ("dpo", {"pref_loss": "orpo", "pref_bco_weight": 0.5}, "has none"),
        ("dpo", {"pref_loss": "sft", "ld_alpha": 0.5}, "ld_alpha has no effect"),
        ("sft", {"use_dft_loss": True, "use_eaft_loss": True}, "A run has one loss"),
        ("ppo", {}, "stage: ppo is not known"),
    ],
)
def test_refused_arguments(stage: str, kw: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_stage(stage, arguments(**kw))


def test_facts_of_a_stage_are_those_of_its_class() -> None:
    """What is told before torch is imported is true of what computes."""
    cases = [(name, {}) for name in STAGES]
    cases += [
        ("dpo", {"pref_loss": n, "dpo_label_smoothing": smoothing(n)}) for n in PREFERENCE_FACTS
    ]
    cases += [("sft", {f"use_{n}_loss": True}) for n in ("dft", "asft", "eaft")]
    for name, keys in cases:
        stage, facts = make_stage(name, arguments(**keys)), STAGES[name]
        needs = stage.needs_reference or "reference_kl" in stage.needs
        assert facts.needs_reference(arguments(**keys)) == needs, (name, keys)
        assert (stage.output == "values") == (not facts.reloads_best)


def test_make_stage_passes_every_argument_on() -> None:
    dpo = make_stage(
        "dpo",
        arguments(
            pref_loss="robust",
            pref_beta=0.3,
            pref_ftx=0.2,
            dpo_label_smoothing=0.1,
            ld_alpha=0.4,
            pref_bco_weight=0.6,
        ),
    )
    assert dpo == PreferenceStage("robust", losses.LossOptions(0.3, 0.1, 0.5), 0.2, 0.6, 0.4)
    assert make_stage("dpo", arguments(simpo_gamma=0.9)).options.simpo_gamma == 0.9
    assert make_stage(
        "kto",
        arguments(pref_beta=0.3, kto_chosen_weight=2.0, kto_rejected_weight=3.0, pref_ftx=0.1),
    ) == KTOStage(0.3, 2.0, 3.0, 0.1)
    assert make_stage("sft", arguments(use_asft_loss=True, asft_alpha=0.7)) == TokenStage(
        "asft", 0.7
    )
    assert make_stage(
        "sft", arguments(use_eaft_loss=True, eaft_alpha=0.7, compute_accuracy=True)
    ) == TokenStage("eaft", 0.7, True)
    assert (
        make_stage("pt", arguments()) == TokenStage()
        and make_stage("rm", arguments()) == RewardStage()
    )
