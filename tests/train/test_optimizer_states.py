"""Runs with AdamW on the host or beside split weights resume bit for bit; what cannot be resumed is
refused with a sentence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from longfactory.errors import UserError
from longfactory.memory.optimizer import SplitAdamW
from longfactory.memory.split_masters import join
from longfactory.shard import optimizer_states
from longfactory.shard.optimizer_states import (
    INDEX,
    chunk,
    load_states,
    save_states,
    states_file,
    write_safetensors,
)
from longfactory.testing import process_context, run_ranks
from manual_runs import manual_run


def train(
    keys: dict[str, Any], sharding: str = "none", scaled: bool = False
) -> tuple[list[dict[str, float]], list[str]]:
    """Body of a rank: one run. The trainer's log; names of its optimizer, its sharding, and the
    types of its trained weights.

    Args:
        scaled: the loss is scaled as in fp16, which accelerate has on GPUs alone.
    """
    import os

    import cpu_sharding
    from longfactory.config import from_mapping
    from longfactory.train import prepare
    from longfactory.train import run as module

    # FSDP is asked for through the environment, and this process serves other tests
    before = dict(os.environ)
    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    if sharding == "fsdp2":
        cpu_sharding.install_fsdp()
    cpu_sharding.reset()
    torch.manual_seed(0)
    seen: list[Any] = []
    left: set[str] = set()
    make, choose = module.make_trainer, prepare.choose_sharding
    leave = SplitAdamW._leave

    def watched(self: SplitAdamW, p: Any, group: Any, last: bool) -> None:
        leave(self, p, group, last)
        if p in self._away:
            left.add("kept during backward")
        else:
            left.add("updated during backward" if last else "summed during backward")

    SplitAdamW._leave = watched  # type: ignore[method-assign]

    def made(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        if scaled:
            trainer.accelerator.native_amp = True
            trainer.accelerator.state._mixed_precision = "fp16"
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
        seen.append(trainer)
        return trainer

    module.make_trainer = made
    prepare.choose_sharding = lambda *a, **k: sharding
    try:
        module.run(from_mapping({k: v for k, v in keys.items() if k != "cache"}))
    finally:
        module.make_trainer, prepare.choose_sharding = make, choose
        SplitAdamW._leave = leave  # type: ignore[method-assign]
        os.environ.clear()
        os.environ.update(before)
    trainer = seen[0]
    kinds = {
        type(trainer.optimizer.optimizer).__name__,
        str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1],
    }
    kinds |= left
    kinds |= {
        str(p.dtype).rsplit(".", 1)[-1] for p in trainer.model.parameters() if p.requires_grad
    }
    return trainer.state.log_history, sorted(kinds)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("states")
    return manual_run(
        folder,
        dataset="manual_sft",
        stage="sft",
        max_samples=24,
        per_device_train_batch_size=1,
        bf16=True,
        optimizer_placement="host",
        learning_rate=1e-3,
        warmup_steps=2,
        weight_decay=0.1,
        max_steps=6,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        overwrite_output_dir=True,
        sequence_parallel_size=1,
    )


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., Any]]:
    """`train` in a process without a process group."""
    with ProcessPoolExecutor(1, mp_context=process_context()) as pool:
        yield lambda *given: pool.submit(train, *given).result(timeout=300)


@pytest.fixture(scope="module")
def shared_rows(
    base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, float]], list[str]]:
    """A run whose two ranks share each row, from its first step to its last: its keys, its log and
    its kinds. Several tests go on from its checkpoints.
    """
    sharding, world, changes = CASES[SHARED_ROWS]
    keys = {**base, **changes, "output_dir": str(tmp_path_factory.mktemp("shared") / "a")}
    return (keys, *run_ranks(world, train, keys, sharding, timeout=300)[0])


def losses(log: list[dict[str, float]]) -> list[float]:
    return [h["loss"] for h in log if "loss" in h]


def whole_states(folder: Path) -> dict[str, Tensor]:
    """Every state of a checkpoint, put together from the ranks' files."""
    index = json.loads((folder / INDEX).read_text())
    files = [load_file(folder / states_file(r, index["ranks"])) for r in range(index["ranks"])]
    out = {}
    for name, entry in index["parameters"].items():
        for key in entry["states"]:
            parts = [f[f"{name}/{key}"] for f in files if f"{name}/{key}" in f]
            out[f"{name}/{key}"] = torch.cat(parts)
            assert list(out[f"{name}/{key}"].shape) == entry["shape"]
    return out


