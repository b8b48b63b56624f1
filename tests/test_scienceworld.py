"ScienceWorld for real: tasks, folds, panels, and the same words in every process."
import json
import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from exprag.trajectory import Task, read_jsonl
from exprag.world import Environment, difficulty, load_panel, load_world
from exprag.worlds.java import JVM_FLAGS
from exprag.worlds.scienceworld import (
    ACTION_TEMPLATES, EASY_TYPES, EXPERT_LENGTHS, FOLD_SIZES, FOLDS, HARD_TYPES, MENDELIAN_TYPES,
    PANELS, STEP_CAPS, WORLD, ScienceWorldEnv, scienceworld_tasks)
from exprag.worlds.scienceworld_expert import expert
from worlds import QUICK, TYPES, env, task  # noqa: F401


SAMPLE = Path(__file__).resolve().parents[1] / "nbs" / "data" / "sample.jsonl"


def panel(name): return load_panel("scienceworld", name)


# -- tasks, folds, panels: no simulator

def test_split_is_the_papers():
    total = lambda types, fold: sum(FOLD_SIZES[t][FOLDS.index(fold)] for t in types)
    assert (total(EASY_TYPES, "train"), total(HARD_TYPES, "train")) == (2336, 1256)
    assert (total(EASY_TYPES, "test"), total(HARD_TYPES, "test")) == (1183, 636)
    assert [len(scienceworld_tasks(f)) for f in FOLDS] == [3592, 1796, 1819]


def test_folds_do_not_overlap_and_sort():
    every = [t for fold in FOLDS for t in scienceworld_tasks(fold)]
    assert len({(t.type, t.variation) for t in every}) == len(every) == 7207
    assert all(list(scienceworld_tasks(f)) == sorted(scienceworld_tasks(f)) for f in FOLDS)
    assert scienceworld_tasks("dev", ["melt", "boil", "melt"]) == scienceworld_tasks("dev", ["boil", "melt"])


def test_panels():
    sizes = {name: len(panel(name)) for name in PANELS}
    assert sizes == {"test": 149, "test-hard": 64, "test-all": 1819, "dev": 51, "dev-hard": 38, "demo": 11}
    assert sum(difficulty(t) == "hard" for t in panel("test")) == 64
    assert {t.type for t in panel("demo")} == set(HARD_TYPES) - set(MENDELIAN_TYPES) and panel("demo").left_out == MENDELIAN_TYPES
    assert {difficulty(t) for t in panel("dev")} == {"easy"} and {t.fold for t in panel("dev")} == {"dev"}
    assert len({panel(name).fingerprint for name in PANELS}) == 6
    assert all(panel("test").caps[t.type] == WORLD.step_cap(t.type) for t in panel("test"))


def test_panel_fingerprints_are_pinned():
    "If one changes, results before and after cannot be compared."
    assert {name: panel(name).fingerprint for name in PANELS} == {"test": "834b3f8ac86beed9", "test-hard": "85a9eae63157b94e", "test-all": "a56240747281f5e5", "dev": "8db759d51cb24cea", "dev-hard": "4c8bef517883eb99", "demo": "6d6ee8a0c5896d1e"}


def test_panel_prints_as_a_table():
    lines = str(panel("demo")).splitlines()
    assert len(lines) == 14 and lines[0].split() == ["type", "difficulty", "variations", "cap"] and "Left out: mendelian" in lines[-1]


