"""Parts and outcomes: who plays which part, what came out otherwise, and which experience goes first then."""
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprag.parts import agreeing, falls_short, form, lines_done, names_in, observant, otherwise, parts, recast, recasting, states, swapped
from exprag.query import Hit
from exprag.retelling import MARGIN, progress, retell, still_open
from exprag.select import Candidate, exclude_same_task, run_stages, successes_only, top_k
from exprag.trajectory import Step, Task, Trajectory

NO = "No known action matches that input."
TABLE = "This room is called the workshop. In it, you see:\n\ta table. On the table is: a battery, a {} wire, a {} wire.\n\ta red lamp, which is {}"


def episode(variation, *pairs, goal="Is the fork a conductor? If so, put it into the red box, if not into the green box.", score=100.0):
    done = {} if score is None else {"score": score, "success": score == 100}
    return Trajectory(Task("scienceworld", "test-conductivity", str(variation), "train"), goal, "This room is called the hall.", tuple(Step(a, o) for a, o in pairs), **done)


def trial(variation, plus, minus, lamp, box, wires=("red", "blue"), **more):
    return episode(variation, ("look around", TABLE.format(*wires, "off")), (f"connect battery to {plus} wire", f"battery is now connected to {plus} wire"),
                   (f"connect {minus} wire to red lamp", f"{minus} wire is now connected to red lamp"), ("look around", TABLE.format(*wires, lamp)), (f"move fork to {box} box", "You move the fork."), **more)


def now(*pairs, **more): return episode(9, *pairs, score=None, **more)
def begun(experience, n): return replace(experience, task=Task("scienceworld", "test-conductivity", "9", "dev"), steps=experience.steps[:n], score=None, success=None)


def candidates(*experiences):
    return [Candidate(Hit(e.id, 1 - n / 100, n), e) for n, e in enumerate(experiences, 1)]


LIT, DARK = trial(1, "red", "blue", "on", "red"), trial(2, "blue", "red", "off", "green")
HERE = begun(trial(9, "red", "blue", "off", "?"), 4)  # wired as LIT is, and the lamp stays dark


def test_a_line_without_its_things_is_a_form():
    names = names_in(LIT.actions, LIT.observations)
    assert form("connect Battery to red wire", names) == ("connect _ to _", ("battery", "red wire")) and form("wait", names) == ("wait", ())
    assert form("use red wire", names_in(("use red wire", "use wire"), ("a wire, a red wire",)))[1] == ("red wire",)
    assert names_in(("wait",), ("a jug",)) is None and form("move jug", None) == ("move jug", ())
    assert form("table lamp", names_in(("use table",), ("a table",))) == ("table lamp", ())  # the verb is no thing


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), max_size=8))
def test_no_two_parts_are_played_by_one_thing(moves):
    mapping = {}
    for x, y in moves:
        mapping = swapped(mapping, x, y)
        assert mapping.get(x, x) == y and sorted(mapping) == sorted(mapping.values()) and all(a != b for a, b in mapping.items())


def test_the_parts_are_those_of_what_was_done():
    assert parts(DARK, HERE) == {"red wire": "blue wire", "blue wire": "red wire"} and parts(LIT, HERE) == {} and recast(LIT, HERE) is LIT
    again = recast(DARK, HERE)
    assert again.actions[:4] == HERE.actions and again.actions[4] == "move fork to green box"
    assert again.steps[1].observation == "battery is now connected to red wire" and again.provenance["adapted_from"] == DARK.id
    assert recast(again, HERE) is again  # told once, it is told


def test_what_the_goal_names_is_itself():
    goal = "Turn on the red lamp."
    asked, other = (replace(trial(1, "red", "blue", "on", "red"), goal=g) for g in (goal, "Turn on the lamp."))
    seen = TABLE.format("red", "blue", "off").replace("a red lamp", "a green lamp, which is off\n\ta red lamp")
    slip = now(("look around", seen), ("connect battery to red wire", "."), ("connect blue wire to green lamp", "."))
    assert parts(asked, replace(slip, goal=goal)) == {} and parts(other, replace(slip, goal="Turn on the lamp.")) == {"red lamp": "green lamp", "green lamp": "red lamp"}


