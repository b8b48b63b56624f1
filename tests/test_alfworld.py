"ALFWorld for real: tasks, games on disk, the engine in its process, its deaths, and two dialects."
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.trajectory import Step, Task, Trajectory, TrajectoryError
from exprag.world import (
    Environment, SimulatorError, difficulty, in_dialect, load_panel, normalised_score, play, spread,
    true_fold)
from exprag.worlds.alfworld import (
    DEV_ROOMS, EASY_TYPES, FOLD_FOLDERS, HARD_TYPES, PANELS, TEMPLATES, WORLD, ALFWorldEnv,
    EngineProcess, GameError, alfworld_tasks, cache_folder, check_game, data_folder, engine_version,
    game_path, grammar_of, grammar_of_action, read_game, replay, translate, translate_action,
    translate_grammar, unpack_games)
from exprag.worlds.alfworld_engine import reader
from worlds import stop


NBS = Path(__file__).resolve().parents[1] / "nbs"
TYPES = EASY_TYPES + HARD_TYPES


def panel(name): return load_panel("alfworld", name)


# -- tasks and panels: neither games nor package

def test_folds_are_the_papers():
    assert [len(alfworld_tasks(fold)) for fold in FOLD_FOLDERS] == [3356, 197, 140, 134]
    assert {half: sum(difficulty(t) == half for t in alfworld_tasks("test")) for half in ("easy", "hard")} == {"easy": 73, "hard": 61}
    assert {t: len(alfworld_tasks("test", [t])) for t in TYPES} == dict(zip(TYPES, (18, 24, 31, 21, 23, 17)))
    assert {t: len(alfworld_tasks("train", [t])) + len(alfworld_tasks("dev", [t])) for t in TYPES} == dict(zip(TYPES, (308, 790, 650, 533, 459, 813)))


def test_folds_do_not_overlap_and_sort():
    every = [t for fold in FOLD_FOLDERS for t in alfworld_tasks(fold)]
    assert len({(t.type, t.variation) for t in every}) == len(every)
    assert all(list(alfworld_tasks(f)) == sorted(alfworld_tasks(f)) for f in FOLD_FOLDERS)
    assert alfworld_tasks("dev", TYPES[::-1]) == alfworld_tasks("dev") and all(Task.parse(str(t)) == t for t in every)


def test_dev_and_test_rooms_are_not_trained_in():
    room = lambda t: t.variation.split("/")[0].rsplit("-", 1)[1]
    rooms = {fold: {room(t) for t in alfworld_tasks(fold)} for fold in FOLD_FOLDERS}
    assert rooms["dev"] == set(DEV_ROOMS) and not rooms["train"] & (rooms["dev"] | rooms["test"])


def test_panels():
    assert {name: len(panel(name)) for name in PANELS} == {"test": 134, "test-hard": 61, "seen": 140, "dev": 39, "dev-hard": 39}
    assert {difficulty(t) for t in panel("test-hard")} == {"hard"} and {difficulty(t) for t in panel("dev")} == {"easy"}
    assert set(panel("test").caps.values()) == {50} and panel("test").name == "alfworld-test"
    assert panel("test").settings == {"grammar": "move"} and WORLD.step_cap(TYPES[0]) == 50


def test_panel_fingerprints_are_pinned():
    "If one changes, results before and after cannot be compared."
    assert {name: panel(name).fingerprint for name in PANELS} == {"test": "088f041ecbc05f75", "test-hard": "e72481db14d9c44f", "seen": "6e7a6240fc75dd70", "dev": "d3d2b2ae002d8642", "dev-hard": "75fea8fb306fa5d1"}
    longer = replace(panel("test"), caps=dict.fromkeys(TYPES, 100))
    assert longer.fingerprint == "f94af9ef9a0ec420"


def test_panels_print_without_every_name():
    lines = str(panel("test")).splitlines()
    assert len(lines) == 9 and max(map(len, lines)) < 80


@pytest.mark.parametrize("make, said", [
    (lambda: alfworld_tasks("valid"), "unknown ALFWorld fold 'valid'"), (lambda: alfworld_tasks("test", ["boil"]), "unknown ALFWorld task type 'boil'"),
    (lambda: difficulty(Task("alfworld", "pick_and_place", "x", "test")), "did you mean 'pick_and_place_simple'"), (lambda: panel("test_hard"), "did you mean 'test-hard'"),
    (lambda: check_game(Task("alfworld", "pick_and_place_simple", "Mug", "test")), "the test fold has 24 of pick_and_place_simple"),
    (lambda: check_game(Task("alfworld", alfworld_tasks("test")[0].type, alfworld_tasks("test")[0].variation, "train")), "this one is in the test fold"),
    (lambda: check_game(Task("scienceworld", "boil", "1", "train")), "unknown world 'scienceworld'"),
    (lambda: check_game(Task("alfworld", "pick_and_place_simple", "../../x", "test")), "unknown game")])
