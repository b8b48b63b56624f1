"""Selection: the one exclusion rule, stages that give reasons, compositions of the index, when to ask."""
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders import Letters
from exprag.memory.curation import let_in, shut_out
from exprag.query import Retriever
from exprag.select import (
    COMPOSITIONS, Every, Memory, NoMemory, Once, Selection, Stage, are_siblings, composition, exclude_same_task, exclude_siblings, order, run_stages,
    successes_only, token_budget, top_k)
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory, same_task
from exprag.views import Experience, Hit, register_view, render
from exprag.world import in_dialect


def episode(i, type="boil", fold="train", goal=None, success=True, steps=3, world="scienceworld", tag=""):
    return Trajectory(Task(world, type, str(i), fold), goal or f"{type} number {i}", "A hall.",
                      tuple(Step(f"act {tag}{j}", "done") for j in range(steps)), 100.0 if success else -100.0, success)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many([episode(i, t) for t in ("boil", "melt", "grow-plant", "power-component") for i in range(5)])
        store.add_many([episode(7, "boil", "dev"), episode(8, "grow-plant", "test"), episode(9, "boil", success=False)])
        store.add(episode(1, "pick_heat", world="alfworld"))
        yield store


@pytest.fixture
def retriever(store):
    return Retriever(store, Letters())


def standing(type="grow-plant", i=50, fold="test", **more):
    return replace(episode(i, type, fold, **more), steps=(), score=None, success=None)


def candidates(*episodes):
    return [Experience(e, Hit(e.id, 1 - r / 10, r)) for r, e in enumerate(episodes, 1)]


# The one rule


def test_same_task():
    a = episode(1)
    assert same_task(a, a) and same_task(a.task, a) and same_task(a, replace(a.task, fold="test"))
    assert same_task(a, episode(1, goal="other words", steps=1)), "another attempt at the same task"
    for other in (episode(2), episode(1, "melt"), episode(1, world="alfworld")):
        assert not same_task(a, other) and not same_task(a, other.task)
    assert same_task(replace(a, provenance={"x": 1}), a)


def test_siblings_have_one_goal_and_type_and_are_other_tasks():
    a = episode(1, goal="Put a Mug  in the desk")
    sibling, same, other_type, other_goal = episode(2, goal="put a mug in the desk"), episode(1, goal="put a mug in the desk", steps=1), episode(2, "melt", goal=a.goal), episode(2)
    assert [are_siblings(a, b) for b in (a, sibling, same, other_type, other_goal, episode(2, goal=a.goal, world="alfworld"))] == [False, True] + [False] * 4
    stages = (exclude_same_task(), exclude_siblings())
    kept, dropped = run_stages(stages, a, candidates(same, sibling, other_type, other_goal))
    assert [e.trajectory for e in kept] == [other_type, other_goal]
    assert [(d.stage, d.reason) for d in dropped] == [("exclude_same_task", "it is the task at hand"), ("exclude_siblings", "it is another task with the same goal")]


def test_siblings_are_excluded_only_where_asked_for(retriever, store):
    attempts = [episode(i, "grow-plant", goal="grow a plant") for i in range(20, 60)]
    store.add_many(attempts)
    me = standing(i=99, goal="Grow a plant")
    asked, plain = (Memory(retriever, (exclude_same_task(), *more, successes_only(), top_k(2)), composition="matched") for more in ([exclude_siblings()], []))
    assert all(are_siblings(me, e.trajectory) for e in plain.recall(me)) and plain.fingerprint == Memory(retriever, composition="matched").fingerprint
    assert len(asked.recall(me)) == 2 and not any(are_siblings(me, e.trajectory) for e in asked.recall(me)), "the pool grows past forty siblings"


# Composition


def test_compositions(store):
    hard, easy = standing().task, standing("boil").task
    get = lambda name, task: {(t.type, t.fold) for t in (store.get(i).task for i in composition(store, name, task))}
    E, H = {("boil", "train"), ("melt", "train")}, {("grow-plant", "train"), ("power-component", "train")}
    assert get("all", hard) == E | H and get("easy", hard) == E and get("hard", hard) == H and get("empty", hard) == set()
    assert get("matched", hard) == H and get("mismatched", hard) == E and get("matched", easy) == E and get("mismatched", easy) == H
    assert all(store.get(i).task.fold == "train" and store.get(i).task.world == "scienceworld" for c in COMPOSITIONS for i in composition(store, c, hard))
    with pytest.raises(ValueError, match="unknown composition 'everything'.*all, easy"):
        composition(store, "everything", hard)


# Stages


