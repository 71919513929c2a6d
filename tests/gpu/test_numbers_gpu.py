"""fp16's scaler leaves out updates by itself; what the check of a step's numbers costs on a GPU."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from longfactory.train.numbers import Numbers
from small_runs import POOLS, home, keys, run_on_ranks  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("what", ["gradient inf", "loss nan"])
def test_a_scaled_gradient_may_be_infinite_and_a_loss_may_not(what: str, home: Path) -> None:  # noqa: F811
    from _survival_numbers import run_planted

    given = keys(home, what.replace(" ", "_"), fp16=True, use_cpu=False, max_steps=4)
    words = [f"{k}={v}" for k, v in given.items()]
    plant = {"what": what, "step": 3}
    error = POOLS[1].run(run_planted, words, str(home / "cache"), plant)[0]["error"]
    if what == "loss nan":
        assert error is not None and error.startswith("Step 3: the loss is nan")
        return
    assert error is None
    folder = Path(given["output_dir"])
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [h["loss"] for h in log if "loss" in h]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


def test_on_the_host_fp16_is_clipped_without_its_scale(home: Path) -> None:  # noqa: F811
    """Losses and norms are nearly those of a run in float32: the scale is 65,536 at first."""
    rows = []
    for name, fp16 in (("wide", False), ("scaled", True)):
        placed = {"optimizer_placement": "host", "max_grad_norm": 0.1, "use_cpu": False}
        given = keys(home, name, fp16=fp16, **placed)
        words = [f"{k}={v}" for k, v in given.items()]
        POOLS[1].run(run_on_ranks, words, str(home / "cache"))
        log = json.loads((Path(given["output_dir"]) / "trainer_state.json").read_text())
        rows.append([(h["loss"], h["grad_norm"]) for h in log["log_history"] if "loss" in h])
    wide, scaled = (torch.tensor(each) for each in rows)
    # the scaler may leave out first steps, to find its scale
    found = scaled[:, 1].isfinite()
    assert int(found.sum()) >= 2
    torch.testing.assert_close(scaled[:, 0], wide[:, 0], rtol=2e-2, atol=0.0)
    torch.testing.assert_close(scaled[found, 1], wide[found, 1], rtol=0.5, atol=0.0)


def test_the_check_waits_once() -> None:
    """Steps of queued products with and without the check: it costs less than 2 ms a step."""
    numbers, model = Numbers("stop", lambda i: ("data", i)), nn.Linear(1, 1)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def steps(checked: bool, count: int = 50) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for step in range(1, count + 1):
            numbers.begin([])
            x = a
            for _ in range(20):
                x = torch.tanh(x @ a)
            loss = x.float().square().mean()
            numbers.add(loss)
            if checked:
                assert numbers.may_update(step, loss.sqrt(), model)
            for _ in range(20):
                x = torch.tanh(x @ a)
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count

    steps(True)
    without, with_check = steps(False), steps(True)
    print(f"{1e3 * without:.2f} ms a step without the check, {1e3 * with_check:.2f} ms with it")
    assert with_check - without < 2e-3
