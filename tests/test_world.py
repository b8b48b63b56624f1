"The records of the worlds that come with the package, and panels; no simulator. The registry is in test_registry."
import pytest

from exprag.trajectory import Step, Task
from exprag.world import Panel, load_panel, load_world, spread, true_fold, world_names

TAKE = Task("scienceworld", "find-plant", 0, "train")


def test_the_worlds_that_come_with_the_package():
    assert {"scienceworld", "alfworld", "textworld-express", "shop"} <= set(world_names())
    for name in ("scienceworld", "alfworld", "textworld-express", "shop"):
        world = load_world(name)
        assert world.name == name and world.environment and world.expert and world.instruction and world.refusals and world.scores
        tasks = {fold: world.tasks(fold) for fold in ("train", "dev", "test")}
        for fold, some in tasks.items(): assert some and list(some) == sorted(some) and {true_fold(t) for t in some} == {fold}
        for panel in world.panels: assert load_panel(name, panel).world == name and load_panel(name, panel).fingerprint == load_panel(name, panel).fingerprint


@pytest.mark.parametrize("action, template", [
    ("pour jug into pot", "pour OBJ in OBJ"), ("pour jug in pot", "pour OBJ in OBJ"), ("go to hallway", "go OBJ"), ("look around", "look around"),
    ("look at door", "look at OBJ"), ("fly", "fly"), ("", "")])
def test_canonical_actions_of_scienceworld(action, template):
    assert load_world("scienceworld").canonical(action) == template


def test_refusals_are_recognised_by_how_they_begin():
    science, alf = load_world("scienceworld"), load_world("alfworld")
    assert science.refused(Step("fly", " No known action matches that input.")) and not science.refused(Step("wait", "You decide to wait."))
    assert alf.refused(Step("fly", "Nothing happens.")) and not alf.refused(Step("look", "You see nothing happens to be here."))
    assert load_world("shop").refused(Step("query", "Error: query needs its sql: query OBJ.")) and load_world("textworld-express").refused(
        Step("fly", "Unknown action: I'm not sure what you mean."))


def test_the_true_fold_is_the_worlds_whatever_the_label():
    assert true_fold(Task("scienceworld", "boil", 21, "train")) == "test" and true_fold(Task("scienceworld", "boil", 99, "train")) == "train"
    assert true_fold(Task("shop", "count-orders", 16, "train")) == "test" and true_fold(Task("textworld-express", "coin", 10001, "test")) == "dev"


def test_panel_fingerprint_depends_on_everything():
    demo = load_panel("scienceworld", "demo")
    make = lambda **k: Panel(**{**dict(name="x", tasks=demo.tasks, caps=demo.caps, settings={"simplification": "easy"}), **k}).fingerprint
    assert len({make(), make(tasks=demo.tasks[::-1]), make(tasks=demo.tasks[1:]), make(caps={**demo.caps, "grow-fruit": 51}), make(settings={"simplification": ""})}) == 5
    assert make(name="y") == make()


def test_bad_panels_are_refused():
    with pytest.raises(ValueError, match="twice"): Panel("x", (TAKE, TAKE), {"find-plant": 50}, {})
    with pytest.raises(ValueError, match="no step cap for"): Panel("x", (TAKE,), {}, {})


def test_spread():
    assert spread(range(10), 5) == [0, 2, 4, 6, 8] and spread(range(4), 5) == [0, 1, 2, 3] and spread([], 3) == []
