"Behaviour of exprag.combined: retrieval for training, and equal budgets."
import json
from dataclasses import replace
from pathlib import Path

import pytest

from exprag.audit import LeakError, audit, leaks
from exprag.combined import (
    Variation, action_agreement, check_aligned, equal_budget, retrieve_for_training, sibling_share)
from exprag.memory.adaptation import adapt_to_goal
from exprag.prompt import Encoded, PromptEncoder
from exprag.query import Retriever, SentenceEncoder
from exprag.samples import CONFIGS, fit_samples, make_samples
from exprag.select import (
    Memory, NoMemory, Selection, exclude_same_task, exclude_siblings, order, successes_only, top_k)
from exprag.sft import train
from exprag.store import Store
from exprag.trajectory import Step, Task
from exprag.views import Experience
from exprag.world import is_hard, load_panel
from exprag.worlds.scienceworld import EASY_TYPES, HARD_TYPES
from sft_fixtures import episodes, tiny_model

HARD = "power-component"
CONFIG = replace(CONFIGS["nano"], autocast=False, max_steps=5, batch=4, micro_batch=2, warmup=1, dropout=0.1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(model_dir):
    from transformers import AutoTokenizer
    return PromptEncoder(AutoTokenizer.from_pretrained(model_dir))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("store")/"e.db") as store:
        store.add_many(episodes(10) + episodes(4, type=HARD, seed=5))
        yield store


@pytest.fixture(scope="module")
def retriever(store): return Retriever(store, SentenceEncoder())


def memory(retriever, k=2, composition="matched", exclude=True, more=()):
    return Memory(retriever, (*[exclude_same_task()] * exclude, successes_only(), top_k(k), *more), composition)


def test_types_used_here_are_what_the_tests_think(): assert HARD in HARD_TYPES and "find-plant" in EASY_TYPES


def test_every_episode_gets_experience_but_never_itself(retriever):
    recalled = retrieve_for_training(episodes(10), memory(retriever))
    assert recalled.counts == {2: 10}
    for t in episodes(10):
        found = recalled.recall(t)
        assert t.task not in [e.task for e in found.experiences] and t.id not in found.ids
        assert found.ids == memory(retriever).recall(t.opening()).ids, "what the test would retrieve"


def test_agreement_compares_actions_of_the_same_number():
    (a,) = episodes(1)
    late = replace(a, steps=a.steps[1:], score=None, success=None)
    other = replace(a, steps=(a.steps[0], *late.steps[1:], a.steps[0]), score=None, success=None)
    def agreement(t, *others): return action_agreement(t, [Experience(o) for o in others])
    assert agreement(a, a) == agreement(a, a, late) == 1 and agreement(a) == 0
    assert agreement(a, other) == 1 / len(a) and agreement(a, late) == sum(x == y for x, y in zip(a.actions, late.actions)) / len(a) < 1
    assert agreement(replace(a, steps=(), score=None, success=None), a) == 0


def test_experience_may_be_adapted_to_the_whole_demonstration():
    first, second = episodes(2)
    class Fixed:
        def recall(self, trajectory): return Selection((Experience(second),))
        def describe(self): return {"kind": "fixed"}
    seen = []
    def shorten(experience, trajectory):
        seen.append(trajectory)
        return replace(experience, trajectory=replace(experience.trajectory, steps=experience.trajectory.steps[:1]))
    plain, adapted = (retrieve_for_training([first], Fixed(), adapt=how) for how in (None, shorten))
    assert [len(r.recall(first).experiences[0]) for r in (plain, adapted)] == [len(second), 1] and seen == [first]
    assert adapted.describe()["adapt"] == "shorten" and "adapt" not in plain.describe() and plain.fingerprint != adapted.fingerprint


def test_only_the_opening_is_looked_at(retriever):
    seen = []
    class Spy:
        def recall(self, trajectory): seen.append(trajectory); return NoMemory().recall(trajectory)
        def describe(self): return {}
    retrieve_for_training(episodes(2), Spy()); make_samples(episodes(2), FakeEncoder(), Spy())
    assert len(seen) == 4 and all(not t.steps and t.score is None and not t.provenance for t in seen)


class FakeEncoder:
    def encode(self, trajectory, experiences=()): return Encoded([1, 2, 3], [0, 1, 1])


def test_a_memory_without_the_exclusion_is_refused_here_and_in_make_samples(retriever):
    wrong = memory(retriever, exclude=False)
    with pytest.raises(LeakError, match=r"find-plant/\d.*same task.*exclude_same_task"): retrieve_for_training(episodes(10), wrong)
    with pytest.raises(LeakError, match="same task.*exclude_same_task"): make_samples(episodes(10), FakeEncoder(), wrong)


