"""Streaming and tokenized_path give the samples of the map-style data set."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import datasets
import lf_oracle
import numpy as np
import pytest
import torch

from data_arguments import make_args
from longfactory.config.data_arguments import STRATEGIES
from longfactory.data.module import collate, load_datasets
from longfactory.data.prepare import Preparer
from longfactory.data.row import IGNORE
from longfactory.data.stream import StreamedDataset, interleave
from longfactory.data.templates import get_template
from longfactory.errors import DataError
from longfactory.train.loader import Collate, empty_row, make_loader
from small_tokenizers import metaspace

ROWS = [
    {"instruction": f"Question {i}?", "input": "", "output": f"Answer {i}. " * (i % 5 + 1)}
    for i in range(50)
]
OTHER = [{"instruction": f"Other {i}?", "input": "", "output": "Yes."} for i in range(9)]


def load(tokenizer: Any, folder: Path, stage: str = "sft", seed: int = 0, **options: Any) -> Any:
    args = make_args(dataset_dir=str(folder), **({"template": "chatml", "dataset": "d"} | options))
    return load_datasets(
        args, stage=stage, tokenizer=tokenizer, template=get_template(args, tokenizer), seed=seed
    )


def plain(samples: Any) -> list[list[tuple[list[int], list[int], str]]]:
    return [[(list(d.input_ids), list(d.labels), d.role) for d in s] for s in samples]


def every(data: Any) -> list[Any]:
    return plain(data[i] for i in range(len(data)))


# -- streaming -------------------------------------------------------------------------------------


def test_a_stream_in_order_equals_the_map(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({"file_name": "d.jsonl"}, ROWS), o=({}, OTHER))
    expected = load(tokenizer, folder, dataset="d,o", cutoff_len=40).train
    stream = load(
        tokenizer,
        folder,
        dataset="d,o",
        cutoff_len=40,
        streaming=True,
        buffer_size=1,
        preprocessing_batch_size=7,
    ).train
    assert isinstance(stream, StreamedDataset)
    assert plain(stream) == every(expected) == plain(stream)


def test_a_stream_tells_what_is_lost(
    tokenizer: Any, write_data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_data(d=({"file_name": "d.jsonl"}, ROWS))
    expected = load(tokenizer, folder, cutoff_len=20).train.report
    assert expected.truncated
    caplog.clear()
    caplog.set_level("INFO", "longfactory.data")
    stream = load(
        tokenizer, folder, cutoff_len=20, streaming=True, preprocessing_batch_size=25, buffer_size=1
    ).train
    list(stream)
    told = [m for m in caplog.messages if m.startswith("training (the stream so far)")]
    assert len(told) == 2 and told[-1] == f"training (the stream so far): {expected.describe()}."
    assert (
        len(
            [
                m
                for m in caplog.messages
                if m.startswith("Training example: ") and "Question 0?" in m
            ]
        )
        == 1
    )
    load(tokenizer, folder, cutoff_len=20, streaming=True, val_size=8)
    assert any(m.startswith("evaluation: 8 samples") for m in caplog.messages)


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_workers_after_the_tokenizer_has_used_its_threads(
    tokenizer: Any, write_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as `longfactory train` sets it for one process
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tokenizer(["some text to tokenise"] * 1000)
    stream = load(tokenizer, write_data(d=({"file_name": "d.jsonl"}, ROWS)), streaming=True).train
    loader = torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    assert sorted(map(str, plain(loader))) == sorted(map(str, plain(stream)))


def test_shuffled_packed_and_held_out(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({"file_name": "d.jsonl"}, ROWS))
    whole = sorted(map(str, every(load(tokenizer, folder).train)))
    found = load(tokenizer, folder, streaming=True, val_size=8, buffer_size=20)
    first, again = plain(found.train), plain(found.train)
    found.train.set_epoch(1)
    second = plain(found.train)
    held_out = every(found.eval["eval"])
    assert first == again != second and sorted(map(str, first)) == sorted(map(str, second))
    assert len(held_out) == 8 and sorted(map(str, first + held_out)) == whole
    assert first != every(load(tokenizer, folder).train)[: len(first)]
    packed = plain(
        load(
            tokenizer,
            folder,
            streaming=True,
            packing=True,
            cutoff_len=256,
            preprocessing_batch_size=25,
        ).train
    )
    assert sorted(str([d]) for row in packed for d in row) == whole and any(
        len(row) > 1 for row in packed
    )
    numbers = [
        d.sample
        for s in load(tokenizer, folder, streaming=True, preprocessing_batch_size=6).train
        for d in s
    ]
    assert numbers == list(range(50))


@pytest.mark.processes
def test_shards_and_workers_share_the_stream(tokenizer: Any, write_data: Any) -> None:
    stream = load(tokenizer, write_data(d=({"file_name": "d.jsonl"}, ROWS)), streaming=True).train
    whole = plain(stream)
    assert [plain(stream.shard(r, 3)) for r in range(3)] == [whole[r::3] for r in range(3)]
    nested = stream.shard(1, 2).shard(1, 2)
    assert plain(nested) == whole[3::4]
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2, collate_fn=list)
    assert sorted(map(str, plain(loader))) == sorted(map(str, whole))


def rows_of(stream: Any, workers: int, group: int = 0) -> list[list[int]]:
    """Two epochs of the micro-batches that one group of two reads with `dataloader_num_workers:
    workers`.
    """
    collator = Collate(collate, 8, 0, empty_row)
    loader = make_loader(
        stream,
        None,
        collator,
        batch=2,
        groups=2,
        group=group,
        workers=workers,
        pin=False,
        prefetch=None,
    )
    out = []
    for epoch in range(2):
        loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        out += [item["row"].input_ids.tolist() for item in loader]
    return out


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {"dataset": "d,o", "mix_strategy": "interleave_over"}),
        ("sft", {"packing": True, "cutoff_len": 256, "val_size": 8}),
        ("kto", {"dataset": "k"}),
    ],
    ids=["mixed", "packed", "kto"],
)
def test_processes_share_the_tokenising_and_change_nothing(
    stage: str, options: dict[str, Any], tokenizer: Any, write_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bad = {"instruction": "Q", "input": "", "output": ""}
    labelled = [row | {"label": i % 3 == 0} for i, row in enumerate(ROWS)]
    kto = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}}
    folder = write_data(
        d=({"file_name": "d.jsonl"}, [*ROWS[:20], bad, *ROWS[20:]]),
        o=({}, OTHER),
        k=(kto, labelled),
    )
    stream = load(
        tokenizer,
        folder,
        stage,
        streaming=True,
        buffer_size=20,
        preprocessing_batch_size=22,
        **options,
    ).train
    caplog.clear()
    expected, told = rows_of(stream, 0), caplog.text.count("empty answer (1)")
    assert expected != rows_of(stream, 0, group=1)
    original, tokenised = Preparer.chunk, tmp_path / "tokenised"

    def chunk(self: Preparer, rows: Any) -> Any:
        with tokenised.open("a") as f:
            f.writelines(f"{os.getpid()} {place}\n" for _, place, _ in rows)
        return original(self, rows)

    monkeypatch.setattr(Preparer, "chunk", chunk)
    caplog.clear()
    assert rows_of(stream, 0) == expected
    once = sorted(line.split(" ", 1)[1] for line in tokenised.read_text().splitlines())
    torch.manual_seed(0)
    rows_of(stream, 0)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    tokenised.unlink()
    caplog.clear()
    assert rows_of(stream, 3) == expected
    assert torch.equal(torch.get_rng_state(), state)  # dropout is the same too
    assert caplog.text.count("empty answer (1)") == told
    found = [line.split(" ", 1) for line in tokenised.read_text().splitlines()]
    assert sorted(place for _, place in found) == once
    assert len({pid for pid, _ in found}) > 1 and str(os.getpid()) not in {pid for pid, _ in found}


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_row_ends_a_strict_stream_in_a_sentence(
    workers: int, tokenizer: Any, write_data: Any
) -> None:
    folder = write_data(
        d=({"file_name": "d.jsonl"}, [*ROWS, {"instruction": "Q", "input": "", "output": ""}])
    )
    stream = load(tokenizer, folder, streaming=True, on_bad_row="error").train
    with pytest.raises(DataError, match=r"^Data set 'd', d.jsonl:51: empty answer\. Repair it"):
        rows_of(stream, workers)


@pytest.mark.parametrize("probs", [None, "0.5,0.5"])
def test_interleaved_streams(probs: str | None, tokenizer: Any, write_data: Any) -> None:
    folder = write_data(d=({"file_name": "d.jsonl"}, ROWS), o=({}, OTHER))

    def texts(mix: str) -> list[str]:
        stream = load(
            tokenizer,
            folder,
            dataset="d,o",
            streaming=True,
            mix_strategy=mix,
            interleave_probs=probs,
            buffer_size=1,
        ).train
        return [tokenizer.decode(s[0].input_ids) for s in stream]

    once, under, over = (texts(f"interleave_{m}") for m in ("once", "under", "over"))
    assert sorted(once) == sorted({*once}) and len(once) == 59
    assert len(under) < 59 and len({*under}) == len(under)
    assert len({*over}) == 59 and len(over) > 59
    assert any("Other" in t for t in under[:8]) and any("Question" in t for t in under[:8])


@pytest.mark.parametrize("mix", ["interleave_under", "interleave_over", "interleave_once"])
@pytest.mark.parametrize("probs", [None, [0.5, 0.3, 0.2], [0.9, 0.05, 0.05]])
def test_interleaving_is_that_of_datasets(mix: str, probs: list[float] | None) -> None:
    """Row by row, whatever the seed and the lengths; ends are known when they are there, not one
    row later.
    """
    for lengths in ([8, 3, 5], [4, 4, 4], [2, 9, 1]):
        rows = [[{"text": f"{s} {i}"} for i in range(n)] for s, n in enumerate(lengths)]
        readers: Any = [lambda r=r: (("place", row) for row in r) for r in rows]
        parts = [datasets.Dataset.from_list(r) for r in rows]
        for seed in range(4 if probs else 1):
            expected = datasets.interleave_datasets(
                parts, probabilities=probs, seed=seed, stopping_strategy=STRATEGIES[mix]
            )["text"]
            assert [
                row["text"] for _, _, row in interleave(readers, ["a", "b", "c"], mix, probs, seed)
            ] == list(expected)


@pytest.mark.parametrize("probs", [None, "0.2,0.8", "1,4"])
@pytest.mark.parametrize("mix", ["interleave_under", "interleave_over", "interleave_once"])
def test_a_mixed_stream_equals_the_mixed_map(
    mix: str, probs: str | None, tokenizer: Any, write_data: Any
) -> None:
    folder = write_data(d=({"file_name": "d.jsonl"}, ROWS[:8]), o=({}, OTHER[:3]))
    options = {"dataset": "d,o", "mix_strategy": mix, "interleave_probs": probs, "seed": 3}
    stream = load(tokenizer, folder, streaming=True, buffer_size=1, **options).train
    assert plain(stream) == every(load(tokenizer, folder, **options).train)
    if mix == "interleave_over" and probs is None:
        assert len(plain(stream)) == 16


def test_chances_of_interleaving_are_checked(tokenizer: Any, write_data: Any) -> None:
    folder = write_data(
        d=({}, ROWS[:4]), o=({}, OTHER[:3]), none=({"file_name": "none.jsonl"}, b"")
    )
    for streaming in (False, True):
        for probs, message in (
            ("0.5", "1 numbers for 2 data sets"),
            ("a,b", "needs numbers"),
            ("-1,2", "from 0 on"),
            ("0,0", "not all 0"),
        ):
            with pytest.raises(DataError, match=f"interleave_probs .*{message}"):
                load(
                    tokenizer,
                    folder,
                    dataset="d,o",
                    mix_strategy="interleave_over",
                    interleave_probs=probs,
                    streaming=streaming,
                )
        with pytest.raises(DataError, match="mix_strategy is 'interleave'"):
            load(tokenizer, folder, dataset="d,o", mix_strategy="interleave", streaming=streaming)
    with pytest.raises(DataError, match="'none' has no row, so it cannot be interleaved"):
        list(
            load(
                tokenizer, folder, dataset="d,none", mix_strategy="interleave_over", streaming=True
            ).train
        )
    never = load(
        tokenizer,
        folder,
        dataset="d,o",
        mix_strategy="interleave_over",
        interleave_probs="0,1",
        streaming=True,
    ).train
    assert len(list(never)) == 3


def test_what_a_stream_refuses(
    tokenizer: Any, write_data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_data(d=({}, ROWS), bad=({}, [{"instruction": "Q", "input": "", "output": ""}]))
    for options, message in (
        ({"max_samples": 3}, "set max_steps"),
        ({"val_size": 0.1}, "number of rows"),
        ({"tokenized_path": str(tmp_path / "t")}, "turn one of them off"),
    ):
        with pytest.raises(DataError, match=message):
            load(tokenizer, folder, streaming=True, **options)
    with pytest.raises(DataError, match="no usable row"):
        list(load(tokenizer, folder, dataset="bad", streaming=True).train)
    assert "bad.json row 1: empty answer" in caplog.text


# -- tokenized_path --------------------------------------------------------------------------------


def test_saved_data_are_read_without_the_files(
    tokenizer: Any, write_data: Any, tmp_path: Path
) -> None:
    folder = write_data(d=({}, ROWS), o=({}, OTHER))
    path = tmp_path / "saved"
    made = load(tokenizer, folder, dataset="d,o", val_size=6, tokenized_path=str(path))
    for f in folder.iterdir():
        f.unlink()
    read = load(tokenizer, folder, dataset=None, tokenized_path=str(path))
    assert every(read.train) == every(made.train) and every(read.eval["eval"]) == every(
        made.eval["eval"]
    )
    assert (
        load(tokenizer, folder, tokenized_path=str(path), cutoff_len=20).train.lengths.max() == 20
    )
    with pytest.raises(DataError, match="tokenised for sft; this stage needs pair"):
        load(tokenizer, folder, "dpo", tokenized_path=str(path))


def test_saved_data_of_another_tokenizer_are_refused(
    tokenizer: Any, write_data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its numbers are other tokens there; a token that was added since changes none of them."""
    folder, path = write_data(d=({}, ROWS)), str(tmp_path / "saved")
    load(tokenizer, folder, tokenized_path=path)
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<new>"])
    load(grown, folder, tokenized_path=path, template="llama3")
    assert "tokenised with template chatml, but this run's template, llama3" in caplog.text
    with pytest.raises(DataError, match="tokenised by another tokenizer"):
        load(metaspace(), folder, tokenized_path=path)
    # LLaMA-Factory does not write it down
    saved = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2, 999_999]], "labels": [[-100, 2, 999_999]]}
    )
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "theirs"))
    with pytest.raises(DataError, match=r"have the token 999999, and the last one of this model's"):
        load(tokenizer, folder, dataset=None, tokenized_path=str(tmp_path / "theirs"))


