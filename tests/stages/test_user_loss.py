"""`loss_path`: a user's own function trains as a built-in one does, or is refused with a sentence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longfactory import sp
from longfactory.config import ConfigError, from_mapping
from longfactory.config.arguments import FinetuningArguments
from longfactory.data.row import IGNORE, TokenizedDocument, make_row
from longfactory.dry_run import Found, _loss
from longfactory.errors import UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf
from longfactory.stages.losses import LossOptions
from longfactory.stages.make import make_stage
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.tokens import TokenStage
from longfactory.testing import run_ranks, tiny_model
from longfactory.train.verify.alone import _preference
from longfactory.train.verify.command import verify
from oracles import pair_row
from small_runs import LORA, STEPS, home, steps, text, train

__all__ = ["home"]  # a fixture

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "nowhere/out"}

FILE = """
import torch
import torch.nn.functional as F

def dpo(pairs, options, data_parallel):
    return -F.logsigmoid(options.beta * pairs.margin)

def simpo(pairs, options, data_parallel):
    m = pairs.per_token()
    return -F.logsigmoid(options.beta * (m.chosen - m.rejected) - options.simpo_gamma)
simpo.reference = False
simpo.per_token = True

def dft(outputs, row):
    return -outputs.logps * outputs.logps.detach().exp()

def sure(outputs, row):
    return -outputs.logps * outputs.entropy
sure.needs = ("entropy",)

def mean(pairs, options, data_parallel):
    return pairs.margin.mean()

def number(pairs, options, data_parallel):
    return 0.5

def constant(pairs, options, data_parallel):
    return pairs.margin.detach()

def narrow(pairs, options, data_parallel):
    return pairs.margin.float()

def two(pairs, options):
    return pairs.margin

def misspelt(pairs, options, data_parallel):
    return pairs.margin
misspelt.refrence = False

def text(pairs, options, data_parallel):
    return pairs.margin
text.reference = "no"

def divergence(outputs, row):
    return outputs.reference_kl
divergence.needs = ("reference_kl",)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "losses.py"
    path.write_text(FILE)
    return path


def arguments(file: Path, function: str, **keys: Any) -> FinetuningArguments:
    return FinetuningArguments(**{"stage": "dpo", "loss_path": f"{file}:{function}"} | keys)


def made(file: Path, function: str, **keys: Any) -> Any:
    method = arguments(file, function, **keys)
    return make_stage(method.stage, method)


@pytest.mark.parametrize(
    ("function", "pref_loss", "keys"),
    [
        ("dpo", "sigmoid", {}),
        ("dpo", "sigmoid", {"pref_bco_weight": 0.3, "pref_ftx": 0.2, "ld_alpha": 0.5}),
        ("simpo", "simpo", {"simpo_gamma": 0.3}),
    ],
)
def test_a_preference_loss_is_the_built_in_one(
    file: Path, function: str, pref_loss: str, keys: dict[str, Any]
) -> None:
    """To the last bit: loss, gradient and metrics."""
    row = pair_row([0, 1, 2], shared=True)
    own = made(file, function, **keys)
    built_in = make_stage("dpo", FinetuningArguments(stage="dpo", pref_loss=pref_loss, **keys))
    assert own.needs_reference == built_in.needs_reference == (pref_loss == "sigmoid")
    results = []
    for stage in (own, built_in):
        logps = (-torch.rand(len(row), generator=torch.Generator().manual_seed(1))).requires_grad_()
        reference = -torch.rand(len(row), generator=torch.Generator().manual_seed(2))
        loss, metrics = stage.loss_sum(TokenOutputs(logps, reference=reference), row)
        (gradient,) = torch.autograd.grad(loss, logps)
        assert gradient.abs().max() > 0
        results.append((loss, gradient, metrics))
    (a, ga, ma), (b, gb, mb) = results
    assert torch.equal(a, b) and torch.equal(ga, gb) and list(ma) == list(mb)
    assert all(torch.equal(ma[n][0], mb[n][0]) and ma[n][1] == mb[n][1] for n in ma)


