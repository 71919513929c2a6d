"""The memory plan of a run: chosen from its data and machine before anything is loaded, corrected
after the first step.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from longfactory.config import RunConfig, optimizer_facts
from longfactory.config.adapter_facts import trains_adapters
from longfactory.config.stage_facts import STAGES
from longfactory.data.module import Datasets
from longfactory.errors import UserError
from longfactory.memory import calibration, gathered
from longfactory.memory.choose import (
    MemoryPlan,
    choose_masters,
    corrected,
    host_memory,
    user_keys,
)
from longfactory.memory.expert_forms import of_interface
from longfactory.memory.layer_kinds import LayerKind, kinds_of
from longfactory.memory.offload import Activations
from longfactory.memory.shapes import (
    Machine,
    ModelShape,
    Tower,
    TrainingJob,
    kind_of,
    machine,
)
from longfactory.model import adapter_targets, adapters, load, trained_parameters
from longfactory.shard import settings as shard
from longfactory.sp import hf, vision
from longfactory.sp.text_model import decoder_layers
from longfactory.train.optimizer_names import EXACT, Narrow, narrow_states
from longfactory.train.reference import adapter_is_reference

log = logging.getLogger("longfactory")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is kept where. `split`: trained weights are bf16 with a 16-bit remainder (exact fp32
    masters; see SplitAdamW). `narrow`: states of AdamW on the GPU that are not fp32, as the user
    asked. `deepspeed`: DeepSpeed holds the states, where its file says."""

    plan: MemoryPlan
    split: bool
    narrow: Narrow | None = None
    deepspeed: bool = False


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters of the run's model. `trained` and `head` (the output layer is trained) are None
    where only the weights would tell.

    `linear`: parameters of linear layers but the output layer, which quantisation reaches.
    `routed`: parameters of experts, which four bits reach where weights are not sharded. `layers`:
    the kind of each decoder layer. `adapted_experts`: routed experts have adapters.
    `tower`: of a run whose rows have images. `state_bytes`: of a trained
    parameter's states, on average, under an optimizer that has a switch of its own.
    """

    total: int
    trained: int | None
    head: bool | None
    linear: int = 0
    routed: int = 0
    layers: tuple[LayerKind, ...] | None = None
    adapted_experts: bool = False
    tower: Tower | None = None
    state_bytes: float | None = None


def count_parameters(cfg: RunConfig, model_config: Any, *, images: bool = False) -> Counts:
    """Counts on a model without storage, made trainable as the run's will be: beside an adapter the
    embeddings are trained where keys may bring new tokens. The rows that these add are not counted.

    Args:
        images: the run's rows have images.
    Raises:
        UserError: the model cannot be trained (see `load.empty_model`), or the keys of freeze or
            LoRA name modules that it does not have.
    """
    given = cfg.model.adapter_name_or_path
    model = load.empty_model(cfg.model, model_config)
    if images:
        try:
            vision.let_in(model)
        except ValueError as error:
            raise UserError(f"dataset: {error}") from error
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if type(module) is torch.nn.Linear and module is not model.get_output_embeddings()
    )
    routed = sum(
        parameter.numel()
        for module in model.modules()
        if of_interface(module)
        for parameter in module.parameters()
        if parameter.dim() == 3
    )
    layers = kinds_of(model, model_config)
    with torch.device("meta"):
        total = trained_parameters.count_parameters(model)[1]
        if given and not cfg.method.create_new_adapter:
            return Counts(total, None, None, linear, routed, layers)
        if trains_adapters(cfg.method):
            adapter_targets.check_targets(model, cfg.method)
        # both compute with weights
        method = dataclasses.replace(
            cfg.method, pissa_init=False, use_dora=False, init_lora_weights=None
        )
        model = adapters.apply_finetuning(
            model,
            method,
            dataclasses.replace(cfg.model, adapter_name_or_path=()),
            new_tokens=load.may_have_new_tokens(cfg.model),
        )
    head = model.get_output_embeddings()
    head_trained = head is not None and any(p.requires_grad for p in head.parameters())
    trained = trained_parameters.count_parameters(model)[0]
    adapted = any(
        "lora_" in name and "experts" in name and "shared" not in name
        for name, p in model.named_parameters()
        if p.requires_grad
    )
    tower = tower_of(model, int(cfg.data.image_max_pixels)) if images else None
    states = states_of_method(cfg, model, trained)
    return Counts(total, trained, head_trained, linear, routed, layers, adapted, tower, states)


def tower_of(model: Any, pixels: int) -> Tower:
    """The vision tower of a model, made trainable as the run's will be.

    Until the data are known (`with_images_of`) every token of a row is taken to be of an image.

    Args:
        pixels: that an image has at most (`image_max_pixels`).
    """
    inner = hf.unwrap(model)
    config = inner.config.vision_config
    parts = {m for part in vision.modules_of(inner).values() for m in part}
    trained = vision.is_trained(inner)
    hidden, inside, depth = vision.tower_sizes(config)
    # of a layer: two norms and what they give, q, k, v, attention's output, and of the MLP twice
    # its width
    stored = depth * (8 * hidden + 2 * inside)
    levels = 1 + len(getattr(config, "deepstack_visual_indexes", None) or ())
    smallest = vision.empty_image(inner.config)
    seen = smallest.patches
    if smallest.pixels.dim() == 2:  # images of any size
        seen = max(seen, pixels // vision.patch_size(config) ** 2)
    whole = getattr(config, "fullatt_block_indexes", None)
    attending = len(whole) if whole else depth  # the other layers see windows
    return Tower(
        sum(p.numel() for p in {p for m in parts for p in m.parameters()}),
        stored,
        levels,
        inner.config.get_text_config().hidden_size,
        vision.TRAINED_BATCH if trained else vision.BATCH,
        trained,
        linear=2.0 * depth * (4 * hidden**2 + 2 * hidden * inside),
        attention=4.0 * hidden * attending,
        patches=smallest.patches / vision.tokens_of(inner.config, smallest.kind, smallest.grid),
        seen=seen,
    )


def with_images_of(counts: Counts, train: Any) -> Counts:
    """Counts whose tower has the images that the data have, where they can be looked at."""
    if counts.tower is None or not hasattr(train, "image_patches"):
        return counts
    patches, seen = train.image_patches()
    tower = dataclasses.replace(counts.tower, patches=patches, seen=seen)
    return dataclasses.replace(counts, tower=tower)


def states_of_method(cfg: RunConfig, model: Any, trained: int) -> float | None:
    """Bytes a trained parameter of the states that `use_muon` and its like keep, on average over
    the model; None without such an optimizer. Small matrices of norms and biases count as AdamW's.
    """
    facts = optimizer_facts.chosen(cfg)
    if facts is None or not trained:
        return None
    method, width = cfg.method, 2 if cfg.method.pure_bf16 else 4
    if facts.name == "use_badam":
        layers = decoder_layers(model)[1]
        if method.badam_mode == "ratio":  # two moments and the entries themselves, in float32
            inside = sum(p.numel() for layer in layers for p in layer.parameters())
            return 12 * method.badam_update_ratio * inside / trained
        largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        return (8 + (4 if method.pure_bf16 else 0)) * largest / trained
    total = 0.0
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    linear = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()
    }
    rank = {"use_galore": method.galore_rank, "use_apollo": method.apollo_rank}.get(facts.name)
    for _, p in named:
        if p.ndim < 2 or (id(p) not in linear and facts.name != "use_adam_mini"):
            total += 2 * width * p.numel()
        elif rank is None:  # Muon's momentum; Adam-mini's first moment
            total += width * p.numel()
        else:  # two moments of the projected gradient, and the projection
            short, long = sorted(p.shape)
            total += width * min(rank, short) * (2 * long + short)
    return total / trained


def check_model(cfg: RunConfig) -> list[str]:
    """What `train` would refuse of the model, from its configuration alone: for `--dry_run` and
    `plan`. No weight is read.

    Returns:
        What could not be checked: a model that is not on this machine.
    Raises:
        UserError: as `load.load_config`, `load.empty_model` and `count_parameters`.
    """
    name = str(cfg.model.model_name_or_path)
    path, _ = load.resolve(name)
    if not Path(path).exists():
        return [
            f"model_name_or_path: {name} is not a folder on this machine; the model was not"
            " checked."
        ]
    count_parameters(cfg, load.load_config(cfg.model, cfg.known_cutoff_len))
    return []


def plan_memory(
    cfg: RunConfig,
    model_config: Any,
    counts: Counts,
    datasets: Datasets,
    sharding: str,
    world: int,
    cuda: bool,
) -> Memory:
    """`memory: auto | fast | long` on this machine, for the longest row of the data.

    Raises:
        UserError: as `plan_run`.
    """
    train = datasets.train
    tokens = cfg.longest_row
    if train is not None and hasattr(train, "lengths"):
        tokens = int(max(train.lengths)) * int(cfg.trainer.per_device_train_batch_size)
    counts = with_images_of(counts, train)
    return plan_run(cfg, model_config, counts, tokens, sharding, this_machine(cfg, world, cuda))


def this_machine(cfg: RunConfig, world: int, cuda: bool) -> Machine:
    """The machines of a run that starts here."""
    gpu = torch.cuda.get_device_properties(0) if cuda else None
    if gpu is not None and kind_of(gpu.name) is None:
        log.warning(
            f"{gpu.name} is not in the memory plan's list of GPUs: predicted memory is right, "
            "predicted times are those of an A100."
        )
    here = machine(
        gpu.name if gpu else "cpu",
        world,
        host_memory(),
        gpus_per_host=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        gpu_bytes=gpu.total_memory if gpu else 0,
        tf32=bool(cfg.trainer.tf32),
        cores=os.cpu_count() or 0,
    )
    return with_calibration(here, gpu.name if gpu else None, world)


def with_calibration(here: Machine, gpu: str | None, world: int) -> Machine:
    """The machine with the rates that `plan --calibrate` measured on it, where it did.

    Args:
        gpu: its GPU's name; None without one.
        world: processes of the run.
    """
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == world
    path = calibration.found(one_machine) if gpu is not None else None
    if gpu is None or path is None:
        return here
    measured = calibration.read(path)
    if not measured.is_of(gpu):
        log.warning(
            f"{path} was measured on {measured.gpu}, and this GPU is {gpu}: the memory plan "
            "uses the built-in rates of this GPU. To measure it, run longfactory plan "
            "--calibrate."
        )
        return here
    log.info(f"The memory plan uses the rates measured on this machine ({path}).")
    return measured.of_machine(here)


def plan_run(
    cfg: RunConfig,
    model_config: Any,
    counts: Counts,
    tokens: int,
    sharding: str,
    machine: Machine,
) -> Memory:
    """The memory settings of a run on some machine: what `train` takes, and what `plan` predicts.

    Args:
        tokens: of the longest row.
        sharding: of `choose_sharding`.
    Raises:
        UserError: an optimizer with states in 4 or 8 bit that cannot be had here;
            `optimizer_overlap` or `offload_gradients` where they cannot be.
    """
    lora = trains_adapters(cfg.method)
    check_method_optimizer(cfg, sharding, machine.gpus)
    method_optimizer = optimizer_facts.chosen(cfg) is not None
    exact = str(cfg.trainer.optim) in EXACT and not method_optimizer
    narrow = None if method_optimizer else narrow_states(cfg, sharding)
    fixed = user_keys(cfg.memory)
    if not exact:
        fixed.setdefault("optimizer", "gpu")  # no other optimizer computes on the host
    if sharding != "fsdp2" and fixed.pop("keep_weights", None) is not None:
        log.warning("reshard_after_forward has no effect: weights are not sharded by FSDP2 here.")
    overlaps, fp16 = cfg.memory.optimizer_overlap, bool(cfg.trainer.fp16)
    if overlaps and float(cfg.trainer.max_grad_norm) > 0:
        raise UserError(
            "optimizer_overlap updates weights before the gradient norm is known, and "
            f"max_grad_norm is {cfg.trainer.max_grad_norm}. Set max_grad_norm: 0, or "
            "offload_gradients: true instead of optimizer_overlap."
        )
    for key, wanted in (
        ("optimizer_overlap", overlaps),
        ("offload_gradients", cfg.memory.offload_gradients is True),
    ):
        if wanted:
            check_leaving(key, sharding, fp16)
    held = reference_bytes(cfg, model_config, machine.gpus if sharding == "fsdp2" else 1)
    if machine.gpu_bytes:
        machine = dataclasses.replace(machine, gpu_bytes=machine.gpu_bytes - held)

    # Gradients of split weights are bf16. FSDP2 reduces them in fp32 and SplitAdamW sums
    # micro-batches in fp32; DDP would reduce in bf16.
    may_split = (
        exact
        and bool(cfg.trainer.bf16)
        and not lora
        and sharding in ("none", "fsdp2")
        and not cfg.method.pure_bf16
    )
    state_bytes = _state_bytes(narrow, model_config, counts)
    if counts.state_bytes is not None:
        state_bytes = counts.state_bytes
    zero = 0
    if sharding == "deepspeed":
        zero, on_host = zero_stage(cfg)
        if cfg.memory.optimizer_placement == "host" and not on_host:
            raise UserError(
                "optimizer_placement: host and deepspeed: DeepSpeed holds the optimizer's states."
                ' Set "offload_optimizer": {"device": "cpu"} in its file, or leave'
                " optimizer_placement out."
            )
        fixed["optimizer"] = "host" if on_host else "gpu"
        state_bytes += 2 if cfg.method.pure_bf16 and zero == 3 else 4  # its copies of the trained
    half = cfg.trainer.bf16 or cfg.trainer.fp16 or cfg.method.pure_bf16
    final = sharding in ("none", "fsdp2") and not fp16  # gradients, when backward gives them
    job = TrainingJob(
        shape=ModelShape.of(
            model_config,
            trainable=counts.trained,
            parameters=counts.total,
            lora=lora,
            head_trained=counts.head,
            width=2 if half else 4,
            quantized=quantized_parameters(cfg, counts, sharding),
            quantized_bytes=quantized_bytes(cfg),
            layers=counts.layers,
            written=layers_can_be_written(cfg, sharding, zero),
            adapted_experts=counts.adapted_experts,
        ),
        machine=machine,
        tokens=tokens,
        sp=cfg.sequence_parallel_size,
        sharded=sharding in ("fsdp2", "deepspeed"),
        master=4,
        accumulates=int(cfg.trainer.gradient_accumulation_steps) > 1 or sharding == "deepspeed",
        state_bytes=state_bytes,
        leavable=final,
        overlaps=overlaps,
        zero=zero,
        pure=bool(cfg.method.pure_bf16),
        reference_passes=reference_passes(cfg),
        mode=cfg.parallel.sequence_parallel_mode,
        ulysses_degree=ulysses_degree(cfg),
        tower=counts.tower,
        made_here=bool(cfg.model.train_from_scratch),
    )
    host = cfg.memory.optimizer_placement == "host"
    plan, split = choose_masters(job, fixed, cfg.memory.memory, may_split, always=host)
    return Memory(plan, split, None if split else narrow, sharding == "deepspeed")


def check_method_optimizer(cfg: RunConfig, sharding: str, processes: int) -> None:
    """Refuses `use_galore` and its like where the run's sharding does not allow them.

    Raises:
        UserError: FSDP2, or updates in the backward pass with several processes.
    """
    facts, layerwise = optimizer_facts.chosen(cfg), optimizer_facts.in_backward(cfg)
    if facts is not None and facts.fsdp2 is not None and sharding == "fsdp2":
        raise UserError(f"{facts.name}: {facts.fsdp2}. Use sharding: ddp, or use_muon.")
    if layerwise is not None and processes > 1:
        raise UserError(optimizer_facts.layerwise_refusal(layerwise))


def ulysses_degree(cfg: RunConfig) -> int | None:
    """GPUs that exchange heads, as the keys of usp say; None where they say nothing."""
    keys = cfg.parallel
    if keys.sequence_parallel_ring_degree is not None and keys.sequence_parallel_mode == "usp":
        return cfg.sequence_parallel_size // keys.sequence_parallel_ring_degree
    return keys.sequence_parallel_ulysses_degree


def zero_stage(cfg: RunConfig) -> tuple[int, bool]:
    """DeepSpeed's stage, and whether its optimizer's states are on the host."""
    assert cfg.trainer.deepspeed is not None  # by choose_sharding
    zero = shard.deepspeed_config(cfg.trainer.deepspeed, bf16=False).get("zero_optimization") or {}
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    return int(zero.get("stage", 0)), device != "none"


def layers_can_be_written(cfg: RunConfig, sharding: str, zero: int) -> bool:
    """Whether the hand-written layer takes the run's weights and adapters, where the family has one
    (`layer.recognise` and what `decoder_layer` steps aside for).
    """
    method, bits = cfg.method, cfg.model.quantization_bit
    if bits is not None and cfg.model.quantization_method == "hqq":
        return False
    if method.finetuning_type == "oft":
        return False
    if method.finetuning_type == "lora" and method.lora_dropout > 0:
        return False
    if bits == 8 or (bits is not None and sharding == "fsdp2"):
        return False
    return zero != 3


def quantized_parameters(cfg: RunConfig, counts: Counts, sharding: str) -> int:
    """Parameters that are held in fewer bits: of linear layers, and in bitsandbytes' four bits of
    routed experts where neither FSDP2 nor ZeRO shards the weights.
    """
    if not cfg.model.quantization_bit:
        return 0
    four = cfg.model.quantization_bit == 4 and cfg.model.quantization_method == "bnb"
    whole = four and sharding in ("none", "ddp")
    return counts.linear + (counts.routed if whole else 0)


def quantized_bytes(cfg: RunConfig) -> float:
    """Bytes of a quantised weight, with its share of the scales: of bitsandbytes' 4 bit one for 64
    weights, in fp32 or (double quantisation) 8 bit; of hqq a scale and a zero point.
    """
    if cfg.model.quantization_method == "hqq":
        bits = cfg.model.quantization_bit
        packed = {1: 1 / 8, 2: 1 / 4, 3: 4 / 10, 4: 1 / 2}.get(bits or 8, 1.0)
        half = cfg.trainer.bf16 or cfg.trainer.fp16 or cfg.method.pure_bf16
        return packed + 2 * (2 if half else 4) / 64
    if cfg.model.quantization_bit == 8:
        return 1.0
    return 0.5 + (1 + 4 / 256 if cfg.model.double_quantization else 4) / 64


def choose_sharding(
    cfg: RunConfig, parameters: int, world: int, cuda: bool, device_bytes: int | None = None
) -> str:
    """How parameters are sharded; see `shard.settings`.

    Args:
        device_bytes: memory of one GPU, where the run is not on this machine.
    """
    full = cfg.method.finetuning_type == "full"
    if device_bytes is None:
        device_bytes = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    facts = optimizer_facts.chosen(cfg)
    by_hqq = cfg.model.quantization_bit is not None and cfg.model.quantization_method == "hqq"
    cannot = by_hqq or (facts is not None and facts.fsdp2 is not None)
    whole = cannot and cfg.parallel.sharding == "auto"
    return shard.choose_sharding(
        "ddp" if whole and world > 1 else cfg.parallel.sharding,
        world=world,
        cuda=cuda,
        deepspeed=bool(cfg.trainer.deepspeed),
        quantized=bool(cfg.model.quantization_bit),
        state_bytes=parameters * (16 if full else 4),
        device_bytes=device_bytes,
    )


def check_leaving(key: str, sharding: str, fp16: bool) -> None:
    """Refuses a key by which gradients leave during backward, where they are not final when
    backward gives them.

    Raises:
        UserError: DDP, DeepSpeed or fp16.
    """
    if sharding not in ("none", "fsdp2"):
        raise UserError(
            f"{key} works with FSDP2 or one process; this run has sharding: {sharding}."
        )
    if fp16:
        raise UserError(f"{key} needs unscaled gradients, and those of fp16 are scaled. Use bf16.")


def _state_bytes(narrow: Narrow | None, model_config: Any, counts: Counts) -> float:
    """Bytes a trained parameter of the optimizer's states on the GPU, on average."""
    if narrow is None or narrow.package != "bitsandbytes" or counts.trained != counts.total:
        return 8 if narrow is None else narrow.bytes
    text = model_config.get_text_config()
    embedding = min(1.0, text.vocab_size * text.hidden_size / counts.total)
    return narrow.bytes + (8 - narrow.bytes) * embedding


