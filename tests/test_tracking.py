"""Progress tracking: aligned objects and roles, rejected actions, and ranks by outcome."""
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprag import world as registry
from exprag.combined import retrieve_for_training
from exprag.memory.tracking import (
    align, align_objects, align_roles, counterparts, different_outcomes, done_steps, drop_rejected,
    falls_short, first_seen, form, kind, names_in, objects, pointed_at, progress, rank_by_outcome, roles,
    seen_instead, states, swapped, track_progress, with_roles, within)
from exprag.select import Selection, exclude_same_task, run_stages, successes_only, top_k
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Cursor, Experience, Hit, numbered
from exprag.world import World, load_world

NO = "No known action matches that input."
SHOP = "This room is called the workshop. In it, you see:\n\ta table. On the table is: a battery, a {} wire, a {} wire.\n\ta switch, which is off"


def episode(variation, *pairs, goal="Light the bulb.", first="This room is called the hall.", score=100.0, type="power-component"):
    done = {} if score is None else {"score": score, "success": score == 100}
    return Trajectory(Task("scienceworld", type, str(variation), "train"), goal, first, tuple(Step(a, o) for a, o in pairs), **done)


def now(*pairs, **more): return episode(9, *pairs, score=None, **more)
def aligned(trajectory, agent): return align(Experience(trajectory), agent).trajectory


LOOK = ("look around", SHOP.format("red", "yellow"))
RED = episode(1, ("teleport to workshop", "You teleport to the workshop."), LOOK, ("connect red wire to yellow wire", "red wire is connected to yellow wire."), ("wait1", "You wait."))
HERE = now(("teleport to workshop", "You teleport to the workshop."), ("look around", SHOP.format("black", "green")))


def candidates(*experiences, scores=None):
    return [Experience(e, Hit(e.id, score, n)) for n, (e, score) in enumerate(zip(experiences, scores or [1 - i / 100 for i in range(len(experiences))]), 1)]


def test_objects_are_names_and_no_statements():
    assert objects("On the table is: a jug (containing nothing), a red wire. The door is open.") == ["on", "jug", "nothing", "red wire"]
    assert objects(SHOP.format("red", "yellow"))[-1] == "switch"
    assert [kind(x) for x in ("red wire", "flower pot 3", "7")] == ["wire", "pot", ""]


@pytest.mark.parametrize("old, new, wanted", [
    (SHOP.format("red", "yellow"), SHOP.format("black", "green"), {"red wire": "black wire", "yellow wire": "green wire"}),
    (SHOP.format("red", "yellow"), SHOP.format("yellow", "green"), {"red wire": "green wire"}),
    ("you need to mix peanut, almond, cashew.", "you need to mix jam, bread.", {"peanut": "jam", "almond": "bread"}),
    ("On the table is: a jug (containing nothing).", "On the table is: a bowl (containing nothing).", {"jug": "bowl"}),
    ("A door to the hall (that is open)", "A door to the hall (that is closed)", {}),
    ("a bulb, which is off", "a bulb, which is on", {}),
    ("You see a flower pot 3.", "You see a flower pot 5.", {"flower pot 3": "flower pot 5"}), ("", "a jug", {}), ("a jug", "", {})])
def test_counterparts(old, new, wanted):
    assert counterparts(old, new) == wanted


@given(st.text("ab ,.\n\t", max_size=40), st.text("abc ,.\n\t", max_size=40))
def test_nothing_that_is_still_there_is_replaced_and_nothing_twice(old, new):
    found = counterparts(old, new)
    assert len(set(found.values())) == len(found) and not set(found) & set(objects(new)) and counterparts(old, old) == {}


def test_only_the_first_observation_counts():
    later = now(*((s.action, s.observation) for s in HERE.steps), ("look around", SHOP.format("blue", "white")))
    assert seen_instead(RED, later) == seen_instead(RED, HERE) == {"red wire": "black wire", "yellow wire": "green wire"}
    assert first_seen(later)["look around", "This room is called the workshop. In it, you see:"] == SHOP.format("black", "green")


