"""What a configuration knows of each stage: the samples it reads, its keys, and which of them
contradict each other. The classes that compute are in `stages/`, need torch, and check by the same
functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from longfactory.config.adapter_facts import adapter_is_start
from longfactory.config.loss_facts import (
    PREFERENCE_FACTS,
    TOKEN_FACTS,
    USER_FACTS,
    PreferenceFacts,
    split_loss_path,
)
from longfactory.errors import ConfigError

if TYPE_CHECKING:
    from longfactory.config.arguments import FinetuningArguments

REFERENCE_KEYS = frozenset(
    {
        "ref_model",
        "ref_model_adapters",
        "ref_model_quantization_bit",
        "precompute_ref_log_probs",
    }
)
"""Read by whatever compares with a reference."""


@dataclasses.dataclass(frozen=True)
class StageFacts:
    """A stage without contradictions among its keys; others say more in a class of their own."""

    name: str
    computed_by: str
    """The file and the class in `longfactory.stages` that compute it, "reward.RewardStage"."""
    samples: Literal["pt", "sft", "pair", "kto", "rollout"]
    """The kind of samples that it reads: a name of `data.kinds.KINDS`, or rollouts."""
    keys: frozenset[str] = frozenset()
    """Keys that not every stage reads, and this one does."""
    items: str = "samples"
    """What a step counts, in words."""
    packs: bool = False
    """Whether rows may be filled with several samples."""
    packs_by_default: bool = False
    shares_prompts: bool = False
    """Whether a sample is two answers to one prompt."""
    predicts: bool = False
    """Whether it answers questions (`predict_with_generate`)."""
    reloads_best: bool = True
    """Whether all that it trains can be loaded again at the end (`load_best_model_at_end`)."""

    @property
    def documents(self) -> int:
        """Sequences of a sample, each of which may have `cutoff_len` tokens."""
        return 2 if self.samples in ("pair", "kto") else 1

    def needs_reference(self, method: FinetuningArguments) -> bool:
        """Whether the run has a reference model."""
        return False

    def learns_from_equal_pairs(self, method: FinetuningArguments) -> bool:
        """Whether a pair whose answers are the same teaches something."""
        return False

    def unread(self, key: str, method: FinetuningArguments) -> str | None:
        """Why this run does not read one of the stages' keys; None where it does."""
        if key in REFERENCE_KEYS:
            if not self.needs_reference(method):
                return "this run has no reference model"
            if key.startswith("ref_model_") and method.ref_model is None:
                return "ref_model is not given"
            return None
        return None if key in self.keys else f"stage is {self.name}"

    def problems(self, method: FinetuningArguments, from_scratch: bool = False) -> Iterator[str]:
        """Keys of the stage that contradict each other: a sentence each. `from_scratch`: training
        starts from random weights.
        """
        if method.loss_path is None:
            return
        if method.label_smoothing_factor and "label_smoothing_factor" in self.keys:
            yield "label_smoothing_factor and loss_path were given. A run has one loss: keep one."
        if "loss_path" not in self.keys:
            readers = ", ".join(name for name, facts in STAGES.items() if "loss_path" in facts.keys)
            yield f"loss_path is for the stages {readers}; this run's is {self.name}. Leave it out."
            return
        try:
            split_loss_path(method.loss_path)
        except ConfigError as error:
            yield str(error)


@dataclasses.dataclass(frozen=True)
class SupervisedFacts(StageFacts):
    """sft: the loss of a token is chosen by switches."""

    def needs_reference(self, method: FinetuningArguments) -> bool:
        return method.use_asft_loss

    def unread(self, key: str, method: FinetuningArguments) -> str | None:
        for facts in TOKEN_FACTS.values():
            if key == facts.alpha and facts.switch and not getattr(method, facts.switch):
                return f"it is read by {facts.switch} alone"
        return super().unread(key, method)

    def problems(self, method: FinetuningArguments, from_scratch: bool = False) -> Iterator[str]:
        yield from super().problems(method)
        switches = [facts.switch for facts in TOKEN_FACTS.values() if facts.switch]
        given = [switch for switch in switches if getattr(method, switch)]
        if method.loss_path is not None and given != ["label_smoothing_factor"]:  # see above
            given.append("loss_path")
        if len(given) > 1:
            yield f"{' and '.join(given)} were given. A run has one loss: keep one."
        if method.use_asft_loss and method.precompute_ref_log_probs:
            yield (
                "precompute_ref_log_probs keeps one number a document, and use_asft_loss needs "
                "the reference's full distribution at every token. Leave "
                "precompute_ref_log_probs out."
            )
        # Else the reference is a model by itself, or the model without its adapter.
        adapted = adapter_is_start(method)
        if method.use_asft_loss and method.ref_model is None and not adapted and from_scratch:
            yield (
                "use_asft_loss compares with the model from which training starts, and"
                " train_from_scratch makes random weights that cannot be read again. Name a"
                " ref_model, or use finetuning_type: lora."
            )


