"""What the ranks of tests/memory/test_memory_parallel.py run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpu_sharding import init_deepspeed
from longfactory import sp
from longfactory.memory.apply import apply_memory
from longfactory.memory.decoder_layer import DecoderLayer
from longfactory.memory.layer.families import FAMILIES
from longfactory.memory.settings import MemorySettings
from longfactory.sp import hf
from longfactory.sp.text_model import decoder_layers
from memory_models import gradients, make_model, run


def shard(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in decoder_layers(model)[1]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded_gradients(
    kind: str,
    settings: MemorySettings,
    engine: str,
    first: str,
    size: int,
    lora: bool = False,
    mode: Any = "zigzag-ring",
) -> dict[str, Tensor]:
    """Gradients of the whole row's loss after one step, whole, from `size` ranks a
    sequence-parallel group.
    """
    ctx = sp.SequenceParallel.create(size, mode=mode)
    with pytest.MonkeyPatch.context() as monkeypatch:
        model = make_model(kind, monkeypatch)
        hf.prepare(model, ctx)
        if lora:
            model = with_lora(model)
        if first == "memory":
            apply_memory(model, settings)
        wrapped = model
        if engine == "fsdp2":
            shard(model)
        if first == "wrap":
            apply_memory(model, settings)
        if engine == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            run(wrapped, ctx)
        for layer in decoder_layers(model)[1]:  # hand-written where they can be
            installed = layer.forward
            assert not isinstance(installed, DecoderLayer) or all(installed.chain.proved.values())
            assert isinstance(installed, DecoderLayer) == (kind in FAMILIES)
        world = dist.get_world_size()
        # Sharding engines average over ranks; the loss of the row is the sum of its ranks' losses,
        # once for each group.
        scale = world / (world // size)
        found = {}
        for name, g in gradients(model).items():
            g = g.full_tensor() if hasattr(g, "full_tensor") else g
            found[name] = g * scale
        return found


def order_of_backward(mode: Any) -> list[str]:
    """Of a layer of two ranks: what is multiplied, and when its messages are waited for."""
    from longfactory.memory.layer import attention_half
    from longfactory.sp.schedules import gather, ring

    ctx = sp.SequenceParallel.create(2, mode=mode)
    happened: list[str] = []
    through = attention_half.through

    def multiplied(g: Tensor, n: Tensor, c: Any, name: str, *rest: Any) -> Any:
        happened.append(name)
        return through(g, n, c, name, *rest)

    def waited(own: Any) -> Any:
        def wait(*args: Any) -> Any:
            happened.append("wait")
            return own(*args)

        return wait

    give_back = gather.Fetch.give_back

    with pytest.MonkeyPatch.context() as monkeypatch:
        model = make_model("qwen2", monkeypatch)
        hf.prepare(model, ctx)
        apply_memory(model, MemorySettings(keep_attention=1.0))
        run(model, ctx)  # the layers are proved
        monkeypatch.setattr(attention_half, "through", multiplied)
        monkeypatch.setattr(ring.Exchange, "wait", waited(ring.Exchange.wait))
        monkeypatch.setattr(gather.Fetch, "wait", waited(gather.Fetch.wait))
        monkeypatch.setattr(gather.Fetch, "give_back", lambda *args: waited(give_back(*args)))
        run(model, ctx)
    return happened[-5:]


def with_lora(model: nn.Module, targets: Any = None, **keys: Any) -> nn.Module:
    """LoRA on some of the linears, B not zero, in float64."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    targets = targets or ["q_proj", "v_proj", "gate_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=3, target_modules=targets, **keys))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return model.double().train()