def test_an_experience_gets_the_objects_that_the_agent_has_observed():
    made = aligned(RED, HERE)
    assert made.actions == ("teleport to workshop", "look around", "connect black wire to green wire", "wait1")
    assert made.steps[2].observation == "black wire is connected to green wire." and made.provenance == RED.provenance
    assert aligned(RED, now()) is RED and aligned(made, HERE) == made
    experience = Experience(RED, Hit(RED.id, 0.9, 1), note="nearest")
    assert align(experience, HERE) == replace(experience, trajectory=made) and align(experience, HERE).id == RED.id


def test_training_contexts_can_be_aligned_with_the_whole_demonstration():
    class Always:
        def recall(self, t): return Selection((Experience(easy, Hit(easy.id, 0.9, 1)),))
        def describe(self): return {"kind": "always"}
    easy, demonstration = (replace(e, task=Task("scienceworld", "boil", str(n), "train")) for n, e in enumerate((RED, HERE)))
    found = retrieve_for_training([demonstration], Always(), adapt=align)
    assert [e.trajectory for e in found.recall(demonstration)] == [aligned(easy, demonstration)] != [easy] and found.settings["adapt"] == "align"


def test_the_goal_and_the_verb_are_not_replaced():
    assert aligned(RED, replace(HERE, goal="Light the bulb with the red wire.")).actions[2] == "connect red wire to green wire"
    opening = episode(1, ("look", "you need an open, red jug."), ("open red jug", "done"))
    assert aligned(opening, now(("look", "you need an shut, blue jug."))).actions[1].startswith("open ")


def test_observations_of_two_places_are_not_compared():
    kitchen = now(("look around", SHOP.format("black", "green").replace("workshop", "kitchen")))
    assert aligned(RED, kitchen) is RED


def after(lines, actions, taken=None): return tuple(progress(lines, actions, [True] * len(actions) if taken is None else taken))


def test_actions_are_done_in_their_order():
    assert [after("abc", a)[:2] for a in ("", "a", "ab", "axb", "ba", "abcabc")] == [(0, 0), (1, 0), (2, 0), (2, 1), (1, 0), (3, 3)] and after("", "a") == (0, 0, None)


@pytest.mark.parametrize("actions, taken, wanted", [
    ("ab", (1, 0), (1, 1, "b")), ("abb", (1, 0, 1), (2, 1, None)), ("ac", (1, 0), (1, 1, None)), ("cab", (0, 1, 1), (2, 0, None)), ("abx", (1, 0, 1), (1, 1, "b")),
    ("a", (0,), (0, 0, "a")), ("abcd", (1, 1, 1, 0), (3, 3, None))])
def test_a_rejection_counts_if_the_action_was_next(actions, taken, wanted):
    assert after("abc", actions, taken) == wanted


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=12))
def test_what_is_done_is_a_beginning_that_is_contained(lines, actions):
    def contained(part):
        rest = iter(actions)
        return all(x in rest for x in part)
    count, before, _ = after(lines, actions)
    assert before <= count and contained(lines[:count]) and (count == len(lines) or not contained(lines[:count + 1]))


def followed(experience, trajectory, ahead=None):
    return pointed_at(Experience(experience), trajectory, progress(experience.actions, trajectory.actions, [True] * len(trajectory)), ahead)


def test_the_next_action_has_the_number_of_the_agents_next_action():
    waited = now(*((s.action, s.observation) for s in RED.steps[:2]), *[("wait", "You wait.")] * 5)
    lines = numbered(followed(RED, waited)).splitlines()
    assert lines[1:] == ["...", "8: connect red wire to yellow wire | red wire is connected to yellow wire.", "9: wait1 | You wait."]
    going_on = now(*((s.action, s.observation) for s in (*waited.steps, RED.steps[2])))
    assert numbered(followed(RED, going_on)).splitlines() == lines  # to the letter: no cache is rebuilt
    assert numbered(followed(RED, now())) == numbered(Experience(RED)) and numbered(Experience(RED)).splitlines()[2].startswith("1: teleport")


