"""The plain loop of `matrix.py`: transformers alone, one device, one document at a time, eager
attention.

    python benchmarks/_matrix_reference.py JOBS.json RESULTS.jsonl

Reads cases ({family, stage, finetuning, precision, yaml}) and appends a line for each: loss and
gradient norm of every step. With `jitter: n` the embeddings are moved at random (seed n) by up to
half of a rounding of the precision, which tells how far two computations in it may be apart. Only
the documents (token ids and labels) come from LongFactory; model, adapters, losses, precision and
optimizer are written out here.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

STEPS, STEP_SAMPLES, MICRO_SAMPLES = 3, 4, 2
"""Optimizer steps, samples in each, and samples in a micro-batch over all data-parallel groups."""
LEARNING_RATE, BETA, RANK, SEED, MAX_NORM = 1e-4, 0.1, 8, 42, 1.0


def documents(yaml: str) -> list[list[Any]]:
    """The samples of a run: lists of TokenizedDocument, each a sequence of its own."""
    from longfactory.config import load_config
    from longfactory.model import load
    from longfactory.train.prepare import load_data

    cfg = load_config([yaml, "pref_share_prompt=false"])
    tokenizer = load.load_tokenizer(cfg.model)
    data = load_data(cfg, tokenizer).train
    return [list(data[i]) for i in range(STEPS * STEP_SAMPLES)]


def compute_dtype(precision: str) -> torch.dtype:
    """What matrices are multiplied in."""
    if precision == "fp32":
        return torch.float32
    # bf16_weights is DeepSpeed's bf16: the weights themselves are bf16, beside them float32 copies
    # for the optimizer.
    return torch.float16 if precision == "fp16" else torch.bfloat16


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of routed experts, of all experts in one parameter: [experts, in, out] or
    [experts, out, in].
    """
    return {n: p for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n}


class Model:
    """A plain model, what is trained of it, and its value head in the stage rm."""

    def __init__(self, folder: str, stage: str, finetuning: str, precision: str, device: str):
        import transformers
        from transformers import set_seed

        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        dtype = compute_dtype(precision)
        set_seed(SEED)
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
        if finetuning == "qlora":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_quant_storage=dtype,
            )
            options["device_map"] = {"": device}
        model = kind.from_pretrained(folder, **options)
        model.config.use_cache = False
        self.model, self.value = model, None
        self.adapted = finetuning in ("lora", "qlora")
        self._choose(model, finetuning)
        if finetuning == "qlora":
            self._round_experts(model)
        if self.adapted:
            self.model = self._adapt(model)
        if stage == "rm":
            hidden = model.config.get_text_config().hidden_size
            self.value = nn.Linear(hidden, 1, dtype=torch.float32)
            nn.init.normal_(self.value.weight, std=1 / (hidden + 1) ** 0.5)
            nn.init.zeros_(self.value.bias)
            if (path := Path(folder) / "value_head.safetensors").is_file():
                given = load_file(path)
                with torch.no_grad():
                    self.value.weight.copy_(given["v_head.summary.weight"])
                    self.value.bias.copy_(given["v_head.summary.bias"])
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            if head.weight is not embedding.weight:
                head.weight.requires_grad_(False)
        if precision not in ("pure_bf16", "bf16_weights"):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.model.to(device).eval()  # eval: there is no dropout in any of these runs
        if self.value is not None:
            self.value.to(device)
        self.device = device
        self.cast = precision in ("bf16", "fp16")
        self.dtype = dtype

    @staticmethod
    def _choose(model: nn.Module, finetuning: str) -> None:
        """Text-only: what lies outside the text decoder is never trained; freeze trains the last
        layer.
        """
        last = max(i for n, _ in model.named_parameters() if (i := layer_index(n)) is not None)
        for name, parameter in model.named_parameters():
            trained = not in_tower(name)
            if finetuning == "freeze":
                trained = trained and layer_index(name) == last
            elif finetuning != "full":
                trained = False
            if parameter.is_floating_point():
                parameter.requires_grad_(trained)

    @staticmethod
    def _round_experts(model: nn.Module) -> None:
        """To the numbers that four bits keep of them: transformers quantises linear layers alone."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        for parameter in stacked_experts(model).values():
            kept = quantize_4bit(parameter.data, quant_type="nf4", compress_statistics=True)
            parameter.data = dequantize_4bit(*kept)

    @staticmethod
    def _adapt(model: Any) -> Any:
        from peft import LoraConfig, TaskType, get_peft_model

        targets = [
            name
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Linear4bit")
            and not in_tower(name)
            and module is not model.get_output_embeddings()
        ]
        stacked = {".".join(name.split(".")[-2:]) for name in stacked_experts(model)}
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=targets,
            target_parameters=sorted(stacked) or None,
        )
        return get_peft_model(model, config)

    def trained(self) -> list[nn.Parameter]:
        extra = [] if self.value is None else list(self.value.parameters())
        return [p for p in self.model.parameters() if p.requires_grad] + extra

    def logits(self, ids: Tensor) -> Tensor:
        """[S] token ids -> [S, V] logits."""
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.cast):
            return self.model(input_ids=ids[None], use_cache=False).logits[0]

    def answer_logp(self, document: Any) -> Tensor:
        """Sum of the log-probabilities of a document's trained tokens."""
        ids = torch.as_tensor(list(map(int, document.input_ids)), device=self.device)
        labels = torch.as_tensor(list(map(int, document.labels)), device=self.device)[1:]
        kept = labels >= 0
        logits = self.logits(ids)[:-1][kept]
        return -F.cross_entropy(logits.float(), labels[kept], reduction="sum").double()

    def last_value(self, document: Any) -> Tensor:
        """The value head at a document's last token, in float32."""
        ids = torch.as_tensor(list(map(int, document.input_ids)), device=self.device)
        assert self.value is not None
        kept: list[Tensor] = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        self.logits(ids)
        hook.remove()
        return self.value(kept[0][0, -1].float())[0].double()

    def jitter(self, seed: int) -> None:
        """From now on embeddings are moved by up to half of a rounding, at random."""
        noise = torch.Generator(self.device).manual_seed(seed)

        def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            step = torch.rand(output.shape, generator=noise, device=output.device) * 2 - 1
            return output * (1 + step * torch.finfo(self.dtype).eps / 2).to(output.dtype)

        self.model.get_input_embeddings().register_forward_hook(move)

    @contextlib.contextmanager
    def as_reference(self, other: Model | None) -> Iterator[Model]:
        """The model before training: the adapter off, or a second model."""
        with torch.no_grad():
            if not self.adapted:
                assert other is not None
                yield other
            else:
                with self.model.disable_adapter():
                    yield self


