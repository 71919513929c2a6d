"""`longfactory init`: the first YAML of a run, with comments, and the entry of its data in
dataset_info.json. Imports neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfactory import resources
from longfactory.config.folder import write_whole
from longfactory.data.readers import first_rows
from longfactory.data.sources import DataSource, detect
from longfactory.errors import UserError

DEMO_MODEL = "smollm2-135m-instruct"
DEMO = {"rm": "manual_dpo", "dpo": "manual_dpo", "kto": "manual_kto"}
"""Demo data of stages whose name is not that of their data."""
STAGES = ("sft", "dpo", "kto", "rm", "pt")
LOOKED_AT = 2000
"""Rows whose lengths are looked at."""
ESTIMATED = 16
"""Of them the longest, whose tokens are estimated."""
PIECES = re.compile(r"(?P<word>[A-Z]?[a-z]+)|(?P<capitals>[A-Z]+)|(?P<space>\s+)|[^\sA-Za-z]")

WHAT = {
    "sft": "Supervised fine-tuning on the answers of conversations.",
    "dpo": "Direct preference optimisation: of two answers the chosen one becomes more likely.",
    "kto": "Kahneman-Tversky optimisation: answers that are labelled true or false.",
    "rm": "A reward model: of two answers the chosen one gets the higher value.",
    "pt": "Continued pretraining on every token of plain texts.",
}
NEEDS = {
    "sft": "conversations, or prompts with answers",
    "dpo": "pairs: chosen and rejected answers",
    "kto": "answers with a label that is true or false",
    "rm": "pairs: chosen and rejected answers",
    "pt": "texts",
}
RATE = {"sft": "1.0e-5", "dpo": "1.0e-6", "kto": "1.0e-6", "rm": "1.0e-5", "pt": "1.0e-5"}
LORA_RATE = {"sft": "1.0e-4", "dpo": "1.0e-5", "kto": "1.0e-5", "rm": "1.0e-4", "pt": "1.0e-4"}


def main(argv: Sequence[str]) -> int:
    """`longfactory init`. Returns the exit status."""
    parser = arguments()
    a = parser.parse_args(list(argv))
    if a.stage == "examples":
        return examples(Path.cwd())
    target = Path(a.out or f"{a.stage}.yaml")
    if target.exists() and not a.force:
        raise UserError(f"{target} exists. Give another name by --out, or replace it by --force.")
    folder = Path(a.dataset_dir)
    name, longest, rows = data_set(a.stage, a.data, folder)
    text = run_file(a.stage, a.model, name, a.dataset_dir, longest, rows, lora=a.lora, out=target)
    write_whole(target, text)
    print(f"Wrote {target}, and the data set {name!r} in {folder / 'dataset_info.json'}.")
    if longest is None:
        print(
            "Its rows were not inspected. If their columns are not instruction, input and "
            "output, name them in dataset_info.json; and set cutoff_len."
        )
    print(f"Next: longfactory train {target}")
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command's words."""
    parser = argparse.ArgumentParser(
        prog="longfactory init",
        description="Writes the first YAML of a run, with comments, and the entry of its data in"
        " dataset_info.json; `longfactory init examples` copies all examples and the demo data.",
    )
    parser.add_argument("stage", choices=(*STAGES, "examples"), help="what is learnt")
    parser.add_argument(
        "--model", default=DEMO_MODEL, help=f"a folder, or a name on the hub ({DEMO_MODEL})"
    )
    parser.add_argument(
        "--data", help="a file or a folder of files, or a name on the hub; else the demo data"
    )
    parser.add_argument("--lora", action="store_true", help="train an adapter (LoRA)")
    parser.add_argument("--dataset_dir", default="data", help="folder of dataset_info.json (data)")
    parser.add_argument("--out", help="the file to write (STAGE.yaml)")
    parser.add_argument("--force", action="store_true", help="replace the file")
    return parser


def examples(target: Path) -> int:
    """Copies the examples and the demo data into a folder, and adds the demo data's entries to a
    dataset_info.json that is there. Returns the exit status.

    Raises:
        UserError: that file cannot be read.
    """
    listed = target / "data" / "dataset_info.json"
    known = read_info(listed.parent)
    written, others = resources.copy_all(target)
    print(f"Wrote {len(written)} files into examples/ and data/.")
    if known:
        ours = resources.data_sets()
        added = [name for name in ours if name not in known]
        if added:
            write_info(listed.parent, {**known, **{name: ours[name] for name in added}})
            print(f"Added to {listed.relative_to(target)}: {', '.join(added)}.")
        kept = [name for name in ours if known.get(name, ours[name]) != ours[name]]
        if kept:
            print(
                f"{listed.relative_to(target)} already has data sets with the names of the "
                f"demo data, which are kept: {', '.join(kept)}."
            )
    stay = [str(path.relative_to(target)) for path in others if path != listed]
    if stay:
        print(f"These files already exist and were not changed: {', '.join(stay)}.")
    print("Next: python examples/quickstart.py")
    return 0


