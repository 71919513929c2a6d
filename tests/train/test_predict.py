"""Generated answers: the same from a batch as one by one, from two processes as from one; files and
scores.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpu_sharding import on_ranks_of_their_own
from longfactory import sp
from longfactory.data.row import IGNORE, TokenizedDocument
from longfactory.errors import UserError
from longfactory.sp import hf
from longfactory.testing import run_ranks, tiny_model
from longfactory.train import predict as module
from longfactory.train.predict import generate, predict, rouge, split_last_answer
from predicted import DOCUMENTS, GREEDY, make_tokenizer


def prepared_model(ctx: sp.SequenceParallel) -> Any:
    model = tiny_model("qwen2", seed=4)
    hf.prepare(model, ctx)
    return model


def make_trainer(folder: Path, ctx: sp.SequenceParallel, batch: int = 2) -> Any:
    model = prepared_model(ctx)
    return SimpleNamespace(
        ctx=ctx,
        images=None,
        args=SimpleNamespace(
            eval_batch_size=batch, device=torch.device("cpu"), output_dir=str(folder)
        ),
        model_wrapped=model,
        accelerator=SimpleNamespace(unwrap_model=lambda m: m),
        compute_loss_context_manager=nullcontext,
        is_world_process_zero=lambda: ctx.dp_rank == 0,
        shard_model=lambda: None,
        log_metrics=lambda *_: None,
    )


def run(
    folder: Path,
    ctx: sp.SequenceParallel,
    sets: dict[str, list[list[TokenizedDocument]]],
    batch: int = 2,
) -> dict[str, float]:
    trainer = make_trainer(folder, ctx, batch)
    trainer.model_wrapped.train()
    metrics = predict(
        trainer,
        SimpleNamespace(generating=GREEDY, data=SimpleNamespace(template=None)),
        make_tokenizer(),
        SimpleNamespace(eval=sets),
    )
    assert (
        trainer.model_wrapped.training
        and trainer.model_wrapped.config._attn_implementation == hf.ATTENTION
    )
    if ctx.dp_rank == 0:
        assert json.loads((folder / "predict_results.json").read_text()) == metrics
    return metrics


def read(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / module.FILE).read_text().splitlines()]


def greedy_by_hand(prompt: list[int], model: Any = None) -> list[int]:
    """Without cache, batch or padding: the most probable token, again and again."""
    model, ids = (model or tiny_model("qwen2", seed=4)).eval(), list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids[len(prompt) :]


def test_files_of_one_process(tmp_path: Path) -> None:
    # the last sample is a packed row of two conversations
    samples = [[d] for d in DOCUMENTS[:3]] + [DOCUMENTS[3:]]
    metrics = run(tmp_path, sp.SequenceParallel.create(1), {"eval": samples})
    tokenizer = make_tokenizer()
    lines = read(tmp_path)
    assert len(lines) == metrics["predict_samples"] == 5
    for d, line in zip(DOCUMENTS, lines, strict=True):
        prompt = list(d.input_ids[:-2])
        assert line["prompt"] == tokenizer.decode(prompt)
        assert line["label"] == "w9"
        assert line["predict"] == tokenizer.decode(greedy_by_hand(prompt), skip_special_tokens=True)
    assert len({line["predict"] for line in lines}) > 1
    assert 0 <= metrics["predict_rouge-1"] <= 100


def on_two_ranks(folder: str) -> dict[str, float]:
    return run(
        Path(folder), sp.SequenceParallel.create(1), {"eval": [[d] for d in DOCUMENTS]}, batch=2
    )


@pytest.mark.processes
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    """Five questions over two processes with batches of two: one process has a round with nothing
    of its own.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, sp.SequenceParallel.create(1), {"eval": [[d] for d in DOCUMENTS]})
    metrics = run_ranks(2, on_two_ranks, str(two))
    assert read(one) == read(two)
    assert metrics[0]["predict_rouge-l"] == metrics[1]["predict_rouge-l"]


@pytest.mark.processes
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("sharding", "trained"), [("fsdp2", True), ("fsdp2", False), ("zero2", True)]
)
def test_sharded_parameters_write_what_whole_ones_write(
    sharding: str, trained: bool, tmp_path: Path
) -> None:
    if sharding == "zero2":
        pytest.importorskip("deepspeed")
    from invariance_worker import tiny
    from predict_worker import predict_sharded

    on_ranks_of_their_own(2, 350, predict_sharded, sharding, trained, str(tmp_path))

    model, start = tiny("llama"), tiny("llama").state_dict()
    weights = torch.load(tmp_path / "weights.pt")
    assert trained == any(
        (weights[n] - p).abs().max() > 1e-2 for n, p in start.items() if n in weights
    )
    model.load_state_dict(weights, strict=False)
    tokenizer = make_tokenizer()
    lines = read(tmp_path)
    assert len(lines) == len(DOCUMENTS)
    for d, line in zip(DOCUMENTS, lines, strict=True):
        assert line["predict"] == tokenizer.decode(
            greedy_by_hand(list(d.input_ids[:-2]), model), skip_special_tokens=True
        )
    assert len({line["predict"] for line in lines}) > 1