def reference_passes(cfg: RunConfig) -> int:
    """Forward passes of a step for the reference's log-probabilities: none where they are computed
    before training.
    """
    method = cfg.method
    if method.stage == "sft":
        return int(bool(method.use_asft_loss))
    needed = STAGES[method.stage].needs_reference(method)
    return int(needed and adapter_is_reference(method) and not method.precompute_ref_log_probs)


def reference_bytes(cfg: RunConfig, model_config: Any, shards: int) -> int:
    """Bytes a device of the second model that asft holds where there is no adapter to switch off;
    spread over `shards` devices.
    """
    method = cfg.method
    if method.stage != "sft" or not method.use_asft_loss or adapter_is_reference(method):
        return 0
    bits = (
        method.ref_model_quantization_bit if method.ref_model else cfg.model.quantization_bit
    ) or (16 if cfg.trainer.bf16 else 32)
    return ModelShape.of(model_config).parameters * bits // 8 // shards


class FitMemory(TrainerCallback):
    """After the first step: settings corrected from its real peak. All ranks agree on it, since
    groups of heads communicate.
    """

    def __init__(self, plan: MemoryPlan, activations: Activations):
        self.plan, self.activations, self.done = plan, activations, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done or args.device.type != "cuda":
            return
        self.done = True
        peak = torch.tensor(
            torch.cuda.max_memory_allocated(), dtype=torch.int64, device=args.device
        )
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        settings, line = corrected(self.plan, int(peak))
        if line is not None:
            self.activations.change(settings)
            gathered.keep_weights(kwargs["model"], settings.keep_weights)
            log.info(line)