def same_files(a: Path, b: Path) -> None:
    """The weights and the whole optimizer of two checkpoints agree in every bit."""
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert all(torch.equal(one[n], two[n]) for n in one) and one.keys() == two.keys()
    one, two = whole_states(a), whole_states(b)
    assert all(torch.equal(one[n], two[n]) for n in one) and one.keys() == two.keys()
    assert (
        json.loads((a / INDEX).read_text())["parameters"]
        == json.loads((b / INDEX).read_text())["parameters"]
    )


def nearly_same_moments(a: Path, b: Path) -> None:
    """Three steps after the checkpoint three quarters of the first moments are still the
    checkpoint's.
    """
    one, two = whole_states(a), whole_states(b)
    for name in one:
        if name.endswith("exp_avg"):
            assert float((one[name] - two[name]).norm()) < 0.05 * float(one[name].norm()), name


SHARED_ROWS = "split, fsdp2, two ranks a row, accumulated"
CASES = {
    "split, fsdp2": ("fsdp2", 2, {}),
    SHARED_ROWS: (
        "fsdp2",
        2,
        {"sequence_parallel_size": 2, "gradient_accumulation_steps": 2},
    ),
    "fp32, fsdp2": ("fsdp2", 2, {"bf16": False}),
    "lora, fsdp2": ("fsdp2", 2, {"finetuning_type": "lora", "loraplus_lr_ratio": 4.0}),
    "fp32, ddp": ("ddp", 2, {"bf16": False}),
    "split, one process": ("none", 1, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c == "split, fsdp2")) for c in CASES],
)
def test_a_resumed_run_is_the_uninterrupted_one_in_every_bit(
    case: str, base: dict[str, Any], shared_rows: Any, tmp_path: Path, alone: Any
) -> None:
    sharding, world, changes = CASES[case]

    def started(keys: dict[str, Any]) -> Any:
        return (
            alone(keys) if world == 1 else run_ranks(world, train, keys, sharding, timeout=300)[0]
        )

    if case == SHARED_ROWS:
        keys, log, kinds = shared_rows
    else:
        keys = {**base, **changes, "output_dir": str(tmp_path / "a")}
        log, kinds = started(keys)
    whole = Path(keys["output_dir"])
    assert (
        "SplitAdamW" in kinds
        and {"fsdp2": "FSDP", "ddp": "MULTI_CPU", "none": "NO"}[sharding] in kinds
    )
    assert ("bfloat16" in kinds) == case.startswith("split")
    shutil.copytree(whole / "checkpoint-3", tmp_path / "b" / "checkpoint-3")
    resumed = {
        **keys,
        "output_dir": str(tmp_path / "b"),
        "resume_from_checkpoint": str(tmp_path / "b" / "checkpoint-3"),
    }
    again, _ = started(resumed)
    assert losses(again) == losses(log) and len(losses(log)) == 6
    if case.startswith("lora"):
        one, two = (
            load_file(folder / "checkpoint-6" / "adapter_model.safetensors")
            for folder in (whole, tmp_path / "b")
        )
        assert all(torch.equal(one[n], two[n]) for n in one)
    else:
        same_files(whole / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    names = {p.name for p in (tmp_path / "b" / "checkpoint-6").iterdir()}
    writers = world if sharding == "fsdp2" else 1
    assert {INDEX, "scheduler.pt", *(states_file(r, writers) for r in range(writers))} <= names
    assert not any("optimizer.pt" in n or n == "optimizer_0" or n.endswith(".part") for n in names)


@pytest.mark.processes
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [
        SHARED_ROWS,
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("lora, fsdp2", "split, one process")),
    ],
)
def test_gradients_that_leave_during_backward_change_no_bit(
    case: str, base: dict[str, Any], tmp_path: Path, alone: Any
) -> None:
    """They stay, they wait on the host, or they update at once. Clipped to a norm that no gradient
    has, or not, as updates at once need it. Saved and resumed in between."""
    sharding, world, changes = CASES[case]
    logs, expected = [], {"a": [], "b": ["updated during backward"], "c": ["kept during backward"]}
    for name, how in (
        ("a", {"offload_gradients": False}),
        ("b", {"optimizer_overlap": True}),
        ("c", {"offload_gradients": True}),
    ):
        keys = {
            **base,
            **changes,
            **how,
            "max_grad_norm": 0 if name == "b" else 1e9,
            "output_dir": str(tmp_path / name),
        }
        for steps in (3, 6):
            keys |= {
                "max_steps": steps,
                "lr_scheduler_type": "constant_with_warmup",
                "overwrite_output_dir": False,
            }
            log, kinds = (
                alone(keys)
                if world == 1
                else run_ranks(world, train, keys, sharding, timeout=300)[0]
            )
            assert [
                k for k in ("updated during backward", "kept during backward") if k in kinds
            ] == expected[name]
        logs.append(log)
    stays, *others = (
        [(h["loss"], h["grad_norm"]) for h in log if "grad_norm" in h] for log in logs
    )
    for name, leaves in zip("bc", others, strict=True):
        assert [x for x, _ in stays] == [x for x, _ in leaves] and len(stays) == 6
        assert [x for _, x in stays] == pytest.approx([x for _, x in leaves], rel=1e-6)
        if case.startswith("lora"):
            one, two = (
                load_file(tmp_path / x / "checkpoint-6" / "adapter_model.safetensors")
                for x in ("a", name)
            )
            assert all(torch.equal(one[n], two[n]) for n in one)
        else:
            same_files(tmp_path / "a" / "checkpoint-6", tmp_path / name / "checkpoint-6")


