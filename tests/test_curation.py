"""Curation: whose experience is read, what is removed when a store is full, and the reports."""
import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from encoders import Letters
from faults import FEW_OR_MANY, killed
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.maintenance import check
from exprag.memory.utility import Use, credit, usage
from exprag.memory.curation import (
    LEVELS, POLICIES, Row, StalePlan, Trust, carry_out, coverage, curate, leaving, make_room,
    nearest_scores, plan, rows_of, staleness, trusted)
from exprag.query import Retriever
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Experience, Hit


def episode(i=0, type=None, actor="expert", thought=None, success=True, score=1.0, steps=3, **more):
    made = tuple(Step(f"do {i} {j}", f"Thing {j} of {i}.", thought=thought) for j in range(steps))
    return Trajectory(
        Task("w", type or f"type-{i % 4}", str(i), "train"),
        f"Do thing {i}.",
        "A door.",
        made,
        score,
        success,
        "1",
        {},
        {"actor": actor},
        **more,
    )


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        yield store


# Trust


@pytest.mark.parametrize("trust, kept, unverified", [
    (Trust({"expert": "trusted"}), 1, 0), (Trust({"expert": "trusted"}, "unverified"), 3, 2),
    (Trust({"mallory": "excluded"}, "trusted"), 2, 0), (Trust(), 0, 0)])
def test_unknown_authors_are_excluded_by_default(trust, kept, unverified):
    authors = (episode(1), episode(2, actor="mallory"), replace(episode(3), provenance={}))
    taken, dropped = trusted(trust)(episode(9), [Experience(t, Hit(t.id, 1.0, 1)) for t in authors])
    assert len(taken) == kept and len(dropped) == 3 - kept
    assert sum(e.trust == "unverified" for e in taken) == unverified
    assert all("is excluded" in d.reason for d in dropped)
    assert all((e.note != "") == (e.trust == "unverified") for e in taken)


def test_trust_describes_itself():
    made = trusted(Trust({"a": "unverified"}))
    assert made.describe() == {
        "stage": "trusted",
        "authors": {"a": "unverified"},
        "unknown": "excluded",
    }


def test_a_record_cannot_vouch_for_itself():
    liar = replace(episode(1, actor="mallory"), provenance={"actor": "mallory", "trust": "trusted"})
    (kept,), _ = trusted(Trust(unknown="unverified"))(
        episode(9), [Experience(liar, Hit(liar.id, 1.0, 1))]
    )
    assert kept.trust == "unverified" and "mallory" in kept.note
    with pytest.raises(
        ValueError, match="unknown level of trust in 'mallory'.*" + ", ".join(LEVELS)
    ):
        Trust({"mallory": "friend"})


# Curation


def test_repeats_are_merged_into_the_best(store):
    first, talk, worse, other = (
        episode(1),
        episode(1, thought="hm"),
        episode(1, thought="oh", success=False, score=0.0),
        episode(1, steps=2),
    )
    store.add_many([talk]), store.add_many([worse, first, other, episode(5)])
    with store.writing() as connection:
        connection.execute("UPDATE trajectories SET added = 1.0 WHERE id = ?", [talk.id])
    for e in (first, talk, worse): credit(store, [e.id], 1.0, now=3.0)
    store.add_many([first, worse, talk], namespace="n")
    made = plan(store)
    assert (
        set(made.merged) == {(first.id, talk.id), (worse.id, talk.id)}
        and made.evicted == ()
        and len(store) == 5
    )
    assert carry_out(store, made) == 2 and store.find() == sorted(
        [talk.id, other.id, episode(5).id]
    )
    assert usage(store) == {talk.id: Use(3, 3.0, 3.0)} and store.find(namespace="n") == [
        talk.id
    ], "uses are inherited"
    assert plan(store).ids == ()


@pytest.mark.parametrize("policy, goes", [
    ("age", [0, 1, 2]), ("utility", [5, 6, 7]), ("success", [3, 4, 9])])