def test_what_stands_in_a_list_of_the_goal_is_itself():
    goal, seen = "Which of the two inclined planes (plastic, rubber) has the most friction?", "an inclined plane with a plastic surface, an inclined plane with a rubber surface"
    there = episode(3, ("look", seen), ("look at rubber surface", "."), ("look at plastic surface", "."), ("focus on plastic surface", "."), goal=goal)
    assert parts(there, now(("look", seen), ("look at plastic surface", "."), goal=goal)) == {}


def test_a_thing_that_only_one_of_them_was_told_of_has_a_name():
    there = episode(3, ("look", "a red wire"), ("take red wire", "."), ("take green wire", "You have it."), ("connect red wire to green wire", "."))
    here = now(("look", "a green wire"), ("take green wire", "."))
    assert recast(replace(there, steps=(Step("look", "a red wire"), *there.steps[1:])), here).actions == ("look", "take green wire", "take red wire", "connect green wire to red wire")


def test_the_number_of_a_thing_is_no_word_of_its_name():
    seen = "a flower pot 1, a flower pot 2, a self watering flower pot 1"
    there = episode(3, ("look", seen), ("look at flower pot 1", "."), ("look at self watering flower pot 1", "."))
    assert recast(there, now(("look", seen), ("look at flower pot 2", "."))).actions[1:] == ("look at flower pot 2", "look at self watering flower pot 1")


def test_what_is_said_of_things_keeps_its_capitals_and_its_other_letters():
    seen = "a \u03bc wire, a red wire, a blue wire"
    there = episode(3, ("look", seen), ("use red wire", "Red wire and \u00b5 wire. A violet-red wire."))
    assert recast(there, now(("look", seen), ("use blue wire", "."))).steps[1].observation == "Blue wire and \u00b5 wire. A violet-red wire."


def test_a_name_within_a_name_stays():
    shop = "a red paint, a blue paint, a violet-red paint, a dark red paint"
    there = episode(3, ("look", shop), ("use red paint", "You use the red paint, not the dark red paint or the violet-red paint."), ("use dark red paint", "."), ("use violet-red paint", "."))
    again = recast(there, now(("look", shop), ("use blue paint", ".")))
    assert again.actions[1:] == ("use blue paint", "use dark red paint", "use violet-red paint")
    assert again.steps[1].observation == "You use the blue paint, not the dark red paint or the violet-red paint."


NAMES = ("red paint", "dark red paint", "violet-red paint", "paint", "red wire", "blue wire", "wire", "red wire box", "paint red", "cup")
LINES = st.lists(st.tuples(st.sampled_from(("take", "put", "pour")), st.sampled_from(NAMES), st.sampled_from(NAMES)).map(lambda said: f"{said[0]} {said[1]} in {said[2]}"), min_size=1, max_size=8)


