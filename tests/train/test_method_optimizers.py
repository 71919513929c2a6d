"""Muon, BAdam, GaLore, APOLLO and Adam-mini: sharded runs change the weights as one process does,
and a resumed run goes on as if nothing had happened.

A package that is not installed is skipped: the optional extra `optimizers` has them all.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpu_sharding import on_ranks_of_their_own
from longfactory.config import ConfigError
from longfactory.config.optimizer_facts import METHOD_OPTIMIZERS
from longfactory.errors import UserError
from longfactory.train import package_optimizers
from longfactory.train.block_adamw import BlockAdamW, block_of
from longfactory.train.muon import MuonAdamW, muon_groups
from longfactory.train.ratio_adamw import RatioAdamW, parts_of
from longfactory_dev.tiny_models import tiny_config
from optimizer_worker import model, nudge, on_a_rank, run_config, train, with_types

RUNS: dict[str, dict[str, Any]] = {
    "muon": {"use_muon": True},
    "badam": {"use_badam": True, "badam_switch_interval": 2, "badam_switch_mode": "random"},
    "badam_ratio": {
        "use_badam": True,
        "badam_mode": "ratio",
        "badam_update_ratio": 0.3,
        "badam_switch_interval": 2,
    },
    "galore": {"use_galore": True, "galore_rank": 4, "galore_update_interval": 2},
    "galore_adafactor": {"use_galore": True, "galore_rank": 4, "optim": "adafactor"},
    "apollo": {"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 2},
    "apollo_svd": {"use_apollo": True, "apollo_rank": 4, "apollo_proj": "svd"},
    "adam_mini": {"use_adam_mini": True},
}
# On two ranks GaLore projects once. At a later projection it takes the moments of the one before as
# they are, so the sign of a singular vector, which a rounding turns, changes the run by 3e-2.
ON_TWO_RANKS = {**RUNS, "galore": {**RUNS["galore"], "galore_update_interval": 200}}
LAYERWISE = {
    "galore": {**RUNS["galore"], "galore_layerwise": True},
    "apollo": {**RUNS["apollo"], "apollo_layerwise": True},
}


def facts_of(name: str) -> Any:
    for ending in ("_adafactor", "_svd", "_ratio"):
        name = name.removesuffix(ending)
    return METHOD_OPTIMIZERS[f"use_{name}"]


def needs_package(name: str) -> None:
    module = facts_of(name).module
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"{facts_of(name).package} is not installed")


def moved(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(after[n] - before[n]).flatten().double() for n in before])


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """One process, by run: the specification. Computed when asked for."""

    class Lazy(dict):
        def __missing__(self, name: str) -> dict[str, torch.Tensor]:
            self[name] = train(ON_TWO_RANKS[name], 1, "none")
            return self[name]

    return Lazy()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("sharding", "names"),
    [
        ("ddp", ["muon", "badam", "badam_ratio"]),
        ("fsdp2", ["muon", "badam"]),
        pytest.param("ddp", list(RUNS)[3:], marks=pytest.mark.slow),
    ],
)
def test_two_ranks_change_the_weights_as_one_process(
    alone: dict[str, dict[str, torch.Tensor]], sharding: str, names: list[str]
) -> None:
    for name in names:
        needs_package(name)
    runs = [{"keys": ON_TWO_RANKS[name]} for name in names]
    shared = on_ranks_of_their_own(2, 250, on_a_rank, sharding, runs)[0]
    before = model().state_dict()
    for name, after in zip(names, shared, strict=True):
        change = moved(alone[name], before)
        far = float((moved(after, before) - change).norm() / change.norm())
        nudged = moved(train(ON_TWO_RANKS[name], 1, "none", watch=nudge), before)
        response = float((nudged - change).norm() / change.norm())
        print(f"{sharding} {name}: {far:.1e}; a nudge of 1e-7: {response:.1e}")
        assert float(change.abs().max()) > 1e-2, "the weights hardly moved"
        assert far <= max(1e-4, 2 * response), name


@pytest.mark.processes
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("muon", "badam", "badam_ratio") else pytest.param(n, marks=pytest.mark.slow)
        for n in RUNS
    ],
)
def test_a_resumed_run_is_the_same(name: str, tmp_path: Path) -> None:
    needs_package(name)
    whole = train(RUNS[name], 1, "none", folder=str(tmp_path))
    again = train(RUNS[name], 1, "none", folder=str(tmp_path), resume=True)
    assert all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYERWISE))
def test_updates_in_the_backward_pass_are_those_without_clipping(name: str, tmp_path: Path) -> None:
    """What is updated in the backward pass is not clipped: with gradients below the limit both are
    the same. A checkpoint holds their states.
    """
    needs_package(name)
    at_once = train(LAYERWISE[name], 1, "none", folder=str(tmp_path))
    again = train(LAYERWISE[name], 1, "none", folder=str(tmp_path), resume=True)
    assert all(torch.equal(at_once[n], again[n]) for n in at_once)


@pytest.mark.processes
@pytest.mark.slow
def test_zero3_in_pure_bf16_has_no_float32() -> None:
    """Weights and the optimizer's states are bf16, and change as those of one process do but for
    the rounding: bf16's sums in another order, as copies (DDP) have it too.
    """
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    keys: dict[str, Any] = {"pure_bf16": True}
    shared, types = on_ranks_of_their_own(2, 250, with_types, "zero3", keys)[0]
    assert types == {"torch.bfloat16"}
    before = model().to(torch.bfloat16).state_dict()
    alone = train(keys, 1, "none", dtype=torch.bfloat16)
    change = moved(alone, before)
    copies, _ = on_ranks_of_their_own(2, 250, with_types, "ddp", keys)[0]
    far, of_copies = (
        float((moved(found, before) - change).norm() / change.norm()) for found in (shared, copies)
    )
    print(f"pure bf16, zero3: {far:.1e}; ddp: {of_copies:.1e}")
    assert float(change.abs().max()) > 1e-2 and far <= 2 * of_copies < 0.4
    _, types = on_ranks_of_their_own(2, 250, with_types, "zero3", {})[0]
    assert types == {"torch.float32"}  # masters and states, where a run does not ask for it


def test_muon_is_torchs_muon_and_torchs_adamw() -> None:
    """Three updates beside the two optimizers of torch, with weight decay."""
    ours, theirs = model(), model()
    decay = {n for n, p in ours.named_parameters() if p.ndim > 1}
    optimizer = MuonAdamW(muon_groups(ours, decay, 0.1), lr=0.02)
    inside = {n for n, p in theirs.named_parameters() if p.ndim == 2 and "layers" in n}
    named = dict(theirs.named_parameters())
    others = [
        torch.optim.Muon(
            [named[n] for n in inside], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": [named[n] for n in named if n in decay - inside], "weight_decay": 0.1},
                {"params": [named[n] for n in named if n not in decay], "weight_decay": 0.0},
            ],
            lr=0.02,
        ),
    ]
    g = torch.Generator().manual_seed(3)
    for _ in range(3):
        for n, p in ours.named_parameters():
            p.grad = torch.randn(p.shape, generator=g)
            named[n].grad = p.grad.clone()
        for o in (optimizer, *others):
            o.step()
    assert len(inside) == 21
    for n, p in ours.named_parameters():
        torch.testing.assert_close(p, named[n], rtol=1e-6, atol=1e-7, msg=n)


def test_badam_trains_one_layer_at_a_time_with_torchs_adamw() -> None:
    """Blocks take turns, and begin each turn with new states."""
    torch.manual_seed(1)
    blocks = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    others = [p.detach().clone().requires_grad_() for p in blocks]
    groups = [
        {"params": [p], "block": i, "weight_decay": 0.1 * (i > 0)} for i, p in enumerate(blocks)
    ]
    optimizer = BlockAdamW(groups, lr=0.1, interval=2, order="descending")
    for turn in range(4):
        which = 2 - turn % 3
        theirs = torch.optim.AdamW([others[which]], lr=0.1, weight_decay=0.1 * (which > 0))
        for _ in range(2):
            assert optimizer.active == which
            for p, q in zip(blocks, others, strict=True):
                p.grad = torch.randn(p.shape)
                q.grad = p.grad.clone()
            optimizer.drop_inactive()
            assert [p.grad is not None for p in blocks] == [i == which for i in range(3)]
            optimizer.step()
            theirs.step()
        assert set(optimizer.state) == {blocks[which]}
    for p, q in zip(blocks, others, strict=True):
        torch.testing.assert_close(p, q)


def test_badam_keeps_half_precision_apart_from_its_states() -> None:
    """Updates of a hundredth of a rounding add up, also through a checkpoint."""
    p = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = BlockAdamW(
        [{"params": [p], "block": 0, "weight_decay": 0.0}], lr=5e-5, order="fixed", start=0
    )
    for step in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
        if step == 50:
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
            assert optimizer.state[p]["master"].dtype == torch.float32
    assert float(p[0]) == pytest.approx(1 - 100 * 5e-5, abs=2**-9)
    assert float(optimizer.state[p]["master"][0]) == pytest.approx(1 - 100 * 5e-5, abs=1e-6)


def test_badam_by_shares_trains_some_entries_with_torchs_adamw() -> None:
    """Two turns of two updates, over the end of a matrix; a bias is small and trained whole."""
    torch.manual_seed(0)
    weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((20, 15), (7,)))
    optimizer = RatioAdamW(
        [{"params": [weight, bias], "weight_decay": 0.1}], lr=0.1, share=0.6, interval=2
    )
    plain = [weight.detach().clone().view(-1), bias.detach().clone()]
    turns = [[slice(0, 180)], [slice(0, 60), slice(180, 300)]]
    assert [parts_of(300, turn, 0.6) for turn in (0, 1)] == turns
    assert parts_of(7, 3, 0.6) == [slice(0, 7)]
    for parts in turns:
        chosen = torch.cat([plain[0][part] for part in parts]).requires_grad_()
        other = plain[1].clone().requires_grad_()
        adamw = torch.optim.AdamW([chosen, other], lr=0.1, weight_decay=0.1)
        for _ in range(2):
            weight.grad, bias.grad = torch.randn(20, 15), torch.randn(7)
            optimizer.drop_inactive()
            flat = weight.grad.view(-1)
            chosen.grad = torch.cat([flat[part] for part in parts]).clone()
            other.grad = bias.grad.clone()
            assert int((flat == 0).sum()) == 300 - len(chosen)
            optimizer.step()
            adamw.step()
        start = 0
        for part in parts:
            length = part.stop - part.start
            plain[0][part] = chosen.detach()[start : start + length]
            start += length
        plain[1] = other.detach()
        torch.testing.assert_close(weight.detach().view(-1), plain[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(bias.detach(), plain[1], rtol=1e-6, atol=1e-7)


def test_orders_of_layers() -> None:
    assert [block_of(t, 3, "ascending", 1) for t in range(4)] == [1, 2, 0, 1]
    assert [block_of(t, 3, "descending") for t in range(4)] == [2, 1, 0, 2]
    assert [block_of(t, 3, "fixed", 1) for t in range(3)] == [1, 1, 1]
    order = [block_of(t, 5, "random", seed=3) for t in range(10)]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)) and order[:5] != order[5:]


def test_contradictions_are_sentences() -> None:
    cases = {
        "A run has one optimizer": {"use_muon": True, "use_badam": True},
        "use_galore saves memory where whole matrices are trained": {
            "use_galore": True,
            "finetuning_type": "lora",
        },
        "use_muon and optim: sgd": {"use_muon": True, "optim": "sgd"},
        "GaLore decomposes whole gradient matrices": {"use_galore": True, "sharding": "fsdp2"},
        "gradients cannot be accumulated": {
            "use_apollo": True,
            "apollo_layerwise": True,
            "gradient_accumulation_steps": 2,
        },
        "before its gradient is reduced over devices": {
            "use_galore": True,
            "galore_layerwise": True,
            "sequence_parallel_size": 2,
        },
        "updates weights before the whole gradient is known": {
            "use_galore": True,
            "galore_layerwise": True,
            "on_nan": "skip",
        },
        "counts the entries of whole matrices": {
            "use_badam": True,
            "badam_mode": "ratio",
            "sharding": "fsdp2",
        },
        "badam_start_block is for badam_mode: layer": {
            "use_badam": True,
            "badam_mode": "ratio",
            "badam_start_block": 1,
        },
        "four times the states' own memory": {"use_badam": True, "badam_mask_mode": "scatter"},
        "Give badam_start_block": {"use_badam": True, "badam_switch_mode": "fixed"},
        "DeepSpeed flattens parameters": {
            "use_muon": True,
            "deepspeed": str(Path(__file__).parents[2] / "examples/deepspeed/ds_z2_config.json"),
        },
        "use_muon cannot keep its states on the host": {
            "use_muon": True,
            "optimizer_placement": "host",
        },
    }
    for sentence, keys in cases.items():
        with pytest.raises(ConfigError, match=sentence):
            run_config(keys)


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = {f.module for f in METHOD_OPTIMIZERS.values()}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda m, *a: None if m in hidden else find(m, *a)
    )
    for name in ("galore", "apollo", "adam_mini"):
        package = facts_of(name).package
        with pytest.raises(ConfigError, match=f"needs {package}, which is not installed. Run: pip"):
            run_config({**RUNS[name], "dry_run": False})


def test_adam_mini_refuses_layers_whose_heads_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "adam_mini", SimpleNamespace(Adam_mini=None))
    gemma = SimpleNamespace(config=tiny_config("gemma4_text"))
    with pytest.raises(UserError, match=r"differ in their heads .*\(4, 2, 16\), \(4, 2, 512\)"):
        package_optimizers.adam_mini(gemma, None)


def test_the_plan_counts_the_states() -> None:
    """Bytes a parameter of what the optimizers really hold after a step, by the plan's count."""
    from longfactory.train.memory_plan import states_of_method

    for name in RUNS:
        if importlib.util.find_spec(facts_of(name).module or "torch") is None or "_" in name[4:]:
            continue
        trained = model()
        count = sum(p.numel() for p in trained.parameters())
        kept: list[int] = []

        def look(optimizer: torch.optim.Optimizer, kept: list[int] = kept) -> None:
            tensors = [
                value
                for state in optimizer.state.values()
                for entry in state.values()
                for value in (entry, getattr(entry, "ortho_matrix", None))
                if isinstance(value, torch.Tensor)
            ]
            kept.append(sum(t.numel() * t.element_size() for t in tensors))

        train(RUNS[name], 1, "none", watch=look)
        counted = states_of_method(run_config(RUNS[name]), trained, count)
        assert counted is not None
        assert kept[-1] / count == pytest.approx(counted, rel=0.05), name