def test_what_is_unknown_is_named(make, said):
    with pytest.raises(ValueError, match=said): make()


# -- games on disk

@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> tuple[Path, list[Task]]:
    "The book's six sample games in the official layout."
    root = tmp_path_factory.mktemp("alfworld")
    return root, list(unpack_games(NBS / "data" / "alfworld_games.jsonl.xz", root))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Path:
    "Translations made here are kept here."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache_folder()


@pytest.fixture
def altered(sample, tmp_path):
    "A copy of the sample games in which the first can be changed."
    root, tasks = sample
    shutil.copytree(root, tmp_path / "games")
    path = game_path(tasks[0], tmp_path / "games")
    def change(text=None, **fields):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}) if text is None else text)
        return tmp_path / "games"
    return tasks[0], path, change


def test_no_data_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(GameError, match="set ALFWORLD_DATA to the folder that has one"): data_folder()
    monkeypatch.delenv("ALFWORLD_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(GameError, match="alfworld-download"): ALFWorldEnv()


def test_data_is_found_where_the_variable_says(monkeypatch, sample):
    monkeypatch.setenv("ALFWORLD_DATA", str(sample[0]))
    assert data_folder() == sample[0] and read_game(sample[1][0])["solvable"] is True


def test_half_a_download(sample, altered):
    root, tasks = sample
    with pytest.raises(GameError, match="6 of the 197 games of the dev fold are there"): read_game(alfworld_tasks("dev")[1], root)
    task, path, change = altered
    whole = path.read_text()
    for text in (whole[:500], "", "\x00" * 100): 
        with pytest.raises(GameError, match="half downloaded"): read_game(task, change(text))
    path.write_bytes(b"\xff\xfe" * 50)
    with pytest.raises(GameError, match="half downloaded"): read_game(task, change(path.read_bytes().decode("latin-1")))


@pytest.mark.parametrize("fields, said", [
    ({"solvable": False}, "not solvable"), ({"solvable": None}, "not solvable")])
def test_a_game_that_is_marked(altered, fields, said):
    task, path, change = altered
    with pytest.raises(GameError, match=said): read_game(task, change(**fields))


@pytest.mark.parametrize("text", ["[]", "{}", '"x"', '{"grammar": ""}'])
def test_a_file_that_is_no_game(altered, text):
    task, path, change = altered
    with pytest.raises(GameError, match="lacks .*pddl_problem"): read_game(task, change(text))


# -- words

def test_dialects_of_a_grammar(sample):
    grammar = read_game(sample[1][0], sample[0])["grammar"]
    old = grammar.replace("move {o} to {r}", "put {o} in/on {r}").replace("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}.").replace(
        "You arrive at {r.name}.", "You arrive at {lend.name}.").replace("  move (object) to (receptacle):  place", "  put (object) in/on (receptacle):  place")
    assert old != grammar and translate_grammar(old, "move") == grammar == translate_grammar(grammar, "move") and translate_grammar(old, "put") == translate_grammar(grammar, "put") != old
    for bad in ("", grammar + old):
        with pytest.raises(GameError, match="neither of|both of"): translate_grammar(bad, "move")


@pytest.mark.parametrize("trick", ["__import__('os').system('true')", "o.__class__", "o.name.upper()", "o.name if o else 1", "exec('1')", "o[0]", "f'{o}'", "1", "o.name * 9", "o and o", "(o := 1)", "", "o."])
def test_a_grammar_is_never_run(trick):
    with pytest.raises(GameError, match="do not use this game file"): reader(trick)


names = st.builds("{} {}".format, st.sampled_from(["mug", "desk", "cd", "sinkbasin"]), st.integers(1, 30))


@given(names, names)
def test_translating_an_action_is_its_own_inverse(a, b):
    move, put = f"move {a} to {b}", f"put {a} in/on {b}"
    assert translate_action(move) == put and translate_action(put) == move and (grammar_of_action(move), grammar_of_action(put)) == ("move", "put")


@pytest.mark.parametrize("action", ["go to desk 1", "put mug 1 on desk 1", "take mug 1 from desk 1", "", "move", "put x into y", "look"])
def test_other_actions_are_the_same_in_both(action):
    assert translate_action(action) == action and grammar_of_action(action) is None


@pytest.mark.parametrize("dialect", ["move", "put"])
def test_templates(dialect):
    templates = WORLD.action_templates({"grammar": dialect})
    assert len(templates) == len(TEMPLATES) == 14 and ("move OBJ to OBJ" in templates) == (dialect == "move")
    for action in ("move mug 1 to desk 1", "put mug 1 in/on desk 1", "put mug 1 on desk 1"): assert WORLD.canonical(action) == "move OBJ to OBJ"


def test_the_true_fold_is_that_of_the_list():
    task = alfworld_tasks("test")[0]
    assert true_fold(replace(task, fold="train")) == "test" and true_fold(replace(task, variation="made up", fold="dev")) == "dev"


@pytest.mark.parametrize("seen, place, taken, left", [
    ("You arrive at desk 1. On the desk 1, you see a mug 1.", "desk 1", None, None), ("You pick up the mug 1 from the desk 1.", None, "mug 1", None),
    ("You move the mug 1 to the shelf 2.", None, None, ("mug 1", "shelf 2")), ("You put the mug 1 in/on the shelf 2.", None, None, ("mug 1", "shelf 2")),
    ("Nothing happens.", None, None, None)])
def test_state_patterns_match_what_the_engine_says(seen, place, taken, left):
    found = {name: re.match(rf"\s*(?:{pattern})", seen, re.I) for name, pattern in WORLD.state.items()}
    assert [found["place"] and found["place"][1], found["taken"] and found["taken"][1], found["left"] and found["left"].groups()] == [place, taken, left]


# -- episodes in two dialects

def episode(language: str | None, *turns) -> Trajectory:
    made = Trajectory(alfworld_tasks("train")[0], "Your task is to: look.", "You are in a room.", tuple(Step(*t) for t in turns))
    return made if language is None else Trajectory(made.task, made.goal, made.first_observation, made.steps, settings={"grammar": language})


MOVES = (("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 1."), ("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1."),
         ("go to nowhere 1", "Nothing happens."), ("put mug 1 in/on desk 1", "Nothing happens."), ("move mug 1 to desk 1", "You move the mug 1 to the desk 1."))
PUTS = (("go to desk 1", "On the desk 1, you see a mug 1."), MOVES[1], MOVES[2], ("move mug 1 to desk 1", "Nothing happens."), ("put mug 1 in/on desk 1", "You put the mug 1 in/on the desk 1."))


def test_translation_both_ways():
    assert translate(episode("move", *MOVES), "put") == episode("put", *PUTS) and translate(episode("put", *PUTS), "move") == episode("move", *MOVES)
    assert translate(episode(None, *PUTS), "move") == episode("move", *MOVES) and translate(episode(None, *PUTS), "put") == episode("put", *PUTS)


def test_numbered_places_of_the_old_engine():
    old = (("go to desk 1", "You arrive at loc 12. On the desk 1, you see a mug 1."), *PUTS[1:])
    assert grammar_of(episode(None, *old)) == "put" and translate(episode(None, *old), "move") == episode("move", *MOVES)


def test_a_dialect_that_cannot_be_recognised():
    for turns, said in (((), "no step that shows"), (MOVES[1:3], "no step that shows"), (MOVES[:1] + PUTS[-1:], "both dialects \\(steps 1 and 2\\)")):
        with pytest.raises(TrajectoryError, match=said): grammar_of(episode(None, *turns))
    with pytest.raises(ValueError, match="unknown grammar .*'new'"): grammar_of(episode("new", *MOVES))
    with pytest.raises(ValueError, match="world of two dialects"): translate(Trajectory(Task("scienceworld", "boil", "1", "train"), "g", "o"), "move")


def test_experience_is_translated_to_the_dialect_of_its_reader():
    put = episode("put", *PUTS)
    assert in_dialect(put, {"grammar": "move"}) == episode("move", *MOVES) and in_dialect(put, {"grammar": "put"}) is put
    other = Trajectory(Task("scienceworld", "boil", "1", "train"), "g", "o")
    assert in_dialect(other, {"simplification": "easy"}) is other


steps = st.one_of(
    st.builds(lambda a, b: ("go to " + a, f"You arrive at {a}. On the {a}, you see a {b}."), names, names),
    st.builds(lambda a, b: (f"move {a} to {b}", f"You move the {a} to the {b}."), names, names),
    st.builds(lambda a, b: (f"take {a} from {b}", f"You pick up the {a} from the {b}."), names, names),
    st.builds(lambda a: (a, "Nothing happens."), st.one_of(st.builds("put {} in/on {}".format, names, names), st.builds("move {} to {}".format, names, names), st.text(max_size=20))))


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=8))
def test_there_and_back_again(turns):
    made = episode("move", *turns)
    assert translate(translate(made, "put"), "move") == made
    if any(step[0].startswith("go to") and "arrive" in step[1] for step in turns): assert grammar_of(episode(None, *turns)) == "move"


