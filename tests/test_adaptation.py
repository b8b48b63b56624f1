"""Adaptation: the nouns of one goal replaced with those of another, in an episode and as a stage of a memory."""
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders import Letters
from exprag.memory.adaptation import adapt, adapt_to_goal, noun_mapping, substitute
from exprag.query import Retriever
from exprag.select import Memory, exclude_same_task, token_budget, top_k
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory


def episode(i, type="grow-plant", fold="train", goal=None):
    return Trajectory(Task("scienceworld", type, str(i), fold), goal or f"{type} number {i}", "A hall.",
                      tuple(Step(f"act {j}", "done") for j in range(3)), 100.0, True)


@pytest.mark.parametrize("old, new, mapping", [
    ("grow a apple plant. Seeds are in the kitchen.", "grow a lemon plant. Seeds are in the bedroom.", {"apple": "lemon", "kitchen": "bedroom"}),
    ("Put it in the red box, not in the green box.", "Put it in the green box, not in the red box.", {"red": "green", "green": "red"}),
    ("measure the temperature of unknown substance B, which is in the hall", "measure the temperature of metal fork, which is in the living room", {"unknown substance b": "metal fork", "hall": "living room"}),
    ("planes (C, B) differ", "planes (G, H) differ", {"C": "G", "B": "H"}),
    ("plane B is smooth", "plane b is smooth", {}),  # the same letter
    ("boil water.", "Grow a plant from the seed in the garden, then wait for the fruit.", {}),  # too unlike
    ("the 4 life stages of the turtle", "the 3 life stages of the wolf", {"turtle": "wolf"}),  # no numbers
    ("move it to the box", "move it on the box", {}),  # no function words
    ("same", "same", {}), ("", "", {}), ("", "word", {}),
])
def test_noun_mapping(old, new, mapping):
    assert noun_mapping(old, new) == mapping
    assert not mapping or "4" in old or substitute(old, mapping) == new


def test_substitute_whole_words_longest_first_all_at_once():
    mapping = {"apple": "lemon", "lemon": "apple", "apple juice": "tea", "room": "hall"}
    assert substitute("Apple, pineapple, apple juice and lemon in the bedroom room. APPLE", mapping) == "Lemon, pineapple, tea and apple in the bedroom hall. Lemon"
    assert substitute("plane B or b", {"B": "C"}) == "plane C or b" and substitute("a.b (c)", {"c": r"\1"}) == r"a.b (\1)"


@given(st.text(max_size=60), st.text(max_size=60))
def test_mapping_any_two_texts_is_safe(old, new):
    mapping = noun_mapping(old, new)
    assert isinstance(substitute(old, mapping), str) and all(k and v and k.lower() != v.lower() for k, v in mapping.items())


def test_adapt_rewrites_all_of_an_episode_and_nothing_else():
    experience = replace(episode(1, goal="grow a apple in the kitchen"), first_observation="The kitchen. An apple seed.",
                         steps=(Step("pick up apple seed", "You hold the apple seed.", 1.0, thought="Apple it is"), Step("go to kitchen", "Kitchen.")), provenance={"actor": "expert"})
    adapted = adapt(experience, "grow a lemon in the bedroom")
    assert adapted.goal == "grow a lemon in the bedroom" and adapted.actions == ("pick up lemon seed", "go to bedroom")
    assert adapted.observations == ("The bedroom. An lemon seed.", "You hold the lemon seed.", "Bedroom.") and adapted.steps[0].thought == "Lemon it is"
    assert (adapted.task, adapted.score, adapted.steps[0].reward, adapted.provenance) == (experience.task, experience.score, 1.0, experience.provenance)
    assert adapt(experience, experience.goal) is experience and adapt(experience, "boil water") is experience
    assert adapt(experience, "grow a lemon in the bedroom") == adapted


def test_a_budget_after_the_stage_counts_adapted_text(tmp_path):
    seen = []
    count = lambda text: seen.append(text) or 1
    apple = episode(60, goal="grow a apple plant from seed")
    agent = replace(episode(50, fold="test", goal="grow a lemon plant from seed"), steps=(), score=None, success=None)
    with Store(tmp_path / "bank.db") as store:
        store.add_many([apple, *(episode(i) for i in range(3))])
        memory = Memory(Retriever(store, Letters()), (exclude_same_task(), adapt_to_goal(), token_budget(9, count), top_k(1)), "hard")
        chosen = memory.recall(agent)
        assert chosen.experiences[0].trajectory.goal == agent.goal and chosen.ids == (apple.id,)
        assert any("lemon" in text for text in seen) and not any("apple" in text for text in seen)
        assert "place 1" in str(chosen.explain()) and {"stage": "adapt_to_goal"} in memory.describe()["stages"]