def test_a_long_experience_is_shown_in_parts():
    long = episode(4, *((f"do {n}", "done") for n in range(1, 8)))
    def lines(*actions, ahead=3):
        here = now(*((a, "done") for a in actions))
        return numbered(followed(long, here, ahead)).splitlines()[1:]
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


def test_a_rejected_action_brings_the_next_experience_with_its_cursor():
    other = episode(2, ("teleport to workshop", "You teleport to the workshop."), ("connect bulb to battery", "done"))
    failed = now(("teleport to workshop", "You teleport to the workshop."), ("look around", LOOK[1]), ("connect red wire to yellow wire", NO))
    kept, dropped = drop_rejected()(failed, candidates(RED, other))
    assert [e.task.variation for e in kept] == ["2"] and dropped[0].reason == "the world refused 'connect red wire to yellow wire'"
    assert kept[0].cursor == Cursor(done=1, first=1, last=None, offset=2) and kept[0].trajectory is other
    assert drop_rejected(4)(failed, candidates(RED, other))[0][0].cursor == Cursor(done=1, first=1, last=5, offset=2)


def test_where_all_are_rejected_the_nearest_goes_on_after_the_action():
    failed = now(("teleport to workshop", "You teleport to the workshop."), ("look around", LOOK[1]), ("connect red wire to yellow wire", NO))
    kept, _ = drop_rejected()(failed, candidates(RED))
    assert kept[0].note == "behind a line that was refused" and kept[0].cursor.done == 3
    through = now(*((s.action, s.observation) for s in RED.steps))
    kept, dropped = drop_rejected()(through, candidates(RED))
    assert kept == [] and dropped[0].reason == "it is through"


def test_a_question_is_no_rejection():
    refused = load_world("scienceworld").refused
    assert not refused(Step("a", "Ambiguous request: Please enter")) and refused(Step("a", "Unknown action. Type"))
    assert load_world("alfworld").refused(Step("a", "Nothing happens."))
    assert drop_rejected(12).describe() == {"stage": "drop_rejected", "ahead": 12}


def stages_that_ask_the_world(): return track_progress(()), (drop_rejected(),), (align_roles(),), (rank_by_outcome(),)


