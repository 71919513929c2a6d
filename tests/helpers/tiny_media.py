"""Tiny tokenizers and image processors of vision-language families, and folders of models that hold
them, for tests: no download, the families' own special tokens and classes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TOKENS = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<img>", "</img>"),
    *("<IMG_CONTEXT>", "<video>", "<image>", "<|image|>", "<|video|>", "[gMASK]", "<sop>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nWhat is shown in the picture? A red square.",
    "Here is the original image and here are some crops to help you see better Frame1: Frame12:",
    "<0.5 seconds> <12.5 seconds> user assistant system model 0 1 2 3 4 5 6 7 8 9",
] * 4
NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_NAMES_OF = {
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "intern_vl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}


def tokenizer(family: str = "qwen2_vl") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that has the special tokens of all families."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(CORPUS, trainer)
    named = _NAMES_OF.get(family, {})
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        eos_token="<eos>" if family == "gemma3" else "<|im_end|>",
        bos_token="<bos>" if family == "gemma3" else None,
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(named),
    )


def image_processor(family: str) -> Any:
    """The family's image processor (PIL back end), with small sizes."""
    if family == "qwen2_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    if family == "qwen3_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        return Qwen2VLImageProcessorPil(
            patch_size=16,
            size={"shortest_edge": 65536, "longest_edge": 16777216},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
    if family == "glm4v":
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        return Glm4vImageProcessorPil()
    if family == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
    if family == "intern_vl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        return GotOcr2ImageProcessorPil(size={"height": 56, "width": 56})
    if family == "llava_onevision":
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        pins = [[a, b] for a in (56, 112, 168) for b in (56, 112, 168)]
        return LlavaOnevisionImageProcessorPil(
            size={"height": 56, "width": 56}, image_grid_pinpoints=pins
        )
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    return MllamaImageProcessorPil(size={"height": 56, "width": 56})


MODEL_TYPES = {"qwen2_vl": "qwen2_5_vl", "intern_vl": "internvl"}
PROCESSOR: dict[str, dict[str, Any]] = {
    "gemma3": {"image_seq_length": 4},
    "intern_vl": {"image_seq_length": 4},
    "llava_onevision": {"num_image_tokens": 16, "vision_aspect_ratio": "anyres_max_9"},
}


def config(family: str) -> dict[str, Any]:
    """What data need of config.json."""
    patch = 16 if family == "qwen3_vl" else 14
    found: dict[str, Any] = {
        "model_type": MODEL_TYPES.get(family, family),
        "vision_config": {"patch_size": patch},
    }
    if family == "gemma3":
        found["mm_tokens_per_image"] = 4
    if family == "intern_vl":
        found["image_seq_length"] = 4
    return found


def folder(path: Path, family: str, video: dict[str, Any] | None = None) -> Path:
    """The processor's files of a model. `video`: settings of its video processor."""
    path.mkdir(parents=True, exist_ok=True)
    image_processor(family).save_pretrained(path)
    about = {"processor_class": "X"} | PROCESSOR.get(family, {})
    (path / "processor_config.json").write_text(json.dumps(about), encoding="utf-8")
    if video is not None:
        text = json.dumps(video)
        (path / "video_preprocessor_config.json").write_text(text, encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config(family)), encoding="utf-8")
    return path


def processing(
    path: Path, family: str, args: Any, tokens: Any = None, video: dict[str, Any] | None = None
) -> Any:
    """The processing of media that a model in such a folder has."""
    from longfactory.data.media.process import make_processing

    found = make_processing(
        str(folder(path, family, video)), config(family), args, tokens or tokenizer(family)
    )
    assert found is not None
    return found


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours, which resize much alike in every library."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(3 * x + seed + k) * np.cos(2 * y - k) for k in range(3)]
    pixels = (127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def write_video(
    path: Path,
    frames: int,
    width: int = 64,
    height: int = 48,
    rate: int = 8,
    codec: str = "mpeg4",
    options: dict[str, str] | None = None,
) -> Path:
    """A short video; needs PyAV."""
    import av

    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = 4
        for i in range(frames):
            frame = av.VideoFrame.from_image(picture(width, height, seed=i))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def oracle_processor(family: str, tokens: Any, args: Any, video: Any = None) -> SimpleNamespace:
    """What the wheel's plug-ins read of a processor."""
    from longfactory.data.media.family import MediaKeys

    images = image_processor(family)
    found = SimpleNamespace(
        image_processor=images,
        video_processor=images if video is None else video,
        tokenizer=tokens,
        model_input_names=["second_per_grid_ts"],
    )
    for key in (
        *("image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches"),
        *("video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen"),
    ):
        default = getattr(MediaKeys(), key)
        setattr(found, key, default if getattr(args, key, None) is None else getattr(args, key))
    if family == "gemma3":
        found.boi_token = "<start_of_image>"
        found.full_image_sequence = (
            "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
        )
    if family == "intern_vl":
        found.image_seq_length = 4
    return found