def test_policies(store, policy, goes):
    for i in range(10):
        store.add(episode(i, success=False if i in (3, 4) else True, steps=9 if i == 9 else 3))
        with store.writing() as connection:
            connection.execute(
                "UPDATE trajectories SET added = ? WHERE id = ?",
                [
                    float(i),
                    episode(i, success=False if i in (3, 4) else True, steps=9 if i == 9 else 3).id,
                ],
            )
    ids = {row.added: row.id for row in rows_of(store)}
    credit(store, [ids[i] for i in (5, 6, 7)], 0.0), credit(store, [ids[8]], 1.0)
    made = plan(store, 7, policy)
    assert sorted(i for i, id in ids.items() if id in made.ids) == goes and made.after == 7
    assert plan(store, 7, policy, keep=[ids[goes[0]]]).ids.count(ids[goes[0]]) == 0
    assert carry_out(store, made, scrub=True) == 3 and len(store) == 7


def test_coverage_levels_the_types(store):
    store.add_many([episode(i, type="a" if i < 20 else "b" if i < 25 else "c") for i in range(26)])
    gone = set(plan(store, 9, "coverage").ids)
    assert Counter(r.type[1] for r in rows_of(store) if r.id not in gone) == {
        "a": 4,
        "b": 4,
        "c": 1,
    }


def test_given_utilities_replace_the_noted_ones(store):
    store.add_many([episode(i) for i in range(4)])
    ids = store.find()
    assert (
        plan(store, 2, utilities={ids[0]: 0.9, ids[1]: 0.8, ids[2]: -0.5}).evicted[0][0] == ids[2]
    )


def test_room_is_made_for_several_episodes(store):
    cut = []
    for i in range(1000, 1130):
        store.add(made := episode(i))
        cut.append(make_room(store, 100, keep=[made.id]))
        assert len(store) <= 100 and made.id in store
    assert [n for n in cut if n] == [6] * 5
    with pytest.raises(ValueError, match="spare"): make_room(store, 100, spare=1)


def test_a_plan_is_refused_when_the_store_has_changed(store):
    store.add_many([episode(i) for i in range(5)])
    made = plan(store, 3)
    store.add(episode(7))
    with pytest.raises(StalePlan, match="has changed since this plan"):
        carry_out(store, made)
    assert len(store) == 6
    with pytest.raises(ValueError, match="unknown policy 'beauty'.* age, "):
        plan(store, 1, "beauty")
    with pytest.raises(ValueError, match="0 episodes or more"):
        plan(store, -1)


def test_curating_is_repeated_when_the_store_has_changed(store, monkeypatch):
    import exprag.memory.curation
    store.add_many([episode(i) for i in range(5)])
    hurried = iter([episode(8), episode(9)])
    def overtaken(*args, **how):
        made = plan(*args, **how)
        for one in hurried: store.add(one); break
        return made
    monkeypatch.setattr(exprag.memory.curation, "plan", overtaken)
    assert (
        curate(store, 3, policy="age", keep=[episode(0).id]) == 4
        and len(store) == 3
        and episode(0).id in store
    )


def test_namespaces_are_curated_alone(store):
    store.add_many([episode(i) for i in range(5)], namespace="a")
    store.add_many([episode(i) for i in range(5, 9)], namespace="b")
    assert carry_out(store, plan(store, 2, namespace="a")) == 3 and store.namespaces() == {
        "a": 2,
        "b": 4,
    }


def test_what_another_namespace_holds_stays_there_and_is_no_heir(store):
    one, talk = episode(1), episode(1, thought="a secret")
    store.add_many([one], namespace="a"), store.add_many([talk, episode(2)], namespace="b")
    assert plan(store).merged == (), "a would read what b thought"
    store.add_many([talk], namespace="a")
    (goes, stays), = plan(store, namespace="a").merged
    assert curate(store, 9, namespace="a") == 1 and store.namespaces() == {"a": 1, "b": 2}
    assert store.find(namespace="a") == [stays] and (goes in store) == (goes == talk.id)


