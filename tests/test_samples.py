"Behaviour of exprag.samples: configurations, samples, the plan, the loss."
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.samples import (
    CONFIGS, IGNORED, SFTConfig, Sample, _predicting, check_samples, collate, epoch_ends, fit_samples, kept_epochs, make_samples,
    micro_batches, plan_steps, planned_tokens, supervised_loss, token_losses)
from exprag.trajectory import Task
from exprag.views import Experience, Hit
from sft_fixtures import episodes, tiny_model, toy_samples

TASK = Task("toy", "walk", "0", "train")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(model_dir):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(model_dir)


def test_the_defaults_are_the_papers_values():
    paper = CONFIGS["paper"]
    assert (paper.r, paper.alpha, paper.dropout, paper.lr, paper.schedule, paper.weight_decay) == (8, 16, 0.1, 5e-5, "constant", 0.0)
    assert paper.targets == ("q_proj", "k_proj", "v_proj", "o_proj") and paper.optimizer == "paged_adamw_8bit"
    assert (paper.epochs, CONFIGS["paper-alfworld"].epochs) == (29, 9) and paper.weights == "bfloat16"
    assert paper == SFTConfig()
    with pytest.raises(FrozenInstanceError): paper.lr = 1


@pytest.mark.parametrize("change, word", [
    (dict(batch=10, micro_batch=4), "multiple"), (dict(schedule="cosin"), "constant_with_warmup"), (dict(warmup=5), "no effect"),
    (dict(targets="q_proj"), "tuple"), (dict(targets=()), "tuple"), (dict(weights="float64"), "bfloat16"), (dict(r=0), "at least 1"),
    (dict(loss_per="token"), "choose one of step, average"), (dict(epochs=0), "above 0"), (dict(lr="5e-5"), "of type float"), (dict(batch=True), "of type int"),
    (dict(dropout=-0.1), "below 0"), (dict(checkpointing=1), "of type bool"), (dict(batch=8.0), "of type int"), (dict(keep_epochs=(0,)), "first epoch is 1"),
    (dict(keep_epochs="1"), "must be 'all' or"), (dict(keep_epochs=(1.5,)), "must be 'all' or"), (dict(keep_epochs=(3, 30)), "names epoch 30, the run has 29")])
def test_a_configuration_that_contradicts_itself_is_refused(change, word):
    with pytest.raises(ValueError, match=f"configuration 'paper': .*{word}"): replace(SFTConfig(), **change)


def test_a_configuration_is_read_from_a_table_of_a_plan():
    tomllib = pytest.importorskip("tomllib")
    table = tomllib.loads('lr = 1e-4\nepochs = 3\nkeep_epochs = [1, 3]\ntargets = ["q_proj"]\ncheckpointing = false')
    read = SFTConfig.named("paper", **table)
    assert read == replace(CONFIGS["paper"], lr=1e-4, epochs=3, keep_epochs=(1, 3), targets=("q_proj",), checkpointing=False)
    assert SFTConfig.from_dict(table) == read and SFTConfig.named("smollm2") == CONFIGS["smollm2"]
    with pytest.raises(ValueError, match="unknown configuration 'papper'; did you mean 'paper'"): SFTConfig.named("papper")
    with pytest.raises(ValueError, match="unknown field of SFTConfig 'learning_rate'"): SFTConfig.from_dict({"learning_rate": 1})
    with pytest.raises(ValueError, match="unknown field of SFTConfig 'epoch'; did you mean 'epochs'"): SFTConfig.named("nano", epoch=3)
    with pytest.raises(ValueError, match="configuration 'nano': batch is 7.5"): SFTConfig.named("nano", batch=7.5)


