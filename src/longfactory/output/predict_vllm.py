"""`infer_backend: vllm`: the answers of `do_predict` by vLLM, which starts processes of its own.

The prompts are the token ids that training would have seen, and the files are those of `predict`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from longfactory.config import RunConfig
from longfactory.config.folder import write_whole
from longfactory.errors import UserError
from longfactory.model import load
from longfactory.model.generate import stop_tokens
from longfactory.output.load import refuse_stretched
from longfactory.output.serve import check_vllm, vllm_arguments
from longfactory.train.output import write_metrics
from longfactory.train.predict import answers_file, scores_of, split_last_answer, written
from longfactory.train.prepare import load_data

log = logging.getLogger("longfactory")


def predict(cfg: RunConfig) -> dict[str, float]:
    """Generates for every evaluation set, writes the files into the output folder, and returns the
    scores.

    Raises:
        UserError: vLLM is not installed, or cannot generate as the run asks.
    """
    check_vllm()
    refuse_stretched(cfg, "infer_backend: vllm")
    tokenizer = load.load_tokenizer(cfg.model)
    datasets = load_data(cfg, tokenizer)
    if not datasets.eval:
        raise UserError("do_predict needs evaluation data. Set eval_dataset or val_size.")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = cfg.model.adapter_name_or_path
    engine = LLM(
        model=str(load.resolve(str(cfg.model.model_name_or_path))[0]),
        tokenizer=adapters[0] if adapters else None,
        seed=cfg.trainer.seed,
        **vllm_arguments(cfg),
    )
    # stop words of the model's own generation settings are vLLM's default
    stops = stop_tokens(None, tokenizer, cfg.data.template)
    sampling = SamplingParams(**sampling_arguments(cfg.generating, stops))
    adapter = LoRARequest("adapter", 1, adapters[0]) if adapters else None
    metrics: dict[str, float] = {}
    for name, dataset in datasets.eval.items():
        prefix = "predict" if len(datasets.eval) == 1 else f"predict_{name}"
        started = time.time()
        asked = [split_last_answer(d) for i in range(len(dataset)) for d in dataset[i]]
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in asked],
            sampling,
            lora_request=adapter,
        )
        answers = [output.outputs[0].text for output in outputs]
        skip = cfg.generating.skip_special_tokens
        labels = [tokenizer.decode(label, skip_special_tokens=skip) for _, label in asked]
        cfg.output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(
            cfg.output_dir / answers_file(prefix), written(tokenizer, asked, answers, labels)
        )
        metrics |= scores_of(prefix, asked, answers, labels, time.time() - started)
    for name, value in metrics.items():
        log.info(f"{name}: {value}")
    write_metrics(cfg.output_dir, "predict", metrics)
    return metrics


def sampling_arguments(generating: Any, stops: list[int]) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams (0.33) from the generation keys.

    Raises:
        UserError: beams, which vLLM's engine does not have, or no limit of new tokens.
    """
    g = generating
    if g.num_beams > 1:
        raise UserError(
            "num_beams: vLLM has no beams. Set num_beams: 1, or infer_backend: huggingface."
        )
    if g.max_new_tokens <= 0:
        raise UserError("max_new_tokens: vLLM needs a limit of new tokens. Give one above 0.")
    sampled = g.do_sample and g.temperature > 0
    return {
        "temperature": g.temperature if sampled else 0.0,
        "top_p": g.top_p if sampled else 1.0,
        "top_k": g.top_k if sampled else 0,
        "repetition_penalty": g.repetition_penalty,
        "max_tokens": g.max_new_tokens,
        "stop_token_ids": list(stops),
        "skip_special_tokens": g.skip_special_tokens,
    }
