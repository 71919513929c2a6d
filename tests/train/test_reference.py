"""Reference log-probabilities: where they come from, the file that keeps them, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from longfactory.config import from_mapping
from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.errors import UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.kto import KTOStage
from longfactory.stages.pairs import document_logps
from longfactory.stages.preference import PreferenceStage
from longfactory.train import reference
from longfactory.train.reference.attach import check_ref_model, reference_parts
from longfactory.train.reference.cache import damage
from oracles import Groups

PARTS = {"model": "tiny", "weights": "abc", "template": "qwen", "cutoff_len": 64}


def row_of(samples: list[int], shared: bool = False, shift: int = 0) -> Row:
    """Pairs of a few tokens that depend on the sample number; `shift` changes a prompt token."""
    docs: list[TokenizedDocument] = []
    for i in samples:
        prompt, parent = [3 + i, 4 + shift, 5], -1
        if shared:
            docs.append(TokenizedDocument(prompt[:-1], [IGNORE] * 2, role="prompt", sample=i))
            parent, prompt = len(docs) - 1, prompt[-1:]
        for role, answer in (("chosen", [7 + i, 8, 9]), ("rejected", [10 + i])):
            docs.append(
                TokenizedDocument(
                    prompt + answer,
                    [IGNORE] * len(prompt) + answer,
                    role=role,
                    sample=i,
                    parent=parent,
                )
            )
    return make_row(docs).padded(8, 0)


def fake_logps(row: Row) -> Tensor:
    """[T] fp32 numbers that depend on the token and its place in the document only."""
    return -((row.input_ids * 37 + row.position_ids * 11) % 17).float() / 7


def test_attach_carries_the_stage_s_own_sums() -> None:
    cache = reference.precompute([row_of([0, 2]), row_of([1])], fake_logps, 3)
    for shared in (False, True):
        row = cache.attach(row_of([2, 1], shared))
        sums = document_logps(fake_logps(row), row)
        for d, x in zip(row.documents, sums.tolist(), strict=True):
            assert d.reference_logp == (None if d.role in ("prompt", "pad") else x)
        loss, _ = PreferenceStage().loss_sum(fake_logps(row), row)
        assert float(loss / 2) == math.log(2)


def test_ld_alpha_is_part_of_the_numbers() -> None:
    cache = reference.precompute([row_of([0])], fake_logps, 1, ld_alpha=0.3)
    row = cache.attach(row_of([0]))
    loss, _ = PreferenceStage(ld_alpha=0.3).loss_sum(fake_logps(row), row)
    assert float(loss) == math.log(2)
    assert (
        reference.precompute([row_of([0])], fake_logps, 1).attach(row_of([0])).documents
        != row.documents
    )


def test_groups_share_the_work() -> None:
    """Three groups, one without a row of its own: the same table as one group's, on every rank."""
    want = reference.precompute([row_of([i]) for i in range(5)], fake_logps, 5)
    empty = make_row([TokenizedDocument([0, 0], [IGNORE] * 2, role="pad")])
    rows = [[row_of([0, 3]), row_of([4])], [row_of([2, 1]), empty], [empty, empty]]
    for cache in Groups(3).run(
        lambda rank, dp: reference.precompute(rows[rank], fake_logps, 5, dp_sum=dp.sum)
    ):
        for role in ("chosen", "rejected"):
            assert torch.equal(cache.logps[role], want.logps[role]) and torch.equal(
                cache.checks[role], want.checks[role]
            )


def test_more_rows_than_a_block() -> None:
    cache = reference.precompute(
        [row_of([i]) for i in range(130)], lambda row: fake_logps(row), 130
    )
    row = row_of([129])
    assert cache.attach(row).documents[0].reference_logp == float(
        document_logps(fake_logps(row), row)[0]
    )


