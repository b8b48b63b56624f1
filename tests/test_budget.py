"""A budget in tokens: shorter views before dropping."""
import json
from dataclasses import replace

import pytest
from candidates import candidates, episode, retriever, starting, store, words  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.adaptation import adapt_to_goal
from exprag.memory.budget import fit_budget
from exprag.prompt import PromptFormat
from exprag.select import Memory, exclude_same_task, successes_only, top_k
from exprag.trajectory import Task
from exprag.views import Experience, render
from exprag.world import Dialects, World, register_world

settings.register_profile("patient", deadline=None)  # a shared core is slow now and then
settings.load_profile("patient")
BARE = f"{__name__}:bare"


def bare(experience):
    return "\n".join([experience.trajectory.goal, *experience.actions])


lengths_rooms_ks = (st.integers(0, 400), st.sampled_from([None, 0, 2, 5]))


@given(st.lists(st.integers(0, 30), max_size=8), *lengths_rooms_ks,
       st.permutations(["chat", "actions", BARE]))
@settings(max_examples=60)
def test_a_budget_shortens_before_it_drops(lengths, room, k, views):
    found = candidates(*(episode(i, steps=n) for i, n in enumerate(lengths)))
    kept, dropped = fit_budget(room, words, views, k)(starting(), found)
    sizes = [[words(render(e, v)) for v in views] for e in found]
    assert sum(words(render(e)) for e in kept) <= room
    left, taken = room, []  # what would be kept if all were in their shortest view
    for i, size in enumerate(sizes):
        if min(size) <= left and (k is None or len(taken) < k):
            taken.append(i)
            left -= min(size)
    assert [e.hit.rank - 1 for e in kept] == taken and len(kept) + len(dropped) == len(found)
    slack = room - sum(words(render(e)) for e in kept)
    for e in kept:  # none could be shown in a better view with what is left over
        now, mine = views.index(e.view), sizes[e.hit.rank - 1]
        assert all(mine[better] - mine[now] > slack for better in range(now))
        assert e.id == found[e.hit.rank - 1].id and e.trajectory == found[e.hit.rank - 1].trajectory


@given(st.lists(st.integers(1, 30), max_size=8), *lengths_rooms_ks)
@settings(max_examples=60)
def test_a_brief_view_is_the_last_resort(lengths, room, k):
    # of an episode without a step the chat may be shorter than the list of actions
    found = candidates(*(episode(i, steps=n) for i, n in enumerate(lengths)))
    run = lambda *args, **how: fit_budget(room, words, *args, k=k, **how)(starting(), found)
    whole, resort = run(), run(brief=[BARE])
    assert {e.view for e in whole[0]} <= {"chat", "actions"}  # views that keep what was done
    assert [e.id for e in whole[0]] == [
        e.id for e in run(["actions"])[0]
    ], "a chat replaces no list"
    expected = whole if whole[0] else run([BARE])
    assert [(e.id, e.view) for e in resort[0]] == [(e.id, e.view) for e in expected[0]]
    assert [d.id for d in resort[1]] == [d.id for d in expected[1]]


def test_a_budget_counts_each_text_once_and_only_when_needed():
    seen = []
    def count(text):
        seen.append(text)
        return words(text)
    found = candidates(*(episode(i, steps=3) for i in range(6)))
    fit_budget(10**6, count, k=2, brief=[BARE])(starting(), found)
    assert len(seen) == len(set(seen)) == 4  # two views of the two that are kept


def test_a_budget_explains_itself_and_the_prompt_follows_it(retriever):  # noqa: F811
    budget = fit_budget(90, words, ("actions", BARE), 3, label="words")
    memory = Memory(retriever, (exclude_same_task(), successes_only(), budget))
    chosen = memory.recall(starting())
    said = str(chosen.explain())
    assert {e.view for e in chosen} == {"actions", BARE}
    assert f"as {BARE}:" in said and "as actions it needs" in said
    text = PromptFormat(view="chat").system("scienceworld", chosen.experiences)
    assert all(render(e, "chat") in text for e in chosen)
    assert json.loads(json.dumps(memory.describe())) == memory.describe()
    assert render(Experience(episode(1), view="actions"), "chat") == render(episode(1), "actions")


@pytest.mark.parametrize("views, brief, match", [
    ("actions", (), "give a list of one or more views"), ((),
    (), "give a list of one or more views"),
    (("chat",), BARE, "perhaps one of brief views"), (("nonsense",),
    (), "view 'nonsense' is unknown"),
    (("chat",), ("nonsense",), "view 'nonsense' is unknown")])
def test_wrong_views_are_refused(views, brief, match):
    with pytest.raises(ValueError, match=match):
        fit_budget(90, words, views, brief=brief)


def test_adapted_experience_is_counted_as_it_is_read(store, retriever):  # noqa: F811
    store.add(episode(60, "grow-plant", goal="grow a apple plant from seed"))
    seen = []
    def count(text):
        seen.append(text)
        return 1
    budget = fit_budget(9, count, ("actions", BARE), 1)
    memory = Memory(retriever, (exclude_same_task(), adapt_to_goal(), budget), "hard")
    memory.recall(starting("grow-plant", goal="grow a lemon plant from seed"))
    assert any("lemon" in text for text in seen) and not any("apple" in text for text in seen)


def test_experience_is_counted_in_the_agents_dialect(store, retriever):  # noqa: F811
    def translate(trajectory, dialect):
        return replace(trajectory, goal=trajectory.goal.lower(), settings={"grammar": dialect})
    dialects = Dialects(
        "grammar", {"old": (), "new": ()}, lambda t: t.settings["grammar"], translate
    )
    register_world(World("loud", dialects=dialects))
    spoken = replace(episode(1), goal="BOIL IT", settings={"grammar": "old"})
    store.add(replace(spoken, task=Task("loud", "boil", "1", "train")))
    seen = []
    def count(text):
        seen.append(text)
        return 1
    memory = Memory(retriever, (exclude_same_task(), fit_budget(9, count, ("actions", BARE), 1)))
    now = replace(starting(), task=Task("loud", "boil", "2", "test"), settings={"grammar": "new"})
    assert "boil it" in render(*memory.recall(now)) and not any("BOIL" in text for text in seen)
