"""Retelling: what stands in the place of what, and when an experience is given up."""
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprag.query import Hit
from exprag.retelling import (MARGIN, exchanged, kind, pointed_at, progress, refused, retell, retelling, seen_instead, sights, situated, still_open, things,
                              within)
from exprag.select import Candidate, exclude_same_task, run_stages, successes_only, top_k
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import view

NO = "No known action matches that input."
SHOP = "This room is called the workshop. In it, you see:\n\ta table. On the table is: a battery, a {} wire, a {} wire.\n\ta switch, which is off"


def episode(variation, *pairs, goal="Light the bulb.", first="This room is called the hall.", score=100.0, type="power-component"):
    done = {} if score is None else {"score": score, "success": score == 100}
    return Trajectory(Task("scienceworld", type, str(variation), "train"), goal, first, tuple(Step(a, o) for a, o in pairs), **done)


def now(*pairs, **more): return episode(9, *pairs, score=None, **more)


LOOK = ("look around", SHOP.format("red", "yellow"))
RED = episode(1, ("teleport to workshop", "You teleport to the workshop."), LOOK, ("connect red wire to yellow wire", "red wire is connected to yellow wire."), ("wait1", "You wait."))
HERE = now(("teleport to workshop", "You teleport to the workshop."), ("look around", SHOP.format("black", "green")))


def candidates(*experiences, scores=None):
    return [Candidate(Hit(e.id, score, n), e) for n, (e, score) in enumerate(zip(experiences, scores or [1 - i / 100 for i in range(len(experiences))]), 1)]


def test_things_are_names_and_no_statements():
    assert things("On the table is: a jug (containing nothing), a red wire. The door is open.") == ["on", "jug", "nothing", "red wire"]
    assert things(SHOP.format("red", "yellow"))[-1] == "switch"
    assert [kind(x) for x in ("red wire", "flower pot 3", "7")] == ["wire", "pot", ""]


@pytest.mark.parametrize("old, new, wanted", [
    (SHOP.format("red", "yellow"), SHOP.format("black", "green"), {"red wire": "black wire", "yellow wire": "green wire"}),
    (SHOP.format("red", "yellow"), SHOP.format("yellow", "green"), {"red wire": "green wire"}),
    ("you need to mix peanut, almond, cashew.", "you need to mix jam, bread.", {"peanut": "jam", "almond": "bread"}),
    ("On the table is: a jug (containing nothing).", "On the table is: a bowl (containing nothing).", {"jug": "bowl"}),
    ("A door to the hall (that is open)", "A door to the hall (that is closed)", {}),
    ("a bulb, which is off", "a bulb, which is on", {}),
    ("You see a flower pot 3.", "You see a flower pot 5.", {"flower pot 3": "flower pot 5"}), ("", "a jug", {}), ("a jug", "", {})])
def test_what_stands_there_instead(old, new, wanted):
    assert exchanged(old, new) == wanted


@given(st.text("ab ,.\n\t", max_size=40), st.text("abc ,.\n\t", max_size=40))
def test_nothing_that_is_still_there_is_exchanged_and_nothing_twice(old, new):
    found = exchanged(old, new)
    assert len(set(found.values())) == len(found) and not set(found) & set(things(new)) and exchanged(old, old) == {}


def test_the_first_look_counts():
    later = now(*((s.action, s.observation) for s in HERE.steps), ("look around", SHOP.format("blue", "white")))
    assert seen_instead(RED, later) == seen_instead(RED, HERE) == {"red wire": "black wire", "yellow wire": "green wire"}
    assert sights(later)["look around", "This room is called the workshop. In it, you see:"] == SHOP.format("black", "green")


def test_an_experience_is_retold_and_says_so():
    told = retell(RED, HERE)
    assert told.actions == ("teleport to workshop", "look around", "connect black wire to green wire", "wait1")
    assert told.steps[2].observation == "black wire is connected to green wire."
    assert told.provenance["adapted_from"] == RED.id and told.provenance["seen_instead"] == {"red wire": "black wire", "yellow wire": "green wire"}
    assert retell(RED, now()) is RED and retell(told, HERE) == told


def test_the_goal_and_the_verb_are_not_exchanged():
    assert retell(RED, replace(HERE, goal="Light the bulb with the red wire.")).actions[2] == "connect red wire to green wire"
    opening = episode(1, ("look", "you need an open, red jug."), ("open red jug", "done"))
    assert retell(opening, now(("look", "you need an shut, blue jug."))).actions[1].startswith("open ")


def test_another_place_is_no_comparison():
    kitchen = now(("look around", SHOP.format("black", "green").replace("workshop", "kitchen")))
    assert retell(RED, kitchen) is RED


def after(lines, actions, taken=None): return tuple(progress(lines, actions, [True] * len(actions) if taken is None else taken))


def test_lines_are_done_in_their_order():
    assert [after("abc", a)[:2] for a in ("", "a", "ab", "axb", "ba", "abcabc")] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 0), (3, 3)] and after("", "a") == (0, 0, None)


@pytest.mark.parametrize("actions, taken, wanted", [
    ("ab", (1, 0), (1, 1, "b")), ("abb", (1, 0, 1), (2, 1, None)), ("ac", (1, 0), (1, 1, None)), ("cab", (0, 1, 1), (2, 0, None)), ("abx", (1, 0, 1), (1, 1, "b")),
    ("a", (0,), (0, 0, "a")), ("abcd", (1, 1, 1, 0), (3, 3, None))])
def test_a_refusal_counts_where_the_line_was_next(actions, taken, wanted):
    assert after("abc", actions, taken) == wanted


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=12))
def test_what_is_done_is_a_beginning_that_is_contained(lines, actions):
    def contained(part):
        rest = iter(actions)
        return all(x in rest for x in part)
    count, before, _ = after(lines, actions)
    assert before <= count and contained(lines[:count]) and (count == len(lines) or not contained(lines[:count + 1]))


