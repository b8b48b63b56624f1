"Behaviour of exprag.combined: retrieval for training, equal budgets, and an audit that finds planted leaks."
from dataclasses import replace
from pathlib import Path

import pytest

from exprag.combined import (audit, check_aligned, check_experience, equal_budget, fits, index_manifest, is_hard, leaks, retrieve_for_training)
from exprag.environment import EASY_TYPES, HARD_TYPES, panel
from exprag.prompt import PromptEncoder
from exprag.query import Retriever, SentenceEncoder
from exprag.samples import RECIPES, LeakError, make_samples, opening
from exprag.select import Memory, NoMemory, Selection, exclude_same_task, order, successes_only, top_k
from exprag.sft import Manifest, train
from exprag.store import Store
from exprag.trajectory import Step, Task
from sft_fixtures import episodes, tiny_model

HARD = "power-component"
RECIPE = replace(RECIPES["nano"], autocast=False, max_steps=5, batch=4, micro_batch=2, warmup=1, dropout=0.1)


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


def memory(retriever, k=2, composition="matched", exclude=True, **kw):
    return Memory(retriever, (*[exclude_same_task()] * exclude, successes_only(), top_k(k)), composition, **kw)


def test_types_used_here_are_what_the_tests_think(): assert HARD in HARD_TYPES and "find-plant" in EASY_TYPES


def test_every_episode_gets_experience_but_never_itself(retriever):
    recalled = retrieve_for_training(episodes(10), memory(retriever))
    assert recalled.counts == {2: 10}
    for t in episodes(10):
        found = recalled.recall(t)
        assert t.task not in [e.task for e in found.experiences] and t.id not in found.ids
        assert found.ids == memory(retriever).recall(opening(t)).ids, "what the test would retrieve"


def test_a_lesson_fits_by_the_lines_of_its_own_numbers():
    (a,) = episodes(1)
    late = replace(a, steps=a.steps[1:], score=None, success=None)
    other = replace(a, steps=(a.steps[0], *late.steps[1:], a.steps[0]), score=None, success=None)
    assert fits(a, [a]) == fits(a, [a, late]) == 1 and fits(a, []) == 0
    assert fits(a, [other]) == 1 / len(a) and fits(a, [late]) == sum(x == y for x, y in zip(a.actions, late.actions)) / len(a) < 1
    assert fits(replace(a, steps=(), score=None, success=None), [a]) == 0


def test_a_lesson_is_shown_what_it_will_have_seen(retriever):
    first, second = (replace(t, steps=(Step("look around", f"This room is called the hall. In it, you see:\n\ta {colour} wire"), *t.steps, Step(f"pick up {colour} wire", "done")))
                     for t, colour in zip(episodes(2), ("red", "blue")))
    class Told:
        def recall(self, trajectory): return Selection((second,))
        def describe(self): return {"kind": "told"}
    plain, retold = (retrieve_for_training([first], Told(), retold=retold) for retold in (False, True))
    assert [r.recall(first).experiences[0].actions[-1] for r in (plain, retold)] == ["pick up blue wire", "pick up red wire"]
    assert retold.describe()["retold"] and "retold" not in plain.describe() and plain.fingerprint != retold.fingerprint


def test_only_the_opening_is_looked_at(retriever):
    seen = []
    class Spy:
        def recall(self, trajectory): seen.append(trajectory); return NoMemory().recall(trajectory)
        def describe(self): return {}
    retrieve_for_training(episodes(2), Spy()); make_samples(episodes(2), FakeEncoder(), Spy())
    assert len(seen) == 4 and all(not t.steps and t.score is None and not t.provenance for t in seen)


class FakeEncoder:
    def encode(self, trajectory, experiences=()):
        class encoded: ids, mask = [1, 2, 3], [0, 1, 1]
        return encoded


def test_a_memory_without_the_exclusion_is_refused_here_and_in_make_samples(retriever):
    wrong = memory(retriever, exclude=False)
    with pytest.raises(LeakError, match=r"find-plant/\d.*same task.*exclude_same_task"): retrieve_for_training(episodes(10), wrong)
    with pytest.raises(LeakError, match="same task.*exclude_same_task"): make_samples(episodes(10), FakeEncoder(), wrong)


def test_relabelling_the_fold_does_not_help():
    one = episodes(1)[0]
    with pytest.raises(LeakError, match="same task"): check_experience(one, [replace(one, task=replace(one.task, fold="dev"))])
    with pytest.raises(LeakError, match="not of the train fold"): check_experience(one, episodes(1, start=7, fold="test"))