# ---- the data ------------------------------------------------------------------------------------


def data_set(stage: str, data: str | None, folder: Path) -> tuple[str, int | None, int]:
    """Puts a data set into dataset_info.json, where it is not there.

    Args:
        stage: what it is for.
        data: a file, a folder, a name that dataset_info.json or the hub has; None: the demo data.
        folder: of dataset_info.json.
    Returns:
        Its name; about how many tokens its longest row has at most, as far as rows were looked at,
        None where they were not; and how many those were.
    Raises:
        UserError: the file is not there, its form is not known, or is not for the stage.
    """
    info = read_info(folder)
    if data is None:
        name = DEMO.get(stage, f"manual_{stage}")
        entry = resources.data_sets()[name]
        source, copy = resources.folder("data") / entry["file_name"], folder / entry["file_name"]
        folder.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            shutil.copyfile(source, copy)
    elif data in info:
        name, entry = data, info[data]
    elif Path(data).exists():
        name, entry = Path(data).stem or Path(data).name, entry_of_file(Path(data), folder)
    elif "/" in data and not data.startswith((".", "/")) and data.count("/") == 1:
        name, entry = data.split("/")[1], {"hf_hub_url": data}
    else:
        raise UserError(f"--data {data}: there is no such file, and no data set of this name.")
    refuse_other_kind(stage, name, entry)
    if name in info and info[name] != entry:
        raise UserError(
            f"{folder / 'dataset_info.json'} has another data set {name!r}. Give its name by"
            f" --data {name}, or rename the file."
        )
    if name not in info:
        write_info(folder, {**info, name: entry})
    if "file_name" not in entry:
        return name, None, 0
    rows = some_rows(folder / entry["file_name"], LOOKED_AT)
    texts = sorted((json.dumps(row, ensure_ascii=False) for row in rows), key=utf8_bytes)
    return name, max(map(most_tokens, texts[-ESTIMATED:]), default=0), len(rows)


def utf8_bytes(text: str) -> int:
    """Its length in UTF-8."""
    return len(text.encode("utf-8", "replace"))