def test_other_tokens_are_refused() -> None:
    cache = reference.precompute([row_of([0])], fake_logps, 2)
    with pytest.raises(UserError, match="chosen answer of sample 0 was computed for other tokens"):
        cache.attach(row_of([0], shift=1))  # another prompt
    row = row_of([0])
    row.labels[4] = IGNORE  # another mask
    with pytest.raises(UserError, match="other tokens"):
        cache.attach(row)
    with pytest.raises(
        UserError, match="no reference log-probability for the chosen answer of sample 1"
    ):
        cache.attach(row_of([1]))
    with pytest.raises(UserError, match="Sample number 5 is not one of the 2 samples"):
        reference.precompute([row_of([5])], fake_logps, 2)


def test_the_file_is_reused_and_refused_when_stale(tmp_path: Path) -> None:
    passes = []

    def rows() -> list[Row]:
        passes.append(1)
        return [row_of([0]), row_of([1])]

    def run(parts: dict, **kw) -> tuple[reference.ReferenceCache, bool]:
        return reference.load_or_precompute(tmp_path, parts, rows, fake_logps, 2, **kw)

    first, cached = run(PARTS)
    assert not cached and len(passes) == 1
    again, cached = run(PARTS)
    assert cached and len(passes) == 1
    assert again.attach(row_of([0, 1])).documents == first.attach(row_of([0, 1])).documents
    for change in ({"template": "llama3"}, {"weights": "def"}, {"cutoff_len": 32}):
        assert not run(PARTS | change)[1]
    assert not run(PARTS, ld_alpha=0.5)[1]
    assert len(passes) == 5 and len(list(tmp_path.iterdir())) == 5  # nothing left beside

    # one rank does not see the file: all compute
    run(PARTS | {"seen": False}, everywhere=lambda _: False)
    assert len(passes) == 6
    run(PARTS | {"other": 1}, write=False)
    assert not reference.cache_file(tmp_path, PARTS | {"other": 1, "ld_alpha": None}).exists()

    key = PARTS | {"ld_alpha": None}
    file = reference.cache_file(tmp_path, key)
    with pytest.raises(
        UserError, match=r"stale: template changed \(template was 'qwen', is now 'llama3'\)"
    ):
        reference.load(file, key | {"template": "llama3"}, 2)
    with pytest.raises(UserError, match="not of 3 samples"):
        reference.load(file, key, 3)
    whole = file.read_bytes()
    for damaged in (whole[:-9], b"", whole[:-3] + b"\x01" + whole[-2:]):
        file.write_bytes(damaged)
        assert damage(file) is not None
        done = len(passes)
        assert not run(PARTS)[1] and len(passes) == done + 1, "computed again"
        assert damage(file) is None
    assert run(PARTS)[1]


def test_weights_fingerprint(tmp_path: Path) -> None:
    weights = torch.randn(400_000).numpy().tobytes()
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "notes.txt").write_text(str(folder))
    same = reference.weights_fingerprint([a])
    assert reference.weights_fingerprint([b]) == same
    assert reference.weights_fingerprint([a / "model.safetensors"]) == same
    (b / "model.safetensors").write_bytes(weights[:-1] + b"\0")
    assert reference.weights_fingerprint([b]) != same
    (b / "model.safetensors").write_bytes(weights + b"\0")
    assert reference.weights_fingerprint([b]) != same
    assert reference.weights_fingerprint([a, b]) != same
    with pytest.raises(FileNotFoundError, match="No weight files"):
        reference.weights_fingerprint([tmp_path])


# -- models ----------------------------------------------------------------------------------------


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).double()


def model_logps(model: nn.Module, row: Row) -> Tensor:
    """[T] of a row whose documents are no branches: each document alone."""
    parts = []
    for d in row.documents:
        logits = model(input_ids=row.input_ids[None, d.start : d.stop]).logits[0]
        parts.append(
            logits.log_softmax(-1).gather(1, row.labels[d.start : d.stop].clamp(min=0)[:, None])[
                :, 0
            ]
        )
    return torch.cat(parts)


