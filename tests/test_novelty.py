"Novelty: goal distances, the scale, tables, strata, splits."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import WordEncoder
from exprag.studies.novelty import (
    STRATA, Novelty, NoveltyScale, NoveltyTable, Scale, Split, edges_between, goal_distances,
    leave_one_topic_out, nearest_outside, novelties, read_novelty, stratify, write_novelty)
from exprag.trajectory import Step, Task, Trajectory, read_jsonl
from exprag.world import difficulty, load_panel
from exprag.worlds.scienceworld import EASY_TYPES, HARD_TYPES, TOPICS

DATA = Path(__file__).resolve().parents[1] / "nbs" / "data"
TOPIC_OF = {kind: topic for topic, kinds in TOPICS.items() for kind in kinds}


@pytest.fixture(scope="module")
def episodes():
    return read_jsonl(DATA / "sample.jsonl")[0]


@pytest.fixture(scope="module")
def easy(episodes):
    return [t for t in episodes if t.task.type in EASY_TYPES]


@pytest.fixture(scope="module")
def scale(easy):
    return NoveltyScale.fit(easy, TOPIC_OF, WordEncoder())


def made(kind: str, variation, goal: str, actions, fold="train") -> Trajectory:
    return Trajectory(Task("scienceworld", kind, variation, fold), goal, "o", tuple(Step(a, "x") for a in actions))


# ---- distances ----

def test_goal_distances():
    d = goal_distances(WordEncoder(), ["a b", "c d"], ["a b", "a c", "c d"])
    assert d.shape == (2, 3) and d[0, 0] == d[1, 2] == 0 and d[0, 2] == 1 and 0 < d[0, 1] < 1
    assert goal_distances(WordEncoder(), [], ["a"]).shape == (0, 1) and goal_distances(WordEncoder(), ["a"], []).shape == (1, 0)


def test_roles_are_kept_apart():
    class Prompted(WordEncoder):
        def encode(self, texts, role="document"): return super().encode([f"{role} {t}" for t in texts], role)
    assert goal_distances(Prompted(), ["a"], ["a"])[0, 0] > 0.1, "queries and documents get their own prompts"


# ---- the nearest of others, and one distance's scale ----

@given(st.lists(st.integers(0, 2), min_size=2, max_size=7), st.integers(0, 10 ** 6))
@settings(deadline=None, max_examples=100)
def test_nearest_outside(groups, seed):
    d = np.random.default_rng(seed).random((len(groups), len(groups)))
    if len(set(groups)) < 2:
        with pytest.raises(ValueError, match="nothing outside"): nearest_outside(d, groups)
        return
    expected = [min(d[i, j] for j in range(len(groups)) if groups[j] != groups[i]) for i in range(len(groups))]
    assert nearest_outside(d, groups) == pytest.approx(expected)


def test_nearest_outside_of_nothing():
    with pytest.raises(ValueError, match="nothing outside"): nearest_outside(np.zeros((0, 0)), [])


def test_scale_is_fitted_on_medians():
    d = np.array([[0, 1, 5, 6], [1, 0, 5, 6], [5, 5, 0, 2], [6, 6, 2, 0]], float)
    scale = Scale.fit(d, "abcd", "xxyy")
    assert (scale.familiar, scale.new) == (1.5, 5.0)
    assert scale([1.5, 5.0, 8.5]).tolist() == [0, 1, 2] and float(scale(0)) < 0


@pytest.mark.parametrize("familiar, new", [(0.5, 0.5), (0.6, 0.5), (float("nan"), 0.5)])
def test_a_distance_that_tells_nothing_is_refused(familiar, new):
    with pytest.raises(ValueError, match="cannot tell new from familiar"): Scale(familiar, new)


# ---- the scale ----

def test_the_scale_knows_train_data_only(easy):
    with pytest.raises(ValueError, match="not of the train fold"): NoveltyScale.fit([*easy, replace(easy[0], task=replace(easy[0].task, fold="dev"))], TOPIC_OF, WordEncoder())


def test_the_scale_needs_two_topics(easy):
    with pytest.raises(ValueError, match="nothing outside"): NoveltyScale.fit([t for t in easy if TOPIC_OF[t.task.type] == "state change"], TOPIC_OF, WordEncoder())


def test_a_test_panel_does_not_move_it(easy, scale):
    assert NoveltyScale.fit(list(easy), TOPIC_OF, WordEncoder()) == scale
    assert NoveltyScale.fit(easy[::-1], TOPIC_OF, WordEncoder()) == scale, "nor does the order"


def test_train_tasks_are_familiar_to_one_another(easy, scale):
    found = novelties(easy, easy, scale, WordEncoder())
    assert [n.task for n in found] == [t.task for t in easy]
    assert np.median([n.goal for n in found]) == pytest.approx(0, abs=1e-9) and np.median([n.procedure for n in found]) == pytest.approx(0, abs=1e-9)
    assert np.mean([n.value <= scale.edges[0] + 1e-9 for n in found]) >= 0.8, "a quantile of twelve"


def test_ones_own_task_is_no_experience(easy, scale):
    twin = replace(easy[0], steps=easy[0].steps[:1], task=replace(easy[0].task, fold="test"))
    with_own, without = (novelties([twin], pool, scale, WordEncoder())[0] for pool in (easy, easy[1:]))
    assert with_own == without and with_own.goal > 0


def test_more_experience_never_makes_a_task_newer(easy, episodes, scale):
    hard = [t for t in episodes if t.task.type not in EASY_TYPES]
    for small, large in zip(novelties(hard, easy[:6], scale, WordEncoder()), novelties(hard, easy, scale, WordEncoder())):
        assert large.goal <= small.goal and large.procedure <= small.procedure


