"""Worlds: the record, the one registry, what a record decides, and dialects."""
from dataclasses import replace

import pytest

from exprag import world as world_module
from exprag.prompt import PromptFormat
from exprag.trajectory import FrozenMap, Step, Task, Trajectory
from exprag.world import (
    Dialects, Environment, Panel, World, difficulty, find_world, in_dialect, is_hard, load_object, load_panel, load_world,
    normalised_score, play, register_world, true_fold, world_names)


@pytest.fixture
def inn(monkeypatch):
    "A registry for one test."
    monkeypatch.setattr(world_module, "_REGISTERED", {})
    return register_world(World("inn", easy=["pour-beer"], hard=["make-bed"], templates=["pour OBJ", "sleep"], cap=7,
                                caps={"make-bed": 9}, scores=(0, 20), refusals=["You cannot"], instruction="Serve."))


def episode(world="inn", type="pour-beer", score=5.0, **more):
    return Trajectory(Task(world, type, "1", "train"), "Pour.", "A bar.", (Step("pour ale", "You cannot pour."), Step("sleep", "zzz")), score, True, **more)


# -- the registry

def test_a_registered_world_is_known_everywhere(inn):
    assert find_world("inn") is load_world("inn") is inn and "inn" in world_names()
    assert (difficulty(Task("inn", "make-bed", 1, "train")), is_hard(Task("inn", "make-bed", 1, "train"))) == ("hard", True)
    assert normalised_score(episode()) == 0.25 and normalised_score(episode(score=None)) is None
    assert PromptFormat().system("inn") == "Serve.\n\nActions:\npour OBJ; sleep"
    assert [row[:2] for row in Panel("p", (Task("inn", "make-bed", 1, "test"),), {"make-bed": 9}, {}).table().rows] == [("make-bed", "hard")]


def test_registering_again_replaces(inn):
    register_world(World("inn", easy=["make-bed"]))
    assert load_world("inn").difficulty("make-bed") == "easy" and load_world("inn").templates == ()


def test_a_shipped_world_is_found_by_its_name_and_cannot_be_replaced(inn):
    assert load_world("scienceworld").name == "scienceworld" and set(world_names()) >= {"scienceworld", "alfworld", "inn"}
    with pytest.raises(ValueError, match="world 'scienceworld' comes with the package"): register_world(World("scienceworld"))


@pytest.mark.parametrize("name", ["nowhere", "collecting", "java", "", "../x", "Scienceworld", "scienceworld_expert"])
def test_an_unknown_world_is_refused_with_the_way_out(inn, name):
    assert find_world(name) is None
    with pytest.raises(ValueError, match=r"is not known \(there are .*scienceworld.*inn\): register_world\(World\("): load_world(name)
    if "/" not in name and name:
        assert not is_hard(Task(name, "boil", 1, "train")) and true_fold(Task(name, "boil", 1, "dev")) == "dev"
        with pytest.raises(ValueError, match="is not known"): difficulty(Task(name, "boil", 1, "train"))


# -- the record

@pytest.mark.parametrize("fields, said", [
    (dict(easy=["a"], hard=["b", "a"]), "'a' is both easy and hard"), (dict(templates="pour OBJ"), r"give a list, \['pour OBJ'\]"),
    (dict(easy="boil"), r"easy='boil'\): give a list"), (dict(refusals="No."), "give a list"), (dict(scores=(5, 1)), "lowest and highest"),
    (dict(scores=(-5, 0)), "lowest and highest")])
def test_a_record_that_contradicts_itself_is_refused(fields, said):
    with pytest.raises(ValueError, match=said): World("inn", **fields)


@pytest.mark.parametrize("ask, said", [
    (lambda w: w.make(), r"has no environment; give World\(environment="), (lambda w: w.refused(Step("a", "b")), r"give World\(refusals="),
    (lambda w: w.canonical("pour ale"), r"give World\(templates="), (lambda w: w.normalise(1), r"give World\(scores=")])
def test_what_a_record_does_not_say_is_an_error_that_names_the_field(ask, said):
    with pytest.raises(ValueError, match=f"'bare'.*{said}"): ask(World("bare"))


def test_what_a_record_decides(inn):
    assert (inn.step_cap("pour-beer"), inn.step_cap("make-bed"), inn.step_cap("anything")) == (7, 9, 7)
    assert [inn.refused(s) for s in episode().steps] == [True, False]
    assert [inn.canonical(a) for a in ("pour dark ale", "sleep", "dance")] == ["pour OBJ", "sleep", "dance"]
    assert World("bare").difficulty("anything") == "easy" and World("bare").step_cap("x") == 50
    with pytest.raises(ValueError, match="unknown task type of inn 'pour-beet'; did you mean 'pour-beer'"): inn.difficulty("pour-beet")


def test_the_most_literal_template_counts():
    world = World("w", templates=["move OBJ to OBJ", "move OBJ to the bin"], rewordings={"put OBJ into OBJ": "move OBJ to OBJ"})
    assert [world.canonical(a) for a in ("move cup to the bin", "move cup to sink", "put cup into sink")] == ["move OBJ to the bin", "move OBJ to OBJ", "move OBJ to OBJ"]


