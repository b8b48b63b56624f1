"""What is kept with the counter of changes is never wrong: kills, several processes, undone transactions, old programs."""
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cases_live import in_a_read_only_place, shelf  # noqa: F401

import exprag.store
import exprag.words
from exprag.memory.chat_memory import ChatMemory, ChatMemoryOptions
from exprag.memory.hybrid import FusedRetriever, WordRetriever
from exprag.memory.maintenance import check, erase
from exprag.store import Store, id_set_hash
from exprag.trajectory import Task, Trajectory
from exprag.words import _telling, text_ids


def episode(n, goal=None): return Trajectory(Task("w", "t", str(n), "train"), goal or f"lamp number{n} of {n % 7}", "")
def asks(goal): return Trajectory(Task("w", "t", "asked", "test"), goal, "")


@pytest.fixture
def eager(monkeypatch): monkeypatch.setattr(exprag.store, "_SLOW_TO_HASH", 0)


def right(path):
    "Whether a new process would get what is there: the fingerprint, and the words of every episode."
    with Store(path) as store, sqlite3.connect(path) as raw:
        ids = [id for id, in raw.execute("SELECT id FROM trajectories ORDER BY id")]
        assert store.fingerprint() == id_set_hash(ids)
        words = WordRetriever(store)
        found = {h.id for h in words.search(asks("lamp"), len(ids) + 1)}
        assert found == set(ids) == set(text_ids(store, "goal"))


def test_a_new_process_does_not_hash_again(tmp_path, monkeypatch):
    with Store(tmp_path / "m.db") as store:
        store.add_many(map(episode, range(1500)))
        mark = store.fingerprint()
        WordRetriever(store).index()
    monkeypatch.setattr(exprag.store, "id_set_hash", None)
    monkeypatch.setattr(WordRetriever, "_missing", None)
    with Store(tmp_path / "m.db") as store:
        assert store.fingerprint() == mark and WordRetriever(store).index() == 0
        assert WordRetriever(store).search(asks("number3"))[0].id == episode(3).id
        store.delete(episode(3).id)
        with pytest.raises(TypeError): store.fingerprint()
        with pytest.raises(TypeError): WordRetriever(store).index()


def test_few_episodes_are_not_worth_a_write(tmp_path):
    with Store(tmp_path / "m.db") as store:
        store.add_many(map(episode, range(10)))
        store.fingerprint()
        assert store.derived("fingerprint", store.changes()) is None


def test_an_older_program_advances_the_counter_too(tmp_path, eager):
    "Its triggers are in the file; only who takes them away could deceive."
    with Store(tmp_path / "m.db") as store:
        store.add_many(map(episode, range(20)))
        store.fingerprint(), WordRetriever(store).index()
    with sqlite3.connect(tmp_path / "m.db") as raw:
        raw.execute("PRAGMA foreign_keys = ON")
        raw.execute("DELETE FROM trajectories WHERE variation < '15'")
        kept = raw.execute("SELECT * FROM trajectories").fetchone()
        raw.execute("DELETE FROM trajectories WHERE id = ?", kept[:1])
        raw.execute(f"INSERT OR REPLACE INTO trajectories VALUES ({', '.join('?' * len(kept))})", kept)
        raw.execute(f"INSERT OR REPLACE INTO trajectories VALUES ({', '.join('?' * len(kept))})", kept)
    raw.close()
    right(tmp_path / "m.db")
    assert check(tmp_path / "m.db").ok


def test_an_undone_change_is_no_change(tmp_path, eager):
    with Store(tmp_path / "m.db") as store:
        store.add_many(map(episode, range(5)))
        before, words = store.fingerprint(), WordRetriever(store)
        words.index()
        with pytest.raises(KeyError), store.writing() as connection:
            store.add(episode(7)), words.follow([episode(7)])
            assert store.fingerprint() != before and words.search(asks("number7"))
            connection.execute("DELETE FROM trajectories WHERE id = ?", [episode(1).id])
            raise KeyError
        assert store.fingerprint() == before and not words.search(asks("number7"))
        store.add(episode(8))  # as many changes as were undone
        store.add(episode(9))
        assert words.search(asks("number8")) and words.search(asks("number9"))
    right(tmp_path / "m.db")