def test_hard_types_never_enter_a_training_context(retriever):
    with pytest.raises(LeakError, match="power-component.*'matched' or the 'easy'"): retrieve_for_training(episodes(10), memory(retriever, k=13, composition="all"))
    recalled = retrieve_for_training(episodes(10), memory(retriever, k=13))
    assert not any(is_hard(e.task) for t in episodes(10) for e in recalled.recall(t).experiences)


def test_chance_belongs_to_the_episode(retriever):
    some = episodes(10)
    a = retrieve_for_training(some, memory(retriever), drop_memory=0.5, seed=3)
    b = retrieve_for_training(some[::-1], memory(retriever), drop_memory=0.5, seed=3)
    assert a.fingerprint == b.fingerprint and set(a.counts) == {0, 2}
    assert retrieve_for_training(some, memory(retriever), drop_memory=0.5, seed=4).fingerprint != a.fingerprint
    assert retrieve_for_training(some, memory(retriever), drop_memory=1.0).counts == {0: 10}
    with pytest.raises(ValueError, match="probability"): retrieve_for_training(some, memory(retriever), drop_memory=2)
    with pytest.raises(ValueError, match="at least one"): retrieve_for_training(some, memory(retriever), ks=())


def test_drawn_k_keeps_the_nearest_in_reading_order(retriever):
    last = Memory(retriever, (exclude_same_task(), top_k(4), order("nearest_last")), "matched")
    whole, drawn = retrieve_for_training(episodes(10), last), retrieve_for_training(episodes(10), last, ks=(1, 2, 3))
    assert set(drawn.counts) <= {1, 2, 3} and len(drawn.counts) > 1
    for t in episodes(10):
        few, all_ = drawn.recall(t), whole.recall(t)
        assert few.ids == all_.ids[len(all_.ids) - len(few.ids):], "nearest last: the nearest are at the end"
        assert [e.id for e in few.experiences] == list(few.ids)


def test_an_episode_that_was_not_retrieved_for_is_an_error(retriever):
    with pytest.raises(KeyError, match="give this episode to retrieve_for_training"):
        retrieve_for_training(episodes(3), memory(retriever)).recall(episodes(1, start=50, seed=9)[0])


def test_adapted_experience_keeps_the_stores_ids(retriever, store, encoder):
    recalled = retrieve_for_training(episodes(4), memory(retriever, adapted=True))
    samples = make_samples(episodes(4), encoder, recalled)
    assert all(id in store for s in samples for id in s.experience_ids)


