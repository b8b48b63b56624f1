"""The approximate index: the interface and the ties of the exact one, its recall, and its file."""
import os
import random

import numpy as np
import pytest
from encoders import Letters
from faults import damaged, killed
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from exprag.memory.approximate import (
    ApproximateIndex, ApproximateRetriever, index_fault, read_index, vector_hashes, write_index)
from exprag.query import ExactIndex, Retriever
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory

MADE_FROM = {"encoder": "e", "key": "goal", "store": "s"}


def unit(array):
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def clumps(count, dim=32, goals=150, seed=0):
    rng = np.random.default_rng(seed)
    base = unit(np.random.default_rng(99).normal(size=(goals, dim)))
    noise = rng.normal(size=(count, dim)) * 0.08 * (rng.random(count) < 0.6)[:, None]
    return unit(base[np.minimum(rng.zipf(1.5, count) - 1, goals - 1)] + noise)


def names(count, seed=0):
    return sorted(f"{n:032x}" for n in np.random.default_rng(seed).choice(1 << 40, count, replace=False).tolist())


@pytest.fixture(scope="module")
def made():
    ids, keys = names(6000), clumps(6000)
    return ids, keys, ApproximateIndex(ids, keys), ExactIndex(ids, keys), clumps(200, seed=1)


def recall(index, exact, queries, n=10, allow=None):
    pairs = [(index.search(q, n, allow), exact.search(q, n, allow)) for q in queries]
    assert all(len(a) == len(b) and [h.rank for h in a] == list(range(1, len(a) + 1)) for a, b in pairs)
    return np.mean([sum(h.score >= b[-1].score - 1e-6 for h in a) / len(b) for a, b in pairs if b])


def test_recall_with_and_without_filters(made):
    ids, keys, index, exact, queries = made
    assert index.ivf.ntotal == len(np.unique(keys, axis=0)) < 6000 and index.nprobe < index.ivf.nlist
    assert recall(index, exact, queries) >= 0.98 and recall(index, exact, queries[:40], 50) >= 0.95
    chance = np.random.default_rng(2).random(6000)
    for share in (0.5, 0.02):
        assert recall(index, exact, queries, allow=frozenset(np.array(ids)[chance < share].tolist())) == 1.0, "few rows: compared one by one"


def test_found_scores_and_ties_are_those_of_the_exact_index(made):
    ids, keys, index, exact, queries = made
    for q in [*queries[:30], *keys[:50]]:
        found, right = index.search(q, 10), exact.search(q, 6000)
        truth = {h.id: h.score for h in right}
        assert all(h.score == pytest.approx(truth[h.id], abs=2e-6) for h in found)
        assert [(-h.score, h.id) for h in found] == sorted((-h.score, h.id) for h in found)
    popular = keys[np.argmax([len(exact.search(k, 1)) and (keys == k).all(1).sum() for k in keys[:50]])]
    assert index.search(popular, 40) == exact.search(popular, 40), "a large tie is whole and in order"


def test_edges(made):
    ids, keys, index, exact, queries = made
    assert index.search(queries[0], 0) == [] and index.search(queries[0], 5, []) == [] and index.search(queries[0], 5, ["0" * 32, ids[7]])[0].id == ids[7]
    assert len(index.search(queries[0], 6000)) == 6000 and index.search(queries[0], 10 ** 6) == index.search(queries[0], 6000)
    assert index.ids == ids and len(index) == 6000
    for count in (0, 1, 2, 50):
        small, right = ApproximateIndex(ids[:count], keys[:count]), ExactIndex(ids[:count], keys[:count])
        assert small.search(queries[0], 5) == right.search(queries[0], 5)
        small.add(ids[count:count + 3], keys[count:count + 3])
        assert len(small.search(queries[0], 99)) == count + 3


def test_vector_hashes():
    keys = clumps(500)
    assert len(np.unique(vector_hashes(keys))) == len(np.unique(keys, axis=0)) and (vector_hashes(keys) != 0).all()
    assert (vector_hashes(np.array([[0.0, 1.0]], np.float32)) == vector_hashes(np.array([[-0.0, 1.0]], np.float32))).all() and len(vector_hashes(keys[:0])) == 0