def test_a_locked_store_is_read_without_waiting(tmp_path, eager):
    with Store(tmp_path / "m.db") as store, Store(tmp_path / "m.db") as other:
        store.add_many(map(episode, range(5)))
        with other.writing():
            begun = time.monotonic()
            assert store.fingerprint() == id_set_hash(store.find()) and time.monotonic() - begun < 5
            assert store.derived("fingerprint", store.changes()) is None
            assert store.row("PRAGMA busy_timeout") == (30_000,)


def test_a_store_that_cannot_be_written(shelf, eager, monkeypatch):  # noqa: F811
    folder, _ = shelf
    with Store(folder / "s.db") as store:
        store.add_many(map(episode, range(20)))
        mark, _ = store.fingerprint(), WordRetriever(store).index()
        store.row("PRAGMA wal_checkpoint(TRUNCATE)")
    monkeypatch.setattr(WordRetriever, "_missing", None)
    def job():
        with Store(folder / "s.db") as store:
            return [store.read_only, store.fingerprint(), len(WordRetriever(store).search(asks("lamp")))]
    assert in_a_read_only_place(folder, job) == [True, mark, 20]


WRITER = """
import random, sys
from test_changes import episode, asks
import exprag.store
from exprag.memory.hybrid import WordRetriever
from exprag.store import Store
exprag.store._SLOW_TO_HASH = 0
chance = random.Random(int(sys.argv[2]))
with Store(sys.argv[1]) as store:
    words = WordRetriever(store)
    print("begun", flush=True)
    while True:
        some = [episode(chance.randrange(60)) for _ in range(chance.randrange(1, 4))]
        kind = chance.randrange(6)
        if kind == 0: store.add_many(some)
        elif kind == 1:
            with store.writing(): store.add_many(some), words.follow(some)
        elif kind == 2: store.delete(some[0].id)
        elif kind == 3: store.fingerprint()
        elif kind == 4: words.index()
        elif some[0].id in store and (found := words.search(asks(some[0].goal), 60)) is not None:
            again = {h.id for h in found}  # another may have deleted it since
            if some[0].id not in again and some[0].id in store:
                with store.writing():  # nobody changes anything now
                    there = some[0].id in store
                    assert not there or some[0].id in {h.id for h in words.search(asks(some[0].goal), 60)}, "lost"
"""


@pytest.mark.parametrize("seed", range(3))
def test_writers_are_killed_at_any_moment(tmp_path, seed):
    path, chance = tmp_path / "m.db", random.Random(seed)
    Store(path).close()
    about = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])}
    for round_ in range(4):
        several = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(100 * seed + 10 * round_ + n)], env=about,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for n in range(3)]
        for p in several: assert p.stdout.readline() == "begun\n", p.stderr.read()
        time.sleep(chance.uniform(0.2, 0.8))
        for p in several: p.send_signal(signal.SIGKILL)
        for p in several:
            _, errors = p.communicate()
            assert p.returncode == -9, errors
        right(path)
    assert check(path).ok


steps = st.lists(st.tuples(st.sampled_from(["add", "follow", "delete", "erase", "index", "print", "search", "reopen", "undo"]),
                           st.integers(0, 8)), max_size=25)


