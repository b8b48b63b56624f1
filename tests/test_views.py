"""Experience and views: what stands in a context, whose it is, how it is written and what it costs."""
import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprag.trajectory import Step, Task, Trajectory
from exprag.views import (
    Cursor, Experience, Hit, TokenCount, actions, chat, cue, load_view, numbered, register_view, render, sources,
    view_costs)

TASK = Task("scienceworld", "boil", "3", "train")


def episode(*steps, goal="Boil the water."):
    """Steps are (action, observation) or (action, observation, reward)."""
    return Trajectory(TASK, goal, "This room is called the hall. In it, you see:", tuple(Step(*s) for s in steps), score=100.0, success=True)


WALK = episode(
    ("go to hallway", "You move to the hallway."), ("go to kitchen", "You move to the kitchen."), ("look around", "This room is called the kitchen."),
    ("pick up pot", "You move the pot to the inventory."), ("wait1", "You decide to wait. It boils.", 20.0))

texts = st.text(st.sampled_from("abc XY.!\n|>:"), max_size=12)
episodes = st.lists(st.tuples(texts, texts, st.sampled_from([0.0, 5.0, -100.0])), max_size=12).map(lambda steps: episode(*steps))


# -- experience

def test_experience_is_a_value():
    one = Experience(WALK, Hit(WALK.id, 0.9, 1))
    assert one == Experience(WALK, Hit(WALK.id, 0.9, 1)) and len({one, replace(one, note="")}) == 1 and replace(one, view="chat") != one
    with pytest.raises(FrozenInstanceError): one.view = "chat"


def test_experience_speaks_for_its_episode():
    one = Experience(WALK, Hit(WALK.id, 0.9, 1))
    assert (one.task, one.success, one.actions, len(one)) == (WALK.task, True, WALK.actions, 5) and bool(Experience(episode()))
    assert "rank 1, score 0.900" in repr(one) and "rank" not in repr(Experience(WALK))


def test_its_id_is_that_of_the_stored_episode_even_when_adapted():
    adapted = replace(WALK, goal="Boil the milk.")
    assert Experience(adapted, Hit(WALK.id, 0.9, 1)).id == WALK.id != adapted.id == Experience(adapted).id


def test_an_episode_is_experience_and_experience_stays_what_it_is():
    one = Experience(WALK, note="x")
    assert Experience.of(WALK) == Experience(WALK) and Experience.of(one) is one


# -- views

@given(episodes)
def test_the_chat_view_is_the_whole_chat(t):
    messages = json.loads(chat(Experience(t)))
    assert [m["content"] for m in messages if m["role"] == "assistant"] == list(t.actions)
    assert t.goal in str(messages[0]["content"]) and len(messages) == 1 + 2 * len(t)


def test_the_actions_view():
    t = episode(("do 0", "Thing 0 is done. More text here."), ("do 1", "Thing 1 is done."))
    assert actions(Experience(t)) == "Goal: Boil the water.\nStart | This room is called the hall.\n> do 0 | Thing 0 is done.\n> do 1 | Thing 1 is done."
    assert actions(Experience(Trajectory(TASK, "g", "", (Step("look", ""),)))) == "Goal: g\nStart\n> look"


def test_the_numbered_view():
    lines = numbered(Experience(WALK)).split("\n")
    assert lines[2:4] == ["1: go to hallway | You move to the hallway.", "2: go to kitchen | You move to the kitchen."]
    assert lines[:2] == actions(Experience(WALK)).split("\n")[:2]


def test_the_cursor_says_which_part_is_shown_and_how_steps_are_numbered():
    def shown(**cursor): return numbered(Experience(WALK, cursor=Cursor(**cursor))).split("\n")[1:]
    assert shown() == numbered(Experience(WALK)).split("\n")[1:]
    assert shown(first=2, last=4) == ["...", "3: look around | This room is called the kitchen.", "4: pick up pot | You move the pot to the inventory.", "..."]
    assert shown(first=4, offset=-3) == ["...", "2: wait1 | You decide to wait."]
    assert shown(last=0) == ["Start | This room is called the hall.", "..."]


