"""Whole runs of the losses of a token, from a configuration to saved files: one process against
two, each source of the reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.config import from_mapping
from longfactory.errors import UserError
from longfactory.testing import RankError
from small_runs import LORA, POOLS, STEPS, assert_same_log, home, keys, run_keys, steps, train

pytestmark = pytest.mark.processes

__all__ = ["home"]  # a fixture

ASFT = {"use_asft_loss": True, "asft_alpha": 3.0}
RUNS: dict[str, dict[str, Any]] = {
    "dft": {"use_dft_loss": True},
    "eaft": {"use_eaft_loss": True, "eaft_alpha": 0.7},
    "asft, second model": ASFT,
    "asft, adapter off": {**ASFT, **LORA, "sequence_parallel_mode": "ulysses"},
    "asft, adapter on the head": {
        **ASFT,
        **LORA,
        "lora_target": "q_proj,lm_head",
        "learning_rate": 0.1,
    },
    "asft, another model": {**ASFT, "ref_model": "other"},
    "asft, pissa": {**ASFT, **LORA, "pissa_init": True},
    "asft, freeze": {
        **ASFT,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 1,
        "learning_rate": 1e-2,
    },
}


# With frozen layers the reference is a second model too.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "asft, freeze")) for n in RUNS]
)
def test_two_processes_train_what_one_trains(home: Path, name: str) -> None:
    changes: dict[str, Any] = {
        "val_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "compute_accuracy": True,
        **RUNS[name],
    }
    if "ref_model" in changes:
        changes["ref_model"] = home / changes["ref_model"]
    one, two = (train(home, f"{name}{n}", n, **changes) for n in (1, 2))
    assert_same_log(one, two)
    first, last = steps(one)[0], steps(one)[-1]
    assert first["loss"] != last["loss"]
    # The last step is evaluated once: what follows the training takes that result.
    rows = [json.loads(x) for x in (home / f"{name}1/trainer_log.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["current_steps"] for row in evaluated] == list(range(2, STEPS + 1, 2))
    results = json.loads((home / f"{name}1" / "eval_results.json").read_text())
    assert results["eval_loss"] == evaluated[-1]["eval_loss"]
    if "asft" not in name:
        assert "kl" not in first
        return
    assert results["eval_kl"] > 0
    if name == "asft, another model":
        assert first["kl"] > 1e-3
    # the adapter and what is left of the weights add up to the weights, rounded
    elif name == "asft, pissa":
        assert abs(first["kl"]) < 1e-6
    else:
        assert first["kl"] == 0.0  # to the last bit: the model is its own reference
    assert last["kl"] > 1e-5


def test_the_distance_is_what_asft_adds_to_dft(home: Path) -> None:
    """The first step of both: the same model, the same tokens."""
    other = {"ref_model": home / "other", "max_steps": 1}
    asft = steps(train(home, "with", 1, **ASFT, **other))[0]
    dft = steps(train(home, "without", 1, use_dft_loss=True, max_steps=1))[0]
    assert asft["loss"] == pytest.approx(dft["loss"] + 3.0 * asft["kl"], rel=1e-6)
    none = steps(train(home, "none", 1, use_asft_loss=True, asft_alpha=0.0, **other))[0]
    assert none["loss"] == dft["loss"] and none["grad_norm"] == pytest.approx(
        dft["grad_norm"], rel=1e-6
    )


def test_a_distance_holds_the_model_back(home: Path) -> None:
    adam = {"learning_rate": 2e-3, "optim": "adamw_torch", "max_steps": 12, "use_asft_loss": True}
    free, held = (
        steps(train(home, f"alpha{a}", 1, **adam, asft_alpha=a))[-1]["kl"] for a in (0.0, 0.5)
    )
    assert held < 0.1 * free


def test_a_resumed_run_has_the_reference_of_its_beginning(home: Path) -> None:
    saving = {**ASFT, "save_strategy": "steps", "save_steps": 2}
    whole = steps(train(home, "whole", 1, **saving))
    resumed = {
        "overwrite_output_dir": None,
        "resume_from_checkpoint": home / "whole" / "checkpoint-2",
    }
    rest = steps(train(home, "rest", 2, **saving, **resumed))
    for key in ("loss", "kl"):
        assert [h[key] for h in rest] == pytest.approx([h[key] for h in whole], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_an_evaluation_without_training_has_its_reference(
    home: Path, changes: dict[str, Any]
) -> None:
    alone = {
        "do_train": None,
        "do_eval": True,
        "dataset": None,
        "eval_dataset": "talks",
        "max_steps": None,
    }
    given = keys(home, f"eval{len(changes)}", sequence_parallel_size=2, **ASFT, **changes, **alone)
    run_keys(given, 2, home / "cache")
    assert (
        json.loads((Path(given["output_dir"]) / "eval_results.json").read_text())["eval_kl"] == 0.0
    )


def test_a_reference_with_another_vocabulary_is_refused(home: Path) -> None:
    with pytest.raises(
        RankError,
        match=r"reference model is llama with \d+ tokens, the trained model llama with \d+",
    ):
        train(home, "larger_ref", 1, **ASFT, ref_model=home / "larger")


def test_a_reference_s_adapter_that_is_not_there_is_told(home: Path) -> None:
    absent = {"ref_model": home / "other", "ref_model_adapters": home / "absent"}
    with pytest.raises(
        RankError, match=r"UserError: ref_model_adapters: there is no folder .*absent"
    ):
        train(home, "absent_ref", 1, **ASFT, **absent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precompute_ref_log_probs": True}, "keeps one number a document"),
        ({"train_from_scratch": True}, "random weights that cannot be read again"),
        (
            {"train_from_scratch": True, **LORA, "pissa_init": True},
            "random weights that cannot be read again",
        ),
    ],
)
def test_what_cannot_be_a_reference_is_refused(
    home: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        from_mapping(keys(home, "refused", **ASFT, **changes))


@pytest.mark.parametrize(
    "changes", [{**LORA}, {"ref_model": "/somewhere"}], ids=["adapter off", "another model"]
)
def test_random_weights_may_have_a_reference_of_another_kind(
    home: Path, changes: dict[str, Any]
) -> None:
    from_mapping(keys(home, "allowed", **ASFT, train_from_scratch=True, **changes))


def test_verify_says_what_it_cannot_compare(home: Path) -> None:
    from longfactory.train.verify import verify

    with pytest.raises(UserError, match="use_asft_loss=false use_dft_loss=true"):
        verify(from_mapping(keys(home, "verified", **ASFT)))


def test_the_plan_leaves_room_for_a_second_model(home: Path) -> None:
    from longfactory.memory.shapes import ModelShape
    from longfactory.model import load
    from longfactory.train.memory_plan import reference_bytes

    def held(shards: int, **changes: Any) -> int:
        cfg = from_mapping(keys(home, "planned", **changes))
        return reference_bytes(cfg, load.load_config(cfg.model, 128), shards)

    n = ModelShape.of(load.load_config(from_mapping(keys(home, "planned")).model, 128)).parameters
    assert held(1, **ASFT) == 4 * n and held(4, **ASFT, bf16=True) == 2 * n // 4
    assert held(1, **ASFT, **LORA) == held(1, use_dft_loss=True) == 0
    assert held(1, **ASFT, **LORA, ref_model="/other", bf16=True) == 2 * n


def read_sharded(folder: str) -> list[float]:
    """Largest differences of a frozen model spread by FSDP2 to the whole one: hidden states, and
    logits made of them afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from longfactory.model.token_logprobs import TokenLogprobs
    from longfactory.train.reference.attach import shard_frozen

    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for name in ("model", "other"):  # an output layer of its own, and one tied to the embedding
        from transformers import AutoModelForCausalLM

        whole, split = (
            AutoModelForCausalLM.from_pretrained(Path(folder) / name).eval().requires_grad_(False)
            for _ in range(2)
        )
        head = TokenLogprobs(split, 5)
        shard_frozen(split, mesh=init_device_mesh("cpu", (2,)))
        with torch.no_grad(), head.hidden(ids[0]) as result:
            split(input_ids=ids)
            hidden = result()
            want = whole(input_ids=ids, output_hidden_states=True)
            found.append((hidden.hidden - want.hidden_states[-1][0]).abs().max().item())
            logits = torch.nn.functional.linear(hidden.hidden, split.get_output_embeddings().weight)
            found.append((logits - want.logits[0]).abs().max().item())
    return found


