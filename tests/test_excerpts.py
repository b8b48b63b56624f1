"""Excerpts: which steps they keep, and what they mark as left out."""
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.excerpts import (
    EXTRACT_LINES, decisive, decisive_steps, excerpt, extract, extract_steps, window)
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Cursor, Experience, TokenCount, actions, load_view, numbered, render, sources

TASK = Task("scienceworld", "boil", "3", "train")
PLACE = "exprag.memory.excerpts:"


def episode(*steps, goal="Boil the water."):
    """Steps are (action, observation) or (action, observation, reward)."""
    return Trajectory(TASK, goal, "This room is called the hall. In it, you see:", tuple(Step(*s) for s in steps), score=100.0, success=True)


def at(trajectory, done):
    return Experience(trajectory, cursor=Cursor(done=done))


WALK = episode(
    ("go to hallway", "You move to the hallway."), ("go to kitchen", "You move to the kitchen."), ("look around", "This room is called the kitchen."),
    ("pick up pot", "You move the pot to the inventory."), ("flurb", "No known action matches that input."), ("wait1", "You decide to wait."),
    ("wait1", "You decide to wait. It boils.", 20.0), ("go to hall", "You move to the hall."), ("go to workshop", "You move to the workshop."),
    ("look around", "This room is called the workshop."))

texts = st.text(st.sampled_from("abc XY.!\n|>:"), max_size=12)
actions_ = st.one_of(texts, st.sampled_from(["go to kitchen", "look around", "wait1", "pick up pot", "open door to hall", "activate stove", "0"]))
observed = st.one_of(texts, st.sampled_from(["You move to the kitchen.", "No known action matches that input.", "The door is already open.", "Nothing happens."]))
episodes = st.lists(st.tuples(actions_, observed, st.sampled_from([0.0, 0.0, 0.0, 5.0, -100.0])), max_size=25).map(lambda steps: episode(*steps))


def test_decisive_steps_are_those_that_scored_changed_something_or_led_there():
    assert decisive_steps(WALK) == (1, 3, 6, 8, 9)
    assert [line for line in decisive(Experience(WALK)).split("\n") if line.startswith((">", "..."))] == [
        "...", "> go to kitchen | You move to the kitchen.", "...", "> pick up pot | You move the pot to the inventory.", "...",
        "> wait1 | You decide to wait.", "...", "> go to workshop | You move to the workshop.", "> look around | This room is called the workshop."]


def test_a_question_is_no_refusal():
    asked = episode(("move pot to stove", "Ambiguous request: Please enter the number"), ("0", "You move the pot to the stove."), ("go to hall", "You move to the hall."))
    assert decisive_steps(asked) == (0, 1, 2)


@pytest.mark.parametrize("action, said", [("open door", "The door is already open."), ("take mug", "Nothing happens."), ("x", "I don't understand that."),
                                          ("activate sink", "The sink is already activated."), ("move up", "You can't go that way.")])
def test_what_was_refused_is_not_decisive(action, said):
    assert decisive_steps(episode((action, said), ("focus on water", "You focus on the water."))) == (1,)


@given(episodes)
def test_decisive_keeps_every_score_and_the_last_step(t):
    kept = decisive_steps(t)
    assert {i for i, s in enumerate(t.steps) if s.reward} | ({len(t) - 1} if len(t) else set()) <= set(kept)
    assert list(kept) == sorted(set(kept)) and set(extract_steps(t)) <= set(kept) and len(extract_steps(t)) <= EXTRACT_LINES


@given(episodes, st.data())
def test_excerpt_marks_every_gap_and_nothing_else(t, data):
    chosen = data.draw(st.sets(st.integers(0, max(0, len(t) - 1)))) if len(t) else set()
    shown, gaps = 0, 0
    runs = "".join("x" if i in chosen else "." for i in range(len(t)))
    plain = Trajectory(TASK, "g", "o", tuple(Step(f"a{i}", "seen") for i in range(len(t))))
    for line in excerpt(plain, chosen).split("\n"):
        shown, gaps = shown + line.startswith("> a"), gaps + (line == "...")
    assert shown == len(chosen) and gaps == len(re.findall(r"\.+", runs))
    assert excerpt(t, range(len(t))) == actions(Experience(t))


@given(episodes)
def test_excerpts_are_functions_of_the_episode_alone(t):
    other = Trajectory(TASK, t.goal, t.first_observation, t.steps, provenance={"actor": "another"})
    for name in (PLACE + "decisive", PLACE + "extract"):
        assert render(t, name) == render(other, name)


@settings(max_examples=40)
@given(episodes, st.data(), st.integers(0, 5), st.integers(0, 5))
def test_window_shows_the_steps_around_the_cursor(t, data, before, after):
    done = data.draw(st.integers(0, len(t)))
    first = max(0, done - before)
    assert window(at(t, done), before, after) == excerpt(t, range(first, min(len(t), done + after)), start=first == 0)


def test_a_window_needs_a_cursor_in_the_episode():
    with pytest.raises(ValueError, match=r"has no cursor.*a retriever that finds steps"):
        load_view(PLACE + "window")(Experience(WALK))
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match="places 0 to 10"):
            window(at(WALK, wrong))


def test_extract_prefers_what_says_more_and_never_repeats_itself():
    t = episode(*[("pour water in pot", "You pour the water.")] * 10, ("focus on steam", "You focus on the steam.", 50.0))
    assert extract_steps(t) == (0, 10)
    assert extract(Experience(t)).count("> ") == 2 and "Goal: Boil the water." in extract(Experience(t))


def test_an_episode_without_steps_has_excerpts():
    empty = Experience(episode())
    assert decisive(empty) == extract(empty) == numbered(empty) == actions(empty)
    assert "Goal: " in window(replace(empty, cursor=Cursor()))


def test_names_work_wherever_a_view_is_named():
    for view in (decisive, extract): assert load_view(PLACE + view.__name__) is view
    assert render(Experience(WALK, view=PLACE + "decisive")) == render(WALK, PLACE + "decisive") == decisive(Experience(WALK))
    assert sources(Experience(WALK), PLACE + "decisive") == (WALK.id,)


def test_cost_agrees_with_the_policy_that_reads_it():
    """The counter is made from the encoder that writes the prompt."""
    from exprag.prompt import PromptEncoder
    from exprag.sft import load_tokenizer, model_path

    encoder = PromptEncoder(load_tokenizer(model_path("nano")))
    count = TokenCount(encoder.plain.encode, "nano")
    for name in (PLACE + "decisive", PLACE + "extract", "numbered"):
        assert count(render(WALK, name)) == len(encoder.tokenizer(render(WALK, name), add_special_tokens=False)["input_ids"])