@pytest.mark.processes
@pytest.mark.parametrize("clip", [0.5, 0.0])
@pytest.mark.parametrize("case", ["fp32, fsdp2", "fp32, ddp", "one process"])
def test_scaled_gradients_are_clipped_and_logged_as_those_without_a_scale(
    case: str, clip: float, base: dict[str, Any], tmp_path: Path, alone: Any
) -> None:
    """The scale is 65,536 and doubles after two steps. Epsilon shows a gradient that is clipped to
    a share of it.
    """
    sharding, world, changes = CASES.get(case, ("none", 1, {"bf16": False}))
    keys = {**base, **changes, "max_grad_norm": clip, "adam_epsilon": 1e-5, "max_steps": 4}
    keys |= {"save_strategy": "no", "output_dir": str(tmp_path / "out")}
    plain, scaled = (
        alone(keys, "none", scales)
        if world == 1
        else run_ranks(world, train, keys, sharding, scales, timeout=300)[0]
        for scales in (False, True)
    )
    rows = [[(h["loss"], h["grad_norm"]) for h in log if "loss" in h] for log, _ in (plain, scaled)]
    assert len(rows[0]) == 4 and "SplitAdamW" in scaled[1]
    torch.testing.assert_close(*map(torch.tensor, rows), rtol=1e-3, atol=0.0)


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_another_sequence_parallel_size_resumes_the_same_states(
    shared_rows: Any, tmp_path: Path
) -> None:
    """Two ranks a row, then one: the same samples a step, the same shards; sums come in another
    order, which bf16 weights show.
    """
    keys, log, _ = shared_rows
    whole = Path(keys["output_dir"])
    keys = {
        **keys,
        "sequence_parallel_size": 1,
        "gradient_accumulation_steps": 1,
        "output_dir": str(tmp_path / "b"),
    }
    keys |= {"resume_from_checkpoint": str(whole / "checkpoint-3")}
    again, _ = run_ranks(2, train, keys, "fsdp2", timeout=300)[0]
    assert losses(again)[:3] == losses(log)[:3]
    assert losses(again) == pytest.approx(losses(log), rel=3e-3)
    nearly_same_moments(whole / "checkpoint-6", tmp_path / "b" / "checkpoint-6")


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_twice_as_many_ranks_go_on(shared_rows: Any, tmp_path: Path) -> None:
    """Two ranks, then four, that share rows in pairs: the same samples a step, every parameter cut
    anew.
    """
    keys, log, _ = shared_rows
    whole = Path(keys["output_dir"])
    keys = {**keys, "gradient_accumulation_steps": 1, "output_dir": str(tmp_path / "b")}
    keys |= {"resume_from_checkpoint": str(whole / "checkpoint-3")}
    again, _ = run_ranks(4, train, keys, "fsdp2", timeout=300)[0]
    assert losses(again)[:3] == losses(log)[:3]
    assert losses(again) == pytest.approx(losses(log), rel=3e-3)
    assert (tmp_path / "b" / "checkpoint-6" / states_file(3, 4)).is_file()
    nearly_same_moments(whole / "checkpoint-6", tmp_path / "b" / "checkpoint-6")


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_the_best_model_is_loaded_and_old_checkpoints_go(
    base: dict[str, Any], tmp_path: Path
) -> None:
    keys = {
        **base,
        "eval_dataset": "manual_sft_eval",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 4,
    }
    # Growing steps make the model worse after the first.
    keys |= {
        "learning_rate": 0.3,
        "load_best_model_at_end": True,
        "save_total_limit": 2,
        "output_dir": str(tmp_path / "a"),
    }
    log, kinds = run_ranks(2, train, keys, "fsdp2", timeout=300)[0]
    assert "SplitAdamW" in kinds and "bfloat16" in kinds
    values = [h["eval_loss"] for h in log if "eval_loss" in h]
    best = 1 + min(range(4), key=values.__getitem__)
    assert values[4:] == [min(values)]  # the evaluation after training is of the best model
    assert best < 4, "the test needs a best model that is not the last"
    left = sorted(p.name for p in (tmp_path / "a").glob("checkpoint-*"))
    assert left == [f"checkpoint-{best}", "checkpoint-4"]
    final, kept = (
        load_file(x / "model.safetensors")
        for x in (tmp_path / "a", tmp_path / "a" / f"checkpoint-{best}")
    )
    assert all(torch.equal(final[n], kept[n]) for n in kept)
    # And the best checkpoint can be gone on from.
    keys |= {
        "resume_from_checkpoint": str(tmp_path / "a" / f"checkpoint-{best}"),
        "output_dir": str(tmp_path / "b"),
    }
    keys |= {"load_best_model_at_end": False}
    again, _ = run_ranks(2, train, keys, "fsdp2", timeout=300)[0]
    assert [h["eval_loss"] for h in again if "eval_loss" in h][:4] == values[:4]


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        ({}, {"optimizer_placement": "gpu"}, "Set optimizer_placement: host"),
        ({"optimizer_placement": "gpu"}, {}, f"holds no {INDEX}"),
        ({"save_only_model": True}, {}, "holds only weights"),
        ({}, {"bf16": False}, "the other fp32 weights"),
        (
            {},
            {"finetuning_type": "freeze"},
            "trained something different from this run: finetuning_type",
        ),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    saved: dict[str, Any],
    resumed: dict[str, Any],
    message: str,
    base: dict[str, Any],
    tmp_path: Path,
    alone: Any,
) -> None:
    keys = {**base, "max_steps": 2, "save_steps": 1}
    alone({**keys, **saved, "output_dir": str(tmp_path / "a")})
    keys |= {
        "resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-1"),
        "output_dir": str(tmp_path / "b"),
        **resumed,
    }
    with pytest.raises(UserError, match=message):
        alone(keys)


