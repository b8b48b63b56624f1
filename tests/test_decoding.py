"Cached decoding: the model's own answers, alone, in a batch and from nothing."
import random

import pytest
import torch
from chat_models import make_model
from hypothesis import given
from hypothesis import strategies as st

from exprag.agent import PolicyError
from exprag.models.decoding import (
    SingleEngine, SlotCache, SlotEngine, common_prefix, fastest_engine, fits_template, matches_model)


@pytest.fixture(scope="module", params=["qwen", "mistral", "gemma", "gemma with a window"])
def model(request):
    family = request.param.split()[0]
    return make_model(family, 300, **({"sliding_window": 16} if "window" in request.param else {}))


def close(a, b): return float((a - b).abs().max()) < 1e-4 * float(b.max() - b.min())


IDS = random.Random(0).sample(range(300), 200)


def test_common_prefix(): assert [common_prefix([1, 2], [1, 3]), common_prefix([], [1]), common_prefix([1, 2], [1, 2, 3]), common_prefix([1, 2], [1, 2])] == [1, 0, 2, 2]


def test_every_row_is_as_if_alone(model):
    engine = SlotEngine(model, 3, chunk=32)
    lengths = {0: 100, 1: 3, 2: 65}
    for row, n in lengths.items():
        logits, computed = engine.prefill(row, IDS[row:row + n])
        assert computed == n and close(logits, engine.fresh(IDS[row:row + n]))
    for k in range(3):  # rows 0 and 2 write, row 1 waits
        got = engine.decode({row: IDS[row + lengths[row] + k] for row in (0, 2)})
        for row, logits in got.items(): assert close(logits, engine.fresh(IDS[row:row + lengths[row] + k + 1]))
    assert close(engine.decode({1: IDS[4]})[1], engine.fresh(IDS[1:5])), "what waiting rows computed does no harm"


def test_going_back_and_on(model):
    engine = SlotEngine(model, 2)
    engine.prefill(0, IDS[:50])
    logits, computed = engine.prefill(0, IDS[:40] + IDS[100:110])
    assert computed == 10 and close(logits, engine.fresh(IDS[:40] + IDS[100:110]))
    logits, computed = engine.prefill(0, IDS[:40])
    assert computed == 1 and close(logits, engine.fresh(IDS[:40])), "a prompt held already costs its last token"
    engine.forget([0])
    assert engine.prefill(0, IDS[:40])[1] == 40


def test_the_models_own_cache_gives_the_same(model):
    engine = SingleEngine(model, 2)
    assert matches_model(engine, 1e-4)
    engine.prefill(1, IDS[:30])
    engine.decode({1: 5}), engine.decode({1: 6})
    logits, computed = engine.prefill(1, IDS[:30] + [5, 7, 8])
    assert computed == 3 and close(logits, engine.fresh(IDS[:30] + [5, 7, 8])), "what was written is computed again as history"
    assert engine.prefill(1, IDS[:20])[1] == 20, "it cannot go back"


def test_attention_models_share_a_cache(model): assert type(fastest_engine(model, 4, 1e-4)) is SlotEngine


def test_models_with_more_than_keys_and_values_do_not():
    from transformers import AutoModelForCausalLM, Lfm2Config
    torch.manual_seed(0)
    hybrid = AutoModelForCausalLM.from_config(Lfm2Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, layer_types=["conv", "full_attention"] * 2)).eval()
    assert not matches_model(SlotEngine(hybrid, 2), 1e-4)
    with pytest.warns(UserWarning, match="Lfm2ForCausalLM keeps more than keys and values.*slower"): engine = fastest_engine(hybrid, 2, 1e-4)
    assert type(engine) is SingleEngine and matches_model(engine, 1e-4)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
], ids=["GPU", "Python", "CPU"])
def test_running_out_of_memory_is_no_slow_path(monkeypatch, error):
    "Not even where a row less would have had room: the person decides."
    def full(self, old): raise error
    monkeypatch.setattr(SlotCache, "_enlarged", full)
    with pytest.raises(PolicyError, match="memory ran out when the cache was tried with 4 rows.*smaller batch_size") as caught: fastest_engine(make_model("qwen", 300), 4, 1e-4)
    assert caught.value.__cause__ is error


def test_a_model_with_two_wrong_caches_is_refused(monkeypatch):
    "The slow engine is checked against a plain forward pass, too."
    model = make_model("qwen", 300)
    plain = SlotEngine.fresh
    monkeypatch.setattr(SlotEngine, "fresh", lambda self, ids: plain(self, ids).roll(1))
    with pytest.raises(PolicyError, match="Qwen2ForCausalLM answers otherwise with a cache than without, with ours and with its own"): fastest_engine(model, 2, 1e-4)
    monkeypatch.undo()
    monkeypatch.setattr(SlotEngine, "masks", lambda self, queries, width: None)  # ours sees too much, the model's own does not
    with pytest.warns(UserWarning, match="its own cache is used"): assert type(fastest_engine(model, 2, 1e-4)) is SingleEngine
    step = SingleEngine._step
    monkeypatch.setattr(SingleEngine, "_step", lambda self, ids, cache: step(self, ids, cache) * 1.01)
    with pytest.raises(PolicyError, match="with its own"): fastest_engine(model, 2, 1e-4)


def test_a_broken_cache_is_noticed(monkeypatch):
    update = SlotCache.update
    def forgetful(self, keys, values, layer_idx, *args, **kwargs):
        keys, values = update(self, keys, values, layer_idx)
        return keys, values * (1 + 0.01 * (layer_idx == 1))
    model = make_model("qwen", 300)
    assert matches_model(SlotEngine(model, 2), 1e-4)
    monkeypatch.setattr(SlotCache, "update", forgetful)
    assert not matches_model(SlotEngine(model, 2), 1e-4)


TEMPLATES = ("open OBJ", "move OBJ to OBJ", "look around", "look at OBJ")


@pytest.mark.parametrize("text, begun, whole", [
    ("", 1, 0), ("lo", 1, 0), ("look around", 1, 1), ("look at", 1, 0), ("look at x", 1, 1), ("look at  x", 0, 0), ("eat x", 0, 0),
    ("move a", 1, 0), ("move a to ", 1, 0), ("move a to b", 1, 1), ("move  to b", 0, 0), ("open a\nb", 0, 0), ("open", 1, 0), ("open ", 1, 0)])
def test_fits(text, begun, whole):
    assert any(fits_template(text, t, False) for t in TEMPLATES) == bool(begun)
    assert any(fits_template(text, t, True) for t in TEMPLATES) == bool(whole)


@given(a=st.text("ab to", min_size=1, max_size=6), b=st.text("ab to", min_size=1, max_size=6))
def test_what_fits_has_only_fitting_beginnings(a, b):
    action = f"move {a} to {b}"
    if fits_template(action, "move OBJ to OBJ", True):
        assert all(fits_template(action[:i], "move OBJ to OBJ", False) for i in range(len(action)))