def split_adamw_on_shards() -> tuple[Tensor, Tensor]:
    """The weight after three steps, from a whole parameter and from one that FSDP2 sharded."""
    from longfactory.memory.optimizer import SplitAdamW

    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 10, bias=False, dtype=torch.bfloat16)
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = SplitAdamW(model.parameters(), lr=1e-2)
        g = torch.Generator().manual_seed(1)
        for _ in range(3):
            model(torch.randn(4, 6, generator=g).bfloat16()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        w = model.weight.detach()
        results.append(w.full_tensor() if hasattr(w, "full_tensor") else w)
    return results[0], results[1]


def split_adamw_sums_on_shards() -> tuple[Tensor, Tensor]:
    """The gradient of three micro-batches, gathered from shards; and the sum of this rank's own
    parts, added in fp32 and rounded once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from longfactory.memory.optimizer import SplitAdamW

    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False, dtype=torch.bfloat16)  # the ranks have two rows and one
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SplitAdamW(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(1)
    total = torch.zeros(3, 6)
    for k in range(3):
        model(torch.randn(4, 6, generator=g).bfloat16()).square().sum().backward()
        assert model.weight.grad is not None
        total += model.weight.grad.full_tensor().float()  # type: ignore[operator]
        optimizer.accumulate(last=k == 2)
    assert model.weight.grad is not None
    return model.weight.grad.full_tensor(), total.bfloat16()  # type: ignore[operator]


def split_adamw_norm_of_shards() -> tuple[float, float, float, list[int]]:
    """Of gradients of a sharded parameter, of one whose second shard is empty, and of one that
    every rank has whole: computed after backward; what it is; computed during backward. And the
    numbers of norms that were computed before `clip`: of one micro-batch, of the last of two, after
    a step.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from longfactory.memory.optimizer import SplitAdamW, local

    torch.manual_seed(0)
    model, other = nn.Linear(6, 1, dtype=torch.bfloat16), nn.Linear(3, 3, bias=False)
    wide = nn.Linear(5, 7, dtype=torch.bfloat16)
    both = nn.Sequential(model, wide)
    for module in both:
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SplitAdamW([*both.parameters(), *other.parameters()], lr=1e-2, placement="gpu")

    def backward() -> None:
        (
            model(torch.ones(4, 6).bfloat16()).sum()
            + wide(torch.ones(2, 5).bfloat16()).square().sum()
            + other(torch.ones(3)).sum()
        ).backward()

    backward()
    grads = [p.grad for p in [*both.parameters(), *other.parameters()]]
    expected = (
        sum(
            float((g.full_tensor() if hasattr(g, "full_tensor") else g).double().square().sum())
            for g in grads
        )
        ** 0.5
    )  # type: ignore
    after = float(optimizer.clip(1.0))
    optimizer.zero_grad()
    with optimizer.during_backward():
        backward()
    early = [len(optimizer._norms)]
    during = float(optimizer.clip(1.0))
    for p in [*both.parameters(), *other.parameters()]:
        local(p.grad).mul_(0.5)
    optimizer.forget_norms()
    assert math.isclose(float(optimizer.clip(1.0)), during / 2, rel_tol=1e-6)
    optimizer.zero_grad()
    for last in (False, True):
        with optimizer.during_backward(last):
            backward()
        optimizer.accumulate(last)
    early.append(len(optimizer._norms))
    assert float(optimizer.clip(1.0)) > 1.5 * after  # of the sum of both
    optimizer.step()
    early.append(len(optimizer._norms))
    return after, expected, during, early


class SmallModel(nn.Module):
    """An embedding tied to the output layer, a layer that is called twice, a frozen one, and one
    that only long rows use.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(31, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.seldom = nn.Linear(12, 12)
        self.head = nn.Linear(12, 31, bias=False)
        self.to(dtype)
        self.head.weight = self.embedding.weight
        self.layers[1].requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in (*self.layers, self.layers[2]):
            x = x + layer(x).tanh()
        if len(ids) > 9:
            x = x + self.seldom(x)
        return nn.functional.cross_entropy(self.head(x).float(), ids.roll(1))


Trajectory = tuple[dict[str, Tensor], list[float]]


def steps_of_a_small_model(
    leaving: dict[str, Any], dtype: torch.dtype, parts: int, most: float, sharded: bool = False
) -> Trajectory:
    """Masters and moments after five steps of `parts` micro-batches each, with a checkpoint after
    the third; norms of gradients.

    `leaving`: how gradients leave (SplitAdamW's keys), if they do. `most`: norm to which they are
    clipped.
    """
    from longfactory.memory.optimizer import SplitAdamW

    model = SmallModel(dtype)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for layer in (*model.layers, model.seldom):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def make() -> tuple[SplitAdamW, Any]:
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": trained[:3], "lr": 3e-2, "weight_decay": 0.1},
            {"params": trained[3:], "weight_decay": 0.0},
        ]
        optimizer = SplitAdamW(groups, lr=1e-2, **leaving)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))

    optimizer, schedule = make()
    g = torch.Generator().manual_seed(1 + (dist.get_rank() if sharded else 0))
    norms = []
    for number in range(5):
        for k in range(parts):
            last = k == parts - 1
            ids = torch.randint(0, 31, (7 if last else 11,), generator=g)
            loss = model(ids)
            with optimizer.during_backward(last):
                loss.backward()
            if leaving and (last or dtype == torch.bfloat16):
                # Without a gradient in this micro-batch, it has stayed.
                assert all(
                    p.grad is None
                    for n, p in model.named_parameters()
                    if dtype == torch.bfloat16 or "seldom" not in n
                )
            if parts > 1:
                optimizer.accumulate(last=last)
        norms.append(float(optimizer.clip(most)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number == 2:
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = make()
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
    found = {}
    for name, p in model.named_parameters():
        found[name] = optimizer.master(p)
        found |= {f"{name}/{key}": t for key, t in optimizer.state.get(p, {}).items()}
    return found, norms


# How gradients leave during backward, and the norm to which they are clipped.
LEAVING: list[tuple[dict[str, Any], float]] = [
    ({"overlap": True}, math.inf),
    ({"gradients": "host"}, math.inf),
    ({"gradients": "host"}, 0.5),
]


def same_trajectories(after: Trajectory, during: Trajectory, exact: bool) -> None:
    """In every bit; or, where norms were summed in another order before clipping, nearly."""
    assert after[0].keys() == during[0].keys() and "embedding.weight/exp_avg" in after[0]
    for name, t in after[0].items():
        assert (
            torch.equal(t, during[0][name])
            if exact
            else torch.allclose(t.double(), during[0][name].double(), rtol=1e-5, atol=1e-7)
        ), name
    assert during[1] == pytest.approx(after[1], rel=1e-6) and len(set(after[1])) == 5


def overlap_on_shards() -> tuple[Trajectory, Trajectory]:
    """Gradients that stay, and others that leave: bf16 with and without micro-batches, then fp32;
    the first that differ, or the last.
    """
    for (dtype, parts), (how, most) in itertools.product(
        ((torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float32, 2), (torch.float32, 1)), LEAVING
    ):
        after, during = (
            steps_of_a_small_model(leaving, dtype, parts, most, sharded=True)
            for leaving in ({}, how)
        )
        same_trajectories(after, during, exact=most == math.inf or parts == 1)
    return after, during


def zero_gradients(
    kind: str, settings: MemorySettings, stage: int, lora: bool
) -> dict[str, Tensor]:
    """Gradients in fp32 as DeepSpeed applies them: the change of each weight in a step of SGD with
    learning rate 1.
    """
    import deepspeed

    def whole(p: Tensor) -> Tensor:
        if stage < 3:
            return p.detach().clone()
        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()

    init_deepspeed()
    world = dist.get_world_size()
    ctx = sp.SequenceParallel.create(world)
    with pytest.MonkeyPatch.context() as monkeypatch:
        model = make_model(kind, monkeypatch)
        hf.prepare(model, ctx)
        model = (with_lora(model) if lora else model).float()
        apply_memory(model, settings)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        }
        sgd = torch.optim.SGD(trained.values(), lr=1.0)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(trained.values()), optimizer=sgd, config=config
        )
        before = {n: whole(p) for n, p in trained.items()}
        # The engine averages over ranks; the loss of the row is the sum of its ranks' losses.
        run(engine, ctx, backward=lambda loss: engine.backward(loss.float() * world))
        engine.step()
        return {n: before[n] - whole(p) for n, p in trained.items()}