def followed(experience, trajectory): return pointed_at(experience, trajectory, progress(experience.actions, trajectory.actions, [True] * len(trajectory)))


def test_the_next_line_has_the_number_of_the_next_action():
    waited = now(*((s.action, s.observation) for s in RED.steps[:2]), *[("wait", "You wait.")] * 5)
    lines = view("numbered")(followed(RED, waited)).splitlines()
    assert lines[1:] == ["...", "8: connect red wire to yellow wire | red wire is connected to yellow wire.", "9: wait1 | You wait."]
    going_on = now(*((s.action, s.observation) for s in (*waited.steps, RED.steps[2])))
    assert view("numbered")(followed(RED, going_on)).splitlines() == lines  # to the letter: no cache is rebuilt
    assert view("numbered")(followed(RED, now())) == view("numbered")(RED) and view("numbered")(RED).splitlines()[2].startswith("1: teleport")


def test_a_long_experience_is_shown_in_parts():
    long = episode(4, *((f"do {n}", "done") for n in range(1, 8)))
    def lines(*actions, ahead=3):
        here = now(*((a, "done") for a in actions))
        return view("numbered")(pointed_at(long, here, progress(long.actions, here.actions, [True] * len(here)), ahead)).splitlines()[1:]
    def do(*numbers): return [f"do {n}" for n in numbers]
    first = ["Start | This room is called the hall.", "1: do 1 | done", "2: do 2 | done", "3: do 3 | done", "..."]
    assert lines() == lines(*do(1)) == lines(*do(1, 2)) == first and lines(ahead=None)[-1] == "7: do 7 | done"
    assert lines(*do(1, 2, 3)) == lines(*do(1, 2, 3, 4, 5)) == ["...", "4: do 4 | done", "5: do 5 | done", "6: do 6 | done", "..."]
    assert lines(*do(1, 2, 3), "slip", *do(4)) == ["...", "5: do 4 | done", "6: do 5 | done", "7: do 6 | done", "..."]
    assert lines(*do(1, 2, 3, 4, 5, 6)) == ["...", "7: do 7 | done"]


def test_what_is_much_farther_is_dropped():
    kept, dropped = within(0.1)(now(), candidates(RED, RED, RED, scores=[0.9, 0.81, 0.79]))
    assert len(kept) == 2 and dropped[0].reason == "0.110 farther than the nearest" and within(0)(now(), []) == ([], [])
    with pytest.raises(ValueError, match="within\\(-1\\)"): within(-1)
    with pytest.raises(ValueError, match="within\\(nan\\)"): within(float("nan"))


def test_a_refused_line_brings_the_next_experience_at_its_place():
    other = episode(2, ("teleport to workshop", "You teleport to the workshop."), ("connect bulb to battery", "done"))
    failed = now(("teleport to workshop", "You teleport to the workshop."), ("look around", LOOK[1]), ("connect red wire to yellow wire", NO))
    kept, dropped = still_open()(failed, candidates(RED, other))
    assert [c.experience.task.variation for c in kept] == ["2"] and dropped[0].reason == "the world refused 'connect red wire to yellow wire'"
    assert dict(kept[0].experience.provenance) == {"at_step": 1, "shift": 2, "shown_from": 1}


def test_where_all_are_refused_the_nearest_goes_on_behind_the_line():
    failed = now(("teleport to workshop", "You teleport to the workshop."), ("look around", LOOK[1]), ("connect red wire to yellow wire", NO))
    kept, _ = still_open()(failed, candidates(RED))
    assert kept[0].note == "behind a line that was refused" and kept[0].experience.provenance["at_step"] == 3
    through = now(*((s.action, s.observation) for s in RED.steps))
    kept, dropped = still_open()(through, candidates(RED))
    assert kept == [] and dropped[0].reason == "it is through"


def test_a_question_is_no_refusal():
    assert not refused(Step("a", "Ambiguous request: Please enter"), "scienceworld") and refused(Step("a", "Unknown action. Type"), "scienceworld")
    assert refused(Step("a", "Nothing happens."), "alfworld")
    with pytest.raises(ValueError, match="nobody said how 'mine' refuses"): refused(Step("a", "b"), "mine")
    assert still_open({"mine": ("No.",)}).describe()["refusals"] == {"mine": ["No."]}


def test_what_cannot_be_is_refused_before_the_first_step():
    elsewhere = replace(now(), task=Task("mine", "a", "1", "dev"))
    with pytest.raises(ValueError, match="nobody said how 'mine' refuses"): still_open()(elsewhere, candidates(RED))
    with pytest.raises(ValueError, match=r"one text: give refusals=.'mine': .'Error',"): refused(Step("a", "every thing is fine"), "mine", {"mine": "Error"})
    with pytest.raises(ValueError, match="ahead=0.*at least one"): still_open(ahead=0)


def test_situated_stages_stand_before_the_one_that_limits():
    names = [s.name for s in situated((exclude_same_task(), successes_only(), top_k(1)))]
    assert names == ["exclude_same_task", "successes_only", "within", "retelling", "still_open", "top_k"]
    assert [s.name for s in situated(())] == ["within", "retelling", "still_open"] and situated(())[0].describe() == {"stage": "within", "margin": MARGIN}


def test_all_of_it_depends_on_the_episode_alone():
    stages = situated((exclude_same_task(), successes_only(), top_k(1)))
    once, again = (run_stages(stages, HERE, candidates(RED))[0] for _ in range(2))
    assert once == again and once[0].experience.actions[2] == "connect black wire to green wire"
    assert retelling()(HERE, candidates(RED))[0][0].experience == retell(RED, HERE)
