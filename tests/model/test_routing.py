"""The routers' auxiliary loss of a row, and its gradient, are transformers' own, in layers that are
computed once or twice, whole or in chunks, padding left out.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from longfactory import sp
from longfactory.data.row import Row, TokenizedDocument, make_row
from longfactory.errors import UserError
from longfactory.memory.apply import apply_memory
from longfactory.memory.decoder_layer import DecoderLayer
from longfactory.memory.settings import MemorySettings
from longfactory.model.routing import Routing, router_loss_coefficient
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf
from longfactory.sp.recurrent.layers import as_reference, mixers
from longfactory.sp.text_model import decoder_layers
from longfactory_dev.tiny_models import tiny_config, tiny_model

IDS = torch.randint(3, 250, (24,), generator=torch.Generator().manual_seed(0))
PADDING = 8
COEFFICIENT = 0.3


@functools.cache
def base(family: str) -> nn.Module:
    return tiny_model(family, torch.float64)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def specified(family: str) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' loss of the tokens alone, and its gradients."""
    model: Any = copy.deepcopy(base(family))
    as_reference(model)
    out = model(input_ids=IDS[None], output_router_logits=True)
    (out.aux_loss * COEFFICIENT + out.logits.log_softmax(-1)[0, :, 7].sum()).backward()
    return out.aux_loss.detach(), gradients(model)


def found(family: str, settings: MemorySettings | None) -> tuple[Routing, dict[str, Tensor]]:
    """Ours, with padding behind the tokens."""
    row = make_row([TokenizedDocument(IDS, IDS)]).padded(len(IDS) + PADDING, 0)
    labels = torch.full((len(row),), -100)
    labels[: len(IDS)] = 7
    return of_row(family, settings, row, labels)


def of_row(
    family: str, settings: MemorySettings | None, row: Row, labels: Tensor
) -> tuple[Routing, dict[str, Tensor]]:
    model: Any = copy.deepcopy(base(family))
    model.set_attn_implementation(hf.ATTENTION)
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    if settings is not None:
        apply_memory(model.train(), settings)
    head, routing = TokenLogprobs(model, chunk=5), Routing(model, ctx, COEFFICIENT)
    plan = sp.plan(len(row), row.segments, ctx)
    given = {"input_ids": row.input_ids, "position_ids": row.position_ids}
    with head.labels(labels), routing.row(row.sequences(plan.index), IDS.device):
        out = head.outputs(model(**hf.inputs(given, plan), **routing.arguments).logits)
    out = routing.join(out)
    (out.logps.sum() + routing.loss_sum(3) / 3).backward()
    written = [f for layer in decoder_layers(model)[1] if type(f := layer.forward) is DecoderLayer]
    # compared with the layers' own code while the row's tokens were being counted
    assert all(good for f in written for good in f.chain.proved.values())
    assert settings is None or written or family in NOT_WRITTEN
    return routing, gradients(model)


NOT_WRITTEN = ("phimoe", "dbrx")
"""Their layers run as transformers wrote them."""
SETTINGS = {
    "stored": None,
    "whole": MemorySettings(mlp_chunk=None),
    "chunks": MemorySettings(mlp_chunk=5),
    "saved": MemorySettings(mlp_chunk=5, keep_mlp=0.5),
}
FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "qwen2_moe")
MORE = ("olmoe", "phimoe", "ernie4_5_moe", "granitemoe", "qwen3_next", "minimax_m2", "dbrx")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(("qwen3_moe", s) for s in SETTINGS),
        *((f, "chunks") for f in FAMILIES[1:]),
        *(pytest.param(f, "chunks", marks=pytest.mark.slow) for f in MORE),
    ],
)
def test_the_loss_is_that_of_transformers(family: str, settings: str) -> None:
    aux, expected = specified(family)
    routing, ours = found(family, SETTINGS[settings])
    # The norms of recurrent layers round to float32, and along the row what they round grows; those
    # of hand-written layers beside them do not.
    # Granite's scores are not divided by the heads' width, and the softmax enlarges their rounding.
    error = 3e-6
    if mixers(base(family)):
        error = 3e-5
    elif family == "granitemoe":
        error = 1e-5
    assert float(aux) > 1
    assert float(routing.metrics(3)["router_aux_loss"][0]) == pytest.approx(
        3 * float(aux), rel=1e-6
    )
    assert ours.keys() >= expected.keys()
    for name, g in expected.items():
        assert float((ours[name] - g).abs().max()) <= error * float(g.abs().max()), name
    assert routing._row is None, "the hooks still inject after the backward pass"