def test_grouping_by_length_is_off_unless_asked_for():
    assert {name: c.window for name, c in CONFIGS.items()} == {"paper": 1, "paper-alfworld": 1, "nano": 8, "smollm2": 1}
    counts = list(range(1, 257))
    def spread(window): return np.mean([np.ptp([counts[i] for i in s]) for s in plan_steps(counts, SFTConfig(window=window, epochs=1))])
    assert spread(1) > 150 > 50 > spread(8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 30), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_ends_when_every_sample_was_taken_so_often(n, batch, max_steps, window, seed):
    config = replace(CONFIGS["nano"], batch=min(batch, n), max_steps=max_steps, window=window, seed=seed)
    steps, ends = plan_steps(list(range(1, n + 1)), config), epoch_ends(n, config)
    for epoch, end in ends.items():
        seen = Counter(i for s in steps[:end] for i in s)
        assert min(seen[i] for i in range(n)) >= epoch > min(Counter(i for s in steps[:end - 1] for i in s)[i] for i in range(n))
    seen = Counter(i for s in steps for i in s)
    assert list(ends) == list(range(1, min(seen[i] for i in range(n)) + 1))
    assert kept_epochs(n, replace(config, keep_epochs="all")) == ends and kept_epochs(n, config) == {}
    with pytest.raises(ValueError, match="raise max_steps"): kept_epochs(n, replace(config, keep_epochs=(len(ends) + 1,)))


def test_too_long_names_sample_length_and_way_out():
    samples = toy_samples(3)
    long = Sample(Task("toy", "run", "7", "train"), [9] * 100, [0] * 90 + [1] * 10)
    with pytest.raises(ValueError, match=r"sample 3 \(toy/run/7@train\) has 100 tokens, max_length .* is 95: 5 of its 10 supervised.*Raise max_length"):
        check_samples([*samples, long], replace(CONFIGS["nano"], max_length=95))
    check_samples([*samples, long], replace(CONFIGS["nano"], max_length=100))


@pytest.mark.parametrize("mask, word", [([0, 0, 0], "no supervised token"), ([1, 0, 1], "nothing stands before it")])
def test_nothing_to_learn_is_refused(mask, word):
    with pytest.raises(ValueError, match=word): check_samples([Sample(TASK, [3, 4, 5], mask)], CONFIGS["nano"])
    with pytest.raises(ValueError, match="no sample"): check_samples([], CONFIGS["nano"])
    with pytest.raises(ValueError, match="3 ids but a mask of 2"): Sample(TASK, [3, 4, 5], [0, 1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 9), st.integers(1, 30), st.integers(0, 3))
