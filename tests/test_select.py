"""Selection: the one exclusion rule, stages that give reasons, compositions of the index, adapted experience."""
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders import Letters
from exprag.alfworld_grammar import in_words_of
from exprag.query import Hit, Retriever
from exprag.select import (COMPOSITIONS, Candidate, Memory, NoMemory, Selection, adapt, adapt_to_goal, composition, exclude_same_task, noun_mapping,
                           order, run_stages, same_task, substitute, successes_only, token_budget, top_k)
from exprag.store import VIEWS, Store, actions
from exprag.trajectory import Step, Task, Trajectory


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
    return [Candidate(Hit(e.id, 1 - r / 10, r), e) for r, e in enumerate(episodes, 1)]


# The one rule


def test_same_task():
    a = episode(1)
    assert same_task(a, a) and same_task(a.task, a) and same_task(a, replace(a.task, fold="test"))
    assert same_task(a, episode(1, goal="other words", steps=1)), "another attempt at the same task"
    for other in (episode(2), episode(1, "melt"), episode(1, world="alfworld")):
        assert not same_task(a, other) and not same_task(a, other.task)
    assert same_task(replace(a, provenance={"x": 1}), a)


# Composition


def test_compositions(store):
    hard, easy = standing().task, standing("boil").task
    get = lambda name, task: {(t.type, t.fold) for t in (store.get(i).task for i in composition(store, name, task))}
    E, H = {("boil", "train"), ("melt", "train")}, {("grow-plant", "train"), ("power-component", "train")}
    assert get("all", hard) == E | H and get("easy", hard) == E and get("hard", hard) == H and get("empty", hard) == set()
    assert get("matched", hard) == H and get("mismatched", hard) == E and get("matched", easy) == E and get("mismatched", easy) == H
    assert all(store.get(i).task.fold == "train" and store.get(i).task.world == "scienceworld" for c in COMPOSITIONS for i in composition(store, c, hard))
    with pytest.raises(ValueError, match="'everything' is unknown; there are all, easy"):
        composition(store, "everything", hard)


# Stages


def test_stages_give_reasons():
    me, failed, unknown = episode(1), episode(2, success=False), replace(episode(3), score=None, success=None)
    stages = (exclude_same_task(), successes_only(), top_k(1))
    kept, dropped = run_stages(stages, me, candidates(me, failed, unknown, episode(4), episode(5)))
    assert [c.experience for c in kept] == [episode(4)]
    assert [(d.stage, d.reason) for d in dropped] == [("exclude_same_task", "it is the task at hand"), ("successes_only", "it failed"),
                                                      ("successes_only", "how it ended is not known"), ("top_k", "1 were nearer")]
    assert [d.task for d in dropped] == [e.task for e in (me, failed, unknown, episode(5))]


def test_token_budget_skips_what_does_not_fit():
    count = lambda text: len(text.split())
    short, long = episode(1, steps=1), episode(2, steps=50)
    size = count(actions(short))
    stage = token_budget(2 * size, count)
    kept, dropped = stage(standing(), candidates(short, long, episode(3, steps=1), episode(4, steps=1)))
    assert [c.experience.task.variation for c in kept] == ["1", "3"] and [d.id for d in dropped] == [long.id, episode(4, steps=1).id]
    assert dropped[1].reason == f"it needs {size} tokens and 0 of {2 * size} are left"
    assert stage.describe()["max_tokens"] == 2 * size and json.dumps(stage.describe())
    assert token_budget(5, count, label="words").describe()["count"] == "words"
    with pytest.raises(KeyError, match="view 'nonsense'"):
        token_budget(5, count, view="nonsense")