def test_the_same_done_before_is_not_new(scale):
    a, b = made("boil", 1, "boil water", ["open a", "wait"]), made("melt", 2, "boil water", ["open b", "wait"])
    n, = novelties([a], [b], scale, WordEncoder())
    assert n.goal == pytest.approx(float(scale.goal(0))) and n.procedure == pytest.approx(float(scale.procedure(0)))


@pytest.mark.parametrize("tasks, experience, message", [(1, 0, "everything is new"), (0, 0, "everything is new")])
def test_no_experience(easy, scale, tasks, experience, message):
    with pytest.raises(ValueError, match=message): novelties(easy[:tasks], easy[:experience], scale, WordEncoder())


def test_only_its_own_experience(easy, scale):
    with pytest.raises(ValueError, match="nothing to compare it with"): novelties(easy[:1], easy[:1], scale, WordEncoder())


def test_another_encoder_is_refused(easy, scale):
    class Other(WordEncoder): name = "other"
    with pytest.raises(ValueError, match="'words-64', not 'other'"): novelties(easy[:1], easy, scale, Other())


def test_nobody_asks_about_nothing(easy, scale):
    assert novelties([], easy, scale, WordEncoder()) == []


# ---- strata ----

def test_edges():
    assert edges_between([0] * 9 + [10], [20, 30]) == (pytest.approx(1.0), 25)
    assert edges_between([5] * 10, [1, 2]) == (1.5, 1.5), "where train tasks are as new as left-out topics there is no middle"


def test_strata_and_their_borders():
    y = NoveltyScale(Scale(0, 1), Scale(0, 1), (0.4, 1.0), "e")
    task = Task("scienceworld", "boil", 1, "test")
    assert [y.stratum(Novelty(task, v, v)) for v in (-3, 0.4, 0.41, 0.99, 1.0, 7)] == ["familiar", "familiar", "between", "between", "new", "new"]


def test_stratify_keeps_order_and_refuses_strangers():
    tasks = [Task("scienceworld", "boil", i, "test") for i in range(4)]
    strata = dict(zip(tasks, ("new", "familiar", "new", "familiar")))
    assert stratify(tasks, strata, lambda t: t) == {"familiar": [tasks[1], tasks[3]], "new": [tasks[0], tasks[2]]}
    assert list(stratify(tasks, strata, lambda t: t)) == ["familiar", "new"], "in the order of STRATA"
    assert stratify([], strata) == {}
    with pytest.raises(ValueError, match="boil/9@test has no novelty"): stratify([replace(tasks[0], variation="9")], strata, lambda t: t)


# ---- files ----

def test_a_table_survives_its_file(tmp_path, easy, scale):
    table = NoveltyTable("scienceworld", "easy", len(easy), scale, tuple(novelties(easy, easy, scale, WordEncoder())))
    other = replace(table, experience="none at all", novelties=())
    write_novelty([table, other], tmp_path / "n.json")
    back = read_novelty(tmp_path / "n.json", "scienceworld", "easy")
    assert back.scale == scale and back.episodes == len(easy)
    assert [(n.task, n.goal, n.procedure) for n in back.novelties] == [(n.task, pytest.approx(n.goal, abs=1e-4), pytest.approx(n.procedure, abs=1e-4)) for n in table.novelties]
    with pytest.raises(ValueError, match="scienceworld to easy, scienceworld to none at all"): read_novelty(tmp_path / "n.json", "alfworld", "easy")


class TestTheBooksOwnFile:
    record = json.loads((DATA / "novelty.json").read_text("utf-8"))

    def test_covers_both_panels(self):
        for world in ("scienceworld", "alfworld"):
            for experience in ("easy", "hard"):
                measured = {n.task for n in read_novelty(DATA / "novelty.json", world, experience).novelties}
                panel = load_panel(world, "test")
                assert measured <= set(panel.tasks) and {t.type for t in panel} - {t.type for t in measured} <= set(TOPICS["genetics"])

    def test_holds_numbers_and_no_episode(self):
        for table in self.record:
            assert set(table) == {"world", "experience", "episodes", "encoder", "goal", "procedure", "edges", "tasks"}
            assert all(Task.parse(task).fold == "test" and len(pair) == 2 and all(isinstance(x, float) for x in pair) for task, pair in table["tasks"].items())

    def test_easy_tasks_are_nearer_to_easy_experience(self):
        for world in ("scienceworld", "alfworld"):
            table = read_novelty(DATA / "novelty.json", world, "easy")
            halves = {h: np.mean([n.value for n in table.novelties if difficulty(n.task) == h]) for h in ("easy", "hard")}
            assert halves["easy"] < halves["hard"]
            assert set(table.strata.values()) <= set(STRATA)


# ---- splits ----

def test_splits_cover_every_type_once():
    splits = leave_one_topic_out()
    assert [s.name for s in splits] == [f"without {topic}" for topic in TOPICS]
    for split in splits:
        assert not set(split.seen) & set(split.unseen) and set(split.seen) | set(split.unseen) == set(EASY_TYPES + HARD_TYPES)
        assert all(split.side(t) == "unseen" for t in split.unseen) and all(split.side(t) == "seen" for t in split.seen)
    assert sorted(t for s in splits for t in s.unseen) == sorted(EASY_TYPES + HARD_TYPES)


@pytest.mark.parametrize("make, message", [
    (lambda: Split("x", ("a",), ("a", "b")), "has a on both sides"), (lambda: Split("x", ("a",), ()), "nothing unseen"),
    (lambda: leave_one_topic_out({"only": ("a",)}), "nothing seen"), (lambda: Split("x", ("a",), ("b",)).side("c"), "nothing of task type 'c'"),
])
def test_bad_splits(make, message):
    with pytest.raises(ValueError, match=message): make()
