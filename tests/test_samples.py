"Behaviour of exprag.samples: recipes, samples, the plan, the loss."
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.samples import (IGNORED, RECIPES, Recipe, Sample, check_samples, collate, has_bfloat16, make_samples, micro_batches, plan, planned_tokens,
                            predicting, supervised_loss, token_losses)
from exprag.trajectory import Task
from sft_fixtures import episodes, tiny_model, toy_samples

TASK = Task("toy", "walk", "0", "train")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(model_dir):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(model_dir)


def test_paper_recipe_has_the_papers_values():
    paper = RECIPES["paper"]
    assert (paper.r, paper.alpha, paper.dropout, paper.lr, paper.schedule, paper.weight_decay) == (8, 16, 0.1, 5e-5, "constant", 0.0)
    assert paper.targets == ("q_proj", "k_proj", "v_proj", "o_proj") and paper.optimizer == "paged_adamw_8bit"
    assert (paper.epochs, RECIPES["paper-alfworld"].epochs) == (29, 9) and paper.weights == "bfloat16"
    with pytest.raises(FrozenInstanceError): paper.lr = 1


def test_a_processor_says_whether_it_has_bfloat16(monkeypatch):
    import torch
    for there in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
        assert has_bfloat16() is there and has_bfloat16("cpu") is there


@pytest.mark.parametrize("change, word", [
    (dict(batch=10, micro_batch=4), "multiple"), (dict(schedule="cosin"), "constant_with_warmup"), (dict(warmup=5), "no effect"),
    (dict(targets="q_proj"), "tuple"), (dict(targets=()), "tuple"), (dict(weights="float64"), "bfloat16"), (dict(r=0), "at least 1")])
def test_a_recipe_that_contradicts_itself_is_refused(change, word):
    with pytest.raises(ValueError, match=word): replace(Recipe(), **change)


def test_too_long_names_sample_length_and_way_out():
    samples = toy_samples(3)
    long = Sample(Task("toy", "run", "7", "train"), [9] * 100, [0] * 90 + [1] * 10)
    with pytest.raises(ValueError, match=r"sample 3 \(toy/run/7@train\) has 100 tokens, max_length .* is 95: 5 of its 10 supervised.*Raise max_length"):
        check_samples([*samples, long], replace(RECIPES["nano"], max_length=95))
    check_samples([*samples, long], replace(RECIPES["nano"], max_length=100))


@pytest.mark.parametrize("mask, word", [([0, 0, 0], "no supervised token"), ([1, 0, 1], "nothing stands before it")])
def test_nothing_to_learn_is_refused(mask, word):
    with pytest.raises(ValueError, match=word): check_samples([Sample(TASK, [3, 4, 5], mask)], RECIPES["nano"])
    with pytest.raises(ValueError, match="no sample"): check_samples([], RECIPES["nano"])
    with pytest.raises(ValueError, match="3 ids but a mask of 2"): Sample(TASK, [3, 4, 5], [0, 1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 9), st.integers(1, 30), st.integers(0, 3))
def test_plan(counts, batch, window, max_steps, seed):
    recipe = replace(RECIPES["nano"], batch=batch, micro_batch=1, window=window, max_steps=max_steps, seed=seed)
    if len(counts) < batch:
        with pytest.raises(ValueError, match="lower batch"): plan(counts, recipe)
        return
    steps = plan(counts, recipe)
    assert steps == plan(counts, recipe) and len(steps) == max_steps
    assert all(len(s) == batch == len(set(s)) for s in steps), "every step is full, and holds no sample twice"
    seen = Counter(i for s in steps for i in s)
    assert max(seen.values()) <= -(-max_steps * batch // len(counts)) + 1, "nobody is far ahead"
    assert [sorted(i for m in micro_batches(s, counts, 2) for i in m) for s in steps] == [sorted(s) for s in steps]


def test_epochs_cover_every_sample_as_often():
    for n in (16, 19, 40):
        recipe = replace(RECIPES["nano"], batch=8, max_steps=0, epochs=8)
        seen = Counter(i for s in plan(list(range(1, n + 1)), recipe) for i in s)
        assert set(seen.values()) == {8}, n


def test_longer_contexts_leave_the_plan_alone():
    plain = toy_samples(40)
    padded = [replace(s, ids=(9,) * (10 * i) + s.ids, mask=(0,) * (10 * i) + s.mask) for i, s in enumerate(plain)]
    a, b = (plan([s.supervised for s in group], RECIPES["nano"]) for group in (plain, padded))
    assert a == b
    tokens = [planned_tokens(a, group, RECIPES["nano"]) for group in (plain, padded)]
    assert (tokens[0][:, 0] == tokens[1][:, 0]).all() and (tokens[0][:, 1] < tokens[1][:, 1]).all()
    assert (tokens[0][:, 1] <= tokens[0][:, 2]).all()


def test_collate_keeps_every_label_and_no_other():
    samples = toy_samples(5)
    batch = collate(samples)
    labels = batch["labels"]
    assert int((labels != IGNORED).sum()) == sum(s.supervised for s in samples)
    for row, s in zip(labels.tolist(), samples): assert tuple(x for x in row if x != IGNORED) == s.targets
    assert batch["attention_mask"].sum(1).tolist() == [len(s) for s in samples]
    assert batch["logits_to_keep"].tolist() == sorted({t - 1 for s in samples for t, m in enumerate(s.mask) if m}) == predicting(labels).tolist()


def test_loss_is_the_models_own_and_padding_and_cutting_change_nothing(model):
    import torch
    samples = toy_samples(6, vocabulary=300)
    alone = np.concatenate([token_losses(model, [s]) for s in samples])
    np.testing.assert_allclose(token_losses(model, samples, batch=3), alone, rtol=1e-5)
    for s, (nats, count) in zip(samples, alone):
        data = collate([s]); data.pop("logits_to_keep")
        with torch.no_grad(): assert float(model(**data).loss) == pytest.approx(nats / count, rel=1e-5)
    total, losses = sum(s.supervised for s in samples), []
    for part in micro_batches(range(6), [len(s) for s in samples], 4):
        data = collate([samples[i] for i in part]); labels = data.pop("labels")
        with torch.no_grad():
            losses.append(float(supervised_loss(model(**data), labels, total)))
            data.pop("logits_to_keep")
            assert float(supervised_loss(model(**data), labels, total)) == pytest.approx(losses[-1], rel=1e-5), "with all logits, too"
    assert sum(losses) == pytest.approx(alone[:, 0].sum() / total, rel=1e-5)


def test_samples_are_the_prompt_encoders_work(model_dir):
    prompt = pytest.importorskip("exprag.prompt")
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    encoder = prompt.PromptEncoder(tokenizer, prompt.PromptFormat())
    trajectories = episodes(4)
    for trajectory, sample in zip(trajectories, make_samples(trajectories, encoder)):
        assert tokenizer.decode(sample.targets).split("<|end|>")[:-1] == list(trajectory.actions)
        assert (sample.task, sample.source, sample.experience_ids) == (trajectory.task, trajectory.id, ())