def test_order_and_bad_settings():
    kept, _ = order("nearest_last")(standing(), candidates(episode(1), episode(2)))
    assert [c.hit.rank for c in kept] == [2, 1]
    for wrong in (lambda: order("random"), lambda: top_k(-1)):
        with pytest.raises(ValueError):
            wrong()


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 4))
def test_every_candidate_is_kept_or_dropped_once(variations, k):
    found = candidates(*(episode(v, tag=str(i), success=bool(v % 2)) for i, v in enumerate(variations)))
    kept, dropped = run_stages((exclude_same_task(), successes_only(), top_k(k)), episode(3), found)
    assert sorted([c.hit.id for c in kept] + [d.id for d in dropped]) == sorted(c.hit.id for c in found) and len(kept) <= k


# Memory


def test_recall(store, retriever):
    memory = Memory(retriever, composition="matched")
    chosen = memory.recall(standing())
    assert isinstance(chosen, Selection) and len(chosen) == 2 and [e.task.type for e in chosen] == ["grow-plant"] * 2
    assert chosen.ids == tuple(h.id for h in chosen.hits) == tuple(e.id for e in chosen.experiences) and chosen == memory.recall(standing())
    own = episode(3, "grow-plant")
    assert not any(same_task(own, e) for e in memory.recall(replace(own, steps=(), score=None, success=None)))


def test_test_fold_and_failures_are_never_recalled(store, retriever):
    for kind in COMPOSITIONS:
        for query in (standing(i=8, fold="dev"), standing("boil", 9), standing("boil", 7)):
            for e in Memory(retriever, (exclude_same_task(), successes_only(), top_k(100)), kind).recall(query):
                assert e.task.fold == "train" and e.success and not same_task(e, query)


def test_pool_grows_until_the_places_are_filled(store, retriever):
    query = standing("boil", 2)
    store.add_many(episode(2, tag=f"try{i} ") for i in range(100))
    chosen = Memory(retriever, composition="easy", pool=5).recall(query)
    assert len(chosen) == 2 and sum(d.stage == "exclude_same_task" for d in chosen.dropped) > 50
    assert len(Memory(retriever, (exclude_same_task(),), "easy", pool=5).recall(query)) <= 5, "without a limit, the pool is the limit"


def test_nothing_is_legal(store, retriever):
    for memory in (Memory(retriever, composition="empty"), Memory(retriever, (top_k(0),)), NoMemory()):
        chosen = memory.recall(standing())
        assert len(chosen) == 0 and chosen.ids == () and chosen and str(chosen.explain())


def test_explain_names_everybody(store, retriever):
    text = str(Memory(retriever, composition="hard").recall(standing()).explain(None))
    assert text.count("\n") == 10 and "taken" in text and "dropped: top_k" in text and "2 were nearer" in text
    assert "... and 7 more" in str(Memory(retriever, composition="hard").recall(standing()).explain(3))


def test_descriptions_and_fingerprints(store, retriever):
    make = lambda **kw: Memory(retriever, **kw)
    memories = [make(), make(composition="hard"), make(stages=(top_k(2),)), make(stages=(top_k(3),)), make(view="chat"), make(adapted=True), make(pool=10), NoMemory()]
    assert len({m.fingerprint for m in memories}) == len(memories)
    assert make().fingerprint == make().fingerprint and all(json.loads(json.dumps(m.describe())) == m.describe() for m in memories)
    assert make().describe()["kind"] == "retrieved" and NoMemory().describe() == {"kind": "none"}
    before = make().fingerprint
    store.add(episode(77))
    assert make().fingerprint != before, "another store is another memory"


def test_memory_refuses_what_cannot_be(retriever):
    with pytest.raises(ValueError, match="composition"):
        Memory(retriever, composition="some")
    with pytest.raises(KeyError, match="view"):
        Memory(retriever, view="nonsense")
    with pytest.raises(ValueError, match="give both the same view"):
        Memory(retriever, (token_budget(9, len, view="chat"),), view="actions")


