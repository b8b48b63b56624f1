"""Views: what they keep, what they cost, and whose experience they show."""
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.store import VIEWS, actions
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import (EXTRACT_LINES, TokenCount, cost, costs, decisive, decisive_steps, excerpt, extract, extract_steps, numbered, pointed,
                          sources, view, window)

TASK = Task("scienceworld", "boil", "3", "train")


def episode(*steps, goal="Boil the water."):
    """Steps are (action, observation) or (action, observation, reward)."""
    return Trajectory(TASK, goal, "This room is called the hall. In it, you see:", tuple(Step(*s) for s in steps), score=100.0, success=True)


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
    assert [line for line in decisive(WALK).split("\n") if line.startswith((">", "..."))] == [
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
    assert excerpt(t, range(len(t))) == actions(t)


@given(episodes)
def test_views_are_functions_of_the_episode_alone(t):
    for name in ("numbered", "decisive", "extract"):
        assert view(name)(t) == view(name)(Trajectory(TASK, t.goal, t.first_observation, t.steps, provenance={"actor": "another"}))


def test_numbered_says_the_actions_with_their_numbers():
    assert numbered(WALK).split("\n")[2:5] == ["1: go to hallway | You move to the hallway.", "2: go to kitchen | You move to the kitchen.",
                                               "3: look around | This room is called the kitchen."]
    assert numbered(WALK).split("\n")[:2] == actions(WALK).split("\n")[:2]


@settings(max_examples=40)
@given(episodes, st.data(), st.integers(0, 5), st.integers(0, 5))
def test_window_shows_the_steps_round_the_place(t, data, before, after):
    at = data.draw(st.integers(0, len(t)))
    here = pointed(t, at)
    assert here.id == t.id and here.provenance["at_step"] == at
    first = max(0, at - before)
    assert window(here, before, after) == excerpt(t, range(first, min(len(t), at + after)), start=first == 0)


def test_a_window_needs_a_place():
    with pytest.raises(ValueError, match=r"points at no step.*a retriever that finds steps"):
        view("window")(WALK)
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match="places 0 to 10"):
            pointed(WALK, wrong)


def test_extract_prefers_what_says_more_and_never_repeats_itself():
    t = episode(*[("pour water in pot", "You pour the water.")] * 10, ("focus on steam", "You focus on the steam.", 50.0))
    assert extract_steps(t) == (0, 10)
    assert extract(t).count("> ") == 2 and "Goal: Boil the water." in extract(t)


def test_an_episode_without_steps_has_views():
    empty = episode()
    assert decisive(empty) == extract(empty) == numbered(empty) == actions(empty)
    assert "Goal: " in window(pointed(empty, 0))


def test_the_registry_is_open_and_knows_ours(monkeypatch):
    assert {"chat", "actions", "numbered", "decisive", "window", "extract"} <= set(VIEWS)
    monkeypatch.setitem(VIEWS, "shout", lambda t: t.goal.upper())
    assert view("shout")(WALK) == "BOIL THE WATER."
    with pytest.raises(KeyError, match="shout"):
        view("whisper")


def test_cost_counts_with_the_given_tokenizer_and_counts_once():
    calls = []
    count = TokenCount(lambda text: calls.append(text) or text.split(), "words")
    assert cost("numbered", WALK, count) == len(numbered(WALK).split()) and cost("numbered", WALK, count) and len(calls) == 1
    table = costs([WALK, WALK], count, ["chat", "decisive"])
    assert list(table) == ["chat", "decisive"] and table["decisive"] == [len(decisive(WALK).split())] * 2
    assert "window" not in costs([WALK], count) and count.name == "words"


def test_cost_agrees_with_the_policy_that_reads_it():
    """The counter of the README's kind: made from the encoder that writes the prompt."""
    from exprag.agent import load_tokenizer
    from exprag.nano import nano_path
    from exprag.prompt import PromptEncoder

    encoder = PromptEncoder(load_tokenizer(str(nano_path())))
    count = TokenCount(encoder.plain.encode, "nano")
    for name in ("decisive", "extract", "numbered"):
        assert cost(name, WALK, count) == len(encoder.tokenizer(view(name)(WALK), add_special_tokens=False)["input_ids"])


def test_sources_are_the_episode_even_when_adapted(monkeypatch):
    assert sources("decisive", WALK) == (WALK.id,)
    adapted = Trajectory(TASK, "Boil the milk.", "o", WALK.steps, provenance={"adapted_from": WALK.id})
    assert sources("actions", adapted) == (WALK.id,) != (adapted.id,)

    class Joint:
        def __call__(self, t): return "text"
        def sources(self, t): return ("a", "b")
    monkeypatch.setitem(VIEWS, "joint", Joint())
    assert sources("joint", WALK) == ("a", "b")
