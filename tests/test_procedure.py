"Procedures: canonical actions, and the edit distance between procedures."
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag import world as registry
from exprag.memory.procedure import edit_distances, procedure, procedure_distances
from exprag.trajectory import Step, Task, Trajectory
from exprag.world import World, load_world, register_world

SEQUENCES = st.lists(st.sampled_from("abcd"), max_size=8)


@pytest.fixture
def inn(monkeypatch):
    "Registers a world called 'inn', forgotten afterwards."
    monkeypatch.setattr(registry, "_REGISTERED", {})
    return lambda **more: register_world(World("inn", **more))


# ---- canonical actions ----

@pytest.mark.parametrize("action, template", [
    ("open door to kitchen", "open OBJ"), ("pour jug into cup", "pour OBJ in OBJ"), ("pour jug in cup", "pour OBJ in OBJ"), ("dunk a in b", "dunk OBJ in OBJ"),
    ("move seed to pot 3", "move OBJ to OBJ"), ("look in box", "look in OBJ"), ("look around", "look around"), ("wait1", "wait1"), ("dance", "dance"), ("", ""), ("3", "3"),
])
def test_scienceworld(action, template):
    assert load_world("scienceworld").canonical(action) == template


@pytest.mark.parametrize("action, template", [
    ("go to fridge 1", "go to OBJ"), ("take apple 1 from table 2", "take OBJ from OBJ"), ("put apple 1 in/on fridge 1", "move OBJ to OBJ"),
    ("move apple 1 to fridge 1", "move OBJ to OBJ"), ("clean mug 1 with sinkbasin 1", "clean OBJ with OBJ"), ("look", "look"), ("use desklamp 1", "use OBJ"),
])
def test_both_dialects_of_alfworld_are_one(action, template):
    assert load_world("alfworld").canonical(action) == template


@pytest.mark.parametrize("name", ["scienceworld", "alfworld"])
def test_every_template_is_an_instance_of_itself(name):
    world = load_world(name)
    for template in world.templates: assert world.canonical(template.replace("OBJ", "red thing")) == template
    assert set(world.rewordings.values()) <= set(world.templates)


def test_an_unknown_world_or_one_without_templates_is_an_error_that_says_what_to_add(inn):
    with pytest.raises(ValueError, match=re.escape("register_world(World('my-shop', ...))")):
        procedure(Trajectory(Task("my-shop", "buy", 0, "train"), "g", "o", (Step("open door", "x"),)))
    with pytest.raises(ValueError, match=re.escape("World(templates=[")): inn().canonical("open door")


def test_a_registered_world_has_procedures_and_wordings(inn):
    world = inn(templates=["pour OBJ", "sleep"], rewordings={"serve OBJ": "pour OBJ"})
    assert [world.canonical(a) for a in ("pour dark beer", "sleep", "sing", "serve ale")] == ["pour OBJ", "sleep", "sing", "pour OBJ"]
    t = Trajectory(Task("inn", "serve", 0, "train"), "g", "o", (Step("serve ale", "x"), Step("sing", "y")))
    assert procedure(t) == ("pour OBJ", "sing")
    inn(templates=["sing"])
    assert procedure(t) == ("serve ale", "sing"), "registering again replaces a world"


def test_templates_hold_no_patterns(inn):
    world = inn(templates=["f(OBJ).*", "a+ OBJ"])
    assert [world.canonical(a) for a in ("f(x).*", "fxyz", "aaa b")] == ["f(OBJ).*", "fxyz", "aaa b"]


def test_an_action_of_several_lines_keeps_no_nouns_or_stays(inn):
    assert inn(templates=["query OBJ"]).canonical("query a\nb") in ("query OBJ", "query a\nb")


def test_procedure_of_an_episode():
    t = Trajectory(Task("scienceworld", "boil", 0, "train"), "g", "o", (Step("open cupboard", "x"), Step("0", "y")))
    assert procedure(t) == ("open OBJ", "0")


# ---- distance ----

def by_the_book(a, b):
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1] / max(1, len(a), len(b))


@given(SEQUENCES, st.lists(SEQUENCES, max_size=5))
@settings(deadline=None, max_examples=150)
def test_edit_distances_are_levenshteins(path, others):
    assert edit_distances(path, others) == pytest.approx([by_the_book(path, o) for o in others])


@given(st.lists(SEQUENCES, max_size=4), st.lists(SEQUENCES, max_size=4))
@settings(deadline=None, max_examples=80)
def test_procedure_distances_are_all_pairs(some, others):
    table = procedure_distances(some, others)
    assert table.shape == (len(some), len(others))
    for (i, a), (j, b) in product(enumerate(some), enumerate(others)): assert table[i, j] == pytest.approx(by_the_book(a, b))


@given(st.lists(SEQUENCES, min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_distance_is_symmetric_and_zero_for_equals(some):
    table = procedure_distances(some, some)
    assert np.allclose(table, table.T) and not np.diag(table).any() and (table <= 1).all()