# -- without the extra

def test_a_missing_extra_is_named(sample, monkeypatch):
    import importlib.metadata
    def gone(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr("exprag.worlds.alfworld.version", gone)
    with pytest.raises(ImportError, match=r"pip install 'exprag\[alfworld\]'"): ALFWorldEnv(sample[0])


# -- the engine: needs the extra `alfworld`

@pytest.fixture(scope="module")
def env(sample):
    pytest.importorskip("textworld", reason="needs the extra: pip install 'exprag[alfworld]'")
    pytest.importorskip("fast_downward", reason="needs the extra: pip install 'exprag[alfworld]'")
    with ALFWorldEnv(sample[0]) as made: yield made


def walk(env, task, extra=()) -> Trajectory:
    return play(env, task, [*extra, *(translate_action(a) if env.settings["grammar"] == "put" else a for a in read_game(task, env.data)["walkthrough"])])


def test_protocol_and_first_words(env, sample):
    observation, info = env.reset(sample[1][1])
    assert isinstance(env, Environment) and env.world_version == engine_version() and env.settings == {"grammar": "move"}
    assert observation.startswith("You are in the middle of a room. Looking quickly around you, you see a ") and "\n" not in observation
    assert info == {"goal": "Your task is to: put a creditcard in coffeetable.", "score": 0, "steps": 0, "success": False, "task": sample[1][1]}


def test_walkthroughs_win(env, sample):
    for task in sample[1]:
        made = walk(env, task)
        assert made.success and made.score == 1 and [s.reward for s in made.steps] == [0] * (len(made) - 1) + [1] and normalised_score(made) == 1
        assert all(WORLD.canonical(a) in TEMPLATES for a in made.actions) and made.settings == {"grammar": "move"}
    with pytest.raises(RuntimeError, match="is over"): env.step("look")


def test_caps(env, sample):
    env.reset(sample[1][0], cap=2)
    assert env.step("look")[2:4] == (False, False) and env.step("look")[2:4] == (False, True)
    with pytest.raises(RuntimeError, match="is over"): env.step("look")
    env.reset(sample[1][0])
    assert env._cap == 50
    assert len(play(env, sample[1][0], ["look"] * 200)) == 50 and len(play(env, sample[1][0], ["look"] * 200, cap=100)) == 100


@pytest.mark.parametrize("action", ["", "   ", "\n", "a\nb", "fly to the moon", "\ud800", "x" * 20_000, "ünïcödé 漢字", "\x00", '"; drop', "go to", "{r.name}", "#look.feedback#", "LOOK"])
def test_any_text_is_survived(env, sample, action):
    env.reset(sample[1][0])
    assert env.step(action)[:4] == ("Nothing happens.", 0, False, False)


def test_spaces_are_the_packages(env, sample):
    env.reset(sample[1][0])
    assert env.step("  inventory \n")[0] == "You are not carrying anything."


def test_no_state_is_carried_over(env, sample):
    tasks = sample[1]
    first = env.reset(tasks[3])
    for action in read_game(tasks[3], sample[0])["walkthrough"][:3]: env.step(action)
    env.reset(tasks[0])
    assert env.reset(tasks[3]) == first


@pytest.mark.parametrize("foreign, answer", [("answer", "Nothing happens."), ("translate", "You move the cd 3 to the desk 1."), ("refuse", None)])
def test_an_action_in_the_other_dialect(env, sample, foreign, answer):
    with ALFWorldEnv(sample[0], foreign=foreign) as made:
        made.reset(sample[1][0])
        for action in ("go to desk 1", "take cd 3 from desk 1"): made.step(action)
        if answer is None:
            with pytest.raises(GameError, match="say 'move cd 3 to desk 1'"): made.step("put cd 3 in/on desk 1")
            assert made.step("move cd 3 to desk 1")[0] == "You move the cd 3 to the desk 1."  # the episode goes on
        else: assert made.step("put cd 3 in/on desk 1")[0] == answer
        assert (made.settings == {"grammar": "move"}) == (foreign != "translate")


def test_an_environment_of_the_old_dialect(env, sample):
    with ALFWorldEnv(sample[0], grammar="put") as old:
        for task in sample[1]:
            extra = ["look", "help", "go to nowhere 1", "put mug 1 in/on desk 1", "move mug 1 to desk 1"]
            here, there = walk(env, task, extra), walk(old, task, [translate_action(a) for a in extra])
            assert here.success and there.success and translate(here, "put") == there and translate(there, "move") == here
            with pytest.raises(GameError, match=r"is in the dialect 'move' and the environment in 'put': translate\(trajectory, 'put'\)"): replay(old, here)
            assert replay(old, there).id == there.id


def test_an_unsolvable_problem(env, altered):
    "Marked solvable, and yet the goal is of things that are not there: never won, and never hangs."
    task, path, change = altered
    problem = json.loads(path.read_text())["pddl_problem"]
    start = problem.index("(:goal")
    with ALFWorldEnv(change(pddl_problem=problem[:start] + "(:goal (and (forall (?o - object) (holds agent1 ?o)))))"), timeout=60) as made:
        try: made.reset(task)
        except GameError as error: assert "reset" in str(error)
        else: assert not any(made.step(a)[2] for a in ("look", "go to desk 1", "take cd 3 from desk 1"))


@pytest.mark.parametrize("fields", [{"pddl_problem": "(define"}, {"pddl_problem": ""}, {"pddl_domain": "nonsense"}])
def test_a_broken_problem_is_an_error_and_the_engine_goes_on(altered, env, fields):
    task, path, change = altered
    with ALFWorldEnv(change(**fields), timeout=60) as made:
        with pytest.raises((GameError, SimulatorError), match="reset"): made.reset(task)
        with pytest.raises(RuntimeError, match="is over"): made.step("look")
        other = game_path(task, made.data).parents[2]
        assert made.reset(next(t for t in alfworld_tasks("dev") if game_path(t, made.data).is_file() and t != task))[1]["steps"] == 0 and other.is_dir()


def test_a_grammar_with_code_in_it_is_refused_and_not_run(altered, env, tmp_path):
    task, path, change = altered
    grammar = json.loads(path.read_text())["grammar"].replace("You open the {r.name}.", "You open the {open('" + str(tmp_path / "ran") + "', 'w').name}.")
    with ALFWorldEnv(change(grammar=grammar)) as made:
        with pytest.raises(GameError, match="would have to be run as Python: do not use this game file"): made.reset(task)
    assert not (tmp_path / "ran").exists()


def test_a_game_won_before_it_begins(altered, env):
    task, path, change = altered
    problem = json.loads(path.read_text())["pddl_problem"]
    with ALFWorldEnv(change(pddl_problem=problem[:problem.index("(:goal")] + "(:goal (and)))")) as made:
        with pytest.raises(GameError): made.reset(task)


# -- translating: ours against Fast Downward's own translator, in another process

TRANSLATIONS = """
import json, sys
import fast_downward
from exprag.worlds.alfworld_engine import parsed, sas_text
for line in sys.stdin:
    domain, problem = json.loads(line)
    ours, theirs = sas_text(parsed(domain, problem)), fast_downward.pddl2sas(domain, problem)[1]
    print(json.dumps([ours == theirs, theirs.count("begin_operator")]))
"""


def translations(pairs) -> list:
    "Of each domain and problem: whether our translation is the translator's to the last byte, and how many operators it has."
    said = subprocess.run([sys.executable, "-c", TRANSLATIONS, "no", "--options", "of", "ours"], capture_output=True, text=True, check=True, input="".join(json.dumps(pair) + "\n" for pair in pairs))
    return [json.loads(line) for line in said.stdout.splitlines() if line.startswith("[")]


def test_translations_are_the_translators(env, sample):
    games = [read_game(task, sample[0]) for task in sample[1]]
    made = translations([(g["pddl_domain"], g["pddl_problem"]) for g in games])
    assert len(made) == 6 and all(same and count > 300 for same, count in made)


LAMPS = """
(define (domain lamps)
 (:requirements :adl :typing :derived-predicates)
 (:types lamp room - thing)
 (:constants hall - room)
 (:predicates (in ?l - lamp ?r - room) (on ?l - lamp) (broken ?l - lamp) (dark ?r - room) (bright ?r - room) (next ?a - room ?b - room) (here ?r - room) (done))
 (:functions (total-cost))
 (:derived (bright ?r - room) (exists (?l - lamp) (and (in ?l ?r) (on ?l))))
 (:action go :parameters (?a - room ?b - room) :precondition (and (here ?a) (next ?a ?b)) :effect (and (not (here ?a)) (here ?b) (increase (total-cost) 2)))
 (:action press :parameters (?l - lamp ?r - room) :precondition (and (here ?r) (in ?l ?r))
  :effect (and (when (on ?l) (not (on ?l))) (when (and (not (on ?l)) (not (broken ?l))) (on ?l)) (increase (total-cost) 1)))
 (:action storm :parameters () :precondition (here hall) :effect (and (forall (?l - lamp) (not (on ?l))) (done)))
 (:action swap :parameters (?l - lamp ?m - lamp ?r - room ?s - room) :precondition (and (in ?l ?r) (in ?m ?s) (not (= ?l ?m)) (or (not (on ?l)) (on ?m)))
  :effect (and (not (in ?l ?r)) (not (in ?m ?s)) (in ?l ?s) (in ?m ?r)))
 (:action read :parameters (?r - room) :precondition (and (here ?r) (bright ?r)) :effect (done))
 (:action sleep :parameters (?r - room) :precondition (and (here ?r) (not (bright ?r)) (not (broken l1))) :effect (and (broken l1) (not (done))))
 (:action stay :parameters (?r - room) :precondition (here ?r) :effect (and (not (here ?r)) (here ?r))))
""".replace("(:constants hall - room)", "(:constants hall - room l1 - lamp)")


def lamps(goal: str, facts: str = "", more: str = "") -> str:
    return (f"(define (problem p) (:domain lamps) (:objects l2 l3 - lamp cellar attic - room)\n(:init (here hall) (next hall cellar) (next cellar hall) (next hall attic) (in l1 hall) (in l2 cellar) (in l3 attic) {facts})\n"
            f"(:goal {goal})\n{more})")


def test_translations_of_what_alfworld_has_not():
    "Conditional and quantified effects, derived facts in preconditions, negative goals, costs, and goals out of reach."
    pytest.importorskip("fast_downward", reason="needs the extra: pip install 'exprag[alfworld]'")
    goals = ("(done)", "(and (here cellar) (on l2))", "(bright attic)", "(exists (?l - lamp) (and (on ?l) (in ?l cellar)))", "(forall (?r - room) (bright ?r))", "(broken l3)",
             "(and (done) (not (bright hall)))", "(or (on l1) (on l3))", "(here attic)")
    cases = [(LAMPS, lamps(goal, facts, more)) for goal in goals for facts, more in (("", ""), ("(on l1) (broken l2)", ""), ("(= (total-cost) 0)", "(:metric minimize (total-cost))"))]
    made = translations(cases)
    assert len(made) == 27 and [case[1] for case, (same, _) in zip(cases, made) if not same] == [] and sum(count > 10 for _, count in made) >= 21


# -- what is kept on disk

def test_translations_are_kept_and_damaged_ones_made_again(env, sample, tmp_path):
    task = sample[1][0]
    def heard():
        with ALFWorldEnv(sample[0]) as made:
            made.engine.cache = tmp_path / "kept"
            return made.reset(task), [made.step(a) for a in read_game(task, sample[0])["walkthrough"]]
    first = heard()
    (kept,) = (tmp_path / "kept").iterdir()
    whole = kept.read_bytes()
    assert zlib.decompress(whole).startswith(b"begin_version")
    for damage in (whole[:200], whole[:-5] + b"12345"):
        kept.write_bytes(damage)
        assert heard() == first and kept.read_bytes() == whole
    before = kept.stat().st_mtime_ns
    assert heard() == first and kept.stat().st_mtime_ns == before and len(list((tmp_path / "kept").iterdir())) == 1


def test_nowhere_to_keep_anything(env, sample, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with ALFWorldEnv(sample[0]) as made:
        made.engine.cache = tmp_path / "file"
        assert made.reset(sample[1][0]) == env.reset(sample[1][0])


# -- deaths

def test_an_engine_that_hangs_is_ended(env, sample):
    first = env.reset(sample[1][0])
    env.engine.timeout = 0.5
    stop(env.engine.process.pid)
    try:
        with pytest.raises(SimulatorError, match="took more than 0.5 s .*starts a new one"): env.step("look")
    finally: env.engine.timeout = 60
    assert env.engine.process is None
    with pytest.raises(RuntimeError, match="is over"): env.step("look")
    assert env.reset(sample[1][0]) == first


@pytest.mark.parametrize("when", ["before it is asked", "while it is asked"])
def test_a_killed_engine_is_an_error_and_the_next_reset_starts_another(env, sample, when):
    import threading
    first, process = env.reset(sample[1][0]), env.engine.process
    if when == "while it is asked":
        stop(process.pid)
        threading.Timer(0.3, process.kill).start()
    else:
        process.kill()
        process.wait()
    with pytest.raises(SimulatorError, match=r"died \(step\); reset\(task\) starts a new one"): env.step("look")
    assert env.engine.process is None
    with pytest.raises(RuntimeError, match="is over"): env.step("look")
    assert env.reset(sample[1][0]) == first


def test_only_a_reset_starts_an_engine(sample):
    engine = EngineProcess(60, sample[0])
    with pytest.raises(SimulatorError, match="died"): engine.ask("step", "look")
    assert engine.process is None


def test_kill_from_another_thread(env, sample):
    import threading
    env.reset(sample[1][0])
    stop(env.engine.process.pid)
    threading.Timer(0.3, env.kill).start()
    with pytest.raises(SimulatorError, match="died"): env.step("look")
    assert env.reset(sample[1][0])[1]["steps"] == 0


def test_close_leaves_nothing_and_may_be_called_twice(env, sample):
    made = ALFWorldEnv(sample[0])
    made.reset(sample[1][0])
    process = made.engine.process
    made.close(), made.close()
    assert process.returncode is not None and not os.path.exists(f"/proc/{process.pid}")
    with pytest.raises(RuntimeError, match="over"): made.step("look")


def test_a_killed_python_leaves_no_engine(env, sample):
    code = (f"import time\nfrom exprag.worlds.alfworld import ALFWorldEnv\nfrom exprag.trajectory import Task\nenv = ALFWorldEnv({str(sample[0])!r})\n"
            f"env.reset(Task.parse({str(sample[1][0])!r}))\nprint(env.engine.process.pid, flush=True)\ntime.sleep(600)")
    python = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    engine = int(python.stdout.readline())
    python.kill(), python.wait(), python.stdout.close()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{engine}") and open(f"/proc/{engine}/stat").read().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the engine outlived its Python"
        time.sleep(0.1)


def test_nothing_of_the_engine_is_imported_here(env, sample):
    code = (f"import sys\nfrom exprag.worlds.alfworld import ALFWorldEnv\nfrom exprag.trajectory import Task\nwith ALFWorldEnv({str(sample[0])!r}) as env: env.reset(Task.parse({str(sample[1][0])!r}))\n"
            "print([m for m in ('textworld', 'alfworld', 'fast_downward', 'pickle') if m in sys.modules and m != 'pickle'])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# -- the same words in every process, and as the package's

PROGRAM = """
import json, random, sys
from exprag.worlds.alfworld import ALFWorldEnv, read_game
from exprag.world import play
from exprag.trajectory import Task
found = {}
with ALFWorldEnv(sys.argv[1]) as env:
    for name in sys.argv[2:]:
        task = Task.parse(name)
        path = read_game(task, env.data)["walkthrough"]
        found[name] = play(env, task, [a for w in path[:-1] for a in ("look", w, "inventory")]).id
print(json.dumps(found))
"""


def episodes_in_another_process(data, tasks, seed: str) -> dict:
    said = subprocess.run([sys.executable, "-c", PROGRAM, str(data), *map(str, tasks)], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    return json.loads(said.stdout)


def test_same_text_in_two_processes_and_orders(env, sample):
    root, tasks = sample
    assert episodes_in_another_process(root, tasks, "1") == episodes_in_another_process(root, tasks[::-1], "2")


PACKAGE = """
import json, sys
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld.envs.pddl import PddlEnv
env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)), shuffle=False)
path, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import random
choose = random.Random(seed)
env.load(path)
state = env.reset()
heard = [["", state.feedback, False]]
for _ in range(count):
    if state["won"]: break
    action = choose.choice(sorted(state["admissible_commands"]) + ["fly away"])
    state, score, done = env.step(action)
    heard.append([action, state.feedback, bool(done)])
print(json.dumps(heard))
"""


def as_the_package_says(env, task, seed, count) -> None:
    "A random walk through the package's own environment, and the same actions through ours: the same text."
    said = subprocess.run([sys.executable, "-c", PACKAGE, str(game_path(task, env.data)), str(seed), str(count)], capture_output=True, text=True, check=True,
                          env={**os.environ, "ALFWORLD_DATA": str(env.data)})
    (_, opening, _), *turns = json.loads(said.stdout)
    observation, info = env.reset(task, cap=1000)
    assert opening == f"-= Welcome to TextWorld, ALFRED! =-\n\n{observation}\n\n{info['goal']}"
    for number, (action, text, won) in enumerate(turns):
        assert env.step(action)[:3] == (text, float(won), won), f"step {number} of {task}: {action}"


def test_same_text_as_the_package(env, sample):
    as_the_package_says(env, sample[1][0], 1, 25)


def test_replay_of_all_evaluation_games_is_on_record():
    rows = json.loads((NBS / "data" / "alfworld_replay.json").read_text())
    assert {Task.parse(r["task"]) for r in rows} == {*panel("test"), *panel("seen")} and len(rows) == 274
    assert all(r["won"] and r["same"] and r["steps"] <= 50 for r in rows)


# -- with all games

@pytest.fixture(scope="module")
def whole(env):
    try: made = ALFWorldEnv()
    except GameError: pytest.skip("needs all games of ALFWorld: set ALFWORLD_DATA")
    with made: yield made


def transcript(env, task) -> tuple[str, str]:
    import hashlib
    observation, info = env.reset(task)
    heard = [f"-= Welcome to TextWorld, ALFRED! =-\n\n{observation}\n\n{info['goal']}"]
    for action in read_game(task, env.data)["walkthrough"]: heard.append((answer := env.step(action))[0])
    return hashlib.sha256(json.dumps(heard).encode()).hexdigest()[:16], answer[2]


def test_some_of_the_record_again(whole):
    rows = json.loads((NBS / "data" / "alfworld_replay.json").read_text())
    for row in spread(rows, 12): assert transcript(whole, Task.parse(row["task"])) == (row["text"], True)


def test_every_file_is_where_the_list_says(whole):
    for fold in FOLD_FOLDERS: assert all(game_path(t, whole.data).is_file() for t in alfworld_tasks(fold))


def test_the_list_is_the_files(whole):
    "The official folders hold what the list holds, apart from games that the package leaves out."
    for split in set(FOLD_FOLDERS.values()):
        there = {f"{p.parents[1].name}/{p.parent.name}" for p in (whole.data / "json_2.1.1" / split).glob("*/*/game.tw-pddl") if "movable" not in str(p) and "Sliced" not in str(p)}
        assert there == {f"{t.type}-{t.variation}" for fold, s in FOLD_FOLDERS.items() if s == split for t in alfworld_tasks(fold)}


@pytest.mark.slow
def test_all_of_the_record_again(whole):
    rows = json.loads((NBS / "data" / "alfworld_replay.json").read_text())
    assert [transcript(whole, Task.parse(row["task"])) for row in rows] == [(row["text"], True) for row in rows]


@pytest.mark.slow
def test_translations_of_a_hundred_games_are_the_translators(whole):
    games = [read_game(task, whole.data) for task in random.Random(1).sample([t for fold in FOLD_FOLDERS for t in alfworld_tasks(fold)], 100)]
    assert [same for same, _ in translations([(g["pddl_domain"], g["pddl_problem"]) for g in games])] == [True] * 100


@pytest.mark.slow
def test_fifty_random_tasks_in_two_processes_and_orders(whole):
    tasks = random.Random(0).sample([t for fold in FOLD_FOLDERS for t in alfworld_tasks(fold)], 50)
    assert episodes_in_another_process(whole.data, tasks, "1") == episodes_in_another_process(whole.data, tasks[::-1], "2")


@pytest.mark.slow
def test_random_walks_as_the_package(whole):
    for seed, task in enumerate(spread(alfworld_tasks("test"), 12)): as_the_package_says(whole, task, seed, 40)


def test_trials_of_one_goal_in_one_room_are_alike():
    "The hard games of the unseen fold: 61 games, 22 goals, and four rooms, too few to test over."
    hard, group_of = alfworld_tasks("test", HARD_TYPES), WORLD.group_of
    groups = {(t.type, group_of(t)) for t in hard}
    assert len(hard) == 61 and len(groups) == 22
    assert group_of(hard[0]) in hard[0].variation and {g.rsplit("-", 1)[1] for _, g in groups} == {"10", "219", "308", "424"}