def lora(model: nn.Module, **kw) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(
        model,
        LoraConfig(
            target_modules=["q_proj", "down_proj", "lm_head"],
            r=4,
            lora_dropout=0.5,
            task_type="CAUSAL_LM",
            **kw,
        ),
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapter_off_is_the_base_model(wrapped: bool) -> None:
    row = row_of([0, 1])
    want = model_logps(tiny_model().eval(), row).detach()
    model = lora(tiny_model(), init_lora_weights=False)  # an adapter that does something
    outer = nn.Module()
    outer.module = model
    model.train()
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    with reference.as_reference(outer if wrapped else model, adapter_off=True):
        got = model_logps(model, row)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, (trained, _) in before.items() if trained
        }
    assert torch.equal(got, want) and not got.requires_grad
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
    assert all(m.training for m in model.modules())
    assert (model_logps(model.eval(), row) - want).abs().max() > 1e-3
    # the policy itself, as it is before the first step
    with reference.as_reference(model, adapter_off=False):
        assert not torch.equal(model_logps(model, row), want)


@pytest.mark.parametrize("source", ["adapter off", "reference model", "precomputed"])
def test_first_loss_is_log_2_whatever_the_source(source: str) -> None:
    row = row_of([0, 1, 2])
    model = lora(tiny_model())  # a fresh adapter adds zero
    assert reference.disable_dropout(model) == 5 and reference.disable_dropout(model) == 0
    model.train()
    logps = model_logps(model, row)
    if source == "precomputed":
        with reference.as_reference(model, adapter_off=False):
            cache = reference.precompute([row], lambda r: model_logps(model, r), 3)
        loss, _ = PreferenceStage().loss_sum(logps, cache.attach(row))
    else:
        other = model if source == "adapter off" else tiny_model()
        with reference.as_reference(other, adapter_off=source == "adapter off"):
            ref = model_logps(other, row)
        loss, _ = PreferenceStage().loss_sum(TokenOutputs(logps, reference=ref), row)
    assert float(loss / 3) == math.log(2)
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert max(g.abs().max() for g in grads) > 1e-4  # the adapter is on again, and learns


def test_three_sources_give_the_same_gradient() -> None:
    row = row_of([0, 1])
    base = tiny_model()
    losses = []
    for source in ("adapter off", "reference model", "precomputed"):
        model = lora(tiny_model(), init_lora_weights=False)
        reference.disable_dropout(model)
        with reference.as_reference(model, adapter_off=True):
            off = model_logps(model, row)
        out, placed = TokenOutputs(model_logps(model, row)), row
        if source == "precomputed":
            with reference.as_reference(base, adapter_off=False):
                placed = reference.precompute([row], lambda r: model_logps(base, r), 2).attach(row)
        else:
            ref = off if source == "adapter off" else model_logps(base, row).detach()
            out = dataclasses.replace(out, reference=ref)
        loss, _ = PreferenceStage("ipo").loss_sum(out, placed)
        losses.append(
            (loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
        )
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=1e-12, atol=1e-12)


def test_kto_reads_the_cache_for_kl_documents_too() -> None:
    docs = [
        TokenizedDocument([3, 4, 5], [IGNORE, 4, 5], role="chosen", sample=0),
        TokenizedDocument([3, 6, 7], [IGNORE, 6, 7], role="kl", sample=0),
    ]
    row = make_row(docs)
    cache = reference.precompute([row], fake_logps, 1)
    stored, metrics = KTOStage().loss_sum(fake_logps(row) + 0.5, cache.attach(row))
    online, _ = KTOStage().loss_sum(
        TokenOutputs(fake_logps(row) + 0.5, reference=fake_logps(row)), row
    )
    assert float(stored) == float(online) and float(metrics["kl"][0]) == 1.0


def test_refusals_of_models() -> None:
    with (
        pytest.raises(UserError, match="the model has none"),
        reference.as_reference(tiny_model(), adapter_off=True),
    ):
        pass
    with (
        pytest.raises(UserError, match="starts from `pissa`, which changes the base weights"),
        reference.as_reference(
            lora(tiny_model().float(), init_lora_weights="pissa"), adapter_off=True
        ),
    ):
        pass
    config = tiny_model().config
    reference.check_reference(config, LlamaConfig(vocab_size=64))
    with pytest.raises(UserError, match="qwen2 with 64 tokens, the trained model llama"):
        reference.check_reference(config, Qwen2Config(vocab_size=64))
    with pytest.raises(UserError, match="llama with 65 tokens"):
        reference.check_reference(config, LlamaConfig(vocab_size=65))