@settings(max_examples=40, deadline=None)
@given(steps)
def test_in_any_order(tmp_path_factory, several):
    exprag.store._SLOW_TO_HASH, before = 0, exprag.store._SLOW_TO_HASH
    path = tmp_path_factory.mktemp("order") / "m.db"
    store, other = Store(path), Store(path)
    words, theirs = WordRetriever(store), WordRetriever(other)
    model = set()
    try:
        for kind, n in several:
            made = episode(n)
            if kind == "add": other.add(made), model.add(n)
            elif kind == "delete": other.delete(made.id), model.discard(n)
            elif kind == "erase": erase(store, [made.id]), model.discard(n)
            elif kind == "index": (words if n % 2 else theirs).index()
            elif kind == "print": (store if n % 2 else other).fingerprint()
            elif kind == "reopen": store.close(); store = Store(path); words = WordRetriever(store)
            elif kind == "follow":
                with store.writing(): store.add(made), words.follow([made])
                model.add(n)
            elif kind == "undo":
                with pytest.raises(KeyError), store.writing():
                    store.add(made), words.follow([made]), words.search(asks("lamp")), store.fingerprint()
                    raise KeyError
            wanted = sorted(episode(m).id for m in model)
            if kind in ("print", "search", "undo"):
                for s, w in ((store, words), (other, theirs)):
                    assert s.fingerprint() == id_set_hash(wanted)
                    assert sorted(h.id for h in w.search(asks("lamp"), 20)) == wanted
    finally:
        exprag.store._SLOW_TO_HASH = before
        store.close(), other.close()


def test_who_records_keeps_the_index_whole(tmp_path, monkeypatch):
    "Recording in threads and reading in another process, nobody has to look for what is missing."
    def talk(n): return [{"role": "user", "content": f"Turn on lamp {n}."}, {"role": "assistant", "content": f"press {n}"}]
    with Store(tmp_path / "m.db") as store:
        memory = ChatMemory(store, FusedRetriever([WordRetriever(store)]), "me", ChatMemoryOptions())
        memory.recall(talk(0)[:1])
        monkeypatch.setattr(WordRetriever, "_missing", None)
        with ThreadPoolExecutor(4) as pool:
            def live(n): return memory.augment(talk(n)[:1]) and memory.record(talk(n), True)
            assert len({e.id for e in pool.map(live, range(40))}) == 40
        assert len(memory.recall([{"role": "user", "content": "Turn on lamp 7."}])) == 2
    with Store(tmp_path / "m.db") as store:
        assert WordRetriever(store).search(asks("7"))[0].id in store


def test_another_process_has_rewritten_the_file(tmp_path):
    "Erasing writes the file anew; SQLite 3.40 then knew no table in the next transaction of others."
    with Store(tmp_path / "m.db") as store, Store(tmp_path / "m.db") as other:
        store.add(episode(1))
        erase(store, [episode(1).id])
        assert other.add(episode(2)) and store.find() == [episode(2).id]


def test_words_of_every_text_are_not_looked_for(tmp_path, monkeypatch):
    "With many texts, a word of more than half of them counts for a millionth: the order is the one that BM25 gives."
    with Store(tmp_path / "m.db") as store:
        names = "red green blue old new".split()
        store.add_many(episode(n, f"mend the {names[n % 5]} lamp of house{n % 40} in the hall") for n in range(1200))
        words, asked = WordRetriever(store), asks("mend the blue lamp of house7 in the hall, please")
        def same(n):
            quick = words.search(asked, n)
            monkeypatch.setattr(exprag.words, "_MANY_TEXTS", 10 ** 9)
            slow = words.search(asked, n)
            monkeypatch.undo()
            return quick, slow
        words.index()
        assert _telling(store, '"mend" OR "blue" OR "the"') == '"blue"'
        quick, slow = same(60)
        assert [h.id for h in quick] == [h.id for h in slow] and max(abs(a.score - b.score) for a, b in zip(quick, slow)) < 1e-4
        quick, slow = same(500)  # more than share a telling word: the latest of the others follow
        assert len({h.id for h in quick}) == len(slow) == 500 and quick[-1].score == 0 < slow[-1].score < 1e-4
        only = words.search(asks("mend the lamp"), 3)
        assert [h.score for h in only] == [0, 0, 0] and all(h.id in store for h in only), "all say the same"
        assert [h.id for h in words.search(asks("the"), 2, allow=[only[1].id, only[2].id])] == [only[1].id, only[2].id]
