"""The audit: manifests, what counts as a leak, and what may stand in a training context."""
import json
from dataclasses import replace

import pytest
from encoders import Letters
from sft_fixtures import episodes

from exprag.audit import (
    LeakError, Manifest, audit, check_experience, evaluation_contents, index_manifest, leaks, memory_manifest, threshold_leaks, words_of)
from exprag.query import Retriever
from exprag.select import Memory, Stage, top_k
from exprag.store import Store
from exprag.trajectory import FrozenMap, Step, Task, Trajectory
from exprag.views import Experience, register_view
from exprag.world import Panel, in_dialect, is_hard, load_panel, load_world

TEST, DEV = load_panel("scienceworld", "test"), load_panel("scienceworld", "dev")
WORLD, HARD = load_world("scienceworld"), "power-component"
CLEAN = Manifest("adapter", "clean", tuple(t.task for t in episodes(5)), tuple(t.id for t in episodes(5)))
EASY_TEST = next(t for t in TEST if t.type in WORLD.easy)
HARD_TEST = next(t for t in TEST if t.type in WORLD.hard)
HARD_TRAIN = Task("scienceworld", HARD, "0", "train")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "e.db") as store:
        store.add_many(episodes(10) + episodes(4, type=HARD, seed=5))
        yield store


# -- manifests

def test_a_manifest_is_a_value_that_survives_json(tmp_path):
    parent = Manifest("tokenizer", "bpe", (HARD_TRAIN,), known=False)
    one = Manifest("adapter", "a", [EASY_TEST, HARD_TRAIN, EASY_TEST], ["b", "a", "b"], [parent])
    assert one.tasks == tuple(sorted((EASY_TEST, HARD_TRAIN))) and one.contents == ("a", "b") and hash(one)
    assert Manifest.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert Manifest.read(one.write(tmp_path)) == Manifest.read(tmp_path) == Manifest.read(one.write(tmp_path / "m.json")) == one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "manifest.json"]


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kind 'weights' is unknown; choose one of tokenizer"): Manifest("weights", "x")
    with pytest.raises(FileNotFoundError, match="what went into this artefact is not known"): Manifest.read(tmp_path)
    for text in ("{", "[]", "{}", '{"kind": 3}'):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ValueError, match="m.json is not a manifest"): Manifest.read(tmp_path / "m.json")


def test_the_manifest_of_an_index(store):
    whole = index_manifest(store)
    assert whole.contents == tuple(store.find()) and len(whole.tasks) == 14 and any(map(is_hard, whole.tasks))
    assert len(index_manifest(store, store.find(types=["find-plant"])).tasks) == 10


def test_the_manifest_of_a_memory_is_what_it_may_show(store):
    store.add_many(episodes(2, fold="dev", start=300))
    retriever = Retriever(store, Letters())
    hard = Panel("p", (HARD_TEST, replace(HARD_TRAIN, variation="16", fold="test")), {HARD_TEST.type: 9, HARD: 9}, {})
    def types(**kw): return {t.type for t in memory_manifest(Memory(retriever, **kw), hard).tasks}
    assert types() == {"find-plant", HARD} and types(composition="easy") == {"find-plant"} and types(composition="matched") == {HARD}
    assert types(composition="empty") == set() == types(composition="hard", only={"types": ["find-plant"]})
    assert all(t.fold == "train" for t in memory_manifest(Memory(retriever), hard).tasks)


def test_what_a_written_view_was_written_from_is_a_parent(store):
    ids = store.find()
    def rules(experience): return "look in boxes"
    rules.sources = lambda experience: ids[:3]
    name, plain = register_view("rules of the audit's test", rules), Memory(Retriever(store, Letters()))
    as_stage = Memory(plain.retriever, (top_k(2), Stage("choose", lambda t, es: [(e, None) for e in es], FrozenMap({"views": [name, "chat"]}))))
    for memory in (Memory(plain.retriever, view=name), as_stage):
        parent, = memory_manifest(memory, TEST).parents
        assert parent.contents == tuple(ids[:3]) and parent.name == f"of the view {name}"
    assert memory_manifest(plain, TEST).parents == ()
    rules.sources = lambda experience: ("0" * 32,)
    with pytest.raises(LeakError, match="keep what a view is written from in the memory's store"):
        memory_manifest(Memory(plain.retriever, view=name), TEST)


# -- the rules

def test_clean_artefacts_pass_and_unknown_ones_are_named(store):
    hub = Manifest("pretraining", "some/model", known=False)
    assert audit([CLEAN, index_manifest(store)], TEST) == ()
    assert audit([replace(CLEAN, parents=(hub,))], TEST) == ("some/model",)


