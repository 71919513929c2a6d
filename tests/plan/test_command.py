"""`longfactory plan`: a run's own keys are what is planned, and by the code that trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import DeepseekV32Config

from embedded_model import needs_embedded_model
from known_sizes import qwen_7b
from longfactory.config import load_config
from longfactory.errors import ConfigError, UserError
from longfactory.memory.budget import budget, fits
from longfactory.memory.search import candidates
from longfactory.memory.seconds import seconds
from longfactory.plan.command import (
    DOES_NOT_FIT,
    FITS,
    NOT_ALL_PRICED,
    machine_of,
    main,
    make_parser,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a configuration of Qwen2.5-7B, without weights."""
    folder = tmp_path_factory.mktemp("7b")
    qwen_7b(architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model: str, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {model}\nstage: sft\nfinetuning_type: full\ndataset: d\n"
        "template: qwen\noutput_dir: o\ncutoff_len: 16384\nbf16: true\n"
        "per_device_train_batch_size: 1\nsequence_parallel_size: 4\n"
    )
    return str(path)


def item(text: str, name: str) -> float:
    """GiB of an item of the printed budget; 0 where it is not in it."""
    found = re.search(rf"^ +{name} +([0-9.]+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def planned(capsys: pytest.CaptureFixture[str], *words: str, status: int = FITS) -> str:
    assert main(list(words)) == status
    return capsys.readouterr().out


def test_the_tokens_are_those_of_the_longest_row(run, capsys):
    for words, tokens in (
        ([], 16384),
        (["per_device_train_batch_size=3"], 49152),
        (["per_device_train_batch_size=3", "packing=true"], 49152),
        (["stage=dpo"], 32768),
        (["stage=rm", "per_device_train_batch_size=2"], 65536),
        (["stage=kto", "cutoff_len=8192"], 16384),
    ):
        assert load_config([run, *words, "--dry_run"]).longest_row == tokens, words
    out = planned(capsys, run, "stage=dpo", "--tokens", "8k", "--gpus", "8xH200", "memory=fast")
    assert "rows of 16,384 tokens" in out


def test_words_stand_anywhere(run, capsys):
    first = planned(capsys, run, "memory=long", "--gpus", "4xH100")
    assert first == planned(capsys, run, "--gpu", "H100", "--gpus", "4", "memory=long")


def test_words_alone_are_a_run(run, capsys):
    words = [line.replace(": ", "=") for line in Path(run).read_text().splitlines()]
    alone = planned(capsys, *words, "memory=long", "--gpus", "4xH100")
    assert alone == planned(capsys, run, "memory=long", "--gpus", "4xH100")
    with pytest.raises(UserError, match="needs a run's file"):
        main(["memory=long", "--gpus", "4xH100"])


def test_quantised_and_adapted_weights_are_counted(run, capsys):
    words = [run, "--gpus", "1xH100", "sequence_parallel_size=1", "memory=fast"]
    lora = planned(capsys, *words, "finetuning_type=lora", "lora_rank=8")
    four = planned(capsys, *words, "finetuning_type=lora", "lora_rank=8", "quantization_bit=4")
    assert "0.02 B trained" in lora
    assert item(lora, "weights") == pytest.approx(14.3, abs=0.1)  # 14.19, and 0.08 of adapters
    linear, rest = 6.525e9, 1.090e9
    assert item(four, "weights") == pytest.approx((0.516 * linear + 2 * rest) / 2**30, abs=0.1)


def test_freeze_trains_what_it_says(run, capsys):
    out = planned(capsys, run, "finetuning_type=freeze", "freeze_trainable_layers=4", "memory=fast")
    assert "(0.93 B trained)" in out


def test_deepspeed_is_counted_as_its_file_says(run, capsys):
    pytest.importorskip("deepspeed")
    files = ROOT / "examples" / "deepspeed"
    words = [run, "--gpus", "8xH200", "sequence_parallel_size=1", "cutoff_len=4096"]
    words += ["memory=fast"]
    two = planned(capsys, *words, f"deepspeed={files / 'ds_z2_config.json'}")
    three = planned(capsys, *words, f"deepspeed={files / 'ds_z3_config.json'}")
    away = planned(
        capsys, *words, f"deepspeed={files / 'ds_z3_offload_config.json'}", status=NOT_ALL_PRICED
    )
    assert item(two, "weights") == pytest.approx(8 * item(three, "weights"), rel=0.05)
    assert item(two, "optimizer") == item(three, "optimizer") == pytest.approx(10.6, abs=0.1)
    assert "optimizer on the host" in away and "offload_param" in away


def test_masters_are_split_where_that_is_faster(tmp_path, capsys):
    """A model whose fp32 masters fit in the host's memory alone is not planned there where split
    ones fit on the GPUs.
    """
    shape = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    qwen_7b(**shape, **heads, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    out = planned(
        capsys,
        str(tmp_path),
        "--gpus",
        "8xH100",
        "--tokens",
        "32k",
        "--sequence-parallel-size",
        "8",
    )
    assert "masters: split" in out and "optimizer on the gpu" in out
    assert float(re.search(r"predicted: ([0-9.]+) s (?:a|per) row", out)[1]) < 4  # type: ignore[index]


@pytest.mark.parametrize(
    ("tokens", "gib"),
    [
        (32768, 40),
        *(
            pytest.param(tokens, gib, marks=pytest.mark.slow)
            for tokens in (4096, 32768, 131072)
            for gib in (40, 80, 141)
            if (tokens, gib) != (32768, 40)
        ),
    ],
)
def test_no_setting_that_fits_is_faster(tokens, gib, run, monkeypatch):
    """Of all that can be enumerated, with fp32 masters and with split ones."""
    from longfactory.memory.choose import SPLIT_IS_WORTH
    from longfactory.memory.search import HOST_SHARE
    from longfactory.memory.shapes import machine
    from longfactory.train.memory_plan import count_parameters, plan_run

    cfg = load_config([run, "--dry_run"])
    config = qwen_7b()
    where = machine("H100", 8, 512 * 2**30, gpu_bytes=gib * 2**30)
    plan = plan_run(cfg, config, count_parameters(cfg, config), tokens, "fsdp2", where).plan
    assert plan.fits
    wide = plan.job.__class__(**{**vars(plan.job), "master": 4, "leavable": False})
    split = plan.job.__class__(**{**vars(plan.job), "master": 2, "leavable": True})
    fastest = min(
        seconds(job, settings)
        for job in (wide, split)
        for settings in candidates(job, "auto")
        if fits(job, budget(job, settings, timed=False), HOST_SHARE)
    )
    # The last eighth of a GPU's memory is taken for a gain of some percent (`choose`).
    assert plan.budget.seconds <= fastest / SPLIT_IS_WORTH * 1.03


def test_a_kind_that_is_not_known_is_asked_for(model, capsys):
    with pytest.raises(UserError, match=r"GTX 710.* not a kind that is known"):
        main([model, "--gpu", "GTX 710"])
    with pytest.raises(UserError, match="give its memory"):
        main([model, "--gpu", "GTX 710", "--gpu-tflops", "100"])
    out = planned(
        capsys,
        *[model, "--gpus", "8xX1", "--gpu-tflops", "989", "--gpu-gib", "80", "--tokens", "8k"],
        "memory=fast",
    )
    assert "8 x X1" in out and "of 80.0" in out
    with pytest.raises(UserError, match="name two kinds"):
        main([model, "--gpus", "8xH100", "--gpu", "A100"])


@pytest.mark.parametrize(
    "words", [["--tokens", "0"], ["--tokens=-5"], ["--tokens", "12q"], ["--gpus", "0"]]
)
def test_numbers_are_above_zero(words, model, capsys):
    with pytest.raises(SystemExit):
        main([model, *words])
    assert "expected" in capsys.readouterr().err


def test_the_network_is_what_was_said():
    words = ["--model", "7b", "--gpus", "16xH100", "--network-gbit", "100"]
    for more, latency in (([], 25e-6), (["--network-latency-us", "60"], 60e-6)):
        where, *_ = machine_of(make_parser().parse_args([*words, *more]), 16, False)
        assert where.network == 12.5e9 and where.network_latency == pytest.approx(latency)
        assert where.waits(8) == where.latency < where.waits(16) == where.network_latency


def test_what_does_not_fit_has_its_status(model, capsys):
    out = planned(
        capsys,
        *[model, "--gpus", "1x4090", "--host-gib", "32", "--tokens", "128k"],
        status=DOES_NOT_FIT,
    )
    assert "does not fit" in out and "finetuning_type: lora" in out


def test_what_is_not_priced_is_named(run, capsys):
    out = planned(capsys, run, "optim=adafactor", "memory=fast", status=NOT_ALL_PRICED)
    assert "not counted: optim: adafactor" in out


def test_sparse_attention_is_named_where_it_leaves_keys_out(run, tmp_path, capsys):
    config = DeepseekV32Config(
        **{"num_hidden_layers": 2, "n_routed_experts": 8, "hidden_size": 512, "vocab_size": 1024},
        architectures=["DeepseekV32ForCausalLM"],
    )
    config.save_pretrained(tmp_path / "sparse")
    words = [run, f"model_name_or_path={tmp_path / 'sparse'}", "--gpus", "4xH200"]
    assert "sparse attention (2,048 keys a query)" in planned(capsys, *words, "--tokens", "16k")
    assert "sparse attention" not in planned(capsys, *words, "--tokens", "2k")


def test_precision_is_the_run_s(run, model, capsys):
    words = ["--gpus", "4xH200", "--host-gib", "512", "--tokens", "32k", "memory=fast"]
    assert "Set bf16: true" not in planned(capsys, model, *words)
    assert "Set bf16: true" in planned(capsys, run, *words, "bf16=false")


def test_a_key_that_is_wrong_is_refused_as_in_training(run):
    with pytest.raises(ConfigError, match="sequence_paralel_size"):
        main([run, "sequence_paralel_size=2"])
    with pytest.raises(UserError, match="does not divide the 8 GPUs"):
        main([run, "sequence_parallel_size=3"])


@needs_embedded_model
def test_the_embedded_model_is_planned(capsys):
    out = planned(capsys, "smollm2-135m-instruct", "--gpus", "2", "--tokens", "8192")
    assert "0.13 B parameters" in out