def test_caps_follow_the_rule():
    assert STEP_CAPS == {t: min(150, max(50, -(-3 * max(n for n in EXPERT_LENGTHS[t] if n) // 2))) for t in TYPES}


@pytest.mark.parametrize("make, said", [
    (lambda: difficulty(task("boyl")), "unknown task type of scienceworld 'boyl'; did you mean 'boil'"), (lambda: scienceworld_tasks("valid"), "train, dev, test"),
    (lambda: scienceworld_tasks("train", ["fly"]), "The 30 known"), (lambda: ScienceWorldEnv("easy,hard"), "simplification 'hard'"),
    (lambda: ScienceWorldEnv().reset(task("boil", 29)), "has 0 to 13"), (lambda: ScienceWorldEnv().reset(task("boil", 3, "test")), "has 21 to 29"),
    (lambda: ScienceWorldEnv().reset(Task("scienceworld", "boil", "three", "train")), "variation 'three'"),
    (lambda: ScienceWorldEnv().reset(task("boil", 3, "val")), "fold 'val'"), (lambda: ScienceWorldEnv().reset(Task("alfworld", "boil", "3", "train")), "world 'alfworld'")])
def test_what_is_unknown_is_named_before_any_simulator_starts(make, said):
    with pytest.raises(ValueError, match=said): make()


def test_state_patterns_match_what_the_simulator_says():
    state = {name: re.compile(rf"\s*(?:{pattern})", re.I) for name, pattern in WORLD.state.items()}
    assert state["place"].match("This outside location is called the outside. Here you see:")[1] == "outside"
    assert state["place"].match("You move to the kitchen.")[1] == "kitchen" and state["place"].match("You teleport to the hallway.")[1] == "hallway"
    assert state["taken"].match("You move the metal pot to the inventory.")[1] == "metal pot" and not state["taken"].match("The door is open.")
    assert state["left"].match("You move the metal pot to the stove.").groups() == ("metal pot", "stove")
    places = [found[1] for t in read_jsonl(SAMPLE)[0] for seen in t.observations if (found := state["place"].match(seen))]
    assert len(places) >= 48 and {"outside", "kitchen", "greenhouse"} <= set(places)


# -- the environment

def test_protocol_and_first_words(env):
    observation, info = env.reset(task("power-component", 1))
    assert isinstance(env, Environment) and observation.startswith("This room is called the art studio")
    assert info["goal"].startswith("Your task is to turn on the red light bulb. First,") and "\n" not in info["goal"]
    assert info == {**info, "score": 0, "steps": 0, "success": False, "task": task("power-component", 1)}


def test_same_as_the_packages_own_wrapper(env, monkeypatch):
    "Text, rewards, score and end are those of `scienceworld.ScienceWorldEnv`, which costs more."
    from scienceworld import ScienceWorldEnv as Wrapper
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", " ".join(JVM_FLAGS))
    ours = expert(env, QUICK, tidy="teleport")
    theirs = Wrapper("", envStepLimit=1000)
    try:
        theirs.load(QUICK.type, int(QUICK.variation), "easy")
        first, info = theirs.reset()
        said = [theirs.step(a) for a in ours.actions]
    finally:
        theirs._gateway.java_process.kill()
    assert (first, *(s[0] for s in said)) == ours.observations and " ".join(info["taskDesc"].split()).endswith(ours.goal)
    assert [s[1] for s in said] == [s.reward for s in ours.steps] and said[-1][2] and said[-1][3]["score"] == ours.score == 100


def test_wrong_focus_is_minus_100_and_the_end(env):
    env.reset(task("power-component", 1))
    env.step("teleport to workshop")
    observation, reward, terminated, truncated, info = env.step("focus on battery")
    assert reward < -100 and terminated and not truncated and info["score"] == -100 and not info["success"]
    with pytest.raises(RuntimeError, match="over"): env.step("look around")


def test_cap(env):
    env.reset(QUICK, cap=2)
    assert env.step("look around")[3] is False and env.step("look around")[3] is True
    with pytest.raises(RuntimeError, match="over"): env.step("look around")
    env.reset(QUICK)
    assert env._cap == WORLD.step_cap("find-plant")


@pytest.mark.parametrize("action", ["", "   ", "\n", "a\nb", "fly to the moon", "\ud800", "x" * 20_000, "ünïcödé 漢字", "e\n", "0", "\x00", '"; drop'])
def test_any_text_is_survived(env, action):
    env.reset(QUICK)
    observation, reward, terminated, truncated, info = env.step(action)
    assert isinstance(observation, str) and reward == 0 and not terminated


def test_no_state_is_carried_over(env):
    first = env.reset(QUICK)
    for action in ("teleport to kitchen", "open cupboard", "look around"): env.step(action)
    env.reset(task("chemistry-mix", 1))
    assert env.reset(QUICK) == first


def test_templates_are_the_simulators(env):
    seen = set()
    for kind in ("power-component", "boil"):
        env.reset(task(kind))
        seen |= set(env.call("getPossibleActions"))
    assert sorted(seen) == list(ACTION_TEMPLATES)


@pytest.mark.slow
def test_templates_and_folds_of_all_types(env):
    seen = set()
    for kind in TYPES:
        env.reset(task(kind))
        seen |= set(env.call("getPossibleActions"))
        got = [list(env.call(f"getVariations{f.title()}")) for f in FOLDS]
        edges = [0, *accumulate(FOLD_SIZES[kind])]
        assert got == [list(range(a, b)) for a, b in zip(edges, edges[1:])]
        assert env.call("getTaskMaxVariations", kind) == edges[-1]
    assert sorted(seen) == list(ACTION_TEMPLATES) and set(env.call("getTaskNames")) == set(TYPES)


PROGRAM = """
import json, sys
from exprag.world import play
from exprag.worlds.scienceworld import ScienceWorldEnv, gold_path, scienceworld_tasks
with ScienceWorldEnv() as env:
    found = {}
    for kind in sys.argv[1:]:
        task = scienceworld_tasks("train", [kind])[0]
        found[kind] = play(env, task, gold_path(env, task), cap=40).id
print(json.dumps(found))
"""


def episodes_in_another_process(kinds) -> dict:
    said = subprocess.run([sys.executable, "-c", PROGRAM, *kinds], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    return json.loads(said.stdout)


def test_same_text_in_two_processes():
    kinds = ["find-plant", "test-conductivity-of-unknown-substances", "power-component", "chemistry-mix"]
    assert episodes_in_another_process(kinds) == episodes_in_another_process(kinds[::-1])


@pytest.mark.slow
def test_same_text_in_two_processes_for_all_types():
    assert episodes_in_another_process(TYPES) == episodes_in_another_process(TYPES[::-1])