def in_tower(name: str) -> bool:
    return any(part in name for part in ("vision", "visual", "projector", "audio"))


def layer_index(name: str) -> int | None:
    if in_tower(name) or ".layers." not in name:
        return None
    return int(name.split(".layers.")[1].split(".")[0])


def role(sample: list[Any], name: str) -> list[Any]:
    return [d for d in sample if d.role == name]


def loss_sum(stage: str, model: Model, other: Model | None, samples: list[list[Any]]) -> Tensor:
    """Sum of the loss over the items of a micro-batch, float64."""
    if stage in ("sft", "pt"):
        return -torch.stack([model.answer_logp(d) for s in samples for d in s]).sum()
    if stage == "rm":
        margins = [
            model.last_value(role(s, "chosen")[0]) - model.last_value(role(s, "rejected")[0])
            for s in samples
        ]
        return -F.logsigmoid(torch.stack(margins)).sum()

    def ratio(document: Any) -> Tensor:
        with model.as_reference(other) as reference:
            before = reference.answer_logp(document)
        return model.answer_logp(document) - before

    if stage == "dpo":
        margins = [ratio(role(s, "chosen")[0]) - ratio(role(s, "rejected")[0]) for s in samples]
        return -F.logsigmoid(BETA * torch.stack(margins)).sum()
    mismatched = [d for s in samples for d in role(s, "kl")]
    with torch.no_grad():
        kl = torch.stack([ratio(d) for d in mismatched]).mean().clamp(min=0)
    losses = [1 - torch.sigmoid(BETA * (ratio(d) - kl)) for s in samples for d in role(s, "chosen")]
    losses += [
        1 - torch.sigmoid(BETA * (kl - ratio(d))) for s in samples for d in role(s, "rejected")
    ]
    return torch.stack(losses).sum()


def count_items(stage: str, samples: list[list[Any]]) -> int:
    if stage in ("sft", "pt"):
        return sum(int(label) >= 0 for s in samples for d in s for label in list(d.labels)[1:])
    return len(samples)


def train(case: dict[str, Any], device: str) -> dict[str, list[float]]:
    """Loss and gradient norm (before clipping) of each optimizer step."""
    samples = documents(case["yaml"])
    arguments = (case["folder"], case["stage"], case["finetuning"], case["precision"], device)
    model = Model(*arguments)
    needs_other = case["stage"] in ("dpo", "kto") and not model.adapted
    other = Model(*arguments) if needs_other else None
    if case.get("jitter"):
        for moved in (model, *([other] if other is not None else [])):
            moved.jitter(case["jitter"])
    trained = model.trained()
    masters = [p.detach().float().requires_grad_() for p in trained]
    wide = case["precision"] == "bf16_weights"
    optimizer = torch.optim.AdamW(masters if wide else trained, lr=LEARNING_RATE, weight_decay=0.0)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=case["precision"] == "fp16")
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        batch = samples[step * STEP_SAMPLES : (step + 1) * STEP_SAMPLES]
        items = count_items(case["stage"], batch)
        total = 0.0
        for first in range(0, STEP_SAMPLES, MICRO_SAMPLES):
            micro = batch[first : first + MICRO_SAMPLES]
            loss = loss_sum(case["stage"], model, other, micro) / items
            scaler.scale(loss.float()).backward()
            total += float(loss.detach())
            if wide:  # micro-batches are summed in float32
                for master, parameter in zip(masters, trained, strict=True):
                    gradient = (
                        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    )
                    master.grad = (
                        gradient.float() if master.grad is None else master.grad + gradient.float()
                    )
                    parameter.grad = None
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(masters if wide else trained, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if wide:
            with torch.no_grad():
                for master, parameter in zip(masters, trained, strict=True):
                    parameter.copy_(master)
        found["loss"].append(total)
        found["grad_norm"].append(float(norm))
    return found


def main() -> None:
    jobs, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for case in jobs:
        begun = time.time()
        try:
            found: dict[str, Any] = train(case, device)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        found["seconds"] = round(time.time() - begun, 1)
        about = {k: case[k] for k in ("family", "model", "stage", "finetuning", "precision")}
        about |= {"jitter": case.get("jitter", 0)}
        with open(results, "a") as out:
            out.write(json.dumps({**about, **found}) + "\n")
        numbers = " ".join(f"{x:.6g}" for x in found.get("loss", [math.nan]))
        print(about, numbers, found.get("error", ""), flush=True)


if __name__ == "__main__":
    main()
