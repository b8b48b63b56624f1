"Procedures: abstraction, edit distance, scales and splits."
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.environment import EASY_TYPES, HARD_TYPES, OWN_WORLDS, TOPICS, action_templates, register_world
from exprag.procedure import (PAPER_SPLIT, SAME_DEED, TEMPLATES, Scale, Split, abstract, edit_distances, leave_one_topic_out, nearest_outside,
                              procedure, procedure_distances, template_patterns)
from exprag.trajectory import Step, Task, Trajectory

SEQUENCES = st.lists(st.sampled_from("abcd"), max_size=8)


@pytest.fixture
def own_world():
    "A world of somebody's own, forgotten afterwards."
    TEMPLATES["shop"] = ("tables", "query OBJ")
    yield "shop"
    TEMPLATES.pop("shop"), SAME_DEED.pop("shop", None)


# ---- abstraction ----

@pytest.mark.parametrize("action, template", [
    ("open door to kitchen", "open OBJ"), ("pour jug into cup", "pour OBJ in OBJ"), ("pour jug in cup", "pour OBJ in OBJ"), ("dunk a in b", "dunk OBJ in OBJ"),
    ("move seed to pot 3", "move OBJ to OBJ"), ("look in box", "look in OBJ"), ("look around", "look around"), ("wait1", "wait1"), ("dance", "dance"), ("", ""), ("3", "3"),
])
def test_scienceworld(action, template):
    assert abstract(action, "scienceworld") == template


@pytest.mark.parametrize("action, template", [
    ("go to fridge 1", "go to OBJ"), ("take apple 1 from table 2", "take OBJ from OBJ"), ("put apple 1 in/on fridge 1", "move OBJ to OBJ"),
    ("move apple 1 to fridge 1", "move OBJ to OBJ"), ("clean mug 1 with sinkbasin 1", "clean OBJ with OBJ"), ("look", "look"), ("use desklamp 1", "use OBJ"),
])
def test_both_languages_of_alfworld_are_one(action, template):
    assert abstract(action, "alfworld") == template


@pytest.mark.parametrize("world", ["scienceworld", "alfworld"])
def test_every_template_is_an_instance_of_itself(world):
    assert set(TEMPLATES[world]) == set(action_templates(world))
    for template in TEMPLATES[world]: assert abstract(template.replace("OBJ", "red thing"), world) == template
    assert {meant for meant in SAME_DEED[world].values()} <= set(TEMPLATES[world])


def test_an_unknown_world_is_an_error_that_says_what_to_add():
    with pytest.raises(ValueError, match=re.escape("register_world('my-shop', templates=")): abstract("open door", "my-shop")


def test_a_registered_world_has_procedures():
    register_world("inn", easy=["pour-beer"], templates=["pour OBJ", "sleep"])
    try: assert [abstract(a, "inn") for a in ("pour dark beer", "sleep", "sing")] == ["pour OBJ", "sleep", "sing"]
    finally: OWN_WORLDS.pop("inn")


def test_a_world_of_ones_own_and_its_wordings(own_world):
    assert abstract("query SELECT 1", own_world) == "query OBJ" and abstract("tables", own_world) == "tables"
    assert template_patterns(own_world) is template_patterns(own_world), "compiled once"
    SAME_DEED[own_world] = {"ask OBJ": "query OBJ"}
    assert abstract("ask SELECT 1", own_world) == "query OBJ", "a wording that is added later counts"
    TEMPLATES[own_world] = ("sing",)
    SAME_DEED.pop(own_world)
    assert abstract("query SELECT 1", own_world) == "query SELECT 1" and abstract("sing", own_world) == "sing"


def test_templates_hold_no_patterns(own_world):
    TEMPLATES[own_world] = ("f(OBJ).*", "a+ OBJ")
    assert abstract("f(x).*", own_world) == "f(OBJ).*" and abstract("fxyz", own_world) == "fxyz" and abstract("aaa b", own_world) == "aaa b"


def test_an_action_of_several_lines_keeps_no_nouns_or_stays(own_world):
    assert abstract("query a\nb", own_world) in ("query OBJ", "query a\nb")


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


# ---- the nearest of others, and the scale ----

@given(st.lists(st.integers(0, 2), min_size=2, max_size=7), st.integers(0, 10 ** 6))
@settings(deadline=None, max_examples=100)
def test_nearest_outside(groups, seed):
    d = np.random.default_rng(seed).random((len(groups), len(groups)))
    if len(set(groups)) < 2:
        with pytest.raises(ValueError, match="nothing outside"): nearest_outside(d, groups)
        return
    expected = [min(d[i, j] for j in range(len(groups)) if groups[j] != groups[i]) for i in range(len(groups))]
    assert nearest_outside(d, groups) == pytest.approx(expected)


def test_nearest_outside_of_nobody():
    with pytest.raises(ValueError, match="nothing outside"): nearest_outside(np.zeros((0, 0)), [])


def test_scale_is_fitted_on_medians():
    d = np.array([[0, 1, 5, 6], [1, 0, 5, 6], [5, 5, 0, 2], [6, 6, 2, 0]], float)
    scale = Scale.fit(d, "abcd", "xxyy")
    assert (scale.familiar, scale.new) == (1.5, 5.0)
    assert scale([1.5, 5.0, 8.5]).tolist() == [0, 1, 2] and float(scale(0)) < 0


@pytest.mark.parametrize("familiar, new", [(0.5, 0.5), (0.6, 0.5), (float("nan"), 0.5)])
def test_a_distance_that_tells_nothing_is_refused(familiar, new):
    with pytest.raises(ValueError, match="cannot tell new from familiar"): Scale(familiar, new)


# ---- splits ----

def test_splits_cover_every_type_once():
    splits = leave_one_topic_out()
    assert [s.name for s in splits] == [f"without {topic}" for topic in TOPICS]
    for split in splits:
        assert not set(split.seen) & set(split.unseen) and set(split.seen) | set(split.unseen) == set(EASY_TYPES + HARD_TYPES)
        assert all(split.side(t) == "unseen" for t in split.unseen) and all(split.side(t) == "seen" for t in split.seen)
    assert sorted(t for s in splits for t in s.unseen) == sorted(EASY_TYPES + HARD_TYPES)
    assert PAPER_SPLIT.seen == EASY_TYPES and PAPER_SPLIT.unseen == HARD_TYPES


@pytest.mark.parametrize("make, message", [
    (lambda: Split("x", ("a",), ("a", "b")), "has a on both sides"), (lambda: Split("x", ("a",), ()), "nothing unseen"),
    (lambda: leave_one_topic_out({"only": ("a",)}), "nothing seen"), (lambda: Split("x", ("a",), ("b",)).side("c"), "nothing of task type 'c'"),
])
def test_bad_splits(make, message):
    with pytest.raises(ValueError, match=message): make()
