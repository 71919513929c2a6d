"""The pool of host memory: its bound, its reuse, and what happens when there is no room."""

from __future__ import annotations

import gc
import logging

import pytest
import torch

import fake_cuda
from longfactory import sp
from longfactory.errors import ConfigError
from longfactory.memory.apply import apply_memory
from longfactory.memory.host_pool import PAGE, HostPool
from longfactory.memory.offload import Activations
from longfactory.memory.settings import MemorySettings
from memory_models import LENGTH, assert_same_gradients, gradients, make_model, run


def tensors(n, numbers=5000):
    return [torch.randn(numbers) for _ in range(n)]


def test_what_is_fetched_is_what_was_parked():
    pool = HostPool("cpu", 2**20, expect=3)
    given = [[a, b.double()] for a, b in zip(tensors(3), tensors(3, 77), strict=True)]
    offloaded = [pool.offload(g) for g in given]
    kept = [[t.clone() for t in g] for g in given]
    for g in given:
        for t in g:
            t.zero_()  # the copy does not share memory with what was given
    for p, k in zip(reversed(offloaded), reversed(kept), strict=True):
        pool.prefetch(2)
        for found, wanted in zip(p.fetch(), k, strict=True):
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    with pytest.raises(RuntimeError, match="second backward"):
        offloaded[0].fetch()


def test_slots_are_locked_once_and_reused():
    pool = HostPool("cpu", 2**22, expect=4)
    for step in range(3):
        offloaded = [pool.offload([t]) for t in tensors(4)]
        locked = pool.locked_bytes
        if step % 2:
            for p in reversed(offloaded):
                p.fetch()
        del offloaded  # a forward without a backward gives its slots back as well
    assert pool.locked_bytes == locked == 4 * 5 * PAGE
    # A slot in use is never handed out a second time.
    first = pool.offload([torch.ones(5000)])
    others = [pool.offload([torch.zeros(5000)]) for _ in range(3)]
    assert float(first.fetch()[0].sum()) == 5000 and len(others) == 3


def test_peak_bytes_are_the_most_that_waited_at_once():
    pool = HostPool("cpu", 2**22, expect=8)
    each = 5000 * 4 + 224  # padded to 256
    offloaded = [pool.offload([t]) for t in tensors(3)]
    offloaded.pop().fetch()
    del offloaded[0]  # never fetched: its slot is given back as well
    offloaded += [pool.offload([t]) for t in tensors(1)]
    assert pool.peak_bytes == 3 * each < pool.locked_bytes == 8 * 5 * PAGE
    for p in offloaded:
        p.fetch()
    pool.peak_bytes = 0
    pool.offload([torch.randn(64)]).fetch()
    assert pool.peak_bytes == 256


def test_other_lengths_take_the_place_of_idle_slots():
    pool = HostPool("cpu", 20 * PAGE, expect=4)
    [pool.offload([t]).fetch() for t in tensors(4)]
    assert pool.locked_bytes == 20 * PAGE
    longer = [pool.offload([t]) for t in tensors(2, 10000)]
    assert pool.locked_bytes <= 20 * PAGE and all(p.on_host for p in longer)


def test_bound_is_kept_and_the_rest_stays(caplog):
    pool = HostPool("cpu", 11 * PAGE, expect=6)
    with caplog.at_level(logging.WARNING):
        offloaded = [pool.offload([t]) for t in tensors(6)]
    assert pool.locked_bytes <= 11 * PAGE
    assert [p.on_host for p in offloaded] == [True, True, False, False, False, False]
    assert len(caplog.records) == 1 and "stays on the GPU" in caplog.text
    for p in reversed(offloaded):
        assert p.fetch()[0].shape == (5000,)


def test_refused_memory_is_a_warning(monkeypatch, caplog):
    pool = HostPool("cpu", 2**30, expect=2)
    monkeypatch.setattr(pool, "_lock", lambda size: (None, True))
    with caplog.at_level(logging.WARNING):
        p = pool.offload(tensors(1))
    assert not p.on_host and "refused" in caplog.text
    assert p.fetch()[0].shape == (5000,)


