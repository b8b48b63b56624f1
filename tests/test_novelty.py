"Novelty: goal distances, the yardstick, tables, strata."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from encoders import WordEncoder
from exprag.environment import EASY_TYPES, TOPICS, panel, side
from exprag.novelty import (STRATA, Novelty, NoveltyTable, Yardstick, edges_between, goal_distances, novelties, read_novelty, stratify, write_novelty)
from exprag.procedure import Scale
from exprag.trajectory import Step, Task, Trajectory, read_jsonl

DATA = Path(__file__).resolve().parents[1] / "nbs" / "data"
TOPIC_OF = {kind: topic for topic, kinds in TOPICS.items() for kind in kinds}


@pytest.fixture(scope="module")
def episodes():
    return read_jsonl(DATA / "sample.jsonl")[0]


@pytest.fixture(scope="module")
def easy(episodes):
    return [t for t in episodes if t.task.type in EASY_TYPES]


@pytest.fixture(scope="module")
def yardstick(easy):
    return Yardstick.fit(easy, TOPIC_OF, WordEncoder())


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


# ---- the yardstick ----

def test_the_yardstick_knows_train_data_only(easy):
    with pytest.raises(ValueError, match="not of the train fold"): Yardstick.fit([*easy, replace(easy[0], task=replace(easy[0].task, fold="dev"))], TOPIC_OF, WordEncoder())


def test_the_yardstick_needs_two_topics(easy):
    with pytest.raises(ValueError, match="nothing outside"): Yardstick.fit([t for t in easy if TOPIC_OF[t.task.type] == "state change"], TOPIC_OF, WordEncoder())


def test_a_test_panel_does_not_move_it(easy, yardstick):
    assert Yardstick.fit(list(easy), TOPIC_OF, WordEncoder()) == yardstick
    assert Yardstick.fit(easy[::-1], TOPIC_OF, WordEncoder()) == yardstick, "nor does the order"


def test_train_tasks_are_familiar_to_one_another(easy, yardstick):
    found = novelties(easy, easy, yardstick, WordEncoder())
    assert [n.task for n in found] == [t.task for t in easy]
    assert np.median([n.goal for n in found]) == pytest.approx(0, abs=1e-9) and np.median([n.procedure for n in found]) == pytest.approx(0, abs=1e-9)
    assert np.mean([n.value <= yardstick.edges[0] + 1e-9 for n in found]) >= 0.8, "a quantile of twelve"


def test_ones_own_task_is_no_experience(easy, yardstick):
    twin = replace(easy[0], steps=easy[0].steps[:1], task=replace(easy[0].task, fold="test"))
    with_own, without = (novelties([twin], pool, yardstick, WordEncoder())[0] for pool in (easy, easy[1:]))
    assert with_own == without and with_own.goal > 0


def test_more_experience_never_makes_a_task_newer(easy, episodes, yardstick):
    hard = [t for t in episodes if t.task.type not in EASY_TYPES]
    for small, large in zip(novelties(hard, easy[:6], yardstick, WordEncoder()), novelties(hard, easy, yardstick, WordEncoder())):
        assert large.goal <= small.goal and large.procedure <= small.procedure


def test_the_same_done_before_is_not_new(yardstick):
    a, b = made("boil", 1, "boil water", ["open a", "wait"]), made("melt", 2, "boil water", ["open b", "wait"])
    n, = novelties([a], [b], yardstick, WordEncoder())
    assert n.goal == pytest.approx(float(yardstick.goal(0))) and n.procedure == pytest.approx(float(yardstick.procedure(0)))


@pytest.mark.parametrize("tasks, experience, message", [(1, 0, "everything is new"), (0, 0, "everything is new")])
def test_no_experience(easy, yardstick, tasks, experience, message):
    with pytest.raises(ValueError, match=message): novelties(easy[:tasks], easy[:experience], yardstick, WordEncoder())


def test_only_its_own_experience(easy, yardstick):
    with pytest.raises(ValueError, match="nothing to compare it with"): novelties(easy[:1], easy[:1], yardstick, WordEncoder())


def test_another_encoder_is_refused(easy, yardstick):
    class Other(WordEncoder): name = "other"
    with pytest.raises(ValueError, match="'words-64', not 'other'"): novelties(easy[:1], easy, yardstick, Other())


def test_nobody_asks_about_nothing(easy, yardstick):
    assert novelties([], easy, yardstick, WordEncoder()) == []


# ---- strata ----

def test_edges():
    assert edges_between([0] * 9 + [10], [20, 30]) == (pytest.approx(1.0), 25)
    assert edges_between([5] * 10, [1, 2]) == (1.5, 1.5), "where train tasks are as new as left-out topics there is no middle"


def test_strata_and_their_borders():
    y = Yardstick(Scale(0, 1), Scale(0, 1), (0.4, 1.0), "e")
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

def test_a_table_survives_its_file(tmp_path, easy, yardstick):
    table = NoveltyTable("scienceworld", "easy", len(easy), yardstick, tuple(novelties(easy, easy, yardstick, WordEncoder())))
    other = replace(table, experience="none at all", novelties=())
    write_novelty([table, other], tmp_path / "n.json")
    back = read_novelty(tmp_path / "n.json", "scienceworld", "easy")
    assert back.yardstick == yardstick and back.episodes == len(easy)
    assert [(n.task, n.goal, n.procedure) for n in back.novelties] == [(n.task, pytest.approx(n.goal, abs=1e-4), pytest.approx(n.procedure, abs=1e-4)) for n in table.novelties]
    with pytest.raises(ValueError, match="scienceworld to easy, scienceworld to none at all"): read_novelty(tmp_path / "n.json", "alfworld", "easy")


class TestTheBooksOwnFile:
    record = json.loads((DATA / "novelty.json").read_text("utf-8"))

    def test_covers_both_panels(self):
        for world, name in (("scienceworld", "test"), ("alfworld", "alfworld-test")):
            for experience in ("easy", "hard"):
                measured = {n.task for n in read_novelty(DATA / "novelty.json", world, experience).novelties}
                assert measured <= set(panel(name).tasks) and {t.type for t in panel(name)} - {t.type for t in measured} <= set(TOPICS["genetics"])

    def test_holds_numbers_and_no_episode(self):
        for table in self.record:
            assert set(table) == {"world", "experience", "episodes", "encoder", "goal", "procedure", "edges", "tasks"}
            assert all(Task.parse(task).fold == "test" and len(pair) == 2 and all(isinstance(x, float) for x in pair) for task, pair in table["tasks"].items())

    def test_easy_tasks_are_nearer_to_easy_experience(self):
        for world in ("scienceworld", "alfworld"):
            table = read_novelty(DATA / "novelty.json", world, "easy")
            halves = {h: np.mean([n.value for n in table.novelties if side(n.task.type) == h]) for h in ("easy", "hard")}
            assert halves["easy"] < halves["hard"]
            assert set(table.strata.values()) <= set(STRATA)