@pytest.fixture(scope="module")
def pair(retriever, encoder, model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    recalled = retrieve_for_training(episodes(10), memory(retriever))
    groups = {"plain": make_samples(episodes(10), encoder), "combined": make_samples(episodes(10), encoder, recalled)}
    return groups, {n: train(model_dir, g, replace(RECIPE, name=n), out, progress=False, threads=1) for n, g in groups.items()}, out


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
    seed = train(model_dir, groups["combined"], replace(RECIPE, seed=1), tmp_path, progress=False, threads=1)
    with pytest.raises(ValueError, match="recipes differ in seed: 2025 and 1"): equal_budget(runs["plain"], seed)
    base = train(tiny_model(tmp_path/"other", seed=3), groups["combined"], RECIPE, tmp_path, progress=False, threads=1)
    with pytest.raises(ValueError, match="different base models"): equal_budget(runs["plain"], base)
    turned = train(model_dir, groups["combined"][::-1], RECIPE, tmp_path, progress=False, threads=1)
    with pytest.raises(ValueError, match="line 1 of data.jsonl is .*same order"): equal_budget(runs["plain"], turned)
    other = [*groups["combined"][:1], replace(groups["combined"][1], task=Task("scienceworld", "melt", "1", "train"), source="f" * 32), *groups["combined"][2:]]
    elsewhere = train(model_dir, other, RECIPE, tmp_path, progress=False, threads=1)
    assert [(l["samples"], l["supervised"]) for l in elsewhere.losses] == [(l["samples"], l["supervised"]) for l in runs["plain"].losses]
    with pytest.raises(ValueError, match="line 2 of data.jsonl is train scienceworld/find-plant/.* and train scienceworld/melt/1@train f.*same episodes"):
        equal_budget(runs["plain"], elsewhere)
    dev = train(model_dir, groups["combined"], RECIPE, tmp_path, groups["combined"][:1], progress=False, threads=1)
    with pytest.raises(ValueError, match="line 11 of data.jsonl is missing in one run"): equal_budget(runs["plain"], dev)
    with pytest.raises(ValueError, match="sample 0 is"): check_aligned(groups["plain"], groups["combined"][::-1])
    with pytest.raises(ValueError, match="9 combined"): check_aligned(groups["plain"], groups["combined"][1:])
    with pytest.raises(ValueError, match="sample 0 .*same encoder"): check_aligned([replace(groups["plain"][0], mask=(0,) * len(groups["plain"][0]))], groups["combined"][:1])


TEST = panel("test")
CLEAN = Manifest("adapter", "clean", tuple(t.task for t in episodes(5)), tuple(t.id for t in episodes(5)))


def test_clean_artefacts_pass_and_unknown_ones_are_named(store):
    hub = Manifest("pretraining", "some/model", known=False)
    assert audit([CLEAN, index_manifest(store)], TEST) == ()
    assert audit([replace(CLEAN, parents=(hub,))], TEST) == ("some/model",)
    assert any(is_hard(t) for t in index_manifest(store).tasks)
    assert len(index_manifest(store, store.find(types=["find-plant"])).tasks) == 10


def test_our_trained_adapters_pass_and_their_random_base_is_not_known(pair, model_dir):
    assert audit([r.manifest for r in pair[1].values()], TEST) == (Path(model_dir).name,)
    assert not leaks(pair[1]["combined"].manifest, TEST)


EASY_TEST = next(t for t in TEST.tasks if t.type in EASY_TYPES)
HARD_TEST = next(t for t in TEST.tasks if t.type in HARD_TYPES)
HARD_TRAIN = Task("scienceworld", HARD, "0", "train")


@pytest.mark.parametrize("manifest, rule, what", [
    (replace(CLEAN, tasks=CLEAN.tasks + (EASY_TEST,)), "a task of panel 'test'", EASY_TEST),
    (replace(CLEAN, tasks=CLEAN.tasks + (replace(EASY_TEST, fold="train"),)), "a task of panel 'test'", replace(EASY_TEST, fold="train")),
    (replace(CLEAN, tasks=CLEAN.tasks + (HARD_TRAIN,)), "a hard type in weights", HARD_TRAIN),
    (Manifest("tokenizer", "bpe", (HARD_TRAIN,)), "a hard type in weights", HARD_TRAIN),
    (Manifest("pretraining", "base", (HARD_TRAIN,)), "a hard type in weights", HARD_TRAIN),
    (Manifest("index", "all", (HARD_TEST,)), "a task of panel 'test'", HARD_TEST),
    (Manifest("index", "all", (Task("scienceworld", "boil", "14", "dev"),)), "not of the train fold", Task("scienceworld", "boil", "14", "dev")),
    (Manifest("threshold", "k", (EASY_TEST,)), "a task of panel 'test'", EASY_TEST),
    (replace(CLEAN, parents=(Manifest("pretraining", "base", parents=(Manifest("tokenizer", "bpe", (EASY_TEST,)),)),)), "a task of panel 'test'", EASY_TEST),
])
def test_a_planted_leak_is_found_and_named(manifest, rule, what):
    with pytest.raises(LeakError, match="the audit for panel 'test' found 1 leaks") as caught: audit([CLEAN, manifest], TEST)
    (leak,) = caught.value.leaks
    assert (leak.rule, leak.what) == (rule, str(what)) and str(what) in str(caught.value)


def test_the_same_content_is_found_under_any_name():
    episode = episodes(1, start=3)[0]
    with pytest.raises(LeakError, match=f"an episode of panel 'test'.*{episode.id}"): audit([Manifest("index", "i", (), (episode.id,))], TEST, [episode.id])


def test_a_threshold_may_be_tuned_on_dev():
    dev = panel("dev")
    assert audit([Manifest("threshold", "k", dev.tasks)], dev) == () == audit([Manifest("threshold", "k", dev.tasks)], TEST)
    with pytest.raises(LeakError): audit([Manifest("adapter", "k", dev.tasks)], dev)


def test_many_leaks_are_counted_and_the_first_are_listed():
    with pytest.raises(LeakError, match="found 149 leaks") as caught: audit([Manifest("index", "i", TEST.tasks)], TEST)
    assert "and 141 more" in str(caught.value) and len(caught.value.leaks) == 149
