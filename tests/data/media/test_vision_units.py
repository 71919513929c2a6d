"""Media units on their way from documents to rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longfactory.data.collate import collate
from longfactory.data.media.units import (
    Dealt,
    LoadedMedia,
    MediaReference,
    MediaUnit,
    from_json,
    to_json,
)
from longfactory.data.row import TokenizedDocument


def image(start: int, tokens: int = 3, path: str = "/m/a.png") -> MediaUnit:
    return MediaUnit("image", MediaReference(path, size=9), (1, 2, 6), ((start, tokens),))


def test_vision_units_keep_their_places_in_a_row() -> None:
    documents = [
        TokenizedDocument([1, 7, 7, 7, 2], [-100] * 5, media=(image(1),)),
        TokenizedDocument([3, 4], [3, 4]),
        TokenizedDocument([7, 7, 7, 5], [-100] * 4, media=(image(0, path="/m/b.png"),)),
    ]
    row = collate([[documents[0]], documents[1:]], 8, pad_id=0)
    assert len(row) == 16
    assert [(u.spans, u.document) for u in row.media] == [(((1, 3),), 0), (((7, 3),), 2)]
    for unit in row.media:
        start, count = unit.spans[0]
        assert row.input_ids[start : start + count].tolist() == [7] * count
    assert [u.reference.path for u in row.media] == ["/m/a.png", "/m/b.png"]


def test_vision_pixels_move_with_their_row() -> None:
    row = collate([[TokenizedDocument([7, 7, 7], [-100] * 3, media=(image(0),))]], 1, pad_id=0)
    row.pixels = (LoadedMedia(Dealt(0, 0, 1), {"pixel_values": torch.ones(12, 4)}),)
    moved = row.to("meta")
    assert moved.pixels[0].tensors["pixel_values"].device.type == "meta"
    assert moved.media == row.media and moved.pixels[0].dealt == Dealt(0, 0, 1)


def test_vision_units_are_read_as_they_were_written(tmp_path: Path) -> None:
    frames = (MediaReference(offset=5, length=6), MediaReference("/m/f.png", size=3))
    units = [
        image(4),
        MediaUnit(
            "video",
            MediaReference(frames=frames),
            (1, 4, 4),
            ((3, 4), (9, 4)),
            steps=2,
            tail=0,
            sizes=(3, 4),
            seconds_per_step=0.5,
            place="d.json row 3",
            part=2,
        ),
        MediaUnit(
            "video", MediaReference("/m/v.mp4", sampled=(0, 3), pts=(0, 9)), (1, 2, 2), ((0, 1),)
        ),
    ]
    read = [from_json(json.loads(json.dumps(to_json(u))), tmp_path) for u in units]
    assert read[0] == units[0] and read[2] == units[2]
    assert read[1].reference.frames[0].path == str(tmp_path / "media.bin")
    assert read[1].spans == units[1].spans and read[1].seconds_per_step == 0.5


def test_vision_features_of_steps() -> None:
    unit = MediaUnit("video", MediaReference("/m/v.mp4"), (4, 2, 2), ((2, 9),), steps=4, tail=1)
    assert [unit.features(k, k + 1) for k in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 9)]
    whole = MediaUnit("image", MediaReference("/m/a"), (3, 2, 2), ((0, 7),), steps=3, even=False)
    assert whole.features(0, 3) == (0, 7)
    with pytest.raises(ValueError, match="dealt whole"):
        whole.features(0, 1)


def test_vision_key_tells_media_apart() -> None:
    assert image(0).key == image(9).key != image(0, path="/m/b.png").key
    inside = [
        MediaUnit("image", MediaReference(data=d), (1, 2, 2), ((0, 1),)) for d in (b"a", b"b")
    ]
    assert inside[0].key != inside[1].key
