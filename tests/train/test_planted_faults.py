"""Each fault that a long-sequence trainer can have in silence is found by `verify`, with the
sentence that tells which it is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longfactory.testing import run_ranks
from manual_runs import manual_run

pytestmark = pytest.mark.processes

LORA = {"finetuning_type": "lora"}
# Where a window is dropped: documents longer than the window, which is longer than a start-up probe
# of 128 tokens.
PRETRAINING = {"stage": "pt", "dataset": "manual_pt"}
WINDOW = {"window": 140, "verify_tokens": 600, **PRETRAINING}
# fault -> (a part of the sentence that names it, keys)
FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence parallelism silently off": (
        "Sequence parallelism is off: sequence_parallel_size is 2",
        {},
    ),
    "sequence parallelism off behind the context": (
        "each process computed 160 of the 160 tokens",
        {},
    ),
    "loss scaled by SP": ("The loss is 2 times what it should be", {}),
    "labels shifted twice": ("labels are shifted twice", {}),
    "prompt tokens trained": ("tokens of its prompt; train_on_prompt is not set", {}),
    "prompt tokens trained in the row": ("labels are trained,", {}),
    "a long window dropped": ("on (its sliding window is 140); 1", WINDOW),
    "the hand-written layer's window dropped": ("on (its sliding window is 140); 1", WINDOW),
    "documents leak": ("differ in document 2 of row 1 from token", {}),
    "local positions": ("differ in document", {}),
    "a dead exchange": ("differ in document 1 of row 1", {"per_device_train_batch_size": 1}),
    "gradients divided by SP": ("Every gradient is 0.5 times what it should be", {}),
    "a module left out of the reduction": ("3 trained parameters differ between processes", {}),
    "a module without gradients": (
        "No gradient reaches 3 trained parameters: model.layers.1.mlp",
        {},
    ),
    "the tower is trained": (
        "trained parameters get no gradient from any document: model.vision_tower",
        {"tower": True},
    ),
    "an adapter that is not saved": (
        "is not a complete save: 4 of 28 tensors of the model are not in what was saved",
        LORA,
    ),
}
FAST = (
    "sequence parallelism silently off",
    "loss scaled by SP",
    "labels shifted twice",
    "prompt tokens trained",
    "a long window dropped",
    "documents leak",
    "gradients divided by SP",
    "a module left out of the reduction",
)


def verified_with(keys: dict[str, Any], fault: str) -> tuple[bool, str]:
    """Body of a rank."""
    import os

    import cpu_sharding
    from longfactory.config import from_mapping
    from longfactory.errors import UserError
    from longfactory.train.verify import verify
    from planted import planted

    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    cpu_sharding.reset()
    cfg = from_mapping({k: v for k, v in keys.items() if k not in ("cache", "verify_tokens")})
    with planted(fault):
        try:
            report = verify(cfg, rows=2, tokens=keys.get("verify_tokens", 160))
        except UserError as error:
            return False, str(error)
    return report.exact, report.table()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("planted")
    return manual_run(
        folder,
        max_samples=12,
        stage="sft",
        dataset="manual_sft",
        per_device_train_batch_size=2,
        sequence_parallel_size=2,
        output_dir=str(folder / "out"),
    )


def with_keys(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`window`: the model becomes a Mistral with a sliding window of so many tokens. `tower`: a
    Gemma 3 with a vision tower.
    """
    keys = {**base, **{k: v for k, v in changes.items() if k not in ("window", "tower")}}
    if "window" not in changes and "tower" not in changes:
        return keys
    own = Path(base["model_name_or_path"])
    folder = own.parent / ("gemma3" if "tower" in changes else "mistral")
    if not folder.exists():
        shutil.copytree(own, folder)
        if "tower" in changes:
            from longfactory_dev.tiny_models import tiny_config

            tiny_config("gemma3", vocab_size=1024).save_pretrained(folder)
        else:
            config = json.loads((own / "config.json").read_text())
            config |= {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "sliding_window": changes["window"],
            }
            (folder / "config.json").write_text(json.dumps(config))
    return {**keys, "model_name_or_path": str(folder)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "fault", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FOUND]
)
def test_a_planted_fault_is_found_and_named(fault: str, base: dict[str, Any]) -> None:
    sentence, changes = FOUND[fault]
    for exact, said in run_ranks(2, verified_with, with_keys(base, changes), fault, timeout=250):
        assert not exact and sentence in said, said


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "changes", [{}, WINDOW, LORA, {"tower": True}], ids=["plain", "window", "lora", "tower"]
)
def test_without_a_fault_the_same_runs_pass(changes: dict[str, Any], base: dict[str, Any]) -> None:
    for exact, said in run_ranks(2, verified_with, with_keys(base, changes), "", timeout=250):
        assert exact, said
