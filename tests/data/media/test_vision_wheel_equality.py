"""Rows with images and videos: token ids, labels, pixels and grids equal LLaMA-Factory 0.9.5's, for
its templates of each family. Where it fails or lacks a family, the model's own processor is asked.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lf_oracle
import numpy as np
import pytest
import torch

import tiny_media
from data_arguments import make_args
from longfactory.data.media.load import load_unit
from longfactory.data.module import load_datasets
from longfactory.data.templates import get_template

TEMPLATES = {
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_nothink": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "gemma3": "gemma3",
    "intern_vl": "intern_vl",
    "glm4v": "glm4v",
    "mllama": "mllama",
}
SIZES = [(200, 120), (64, 300), (1000, 900), (20, 20), (3000, 12), (640, 480), (57, 56), (2, 900)]
MODES = ["RGB", "RGBA", "L", "P", "CMYK", "LA", "1"]
ALPACA = {
    "columns": {"prompt": "instruction", "query": "input", "response": "output", "images": "images"}
}
SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "images": "images", "videos": "videos"},
}


class VideoSizes:
    """A video processor's sizes by transformers' own functions, without torchvision."""

    temporal_patch_size = merge_size = 2

    def __init__(self, family: str):
        self.patch_size = 16 if family == "qwen3_vl" else 14
        name = "qwen2_vl" if family == "qwen2_vl" else "qwen3_vl"
        self.resize = lf_oracle.function_of(
            f"models/{name}/video_processing_{name}.py", "smart_resize"
        )
        self.frames = name != "qwen2_vl"
        self.size = {
            "qwen2_vl": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
            "qwen3_vl": {"shortest_edge": 4096, "longest_edge": 25165824},
        }[name]

    def __call__(self, videos: Any, video_metadata: Any = None, **_: Any) -> dict[str, Any]:
        grids = []
        for video in videos:
            width, height = video[0].size
            more = {"num_frames": len(video), "temporal_factor": 2} if self.frames else {}
            height, width = self.resize(
                height=height,
                width=width,
                factor=self.patch_size * 2,
                min_pixels=self.size["shortest_edge"],
                max_pixels=self.size["longest_edge"],
                **more,
            )
            grids.append([len(video) // 2, height // self.patch_size, width // self.patch_size])
        metadata = [SimpleNamespace(**m) for m in video_metadata or []]
        return {"video_grid_thw": torch.tensor(grids), "video_metadata": metadata}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(SIZES):
        image = tiny_media.picture(*size, seed=i, mode=MODES[i % len(MODES)])
        form = "TIFF" if image.mode == "CMYK" else "PNG"
        image.save(folder / f"{i}.png", form)
    return folder


@pytest.fixture(scope="module")
def clips(pictures: Path) -> list[str]:
    pytest.importorskip("av")
    made = {"a.mp4": (33, 64, 48, 8), "b.mp4": (7, 320, 200, 2), "c.avi": (40, 90, 160, 25)}
    for name, facts in made.items():
        tiny_media.write_video(pictures / name, *facts)
    return list(made)


def processing_and_oracle(tmp_path: Path, family: str, args: Any) -> tuple[Any, Any, Any]:
    tokens = tiny_media.tokenizer(family)
    video = VideoSizes(family) if family in ("qwen2_vl", "qwen3_vl") else None
    fake = tiny_media.oracle_processor(family, tokens, args, video)
    if family == "qwen3_vl":
        from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

        fake._calculate_timestamps = lambda *a: Qwen3VLProcessor._calculate_timestamps(None, *a)
    settings = {"size": video.size, "patch_size": video.patch_size} if video else None
    processing = tiny_media.processing(tmp_path / "model", family, args, tokens, settings)
    return tokens, processing, lf_oracle.VisionOracle(fake)


def rows_of(family: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns with no to three images."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        images: list[str] = []
        turns = []
        for turn in range(rng.randint(1, 3)):
            text = rng.choice(["What is it?", "Look:\n", "", "the <b>lazy</b> dog "])
            for _ in range(rng.choice([0, 1, 1, 2] if turn == 0 else [0, 0, 1])):
                images.append(f"{rng.randrange(len(SIZES))}.png")
                text = rng.choice(["<image>" + text, text + "<image>", "a <image> b" + text])
            answer = rng.choice(["A red square.", "The dog.\n", "1 2 3"])
            turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        rows.append({"conversations": turns, "images": images})
    return rows


def compare(
    tmp_path: Path, write_data: Any, stage: str, info: Any, rows: Any, family: str, args: Any
) -> Any:
    tokens, processing, oracle = processing_and_oracle(tmp_path, family, args)
    folder = write_data(d=(info, rows))
    args.dataset, args.dataset_dir = "d", str(folder)
    template = get_template(args, tokens)
    loaded = load_datasets(
        args, stage=stage, tokenizer=tokens, template=template, seed=1, media=processing
    ).train
    oracle_tokens = tiny_media.tokenizer(family)
    expected = oracle.encode(stage, rows, info, oracle_tokens, args)
    assert not loaded.report.bad, loaded.report.bad_rows
    return loaded, expected, processing, oracle


@pytest.mark.parametrize("template", TEMPLATES)
def test_vision_sft_rows_equal_the_wheel(
    template: str, tmp_path: Path, write_data: Any, pictures: Path
) -> None:
    family = TEMPLATES[template]
    args = make_args(template=template, media_dir=str(pictures), cutoff_len=100_000)
    rows = rows_of(family, 12, seed=len(template))
    data, expected, processing, oracle = compare(
        tmp_path, write_data, "sft", SHAREGPT, rows, family, args
    )
    assert len(data) == len(expected["input_ids"]) == 12
    plugin = oracle.template(tiny_media.tokenizer(family), args).mm_plugin
    for i, row in enumerate(rows):
        (document,) = data[i]
        assert document.input_ids.tolist() == expected["input_ids"][i]
        assert document.labels.tolist() == expected["labels"][i]
        paths = [str(pictures / name) for name in row["images"]]
        assert [u.reference.path for u in document.media] == paths
        if not paths:
            continue
        pixels = [load_unit(u, processing)["pixel_values"] for u in document.media]
        theirs = plugin._get_mm_inputs(paths, [], [], oracle.processor)
        ours = torch.cat(pixels)
        expected_pixels = torch.as_tensor(np.asarray(theirs["pixel_values"]))
        expected_pixels = (
            expected_pixels.flatten(0, -4) if expected_pixels.dim() > 4 else expected_pixels
        )
        if family == "mllama":  # padded to max_image_tiles
            tiles = [u.grid[0] for u in document.media]
            kept = expected_pixels.reshape(len(paths), -1, *ours.shape[1:])
            expected_pixels = torch.cat([k[:n] for k, n in zip(kept, tiles, strict=True)])
        assert torch.equal(ours, expected_pixels.float())
        if "image_grid_thw" in theirs:
            assert [list(u.grid) for u in document.media] == theirs["image_grid_thw"].tolist()


@pytest.mark.parametrize(
    ("template", "keys"),
    [
        ("qwen2_vl", {"image_max_pixels": 40_000, "image_min_pixels": 9_000}),
        ("qwen3_vl_nothink", {"image_max_pixels": 200_000, "image_min_pixels": 90_000}),
        ("intern_vl", {"crop_to_patches": True}),
    ],
)
def test_vision_keys_of_images_equal_the_wheel(
    template: str, keys: dict[str, Any], tmp_path: Path, write_data: Any, pictures: Path
) -> None:
    args = make_args(template=template, media_dir=str(pictures), cutoff_len=100_000, **keys)
    rows = rows_of(TEMPLATES[template], 6, seed=5)
    family = TEMPLATES[template]
    data, expected, processing, _ = compare(
        tmp_path, write_data, "sft", SHAREGPT, rows, family, args
    )
    for i in range(len(rows)):
        (document,) = data[i]
        assert document.input_ids.tolist() == expected["input_ids"][i]
        for unit in document.media:
            load_unit(unit, processing)  # which checks the number of patches or tiles


@pytest.mark.parametrize("template", ["qwen2_vl", "qwen3_vl_nothink", "intern_vl"])
def test_vision_videos_equal_the_wheel(
    template: str, tmp_path: Path, write_data: Any, pictures: Path, clips: list[str]
) -> None:
    family = TEMPLATES[template]
    args = make_args(
        template=template,
        media_dir=str(pictures),
        cutoff_len=100_000,
        video_max_pixels=30_000,
        video_maxlen=12,
        video_fps=2.0,
    )
    frames = [f"{i}.png" for i in (0, 0, 0)]
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"<video>{more}What?"},
                {"from": "gpt", "value": "A dog."},
            ],
            "videos": [video],
            "images": ["0.png"] * bool(more),
        }
        for video, more in [*((c, "") for c in clips), (clips[0], " <image> "), (frames, "")]
    ]
    data, expected, processing, _ = compare(
        tmp_path, write_data, "sft", SHAREGPT, rows, family, args
    )
    for i in range(len(rows)):
        (document,) = data[i]
        assert document.input_ids.tolist() == expected["input_ids"][i]
        assert document.labels.tolist() == expected["labels"][i]
        for unit in document.media:
            whole = load_unit(unit, processing)["pixel_values"]
            parts = [
                load_unit(unit, processing, k, k + 1)["pixel_values"] for k in range(unit.steps)
            ]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_vision_pairs_and_labels_equal_the_wheel(
    stage: str, tmp_path: Path, write_data: Any, pictures: Path
) -> None:
    args = make_args(template="qwen2_vl", media_dir=str(pictures), cutoff_len=100_000)
    row = {"instruction": "<image>What is\n<image>", "input": "it?", "images": ["0.png", "6.png"]}
    if stage == "dpo":
        rows = [row | {"chosen": "A dog.", "rejected": "A red square."}] * 3
        info = {
            "ranking": True,
            "columns": ALPACA["columns"] | {"chosen": "chosen", "rejected": "rejected"},
        }
        info["columns"].pop("response")
    else:
        rows = [row | {"output": f"A dog {i}.", "label": i % 2 == 0} for i in range(3)]
        info = {"columns": ALPACA["columns"] | {"kto_tag": "label"}}
    data, expected, _, _ = compare(tmp_path, write_data, stage, info, rows, "qwen2_vl", args)
    prefixes = ("chosen_", "rejected_") if stage == "dpo" else ("", "kl_")
    for i in range(3):
        for document, prefix in zip(data[i], prefixes, strict=True):
            assert document.input_ids.tolist() == expected[f"{prefix}input_ids"][i]
            assert document.labels.tolist() == expected[f"{prefix}labels"][i]
        keys = [[u.key for u in document.media] for document in data[i]]
        assert keys[0] == keys[1] and len(keys[0]) == 2  # the prompt's, in both documents


# -- the model's own processor, where the wheel fails or lacks the family --------------------------


def text_of(
    tmp_path: Path, write_data: Any, family: str, row: dict[str, Any], template: str, **keys: Any
) -> tuple[str, Any, Any]:
    """The text of one row, its document, and the processing."""
    args = make_args(template=template, cutoff_len=100_000, **keys)
    tokens = tiny_media.tokenizer(family)
    processing = tiny_media.processing(tmp_path / "model", family, args, tokens)
    args.dataset, args.dataset_dir = "d", str(write_data(d=(SHAREGPT, [row])))
    template_object = get_template(args, tokens)
    found = load_datasets(
        args, stage="sft", tokenizer=tokens, template=template_object, seed=1, media=processing
    )
    (document,) = found.train[0]
    text = tokens.decode(document.input_ids, skip_special_tokens=False)
    return text, document, processing


def one_row(what: str, **media: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{what}What?"}, {"from": "gpt", "value": "A dog."}]
    return {"conversations": turns} | media


@pytest.mark.parametrize("size", [(3000, 900), (900, 3000), (640, 600)])
def test_vision_pan_and_scan_equals_the_processor(
    size: tuple[int, int], tmp_path: Path, write_data: Any
) -> None:
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tiny_media.picture(*size).save(tmp_path / "p.png")
    text, document, processing = text_of(
        tmp_path,
        write_data,
        "gemma3",
        one_row("<image>", images=["p.png"]),
        "gemma3",
        media_dir=str(tmp_path),
        image_do_pan_and_scan=True,
    )
    (unit,) = document.media
    own = SimpleNamespace(
        full_image_sequence="\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
    )
    counts = {"num_crops": [unit.steps - 1]}
    assert Gemma3Processor.replace_image_token(own, counts, 0) + "What?" in text
    assert (unit.steps > 1) == (size != (640, 600))
    assert len(unit.spans) == unit.steps
    pixels = load_unit(unit, processing)["pixel_values"]
    assert torch.equal(load_unit(unit, processing, 0, 1)["pixel_values"], pixels[:1])


@pytest.mark.parametrize("size", [(300, 100), (90, 400), (56, 56), (1200, 800)])
def test_vision_llava_onevision_equals_the_processor(
    size: tuple[int, int], tmp_path: Path, write_data: Any
) -> None:
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    tiny_media.picture(*size).save(tmp_path / "p.png")
    _, document, processing = text_of(
        tmp_path,
        write_data,
        "llava_onevision",
        one_row("<image>", images=["p.png"]),
        "llava_next_qwen",
        media_dir=str(tmp_path),
    )
    (unit,) = document.media
    pixels = load_unit(unit, processing)["pixel_values"]
    own = SimpleNamespace(
        image_processor=processing.family.processor,
        num_image_tokens=16,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_select_strategy="full",
        image_token="<image>",
    )
    own._get_unpadded_features = lambda *a: LlavaOnevisionProcessor._get_unpadded_features(own, *a)
    own._get_number_of_features = lambda *a: LlavaOnevisionProcessor._get_number_of_features(
        own, *a
    )
    made = {
        "batch_num_images": [1],
        "image_sizes": [list(unit.sizes)],
        "pixel_values": pixels[None],
    }
    expected = LlavaOnevisionProcessor.replace_image_token(own, made, 0)
    assert unit.tokens == expected.count("<image>") and not unit.even


def test_vision_glm4v_video_equals_the_processor(
    tmp_path: Path, write_data: Any, pictures: Path, clips: list[str]
) -> None:
    from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
    from transformers.video_utils import VideoMetadata

    text, document, processing = text_of(
        tmp_path,
        write_data,
        "glm4v",
        one_row("<video>", videos=[clips[0]]),
        "glm4v",
        media_dir=str(pictures),
    )
    (unit,) = document.media
    sampled = list(unit.reference.sampled)
    own = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2),
        image_token="<|image|>",
    )
    own.replace_frame_token_id = lambda *a, **k: Glm4vProcessor.replace_frame_token_id(own, *a, **k)
    metadata = VideoMetadata(total_num_frames=33, fps=8.0, frames_indices=sampled)
    made = {"video_grid_thw": torch.tensor([unit.grid]), "video_metadata": [metadata]}
    expected = Glm4vProcessor.replace_video_token(own, made, 0)
    assert f"<|begin_of_video|>{expected}<|end_of_video|>What?" in text
    assert load_unit(unit, processing)["pixel_values"].shape[0] == unit.patches
