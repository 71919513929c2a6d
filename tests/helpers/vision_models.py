"""Tiny random vision-language models and rows with images, and what one process makes of them with
transformers' own forward.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longfactory.sp import vision
from longfactory.sp.text_model import model_class

IMAGE, VIDEO = 250, 251
"""Token ids of placeholders."""

_TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_GRID = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
_QWEN3_TOWER = _GRID | {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {"rope_parameters": _MROPE, "head_dim": 16},
        "vision_config": _GRID
        | {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _MROPE, "head_dim": 16},
        "vision_config": _GRID
        | {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": _MROPE, "head_dim": 16},
        "vision_config": _QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_vl_moe": {
        "text_config": {
            "rope_parameters": _MROPE,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        "vision_config": _QWEN3_TOWER | {"deepstack_visual_indexes": [0, 2]},
    },
    "qwen3_5": {
        "text_config": {
            "rope_parameters": _MROPE | {"partial_rotary_factor": 1.0},
            "head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": _QWEN3_TOWER,
    },
    "glm4v": {
        "text_config": {
            "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
        },
        "vision_config": _GRID
        | {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "image_size": 16,
        },
    },
    "qwen3_5_moe": {
        "text_config": {
            "rope_parameters": _MROPE | {"partial_rotary_factor": 1.0},
            "head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        "vision_config": _QWEN3_TOWER,
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        "vision_config": _GRID
        | {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "image_size": 16,
        },
    },
    "llava_onevision": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": _SIGLIP | {"model_type": "siglip_vision_model"},
        "image_grid_pinpoints": [[16, 16], [16, 32], [32, 32]],
        "vision_aspect_ratio": "anyres_max_9",
    },
    "gemma3": {
        "text_config": {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": _SIGLIP | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    },
}


def config(family: str) -> Any:
    """A configuration of some ten thousand parameters."""
    given = {k: v for k, v in MODELS[family].items()}
    given["text_config"] = _TEXT | given["text_config"]
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    if family == "gemma3":
        ids = {"image_token_index": IMAGE}
    if family == "llava_onevision":
        ids = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return CONFIG_MAPPING[family](**ids, **given, tie_word_embeddings=False)


def model(family: str, dtype: torch.dtype = torch.float64, attention: str = "eager") -> Any:
    """The same on every rank, with weights large enough that attention matters."""
    torch.manual_seed(0)
    made = model_class(config(family)).from_config(
        attn_implementation=attention, experts_implementation="eager"
    )
    made = made.to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "linear_attn" in name:
                noise *= 0.3  # decays near 0 and 1 enlarge the rounding of their recurrence
            if p.dim() >= 2:
                p.copy_(noise / min(p.shape[-1], 64) ** 0.5)
            else:
                p.add_(0.1 * noise)
    return made


@dataclasses.dataclass
class Document:
    """Tokens of one document, its images, and where their placeholders are: one list of intervals
    for each part of each image.
    """

    ids: Tensor
    images: list[vision.Images]
    places: list[list[tuple[int, int]]]
    kinds: Tensor
    seconds: list[float]


def document(family: str, pieces: list[Any], seed: int = 0, dtype: Any = torch.float64) -> Document:
    """A document of pieces in order: a number of text tokens; `(height, width)` of an image and
    `(frames, height, width)` of a video in merged patches; "image" where images have one size;
    "tiles" and "frames" of LLaVA-OneVision.
    """
    draw = torch.Generator().manual_seed(seed)
    ids: list[Tensor] = []
    images, places, kinds, seconds = [], [], [], []
    length = 0

    def add(token_ids: Tensor, kind: int) -> None:
        nonlocal length
        ids.append(token_ids)
        kinds.append(torch.full((len(token_ids),), kind))
        length += len(token_ids)

    def text(n: int) -> None:
        add(torch.randint(3, 240, (n,), generator=draw), 0)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=dtype)

    for piece in pieces:
        if isinstance(piece, int):
            text(piece)
        elif piece == "tiles":  # 16 x 24 pixels, in a base of 16 tokens and two tiles of 4 x 4
            images.append(vision.Images("image", (3, 4, 4), pixels(3, 3, 16, 16), (16, 24)))
            number = 16 + 4 * (6 + 1)
            places.append([(length, length + number)])
            add(torch.full((number,), IMAGE), 1)
        elif piece == "frames":  # three, of 2 x 2 tokens, and one at the end
            images.append(vision.Images("video", (3, 4, 4), pixels(3, 3, 16, 16)))
            for step in range(3):
                start = length + 4 * step
                places.append([(start, start + 4 + (step == 2))])
            add(torch.full((13,), VIDEO), 2)
        elif piece == "image":
            images.append(vision.Images("image", (1, 4, 4), pixels(1, 3, 16, 16)))
            places.append([(length, length + 4)])
            add(torch.full((4,), IMAGE), 1)
        else:
            kind = "image" if len(piece) == 2 else "video"
            t, h, w = (1, *piece) if kind == "image" else piece
            grid = (t, 2 * h, 2 * w)
            images.append(vision.Images(kind, grid, pixels(t * 4 * h * w, 3 * 2 * 16)))
            token, number = (IMAGE, 1) if kind == "image" else (VIDEO, 2)
            if kind == "video":
                seconds.append(0.5)
            for step in range(t):
                if step and family.startswith("qwen3"):
                    text(2)  # timestamps
                places.append([(length, length + h * w)])
                add(torch.full((h * w,), token), number)
    return Document(torch.cat(ids), images, places, torch.cat(kinds), seconds)


def whole_inputs(family: str, doc: Document) -> dict[str, Any]:
    """What transformers' own forward of the whole model is given."""
    out: dict[str, Any] = {"input_ids": doc.ids[None], "use_cache": False}
    for kind, name in (("image", ""), ("video", "_videos")):
        chosen = [i for i in doc.images if i.kind == kind]
        if not chosen:
            continue
        out[f"pixel_values{name}"] = torch.cat([i.pixels for i in chosen])
        if family == "llava_onevision":
            pixels = out[f"pixel_values{name}"]
            if kind == "image":
                out["image_sizes"] = torch.tensor([i.size for i in chosen])
            else:
                out["pixel_values_videos"] = pixels[None]
        if family.startswith(("qwen", "glm")):
            out[f"{kind}_grid_thw"] = torch.tensor([i.grid for i in chosen])
    if family.startswith(("qwen", "glm")) and doc.images:
        out["mm_token_type_ids"] = doc.kinds[None]
        if family == "qwen2_5_vl" and doc.seconds:
            out["second_per_grid_ts"] = torch.tensor(doc.seconds)
    if family == "gemma3":
        out["token_type_ids"] = doc.kinds[None]
    return out