def test_hard_types_never_enter_a_training_context(retriever):
    with pytest.raises(LeakError, match="power-component.*'matched' or the 'easy'"): retrieve_for_training(episodes(10), memory(retriever, k=13, composition="all"))
    recalled = retrieve_for_training(episodes(10), memory(retriever, k=13))
    assert not any(is_hard(e.task) for t in episodes(10) for e in recalled.recall(t).experiences)


def test_chance_belongs_to_the_episode(retriever):
    some = episodes(10)
    def made(trajectories, **variation): return retrieve_for_training(trajectories, memory(retriever), Variation(**variation))
    a, b = made(some, drop_memory=0.5, seed=3), made(some[::-1], drop_memory=0.5, seed=3)
    assert a.fingerprint == b.fingerprint and set(a.counts) == {0, 2}
    assert made(some, drop_memory=0.5, seed=4).fingerprint != a.fingerprint
    assert made(some, drop_memory=1.0).counts == {0: 10}


@pytest.mark.parametrize("wrong, message", [
    (dict(drop_memory=2), "drop_memory is 2, a probability"), (dict(drop_memory=-0.1), "a probability"),
    (dict(ks=()), "ks is .*, must hold at least one"), (dict(ks=(1, -1)), "none below 0")])
def test_a_variation_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message): Variation(**wrong)


def test_a_variation_says_what_decides_it(retriever):
    assert Variation().describe() == {"drop_memory": 0.0, "ks": None, "seed": 0}
    recalled = retrieve_for_training(episodes(2), memory(retriever), Variation(0.5, (1, 2), 7))
    assert recalled.describe() == {"kind": "recalled", "memory": memory(retriever).describe(), "drop_memory": 0.5, "ks": [1, 2], "seed": 7}


def test_without_hits_the_reading_order_is_the_rank():
    some = episodes(4)
    class Fixed:
        def recall(self, trajectory): return Selection(tuple(map(Experience, some[1:])))
        def describe(self): return {"kind": "fixed"}
    assert retrieve_for_training(some[:1], Fixed(), Variation(ks=(2,))).recall(some[0]).ids == tuple(t.id for t in some[1:3])


def test_drawn_k_keeps_the_nearest_in_reading_order(retriever):
    last = Memory(retriever, (exclude_same_task(), top_k(4), order("nearest_last")), "matched")
    whole, drawn = (retrieve_for_training(episodes(10), last, Variation(ks=ks)) for ks in (None, (1, 2, 3)))
    assert set(drawn.counts) <= {1, 2, 3} and len(drawn.counts) > 1
    for t in episodes(10):
        few, all_ = drawn.recall(t), whole.recall(t)
        assert few.ids == all_.ids[len(all_.ids) - len(few.ids):], "nearest last: the nearest are at the end"


def test_an_episode_that_was_not_retrieved_for_is_an_error(retriever):
    with pytest.raises(KeyError, match="give this episode to retrieve_for_training"):
        retrieve_for_training(episodes(3), memory(retriever)).recall(episodes(1, start=50, seed=9)[0])


def test_adapted_experience_keeps_the_stores_ids(retriever, store, encoder):
    recalled = retrieve_for_training(episodes(4), memory(retriever, more=[adapt_to_goal()]))
    samples = make_samples(episodes(4), encoder, recalled)
    assert all(id in store for s in samples for id in s.experience_ids)


def test_the_share_of_contexts_with_a_sibling(store, retriever):
    some = episodes(10)
    goals = [t.goal for t in some]
    assert len(set(goals)) < 10, "some of the toy goals are equal"
    recalled = retrieve_for_training(some, memory(retriever, k=9))
    expected = sum(goals.count(goal) > 1 for goal in goals) / 10
    assert sibling_share(recalled, some) == expected > 0
    apart = retrieve_for_training(some, Memory(retriever, (exclude_same_task(), exclude_siblings(), top_k(9)), "matched"))
    assert sibling_share(apart, some) == 0 and sibling_share(apart, []) == 0
    rewritten = retrieve_for_training(some, memory(retriever, k=9, more=[adapt_to_goal()]))
    assert sibling_share(rewritten, some, store) == expected, "by its own goal, not by the one it was rewritten to"
    with pytest.raises(ValueError, match="was rewritten.*give the store"): sibling_share(rewritten, some)


