"""Every stage on a transformers model split over ranks, against single documents through the whole
model: loss and gradient in float64.

Every preference loss x size x schedule x shared prompt x source of the reference. The model is a
Llama with a random LoRA adapter, also on the output layer. Logps are made once for a layout; each
loss is differentiated through the model by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from longfactory import sp
from longfactory.data.row import Row, make_row
from longfactory.model.outputs import TokenOutputs
from longfactory.model.routing import Routing
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.model.value_head import TokenValues
from longfactory.sp import hf
from longfactory.stages import losses
from longfactory.stages.base import Stage
from longfactory.stages.kto import KTOStage
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.reward import RewardStage
from longfactory.stages.tokens import TokenStage
from longfactory.testing import run_ranks, tiny_model
from longfactory.train import reference
from oracles import CHOSEN, PROMPTS, REJECTED, kto_documents, naive, pair_row, s, smoothing, whole

pytestmark = pytest.mark.processes

SAMPLES = [0, 1, 2, 3]
BETA, GAMMA, FTX = 0.2, 0.4, 0.3
SOURCES = ("reference model", "adapter off", "precomputed")
KTO_LABELS = [1, 0, 0, 1]


def tiny(seed: int) -> Any:
    """A Llama that is float64 throughout: transformers' eager attention and RMSNorm go through
    float32.
    """
    model = tiny_model(dtype=torch.float64, attn="sdpa", seed=seed)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = functools.partial(
                torch.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=1e-6
            )
    return model


def policy(head: bool = True) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"] + ["lm_head"] * head
    return get_peft_model(tiny(1), LoraConfig(target_modules=targets, r=2, init_lora_weights=False))


def other_model() -> Any:
    return tiny(2)


def reward_model() -> tuple[Any, TokenValues]:
    torch.manual_seed(3)
    model = tiny(3)
    head = TokenValues(model)
    head.value.double()
    return model, head


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradient(loss: Tensor, model: Any) -> dict[str, Tensor]:
    params = trained(model)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(params.items(), grads, strict=True)
    }


# -- one process, one document at a time -----------------------------------------------------------


def answer_logps(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@functools.cache
def expected(stage: str) -> dict[Any, tuple[Tensor, dict[str, Tensor]]]:
    """(name, reference) -> loss and gradients; for rm and kto the name is the stage's."""
    out: dict[Any, tuple[Tensor, dict[str, Tensor]]] = {}
    if stage == "rm":
        model, head = reward_model()

        def value(ids: list[int]) -> Tensor:
            with head.labels(torch.zeros(len(ids), dtype=torch.int64)):
                model(input_ids=torch.tensor([ids]))
                return head.outputs().logps[-1]

        c, r = (
            torch.stack([value(PROMPTS[i] + a[i]) for i in SAMPLES]) for a in (CHOSEN, REJECTED)
        )
        loss = -torch.log(s(c - r)).sum()
        return {"rm": (loss.detach(), gradient(loss, model))}
    model = policy()
    with torch.no_grad():
        second = other_model()
    for source in ("other", "off"):

        def reference_logp(prompt: list[int], answer: list[int], source: str = source) -> Tensor:
            with reference.as_reference(
                model if source == "off" else second, adapter_off=source == "off"
            ):
                return answer_logps(model if source == "off" else second, prompt, answer).sum()

        if stage == "kto":
            ratio = [
                answer_logps(model, PROMPTS[i], CHOSEN[i]).sum()
                - reference_logp(PROMPTS[i], CHOSEN[i])
                for i in SAMPLES
            ]
            kls = [
                answer_logps(model, PROMPTS[i], REJECTED[i - 1]).sum()
                - reference_logp(PROMPTS[i], REJECTED[i - 1])
                for i in SAMPLES
            ]
            kl = torch.stack(kls).mean().detach().clamp(min=0)
            each = [
                1 - s(BETA * (x - kl)) if y else 1 - s(BETA * (kl - x))
                for x, y in zip(ratio, KTO_LABELS, strict=True)
            ]
            loss = torch.stack(each).sum()
            out["kto", source] = (loss.detach(), gradient(loss, model))
            continue
        tokens = [
            [answer_logps(model, PROMPTS[i], a[i]) for i in SAMPLES] for a in (CHOSEN, REJECTED)
        ]
        pi = [torch.stack([t.sum() for t in side]) for side in tokens]
        n = [torch.tensor([float(len(t)) for t in side], dtype=torch.float64) for side in tokens]
        ref = [
            torch.stack([reference_logp(PROMPTS[i], a[i]) for i in SAMPLES])
            for a in (CHOSEN, REJECTED)
        ]
        for name in losses.PREFERENCE_LOSSES:
            loss = (
                naive(name, pi, ref, n, BETA, smoothing(name), GAMMA).sum()
                + FTX * (-pi[0] / n[0]).sum()
            )
            out[name, source] = (loss.detach(), gradient(loss, model))
    return out