def test_a_world_that_does_not_say_how_it_rejects_is_an_error_before_the_first_step(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    elsewhere = replace(now(), task=Task("mine", "a", "1", "dev"))
    for stages in stages_that_ask_the_world():
        for found in ([], candidates(RED)):
            with pytest.raises(ValueError, match=r"world 'mine' is not known.*register_world"): run_stages(stages, elsewhere, found)
    registry.register_world(World("mine"))
    for stages in stages_that_ask_the_world():
        with pytest.raises(ValueError, match=r"'mine' has no list of refusals; give World\(refusals="): run_stages(stages, elsewhere, candidates(RED))
    registry.register_world(World("mine", refusals=("No.",)))
    for stages in stages_that_ask_the_world(): assert run_stages(stages, elsewhere, candidates(RED))[0][0].trajectory is RED
    with pytest.raises(ValueError, match="ahead=0.*at least one"): drop_rejected(ahead=0)


def test_the_preset_stands_before_the_stage_that_limits():
    stages = track_progress((exclude_same_task(), successes_only(), top_k(1)))
    assert [s.name for s in stages] == ["exclude_same_task", "successes_only", "within", "align_objects", "align_roles", "drop_rejected", "rank_by_outcome", "top_k"]
    assert [s.name for s in track_progress(())] == ["within", "align_objects", "align_roles", "drop_rejected", "rank_by_outcome"]
    assert stages[2].describe() == {"stage": "within", "margin": 0.1} and stages[5].describe()["ahead"] == 12
    assert track_progress((), margin=0.2, ahead=None)[0].settings["margin"] == 0.2


def test_it_depends_on_the_episode_alone():
    stages = track_progress((exclude_same_task(), successes_only(), top_k(1)))
    once, again = (run_stages(stages, HERE, candidates(RED))[0] for _ in range(2))
    assert once == again and once[0].actions[2] == "connect black wire to green wire"
    assert align_objects()(HERE, candidates(RED))[0][0].trajectory == aligned(RED, HERE)


# Roles and outcomes


TABLE = "This room is called the workshop. In it, you see:\n\ta table. On the table is: a battery, a {} wire, a {} wire.\n\ta red lamp, which is {}"


def trial_episode(variation, *pairs, goal="Is the fork a conductor? If so, put it into the red box, if not into the green box.", score=100.0):
    done = {} if score is None else {"score": score, "success": score == 100}
    return Trajectory(Task("scienceworld", "test-conductivity", str(variation), "train"), goal, "This room is called the hall.", tuple(Step(a, o) for a, o in pairs), **done)


def trial(variation, plus, minus, lamp, box, wires=("red", "blue"), **more):
    return trial_episode(variation, ("look around", TABLE.format(*wires, "off")), (f"connect battery to {plus} wire", f"battery is now connected to {plus} wire"),
                   (f"connect {minus} wire to red lamp", f"{minus} wire is now connected to red lamp"), ("look around", TABLE.format(*wires, lamp)), (f"move fork to {box} box", "You move the fork."), **more)


def seen(*pairs, **more): return trial_episode(9, *pairs, score=None, **more)
def begun(experience, n): return replace(experience, task=Task("scienceworld", "test-conductivity", "9", "dev"), steps=experience.steps[:n], score=None, success=None)


LIT, DARK = trial(1, "red", "blue", "on", "red"), trial(2, "blue", "red", "off", "green")
WIRED = begun(trial(9, "red", "blue", "off", "?"), 4)  # wired as LIT is, and the lamp stays dark


def test_an_action_without_its_objects_is_a_form():
    names = names_in(LIT.actions, LIT.observations)
    assert form("connect Battery to red wire", names) == ("connect _ to _", ("battery", "red wire")) and form("wait", names) == ("wait", ())
    assert form("use red wire", names_in(("use red wire", "use wire"), ("a wire, a red wire",)))[1] == ("red wire",)
    assert names_in(("wait",), ("a jug",)) is None and form("move jug", None) == ("move jug", ())
    assert form("table lamp", names_in(("use table",), ("a table",))) == ("table lamp", ())  # the verb is no thing


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), max_size=8))
def test_no_object_has_two_roles(moves):
    mapping = {}
    for x, y in moves:
        mapping = swapped(mapping, x, y)
        assert mapping.get(x, x) == y and sorted(mapping) == sorted(mapping.values()) and all(a != b for a, b in mapping.items())


def test_roles_are_those_of_the_actions_taken():
    assert roles(DARK, WIRED) == {"red wire": "blue wire", "blue wire": "red wire"} and roles(LIT, WIRED) == {} and with_roles(LIT, WIRED) is LIT
    again = with_roles(DARK, WIRED)
    assert again.actions[:4] == WIRED.actions and again.actions[4] == "move fork to green box"
    assert again.steps[1].observation == "battery is now connected to red wire" and again.provenance == DARK.provenance
    assert with_roles(again, WIRED) is again


def test_what_the_goal_names_keeps_its_role():
    goal = "Turn on the red lamp."
    asked, other = (replace(trial(1, "red", "blue", "on", "red"), goal=g) for g in (goal, "Turn on the lamp."))
    looks = TABLE.format("red", "blue", "off").replace("a red lamp", "a green lamp, which is off\n\ta red lamp")
    slip = seen(("look around", looks), ("connect battery to red wire", "."), ("connect blue wire to green lamp", "."))
    assert roles(asked, replace(slip, goal=goal)) == {} and roles(other, replace(slip, goal="Turn on the lamp.")) == {"red lamp": "green lamp", "green lamp": "red lamp"}


def test_what_is_in_a_list_of_the_goal_keeps_its_role():
    goal, looks = "Which of the two inclined planes (plastic, rubber) has the most friction?", "an inclined plane with a plastic surface, an inclined plane with a rubber surface"
    there = trial_episode(3, ("look", looks), ("look at rubber surface", "."), ("look at plastic surface", "."), ("focus on plastic surface", "."), goal=goal)
    assert roles(there, seen(("look", looks), ("look at plastic surface", "."), goal=goal)) == {}