def test_stages_give_reasons():
    me, failed, unknown = episode(1), episode(2, success=False), replace(episode(3), score=None, success=None)
    stages = (exclude_same_task(), successes_only(), top_k(1))
    kept, dropped = run_stages(stages, me, candidates(me, failed, unknown, episode(4), episode(5)))
    assert [e.trajectory for e in kept] == [episode(4)]
    assert [(d.stage, d.reason) for d in dropped] == [("exclude_same_task", "it is the task at hand"), ("successes_only", "it failed"),
                                                      ("successes_only", "how it ended is not known"), ("top_k", "1 were nearer")]
    assert [d.experience.task for d in dropped] == [e.task for e in (me, failed, unknown, episode(5))]


def test_token_budget_skips_what_does_not_fit():
    count = lambda text: len(text.split())
    short, long = episode(1, steps=1), episode(2, steps=50)
    size = count(render(short))
    stage = token_budget(2 * size, count)
    kept, dropped = stage(standing(), candidates(short, long, episode(3, steps=1), episode(4, steps=1)))
    assert [e.task.variation for e in kept] == ["1", "3"] and [d.id for d in dropped] == [long.id, episode(4, steps=1).id]
    assert dropped[1].reason == f"it needs {size} tokens and 0 of {2 * size} are left"
    assert stage.describe()["max_tokens"] == 2 * size and json.dumps(stage.describe())
    assert token_budget(5, count, label="words").describe()["count"] == "words"
    with pytest.raises(ValueError, match="view 'nonsense'"):
        token_budget(5, count, view="nonsense")


def test_order_and_bad_settings():
    kept, _ = order("nearest_last")(standing(), candidates(episode(1), episode(2)))
    assert [e.hit.rank for e in kept] == [2, 1]
    for wrong in (lambda: order("random"), lambda: top_k(-1)):
        with pytest.raises(ValueError):
            wrong()


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 4))
def test_every_candidate_is_kept_or_dropped_once(variations, k):
    found = candidates(*(episode(v, tag=str(i), success=bool(v % 2)) for i, v in enumerate(variations)))
    kept, dropped = run_stages((exclude_same_task(), successes_only(), top_k(k)), episode(3), found)
    assert sorted([e.hit.id for e in kept] + [d.id for d in dropped]) == sorted(e.hit.id for e in found) and len(kept) <= k


# Memory


def test_recall(store, retriever):
    memory = Memory(retriever, composition="matched")
    chosen = memory.recall(standing())
    assert isinstance(chosen, Selection) and len(chosen) == 2 and [e.task.type for e in chosen] == ["grow-plant"] * 2
    assert chosen.ids == tuple(e.hit.id for e in chosen) == tuple(e.trajectory.id for e in chosen.experiences) and chosen == memory.recall(standing())
    own = episode(3, "grow-plant")
    assert not any(same_task(own, e.trajectory) for e in memory.recall(replace(own, steps=(), score=None, success=None)))


def test_test_fold_and_failures_are_never_recalled(store, retriever):
    for kind in COMPOSITIONS:
        for query in (standing(i=8, fold="dev"), standing("boil", 9), standing("boil", 7)):
            for e in Memory(retriever, (exclude_same_task(), successes_only(), top_k(100)), kind).recall(query):
                assert e.task.fold == "train" and e.success and not same_task(e.trajectory, query)


def test_pool_grows_until_the_places_are_filled(store, retriever):
    query = standing("boil", 2)
    store.add_many(episode(2, tag=f"try{i} ") for i in range(100))
    chosen = Memory(retriever, composition="easy", pool=5).recall(query)
    assert len(chosen) == 2 and sum(d.stage == "exclude_same_task" for d in chosen.dropped) > 50
    assert len(Memory(retriever, (exclude_same_task(),), "easy", pool=5).recall(query)) <= 5, "without a limit, the pool is the limit"


def test_what_was_shut_out_is_dropped_first_with_the_reason_given(store, retriever):
    memory = Memory(retriever, [top_k(2)])
    nearest, before = memory.recall(standing()).ids[0], memory.fingerprint
    shut_out(store, nearest, "it leads to the wrong door")
    found = memory.recall(standing())
    assert nearest not in found.ids and len(found) == 2 and memory.fingerprint != before
    assert [(d.id, d.stage, d.reason) for d in found.dropped if d.id == nearest] == [(nearest, "not_shut_out", "it leads to the wrong door")]
    assert any("it leads to the wrong door" in row for row in found.explain().rows)
    let_in(store, nearest)
    assert memory.recall(standing()).ids[0] == nearest and memory.fingerprint == before


def test_nothing_is_legal(store, retriever):
    for memory in (Memory(retriever, composition="empty"), Memory(retriever, (top_k(0),)), NoMemory()):
        chosen = memory.recall(standing())
        assert len(chosen) == 0 and chosen.ids == () and chosen and str(chosen.explain())