def most_tokens(text: str) -> int:
    """About how many tokens a text has at most, without a tokenizer: three letters of a word, two
    capitals, two bytes of anything else, each digit, mark and line end; and a fifth more.
    """
    count = 0
    for found in PIECES.finditer(text):
        piece = found.group()
        if found["word"]:
            count += -(-len(piece) // 3)
        elif found["capitals"]:
            count += -(-len(piece) // 2)
        elif found["space"]:
            count += piece.count("\n") + (len(piece) > 1)
        else:
            count += (utf8_bytes(piece) + 1) // 2
    return count + count // 5


def read_info(folder: Path) -> dict[str, Any]:
    """What dataset_info.json holds; nothing where it is not there.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "dataset_info.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: got a {type(found).__name__}, expected a mapping of data sets.")
    return found


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Writes dataset_info.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(info, indent=2, ensure_ascii=False)
    write_whole(folder / "dataset_info.json", text + "\n")


def some_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a file or a folder of files, without bad ones.

    Raises:
        DataError: there is none.
    """
    source = DataSource(name=path.name, load_from="file", location=str(path.resolve()))
    return first_rows(source, count)


def entry_of_file(path: Path, folder: Path) -> dict[str, Any]:
    """The entry of dataset_info.json by which a file is read, by its first rows.

    Raises:
        UserError: the form of its rows is not known.
    """
    rows = some_rows(path, 64)
    entry = detect(rows)
    if entry is None:
        columns = ", ".join(dict.fromkeys(c for row in rows for c in row)) or "none"
        raise UserError(
            f"--data {path}: the format of its rows was not recognised (columns: {columns}). "
            "Expected messages with role and content, or from and value; a prompt with an "
            "answer; chosen and rejected; or text. docs/your_data.md has an example of each."
        )
    return {"file_name": os.path.relpath(path.resolve(), folder.resolve())} | entry


def refuse_other_kind(stage: str, name: str, entry: dict[str, Any]) -> None:
    """Refuses data of which it is known that the stage cannot use them.

    Raises:
        UserError: with what the stage needs.
    """
    if "file_name" not in entry:
        return
    columns = entry.get("columns", {})
    if entry.get("ranking"):
        kind = "dpo"
    elif columns.get("kto_tag"):
        kind = "kto"
    elif columns.get("messages") or columns.get("response") or "columns" not in entry:
        kind = "sft"
    else:
        kind = "pt"
    wanted = {"rm": "dpo"}.get(stage, stage)
    if wanted != kind and not (wanted == "sft" and kind == "pt" and columns.get("query")):
        raise UserError(
            f"Stage {stage} needs {NEEDS[stage]}, and {name!r} holds {NEEDS[kind]}. Use"
            f" `longfactory init {kind}`, or other data."
        )


# ---- the file ------------------------------------------------------------------------------------


def run_file(
    stage: str,
    model: str,
    data: str,
    dataset_dir: str,
    longest: int | None,
    rows: int,
    *,
    lora: bool,
    out: Path,
) -> str:
    """The YAML.

    Args:
        longest: tokens of the longest row among `rows`, estimated from above; None where it is
            not known.
        out: where it is written; names the output folder.
    """
    cutoff, why = 8192, "tokens of a sample; longer ones are cut"
    if longest is not None:
        cutoff = max(1024, -(-longest // 1024) * 1024)
        why = f"tokens of a sample; of {rows:,} rows the longest has at most about {longest:,}"
    template = model_template(model, stage)
    where = "a folder, or a name on the hub"
    if model == DEMO_MODEL:
        where = "of the extra smollm2; or a folder, or a hub name"
    lines = [
        f"# {WHAT[stage]}",
        f"# longfactory train {out}",
        f"# longfactory plan {out} --gpus 8xH100    what fits, and how long it takes; needs no GPU",
        f"# longfactory verify {out}                the sharded run against one device",
        "# longfactory train --help WORD    what a key means",
        "",
        "# ---- model",
        key("model_name_or_path", quoted(model), where),
        *template,
        "",
        "# ---- what to train, and on what",
        key("stage", stage),
        key("finetuning_type", "lora" if lora else "full", "full, lora or freeze"),
        *([key("lora_rank", "8"), key("lora_target", "all")] if lora else []),
        *extra_of_stage(stage),
        "",
        "# ---- data",
        key("dataset_dir", quoted(dataset_dir), "holds dataset_info.json"),
        key("dataset", quoted(data)),
        key("cutoff_len", str(cutoff), why),
        *cut_and_pack(stage),
        key("val_size", "0.1", "a tenth of the samples is held out for evaluation"),
        "",
        "# ---- devices that share one sequence",
        key("sequence_parallel_size", "1", "or auto: what `longfactory plan` would choose"),
        "# sequence_parallel_mode: zigzag-ring  # ulysses, llama3, usp, auto",
        "",
        "# ---- training",
        key("per_device_train_batch_size", "1"),
        key(
            "gradient_accumulation_steps",
            "4",
            "4 samples per optimizer step and data-parallel group",
        ),
        key("learning_rate", (LORA_RATE if lora else RATE)[stage]),
        key("lr_scheduler_type", "cosine"),
        key("warmup_ratio", "0.1"),
        key("num_train_epochs", "1"),
        "# bf16: true  # on GPUs: half the memory, several times the speed",
        "",
        "# ---- output",
        key("output_dir", quoted(f"outputs/{out.stem}")),
        key("logging_steps", "1"),
        key("save_steps", "100"),
        key("save_total_limit", "2"),
        key("eval_strategy", "steps"),
        key("eval_steps", "100"),
        key("per_device_eval_batch_size", "1"),
        key("plot_loss", "true"),
    ]
    return "\n".join(lines) + "\n"


def key(name: str, value: str, why: str = "") -> str:
    """A line of the file."""
    line = f"{name}: {value}"
    return f"{line:<38}  # {why}" if why else line


def quoted(text: str) -> str:
    """A text as YAML reads it back."""
    plain = text.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
    return text if plain.isalnum() and not plain.isdigit() else json.dumps(text)


def model_template(model: str, stage: str) -> list[str]:
    """How prompts are written."""
    if stage == "pt":
        return []
    return ["# template: qwen  # by default the model's own chat template; a base model has none"]


def extra_of_stage(stage: str) -> list[str]:
    """Keys that one stage alone has."""
    if stage == "dpo":
        return [
            key("pref_loss", "sigmoid", "or ipo, orpo, simpo, ...: docs/stages.md"),
            key("pref_beta", "0.1", "a higher beta keeps the model closer to its reference"),
        ]
    return [key("pref_beta", "0.1")] if stage == "kto" else []


def cut_and_pack(stage: str) -> list[str]:
    """How rows are made."""
    if stage == "pt":
        return [
            key(
                "packing",
                "true",
                "several texts share a row, isolated from each other",
            )
        ]
    lines = [key("cutoff_strategy", "keep_tail", "keeps the end of a long prompt (the question)")]
    if stage == "sft":
        lines.append(
            key(
                "packing",
                "false",
                "true: several samples share a row, isolated from each other",
            )
        )
    return lines
