"""Expert choices are recorded and replayed for every family with experts, in pieces, recomputed and
sharded.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from configurations import makeable, skip_unless_makeable
from longfactory.sp import routers
from longfactory_dev.tiny_models import tiny_model

FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "mixtral",
    "dbrx",
    "jetmoe",
    "phimoe",
    "granitemoe",
    "glm4_moe",
    "llama4_text",
]
IDS = torch.arange(24)[None] * 7 % 89 + 4


def shuffled(choices: routers.Choices, experts: int) -> routers.Choices:
    """Other choices than the model would make: every place moved on by one."""
    return routers.Choices(
        {
            name: [(picks + 1) % experts for picks in all_picks]
            for name, all_picks in choices.of.items()
        }
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_pass_is_the_recorded_one_and_choices_decide_the_result(family: str) -> None:
    skip_unless_makeable(family)
    model = tiny_model(family, torch.float32)
    with torch.no_grad():
        with routers.record(model) as choices:
            plain = model(input_ids=IDS, use_cache=False).logits
        assert choices.tokens == IDS.shape[1] and all(choices.of.values())
        with routers.replay(model, choices):
            again = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(plain, again)
        # Half precision chooses other experts now and then; with these choices it is near.
        half = tiny_model(family, torch.bfloat16)
        with routers.replay(half, choices):
            near = half(input_ids=IDS, use_cache=False).logits.float()
        assert (near - plain).norm() < 0.1 * plain.norm()
        if family in ("qwen3_moe", "mixtral", "dbrx", "gpt_oss"):
            experts = max(int(p.max()) for all_picks in choices.of.values() for p in all_picks) + 1
            with routers.replay(model, shuffled(choices, experts)):
                other = model(input_ids=IDS, use_cache=False).logits
            assert not torch.allclose(plain, other, atol=1e-3)
        after = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(plain, after)  # nothing is left behind


def test_routers_are_found_in_every_family_with_experts() -> None:
    for family in filter(makeable, FAMILIES):
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            from longfactory_dev.tiny_models import tiny_config

            assert routers.routers(AutoModelForCausalLM.from_config(tiny_config(family))), family
    assert not routers.routers(tiny_model("llama"))


def test_gradients_pass_through_the_replayed_values() -> None:
    model = tiny_model("qwen3_moe", torch.float64)

    def gradients(*contexts: object) -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with routers.record(model) as choices:
        expected = gradients()
    with routers.replay(model, choices):
        found = gradients()
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert any("gate" in name for name in expected)


def test_pieces_recomputed_in_backward_take_their_own_choices() -> None:
    """The memory engine runs experts in pieces and again in backward; the first call looks at a few
    tokens.
    """
    from longfactory.memory.apply import apply_memory
    from longfactory.memory.settings import MemorySettings

    whole, cut = (
        tiny_model("qwen3_moe", torch.float64).train(),
        tiny_model("qwen3_moe", torch.float64).train(),
    )
    apply_memory(cut, MemorySettings(mlp_chunk=7), "cpu")
    with routers.record(whole) as choices:
        whole(input_ids=IDS, use_cache=False)
    given = shuffled(choices, 4)
    for model in (whole, cut):
        with routers.replay(model, given):
            model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), cut.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-10), name
    with routers.record(cut) as recorded:
        cut(input_ids=IDS, use_cache=False).logits.sum().backward()
    for name, all_picks in recorded.of.items():
        for a, b in zip(all_picks, choices.of[name], strict=True):
            assert torch.equal(a, b)


def test_documents_join_to_a_row_and_shards_take_their_tokens() -> None:
    model = tiny_model("qwen3_moe", torch.float64)
    parts: list[routers.Choices | int] = []
    scores = []
    with torch.no_grad():
        for ids in (IDS[:, :10], IDS[:, 10:]):
            with routers.record(model) as choices:
                scores.append(model(input_ids=ids, use_cache=False).logits)
            parts.append(choices)
        row = routers.join([*parts, 3])
        assert row.tokens == 27
        index = torch.tensor([0, 3, 11, 26])
        taken = row.take(index)
        for name, all_picks in row.of.items():
            for i, picks in enumerate(all_picks):
                assert (
                    torch.equal(taken.of[name][i], picks[index])
                    and (picks[24:] == routers.OWN).all()
                )
        with routers.replay(model, row.take(slice(10, 27))):
            padded = model(
                input_ids=torch.cat([IDS[:, 10:], IDS[:, :3]], 1), use_cache=False
            ).logits
    assert torch.allclose(padded[:, :14], scores[1], atol=1e-5)
    assert routers.join([3]).tokens is None


def test_what_experts_mask_is_no_choice() -> None:
    """Grouped kernels of experts mask the rows that they leave unwritten, in passes with gradients
    alone.
    """
    model = tiny_model("mixtral", torch.float64)
    for block in (m for m in model.modules() if hasattr(m, "experts")):
        own = block.experts.forward

        def masked(hidden: Tensor, *args: Tensor, own=own) -> Tensor:
            found = own(hidden, *args)
            return found.masked_fill(found.isnan(), 0.0) if torch.is_grad_enabled() else found

        block.experts.forward = masked
    with torch.no_grad(), routers.record(model) as choices:
        plain = model(input_ids=IDS, use_cache=False).logits
    with routers.replay(model, choices):
        again = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(plain, again)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("qwen3_moe", torch.float64)
    with torch.no_grad(), routers.record(model) as choices:
        model(input_ids=IDS, use_cache=False)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="recorded are"),
        routers.replay(model, choices.take(slice(0, 5))),
    ):
        model(input_ids=IDS, use_cache=False)
    some = dict(itertools.islice(choices.of.items(), 1))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="0 were recorded"),
        routers.replay(model, routers.Choices(some)),
    ):
        model(input_ids=IDS, use_cache=False)
    with pytest.raises(ValueError, match="two models"):
        routers.join([choices, routers.Choices(some)])
