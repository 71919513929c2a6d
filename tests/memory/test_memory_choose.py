"""`memory: auto`: from a configuration and a machine to settings, a table, a correction and a
letter when memory runs out.
"""

from __future__ import annotations

import dataclasses

import pytest

from known_sizes import qwen_7b
from longfactory.config.arguments import MemoryArguments
from longfactory.memory.choose import (
    choose_memory,
    corrected,
    explain_out_of_memory,
    host_memory,
    user_keys,
)
from longfactory.memory.search import HOST_SHARE
from longfactory.memory.shapes import ModelShape, TrainingJob, machine

GiB = 2**30


def plan(tokens=524288, gpus=2, gpu_bytes=140 * GiB, lora=False, fixed=None):
    job = TrainingJob(
        ModelShape.of(qwen_7b(), lora=lora),
        machine("NVIDIA H200", gpus, 256 * GiB, gpu_bytes=gpu_bytes),
        tokens,
        sp=gpus,
        sharded=gpus > 1,
        leavable=True,
    )
    return choose_memory(job, fixed)


def test_table_adds_up():
    p = plan()
    assert p.fits
    lines = p.table.splitlines()
    at = next(i for i, line in enumerate(lines) if "one GPU" in line)
    end = next(i for i, line in enumerate(lines) if line.strip().startswith("total"))
    items = [float(line.split()[-1]) for line in lines[at + 1 : end]]
    assert sum(items) == pytest.approx(float(lines[end].split()[1]), abs=0.06 * len(items))


def test_the_plan_says_how_masters_are_held():
    wide = plan()
    narrow = choose_memory(dataclasses.replace(wide.job, master=2))
    assert "fp32 masters" in wide.table and "split masters" in narrow.table
    assert "masters" not in plan(lora=True).table


def test_a_layer_s_gathered_weights_are_the_user_s_or_the_plan_s_choice():
    """Kept where they fit; and what the user says holds without checkpointing too."""
    short, long = plan(16384), plan(1 << 20)
    assert short.fits and short.settings.keep_weights
    assert "gathered once per step" in short.table and not plan(gpus=1).settings.keep_weights
    assert not choose_memory(long.job, mode="long").settings.keep_weights
    again = MemoryArguments(reshard_after_forward=True, disable_gradient_checkpointing=True)
    keys = user_keys(again)
    assert keys["keep_weights"] is False and keys["checkpoint"] == "none"
    assert not plan(16384, fixed=keys).settings.keep_weights
    placed = MemoryArguments(optimizer_placement="host", disable_gradient_checkpointing=True)
    assert user_keys(placed)["optimizer"] == "host"


def test_host_memory_share_is_not_exceeded():
    for tokens in (262144, 524288, 786432):
        p = plan(tokens)
        assert 2 * p.settings.pool_bytes <= HOST_SHARE * 256 * GiB


def test_user_keys_are_kept():
    args = MemoryArguments(
        keep_attention=0.5,
        offload_activations=True,
        mlp_chunk=2048,
        segment_layers=2,
        optimizer_placement="host",
    )
    s = plan(fixed=user_keys(args)).settings
    assert (s.keep_attention, s.mlp_chunk, s.segment_layers, s.optimizer) == (0.5, 2048, 2, "host")
    assert s.offload != "none" and s.pool_bytes > 0
    assert user_keys(MemoryArguments()) == {}
    assert plan(fixed=user_keys(MemoryArguments(mlp_chunk=0))).settings.mlp_chunk is None
    none = plan(
        4096, fixed=user_keys(MemoryArguments(disable_gradient_checkpointing=True))
    ).settings
    assert none.checkpoint == "none"


def test_without_a_gpu_nothing_leaves_memory():
    s = plan(4096, gpus=1, gpu_bytes=0, fixed={"offload": "any"}).settings
    assert s.checkpoint == "full" and s.offload == "none" and s.keep_attention == 1.0


def test_correction_after_the_first_step():
    p = plan()
    near, line = corrected(p, int(139 * GiB))
    assert (
        line is not None
        and near.attention_groups > p.settings.attention_groups
        and near.mlp_chunk < p.settings.mlp_chunk
    )
    far, line = corrected(p, int(60 * GiB))
    assert line is not None and far.last_layers_on_gpu > p.settings.last_layers_on_gpu
    assert (
        corrected(p, int(126 * GiB)) == (p.settings, None)
        or corrected(p, int(126 * GiB))[0].last_layers_on_gpu >= 1
    )
    same, line = corrected(p, int(0.93 * 140 * GiB))
    assert line is None and same == p.settings


def test_out_of_memory_says_what_to_change():
    p = plan(8192, gpus=1)
    text = explain_out_of_memory(
        dataclasses.replace(p), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    )
    assert (
        "To make room" in text
        and "Tried to allocate" in text
        and "more" not in text.splitlines()[-2]
    )
    assert host_memory() > GiB


def test_adapters_need_no_states_of_the_whole_model():
    full, lora = (plan(131072, gpu_bytes=80 * GiB, gpus=1, lora=x) for x in (False, True))
    assert lora.budget.gpu["weights"] < 2.1 * full.job.shape.parameters
    assert lora.fits and lora.budget.gpu.get("optimizer", 0) < 0.02 * 8 * full.job.shape.parameters