@dataclasses.dataclass(frozen=True)
class DPOFacts(StageFacts):
    """dpo: the loss of a pair is chosen by `pref_loss`."""

    def needs_reference(self, method: FinetuningArguments) -> bool:
        return method.loss_path is not None or PREFERENCE_FACTS[method.pref_loss].reference

    def learns_from_equal_pairs(self, method: FinetuningArguments) -> bool:
        """Where more than the difference of the two answers is in the loss."""
        more = method.pref_ftx > 0 or method.pref_bco_weight > 0 or method.loss_path is not None
        return more or not PREFERENCE_FACTS[method.pref_loss].difference

    def unread(self, key: str, method: FinetuningArguments) -> str | None:
        for loss, facts in PREFERENCE_FACTS.items():
            # A function of the user's is given every number.
            if key in facts.keys and loss != method.pref_loss and method.loss_path is None:
                return f"it is read by pref_loss: {loss} alone"
        return super().unread(key, method)

    def problems(self, method: FinetuningArguments, from_scratch: bool = False) -> Iterator[str]:
        if method.pref_loss not in PREFERENCE_FACTS:
            yield (
                f"pref_loss: {method.pref_loss} is not known. Choose one of"
                f" {', '.join(PREFERENCE_FACTS)}."
            )
            return
        loss, facts = f"pref_loss: {method.pref_loss}", PREFERENCE_FACTS[method.pref_loss]
        if method.loss_path is not None:
            yield from super().problems(method)
            if method.pref_loss != "sigmoid":
                yield f"loss_path and {loss} were given. A run has one loss: keep one."
            loss, facts = f"loss_path: {method.loss_path}", USER_FACTS
        yield from preference_problems(
            loss,
            facts,
            beta=method.pref_beta,
            label_smoothing=method.dpo_label_smoothing,
            bco_weight=method.pref_bco_weight,
            ld_alpha=method.ld_alpha,
        )


@dataclasses.dataclass(frozen=True)
class KTOFacts(StageFacts):
    """kto: always with a reference."""

    def needs_reference(self, method: FinetuningArguments) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class PolicyFacts(StageFacts):
    """rl: rollouts of files, with their advantages."""

    def unread(self, key: str, method: FinetuningArguments) -> str | None:
        clip = ("rl_clip_low", "rl_clip_high", "rl_dual_clip")
        if key in clip and method.rl_loss != "clip":
            return f"it is read by rl_loss: clip, and this run's is {method.rl_loss}"
        if key == "rl_ratio" and method.rl_loss == "nll":
            return "rl_loss: nll has no ratios"
        if key == "rl_constant_length" and method.rl_normalization != "constant":
            return "it is read by rl_normalization: constant alone"
        return super().unread(key, method)

    def problems(self, method: FinetuningArguments, from_scratch: bool = False) -> Iterator[str]:
        yield from super().problems(method)
        if method.rl_normalization == "constant" and method.rl_constant_length is None:
            yield (
                "rl_normalization: constant divides by a length. Give rl_constant_length, for"
                " example the longest completion."
            )
        if method.rl_is_cap is not None and method.rl_loss != "reinforce":
            yield (
                f"rl_is_cap is for rl_loss: reinforce; this run's is {method.rl_loss}. Leave it"
                " out."
            )


@dataclasses.dataclass(frozen=True)
class DistillFacts(StageFacts):
    """distill: conversations, with a teacher's distributions."""

    def unread(self, key: str, method: FinetuningArguments) -> str | None:
        if key == "distill_js_beta" and method.distill_loss != "js":
            return "it is read by distill_loss: js alone"
        return super().unread(key, method)

    def problems(self, method: FinetuningArguments, from_scratch: bool = False) -> Iterator[str]:
        yield from super().problems(method)
        if method.teacher_model is None:
            yield "teacher_model is missing: the model whose distributions are learnt."