def test_explain_names_everybody(store, retriever):
    text = str(Memory(retriever, composition="hard").recall(standing()).explain(None))
    assert text.count("\n") == 11 and "taken" in text and "dropped: top_k" in text and "2 were nearer" in text
    assert "... and 7 more" in str(Memory(retriever, composition="hard").recall(standing()).explain(3))


def test_descriptions_and_fingerprints(store, retriever):
    make = lambda **kw: Memory(retriever, **kw)
    memories = [make(), make(composition="hard"), make(stages=(top_k(2),)), make(stages=(top_k(3),)), make(view="chat"), make(when=Every(1)), make(when=Every(2)), make(pool=10), NoMemory()]
    assert len({m.fingerprint for m in memories}) == len(memories)
    assert make().fingerprint == make().fingerprint and all(json.loads(json.dumps(m.describe())) == m.describe() for m in memories)
    assert make().describe()["kind"] == "retrieved" and NoMemory().describe() == {"kind": "none"}
    before = make().fingerprint
    store.add(episode(77))
    assert make().fingerprint != before, "another store is another memory"


def test_memory_refuses_what_cannot_be(retriever):
    with pytest.raises(ValueError, match="composition"):
        Memory(retriever, composition="some")
    with pytest.raises(ValueError, match="view"):
        Memory(retriever, view="nonsense")
    with pytest.raises(ValueError, match="give both the same view"):
        Memory(retriever, (token_budget(9, len, view="chat"),), view="actions")


def test_filters_narrow_the_search(store, retriever):
    narrow = Memory(retriever, only={"types": ["melt"], "success": True})
    assert [e.task.type for e in narrow.recall(standing())] == ["melt", "melt"] and json.loads(json.dumps(narrow.describe())) == narrow.describe()
    assert narrow.fingerprint != Memory(retriever).fingerprint and "only" not in Memory(retriever).describe()
    assert len(Memory(retriever, composition="hard", only={"types": ["melt"]}).recall(standing())) == 0, "a filter narrows a composition"
    with pytest.raises(TypeError):
        Memory(retriever, only={"colour": "blue"})


@pytest.mark.parametrize("only, wanted", [({"namespace": "team"}, {"0", "1"}), ({"authors": ["ann"]}, {"1", "2"}), ({"added": [0.0, None]}, None), ({"added": [None, 1.0]}, set()),
                                          ({"namespace": "team", "authors": ["ann"]}, {"1"})])
def test_filters_by_namespace_author_and_date(store, retriever, only, wanted):
    store.add_many([episode(i, "boil", tag="n", goal=f"boil the kettle {i}") for i in (0,)], namespace="team")
    store.add_many([replace(episode(1, "boil", tag="n"), provenance={"author": "ann"})], namespace="team")
    store.add_many([replace(episode(2, "boil", tag="n"), provenance={"author": "ann"})])
    chosen = Memory(retriever, (top_k(100),), only=only).recall(standing("boil"))
    assert {e.task.variation for e in chosen} == wanted if wanted is not None else len(chosen) > 20


def test_notes_of_stages_are_explained():
    kept = Experience(episode(1), Hit("a", 0.9, 1), note="in brief")
    assert "place 1; in brief" in str(Selection((kept,)).explain()) and "place 1" in str(Selection((replace(kept, note=""),)).explain())
    assert "<table" in Selection((kept,))._repr_html_()


def test_experience_without_a_hit_is_explained():
    given = Selection((Experience(episode(1)),))
    assert given.ids == (episode(1).id,) and given.explain().rows == (("", "", episode(1).id[:8], str(episode(1).task), "taken", "place 1"),)


def test_a_stage_of_ones_own(retriever):
    def run(trajectory, experiences):
        return [(replace(e, note=f"{len(e)} steps"), None if len(e) < 4 else "too long") for e in experiences]
    memory = Memory(retriever, (exclude_same_task(), Stage("short_only", run), top_k(2)))
    retriever.store.add(episode(70, "grow-plant", steps=9))
    chosen = memory.recall(standing())
    assert [e.note for e in chosen] == ["3 steps"] * 2 and [d.reason for d in chosen.dropped if d.stage == "short_only"] == ["too long"]
    assert {"stage": "short_only"} in memory.describe()["stages"]


def test_when_to_ask():
    def at(steps): return episode(1, steps=steps)
    assert not any(Once()(at(n), at(0)) for n in range(5))
    assert [Every(2)(at(n), at(1)) for n in (1, 2, 3, 4)] == [False, False, True, True] and Every()(at(1), at(0)) and not Every()(at(1), at(1))
    assert (Once().describe(), Every(3).describe()) == ({"when": "once"}, {"when": "every", "steps": 3})


def test_no_memory_has_the_interface_of_a_memory(retriever):
    with_, without = Memory(retriever), NoMemory()
    assert without.when == with_.when == Once() and without.view == with_.view == "actions" and without.composition == "empty"
    assert without.recall(standing()) == Selection() and without.fingerprint != with_.fingerprint and repr(without) == "NoMemory()"


