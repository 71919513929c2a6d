"""Makes what `examples/vision/*.yaml` train on: pictures, a short video as frames, questions about
them, and the files of a tiny Qwen3-VL without weights.

    python examples/vision/make.py

Everything is drawn from fixed seeds: the files in this folder are its output.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
COLOURS = {"red": "#d33", "green": "#3a3", "blue": "#36c", "orange": "#e80"}
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def bars(heights: list[int], colour: str) -> Image.Image:
    """A bar chart."""
    image = Image.new("RGB", (160, 96), "white")
    draw = ImageDraw.Draw(image)
    for i, height in enumerate(heights):
        left = 12 + i * 36
        draw.rectangle((left, 88 - 8 * height, left + 24, 88), fill=COLOURS[colour])
    draw.line((6, 88, 154, 88), fill="black")
    return image


def words(text: str, colour: str) -> Image.Image:
    """A line of text."""
    image = Image.new("RGB", (128, 64), "white")
    ImageDraw.Draw(image).text((10, 24), text, fill=COLOURS[colour])
    return image


def ball(place: int, colour: str) -> Image.Image:
    """A frame of a ball that moves from left to right."""
    image = Image.new("RGB", (96, 64), "#eee")
    left = 4 + place * 10
    ImageDraw.Draw(image).ellipse((left, 24, left + 16, 40), fill=COLOURS[colour])
    return image


def make_data() -> None:
    """Pictures, and rows of three data sets that ask about them."""
    draw = random.Random(0)
    pictures = HERE / "pictures"
    pictures.mkdir(exist_ok=True)
    talks, pairs = [], []
    names = list(COLOURS)
    for i in range(8):
        colour = names[i % 4]
        heights = [draw.randint(1, 9) for _ in range(4)]
        bars(heights, colour).save(pictures / f"bars_{i}.png", optimize=True)
        text = draw.choice(["long rows", "exact", "images", "video"])
        words(text, colour).save(pictures / f"words_{i}.png", optimize=True)
        question = "<image>What colour are the bars, and how many are there?"
        answer = f"There are four {colour} bars, of the heights {', '.join(map(str, heights))}."
        talks.append(
            {"instruction": question, "output": answer, "images": [f"pictures/bars_{i}.png"]}
        )
        both = [f"pictures/bars_{i}.png", f"pictures/words_{i}.png"]
        question = "<image><image>What is written in the second picture?"
        talks.append({"instruction": question, "output": f"It says: {text}.", "images": both})
        other = names[(i + 1) % 4]
        pairs.append(
            {
                "instruction": "<image>Which colour is it?",
                "chosen": f"It is {colour}.",
                "rejected": f"It is {other}.",
                "images": [f"pictures/bars_{i}.png"],
            }
        )
    for colour in names[:2]:
        frames = []
        for place in range(8):
            name = f"pictures/ball_{colour}_{place}.png"
            ball(place, colour).save(HERE / name, optimize=True)
            frames.append(name)
        talks.append(
            {
                "instruction": "<video>What happens?",
                "output": f"A {colour} ball moves from left to right.",
                "videos": [frames],
            }
        )
    talks.append({"instruction": "What is one and one?", "output": "It is two."})
    for row in talks:
        row.setdefault("images", [])
        row.setdefault("videos", [])
    answers = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "pictures": {
            "file_name": "pictures.json",
            "columns": {
                "prompt": "instruction",
                "response": "output",
                "images": "images",
                "videos": "videos",
            },
        },
        "picture_pairs": {
            "file_name": "picture_pairs.json",
            "ranking": True,
            "columns": answers | {"images": "images"},
        },
    }
    for name, rows in (
        ("pictures", talks),
        ("picture_pairs", pairs),
        ("dataset_info", info),
    ):
        _write(HERE / f"{name}.json", rows)


def make_model() -> None:
    """Configuration, tokenizer (a token for each byte) and image processor of a tiny Qwen3-VL."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = HERE / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate([*SPECIAL, *letters])}, []))
    raw.add_special_tokens(list(SPECIAL))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    tower = {
        "model_type": "qwen3_vl_vision",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    ids = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for kind, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": tower,
        "tie_word_embeddings": False,
        **ids,
    }
    sizes = {"shortest_edge": 1024, "longest_edge": 1048576}
    processor = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": sizes,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write(folder / "config.json", config)
    _write(
        folder / "preprocessor_config.json",
        processor | {"image_processor_type": "Qwen2VLImageProcessor"},
    )
    _write(
        folder / "video_preprocessor_config.json",
        processor | {"video_processor_type": "Qwen3VLVideoProcessor"},
    )


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make_data()
    make_model()