def preference_problems(
    loss: str,
    facts: PreferenceFacts,
    *,
    beta: float,
    label_smoothing: float,
    bco_weight: float,
    ld_alpha: float | None,
) -> Iterator[str]:
    """Numbers that a preference loss cannot take: a sentence each.

    Args:
        loss: what the user wrote, for the sentences: `pref_loss: ipo`.
        facts: what is true of that loss.
        beta, label_smoothing, bco_weight, ld_alpha: pref_beta, dpo_label_smoothing,
            pref_bco_weight and ld_alpha.
    """
    if beta <= 0:
        yield f"pref_beta must be above 0, not {beta}."
    if label_smoothing and facts.smoothing == "unread":
        readers = [name for name, f in PREFERENCE_FACTS.items() if f.smoothing != "unread"]
        yield f"dpo_label_smoothing has no effect with {loss}. It is used by {', '.join(readers)}."
    if not 0 <= label_smoothing < 0.5:
        yield f"dpo_label_smoothing must lie in [0, 0.5), not {label_smoothing}."
    if not label_smoothing and facts.smoothing == "needed":
        yield (
            f"{loss} is infinite without dpo_label_smoothing. Give one, for example 0.001 (its"
            " paper's)."
        )
    if bco_weight and not facts.reference:
        yield (
            f"pref_bco_weight compares with a reference, and {loss} has none. Leave one of them"
            " out."
        )
    if ld_alpha is not None and not facts.ld_alpha:
        yield f"ld_alpha has no effect with {loss}. Leave it out."


_TOKEN_KEYS = frozenset(
    key for facts in TOKEN_FACTS.values() for key in (facts.switch, facts.alpha) if key
)
_PAIR_KEYS = frozenset({"pref_beta", "pref_ftx", "pref_share_prompt"})

STAGES: dict[str, StageFacts] = {
    facts.name: facts
    for facts in (
        StageFacts(
            "pt",
            "tokens.TokenStage",
            "pt",
            frozenset({"compute_accuracy", "loss_path", "label_smoothing_factor"}),
            packs=True,
            packs_by_default=True,
        ),
        SupervisedFacts(
            "sft",
            "tokens.TokenStage",
            "sft",
            _TOKEN_KEYS | {"loss_path", "compute_accuracy", "train_on_prompt", "mask_history"},
            packs=True,
            predicts=True,
        ),
        StageFacts(
            "rm",
            "reward.RewardStage",
            "pair",
            frozenset({"pref_share_prompt"}),
            items="pairs",
            shares_prompts=True,
            reloads_best=False,
        ),
        DPOFacts(
            "dpo",
            "preference.PreferenceStage",
            "pair",
            _PAIR_KEYS
            | {"loss_path", "pref_loss", "pref_bco_weight", "dpo_label_smoothing", "ld_alpha"}
            | {key for facts in PREFERENCE_FACTS.values() for key in facts.keys},
            items="pairs",
            shares_prompts=True,
        ),
        KTOFacts(
            "kto",
            "kto.KTOStage",
            "kto",
            _PAIR_KEYS | {"kto_chosen_weight", "kto_rejected_weight"},
            shares_prompts=True,
        ),
        PolicyFacts(
            "rl",
            "policy.PolicyStage",
            "rollout",
            frozenset(
                {"rl_loss", "rl_normalization", "rl_constant_length", "rl_ratio", "rl_clip_low"}
                | {"rl_clip_high", "rl_dual_clip", "rl_is_cap", "rl_kl_beta", "rl_share_prompt"}
            ),
            items="trained tokens or rollouts",
            packs=True,
        ),
        DistillFacts(
            "distill",
            "distill.DistillStage",
            "sft",
            frozenset(
                {"teacher_model", "distill_top_k", "distill_loss", "distill_js_beta"}
                | {"distill_alpha", "train_on_prompt", "mask_history"}
            ),
            packs=True,
        ),
    )
}
"""By the values of the key `stage`. A new stage is a line here and the file that it names."""

STAGE_KEYS = frozenset().union(REFERENCE_KEYS, *(facts.keys for facts in STAGES.values()))
"""Keys that some stages do not read."""

if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[tuple(STAGES)]