@pytest.mark.parametrize("manifest, rule, what", [
    (replace(CLEAN, tasks=CLEAN.tasks + (EASY_TEST,)), "a task of panel 'test'", EASY_TEST),
    (replace(CLEAN, tasks=CLEAN.tasks + (replace(EASY_TEST, fold="train"),)), "a task of panel 'test'", replace(EASY_TEST, fold="train")),
    (replace(CLEAN, tasks=CLEAN.tasks + (HARD_TRAIN,)), "a hard type in weights", HARD_TRAIN),
    (Manifest("tokenizer", "bpe", (HARD_TRAIN,)), "a hard type in weights", HARD_TRAIN),
    (Manifest("pretraining", "base", (HARD_TRAIN,)), "a hard type in weights", HARD_TRAIN),
    (Manifest("index", "all", (HARD_TEST,)), "a task of panel 'test'", HARD_TEST),
    (Manifest("index", "all", (Task("scienceworld", "boil", "14", "dev"),)), "not of the train fold", Task("scienceworld", "boil", "14", "dev")),
    (Manifest("index", "all", (Task("scienceworld", "boil", "15", "train"),)), "of the dev fold, whatever its label", Task("scienceworld", "boil", "15", "train")),
    (Manifest("threshold", "k", (EASY_TEST,)), "a task of panel 'test'", EASY_TEST),
    (replace(CLEAN, parents=(Manifest("pretraining", "base", parents=(Manifest("tokenizer", "bpe", (EASY_TEST,)),)),)), "a task of panel 'test'", EASY_TEST),
])
def test_a_planted_leak_is_found_and_named(manifest, rule, what):
    with pytest.raises(LeakError, match="the audit for panel 'test' found 1 leak:") as caught: audit([CLEAN, manifest], TEST)
    (leak,) = caught.value.leaks
    assert (leak.rule, leak.what) == (rule, str(what)) and str(what) in str(caught.value)


def test_the_same_content_is_found_under_any_name():
    episode = episodes(1, start=3)[0]
    with pytest.raises(LeakError, match=f"an episode of panel 'test'.*{episode.id}"): audit([Manifest("index", "i", (), (episode.id,))], TEST, [episode.id])


def test_a_threshold_may_be_tuned_on_dev():
    assert audit([Manifest("threshold", "k", DEV.tasks)], DEV) == () == audit([Manifest("threshold", "k", DEV.tasks)], TEST)
    with pytest.raises(LeakError): audit([Manifest("adapter", "k", DEV.tasks)], DEV)


def test_a_threshold_of_the_tested_tasks_is_found_on_its_own():
    elsewhere = Task("scienceworld", "boil", "28", "test")
    found = threshold_leaks([replace(CLEAN, parents=(Manifest("threshold", "k", (*DEV.tasks[:2], elsewhere)),))], DEV)
    assert [(leak.artefact, leak.rule) for leak in found] == [("threshold 'k'", "tuned on a task of panel 'dev'")] * 2 + [("threshold 'k'", "tuned on neither train nor dev")]
    assert threshold_leaks([Manifest("index", "i", (elsewhere,))], DEV) == []


def test_many_leaks_are_counted_and_the_first_are_listed():
    with pytest.raises(LeakError, match="found 149 leaks") as caught: audit([Manifest("index", "i", TEST.tasks)], TEST)
    assert "and 141 more" in str(caught.value) and len(caught.value.leaks) == 149


def test_a_leak_by_two_ways_is_named_once():
    base = Manifest("pretraining", "base", (EASY_TEST,))
    with pytest.raises(LeakError) as caught: audit([replace(CLEAN, parents=(base,)), base], TEST)
    assert len(caught.value.leaks) == 1 and leaks(CLEAN, TEST) == []


# -- contexts of training

def test_another_fold_on_the_label_does_not_help():
    one, = episodes(1)
    with pytest.raises(LeakError, match="same task"): check_experience(one, [Experience(replace(one, task=replace(one.task, fold="dev")))])
    with pytest.raises(LeakError, match="not of the train fold"): check_experience(one, [Experience(t) for t in episodes(1, start=7, fold="test")])
    with pytest.raises(LeakError, match="'matched' or the 'easy'"): check_experience(one, [Experience(t) for t in episodes(1, type=HARD)])
    check_experience(one, [Experience(t) for t in episodes(3, start=1)])


# -- the same words

def household(task, goal="put a hot mug in a desk"):
    return Trajectory(task, goal, "You are in the middle of a room.", (
        Step("go to desk 1", "You arrive at desk 1. On the desk 1, you see nothing."), Step("move mug 1 to desk 1", "You move the mug 1 to the desk 1.")), settings={"grammar": "move"}).finish(1.0, True)


def test_words_are_the_same_in_both_dialects_of_alfworld():
    one = household(next(t for t in load_panel("alfworld", "test") if t.type == "pick_heat_then_place_in_recep"))
    other = in_dialect(one, {"grammar": "put"})
    assert words_of(other) == words_of(one) != words_of(replace(one, goal="another")) and other.id != one.id


def test_words_do_not_depend_on_case_blanks_or_the_task():
    one = episodes(1)[0]
    assert words_of(replace(one, goal=f"  {one.goal.upper()}\n", task=HARD_TRAIN)) == words_of(one) != words_of(replace(one, steps=one.steps[1:]))


def test_the_words_of_other_folds_are_looked_for_in_what_was_used(store):
    kept, outside = store.get(store.find()[0]), episodes(1, start=300, fold="dev", seed=9)[0]
    assert evaluation_contents([index_manifest(store)], store) == frozenset()
    store.add(outside)
    renamed = replace(outside, task=replace(kept.task, variation="77"), goal=outside.goal.upper())
    store.add(renamed)
    adapter = Manifest("adapter", "a", parents=(Manifest("pretraining", "p", (), (renamed.id,)),))
    assert evaluation_contents([adapter], store) == {outside.id, renamed.id}
    assert evaluation_contents([], store) == {outside.id}, "an episode that nothing was made from is no leak"
    assert evaluation_contents([], None, [outside]) == {outside.id}