class Model(RuleBasedStateMachine):
    "Adding and removing in any order against an exact index made anew."
    pool, ids = clumps(60, dim=8, goals=12), names(60)

    def __init__(self):
        super().__init__()
        self.index, self.there = ApproximateIndex(self.ids[:20], self.pool[:20]), dict(zip(self.ids[:20], self.pool[:20]))

    @rule(which=st.sets(st.integers(0, 59), max_size=8))
    def add(self, which):
        new = [i for i in sorted(which) if self.ids[i] not in self.there]
        self.index.add([self.ids[i] for i in new], self.pool[new])
        self.there.update((self.ids[i], self.pool[i]) for i in new)
        if self.there:
            with pytest.raises(ValueError, match="already"):
                self.index.add([next(iter(self.there))], self.pool[:1])

    @rule(which=st.sets(st.integers(0, 59), max_size=30))
    def remove(self, which):
        gone = {self.ids[i] for i in which}
        assert self.index.remove([*gone, "f" * 32]) == len(gone & set(self.there))
        self.there = {id: v for id, v in self.there.items() if id not in gone}

    @rule(query=st.integers(0, 59), n=st.integers(1, 70), part=st.none() | st.sets(st.integers(0, 59)))
    def search(self, query, n, part):
        ids = sorted(self.there)
        exact = ExactIndex(ids, np.array([self.there[id] for id in ids], np.float32).reshape(-1, 8))
        allow = None if part is None else [self.ids[i] for i in part]
        self.index.nprobe = self.index.ivf.nlist  # everything is looked at: the answers must be equal
        assert self.index.search(self.pool[query], n, allow) == exact.search(self.pool[query], n, allow)

    @rule(again=st.just(None))
    def keep(self, again):
        import tempfile
        from pathlib import Path
        with tempfile.TemporaryDirectory() as folder:
            write_index(Path(folder) / "i", self.index, MADE_FROM)
            self.index, why = read_index(Path(folder) / "i", MADE_FROM, 1)
            assert why == ""

    @invariant()
    def sizes(self):
        assert self.index.ids == sorted(self.there) and len(self.index) == len(self.there)
        assert self.index.ivf.ntotal == len({v.tobytes() for v in self.there.values()})


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))


# Files


def test_file_round_trip_and_faults(made, tmp_path):
    ids, keys, index, _, queries = made
    path = tmp_path / "goals.index"
    write_index(path, index, MADE_FROM)
    again, why = read_index(path, MADE_FROM, 1)
    assert why == "" and all(again.search(q, 10) == index.search(q, 10) for q in queries[:50]) and again.ids == ids and again.nprobe == index.nprobe
    again.add(["f" * 32], queries[:1])
    assert again.search(queries[0], 1)[0].score == 1.0
    data = path.read_bytes()
    for at, broken in damaged(data, 30, data.index(b"\n", 20), random.Random(0)):
        path.write_bytes(broken)
        found, why = read_index(path, MADE_FROM, 1)
        assert (found, why) == (None, "the file was damaged"), f"byte {at} was changed, and it was not found"
        assert "damaged or cut short" in index_fault(path, set(ids), {"e"})
    path.write_bytes(data)
    assert index_fault(path, set(ids), {"e"}) == "" and "encoder e, of which" in index_fault(path, set(ids), {"other"})
    assert "holds 3 episodes that the store does not have" in index_fault(path, set(ids[3:]), {"e"})
    assert read_index(path, {**MADE_FROM, "store": "other"}, 1) == (None, "the store has changed")
    for name in ("encoder", "key"):
        with pytest.raises(ValueError, match=f"was made with {name}"):
            read_index(path, {**MADE_FROM, name: "other"}, 1)
    assert read_index(tmp_path / "none", MADE_FROM, 1) == (None, "there was no file")
    assert [p.name for p in tmp_path.iterdir()] == ["goals.index"]


def test_what_was_removed_is_not_in_the_file(tmp_path):
    keys = clumps(300)
    index = ApproximateIndex(names(300), keys)
    alone = next(i for i in range(300) if (keys == keys[i]).all(1).sum() == 1)
    write_index(tmp_path / "before", index, MADE_FROM)
    index.remove([index.ids[alone]])
    write_index(tmp_path / "after", index, MADE_FROM)
    assert [keys[alone].tobytes() in (tmp_path / name).read_bytes() for name in ("before", "after")] == [True, False]