@given(LINES, LINES, st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_more_of_an_experience_is_done_when_it_is_recast(theirs, mine, there, here):
    experience, trajectory = (episode(v, *((line, ", ".join(sorted(seen))) for line in lines), goal="Do it.", score=None) for v, lines, seen in ((1, theirs, there), (9, mine, here)))
    mapping, again = parts(experience, trajectory), recast(experience, trajectory)
    before, after = (progress(e.actions, trajectory.actions, [True] * len(mine)).done for e in (experience, again))
    assert sorted(mapping) == sorted(mapping.values()) and (again is experience or after > before)


def test_a_slip_is_no_part():
    shop = ("look", "a red paint, a blue paint")
    there = episode(3, shop, ("use red paint", "."), ("use red paint", "."), ("use blue paint", "."))
    slip = now(shop, ("use blue paint", "."), ("use red paint", "."), ("use red paint", "."), ("use blue paint", "."))
    assert parts(there, slip) != {} and recast(there, slip) is there


def test_a_long_answer_is_read_in_time():
    from time import perf_counter
    begun_at = perf_counter()
    for text in (" " * 50_000, "\n" * 50_000, "a " * 25_000, ", a" * 15_000): assert states(text) == {}
    assert perf_counter() - begun_at < 2


def test_what_was_refused_gives_no_part():
    refused = now(("look around", TABLE.format("red", "blue", "off")), ("connect battery to red wire", NO))
    assert parts(DARK, refused) == {}
    assert parts(DARK, now(*((s.action, s.observation) for s in refused.steps[:1]), ("connect battery to red wire", "battery is now connected to red wire"))) != {}


def test_a_thing_of_another_kind_or_a_kept_one_plays_no_part():
    seen = TABLE.format("red", "blue", "off") + ", a spoon"
    assert parts(DARK, now(("look around", seen), ("connect battery to spoon", "battery is now connected to spoon"))) == {}
    once = episode(3, ("look around", seen), ("take red wire", "."), ("drop red wire", "."), ("take blue wire", "."))
    assert parts(once, now(("look around", seen), ("take red wire", "."), ("drop blue wire", "."))) == {}  # the red one is the red one since it was taken
    assert parts(once, now(("look around", seen), ("take blue wire", "."), ("drop blue wire", "."), ("take red wire", "."))) == {"red wire": "blue wire", "blue wire": "red wire"}


def test_a_line_done_before_anything_was_seen_stays_done():
    first = episode(3, ("take red wire", "You take the red wire."), ("look around", TABLE.format("red", "yellow", "off")), ("use red wire", "."))
    here = now(("take red wire", "You take the red wire."), ("look around", TABLE.format("blue", "yellow", "off")))
    told = retell(first, here)
    def done(e): return progress(e.actions, here.actions, [True, True]).done
    assert told.actions[0] == "take blue wire" and done(told) == 0  # the flaw
    assert done(recast(told, here)) == 2 and recast(told, here).actions[2] == "use red wire"


@pytest.mark.parametrize("text, wanted", [
    ("a lamp, which is on", {"lamp": {"on"}}), ("On it is: a red lamp, which is off, a lamp, which is on.", {"red lamp": {"off"}, "lamp": {"on"}}),
    ("a lamp, which is on\n\ta lamp, which is off", {"lamp": {"on", "off"}}), ("a cup (a lamp, which is on); some salt, which is wet; a jug", {"lamp": {"on"}, "salt": {"wet"}}), ("The door is open.", {}), ("a lamp, which is on, and a bulb, which is off\ta cup (of water), which is hot\ta jug", {"lamp": {"on"}, "bulb": {"off"}, "cup": {"hot"}}), ("", {})])
def test_how_things_are(text, wanted):
    assert states(text) == wanted


@pytest.mark.parametrize("here, there, wanted", [
    ("They mix to orange paint.", "They mix to violet paint.", True), ("They mix to violet paint.", "They mix to violet paint.", False), ("They mix.", "They do not mix.", False),
    ("They mix to orange.\nLook!", "They mix to violet.", False), ("orange", "the", False), ("1 degrees", "0 degrees", False), ("plane B", "plane H", False), ("VIOLET", "violet", False), ("Yes", "Yes.", False)])
def test_an_answer_that_falls_short(here, there, wanted):
    assert falls_short(here, there, "Create the violet paint at 150.0 degrees on plane H.") is wanted


def test_what_came_out_otherwise():
    assert otherwise(LIT, HERE) == ("red lamp",) and otherwise(recast(DARK, HERE), HERE) == () == otherwise(DARK, now())
    assert otherwise(LIT, begun(HERE, 3)) == ()  # nobody has looked yet
    on_again = replace(HERE, steps=(*HERE.steps[:3], *LIT.steps[3:4]))
    assert otherwise(LIT, on_again) == () and [n for n, _ in lines_done(LIT, on_again)] == [0, 1, 2, 3]


def test_what_was_said_last_counts():
    twice = episode(4, ("look", "a lamp, which is off"), ("wait", "."), ("look", "a lamp, which is on"))
    twice = replace(twice, steps=(Step("look", "a lamp, which is off"), *twice.steps))
    lit_first = now(("look", "a lamp, which is off"), ("look", "a lamp, which is on"), ("wait", "."))
    assert otherwise(twice, lit_first) == ("lamp",)
    assert otherwise(twice, replace(lit_first, steps=(*lit_first.steps, Step("look", "a lamp, which is on")))) == ()


def test_what_was_otherwise_when_first_seen_has_not_come_out_so():
    there = episode(4, ("look", "a door, which is open, a lamp, which is off"), ("wait", "."), ("look", "a door, which is open, a lamp, which is on"))
    assert otherwise(there, now(("look", "a door, which is closed, a lamp, which is off"), ("wait", "."), ("look", "a door, which is closed, a lamp, which is off"))) == ("lamp",)


def test_the_first_observation_is_the_first_look():
    there, here = (replace(e, first_observation="a lamp, which is off") for e in (episode(4, ("look", "a lamp, which is on")), now(("look", "a lamp, which is off"))))
    assert otherwise(there, here) == ("lamp",) and otherwise(there, replace(here, first_observation="")) == ()


def test_a_line_said_twice_counts_once():
    there = episode(4, ("mix", "violet"), ("mix", "violet"), goal="violet")
    assert otherwise(there, now(("mix", "orange"), ("mix", "orange"), goal="violet")) == ("mix",) and otherwise(there, now(("mix", "orange"), ("mix", "violet"), goal="violet")) == ()


def test_two_things_of_one_name_are_compared_together():
    both = episode(4, ("look", "a lamp, which is off, a lamp, which is on"), ("wait", "."))
    twice = replace(both, steps=(*both.steps, both.steps[0]))
    here = ("look", "a lamp, which is on, a lamp, which is off"), ("wait", ".")
    assert otherwise(twice, now(*here, here[0])) == () and otherwise(twice, now(*here, ("look", "a lamp, which is off"))) == ("lamp",)


def test_a_refused_line_was_not_followed():
    here = now(("look around", TABLE.format("red", "blue", "off")), ("connect battery to red wire", NO))
    assert [n for n, _ in lines_done(LIT, here)] == [0]


def order(trajectory, *experiences):
    told = [recast(e, trajectory) for e in experiences]
    kept, _ = still_open()(trajectory, candidates(*told))
    return [c.experience.task.variation for c in agreeing()(trajectory, kept)[0]]


def test_the_nearest_goes_on_while_it_agrees():
    assert order(begun(HERE, 3), LIT, DARK) == ["1", "2"] and order(HERE, DARK, LIT) == ["2", "1"]
    elsewhere = episode(5, ("teleport to kitchen", "You teleport."), ("move fork to green box", "You move the fork."))
    assert order(HERE, elsewhere, LIT, DARK) == ["5", "1", "2"]  # nothing speaks against the nearest, though of another more is done
    assert agreeing()(HERE, []) == ([], [])


def test_what_agrees_and_is_most_advanced_goes_first():
    elsewhere = episode(5, ("teleport to kitchen", "You teleport."), ("move fork to green box", "You move the fork."))
    assert order(HERE, LIT, elsewhere, DARK) == ["2", "5", "1"]
    assert order(HERE, LIT) == ["1"]  # nothing better: it is still shown


def test_the_reason_is_told():
    kept, _ = still_open()(HERE, candidates(LIT, recast(DARK, HERE)))
    assert [c.note for c in agreeing()(HERE, kept)[0]] == [f"in the first, {LIT.id[:8]}, otherwise: red lamp", "otherwise: red lamp"]
    assert [c.note for c in agreeing()(HERE, kept[:1])[0]] == ["otherwise: red lamp"]


def test_observant_stages_stand_before_the_one_that_limits():
    stages = observant((exclude_same_task(), successes_only(), top_k(1)))
    assert [s.name for s in stages] == ["exclude_same_task", "successes_only", "within", "retelling", "recasting", "still_open", "agreeing", "top_k"]
    assert stages[2].describe() == {"stage": "within", "margin": MARGIN} and observant((), refusals={"mine": ("No.",)})[-1].describe()["refusals"] == {"mine": ["No."]}


def test_all_of_it_together_puts_the_fork_into_the_right_box():
    stages = observant((exclude_same_task(), successes_only(), top_k(1)))
    once, again = (run_stages(stages, HERE, candidates(LIT, DARK))[0] for _ in range(2))
    told = once[0].experience
    assert once == again and told.actions[told.provenance["at_step"]] == "move fork to green box" and told.provenance["shift"] == 0


def test_an_unknown_world_is_an_error_before_the_first_step():
    elsewhere = replace(now(), task=Task("mine", "a", "1", "dev"))
    for stages in (observant(()), (recasting(),), (agreeing(),)):
        with pytest.raises(ValueError, match="nobody said how 'mine' refuses"): run_stages(stages, elsewhere, candidates(LIT))
    assert recasting({"mine": ("No.",)})(elsewhere, candidates(LIT))[0][0].experience is LIT