def test_saved_data_with_a_token_that_was_added_need_it(
    tokenizer: Any, write_data: Any, tmp_path: Path
) -> None:
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<new>"])
    folder, path = write_data(d=({}, [r | {"output": "<new>"} for r in ROWS])), str(tmp_path / "s")
    load(grown, folder, tokenized_path=path)
    load(grown, folder, tokenized_path=path)
    with pytest.raises(DataError, match=rf"have the token {len(tokenizer)}, .*add_tokens"):
        load(tokenizer, folder, tokenized_path=path)


def test_numbers_that_no_token_has_refuse_no_saved_data(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some vocabularies have holes: their last token's number is beyond their size."""
    last = len(tokenizer) + 5
    vocabulary = tokenizer.get_vocab() | {"<last>": last}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: vocabulary)
    saved = datasets.Dataset.from_dict({"input_ids": [[1, 2, last]], "labels": [[-100, 2, last]]})
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "theirs"))
    found = load(tokenizer, tmp_path, dataset=None, tokenized_path=str(tmp_path / "theirs"))
    assert list(found.train[0][0].input_ids) == [1, 2, last]


def test_a_folder_of_other_things_is_not_overwritten(
    tokenizer: Any, write_data: Any, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for name in ("mine", "mine/thesis.tex"):
        # Before anything is tokenised: nobody should wait an hour for it.
        with pytest.raises(DataError, match=r"tokenized_path .* holds no tokenised data"):
            load(
                tokenizer,
                write_data(d=({}, ROWS)),
                dataset="not_looked_for",
                tokenized_path=str(tmp_path / name),
            )
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("neat", [None, False, True])
def test_data_that_llamafactory_saved(
    neat: bool | None, tokenizer: Any, write_data: Any, tmp_path: Path
) -> None:
    """Its tokens and labels are taken as they are; packed rows are cut into their documents again,
    without their padding.
    """
    lf = lf_oracle.Oracle()
    args = make_args(
        template="chatml", cutoff_len=200, packing=neat is not None, neat_packing=bool(neat)
    )
    columns = lf.encode("sft", ROWS, {}, tokenizer, args)
    if neat is not None:
        processor = lf.lf.supervised.PackedSupervisedDatasetProcessor(
            lf.template(tokenizer, args), tokenizer, None, args
        )
        columns = dict(processor.preprocess_dataset(lf.aligned(ROWS, {}, args)))
        columns.pop("packing_params", None)
    keep = {
        k: v
        for k, v in columns.items()
        if k in ("input_ids", "labels", "attention_mask", "position_ids")
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(keep)}).save_to_disk(
        str(tmp_path / "theirs")
    )
    read = load(tokenizer, tmp_path, tokenized_path=str(tmp_path / "theirs")).train
    expected = every(load(tokenizer, write_data(d=({}, ROWS)), cutoff_len=200).train)
    assert sorted(d for s in every(read) for d in s) == sorted(d for s in expected for d in s)
    assert len(read) == len(keep["input_ids"])
    assert read.lengths.tolist() == [
        sum(len(d.input_ids) for d in read[i]) for i in range(len(read))
    ]


