"""Media that cannot be used: counted and reported with file and row, never the end of the run."""

from __future__ import annotations

import io
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny_media
from data_arguments import make_args
from longfactory.data.media import images
from longfactory.data.media.load import load_unit
from longfactory.data.media.process import Processing, Unusable, make_processing
from longfactory.data.module import load_datasets
from longfactory.data.templates import get_template
from longfactory.errors import DataError

SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {
        "messages": "conversations",
        "images": "images",
        "videos": "videos",
        "audios": "audios",
    },
}
OPENAI = {"formatting": "openai", "columns": {"messages": "messages", "images": "images"}}


def row(text: str = "<image>What?", **media: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A dog."}]
    return {"conversations": turns} | media


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    picture = tiny_media.picture(200, 120)
    picture.save(folder / "good.png")
    picture.save(folder / "whole.jpg")
    picture.save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    for name in ("good.png", "whole.jpg"):
        data = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(data[: len(data) // 2])
    flipped = bytearray((folder / "good.png").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "a_folder.png").mkdir()
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    deep = (np.linspace(0, 65535, 200 * 120).reshape(120, 200)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    tiny_media.picture(30_000, 20).save(folder / "wide.png")
    frames = [tiny_media.picture(60, 60, seed=i) for i in range(3)]
    frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
    return folder


def load(
    tmp_path: Path, write_data: Any, folder: Path, info: Any, rows: Any, **keys: Any
) -> tuple[Any, Any]:
    args = make_args(template="qwen2_vl", media_dir=str(folder), cutoff_len=50_000, **keys)
    tokens = tiny_media.tokenizer("qwen2_vl")
    processing = tiny_media.processing(tmp_path / "model", "qwen2_vl", args, tokens)
    args.dataset, args.dataset_dir = "d", str(write_data(d=(info, rows)))
    template = get_template(args, tokens)
    found = load_datasets(
        args, stage="sft", tokenizer=tokens, template=template, seed=1, media=processing
    )
    return found.train, processing


def test_vision_bad_images_are_counted_with_file_and_row(
    tmp_path: Path, write_data: Any, media: Path
) -> None:
    bad = [
        (row(images=["absent.png"]), "missing media: absent.png"),
        (row(images=["empty.png"]), "empty media: empty.png has 0 bytes"),
        (row(images=["text.png"]), "broken image: "),
        (row(images=["cut_good.png"]), "broken image: "),
        (row(images=["cut_whole.jpg"]), "broken image: "),
        (row(images=["flipped.png"]), "broken image: "),
        (row(images=["a_folder.png"]), "missing media: a_folder.png is not a file"),
        (row(images=["../secret.png"]), "media outside media_dir: ../secret.png"),
        (row(images=["link.png"]), "media outside media_dir: link.png, which leads to"),
        (
            row(images=["https://example.com/a.png"]),
            "URL: https://example.com/a.png is not fetched",
        ),
        (row(images=["good.png", "good.png"]), "placeholders: the messages have 1 <image>"),
        (row("<image><image>?", images=["good.png"]), "placeholders: the messages have 2 <image>"),
        (row("<image>?"), "placeholders: the messages have 1 <image>, and the row has 0"),
        (row("What?", images=["good.png"]), "placeholders: the messages have 0 <image>"),
        (row("a <|image_pad|> b"), "placeholders: the text holds the token <|image_pad|>"),
        (row(images=[3]), "unknown media: a int"),
        (row(images=["data:image/png;base64,@@"]), "broken media: a data: URL"),
        (row(audios=["a.wav"]), "audio: the row has audios, and audio is not supported"),
    ]
    rows = [row(images=["good.png"]), *(r for r, _ in bad)]
    data, _ = load(tmp_path, write_data, media, SHAREGPT, rows)
    assert len(data) == 1 and data.report.bad == len(bad)
    places = data.report.bad_rows["d"]["places"]
    for number, ((place, reason), (_, expected)) in enumerate(zip(places, bad, strict=True), 2):
        assert place == f"d.json row {number}"
        assert reason.startswith(expected), (reason, expected)
        assert "Traceback" not in reason


def test_vision_a_path_from_the_working_folder_is_told(
    tmp_path: Path, write_data: Any, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaMA-Factory takes what media_dir lacks from there."""
    (media / "data").mkdir()
    (media / "data" / "here.png").write_bytes((media / "good.png").read_bytes())
    monkeypatch.chdir(media)
    rows = [row(images=["data/here.png"]), row("?", images=[])]
    data, _ = load(tmp_path, write_data, media / "data", SHAREGPT, rows)
    reason = data.report.bad_rows["d"]["places"][0][1]
    assert reason.endswith("; the working folder has it: set media_dir: .")


def test_vision_unusual_images_are_used(tmp_path: Path, write_data: Any, media: Path) -> None:
    names = ["cmyk.jpg", "deep.png", "wide.png", "moves.gif"]
    data, processing = load(
        tmp_path, write_data, media, SHAREGPT, [row(images=[name]) for name in names]
    )
    assert len(data) == 4 and not data.report.bad
    units = [data[i][0].media[0] for i in range(4)]
    pixels = [load_unit(unit, processing)["pixel_values"] for unit in units]
    assert [len(p) for p in pixels] == [u.patches for u in units]
    assert pixels[1].min() < -1 and pixels[1].max() > 1
    deep = np.asarray(images.decode((media / "deep.png").read_bytes(), "deep.png"))
    assert (
        deep.tolist()
        == (np.linspace(0, 65535, 24000).astype(np.uint16) >> 8).reshape(120, 200).tolist()
    )
    assert any("animated" in field for field in data.stores[0].bad.unread)


def test_vision_patches_of_the_data(tmp_path: Path, write_data: Any, media: Path) -> None:
    """What the plan's seconds of the tower are made of: patches of a token, and how many of them
    one sees.
    """
    rows = [row(images=["good.png"]), row("<image><image>?", images=["good.png", "wide.png"])]
    data, _ = load(tmp_path, write_data, media, SHAREGPT, [*rows, row("What?")])
    good, wide = (unit.patches for unit in data[1][0].media)
    tokens = sum(len(data[i][0].input_ids) for i in range(3))
    patches, seen = data.image_patches()
    assert patches == pytest.approx((2 * good + wide) / tokens)
    assert seen == pytest.approx((2 * good**2 + wide**2) / (2 * good + wide))


def test_vision_bytes_and_content_parts(tmp_path: Path, write_data: Any, media: Path) -> None:
    import base64

    whole = base64.b64encode((media / "good.png").read_bytes()).decode()
    parts = [
        {"type": "text", "text": "Look: "},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{whole}"}},
        {"type": "image"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]
    audio = [
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "assistant", "content": "A dog."},
    ]
    rows = [{"messages": messages, "images": ["whole.jpg"]}, {"messages": audio}]
    data, processing = load(tmp_path, write_data, media, OPENAI, rows)
    (document,) = data[0]
    inside, file = document.media
    assert inside.reference.offset == 0 and inside.reference.path.endswith("media.bin")
    assert file.reference.path == str(media / "whole.jpg")
    with Image.open(io.BytesIO((media / "good.png").read_bytes())) as image:
        expected = processing.family.image_tensors(image.convert("RGB"))["pixel_values"]
    assert load_unit(inside, processing)["pixel_values"].equal(expected)
    assert data.report.bad_rows["d"]["places"][0][1].startswith("audio: ")


def test_vision_media_outside_are_read_where_a_key_allows(
    tmp_path: Path, write_data: Any, media: Path
) -> None:
    rows = [row(images=["../secret.png"]), row(images=["link.png"])]
    data, _ = load(tmp_path, write_data, media, SHAREGPT, rows, media_allow=("outside",))
    assert len(data) == 2 and not data.report.bad


def test_vision_a_cut_never_goes_through_an_image(
    tmp_path: Path, write_data: Any, media: Path
) -> None:
    rows = [row(images=["good.png"]), row("What?")]
    data, _ = load(tmp_path, write_data, media, SHAREGPT, rows)
    tokens = data[0][0].media[0].tokens
    args = {"cutoff_len": tokens}
    processed = make_args(template="qwen2_vl", media_dir=str(media), dataset="d", **args)
    tokenizer = tiny_media.tokenizer("qwen2_vl")
    processing = tiny_media.processing(tmp_path / "m", "qwen2_vl", processed, tokenizer)
    processed.dataset_dir = str(tmp_path / "data")
    cut = load_datasets(
        processed,
        stage="sft",
        tokenizer=tokenizer,
        template=get_template(processed, tokenizer),
        seed=1,
        media=processing,
    ).train
    assert len(cut) == 1 and cut.report.media_cut == 1
    assert "cuts through an image" in cut.report.describe()


def test_vision_a_file_that_changed_is_a_sentence(
    tmp_path: Path, write_data: Any, media: Path
) -> None:
    data, processing = load(tmp_path, write_data, media, SHAREGPT, [row(images=["good.png"])])
    unit = data[0][0].media[0]
    tiny_media.picture(300, 300).save(media / "good.png")
    with pytest.raises(DataError, match=r"good\.png \(d\.json row 1\).*cannot be read now"):
        load_unit(unit, processing)
    (media / "good.png").unlink()
    with pytest.raises(DataError, match="overwrite_cache: true"):
        load_unit(unit, processing)


def test_vision_bad_videos_are_counted(tmp_path: Path, write_data: Any, media: Path) -> None:
    pytest.importorskip("av")
    whole = tiny_media.write_video(media / "v.avi", 60).read_bytes()
    (media / "cut.avi").write_bytes(whole[: len(whole) // 3])
    front = tiny_media.write_video(media / "front.mp4", 60, options={"movflags": "+faststart"})
    (media / "short.mp4").write_bytes(front.read_bytes()[: front.stat().st_size * 3 // 4])
    (media / "noise.mp4").write_bytes(b"\0\1" * 3000)
    (media / "empty.mp4").write_bytes(b"")
    flags = {"movflags": "frag_keyframe+empty_moov"}
    fragments = tiny_media.write_video(media / "fragments.mp4", 9, options=flags).read_bytes()
    (media / "none.mp4").write_bytes(fragments[: fragments.index(b"moof") - 4])
    bad = [
        (["cut.avi"], "broken video: "),
        (["short.mp4"], "broken video: "),
        (["noise.mp4"], "broken video: "),
        (["empty.mp4"], "empty media: "),
        (["none.mp4"], "broken video: "),
        ([[]], "broken video: a list of no frames"),
        ([["good.png", "wide.png"]], "broken video: its frames have different sizes"),
    ]
    rows = [row("<video>What?", videos=v) for v in (["v.avi"], *(v for v, _ in bad))]
    data, _ = load(tmp_path, write_data, media, SHAREGPT, rows)
    assert len(data) == 1
    reasons = [reason for _, reason in data.report.bad_rows["d"]["places"]]
    for reason, (_, expected) in zip(reasons, bad, strict=True):
        assert reason.startswith(expected), (reason, expected)


@pytest.mark.parametrize(
    ("family", "model", "message"),
    [
        ("qwen2_vl", {"patch_size": 16}, "patch_size 14, and the model 16"),
        ("qwen3_vl", {"spatial_merge_size": 4}, "spatial_merge_size 2, and the model 4"),
        ("glm4v", {"patch_size": 16}, "patch_size 14, and the model 16"),
        ("gemma3", {"image_size": 112}, r"the size \(56, 56\), and the model \(112, 112\)"),
        ("llava_onevision", {"image_size": [28, 56]}, r"and the model \(28, 56\)"),
        ("intern_vl", {"patch_size": 28}, "tokens for a tile: 4, and the model 1"),
    ],
)
def test_vision_a_processor_of_another_model_is_not_used(
    tmp_path: Path, family: str, model: dict[str, Any], message: str
) -> None:
    """The tower would end the run in its own words, or find another number of features than
    placeholders.
    """
    folder = tiny_media.folder(tmp_path / "model", family)
    args, tokens = make_args(template=None), tiny_media.tokenizer(family)
    config = tiny_media.config(family) | {"downsample_ratio": 0.5}
    assert isinstance(make_processing(str(folder), config, args, tokens), Processing)
    config["vision_config"] = config["vision_config"] | model
    found = make_processing(str(folder), config, args, tokens)
    assert isinstance(found, Unusable) and re.search(message, found.reason)


@pytest.mark.parametrize("streaming", [False, True])
def test_vision_a_processor_of_another_model_ends_runs_with_images_alone(
    tmp_path: Path, write_data: Any, media: Path, streaming: bool
) -> None:
    tokens = tiny_media.tokenizer("qwen2_vl")
    template = get_template(make_args(template="qwen2_vl"), tokens)
    folder = tiny_media.folder(tmp_path / "model", "qwen2_vl")
    config = tiny_media.config("qwen2_vl")
    config["vision_config"] = config["vision_config"] | {"patch_size": 16}

    def read(rows: list[Any], **keys: Any) -> Any:
        args = make_args(template="qwen2_vl", media_dir=str(media), dataset="d", **keys)
        args.dataset_dir = str(write_data(d=(SHAREGPT, rows)))
        found = make_processing(str(folder), config, args, tokens)
        made = load_datasets(
            args, stage="sft", tokenizer=tokens, template=template, seed=1, media=found
        )
        return made, list(islice(iter(made.train), len(rows)))

    texts = [row("What?"), row("Who?")]
    made, samples = read(texts, streaming=streaming)
    assert len(samples) == 2 and made.processing is None
    with pytest.raises(
        DataError, match=r"row 3 has images or videos. .*patch_size 14, and the mod"
    ):
        read([*texts, row(images=["good.png"])], streaming=streaming)


def test_vision_saved_images_need_a_processor_of_the_model(
    tmp_path: Path, write_data: Any, media: Path
) -> None:
    saved = str(tmp_path / "saved")
    load(tmp_path, write_data, media, SHAREGPT, [row(images=["good.png"])], tokenized_path=saved)
    tokens, args = tiny_media.tokenizer("qwen2_vl"), make_args(tokenized_path=saved)
    with pytest.raises(DataError, match=r"have images or videos. The processor is broken."):
        load_datasets(
            args,
            stage="sft",
            tokenizer=tokens,
            template=get_template(make_args(template="qwen2_vl"), tokens),
            seed=1,
            media=Unusable("The processor is broken."),
        )


def test_vision_a_family_that_is_not_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_media.folder(tmp_path / "model", "llava_onevision")
    config = {"model_type": "llava", "vision_config": {"patch_size": 14}}
    args, tokens = make_args(template=None), tiny_media.tokenizer("llava_onevision")
    assert make_processing(str(folder), config, args, tokens) is None
    assert "Images of models of type llava are not read here, those of gemma3," in caplog.text