QUANTISED = {"ref_model": "model", "ref_model_quantization_bit": 4}
CONTINUED = {"finetuning_type": "lora", "adapter_name_or_path": "adapter"}


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ({}, {"seed": 7, "per_device_train_batch_size": 4}, True),
        ({}, {"finetuning_type": "lora"}, True),
        ({}, {"resize_vocab": True}, False),
        ({"resize_vocab": True}, {"resize_vocab": True, "add_tokens": "<new>"}, False),
        ({"resize_vocab": True}, {"resize_vocab": True, "seed": 7}, False),
        ({"ref_model": "model"}, {"ref_model": "model", "resize_vocab": True, "seed": 7}, True),
        ({}, {"fp16": True}, False),
        (QUANTISED, QUANTISED | {"quantization_type": "fp4"}, False),
        (QUANTISED, QUANTISED | {"double_quantization": False}, False),
        (CONTINUED, CONTINUED | {"create_new_adapter": True}, False),
        (CONTINUED, CONTINUED | {"pissa_init": True}, False),
        (CONTINUED | {"create_new_adapter": True}, CONTINUED | {"pissa_init": True}, True),
    ],
)
def test_what_makes_other_numbers(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], same: bool
) -> None:
    """The cached numbers serve every run that begins from the same model, and no other."""
    for name in ("model/config.json", "model/model.safetensors", "adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    data = SimpleNamespace(lengths=[3, 4])

    def parts(changes: dict[str, Any]) -> dict[str, Any]:
        given = {
            "model_name_or_path": "model",
            "stage": "dpo",
            "finetuning_type": "full",
            "do_train": True,
            "dataset": "d",
        }
        given |= {
            "output_dir": "out",
            "template": "qwen",
            "precompute_ref_log_probs": True,
        } | changes
        paths = {
            k: str(tmp_path / v)
            for k, v in given.items()
            if k in ("model_name_or_path", "ref_model", "adapter_name_or_path")
        }
        return reference_parts(from_mapping(given | paths), data)

    assert (parts(before) == parts(after)) == same


def test_numbers_are_those_of_one_data_set() -> None:
    """Not of another that is equal, or that stands where one of before has been."""
    first, second = [1], [1]
    numbers = [reference.precompute([row_of([i])], fake_logps, i + 1) for i in range(2)]
    found = reference.Reference(computed=((first, numbers[0]), (second, numbers[1])))
    assert found.numbers_of(second) is numbers[1] and found.numbers_of(first) is numbers[0]
    assert found.numbers_of([1]) is None and reference.Reference().numbers_of(first) is None


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ({}, "ref_model: the folder /absent does not exist"),
        ({"vocab_size": 99}, "reference model is llama with 99 tokens, the trained model llama"),
        ({"vocab_size": 99, "resize_vocab": True}, None),
    ],
    ids=["absent", "another vocabulary", "grows"],
)
def test_a_ref_model_is_looked_at_before_anything_is_loaded(tmp_path, kind, match):
    folder = "/absent"
    if "vocab_size" in kind:
        folder = str(tmp_path / "other")
        LlamaConfig(vocab_size=kind["vocab_size"]).save_pretrained(folder)
    given = {"model_name_or_path": "m", "dataset": "d", "template": "empty", "output_dir": "o"}
    given |= {"stage": "dpo", "ref_model": folder, "resize_vocab": kind.get("resize_vocab", False)}
    given |= {"finetuning_type": "full", "do_train": True}
    refused = pytest.raises(UserError, match=match) if match else contextlib.nullcontext()
    with refused:
        check_ref_model(from_mapping(given), LlamaConfig(vocab_size=100))