def test_adapted_memory_counts_what_is_read(store, retriever):
    seen = []
    count = lambda text: seen.append(text) or 1
    store.add(episode(60, "grow-plant", goal="grow a apple plant from seed"))
    memory = Memory(retriever, (exclude_same_task(), token_budget(9, count), top_k(1)), "hard", adapted=True)
    assert [s.name for s in memory.stages] == ["exclude_same_task", "adapt_to_goal", "token_budget", "top_k"]
    chosen = memory.recall(standing(goal="grow a lemon plant from seed"))
    assert chosen.experiences[0].goal == "grow a lemon plant from seed" and chosen.ids[0] == episode(60, "grow-plant", goal="grow a apple plant from seed").id
    assert any("lemon" in text for text in seen) and not any("apple" in text for text in seen)
    assert Memory(retriever, (top_k(1),), adapted=True).stages[-1].name == adapt_to_goal().name


def test_filters_narrow_the_search(store, retriever):
    narrow = Memory(retriever, only={"types": ["melt"], "success": True})
    assert [e.task.type for e in narrow.recall(standing())] == ["melt", "melt"] and json.loads(json.dumps(narrow.describe())) == narrow.describe()
    assert narrow.fingerprint != Memory(retriever).fingerprint and "only" not in Memory(retriever).describe()
    assert len(Memory(retriever, composition="hard", only={"types": ["melt"]}).recall(standing())) == 0, "a filter narrows a composition"
    with pytest.raises(TypeError):
        Memory(retriever, only={"colour": "blue"})


@pytest.mark.parametrize("only, wanted", [({"namespace": "team"}, {"0", "1"}), ({"authors": ["ann"]}, {"1", "2"}), ({"since": 0.0}, None), ({"until": 1.0}, set()),
                                          ({"namespace": "team", "authors": ["ann"]}, {"1"})])
def test_filters_by_namespace_author_and_date(store, retriever, only, wanted):
    store.add_many([episode(i, "boil", tag="n", goal=f"boil the kettle {i}") for i in (0,)], namespace="team")
    store.add_many([replace(episode(1, "boil", tag="n"), provenance={"author": "ann"})], namespace="team")
    store.add_many([replace(episode(2, "boil", tag="n"), provenance={"author": "ann"})])
    chosen = Memory(retriever, (top_k(100),), only=only).recall(standing("boil"))
    assert {e.task.variation for e in chosen} == wanted if wanted is not None else len(chosen) > 20


def test_notes_of_stages_are_explained():
    kept = Candidate(Hit("a", 0.9, 1), episode(1), "told in brief")
    chosen = Selection((kept.experience,), (kept.hit,), (), (kept.note,))
    assert "place 1; told in brief" in str(chosen.explain()) and "place 1" in str(Selection((kept.experience,), (kept.hit,)).explain())


# Adapting


