"""A run from the page runs nothing but a run: what is refused, what is warned of, what forms show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longfactory.errors import ConfigError, UserError
from longfactory.webui import compose
from longfactory.webui.folders import Folders

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"talks": {}, "more": {}}')
    return tmp_path


def run(**changes: object) -> str:
    values = {"model_name_or_path": "org/model", "dataset": "talks", "output_dir": "out"} | changes
    return "".join(f"{name}: {value}\n" for name, value in values.items())


def check(home: Path, text: str, command: str = "train", allow: bool = False) -> compose.Checked:
    path = home / "run.yaml"
    path.write_text(text)
    return compose.check(path, command, Folders([home]), allow)  # type: ignore[arg-type]


def test_a_run_that_is_right(home: Path) -> None:
    found = check(home, run(learning_rate="1e-5", overwrite_output_dir="true"))
    assert found.problems == () and found.cfg is not None
    assert found.cfg.trainer.learning_rate == 1e-5
    assert found.values["dataset"] == "talks"
    assert [w for w in found.warnings if "replaced" in w]
    assert found.as_json()["arithmetic"]


def test_the_commands_own_reader_speaks(home: Path) -> None:
    found = check(home, run(learning_rat=1))
    assert found.cfg is None and "Did you mean learning_rate?" in found.problems[0]
    assert check(home, "- a\n").problems == (
        "The run holds no keys; a mapping of keys to values is needed.",
    )
    assert "line 3, column 1" in check(home, "a: 1\nb: [\n").problems[0]
    assert "!!python" not in str(check(home, "a: !!python/object/apply:os.system [ls]\n").values)
    assert check(home, "a: !!python/object/apply:os.system [ls]\n").problems
    assert "export_dir is missing" in check(home, run(), "export").problems[0]
    assert check(home, run(), "chat").problems == ()
    assert check(home, run(), "verify").problems == ()


def paths_of(cfg_key: str) -> str:
    return {"loss_path": "/etc/loss.py:loss", "dataset": "/etc/x.json"}.get(cfg_key, "/etc/folder")


PATHS = sorted(name for name, key in compose.known_keys().items() if key.path)


@pytest.mark.parametrize("name", PATHS)
def test_every_path_lies_in_the_chosen_folders(home: Path, name: str) -> None:
    found = check(home, run(**{name: paths_of(name)}), allow=True)
    assert found.cfg is None
    assert any(p.startswith(f"{name}: ") and "outside" in p for p in found.problems), found.problems


def test_paths_are_taken_with_their_links_and_other_names(home: Path) -> None:
    (home / "link").symlink_to("/etc")
    assert "outside" in check(home, run(output_dir="link/x")).problems[0]
    assert "outside" in check(home, run(output_dir="../x")).problems[0]
    assert "outside" in check(home, run(dataset="../x.json")).problems[0]
    (home / "data" / "x.json").symlink_to("/etc/hostname")
    assert "outside" in check(home, run(dataset="x.json")).problems[0]
    assert "outside" in check(home, run(adapter_name_or_path="[ok/a, /etc/b]")).problems[0]


@pytest.mark.parametrize("name", ["trust_remote_code", "loss_path"])
def test_code_is_off_by_default(home: Path, name: str) -> None:
    value = "loss.py:loss" if name == "loss_path" else "true"
    found = check(home, run(**{name: value}))
    assert found.cfg is None and "--allow_code" in found.problems[0]
    assert any(name in warning for warning in found.warnings)
    allowed = check(home, run(**{name: value}), allow=True)
    assert not any("--allow_code" in problem for problem in allowed.problems)
    assert any(name in warning for warning in allowed.warnings)
    assert check(home, run(trust_remote_code="false")).problems == ()
    quoted = check(home, run(trust_remote_code='"yes"'))
    assert quoted.cfg is None and "--allow_code" in quoted.problems[0]


@pytest.mark.parametrize(
    "value",
    ["${oc.env:HOME}", '"\\x24{oc.env:HOME}"', "[a, '${oc.env:HOME}']", "{a: '${oc.env:HOME}'}"],
)
def test_variables_of_the_server_are_not_shown(home: Path, value: str) -> None:
    found = check(home, run(run_name=value))
    assert found.cfg is None and "${...}" in found.problems[0]
    assert str(Path.home()) not in str(found)


def test_repeated_anchors_and_long_files(home: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
    )
    assert "anchors" in check(home, bomb).problems[0]
    assert "anchors" in check(home, "a: &a [*a]\n").problems[0]
    shared = run() + "lora_target: &t [q_proj, v_proj]\nadditional_target: *t\n"
    assert check(home, shared).problems == ()
    assert "expected at most" in check(home, "# " + "x" * compose.LONGEST).problems[0]


def test_secrets_are_not_shown(home: Path) -> None:
    found = check(home, run(hf_hub_token="hf_very_secret"))
    assert "hf_very_secret" not in str(found.as_json())
    text = compose.redacted(run(hf_hub_token="hf_very_secret") + "hub_token: 'other one'\n")
    assert "hf_very_secret" not in text and "other one" not in text and "org/model" in text
    assert compose.redacted("a: [") == "a: ["


def test_uploads_are_told(home: Path) -> None:
    found = check(home, run(push_to_hub="true", hub_model_id="a/b"))
    assert "The model is uploaded to the hub." in found.warnings


def test_trackio_is_a_tracker(home: Path) -> None:
    """The key is transformers': what is missing on this machine is said with how to install it."""
    found = check(home, run(report_to="trackio"))
    assert not found.problems or found.problems == (
        "report_to: trackio is not installed. Run: pip install trackio",
    )


def test_forms_have_every_key_with_its_choices() -> None:
    keys = {key["name"]: key for key in compose.form_keys()}
    assert set(keys) == set(compose.known_keys())
    assert keys["stage"]["choices"][:2] == ["sft", "pt"] or "sft" in keys["stage"]["choices"]
    assert keys["bf16"]["choices"] == ["true", "false"]
    assert keys["packing"]["choices"] == ["true", "false"]
    assert keys["cutoff_len"]["choices"] == [] and keys["cutoff_len"]["default"] == 2048
    assert keys["hf_hub_token"]["secret"] and keys["cutoff_len"]["form"]
    assert "llama3" in compose.template_names()


def test_recipes_and_data_sets(home: Path, tmp_path: Path) -> None:
    (home / "mine.yaml").write_text(run())
    (home / "other.yaml").write_text("a: 1\n")
    (home / "outside.yaml").symlink_to(ROOT / "examples" / "sft_full.yaml")
    found = compose.recipes(Folders([home]), ROOT / "examples")
    names = [recipe["name"] for recipe in found]
    assert "quickstart.yaml" in names and "mine.yaml" in names
    assert "other.yaml" not in names and "outside.yaml" not in names
    assert compose.data_sets("data", Folders([home])) == ["talks", "more"]
    assert compose.data_sets(str(home), Folders([home])) == []
    with pytest.raises(UserError, match="outside"):
        compose.data_sets("/etc", Folders([home]))


def test_every_recipe_is_a_run_that_the_page_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for recipe in compose.recipes(Folders([ROOT / "examples"])):
        text = Path(recipe["path"]).read_text()
        assert compose.parse(text)["model_name_or_path"]
    with pytest.raises(ConfigError):
        compose.parse("a: [")


@pytest.mark.processes
def test_the_server_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import longfactory.webui.server, longfactory.webui.command as c;"
        " from longfactory.webui import compose; compose.form_keys(); compose.template_names();"
        " found = {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