def test_an_object_that_only_one_of_them_has_observed_has_a_name():
    there = trial_episode(3, ("look", "a red wire"), ("take red wire", "."), ("take green wire", "You have it."), ("connect red wire to green wire", "."))
    here = seen(("look", "a green wire"), ("take green wire", "."))
    assert with_roles(replace(there, steps=(Step("look", "a red wire"), *there.steps[1:])), here).actions == ("look", "take green wire", "take red wire", "connect green wire to red wire")


def test_the_number_of_an_object_is_no_word_of_its_name():
    looks = "a flower pot 1, a flower pot 2, a self watering flower pot 1"
    there = trial_episode(3, ("look", looks), ("look at flower pot 1", "."), ("look at self watering flower pot 1", "."))
    assert with_roles(there, seen(("look", looks), ("look at flower pot 2", "."))).actions[1:] == ("look at flower pot 2", "look at self watering flower pot 1")


def test_renamed_text_keeps_its_capitals_and_its_other_letters():
    looks = "a \u03bc wire, a red wire, a blue wire"
    there = trial_episode(3, ("look", looks), ("use red wire", "Red wire and \u00b5 wire. A violet-red wire."))
    assert with_roles(there, seen(("look", looks), ("use blue wire", "."))).steps[1].observation == "Blue wire and \u00b5 wire. A violet-red wire."


def test_a_name_within_a_name_stays():
    shop = "a red paint, a blue paint, a violet-red paint, a dark red paint"
    there = trial_episode(3, ("look", shop), ("use red paint", "You use the red paint, not the dark red paint or the violet-red paint."), ("use dark red paint", "."), ("use violet-red paint", "."))
    again = with_roles(there, seen(("look", shop), ("use blue paint", ".")))
    assert again.actions[1:] == ("use blue paint", "use dark red paint", "use violet-red paint")
    assert again.steps[1].observation == "You use the blue paint, not the dark red paint or the violet-red paint."


NAMES = ("red paint", "dark red paint", "violet-red paint", "paint", "red wire", "blue wire", "wire", "red wire box", "paint red", "cup")
LINES = st.lists(st.tuples(st.sampled_from(("take", "put", "pour")), st.sampled_from(NAMES), st.sampled_from(NAMES)).map(lambda said: f"{said[0]} {said[1]} in {said[2]}"), min_size=1, max_size=8)