@pytest.mark.parametrize("old, new, mapping", [
    ("grow a apple plant. Seeds are in the kitchen.", "grow a lemon plant. Seeds are in the bedroom.", {"apple": "lemon", "kitchen": "bedroom"}),
    ("Put it in the red box, not in the green box.", "Put it in the green box, not in the red box.", {"red": "green", "green": "red"}),
    ("measure the temperature of unknown substance B, which is in the hall", "measure the temperature of metal fork, which is in the living room", {"unknown substance b": "metal fork", "hall": "living room"}),
    ("planes (C, B) differ", "planes (G, H) differ", {"C": "G", "B": "H"}),
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
    experience = replace(episode(1, "grow-plant", goal="grow a apple in the kitchen"), first_observation="The kitchen. An apple seed.",
                         steps=(Step("pick up apple seed", "You hold the apple seed.", 1.0, thought="Apple it is"), Step("go to kitchen", "Kitchen.")), provenance={"actor": "expert"})
    adapted = adapt(experience, "grow a lemon in the bedroom")
    assert adapted.goal == "grow a lemon in the bedroom" and adapted.actions == ("pick up lemon seed", "go to bedroom")
    assert adapted.observations == ("The bedroom. An lemon seed.", "You hold the lemon seed.", "Bedroom.") and adapted.steps[0].thought == "Lemon it is"
    assert adapted.provenance == {"actor": "expert", "adapted_from": experience.id, "mapping": {"apple": "lemon", "kitchen": "bedroom"}}
    assert (adapted.task, adapted.score, adapted.steps[0].reward) == (experience.task, experience.score, 1.0)
    assert adapt(experience, experience.goal) is experience and adapt(experience, "boil water") is experience
    assert adapt(experience, "grow a lemon in the bedroom") == adapted


# The agent's language


def household(i, grammar, walks=6):
    arrived = "You arrive at desk {0}. " if grammar == "move" else ""
    steps = [Step(f"go to desk {n}", (arrived + "On the desk {0}, you see a mug {0}, and a pen 1.").format(n)) for n in range(1, walks + 1)]
    return Trajectory(Task("alfworld", "pick_and_place_simple", f"trial_{i}", "train"), f"put mug {i} on the desk.", "You are in the middle of a room.", tuple(steps), 1.0, True,
                      settings={"grammar": grammar})


def test_a_budget_counts_the_language_that_is_read(tmp_path):
    count = lambda text: len(text.split())
    with Store(tmp_path / "b.db") as store:
        store.add_many([household(i, "move") for i in range(4)])
        agent = replace(household(9, "put"), steps=(), score=None, success=None)
        as_stored, as_read = count(actions(household(0, "move"))), count(actions(household(0, "put")))
        assert as_read > as_stored + 10  # a cue is the first sentence, and on arriving that is another one
        room = 2 * as_stored  # two would fit if they were read as they are stored
        chosen = Memory(Retriever(store, Letters()), (exclude_same_task(), successes_only(), token_budget(room, count), top_k(3))).recall(agent)
        read = [in_words_of(e, agent.settings) for e in chosen]
        assert sum(count(actions(e)) for e in read) <= room and len(chosen) == 1


def test_experience_comes_in_the_agents_language_and_says_whose_it_was(tmp_path):
    with Store(tmp_path / "b.db") as store:
        store.add_many([household(i, "put" if i else "move") for i in range(2)])
        memory, agent = Memory(Retriever(store, Letters()), adapted=True), replace(household(9, "move"), steps=(), score=None, success=None)
        mine, other = sorted(memory.recall(agent), key=lambda e: e.task)
        assert other.actions == household(1, "move").actions and {e.settings["grammar"] for e in (mine, other)} == {"move"}
        assert other.provenance["adapted_from"] == household(1, "put").id and set(memory.recall(agent).ids) == set(store.find())
        unstated = replace(agent, settings={})  # an agent whose world does not say what it speaks reads what is stored
        assert {e.settings["grammar"] for e in memory.recall(unstated)} == {"put", "move"}
        assert "in_agent_words" not in str(memory.describe())  # nothing to choose, so no fingerprint changes


def test_only_what_is_taken_is_translated(tmp_path):
    untold = replace(household(3, "put"), settings={}, steps=(Step("look", "You see a desk 1."),), success=False, score=0.0)
    with Store(tmp_path / "b.db") as store:
        store.add_many([household(1, "put"), untold])
        assert len(Memory(Retriever(store, Letters())).recall(replace(household(9, "move"), steps=(), score=None, success=None))) == 1


def test_what_was_written_about_episodes_is_left_to_whoever_shows_it(tmp_path):
    def told(trajectory): return "somebody's words"
    told.sources = lambda trajectory: (trajectory.id,)
    VIEWS["told"] = told
    try:
        with Store(tmp_path / "b.db") as store:
            store.add(household(1, "put"))
            chosen = Memory(Retriever(store, Letters()), view="told").recall(replace(household(9, "move"), steps=(), score=None, success=None))
            assert chosen.experiences == (household(1, "put"),)  # the agent's chapter refuses it
    finally:
        del VIEWS["told"]