# ---- the files themselves ------------------------------------------------------------------------


def stepped(sharded: bool, steps: int = 3) -> tuple[nn.Module, SplitAdamW]:
    """A small bf16 model after some steps whose gradients are the same on every rank, and the same
    for whole and sharded parameters.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 11, dtype=torch.bfloat16), nn.Linear(11, 1, dtype=torch.bfloat16)
    )
    for name, p in model.named_parameters():
        p.requires_grad_(name != "1.bias")
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = [p for n, p in model.named_parameters() if n != "1.bias"]
    optimizer = SplitAdamW(
        [{"params": weights[:1], "lr": 0.3}, {"params": weights[1:], "weight_decay": 0.0}], lr=0.1
    )
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in weights:
            grad = torch.randn(p.shape, generator=g).bfloat16()
            if sharded:
                from torch.distributed.tensor import distribute_tensor

                p.grad = distribute_tensor(grad, p.device_mesh, p.placements)  # type: ignore[attr-defined]
            else:
                p.grad = grad
        optimizer.step()
    return model, optimizer


def save_sharded(folder: str) -> None:
    model, optimizer = stepped(sharded=True)
    save_states(optimizer, model.named_parameters(), folder, writes_whole=dist.get_rank() == 0)


def load_sharded(folder: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """This rank's part of every state, read; and the groups' settings."""
    model, optimizer = stepped(sharded=True, steps=0)
    load_states(optimizer, model.named_parameters(), folder)
    names = {p: n for n, p in model.named_parameters()}
    states = {
        f"{names[p]}/{key}": t for p, state in optimizer.state.items() for key, t in state.items()
    }
    return states, [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


@pytest.mark.processes
@pytest.mark.parametrize(("saved", "loaded"), [(2, 2), (3, 2), (2, 3), (1, 3), (3, 1)])
def test_any_number_of_ranks_reads_what_any_other_wrote(
    saved: int, loaded: int, tmp_path: Path
) -> None:
    # 11 rows on 3 ranks are 4, 4 and 3; the one row of the second weight leaves ranks with nothing.
    run_ranks(saved, save_sharded, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [INDEX, *(states_file(r, saved) for r in range(saved))]
    )
    written = whole_states(tmp_path)
    assert len(written) == 9
    answers = run_ranks(loaded, load_sharded, str(tmp_path))
    for name, whole in written.items():
        parts = [states[name] for states, _ in answers]
        assert [len(t) for t in parts] == [
            b - a for a, b in (chunk(len(whole), loaded, r) for r in range(loaded))
        ]
        assert torch.equal(torch.cat(parts), whole) and parts[0].dtype == whole.dtype
    _, made = stepped(sharded=False)
    for states, groups in answers:
        assert {float(t) for n, t in states.items() if n.endswith("/step")} == {3.0}
        assert groups == [{k: v for k, v in g.items() if k != "params"} for g in made.param_groups]
    # Kernels round the ends of a piece otherwise, hence not in every bit.
    names = ["0.weight", "0.bias", "1.weight"]
    for name, p in zip(names, [p for g in made.param_groups for p in g["params"]], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                written[f"{name}/{key}"], made.state[p][key], rtol=1e-5, atol=1e-9
            )


def test_the_master_weight_comes_back_exactly(tmp_path: Path) -> None:
    model, optimizer = stepped(sharded=False)
    save_states(optimizer, model.named_parameters(), tmp_path)
    with safe_open(tmp_path / states_file(0, 1), framework="pt") as f:
        for name, p in model.named_parameters():
            if p in optimizer.state:
                assert torch.equal(
                    join(p.detach(), f.get_tensor(f"{name}/low")), optimizer.master(p)
                )
                assert not torch.equal(p.detach().float(), optimizer.master(p))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    model, optimizer = stepped(sharded=False)
    save_states(optimizer, model.named_parameters(), tmp_path)
    (tmp_path / states_file(0, 1)).unlink()
    with pytest.raises(UserError, match=f"{states_file(0, 1)} is missing"):
        load_states(optimizer, model.named_parameters(), tmp_path)


@pytest.mark.parametrize("rows", [1, 5, 8, 11])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_rows_are_cut_as_torch_cuts_them(rows: int, parts: int) -> None:
    cut = [list(range(*chunk(rows, parts, i))) for i in range(parts)]
    theirs = [t.tolist() for t in torch.arange(rows).chunk(parts)]
    assert [c for c in cut if c] == theirs


def test_the_writer_writes_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_states, "BLOCK", 5)
    tensors = {
        "odd": torch.arange(7, dtype=torch.int16),
        "wide": torch.randn(3, 4),
        "empty": torch.zeros(0, 4),
        "widest": torch.randn(2, 3, dtype=torch.float64),
        "turned": torch.randn(4, 3).T,
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