def test_episodes_too_long_with_experience_are_missing_in_both_runs(retriever, encoder, model_dir, tmp_path):
    groups = {"plain": None, "combined": retrieve_for_training(episodes(10), memory(retriever))}
    lengths = [len(s) for s in make_samples(episodes(10), encoder, groups["combined"])]
    limit = sorted(set(lengths))[-2]
    long = sum(length > limit for length in lengths)
    with pytest.warns(UserWarning, match=f"{long} of 10 episodes .* left out"): fitted = fit_samples(episodes(10), encoder, groups, limit, "leave_out")
    check_aligned(*fitted.groups.values())
    runs = {name: train(model_dir, group, replace(CONFIG, max_steps=1, name=name), tmp_path, progress=False, threads=1, left_out=fitted.left_out)
            for name, group in fitted.groups.items()}
    assert equal_budget(*runs.values()).steps == 1 and runs["plain"].left_out == runs["combined"].left_out and len(runs["plain"].left_out) == long
    unsaid = train(model_dir, fitted["plain"], replace(CONFIG, max_steps=1), tmp_path/"unsaid", progress=False, threads=1)
    assert equal_budget(unsaid, runs["combined"]).steps == 1, "what was left out is a note, not a difference in what was trained on"
    place = runs["plain"].path/"config.json"
    record = json.loads(place.read_text())
    del record["config"]["loss_per"]  # as a run of an earlier version
    place.write_text(json.dumps(record))
    assert equal_budget(*runs.values()).steps == equal_budget(*list(runs.values())[::-1]).steps == 1


@pytest.fixture(scope="module")
def pair(retriever, encoder, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    recalled = retrieve_for_training(episodes(10), memory(retriever))
    groups = {"plain": make_samples(episodes(10), encoder), "combined": make_samples(episodes(10), encoder, recalled)}
    return groups, {n: train(model_dir, g, replace(CONFIG, name=n), out, progress=False, threads=1) for n, g in groups.items()}, out


def test_supervised_tokens_are_equal_in_every_step_and_cost_is_reported(pair):
    groups, runs, _ = pair
    check_aligned(*groups.values())
    assert all(len(a) < len(b) and b.experience_ids for a, b in zip(*groups.values()))
    budget = equal_budget(*runs.values())
    assert [l["supervised"] for l in runs["plain"].losses] == [l["supervised"] for l in runs["combined"].losses]
    assert [l["samples"] for l in runs["plain"].losses] == [l["samples"] for l in runs["combined"].losses]
    assert (budget.steps, budget.supervised) == (5, runs["plain"].supervised) and budget.ratio == runs["combined"].computed / runs["plain"].computed > 1
    assert set(runs["combined"].manifest.contents) >= {i for s in groups["combined"] for i in s.experience_ids}


def test_runs_that_differ_in_more_than_context_are_refused(pair, model_dir, tmp_path):
    groups, runs, out = pair
    seed = train(model_dir, groups["combined"], replace(CONFIG, seed=1), tmp_path, progress=False, threads=1)
    with pytest.raises(ValueError, match="configurations differ in seed: 2025 and 1"): equal_budget(runs["plain"], seed)
    base = train(tiny_model(tmp_path/"other", seed=3), groups["combined"], CONFIG, tmp_path, progress=False, threads=1)
    with pytest.raises(ValueError, match="different base models"): equal_budget(runs["plain"], base)
    turned = train(model_dir, groups["combined"][::-1], CONFIG, tmp_path, progress=False, threads=1)
    with pytest.raises(ValueError, match="line 1 of data.jsonl is .*same order"): equal_budget(runs["plain"], turned)
    other = [*groups["combined"][:1], replace(groups["combined"][1], task=Task("scienceworld", "melt", "1", "train"), source="f" * 32), *groups["combined"][2:]]
    elsewhere = train(model_dir, other, CONFIG, tmp_path, progress=False, threads=1)
    assert [(l["samples"], l["supervised"]) for l in elsewhere.losses] == [(l["samples"], l["supervised"]) for l in runs["plain"].losses]
    with pytest.raises(ValueError, match="line 2 of data.jsonl is train scienceworld/find-plant/.* and train scienceworld/melt/1@train f.*same episodes"):
        equal_budget(runs["plain"], elsewhere)
    dev = train(model_dir, groups["combined"], CONFIG, tmp_path, groups["combined"][:1], progress=False, threads=1)
    with pytest.raises(ValueError, match="line 11 of data.jsonl is missing in one run"): equal_budget(runs["plain"], dev)
    with pytest.raises(ValueError, match="sample 0 is"): check_aligned(groups["plain"], groups["combined"][::-1])
    with pytest.raises(ValueError, match="9 combined"): check_aligned(groups["plain"], groups["combined"][1:])
    with pytest.raises(ValueError, match="sample 0 .*same encoder"): check_aligned([replace(groups["plain"][0], mask=(0,) * len(groups["plain"][0]))], groups["combined"][:1])


def test_our_adapters_pass_the_audit_and_their_random_base_is_not_known(pair, model_dir):
    panel = load_panel("scienceworld", "test")
    assert audit([run.manifest for run in pair[1].values()], panel) == (Path(model_dir).name,)
    assert not leaks(pair[1]["combined"].manifest, panel)