rows = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from([None, 0, 1]),
        st.integers(1, 4),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    max_size=14,
).map(
    lambda values: [
        Row(f"{n:02}", ("w", t), ("w", t, n, "train"), s, k, float(a), Use(u, u / 2))
        for n, (t, s, k, a, u) in enumerate(values)
    ]
)


@settings(max_examples=200, deadline=None)
@given(rows, st.integers(0, 16), st.sampled_from(sorted(POLICIES)))
def test_leaving_agrees_with_the_plain_way(given_rows, count, policy):
    left, naive = list(given_rows), []
    while left and len(naive) < count:
        peers = Counter(r.type for r in left)
        worst = min(left, key=lambda r: (POLICIES[policy](r, peers[r.type]), r.added, r.id))
        left.remove(worst), naive.append(worst.id)
    assert [row.id for row, _ in leaving(given_rows, count, policy)] == naive


CURATOR = """
from exprag.memory.curation import carry_out, plan
from exprag.store import Store
with Store(sys.argv[1]) as store:
    made = plan(store, 40, "age")
    print("ready", flush=True)
    carry_out(store, made, scrub=sys.argv[2] == "scrub")
    print("done", flush=True)
"""


@pytest.mark.parametrize("rounds", FEW_OR_MANY)
def test_kills_in_the_middle_of_curating(tmp_path, rounds):
    chance, stopped = random.Random(rounds), set()
    twins = [episode(i, thought=t) for i in range(30) for t in (None, "x", "y")]
    for number in range(rounds):
        path = tmp_path / f"{number}.db"
        with Store(path) as store:
            store.add_many(twins)
            credit(store, [t.id for t in twins], 1.0)
            store.put_vectors("e", "goal", {t.id: np.ones(3) / 3 ** 0.5 for t in twins})
        rest = killed(CURATOR, path, chance.choice(["scrub", ""]), within=0.04, chance=chance)
        verdict = check(path, mend=True)
        assert verdict.ok and verdict.episodes in (90, 30), "all of the plan or nothing"
        with Store(path) as store:
            uses = usage(store)
            assert sum(u.uses for u in uses.values()) == 90 and set(uses) == set(
                store.find()
            ) == set(store.vector_ids("e", "goal"))
            assert "done" not in rest or len(store) == 30
        stopped.add(verdict.episodes)
    assert rounds < 100 or len(stopped) == 2, "both before and after were hit"


# Reports


def test_coverage_and_staleness(store):
    store.add_many(
        [episode(0), episode(4), replace(episode(1, actor="me"), world_version="2", success=False)]
    )
    table = coverage(store, [Task("w", "type-9", "1", "test"), Task("w", "type-0", "1", "test")])
    assert table.rows == (
        ("w", "type-9", "0", "0", "0", "0"),
        ("w", "type-1", "1", "1", "0", "1"),
        ("w", "type-0", "2", "2", "2", "1"),
    )
    assert coverage(store, namespace="none").rows == ()
    credit(store, [episode(0).id], 1.0)
    store.put_vectors(Letters.name, "goal", {episode(4).id: np.ones(26)})
    found = staleness(store, now=time.time() + 100 * 86400, versions={"w": "2"}, encoder=Letters())
    assert len(found["older than 90 days"]) == 3 and set(found["of another version"]) == {
        episode(0).id,
        episode(4).id,
    }
    assert (
        episode(0).id not in found["never used"]
        and len(found["never used"]) == 2
        and episode(4).id not in found["without a vector"]
    )
    assert not staleness(store, versions={"other": "9"})["of another version"]


def test_nearest_scores(store):
    store.add_many([episode(0), episode(1)])
    near = nearest_scores(
        Retriever(store, Letters()), [episode(0), replace(episode(2), goal="zzzz")], (0.0, 1.0)
    )
    assert near[1.0] == 1.0 > near[0.0] and nearest_scores(Retriever(store, Letters()), []) == {}
