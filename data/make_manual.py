"""Writes the manual_* data sets in this folder from Python's own manual (the module
pydoc_data.topics, part of every Python).

    python data/make_manual.py

The files in the repository were written with Python 3.11; another version has another edition of
the manual. The text is the Python documentation's, under the PSF licence
(https://docs.python.org/3/license.html).
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics

FOLDER = Path(__file__).parent
Section = tuple[str, str, str]  # title, text, first paragraph of prose


def sections() -> list[Section]:
    """The sections of the manual that begin with a paragraph of prose, each once."""
    found: dict[str, Section] = {}
    for name in sorted(topics):
        parts = re.split(r"(?m)^(\S[^\n]*)\n(?:\*{3,}|={3,}|-{3,})\n", topics[name])
        for title, body in zip(parts[1::2], parts[2::2], strict=True):
            body = body.strip()
            first = next(
                (p for p in body.split("\n\n") if 60 <= len(p) <= 700 and p[:1].isalpha()), None
            )
            if first is not None and body.index(first) < 400:
                title = title.replace('"', "'")
                found.setdefault(title, (title, body, " ".join(first.split())))
    return list(found.values())


def shown(section: Section, longest: int = 2500) -> str:
    """A section under its title; a long one is cut at a line's end."""
    title, body, _ = section
    if len(body) > longest:
        body = body[: body.rindex("\n", 0, longest)] + "\n[...]"
    return f"# {title}\n\n{body}"


def write(name: str, rows: list[dict]) -> None:
    text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{name}.json: {len(rows)} rows, {len(text) // 1000} kB")


def main() -> None:
    rng = random.Random(0)
    all_sections = sections()
    rng.shuffle(all_sections)

    def ask(asked: Section, length: int) -> tuple[str, str]:
        """A document of at least `length` characters, with the section somewhere in it, and a
        question about it.
        """
        texts = [shown(asked)]
        for other in rng.sample(all_sections, len(all_sections)):
            if sum(map(len, texts)) >= length:
                break
            if other is not asked:
                texts.append(shown(other))
        rng.shuffle(texts)
        return "\n\n\n".join(texts), f'How does the section "{asked[0]}" explain its subject?'

    sft = []
    for i in range(72):
        asked = all_sections[i % len(all_sections)]
        text, question = ask(asked, length=9000)
        sft.append(
            {
                "instruction": f"Read these sections of the Python manual.\n\n{text}",
                "input": f"\n{question}",
                "output": asked[2],
            }
        )
    write("manual_sft", sft[:64])
    write("manual_sft_eval", sft[64:])

    write(
        "manual_pt",
        [{"text": topics[name].strip()} for name in sorted(topics) if len(topics[name]) > 1000][
            :38
        ],
    )

    dpo, kto = [], []
    for i in range(64):
        asked, other = rng.sample(all_sections, 2)
        text, question = ask(asked, length=1500)
        prompt = {
            "role": "user",
            "content": f"Read these sections of the Python manual.\n\n{text}\n\n{question}",
        }
        right, wrong = ({"role": "assistant", "content": s[2]} for s in (asked, other))
        if i < 48:
            dpo.append({"messages": [prompt], "chosen": right, "rejected": wrong})
        good = i % 2 == 0
        kto.append({"messages": [prompt, right if good else wrong], "label": good})
    write("manual_dpo", dpo)
    write("manual_kto", kto)

    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    info = {
        "manual_sft": {"file_name": "manual_sft.json"},
        "manual_sft_eval": {"file_name": "manual_sft_eval.json"},
        "manual_pt": {"file_name": "manual_pt.json", "columns": {"prompt": "text"}},
        "manual_dpo": {
            "file_name": "manual_dpo.json",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
            "tags": tags,
        },
        "manual_kto": {
            "file_name": "manual_kto.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": tags,
        },
    }
    (FOLDER / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