def test_several_sets_have_their_own_names(tmp_path: Path) -> None:
    metrics = run(
        tmp_path,
        sp.SequenceParallel.create(1),
        {"a": [[DOCUMENTS[0]]], "b": [[DOCUMENTS[1]], [DOCUMENTS[2]]]},
    )
    assert metrics["predict_a_samples"] == 1 and metrics["predict_b_samples"] == 2
    assert len((tmp_path / f"predict_b_{module.FILE}").read_text().splitlines()) == 2


def test_refusals(tmp_path: Path) -> None:
    one = sp.SequenceParallel.create(1)
    trainer = make_trainer(tmp_path, one)
    trainer.ctx = SimpleNamespace(size=2)
    with pytest.raises(
        UserError, match=r"cannot be sharded over 2 processes\. Set sequence_parallel_size: 1"
    ):
        predict(trainer, None, None, SimpleNamespace(eval={}))
    with pytest.raises(UserError, match="Set eval_dataset or val_size"):
        predict(make_trainer(tmp_path, one), None, None, SimpleNamespace(eval={}))
    with pytest.raises(UserError, match="max_length: 4 leaves no room after 5 tokens"):
        generate(
            None,
            make_tokenizer(),
            [[3] * 5],
            SimpleNamespace(**{**vars(GREEDY), "max_new_tokens": 0, "max_length": 4}),
            "cpu",
            False,
            [],
        )


def test_questions_without_an_answer_are_answered(tmp_path: Path) -> None:
    """The whole document is the prompt; scores are means over the samples that have an answer."""
    question = TokenizedDocument(DOCUMENTS[1].input_ids[:-2], [IGNORE] * 4, role="prompt", sample=1)
    assert split_last_answer(question) == (list(question.input_ids), [])
    asked = run(
        tmp_path / "a", sp.SequenceParallel.create(1), {"eval": [[DOCUMENTS[0]], [question]]}
    )
    alone = run(tmp_path / "b", sp.SequenceParallel.create(1), {"eval": [[DOCUMENTS[0]]]})
    line = read(tmp_path / "a")[1]
    assert line["label"] == "" and line["prompt"] == make_tokenizer().decode(question.input_ids)
    assert line["predict"] == make_tokenizer().decode(
        greedy_by_hand(list(question.input_ids)), skip_special_tokens=True
    )
    assert asked["predict_rouge-1"] == alone["predict_rouge-1"] and asked["predict_samples"] == 2
    none = run(tmp_path / "c", sp.SequenceParallel.create(1), {"eval": [[question]]})
    assert none["predict_samples"] == 1 and "predict_rouge-1" not in none


def test_the_last_answer_is_split_off() -> None:
    two_turns = TokenizedDocument([3, 4, 5, 6, 7, 8], [IGNORE, 4, IGNORE, IGNORE, 7, 8])
    assert split_last_answer(two_turns) == ([3, 4, 5, 6], [7, 8])
    eos_as_label_only = TokenizedDocument([3, 4, 5, 6, 7], [IGNORE, 4, 2, IGNORE, 7])
    assert split_last_answer(eos_as_label_only) == ([3, 4, 5, 6], [7])
    for labels in ([IGNORE, IGNORE], [3, 4]):
        with pytest.raises(UserError, match="no prompt and answer"):
            split_last_answer(TokenizedDocument([3, 4], labels))


def test_rouge() -> None:
    assert rouge("the cat sat", "the cat sat") == {
        "rouge-1": 100.0,
        "rouge-2": 100.0,
        "rouge-l": 100.0,
    }
    assert rouge("", "the cat") == {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    # 6 and 6 words; bigrams shared: "cat sat", "sat on"
    scores = rouge("The cat, sat on a mat", "a cat sat on the mat")
    assert scores["rouge-1"] == pytest.approx(100.0)
    assert scores["rouge-2"] == pytest.approx(100 * 2 * 2 / 10)
    assert scores["rouge-l"] == pytest.approx(100 * 2 * 4 / 12)  # cat sat on mat
    assert rouge("你好吗", "你好")["rouge-1"] == pytest.approx(100 * 2 * 2 / 5)
