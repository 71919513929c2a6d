"""The keys that the data layer reads, without a configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def make_args(**changes: Any) -> SimpleNamespace:
    """Data arguments with their defaults."""
    values: dict[str, Any] = {
        "dataset": None,
        "eval_dataset": None,
        "dataset_dir": "data",
        "media_dir": None,
        "template": "qwen",
        "cutoff_len": 2048,
        "train_on_prompt": False,
        "mask_history": False,
        "streaming": False,
        "buffer_size": 16384,
        "mix_strategy": "concat",
        "interleave_probs": None,
        "overwrite_cache": False,
        "preprocessing_batch_size": 1000,
        "preprocessing_num_workers": None,
        "max_samples": None,
        "val_size": 0.0,
        "packing": None,
        "neat_packing": False,
        "tool_format": None,
        "default_system": None,
        "enable_thinking": True,
        "preserve_thinking": False,
        "equal_pairs": False,
        "do_predict": False,
        "do_eval": False,
        "tokenized_path": None,
        "cutoff_strategy": "llamafactory",
        "on_bad_row": "skip",
        "template_compat": None,
        "pref_share_prompt": False,
    }
    others = {"eval_on_each_dataset", "data_shared_file_system", "media_allow", "crop_to_patches"}
    others |= {"image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "video_fps"}
    others |= {"video_max_pixels", "video_min_pixels", "video_maxlen"}
    unknown = changes.keys() - values.keys() - others
    assert not unknown, unknown
    return SimpleNamespace(**(values | changes))