@given(st.text(max_size=200), st.integers(1, 12))
def test_a_cue_is_a_beginning_and_short(text, words):
    short = cue(text, words)
    line = " ".join(text.split())
    assert "\n" not in short and len(short.split(" ")) <= words
    assert line.startswith(short) or (short.endswith("...") and line.startswith(short[:-3]))


@given(episodes)
def test_views_are_functions_of_the_episode_alone(t):
    for name in ("chat", "actions", "numbered"):
        assert render(t, name) == render(replace(t, provenance={"actor": "another"}), name)


def test_an_episode_without_steps_has_views():
    assert numbered(Experience(episode())) == actions(Experience(episode())) == "Goal: Boil the water.\nStart | This room is called the hall."


# -- names

def test_an_experience_that_names_its_view_is_shown_in_it():
    one = Experience(WALK, view="numbered")
    assert render(one, "actions") == numbered(one) and render(WALK, "actions") == actions(Experience(WALK)) == render(Experience(WALK))


def test_a_registered_view_is_known_by_its_name():
    assert register_view("shout", lambda e: e.trajectory.goal.upper()) == "shout"
    assert load_view("shout")(Experience(WALK)) == "BOIL THE WATER." == render(WALK, "shout")
    register_view("shout", lambda e: "again")
    assert render(WALK, "shout") == "again", "registering again replaces"


@pytest.mark.parametrize("name", ["chat", "actions", "numbered"])
def test_the_names_of_the_package_are_taken(name):
    with pytest.raises(ValueError, match="comes with the package; give yours another name"): register_view(name, lambda e: "")
    assert load_view(name) in (chat, actions, numbered)


def test_a_view_may_be_named_by_its_place():
    assert load_view("exprag.views:numbered") is numbered and render(WALK, "exprag.views:numbered") == numbered(Experience(WALK))


@pytest.mark.parametrize("name, said", [
    ("whisper", "view 'whisper'.*chat, actions, numbered.*register_view"), ("", "view ''"),
    ("exprag.views:whisper", "'exprag.views:whisper' names nothing.*'module:name'"),
    ("exprag.nowhere:whisper", "'exprag.nowhere:whisper' names nothing")])
def test_an_unknown_view_is_refused(name, said):
    with pytest.raises(ValueError, match=said): load_view(name)


def test_sources_are_the_stored_episode_or_what_the_view_says():
    assert sources(Experience(WALK)) == (WALK.id,)
    assert sources(Experience(replace(WALK, goal="Boil the milk."), Hit(WALK.id, 1.0, 1))) == (WALK.id,)

    def joint(experience): return "text"
    joint.sources = lambda experience: ("a", "b")
    register_view("joint", joint)
    assert sources(Experience(WALK), "joint") == ("a", "b") == sources(Experience(WALK, view="joint"))


# -- cost

def test_cost_is_counted_once_for_each_text():
    calls = []
    count = TokenCount(lambda text: calls.append(text) or text.split(), "words")
    table = view_costs([WALK, Experience(WALK, view="chat")], count, ["chat", "actions"])
    assert table == {"chat": [len(chat(Experience(WALK)).split())] * 2, "actions": [len(render(WALK).split())] * 2}
    assert len(calls) == 2 and count.name == "words" and repr(count) == "TokenCount('words')"
    assert list(view_costs([WALK], count)) == ["chat", "actions", "numbered"]


def test_cost_agrees_with_the_policy_that_reads_it():
    from exprag.models.nano import nano_path
    from exprag.prompt import PromptEncoder
    from exprag.sft import load_tokenizer

    encoder = PromptEncoder(load_tokenizer(str(nano_path())))
    count = TokenCount(encoder.plain.encode, "nano")
    for name, (cost,) in view_costs([WALK], count).items():
        assert cost == len(encoder.tokenizer(render(WALK, name), add_special_tokens=False)["input_ids"])