def test_scores_on_one_scale():
    world = load_world("scienceworld")
    assert [world.normalise(s) for s in (-100, -1, 0, 50, 100)] == [0, 0, 0, 0.5, 1]
    for raw in (101, -101):
        with pytest.raises(ValueError, match="lies outside -100..100"): world.normalise(raw)
    with pytest.raises(ValueError, match="finite"): world.normalise(float("nan"))
    with pytest.raises(ValueError, match="is not known"): normalised_score(episode(world="nowhere"))


def test_true_folds(inn):
    assert true_fold(Task("scienceworld", "boil", "14", "train")) == "dev" and true_fold(Task("inn", "make-bed", "14", "test")) == "test"


def test_panels_have_names():
    assert len(load_panel("scienceworld", "test")) == 149 and load_panel("scienceworld", "dev").world == "scienceworld"
    with pytest.raises(ValueError, match="unknown panel of scienceworld 'tset'; did you mean 'test'"): load_panel("scienceworld", "tset")


def test_a_panel_is_of_one_world():
    tasks = (Task("inn", "make-bed", 1, "test"), Task("bar", "make-bed", 1, "test"))
    with pytest.raises(ValueError, match="mixes worlds: bar, inn"): Panel("p", tasks, {"make-bed": 9}, {})


# -- names of objects

def test_objects_by_name():
    assert load_object("exprag.world:play") is play and load_object(play) is play and load_object(None) is None
    for wrong in ("exprag.world:nothing", "exprag.nowhere:play", "play"):
        with pytest.raises(ValueError, match=f"'{wrong}' names nothing that can be imported; write 'module:name'"): load_object(wrong)


def test_a_missing_package_inside_a_named_module_is_said_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_here\nthing = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_here"): load_object("needs_more:thing")


# -- play

class Bar:
    "A world of one drink."
    world, world_version, settings = "inn", "1", FrozenMap({"size": 2})

    def reset(self, task, cap=None):
        self.steps, self.cap = 0, cap or 3
        return "A bar.", {"goal": "Pour.", "score": 0.0, "success": False}

    def step(self, action):
        self.steps += 1
        done = action == "pour ale"
        return "Poured.", float(done), done, self.steps >= self.cap, {"goal": "Pour.", "score": 20.0 * done, "success": done}

    def close(self): pass


def test_play_ends_where_the_episode_ends():
    task = Task("inn", "pour-beer", 1, "train")
    assert isinstance(Bar(), Environment)
    done = play(Bar(), task, ["sleep", "pour ale", "sleep"], actor="hand")
    assert done.actions == ("sleep", "pour ale") and (done.score, done.success, done.settings) == (20.0, True, {"size": 2}) and done.provenance == {"actor": "hand"}
    assert len(play(Bar(), task, ["sleep"] * 9)) == 3 and len(play(Bar(), task, ["sleep"] * 9, cap=2)) == 2 and play(Bar(), task, []).success is False


def test_a_registered_world_makes_its_environment(inn):
    register_world(replace(inn, environment=Bar))
    assert isinstance(load_world("inn").make(), Bar)


# -- dialects

def shouted(trajectory, dialect):
    change = str.upper if dialect == "loud" else str.lower
    return replace(trajectory, steps=tuple(replace(s, action=change(s.action)) for s in trajectory.steps), settings={"voice": dialect})


def voice(trajectory):
    if "voice" not in trajectory.settings: raise ValueError("say which voice")
    return trajectory.settings["voice"]


@pytest.fixture
def loud(inn):
    return register_world(replace(inn, dialects=Dialects("voice", {"soft": ("pour OBJ",), "loud": ("POUR OBJ",)}, voice, shouted)))


def test_an_episode_is_put_into_the_dialect_of_an_environment(loud):
    soft = episode(settings={"voice": "soft"})
    assert in_dialect(soft, {"voice": "loud"}).actions == ("POUR ALE", "SLEEP")
    assert in_dialect(soft, {"voice": "soft"}) is soft and in_dialect(soft, {}) is soft, "nothing to translate"
    assert in_dialect(in_dialect(soft, {"voice": "loud"}), {"voice": "soft"}) == soft
    with pytest.raises(ValueError, match="say which voice"): in_dialect(episode(), {"voice": "loud"})


def test_a_world_of_one_language_is_left_as_it_is(inn):
    for one in (episode(), episode(world="nowhere"), episode(world="scienceworld", type="boil")): assert in_dialect(one, {"voice": "loud"}) is one


def test_the_dialect_decides_the_templates(loud):
    assert (loud.action_templates({"voice": "loud"}), loud.action_templates({"voice": "soft"}), loud.action_templates()) == (("POUR OBJ",), ("pour OBJ",), ("pour OBJ", "sleep"))
    with pytest.raises(ValueError, match="unknown voice of inn 'laud'; did you mean 'loud'"): loud.action_templates({"voice": "laud"})
    with pytest.raises(ValueError, match="unknown voice of inn 'laud'"): in_dialect(episode(settings={"voice": "soft"}), {"voice": "laud"})
