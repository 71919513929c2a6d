"""Vision-language models of transformers on a sharded row: images and video frames are computed by
the ranks that they are dealt to, and their features go to the ranks that hold the placeholders.

    vision.install(model)  # after hf.prepare
    inputs = hf.inputs(row, plan)
    model(**inputs, sp_media=vision.Media(...))

The model is called as for text, with its token ids alone. A hook at the text decoder's input runs
the model's own `get_image_features` on this rank's parts, a batch of them at a time, sends the
features on their way (`media.Route`) and writes what arrives over this rank's embeddings of the
placeholders. Features that enter deeper layers (deepstack) are added behind these. Nothing waits
for the device: every index is made on the host.

Where the tower or the projector is trained, a batch is computed again in the backward pass, from
pixels that stay on the host: what a step holds does not grow with the length of a video.
"""

from .configuration import (
    PositionRule,
    empty_image,
    image_token,
    own_inputs,
    patch_size,
    position_rule,
    tokens_of,
    tower_sizes,
    two_images,
)
from .families import (
    FAMILIES,
    Family,
    Images,
    base_of,
    family_of,
    has_blocks,
    is_trained,
    modules_of,
    own_parameters,
    refusal,
    unused_parameters,
)
from .installed import (
    BATCH,
    TRAINED_BATCH,
    Media,
    batches_of,
    deeper_of,
    features_of,
    has_images,
    install,
    let_in,
    own_tower,
    release,
)

__all__ = [
    "BATCH",
    "FAMILIES",
    "TRAINED_BATCH",
    "Family",
    "Images",
    "Media",
    "PositionRule",
    "base_of",
    "batches_of",
    "deeper_of",
    "empty_image",
    "family_of",
    "features_of",
    "has_blocks",
    "has_images",
    "image_token",
    "install",
    "is_trained",
    "let_in",
    "modules_of",
    "own_inputs",
    "own_parameters",
    "own_tower",
    "patch_size",
    "position_rule",
    "refusal",
    "release",
    "tokens_of",
    "tower_sizes",
    "two_images",
    "unused_parameters",
]