def test_packed_rows_of_0_9_1_cannot_be_told_apart(tokenizer: Any, tmp_path: Path) -> None:
    row = {
        "input_ids": [[1, 2, 3, 4]],
        "labels": [[IGNORE, 2, 3, IGNORE]],
        "position_ids": [list(range(4))],
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(row)}).save_to_disk(
        str(tmp_path / "old")
    )
    with pytest.raises(DataError, match="packed without a mark"):
        load(tokenizer, tmp_path, tokenized_path=str(tmp_path / "old"))


def test_vision_data_that_llamafactory_saved_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    row = {"input_ids": [[1, 2]] * 2, "labels": [[1, 2]] * 2, "images": [[], ["a.png"]]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(row)}).save_to_disk(
        str(tmp_path / "seen")
    )
    with pytest.raises(DataError, match="The saved data have images: LLaMA-Factory saves them"):
        load(tokenizer, tmp_path, tokenized_path=str(tmp_path / "seen"))


def test_pairs_and_pretraining_that_llamafactory_saved(tokenizer: Any, tmp_path: Path) -> None:
    pair = {
        f"{s}_{k}": [[1, 2, 3]]
        for s in ("chosen", "rejected")
        for k in ("input_ids", "labels", "attention_mask")
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(pair)}).save_to_disk(
        str(tmp_path / "pairs")
    )
    assert [
        d.role
        for d in load(tokenizer, tmp_path, "dpo", tokenized_path=str(tmp_path / "pairs")).train[0]
    ] == ["chosen", "rejected"]
    with pytest.raises(DataError, match="another stage than sft"):
        load(tokenizer, tmp_path, tokenized_path=str(tmp_path / "pairs"))
    text = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]})
    datasets.DatasetDict({"train": text, "validation": text}).save_to_disk(str(tmp_path / "pt"))
    found = load(tokenizer, tmp_path, "pt", tokenized_path=str(tmp_path / "pt"))
    assert np.array_equal(found.train[0][0].labels, [5, 6, 7]) and len(found.eval["eval"]) == 1