def test_a_sharded_reference_leaves_its_output_layer_whole(home: Path) -> None:
    for found in POOLS[2].run(read_sharded, str(home)):
        assert max(found) < 1e-6


NOISE_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "two processes": (2, {}),
    "ulysses, batch of two": (
        2,
        {
            "sequence_parallel_mode": "ulysses",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
        },
    ),
    "everything kept": (1, {"disable_gradient_checkpointing": True}),
}


def test_noisy_embeddings_are_the_same_in_every_layout(home: Path) -> None:
    given: dict[str, Any] = {
        "packing": False,
        "neftune_noise_alpha": 50,
        "val_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    one = train(home, "neftune", 1, eval_on_start=True, **given)
    plain = train(home, "plain", 1, eval_on_start=True, **given | {"neftune_noise_alpha": None})
    assert plain[0]["eval_loss"] == one[0]["eval_loss"]  # no noise in evaluation
    assert abs(steps(plain)[0]["loss"] - steps(one)[0]["loss"]) > 1e-3
    for name, (size, changes) in NOISE_LAYOUTS.items():
        other = train(home, f"neftune {name}", size, **given | changes)
        for a, b in zip(steps(one), steps(other), strict=True):
            assert (b["loss"], b["grad_norm"]) == pytest.approx(
                (a["loss"], a["grad_norm"]), rel=1e-4
            ), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [LORA, {**LORA, "lora_target": "embed_tokens,q_proj"}],
    ids=["lora", "lora on the embedding"],
)
def test_noisy_embeddings_of_adapters(home: Path, changes: dict[str, Any]) -> None:
    one, two = (
        steps(train(home, f"wrapped{n}", n, neftune_noise_alpha=50, **changes)) for n in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        assert (b["loss"], b["grad_norm"]) == pytest.approx((a["loss"], a["grad_norm"]), rel=1e-4)


def test_questions_are_answered(home: Path) -> None:
    """A file of prompts without answers is answered, not refused for lack of text to learn."""
    (home / "questions.json").write_text(
        json.dumps([{"instruction": "abc"}, {"instruction": "de", "output": ""}])
    )
    predicts = {
        "do_train": False,
        "do_predict": True,
        "predict_with_generate": True,
        "max_new_tokens": 4,
        "packing": None,
    }
    given = keys(
        home, "answers", dataset=None, eval_dataset=str(home / "questions.json"), **predicts
    )
    run_keys(given, 1, home / "cache")
    lines = [
        json.loads(line)
        for line in (home / "answers" / "generated_predictions.jsonl").read_text().splitlines()
    ]
    assert ["abc" in lines[0]["prompt"], "de" in lines[1]["prompt"]] == [True, True]
    assert all(
        line["label"] == "" and line["prompt"].endswith("assistant\n") and "predict" in line
        for line in lines
    )
    assert (
        json.loads((home / "answers" / "predict_results.json").read_text())["predict_samples"] == 2
    )
