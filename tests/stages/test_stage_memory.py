"""A step with a reference has no memory term in vocabulary times length: counted by tensors, not by
the clock of an allocator.
"""

from __future__ import annotations

import pytest
import torch

from helpers.live_tensors import Peak
from longfactory import sp
from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.model.outputs import TokenOutputs
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf
from longfactory.stages.base import Stage
from longfactory.stages.kto import KTOStage
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.tokens import TokenStage
from longfactory.testing import tiny_model
from longfactory.train.reference import as_reference

pytestmark = pytest.mark.processes

CHUNK = 8


def a_row(kind: str, length: int) -> Row:
    roles = ("chosen", "rejected") if kind == "dpo" else ("chosen", "kl")
    half = length // 2
    return make_row(
        [
            TokenizedDocument([3] * half, [IGNORE] + [5] * (half - 1), role=r, sample=0)
            for r in roles
        ]
    )


def peak(kind: str, stage: Stage, vocabulary: int, length: int) -> int:
    from peft import LoraConfig, get_peft_model

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = tiny_model(vocab_size=vocabulary, **sizes)
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    head = TokenLogprobs(model, chunk=CHUNK)
    row = a_row(kind, length)
    plan = sp.plan(len(row), row.segments, ctx)

    labels = row.labels[plan.index]

    def forward() -> torch.Tensor:
        return model(
            **hf.inputs({"input_ids": row.input_ids, "position_ids": row.position_ids}, plan)
        ).logits

    def logps() -> torch.Tensor:
        with head.labels(labels):
            return sp.gather(head.outputs(forward()).logps, plan)

    with Peak() as memory:
        with as_reference(model, adapter_off=True):
            if kind == "asft":
                with head.hidden(labels) as result:
                    forward()
                    hidden = result()
            else:
                reference = logps()
        if kind == "asft":
            with head.labels(labels, hidden):
                out = head.outputs(forward())
        else:
            out = TokenOutputs(logps(), reference=reference)
        stage.loss_sum(out, row)[0].backward()
    return memory.peak


STAGES = {"dpo": PreferenceStage(), "kto": KTOStage(), "asft": TokenStage("asft", 0.5)}


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        # kto's pass is dpo's
        pytest.param(k, s, id=k, marks=[pytest.mark.slow] if k == "kto" else [])
        for k, s in STAGES.items()
    ],
)
def test_slope_over_length_does_not_know_the_vocabulary(kind: str, stage: Stage) -> None:
    # Lengths at which the peak is in the layers: below, the chunk itself is the peak and the slope
    # is of another moment.
    peaks = {(v, n): peak(kind, stage, v, n) for v in (1024, 2048) for n in (1024, 1536)}
    slope = {v: (peaks[v, 1536] - peaks[v, 1024]) / 512 for v in (1024, 2048)}
    assert slope[1024] > 16 * 4  # activations are counted: at least a hidden state a token
    # Logits of one token would be 4 * 1024 bytes more for the larger vocabulary.
    assert abs(slope[2048] - slope[1024]) < 4 * 1024 / 100
    assert peaks[2048, 1024] - peaks[1024, 1024] < 1024 * 4 * (4 * CHUNK)  # a few chunks of logits