@pytest.mark.parametrize("settings", [None, MemorySettings(mlp_chunk=5)])
def test_a_shared_prompt_counts_once_for_each_answer(settings: MemorySettings | None) -> None:
    """[prompt | answer | answer] has the loss of two sequences, and its gradient."""
    prompt, answers = IDS[:10], (IDS[10:17], IDS[17:24])
    model: Any = copy.deepcopy(base("qwen3_moe"))
    out = model(
        input_ids=torch.stack([torch.cat([prompt, answer]) for answer in answers]),
        output_router_logits=True,
    )
    (out.aux_loss * COEFFICIENT + out.logits.log_softmax(-1)[:, 10:, 7].sum()).backward()
    documents = [TokenizedDocument(prompt, prompt, "prompt")]
    documents += [TokenizedDocument(x, x, "chosen", parent=0) for x in answers]
    row = make_row(documents).padded(len(IDS) + PADDING, 0)
    labels = torch.tensor([-100] * 10 + [7] * 14 + [-100] * PADDING)
    routing, ours = of_row("qwen3_moe", settings, row, labels)
    assert float(routing.metrics(1)["router_aux_loss"][0]) == pytest.approx(
        float(out.aux_loss.detach())
    )
    for name, g in gradients(model).items():
        assert float((ours[name] - g).abs().max()) <= 3e-6 * float(g.abs().max()), name


class Operations(TorchDispatchMode):
    """Counts those of each time that it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __enter__(self) -> Any:
        self.counts.append(0)
        return super().__enter__()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[-1] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [None, MemorySettings(mlp_chunk=5)])
def test_how_evenly_experts_are_used(settings: MemorySettings | None) -> None:
    routing, _ = found("qwen3_moe", settings)
    state = routing._last
    assert len(state.load) == 4
    assert all(float(x.sum()) == len(IDS) * 2 for x in state.load.values())
    metrics = {name: float(total) / float(n) for name, (total, n) in routing.metrics(1).items()}
    shares = torch.stack(list(state.load.values())) / (2 * len(IDS))
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum(1) / torch.tensor(4.0).log()
    assert metrics["expert_max_load"] == pytest.approx(float(shares.max(1).values.mean()) * 4)
    assert metrics["expert_entropy"] == pytest.approx(float(entropy.mean()))
    assert metrics["expert_dead"] == pytest.approx(float((shares == 0).double().mean()))
    operations = Operations()
    for more in (0, 4):  # of more layers no more are begun
        state.load |= {place + more: x for place, x in list(state.load.items())}
        with operations:
            routing.metrics(1)
    first, second = operations.counts
    assert first == second < 40


def test_a_row_of_padding_alone_counts_for_nothing() -> None:
    """A data-parallel group whose data are used up runs such rows."""
    model: Any = copy.deepcopy(base("qwen3_moe"))
    ctx = sp.SequenceParallel.create(1)
    head, routing = TokenLogprobs(model), Routing(model, ctx, COEFFICIENT)
    labels = torch.full((PADDING,), -100)
    with head.labels(labels), routing.row(torch.zeros(PADDING, dtype=torch.int64), IDS.device):
        out = head.outputs(model(input_ids=IDS[None, :PADDING]).logits)
    routing.join(out)
    assert float(routing.loss_sum(0)) == 0
    assert all(float(n) == 0 and float(total) == 0 for total, n in routing.metrics(0).values())


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3", "jetmoe", "llama"])
def test_a_model_without_that_loss_is_refused(family: str) -> None:
    model = tiny_model(family, torch.float32)
    ctx = sp.SequenceParallel.create(1)
    assert Routing(model, ctx, 0.0).coefficient == 0
    with pytest.raises(UserError, match=f"moe_aux_loss_coef: .* {family} "):
        Routing(model, ctx, 0.1)


def test_the_coefficient_is_the_key_or_the_model_s_own() -> None:
    config = tiny_config("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.25)
    assert router_loss_coefficient(None, config) == 0.25
    assert router_loss_coefficient(0.0, config) == 0
    config.output_router_logits = False
    assert router_loss_coefficient(None, config) == 0
    assert router_loss_coefficient(0.5, config) == 0.5
    assert router_loss_coefficient(None, tiny_config("llama")) == 0