def test_a_token_loss_is_the_built_in_one(file: Path) -> None:
    row = make_row([TokenizedDocument([1, 2, 3, 4, 5], [IGNORE, IGNORE, 3, 4, 5])]).padded(8, 0)
    own, built_in = made(file, "dft", stage="sft"), TokenStage("dft")
    results = []
    for stage in (own, built_in):
        logps = (-torch.rand(len(row), generator=torch.Generator().manual_seed(1))).requires_grad_()
        loss, _ = stage.loss_sum(logps, row)
        results.append((loss, *torch.autograd.grad(loss, logps)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert made(file, "sure", stage="pt").needs == {"entropy"}
    with pytest.raises(
        UserError, match=r"losses\.py:sure loss needs entropy from the output layer"
    ):
        made(file, "sure", stage="sft").loss_sum(torch.zeros(8), row)


def on_ranks(file: Path, size: int) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradient of the file's functions, then of the built-in losses."""
    import torch.distributed as dist

    ctx = sp.SequenceParallel.create(size)
    model = tiny_model(dtype=torch.float32, seed=1)
    hf.prepare(model, ctx)
    head = TokenLogprobs(model, chunk=5)
    row = pair_row([0, 1, 2, 3], True).padded(sp.alignment(ctx), 0)
    plan = sp.plan(len(row), row.segments, ctx)
    reference = -torch.rand(len(row), generator=torch.Generator().manual_seed(2))
    results = []
    for stage in (made(file, "dpo", pref_beta=0.3), PreferenceStage(options=LossOptions(0.3))):
        with head.labels(row.labels[plan.index]):
            out = model(
                **hf.inputs({"input_ids": row.input_ids, "position_ids": row.position_ids}, plan)
            )
            logps = sp.gather(head.outputs(out.logits).logps, plan)
        loss, _ = stage.loss_sum(TokenOutputs(logps, reference=reference), row)
        gradients = list(torch.autograd.grad(loss, list(model.parameters())))
        for gradient in gradients if size > 1 else ():
            dist.all_reduce(gradient)
        results.append((loss.detach(), gradients))
    return results


@pytest.mark.processes
def test_it_is_the_built_in_one_under_sequence_parallelism(file: Path) -> None:
    for rank in run_ranks(2, on_ranks, file, 2):
        (a, ga), (b, gb) = rank
        assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(ga, gb, strict=True))
        assert max(float(x.abs().max()) for x in ga) > 0
    alone = on_ranks_alone(file)
    torch.testing.assert_close(alone, a, rtol=1e-5, atol=1e-5)


def on_ranks_alone(file: Path) -> Tensor:
    return on_ranks(file, 1)[0][0]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_is_the_run_of_the_built_in_loss(home: Path, file: Path, size: int) -> None:
    """The log of a whole run, to the last bit."""
    pairs = [{"prompt": text(9 + i), "chosen": text(20), "rejected": text(15)} for i in range(8)]
    (home / "pairs.json").write_text(json.dumps(pairs))
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "pairs.json", "ranking": True, "columns": columns}
    talks = {"file_name": "talks.json"}
    (home / "dataset_info.json").write_text(json.dumps({"talks": talks, "pairs": entry}))
    dpo = {**LORA, "stage": "dpo", "dataset": "pairs", "packing": None}
    for keys, own, built_in in (
        (dpo, {"loss_path": f"{file}:dpo"}, {}),
        ({}, {"loss_path": f"{file}:dft"}, {"use_dft_loss": True}),
    ):
        # Folders of their own: an adapter is not written beside a full model.
        place = f"{keys.get('stage', 'sft')}-{size}"
        a, b = (
            [{k: h[k] for k in ("loss", "grad_norm")} for h in steps(train(home, n, size, **k))]
            for n, k in ((f"own-{place}", keys | own), (f"built_in-{place}", keys | built_in))
        )
        assert a == b and len(a) == STEPS and a[0] != a[-1]


def test_verify_computes_it_too(file: Path) -> None:
    def scores(seed: int) -> Any:
        logps = -torch.rand(5, generator=torch.Generator().manual_seed(seed))
        return SimpleNamespace(logps=logps, reference=-1.0, length=5)

    pairs = [(scores(1), scores(2)), (scores(3), scores(4))]
    own, built_in = (
        _preference(method, pairs, [], torch.Tensor.detach)
        for method in (arguments(file, "dpo"), FinetuningArguments(stage="dpo"))
    )
    torch.testing.assert_close(own, built_in, rtol=1e-12, atol=1e-12)


def test_verify_refuses_a_loss_of_tokens(file: Path) -> None:
    cfg = from_mapping({**BASE, "loss_path": f"{file}:dft"})
    with pytest.raises(UserError, match="Verify the run without loss_path"):
        verify(cfg)