# -- on the ranks ----------------------------------------------------------------------------------


def outputs(model: Any, head: Any, row: Row, ctx: sp.SequenceParallel) -> TokenOutputs:
    plan = sp.plan(len(row), row.segments, ctx)
    with head.labels(row.labels[plan.index]):
        out = model(
            **hf.inputs({"input_ids": row.input_ids, "position_ids": row.position_ids}, plan)
        )
        return TokenOutputs(sp.gather(head.outputs(out.logits).logps, plan))


def stages(kind: str) -> dict[str, Stage]:
    if kind == "rm":
        return {"rm": RewardStage()}
    if kind == "kto":
        return {"kto": KTOStage(BETA)}
    return {
        n: PreferenceStage(n, losses.LossOptions(BETA, smoothing(n), GAMMA), ftx=FTX)
        for n in losses.PREFERENCE_LOSSES
    }


def on_ranks(
    kind: str, size: int, mode: str, shared: bool, source: str
) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Loss and gradient of every loss by the trainer's rule (but N): each rank differentiates DP *
    S_d, and the ranks average.
    """
    import torch.distributed as dist

    ctx = sp.SequenceParallel.create(size, mode=mode)
    world = ctx.size * ctx.dp_size

    def dp_sum(x: Tensor) -> Tensor:
        x = x.clone()
        if ctx.dp_size > 1:
            dist.all_reduce(x, group=ctx.dp_group)
        return x

    # Unevenly dealt: with two groups one has three samples, the other one.
    mine = SAMPLES if ctx.dp_size == 1 else [SAMPLES[:3], SAMPLES[3:]][ctx.dp_rank]
    row = (
        make_row([d for d in kto_documents(KTO_LABELS) if d.sample in mine])
        if kind == "kto"
        else pair_row(mine, shared)
    )
    row = row.padded(sp.alignment(ctx), 0)
    model, head = reward_model() if kind == "rm" else (policy(), None)
    hf.prepare(model, ctx)
    head = head or TokenLogprobs(model, chunk=5)
    if source == "adapter off":
        with reference.as_reference(model, adapter_off=True):
            ref = outputs(model, head, row, ctx).logps
    elif kind != "rm":
        second = other_model()
        hf.prepare(second, ctx)
        second_head = TokenLogprobs(second, chunk=5)
        with reference.as_reference(second, adapter_off=False):
            if source == "precomputed":
                cache = reference.precompute(
                    [row],
                    lambda r: outputs(second, second_head, r, ctx).logps,
                    len(SAMPLES),
                    dp_sum=dp_sum,
                )
                row = cache.attach(row)
            else:
                ref = outputs(second, second_head, row, ctx).logps
    out = outputs(model, head, row, ctx)
    if kind != "rm" and source != "precomputed":
        out = TokenOutputs(out.logps, reference=ref)
    results = {}
    for name, stage in stages(kind).items():
        loss, _ = stage.loss_sum(out, row, dp_sum=dp_sum, dp_rank=ctx.dp_rank, dp_size=ctx.dp_size)
        grads = gradient(ctx.dp_size * loss, model)
        for g in grads.values():
            dist.all_reduce(g)
            g /= world
        results[name] = (float(dp_sum(loss.detach())), grads)
    return results


CASES = [
    (1, "zigzag-ring", 1),
    (2, "zigzag-ring", 2),
    (2, "ulysses", 2),
    (4, "zigzag-ring", 4),
    (4, "ulysses", 4),
    (2, "zigzag-ring", 4),
]


def check(kind: str, size: int, mode: str, world: int, shared: bool, source: str) -> None:
    want = expected(kind)
    per_rank = run_ranks(world, on_ranks, kind, size, mode, shared, source)
    for results in per_rank[:1]:
        for name, (loss, grads) in results.items():
            reference = "off" if source == "adapter off" else "other"
            key = name if kind == "rm" else (name, reference)
            want_loss, want_grads = want[key]
            assert loss == pytest.approx(float(want_loss), rel=1e-9, abs=1e-9), name
            assert grads.keys() == want_grads.keys()
            assert max(float(g.abs().max()) for g in want_grads.values()) > 1e-5, (
                f"{name}: the comparison is of zeros"
            )
            for n, g in want_grads.items():
                torch.testing.assert_close(
                    grads[n],
                    g,
                    rtol=1e-9,
                    atol=1e-9,
                    msg=lambda m, name=name, n=n: f"{name}, {n}: {m}",
                )


def whole_grid() -> list[Any]:
    """size x schedule x shared prompt x source; by default some in which all values occur, with
    `make test-all` all. Four ranks take longest: both shared and unshared prompts on one case.
    """
    grid = [
        (*case, shared, source) for case in CASES for shared in (False, True) for source in SOURCES
    ]
    quick = [
        source == SOURCES[(CASES.index((size, mode, world)) + shared) % 3]
        and (world < 4 or (size, mode) == (4, "zigzag-ring") or shared == (mode == "ulysses"))
        for size, mode, world, shared, source in grid
    ]
    return [
        pytest.param(*values, marks=[] if q else [pytest.mark.slow])
        for values, q in zip(grid, quick, strict=True)
    ]


@pytest.mark.parametrize(("size", "mode", "world", "shared", "source"), whole_grid())
def test_preference_losses(size: int, mode: str, world: int, shared: bool, source: str) -> None:
    check("dpo", size, mode, world, shared, source)


@pytest.mark.parametrize(
    ("size", "mode", "world", "source"),
    [
        # every source on two ranks, one of them for each of the others
        pytest.param(*case, s, marks=[] if case == CASES[1] or i % 3 == k else [pytest.mark.slow])
        for i, case in enumerate(CASES)
        for k, s in enumerate(SOURCES)
    ],
)
def test_kto(size: int, mode: str, world: int, source: str) -> None:
    check("kto", size, mode, world, False, source)


@pytest.mark.parametrize("shared", [False, True], ids=["two-documents", "shared-prompt"])
@pytest.mark.parametrize(("size", "mode", "world"), CASES)
def test_reward_model(size: int, mode: str, world: int, shared: bool) -> None:
    check("rm", size, mode, world, shared, "none")


# -- losses of a token -----------------------------------------------------------------------------

ALPHA = 0.4
TRAINED = {"full": lambda: tiny(1), "lora": lambda: policy(head=False), "lora on the head": policy}
# What is trained, and what asft compares with.
PAIRS = [("full", "reference model"), ("lora", "reference model")] + [
    (t, "adapter off") for t in ("lora", "lora on the head")
]


def token_losses_alone(tuning: str, source: str) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """One process, one document at a time, whole logits."""
    model = TRAINED[tuning]()
    other = model if source == "adapter off" else other_model()
    sums: dict[str, Tensor] = {}
    for i in SAMPLES:
        ids, answer = torch.tensor([PROMPTS[i] + CHOSEN[i]]), torch.tensor(CHOSEN[i])
        log_p = model(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        with reference.as_reference(other, adapter_off=source == "adapter off"):
            log_q = other(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        x = log_p.gather(1, answer[:, None])[:, 0]
        top = log_p.detach().topk(20).values.log_softmax(-1)
        each = {
            "nll": -x,
            "dft": -x * x.detach().exp(),
            "asft": -x * x.detach().exp() + ALPHA * (log_q.exp() * (log_q - log_p)).sum(-1),
            "eaft": -x * (-(top.exp() * top).sum(-1) / 3) ** ALPHA,
        }
        for name, values in each.items():
            sums[name] = sums.get(name, torch.zeros(())) + values.sum()
    return {name: (loss.detach(), gradient(loss, model)) for name, loss in sums.items()}


def token_losses_on_ranks(
    tuning: str, source: str, size: int, mode: str
) -> dict[str, tuple[float, dict[str, Tensor], float]]:
    """Through the trainer's own code: loss and gradient as each rank differentiates them, averaged;
    and the metric kl.
    """
    import types

    import torch.distributed as dist

    from longfactory.train.trainer import RowTrainer

    ctx = sp.SequenceParallel.create(size, mode=mode)
    mine = SAMPLES if ctx.dp_size == 1 else [SAMPLES[:3], SAMPLES[3:]][ctx.dp_rank]
    row = make_row([whole(PROMPTS[i], CHOSEN[i], sample=i) for i in mine]).padded(
        sp.alignment(ctx), 0
    )
    model = TRAINED[tuning]()
    hf.prepare(model, ctx)

    def total(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if ctx.dp_size > 1:
            dist.all_reduce(x, group=ctx.dp_group)
        return x

    results = {}
    head = TokenLogprobs(model, chunk=5, needs=frozenset({"entropy"}))
    other = None
    if source == "reference model":
        second = other_model()
        hf.prepare(second, ctx)
        other = (second, TokenLogprobs(second, chunk=5))
    trainer = types.SimpleNamespace(
        ctx=ctx, head=head, reference=reference.Reference(by_adapter=other is None, model=other),
        args=types.SimpleNamespace(device=torch.device("cpu"), neftune_noise_alpha=None),
        _sum_over_groups=total, measure=None, routing=Routing(model, ctx), images=None,
    )  # fmt: skip
    for name in (
        "_model_inputs",
        "_noise",
        "token_outputs",
        "reference_hidden",
        "_outputs_with_reference",
    ):
        setattr(trainer, name, types.MethodType(getattr(RowTrainer, name), trainer))
    for loss in ("nll", "dft", "asft", "eaft"):
        trainer.stage = TokenStage(loss, ALPHA)
        value, metrics = RowTrainer.stage_loss(trainer, model, row)
        grads = gradient(ctx.dp_size * value, model)
        for g in grads.values():
            dist.all_reduce(g)
            g /= ctx.size * ctx.dp_size
        results[loss] = (
            float(total(value)),
            grads,
            float(total(metrics["kl"][0])) if loss == "asft" else 0.0,
        )
    return results


def token_grid() -> list[Any]:
    """By default every pair on two ranks, and one of them for each of the other cases."""
    grid = [(*case, *pair) for case in CASES for pair in PAIRS]
    quick = [
        (size, mode, world) == CASES[1]
        or PAIRS.index((tuning, source)) == CASES.index((size, mode, world)) % 4
        for size, mode, world, tuning, source in grid
    ]
    return [
        pytest.param(*values, marks=[] if q else [pytest.mark.slow])
        for values, q in zip(grid, quick, strict=True)
    ]


@pytest.mark.parametrize(("size", "mode", "world", "tuning", "source"), token_grid())
def test_losses_of_a_token(size: int, mode: str, world: int, tuning: str, source: str) -> None:
    want = token_losses_alone(tuning, source)
    got = run_ranks(world, token_losses_on_ranks, tuning, source, size, mode)[0]
    assert got["asft"][2] > 1e-3
    assert ALPHA * got["asft"][2] == pytest.approx(
        float(want["asft"][0] - want["dft"][0]), rel=1e-9
    )
    for name, (loss, grads) in want.items():
        assert got[name][0] == pytest.approx(float(loss), rel=1e-9, abs=1e-9), name
        assert max(float(g.abs().max()) for g in grads.values()) > 1e-3
        for n, g in grads.items():
            torch.testing.assert_close(
                got[name][1][n],
                g,
                rtol=1e-9,
                atol=1e-9,
                msg=lambda m, name=name, n=n: f"{name}, {n}: {m}",
            )
