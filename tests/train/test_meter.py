"""What a step costs: rates by numbers that are known, tokens that are left, FLOP of documents."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch

from longfactory.data.row import TokenizedDocument, make_row
from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.products import document_flop
from longfactory.memory.shapes import ModelShape
from longfactory.train import meter as module
from longfactory.train.display import Measured
from longfactory.train.loader import RowSampler
from longfactory.train.meter import Cost, Meter, TokensLeft, own_peak, peak_rate, row_flop


def shape(**more: Any) -> ModelShape:
    """Two layers of four heads of 8 dims with 2,000 numbers in their linear maps."""
    kind = LayerKind(
        heads=4,
        kv_heads=4,
        head_dim=8,
        value_dim=8,
        mixer_parameters=1200,
        dense_parameters=800,
        parameters=2000,
        hidden=32,
        **more,
    )
    return ModelShape(
        layers=2,
        hidden=32,
        ffn=8,
        heads=4,
        kv_heads=4,
        head_dim=8,
        vocab=100,
        parameters=10400,
        layer_parameters=2000,
        active_layer_parameters=2000,
        trainable=10400,
        written_layer=False,
        kinds=(kind,),
        order=(0, 0),
    )


def test_flop_of_a_document_counts_causal_products() -> None:
    n = 64
    # a product counts twice, forward once and backward twice
    linear = 6 * n * (2 * 2000 + 100 * 32)
    # queries with keys, and scores with values, over the half below the diagonal
    attention = 3 * 2 * 2 * (2 * (n * n / 2) * 4 * 8)
    assert document_flop(shape(), n) == linear + attention
    # logits are made of trained tokens alone
    assert document_flop(shape(), n, heads=4) == linear + attention - 6 * 60 * 3200
    # a branch of a shared prompt: the prompt and it together are the whole document
    both = document_flop(shape(), 40) + document_flop(shape(), 24, before=40)
    assert both == pytest.approx(document_flop(shape(), n))
    # two documents need less than one of their length, by attention alone
    two = 2 * document_flop(shape(), n // 2)
    assert document_flop(shape(), n) - two == pytest.approx(attention / 2)


def test_flop_of_a_row_leaves_padding_out() -> None:
    prompt = TokenizedDocument([1] * 40, [-100] * 40, "prompt", 0)
    chosen = TokenizedDocument([1] * 8, [-100] * 4 + [1] * 4, "chosen", 0, parent=0)
    row = make_row([prompt, chosen]).padded(64, 0)
    expected = document_flop(shape(), 40, heads=0) + document_flop(shape(), 8, 40, heads=4)
    assert row_flop(shape(), row) == expected


def row(tokens: int, multiple: int) -> Any:
    return make_row([TokenizedDocument([1] * tokens, [1] * tokens)]).padded(multiple, 0)


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = types.SimpleNamespace(t=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.t)
    meter = Meter(world=2, shape=shape(), peak=1e6, capacity=100)
    meter.peak_memory = 1.5
    for _ in range(2):
        meter.begin()
        now.t += 1.0
        sums = meter.fetched([row(60, 64), row(90, 64)], 2)
        assert sums[:3] == [150.0, 64.0 + 128.0, 200.0]
        now.t += 3.0
        meter.summed(sums)
        meter.end()
        now.t += 10.0  # an evaluation
        meter.interrupted()
    rates = meter.rates(meter.since_log)
    flop = row_flop(shape(), row(60, 64)) + row_flop(shape(), row(90, 64))
    assert rates.tokens_per_second_per_gpu == 150 / 4 / 2
    assert rates.mfu == pytest.approx(flop / 4 / 2 / 1e6)
    assert (rates.data_wait, rates.padding, rates.packing) == (0.25, 1 - 150 / 192, 0.75)
    assert (rates.peak_memory_gib, rates.seconds_per_step) == (1.5, 4.0)
    meter.logged()
    assert meter.rates(meter.since_log).known() == {} and meter.of_recent() == rates
    # 14 s and 150 tokens since the first step's end, 10 of them of an evaluation that comes again
    assert meter.seconds_left(300) == pytest.approx(300 * 24 / 150)
    assert meter.remaining(2, 4) == pytest.approx(300 * 24 / 150)  # steps like those before


@pytest.mark.parametrize("other", ["on_evaluate", "on_save", "on_epoch_begin"])
def test_what_is_between_two_steps_counts_if_it_is_training(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a row of the log is written a GPU still updates the weights."""
    now = types.SimpleNamespace(t=100.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.t)
    meter, seconds, waited = Meter(), [], []
    for between in (30.0, 0.25, 20.0, 0.25, 0.0):
        meter.begin()
        now.t += 1.0
        meter.summed(meter.fetched([row(60, 64)], 1))
        now.t += 3.0
        meter.end()
        seconds.append(meter.since_log.seconds)
        waited.append(meter.since_log.waited)
        meter.logged()
        now.t += between
        if between == 20.0:
            getattr(Measured(meter), other)(None, None, None)
    assert seconds == [4.0, 4.0, 4.25, 4.0, 4.25]  # compilers are put away after the first step
    assert waited == [1.0] * 5


def test_what_is_not_known_is_left_out() -> None:
    meter = Meter()
    assert meter.remaining(0, 4) is None and meter.of_recent().known() == {}
    known = meter.rates(Cost(1, 2.0, 0.0, 8.0, 8.0)).known()
    assert set(known) == {"tokens_per_second_per_gpu", "data_wait", "padding", "seconds_per_step"}
    assert peak_rate(None, 2, False) is None and peak_rate("GeForce GTX 1080", 2, False) is None
    assert peak_rate("NVIDIA H200", 2, False) == 989e12
    assert peak_rate("NVIDIA H200", 4, True) == 495e12
    assert 0.05 < own_peak(torch.device("cpu")) < 500


def test_tokens_that_are_left_are_those_of_the_samples_that_come() -> None:
    lengths = np.array([10, 20, 30, 40, 50, 60, 70])
    sampler = RowSampler(7, 1, groups=2, group=0, seed=3, step=2)
    left = TokensLeft(sampler, lengths)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(lengths[sampler.order()])
    sampler.set_epoch(0)
    assert left(0, 4, 0.0) == 280 and left(4, 4, 0.0) == 0
    assert left(1, 3, 0.0) == orders[0][2:6].sum()
    assert left(3, 4, 0.0) == orders[0][6:].sum()  # a step that is not whole
    # of epochs to come the mean of a step is taken, of the one that goes on the samples themselves
    assert left(5, 8, 0.0) == orders[1][2:].sum()
    assert left(2, 8, 0.0) == orders[0][4:].sum() + 280
    assert left(2, 6, 0.0) == orders[0][4:].sum() + 140
    dropped = TokensLeft(RowSampler(7, 1, groups=2, seed=3, drop_last=True, step=2), lengths)
    assert dropped(0, 3, 0.0) == orders[0][:6].sum()
    # a stream: steps like those before
    assert TokensLeft(None)(2, 6, 25.0) == 100


def test_long_samples_first_leave_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One document of 9,000 tokens, then nine of 100: after a step most of the work is done."""
    now = types.SimpleNamespace(t=0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.t)
    meter = Meter()
    meter.left = TokensLeft(RowSampler(10, 1, step=1), [9000] + [100] * 9)
    meter.begin()
    meter.summed(meter.fetched([row(9000, 1)], 1))
    now.t += 90.0
    meter.end()
    assert meter.remaining(1, 10) == pytest.approx(9.0)  # by steps it would be 810