def episode(i):
    word = "".join(chr(97 + (i * k) % 26) for k in (1, 3, 5, 7))
    return Trajectory(Task("w", "t", str(i), "train"), f"goal {word}", "", (Step("do", str(i)),), 1.0, True)


@pytest.fixture
def pair(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many(map(episode, range(1500)))
        large = ApproximateRetriever(store, Letters(), exact_below=500)
        yield store, large, Retriever(store, Letters())


def test_the_retriever_follows_the_store(pair):
    store, large, plain = pair
    agree = lambda: [large.search(episode(i), 5) == plain.search(episode(i), 5) for i in range(1490, 1520)]
    assert all(agree()) and isinstance(large._index, ApproximateIndex)
    first = large._index
    store.add_many(map(episode, range(1500, 1510)))
    for i in range(20): store.delete(episode(i).id)
    assert all(agree()) and large._index is first and len(large) == len(plain) == 1490
    store.add_many(map(episode, range(3000, 6000)))
    assert all(agree()) and len(large) == 4490
    large.index(store.find()[:100])
    assert isinstance(large._index, ExactIndex) and len(large) == 100


def test_few_keys_are_searched_exactly_and_need_no_file(pair, tmp_path):
    store, _, plain = pair
    few = ApproximateRetriever(store, Letters())
    assert few.search(episode(3), 5) == plain.search(episode(3), 5) and isinstance(few._index, ExactIndex)
    assert few.save(tmp_path / "i") is False and few.load(tmp_path / "i") == "rebuilt: so few keys are searched exactly"
    assert not (tmp_path / "i").exists()


def test_saving_and_loading_through_the_retriever(pair, tmp_path):
    store, large, plain = pair
    path = tmp_path / "i"
    large.save(path)
    assert large.load(path) == "loaded"
    store.add(episode(9999))
    assert large.load(path) == "rebuilt: the store has changed" and large.load(path) == "loaded"
    path.write_bytes(path.read_bytes()[:5000])
    assert large.load(path) == "rebuilt: the file was damaged"
    path.write_bytes(b"exprag index 2\n{}")  # of an earlier version
    assert large.load(path) == "rebuilt: the file was damaged" and large.search(episode(3), 5) == plain.search(episode(3), 5)
    with Store(tmp_path / "other.db") as other:
        other.add_many(map(episode, range(5000, 6000)))
        stranger = ApproximateRetriever(other, Letters(), exact_below=500)
        assert stranger.load(path) == "rebuilt: the store has changed" and {h.id for h in stranger.search(episode(3), 5)} <= set(other.find())


INDEXER = """
from test_approximate import *
with Store(sys.argv[1]) as store:
    large = ApproximateRetriever(store, Letters(), exact_below=100)
    print("ready", flush=True)
    number = 0
    while True:
        large.save(sys.argv[1] + ".index")
        store.add(episode(10_000 + number))
        print("saved", flush=True)
        number += 1
"""


def kills_while_indexing(folder, rounds, seed):
    chance, path = random.Random(seed), folder / "bank.db"
    with Store(path) as store: store.add_many(map(episode, range(400)))
    outcomes = set()
    for _ in range(rounds):
        killed(INDEXER, path, within=0.12, chance=chance)
        with Store(path) as store:
            large, plain = ApproximateRetriever(store, Letters(), exact_below=100), Retriever(store, Letters())
            outcomes.add(large.load(str(path) + ".index"))
            for i in (3, 77, 10_000): assert large.search(episode(i), 5) == plain.search(episode(i), 5), "no wrong answer after a kill"
    assert outcomes <= {"loaded", "rebuilt: there was no file", "rebuilt: the store has changed"}, "a half-written file was never seen"
    from exprag.memory.maintenance import check
    for part in folder.glob("*.part"): os.utime(part, (1, 1))
    assert check(path, mend=True).ok and not list(folder.glob("*.part"))


def test_kills_in_the_middle_of_indexing(tmp_path):
    kills_while_indexing(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_a_hundred_kills_in_the_middle_of_indexing(tmp_path):
    kills_while_indexing(tmp_path, 100, seed=1)