def test_plan(counts, batch, window, max_steps, seed):
    config = replace(CONFIGS["nano"], batch=batch, micro_batch=1, window=window, max_steps=max_steps, seed=seed)
    if len(counts) < batch:
        with pytest.raises(ValueError, match="lower batch"): plan_steps(counts, config)
        return
    steps = plan_steps(counts, config)
    assert steps == plan_steps(counts, config) and len(steps) == max_steps
    assert all(len(s) == batch == len(set(s)) for s in steps), "every step is full, and holds no sample twice"
    seen = Counter(i for s in steps for i in s)
    assert max(seen.values()) <= -(-max_steps * batch // len(counts)) + 1, "no sample is used much more often than another"
    assert [sorted(i for m in micro_batches(s, counts, 2) for i in m) for s in steps] == [sorted(s) for s in steps]


def test_epochs_cover_every_sample_as_often():
    for n in (16, 19, 40):
        config = replace(CONFIGS["nano"], batch=8, max_steps=0, epochs=8)
        seen = Counter(i for s in plan_steps(list(range(1, n + 1)), config) for i in s)
        assert set(seen.values()) == {8}, n


def test_longer_contexts_leave_the_plan_alone():
    plain = toy_samples(40)
    padded = [replace(s, ids=(9,) * (10 * i) + s.ids, mask=(0,) * (10 * i) + s.mask) for i, s in enumerate(plain)]
    a, b = (plan_steps([s.supervised for s in group], CONFIGS["nano"]) for group in (plain, padded))
    assert a == b
    tokens = [planned_tokens(a, group, CONFIGS["nano"]) for group in (plain, padded)]
    assert (tokens[0][:, 0] == tokens[1][:, 0]).all() and (tokens[0][:, 1] < tokens[1][:, 1]).all()
    assert (tokens[0][:, 1] <= tokens[0][:, 2]).all()


def test_collate_keeps_every_label_and_no_other():
    samples = toy_samples(5)
    batch = collate(samples)
    labels = batch["labels"]
    assert int((labels != IGNORED).sum()) == sum(s.supervised for s in samples)
    for row, s in zip(labels.tolist(), samples): assert tuple(x for x in row if x != IGNORED) == s.targets
    assert batch["attention_mask"].sum(1).tolist() == [len(s) for s in samples]
    assert batch["logits_to_keep"].tolist() == sorted({t - 1 for s in samples for t, m in enumerate(s.mask) if m}) == _predicting(labels).tolist()


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


class Words:
    "An encoder with a token for each action, observation and action of the experience."
    def encode(self, trajectory, experiences=()):
        context = [1] * sum(len(e) for e in experiences)
        own = [x for _ in trajectory.steps for x in (2, 3)]
        return [1, *context, *own], [0, *(0 for _ in context), *(int(x == 2) for x in own)]


class Recalls:
    "The same experiences for every episode, with ranks."
    def __init__(self, *found): self.found = found
    def recall(self, trajectory): return self.found


def test_one_long_episode_does_not_refuse_the_others():
    several = sorted(episodes(12), key=len)
    limit = 2 * len(several[-1])  # the longest alone has one token more
    long = [t for t in several if 2 * len(t) + 1 > limit]
    assert 0 < len(long) < 12
    with pytest.raises(ValueError, match=rf"{len(long)} of 12 episodes are longer than {limit} tokens: .*{long[0].task}.*leave_out or shorten"):
        fit_samples(several, Words(), {"plain": None}, limit)
    with pytest.warns(UserWarning, match=rf"{len(long)} of 12 episodes .* were left out: .*{long[0].task}"):
        fitted = fit_samples(several, Words(), {"plain": None}, limit, "leave_out")
    assert [s.task for s in fitted["plain"]] == [t.task for t in several if t not in long] and [s.task for s in fitted.left_out] == [t.task for t in long]
    check_samples(fitted["plain"], replace(CONFIGS["nano"], max_length=limit))
    with pytest.raises(ValueError, match="even without experience.*over_length=leave_out"): fit_samples(several, Words(), {"plain": None}, limit, "shorten")
    with pytest.raises(ValueError, match="unknown policy for long episodes 'cut'"): fit_samples(several, Words(), {"plain": None}, limit, "cut")


def test_an_episode_is_left_out_of_all_groups_or_of_none():
    several, (other,) = episodes(6), episodes(1, start=90, seed=4)
    limit = 2 * max(map(len, several)) + 1
    groups = {"plain": None, "combined": Recalls(Experience(other))}
    with pytest.warns(UserWarning, match="were left out"): fitted = fit_samples(several, Words(), groups, limit, "leave_out")
    assert [s.task for s in fitted["plain"]] == [s.task for s in fitted["combined"]] and 0 < len(fitted["plain"]) < 6
    assert all(s.experience_ids == (other.id,) for s in fitted.left_out), "the longest of the groups is what is reported"
    assert make_samples(several, Words()) == list(fit_samples(several, Words(), groups, 999)["plain"])


def test_shortening_takes_the_farthest_experience_and_no_target():
    several, others = episodes(6), episodes(3, start=90, seed=4)
    near_last = [Experience(t, Hit(t.id, 1.0, rank)) for t, rank in zip(others, (3, 2, 1))]
    limit = 2 * max(map(len, several)) + 1 + len(others[2])
    with pytest.warns(UserWarning, match="experiences were taken out"): fitted = fit_samples(several, Words(), {"combined": Recalls(*near_last)}, limit, "shorten")
    assert [s.targets for s in fitted["combined"]] == [s.targets for s in make_samples(several, Words())] and not fitted.left_out
    for s in fitted["combined"]:
        assert len(s) <= limit and s.dropped == tuple(t.id for t in others[:len(s.dropped)])
        assert s.experience_ids == tuple(t.id for t in others[len(s.dropped):]) and s.describe().get("dropped", []) == list(s.dropped)
    assert any(s.dropped for s in fitted["combined"])
