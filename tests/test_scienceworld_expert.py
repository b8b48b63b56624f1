"The expert, in the real simulator."
import pytest

from exprag.trajectory import Step, Trajectory
from exprag.world import play, spread
from exprag.worlds.scienceworld import (
    ACTION_TEMPLATES, AMBIGUOUS, EXPERT_LENGTHS, MENDELIAN_TYPES, REJECTED, STATEFUL_TYPES, WORLD,
    scienceworld_tasks)
from exprag.worlds.scienceworld_expert import (
    WAIT_TICKS, accepted, attempted, expert, shortest_walk, tidied, wait_instead, way_to)
from worlds import QUICK, TYPES, env, task  # noqa: F401


def episode(*turns) -> Trajectory:
    return Trajectory(QUICK, "goal", "This room is called the kitchen. You also see:\n\tA door to the hallway (that is open)", tuple(Step(*t) for t in turns))


def test_rejected_lines_and_unanswered_questions_go():
    question = AMBIGUOUS + " Please enter the number"
    assert accepted(episode(("a", "fine"), ("b", REJECTED), ("c", question), ("0", "done"), ("d", question), ("e", "fine"))) == ("a", "c", "0", "e")


def test_tidied_walks_and_teleports():
    story = episode(("open door to hallway", "The door is already open."), ("go to hallway", "You move to the hallway."), ("go to kitchen", "You move to the kitchen."),
                 ("go to hallway", "You move to the hallway."), ("go to workshop", "You move to the workshop."), ("look around", "This room is called the workshop."),
                 ("examine wire", "a wire"), ("go to hallway", "You move to the hallway."))
    assert tidied(story) == ("go to hallway", "go to workshop", "look around", "look at wire", "go to hallway")
    assert tidied(story, "teleport") == ("teleport to workshop", "look around", "look at wire", "teleport to hallway")
    assert tidied(story, "words") == tuple(a.replace("examine", "look at") for a in story.actions)


def test_shortest_walk():
    doors = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}
    assert shortest_walk("a", "d", doors) == ["b", "d"] and shortest_walk("a", "a", doors) == [] and shortest_walk("d", "a", doors) is None


def test_way_to():
    doors = {"a": ["b"], "b": ["c"]}
    assert way_to("c", "a", doors, "walk") == ["go to b", "go to c"] and way_to("c", "a", doors, "teleport") == ["teleport to c"] and way_to("a", "a", {}, "walk") == []


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 23, 24, 300])
def test_waiting_takes_as_long_as_watching(count):
    short = wait_instead(["look at x"] * count)
    assert sum(WAIT_TICKS if a == "wait" else 1 for a in short) == count and len(short) <= count


@pytest.mark.parametrize("kind", ["power-component", "identify-life-stages-2"])
def test_expert_reaches_the_goal_tidy_or_not(env, kind):
    t = scienceworld_tasks("train", [kind])[0]
    plain = expert(env, t)
    for way in (True, "teleport"):
        made = expert(env, t, tidy=way)
        assert made.success and made.score == 100 and len(made) <= len(plain) and accepted(made) == made.actions
        assert made.provenance["actor"] == "expert" and made.provenance["gold_steps"] == len(plain) == EXPERT_LENGTHS[kind][0]
        assert all(WORLD.canonical(a) in ACTION_TEMPLATES or a.isdigit() for a in made.actions)
        assert play(env, t, made.actions, cap=1000).id == made.id


def test_waiting_is_exactly_as_long_in_the_real_simulator(env):
    t = scienceworld_tasks("train", ["inclined-plane-friction-named-surfaces"])[0]
    plain, short = expert(env, t), expert(env, t, tidy="words")
    assert len(short) < len(plain) and plain.steps[-2].observation == short.steps[-2].observation


def test_a_gold_path_that_fails_is_not_kept(env):
    failing = task("freeze", 11)
    assert expert(env, failing) is None and expert(env, failing, tidy=True) is None
    marked = attempted(env, failing, tidy=True)
    assert marked.success is False and 0 < marked.score < 100 and len(marked) and "tidy" not in marked.provenance and accepted(marked) == marked.actions


@pytest.mark.parametrize("kind", STATEFUL_TYPES)
def test_a_type_whose_paths_depend_on_earlier_ones_gets_a_new_simulator(env, kind):
    first, second = scienceworld_tasks("train", [kind])[:2]
    alone = expert(env, first).id
    expert(env, second)
    assert expert(env, first).id == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", [t for t in TYPES if t not in MENDELIAN_TYPES])
def test_expert_lengths_are_what_the_simulator_gives(env, kind):
    made = [expert(env, t) for t in spread(scienceworld_tasks("train", [kind]), 5)]
    assert tuple(m and len(m) for m in made) == EXPERT_LENGTHS[kind]