@pytest.mark.parametrize("layer", ["auto", "generic"])
def test_a_step_parks_every_layer_but_the_last(layer):
    model = make_model("qwen2")
    store = apply_memory(
        model,
        MemorySettings(
            keep_attention=1.0,
            offload="inputs+attention",
            pool_bytes=2**24,
            last_layers_on_gpu=1,
            layer=layer,
        ),
    )
    run(model)
    assert store.pool is not None
    inputs = LENGTH * 32 * 8
    attention = LENGTH * (32 + 4) * 8
    assert (
        3 * (inputs + attention) <= store.pool.offloaded_bytes <= 3 * (inputs + attention + 3 * 256)
    )
    locked = store.pool.locked_bytes
    run(model)
    assert store.pool.locked_bytes == locked
    store.pool.close()
    assert store.pool.locked_bytes == 0


@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize("layer", ["auto", "generic"])
@pytest.mark.parametrize("late", [False, True])
def test_the_path_for_gpus_in_order(late, layer, refuse, monkeypatch, caplog):
    """With streams and pinning replaced by stand-ins: the same gradients, every slot locked,
    and given back.
    """
    model = make_model("qwen2", monkeypatch)
    run(model)
    wanted = gradients(model)
    locked = fake_cuda.install(monkeypatch, refuse)
    settings = MemorySettings(
        keep_attention=1.0,
        offload="inputs+attention",
        pool_bytes=2**24,
        last_layers_on_gpu=1,
        layer=layer,
        late_prefetch=late,
        attention_groups=2,
    )
    store = apply_memory(model, settings)
    store.pool.stream = fake_cuda.Stream()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.zero_grad()
            run(model)
            assert_same_gradients(gradients(model), wanted)
    assert sum(locked.values()) == (0 if refuse else store.pool.locked_bytes)
    assert ("pinning failed" in caplog.text) == refuse
    store.pool.close()
    assert not locked and store.pool.locked_bytes == 0


def test_a_pool_that_nobody_closed_unlocks_its_memory(monkeypatch):
    locked = fake_cuda.install(monkeypatch)
    pool = HostPool("cpu", limit=2**20, expect=2)
    pool.stream = fake_cuda.Stream()
    pool.reserve(5000)
    assert sum(locked.values()) == pool.locked_bytes > 0
    del pool
    gc.collect()
    assert locked == {}


@pytest.mark.parametrize("first", [1, 2, 3])
def test_host_memory_is_locked_once(first, monkeypatch):
    """Also where attention's output takes more than the layer's input, which comes first; and no
    more than both take is locked. So too where a short row comes first, of a half or a third of the
    longest's tokens."""
    locked = fake_cuda.install(monkeypatch)
    model = make_model("qwen3")  # 4 heads of 16 beside a hidden size of 32
    settings = MemorySettings(
        keep_attention=1.0, offload="inputs+attention", pool_bytes=2**24, last_layers_on_gpu=1
    )
    store = apply_memory(model, settings, longest=LENGTH)
    store.pool.stream = fake_cuda.Stream()
    seen: list[int] = []
    monkeypatch.setattr(
        store.pool, "_lock", lambda size, lock=store.pool._lock: (seen.append(size), lock(size))[1]
    )
    for part in (first, 1):
        run(model, length=LENGTH // part, segments=(sp.Segment(0, LENGTH // part),))
        model.zero_grad()
    # whole pages for 11,264 and 23,936 bytes
    assert len(locked) == 6 and sorted(seen) == [12288] * 3 + [28672] * 3


def test_offload_without_host_memory_is_refused():
    settings = MemorySettings(offload="inputs")
    with pytest.raises(ConfigError, match="pool_bytes is 0"):
        Activations(settings, 2, "cpu")
    store = Activations(MemorySettings(), 2, "cpu")
    with pytest.raises(ConfigError, match="Set pool_bytes"):
        store.change(settings)
    assert store.settings == MemorySettings()
