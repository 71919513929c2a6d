"""The main job in one command: fine-tune a pretrained model on long documents that are sharded over
two processes.

Trains with sequence_parallel_size 2, trains again with 1, draws both loss curves into one picture,
checks that they are the same line, and asks the saved model a question with plain transformers.
Needs no GPU and no model hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "quickstart.yaml"
OUT = ROOT / "outputs" / "quickstart"
# Same arithmetic in another order: float32 agrees to about 1e-6 a step; bfloat16 (on GPUs) keeps 8
# bits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}


def train(size: int, dtype: str, gpus: bool) -> list[dict]:
    """One run in processes of its own, with its progress bar. Returns the lines of its log.

    Raises:
        SystemExit: it failed, or was stopped; it has said why.
    """
    folder = OUT / f"sp{size}"
    keys = [f"sequence_parallel_size={size}", f"nproc_per_node={size}", f"output_dir={folder}"]
    keys += ["bf16=true"] if dtype == "bfloat16" else []
    keys += [] if gpus else ["use_cpu=true"]
    threads = max(1, (os.cpu_count() or 2) // size)
    command = [sys.executable, "-m", "longfactory.cli", "train", str(CONFIG), *keys]
    print(f"\n$ longfactory train examples/quickstart.yaml {' '.join(keys[:2])}", flush=True)
    started = time.time()
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    status = None
    while status is None:
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C reaches the run too, which stops
            status = run.wait()
    if status != 0:
        print(f"The run ended with exit status {status}.", file=sys.stderr)
        sys.exit(1)
    print(f"sequence_parallel_size {size}: {time.time() - started:.0f} s", flush=True)
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def curve(log: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value): of a step that has two rows, the last."""
    return list({line["current_steps"]: line[name] for line in log if name in line}.items())


def difference(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> float:
    """The largest, relative."""
    return max(abs(x - y) / abs(x) for (_, x), (_, y) in zip(a, b, strict=True))


def ask(folder: Path, question: str) -> str:
    """The saved folder is an ordinary Hugging Face checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(
        **inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def main() -> int:
    import torch

    from longfactory.train.plots import overlay

    started = time.time()
    gpus = torch.cuda.device_count() >= 2
    dtype = "bfloat16" if gpus else "float32"
    split, whole = train(2, dtype, gpus), train(1, dtype, gpus)

    a, b = curve(whole, "loss"), curve(split, "loss")
    before, after = curve(whole, "eval_loss"), curve(split, "eval_loss")
    picture = OUT / "loss_sp1_sp2.png"
    overlay(
        {"sequence_parallel_size: 1": before, "sequence_parallel_size: 2": after},
        picture,
        title="SmolLM2-135M-Instruct on Python's manual, rows of some 2,500 tokens",
        ylabel="loss on documents that were not trained",
    )
    training, evaluation = difference(a, b), difference(before, after)
    peak = max(line["peak_memory_gib"] for line in split if "peak_memory_gib" in line)
    print(f"\nTraining loss     {a[0][1]:.4f} -> {a[-1][1]:.4f} in {len(a)} steps")
    losses = ", ".join(f"{loss:.4f}" for _, loss in after)
    print(f"Evaluation loss   {losses} (sharded over two processes)")
    print(
        f"SP=1 against SP=2 largest relative difference of the training loss {training:.1e}, of the"
        f" evaluation loss {evaluation:.1e} (allowed {TOLERANCE[dtype]:.0e})"
    )
    print(f"Memory            {peak:.1f} GiB in each of two processes")
    print(f"Picture           {picture.relative_to(ROOT)}")

    question = 'What does the "assert" statement do in Python?'
    print(f"\nThe saved model, read by plain transformers from {(OUT / 'sp2').relative_to(ROOT)}:")
    print(f"  Q: {question}\n  A: {ask(OUT / 'sp2', question)}")
    print(f"\nDone in {time.time() - started:.0f} s.")
    problems = []
    if max(training, evaluation) > TOLERANCE[dtype]:
        problems.append("the two loss curves differ")
    if not after[-1][1] < after[0][1]:
        problems.append("the evaluation loss did not fall")
    if problems:
        print(f"FAILED: {' and '.join(problems)}.", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