@given(LINES, LINES, st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_more_of_an_experience_is_done_with_the_agents_roles(theirs, mine, there, here):
    experience, trajectory = (trial_episode(v, *((line, ", ".join(sorted(looks))) for line in lines), goal="Do it.", score=None) for v, lines, looks in ((1, theirs, there), (9, mine, here)))
    mapping, again = roles(experience, trajectory), with_roles(experience, trajectory)
    before, after = (progress(e.actions, trajectory.actions, [True] * len(mine)).done for e in (experience, again))
    assert sorted(mapping) == sorted(mapping.values()) and (again is experience or after > before)


def test_a_slip_gives_no_role():
    shop = ("look", "a red paint, a blue paint")
    there = trial_episode(3, shop, ("use red paint", "."), ("use red paint", "."), ("use blue paint", "."))
    slip = seen(shop, ("use blue paint", "."), ("use red paint", "."), ("use red paint", "."), ("use blue paint", "."))
    assert roles(there, slip) != {} and with_roles(there, slip) is there


def test_a_long_observation_is_read_in_time():
    from time import perf_counter
    begun_at = perf_counter()
    for text in (" " * 50_000, "\n" * 50_000, "a " * 25_000, ", a" * 15_000): assert states(text) == {}
    assert perf_counter() - begun_at < 2


def test_a_rejected_action_gives_no_role():
    refused = seen(("look around", TABLE.format("red", "blue", "off")), ("connect battery to red wire", NO))
    assert roles(DARK, refused) == {}
    assert roles(DARK, seen(*((s.action, s.observation) for s in refused.steps[:1]), ("connect battery to red wire", "battery is now connected to red wire"))) != {}


def test_an_object_of_another_kind_or_one_in_use_gets_no_role():
    looks = TABLE.format("red", "blue", "off") + ", a spoon"
    assert roles(DARK, seen(("look around", looks), ("connect battery to spoon", "battery is now connected to spoon"))) == {}
    once = trial_episode(3, ("look around", looks), ("take red wire", "."), ("drop red wire", "."), ("take blue wire", "."))
    assert roles(once, seen(("look around", looks), ("take red wire", "."), ("drop blue wire", "."))) == {}  # the red one keeps its role since it was taken
    assert roles(once, seen(("look around", looks), ("take blue wire", "."), ("drop blue wire", "."), ("take red wire", "."))) == {"red wire": "blue wire", "blue wire": "red wire"}


def test_an_action_done_before_anything_was_observed_stays_done():
    first = trial_episode(3, ("take red wire", "You take the red wire."), ("look around", TABLE.format("red", "yellow", "off")), ("use red wire", "."))
    here = seen(("take red wire", "You take the red wire."), ("look around", TABLE.format("blue", "yellow", "off")))
    made = aligned(first, here)
    def done(e): return progress(e.actions, here.actions, [True, True]).done
    assert made.actions[0] == "take blue wire" and done(made) == 0  # the flaw
    assert done(with_roles(made, here)) == 2 and with_roles(made, here).actions[2] == "use red wire"


@pytest.mark.parametrize("text, wanted", [
    ("a lamp, which is on", {"lamp": {"on"}}), ("On it is: a red lamp, which is off, a lamp, which is on.", {"red lamp": {"off"}, "lamp": {"on"}}),
    ("a lamp, which is on\n\ta lamp, which is off", {"lamp": {"on", "off"}}), ("a cup (a lamp, which is on); some salt, which is wet; a jug", {"lamp": {"on"}, "salt": {"wet"}}), ("The door is open.", {}), ("a lamp, which is on, and a bulb, which is off\ta cup (of water), which is hot\ta jug", {"lamp": {"on"}, "bulb": {"off"}, "cup": {"hot"}}), ("", {})])
def test_states(text, wanted):
    assert states(text) == wanted


@pytest.mark.parametrize("here, there, wanted", [
    ("They mix to orange paint.", "They mix to violet paint.", True), ("They mix to violet paint.", "They mix to violet paint.", False), ("They mix.", "They do not mix.", False),
    ("They mix to orange.\nLook!", "They mix to violet.", False), ("orange", "the", False), ("1 degrees", "0 degrees", False), ("plane B", "plane H", False), ("VIOLET", "violet", False), ("Yes", "Yes.", False)])
def test_an_answer_that_falls_short(here, there, wanted):
    assert falls_short(here, there, "Create the violet paint at 150.0 degrees on plane H.") is wanted


def test_different_outcomes():
    assert different_outcomes(LIT, WIRED) == ("red lamp",) and different_outcomes(with_roles(DARK, WIRED), WIRED) == () == different_outcomes(DARK, seen())
    assert different_outcomes(LIT, begun(WIRED, 3)) == ()  # the agent has not looked yet
    on_again = replace(WIRED, steps=(*WIRED.steps[:3], *LIT.steps[3:4]))
    assert different_outcomes(LIT, on_again) == () and [n for n, _ in done_steps(LIT, on_again)] == [0, 1, 2, 3]


def test_the_last_state_counts():
    twice = trial_episode(4, ("look", "a lamp, which is off"), ("wait", "."), ("look", "a lamp, which is on"))
    twice = replace(twice, steps=(Step("look", "a lamp, which is off"), *twice.steps))
    lit_first = seen(("look", "a lamp, which is off"), ("look", "a lamp, which is on"), ("wait", "."))
    assert different_outcomes(twice, lit_first) == ("lamp",)
    assert different_outcomes(twice, replace(lit_first, steps=(*lit_first.steps, Step("look", "a lamp, which is on")))) == ()


def test_a_state_that_differed_at_first_is_no_outcome():
    there = trial_episode(4, ("look", "a door, which is open, a lamp, which is off"), ("wait", "."), ("look", "a door, which is open, a lamp, which is on"))
    assert different_outcomes(there, seen(("look", "a door, which is closed, a lamp, which is off"), ("wait", "."), ("look", "a door, which is closed, a lamp, which is off"))) == ("lamp",)


def test_the_first_observation_counts_too():
    there, here = (replace(e, first_observation="a lamp, which is off") for e in (trial_episode(4, ("look", "a lamp, which is on")), seen(("look", "a lamp, which is off"))))
    assert different_outcomes(there, here) == ("lamp",) and different_outcomes(there, replace(here, first_observation="")) == ()


def test_an_action_taken_twice_counts_once():
    there = trial_episode(4, ("mix", "violet"), ("mix", "violet"), goal="violet")
    assert different_outcomes(there, seen(("mix", "orange"), ("mix", "orange"), goal="violet")) == ("mix",) and different_outcomes(there, seen(("mix", "orange"), ("mix", "violet"), goal="violet")) == ()


def test_two_objects_of_one_name_are_compared_together():
    both = trial_episode(4, ("look", "a lamp, which is off, a lamp, which is on"), ("wait", "."))
    twice = replace(both, steps=(*both.steps, both.steps[0]))
    here = ("look", "a lamp, which is on, a lamp, which is off"), ("wait", ".")
    assert different_outcomes(twice, seen(*here, here[0])) == () and different_outcomes(twice, seen(*here, ("look", "a lamp, which is off"))) == ("lamp",)


def test_a_rejected_action_is_not_done():
    here = seen(("look around", TABLE.format("red", "blue", "off")), ("connect battery to red wire", NO))
    assert [n for n, _ in done_steps(LIT, here)] == [0]


def order(trajectory, *experiences):
    kept, _ = drop_rejected()(trajectory, candidates(*(with_roles(e, trajectory) for e in experiences)))
    return [e.task.variation for e in rank_by_outcome()(trajectory, kept)[0]]


def test_the_nearest_stays_first_while_its_outcomes_are_the_same():
    assert order(begun(WIRED, 3), LIT, DARK) == ["1", "2"] and order(WIRED, DARK, LIT) == ["2", "1"]
    elsewhere = trial_episode(5, ("teleport to kitchen", "You teleport."), ("move fork to green box", "You move the fork."))
    assert order(WIRED, elsewhere, LIT, DARK) == ["5", "1", "2"]  # the nearest has no different outcome, though of another more is done
    assert rank_by_outcome()(WIRED, []) == ([], [])


def test_the_fewest_different_outcomes_and_the_most_progress_come_first():
    elsewhere = trial_episode(5, ("teleport to kitchen", "You teleport."), ("move fork to green box", "You move the fork."))
    assert order(WIRED, LIT, elsewhere, DARK) == ["2", "5", "1"]
    assert order(WIRED, LIT) == ["1"]  # nothing better: it is still shown


def test_notes_say_what_was_different():
    kept, _ = drop_rejected()(WIRED, candidates(LIT, with_roles(DARK, WIRED)))
    assert [e.note for e in rank_by_outcome()(WIRED, kept)[0]] == [f"in the first, {LIT.id[:8]}, otherwise: red lamp", "otherwise: red lamp"]
    assert [e.note for e in rank_by_outcome()(WIRED, kept[:1])[0]] == ["otherwise: red lamp"]


def test_all_of_it_together_puts_the_fork_into_the_right_box():
    stages = track_progress((exclude_same_task(), successes_only(), top_k(1)))
    once, again = (run_stages(stages, WIRED, candidates(LIT, DARK))[0] for _ in range(2))
    cursor = once[0].cursor
    assert once == again and once[0].actions[cursor.done] == "move fork to green box" and cursor.offset == 0
