"""The families of vision-language models that are known, by type of model and by template."""

from __future__ import annotations

from longfactory.data.media.family import Family
from longfactory.data.media.grid_families import GLM4V, Qwen2VL, Qwen3VL
from longfactory.data.media.tile_families import Gemma3, InternVL, LlavaOnevision, Mllama

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (Qwen2VL, Qwen3VL, GLM4V, Gemma3, InternVL, LlavaOnevision, Mllama)
}
OF_MODEL = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl",
    "glm4v": "glm4v",
    "glm4v_moe": "glm4v",
    "gemma3": "gemma3",
    "internvl": "intern_vl",
    "llava_onevision": "llava_onevision",
    "mllama": "mllama",
}
"""The family of each type of model (config.json: model_type)."""
OF_TEMPLATE = {
    "qwen2_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_nothink": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_nothink": "qwen3_vl",
    "qwen3_6": "qwen3_vl",
    "glm4v": "glm4v",
    "glm4_5v": "glm4v",
    "gemma3": "gemma3",
    "intern_vl": "intern_vl",
    "intern_s1": "intern_vl",
    "llava_next_qwen": "llava_onevision",
    "mllama": "mllama",
}
"""The family whose media each template writes."""