# The agent's dialect


def household(i, grammar, walks=6):
    arrived = "You arrive at desk {0}. " if grammar == "move" else ""
    steps = [Step(f"go to desk {n}", (arrived + "On the desk {0}, you see a mug {0}, and a pen 1.").format(n)) for n in range(1, walks + 1)]
    return Trajectory(Task("alfworld", "pick_and_place_simple", f"trial_{i}", "train"), f"put mug {i} on the desk.", "You are in the middle of a room.", tuple(steps), 1.0, True,
                      settings={"grammar": grammar})


def test_a_budget_counts_the_dialect_that_is_read(tmp_path):
    count = lambda text: len(text.split())
    with Store(tmp_path / "b.db") as store:
        store.add_many([household(i, "move") for i in range(4)])
        agent = replace(household(9, "put"), steps=(), score=None, success=None)
        as_stored, as_read = count(render(household(0, "move"))), count(render(household(0, "put")))
        assert as_read > as_stored + 10  # a cue is the first sentence, and on arriving that is another one
        room = 2 * as_stored  # two would fit if they were read as they are stored
        chosen = Memory(Retriever(store, Letters()), (exclude_same_task(), successes_only(), token_budget(room, count), top_k(3))).recall(agent)
        assert sum(count(render(e)) for e in chosen) <= room and len(chosen) == 1
        assert [e.trajectory for e in chosen] == [in_dialect(store.get(id), agent.settings) for id in chosen.ids]


def test_experience_comes_in_the_agents_dialect_under_its_own_id(tmp_path):
    with Store(tmp_path / "b.db") as store:
        store.add_many([household(i, "put" if i else "move") for i in range(2)])
        memory, agent = Memory(Retriever(store, Letters())), replace(household(9, "move"), steps=(), score=None, success=None)
        mine, other = sorted(memory.recall(agent), key=lambda e: e.task)
        assert other.actions == household(1, "move").actions and {e.trajectory.settings["grammar"] for e in (mine, other)} == {"move"}
        assert other.id == household(1, "put").id != other.trajectory.id and set(memory.recall(agent).ids) == set(store.find())
        unstated = replace(agent, settings={})  # an agent whose world does not say what it speaks reads what is stored
        assert {e.trajectory.settings["grammar"] for e in memory.recall(unstated)} == {"put", "move"}
        assert "dialect" not in str(memory.describe())  # nothing to choose, so no fingerprint changes


def test_only_what_is_taken_is_translated(tmp_path):
    untold = replace(household(3, "put"), settings={}, steps=(Step("look", "You see a desk 1."),), success=False, score=0.0)
    with Store(tmp_path / "b.db") as store:
        store.add_many([household(1, "put"), untold])
        assert len(Memory(Retriever(store, Letters())).recall(replace(household(9, "move"), steps=(), score=None, success=None))) == 1


def test_what_was_written_about_episodes_is_not_translated(tmp_path):
    def summary(experience): return "somebody's words"
    summary.sources = lambda experience: (experience.id,)
    view = register_view("summary of a test", summary)
    with Store(tmp_path / "b.db") as store:
        store.add(household(1, "put"))
        memory, agent = Memory(Retriever(store, Letters()), view=view), replace(household(9, "put"), steps=(), score=None, success=None)
        assert [render(e, view) for e in memory.recall(agent)] == ["somebody's words"]
        with pytest.raises(ValueError, match="another grammar than 'move'.*write it from translated episodes, or show another view"):
            memory.recall(replace(agent, settings={"grammar": "move"}))


def test_where_nothing_has_succeeded_the_pool_does_not_grow(tmp_path):
    class Counts(Retriever):
        fetched = 0
        def fetch(self, hit): self.fetched += 1; return super().fetch(hit)

    with Store(tmp_path / "failures.db") as store:
        store.add_many([episode(i, success=False) for i in range(100)], namespace="mine")
        store.add(episode(200, world="alfworld"))
        memory = Memory(retriever := Counts(store, Letters()))
        found = memory.recall(standing("boil"))
        assert not found.ids and len(found.dropped) == retriever.fetched == memory.pool and found.dropped[0].stage == "successes_only"
        store.add_many([episode(300, goal="zzz")], namespace="theirs")  # the farthest
        assert Memory(retriever).recall(standing("boil")).ids == (episode(300, goal="zzz").id,)
        retriever.fetched = 0
        assert not Memory(retriever, only={"namespace": "mine"}).recall(standing("boil")).ids and retriever.fetched == 20
        retriever.fetched = 0  # failures are wanted as well: there is no reason to stop
        assert len(Memory(retriever, (top_k(2),)).recall(standing("boil"))) == 2 and retriever.fetched == 20
