"""A machine without a network is told at once; a slow network and a hub that answers with an error
are not taken for none.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from longfactory import hub
from longfactory.config.arguments import ModelArguments
from longfactory.data.readers import read
from longfactory.data.sources import DataSource, read_sources
from longfactory.errors import DataError, UserError
from longfactory.model import load


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """A hub on this machine: a port that is held and does not listen yet, an empty cache, and no
    proxy in between.
    """
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    huggingface_hub.close_session()
    hub.unreachable.cache_clear()
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port.getsockname()[1]}"
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield port
    huggingface_hub.close_session()
    hub.unreachable.cache_clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that anybody sleeps, huggingface_hub between its own attempts too; nobody really
    does.
    """
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def answer(port: socket.socket, text: bytes) -> None:
    port.listen()

    def serve() -> None:
        client, _ = port.accept()
        with client:
            client.recv(4096)
            client.sendall(text)

    threading.Thread(target=serve, daemon=True).start()


def test_a_refused_connection_is_told_after_three_seconds_and_asked_once(
    local: socket.socket, waits: list[float]
) -> None:
    assert hub.unreachable() == "Connection refused" and waits == [1.0, 2.0]
    assert hub.unreachable() == "Connection refused" and waits == [1.0, 2.0]


def test_a_hub_that_comes_back_is_reached(
    local: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        time,
        "sleep",
        lambda seconds: answer(local, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    )
    assert hub.unreachable() is None


@pytest.mark.parametrize("status", ["404 Not Found", "503 Service Unavailable"])
def test_any_answer_is_an_answer(local: socket.socket, status: str) -> None:
    answer(local, f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
    assert hub.unreachable() is None


def test_a_slow_hub_is_left_to_its_library(local: socket.socket) -> None:
    local.listen()  # connections are taken by the system; nobody ever answers
    assert hub.unreachable() is None


def test_a_name_that_is_not_known(
    local: socket.socket, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", "http://there-is-no-such-host.invalid"
    )
    assert hub.unreachable()


def test_what_is_not_in_the_cache_is_a_letter(
    local: socket.socket, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No waiting beyond the one question, and the letters say that it is the network."""
    args = ModelArguments(model_name_or_path="someone/model", cache_dir=str(tmp_path))
    with pytest.raises(
        UserError,
        match=(
            r"someone/model: there is no such folder, the .* hub cannot be reached \(Connection"
            r" refused\)"
        ),
    ):
        load.load_config(args, 128)
    with pytest.raises(UserError, match=r"No tokenizer could be loaded.*cannot be reached"):
        load.load_tokenizer(args)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(
        DataError,
        match=(
            r"someone/data could not be read from the Hugging Face hub \(the hub cannot be reached"
        ),
    ):
        next(read(DataSource("someone/data", "hub", "someone/data")))
    with pytest.raises(
        DataError, match=r"REMOTE:someone/data: no dataset_info\.json .*\(Connection refused\)"
    ):
        read_sources(["d"], "REMOTE:someone/data")
    assert waits == [1.0, 2.0]


def test_what_is_on_this_machine_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longfactory.testing import tiny_model

    def asked() -> Any:
        raise AssertionError("a question to the hub")

    monkeypatch.setattr(hub, "unreachable", asked)
    tiny_model("llama").save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path))
    assert load.load_config(args, 128).model_type == "llama"
    with pytest.raises(UserError, match="No tokenizer could be loaded"):
        load.load_tokenizer(args)
    # A prepared data set in the cache of `datasets` is left to that library.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    (tmp_path / "someone___data").mkdir()
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: [{"text": "Eins"}])
    assert [row for _, row in read(DataSource("someone/data", "hub", "someone/data"))] == [
        {"text": "Eins"}
    ]


def test_an_adapter_in_a_repository_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a model, onto which transformers would load it, and in the place of one."""
    from longfactory.testing import tiny_model

    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    args = ModelArguments(model_name_or_path="someone/model", cache_dir=str(tmp_path))
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / "0123"
    tiny_model("llama").save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    assert load.load_config(args, 128).model_type == "llama"
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"someone/model holds an adapter .* beside a config.json"):
        load.load_config(args, 128)
    (snapshot / "config.json").unlink()
    with pytest.raises(UserError, match="someone/model holds an adapter, not a model"):
        load.load_config(args, 128)


@pytest.mark.usefixtures("as_a_command")
def test_a_run_that_would_end_by_uploading_does_not_begin(
    local: socket.socket, waits: list[float], tmp_path: Path
) -> None:
    from longfactory.config import from_mapping
    from longfactory.train.run import assemble

    keys = {
        "model_name_or_path": str(tmp_path),
        "dataset": "d",
        "dataset_dir": str(tmp_path),
        "template": "empty",
        "push_to_hub": True,
    }
    cfg = from_mapping(
        {
            **keys,
            "do_train": True,
            "stage": "sft",
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
        }
    )
    with pytest.raises(
        UserError,
        match=r"push_to_hub: the Hugging Face hub cannot be reached \(Connection refused\)",
    ):
        assemble(cfg)
    assert not (tmp_path / "out").exists()