@pytest.mark.parametrize(
    ("function", "keys", "message"),
    [
        ("margin", {}, r"has no function margin. It has dpo, simpo, dft"),
        ("F", {}, "has no function F"),
        ("two", {}, r"found two\(pairs, options\) in .*, expected two\(pairs, options, data_par"),
        ("dpo", {"stage": "sft"}, r"expected dpo\(outputs, row\)"),
        ("misspelt", {}, "misspelt.refrence has no meaning. A function can have reference, per_"),
        ("text", {}, "text.reference is 'no', expected a bool like True"),
        ("divergence", {"stage": "sft"}, "needs reference_kl, which the output layer does not"),
        ("simpo", {"ref_model": "r"}, "ref_model was given, and loss_path: .* has no reference"),
        ("simpo", {"pref_bco_weight": 0.1}, "compares with a reference, and loss_path: .* has no"),
    ],
)
def test_what_cannot_be_the_loss_is_refused(
    file: Path, function: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises((UserError, ConfigError), match=message):
        made(file, function, **keys)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "mean",
            r"returned a tensor \[\] torch.float64; expected \[3\] torch.float64, a number for",
        ),
        ("number", "returned float; expected"),
        ("narrow", r"returned a tensor \[3\] torch.float32; expected"),
        ("constant", "without gradient"),
    ],
)
def test_what_it_returns_is_checked(file: Path, function: str, message: str) -> None:
    row = pair_row([0, 1, 2], shared=False)
    x = torch.zeros(len(row), requires_grad=True)
    with pytest.raises(UserError, match=message):
        made(file, function).loss_sum(TokenOutputs(x, reference=x.detach()), row)


def test_a_file_that_cannot_run_is_refused(tmp_path: Path) -> None:
    for code, message in (("def f(:", "SyntaxError"), ("1 / 0", "ZeroDivisionError: division")):
        (tmp_path / "broken.py").write_text(code)
        with pytest.raises(UserError, match=f"running .*broken.py failed: {message}"):
            made(tmp_path / "broken.py", "f")


def test_the_log_says_that_a_file_is_run(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text(FILE + "\n# another file\n")
    with caplog.at_level(logging.INFO, "longfactory"):
        made(file, "dpo")
        made(file, "simpo")  # the file is run once
    said = [r.getMessage() for r in caplog.records if "running the code of" in r.getMessage()]
    assert len(said) == 1 and str(file) in said[0] and "sha256" in said[0]
    assert [p.name for p in file.parent.iterdir()] == [file.name], "something was written beside it"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": "dpo", "loss_path": "losses.py"}, "got 'losses.py', expected file.py:function"),
        ({"stage": "dpo", "loss_path": "losses:f"}, "expected file.py:function"),
        ({"stage": "dpo", "loss_path": "there/is/none.py:f"}, "there is no file"),
        ({"stage": "kto"}, "loss_path is for the stages pt, sft, dpo; this run's is kto"),
        ({"stage": "rm"}, "this run's is rm"),
        ({"stage": "dpo", "pref_loss": "ipo"}, "loss_path and pref_loss: ipo were given"),
        ({"use_dft_loss": True}, "use_dft_loss and loss_path were given. A run has one loss"),
    ],
)
def test_keys_are_checked_before_torch_is_imported(
    file: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping({**BASE, "loss_path": f"{file}:dpo", **keys})


def test_keys_that_a_user_loss_may_read_have_no_note(file: Path) -> None:
    keys = {"stage": "dpo", "simpo_gamma": 1.0, "dpo_label_smoothing": 0.1, "ref_model": "r"}
    cfg = from_mapping({**BASE, **keys, "loss_path": f"{file}:dpo"})
    assert cfg.notes == () and cfg.learns_from_equal_pairs


def files_of_ranks(folder: Path) -> list[str]:
    """What a rank is told of equal, then of different files at the same path of two machines."""
    import os

    import torch.distributed as dist

    from longfactory.train.run import same_loss_on_every_rank

    sp.SequenceParallel.create(1)
    mine = folder / str(dist.get_rank())
    mine.mkdir()
    os.chdir(mine)
    told = []
    for more in ("", f"# {dist.get_rank()}"):
        Path("losses.py").write_text(FILE + more)
        try:
            same_loss_on_every_rank("losses.py:dpo")
            told.append("")
        except UserError as error:
            told.append(str(error))
    return told


@pytest.mark.processes
def test_machines_with_different_files_are_refused(tmp_path: Path) -> None:
    for equal, different in run_ranks(2, files_of_ranks, tmp_path):
        assert equal == "" and "the machines have different files losses.py" in different


def test_a_dry_run_looks_at_the_function(file: Path) -> None:
    found = Found()
    cfg = from_mapping({**BASE, "stage": "dpo", "loss_path": f"{file}:none", "dry_run": True})
    _loss(cfg, found)
    assert len(found.problems) == 1 and "has no function none" in found.problems[0]
