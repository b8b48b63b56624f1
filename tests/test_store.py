"""The store: what was acknowledged is kept, added once, never mixed up; views show what they promise."""
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exprag.store import VIEWS, Added, Database, Store, StoreError, UnknownTrajectory, actions, chat, cue, id_set_hash, view
from exprag.trajectory import Step, Task, Trajectory


def episode(i=0, type="boil", fold="train", score=100.0, success=True, variation=None, steps=3, **more):
    return Trajectory(
        Task("scienceworld", type, str(i if variation is None else variation), fold), f"Your task is to {type} thing {i}.", "This room is called the hall. In it, you see:\n\ta door",
        tuple(Step(f"do {i} {j}", f"Thing {j} is done. More text here.") for j in range(steps)), score, success, "1.2.3", {"simplification": "easy"}, {"actor": "expert"}, **more)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        yield store


def test_round_trip_and_idempotence(store):
    many = [episode(i) for i in range(5)]
    assert store.add_many(many) == Added(5, 0) and store.add_many(iter(many)) == (0, 5)
    assert store.add(episode(9)) and not store.add(replace(episode(9), provenance={"actor": "somebody else"}))
    assert store.get(episode(9).id).provenance == {"actor": "expert"}, "the first provenance stays"
    assert [store.get(t.id) for t in many] == many
    assert [t.id for t in store] == sorted(t.id for t in [*many, episode(9)]) == store.find() and len(store) == 6
    assert episode(3).id in store and "0" * 32 not in store


def test_iteration_goes_over_pages(store):
    store.add_many(episode(i, steps=1) for i in range(450))
    assert [t.id for t in store] == store.find() and len(store) == 450


def test_unknown_id_is_a_key_error_with_a_way_out(store):
    with pytest.raises(KeyError) as error:
        store.get("f" * 32)
    assert isinstance(error.value, UnknownTrajectory) and "find() lists" in str(error.value) and "f" * 32 in str(error.value)


def test_find_and_has_task(store):
    store.add_many([episode(0), episode(1, fold="dev"), episode(2, "melt"), episode(3, "melt", success=False, score=-100), episode(4, success=None, score=None)])
    ids = lambda *eps: sorted(e.id for e in eps)
    assert store.find(types=["boil"]) == ids(episode(0), episode(1), episode(4))
    assert store.find(folds=["dev"]) == [episode(1).id] and store.find(folds=[]) == []
    assert store.find(success=False) == [store.get(i).id for i in store.find(success=False)] and len(store.find(success=False)) == 1
    assert store.find("alfworld") == [] and len(store.find("scienceworld", ["boil", "melt"], ["train"], True)) == 2
    assert store.has_task(episode(0).task) and store.has_task(replace(episode(0).task, fold="test")) and not store.has_task(replace(episode(0).task, variation="77"))
    assert store.types("scienceworld") == ["boil", "melt"] and store.census()["scienceworld", "melt", "train"] == 2
    with pytest.raises(TypeError, match="give a list"):
        store.find(types="boil")


@pytest.mark.parametrize("change", [{"score": 50.0}, {"success": False}, {"task": replace(episode(0).task, fold="test")}])
def test_contradicting_outcome_is_refused_and_the_batch_undone(store, change):
    store.add(episode(0))
    with pytest.raises(StoreError, match="was offered again with"):
        store.add_many([episode(1), replace(episode(0), **change)])
    assert store.find() == [episode(0).id], "all or nothing"
    with pytest.raises(StoreError, match="was offered again with"):
        store.add_many([episode(2), replace(episode(2), **({"score": 1.0} if "task" in change else change), **({} if "task" not in change else {}))])


def test_missing_outcome_is_filled_in(store):
    unfinished = replace(episode(0), score=None, success=None)
    assert store.add(unfinished) and not store.add(episode(0))
    assert store.get(episode(0).id) == episode(0) and store.find(success=True) == [episode(0).id]
    assert not store.add(unfinished) and store.get(episode(0).id).score == 100.0, "knowing less changes nothing"


def test_a_partial_outcome_never_wipes_a_known_one(store):
    store.add(replace(episode(0), score=None))
    store.add(replace(episode(0), success=None))
    kept = store.get(episode(0).id)
    assert kept.success is True and kept.score == 100.0 and store.find(success=True) == [kept.id]


def test_delete_takes_vectors_with_it(store):
    store.add_many([episode(0), episode(1)])
    store.put_vectors("e", "goal", {episode(i).id: np.full(3, i, np.float32) for i in (0, 1)})
    assert store.delete(episode(0).id) and not store.delete(episode(0).id)
    assert store.vector_ids("e", "goal") == [episode(1).id]
    store.add(episode(0))
    assert store.vector_ids("e", "goal") == [episode(1).id], "no ghost vector comes back"


def test_vectors_are_filed_under_encoder_and_key(store):
    store.add_many(episode(i) for i in range(4))
    ids = store.find()
    given = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    assert store.put_vectors("a", "goal", dict(zip(ids, given))) == 4
    got, array = store.get_vectors("a", "goal")
    assert got == ids and array.dtype == np.float32 and (array == given).all() and array.flags.writeable
    got, array = store.get_vectors("a", "goal", [ids[2], ids[0], "x"])
    assert got == [ids[0], ids[2]] and (array == given[[0, 2]]).all()
    for encoder, key in (("b", "goal"), ("a", "other")):
        got, array = store.get_vectors(encoder, key)
        assert got == [] and array.shape == (0, 0)
    store.put_vectors("a", "goal", {ids[0]: np.zeros(5)})
    assert (store.get_vectors("a", "goal", ids[:1])[1] == 0).all()
    assert store.put_vectors("a", "goal", {"0" * 32: np.zeros(5)}) == 0
    for bad in (np.zeros((2, 2)), np.array([np.nan])):
        with pytest.raises(ValueError, match="finite and of one length"):
            store.put_vectors("a", "goal", {ids[0]: bad})


def test_fingerprint_is_the_set_of_ids(tmp_path):
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b, Store(tmp_path / "a.db") as other:
        a.add_many([episode(0), episode(1)])
        b.add_many([replace(episode(1), provenance={}), episode(0)])
        first = a.fingerprint()
        assert first == b.fingerprint() == id_set_hash(a.find()) == other.fingerprint()
        other.add(episode(2))
        assert a.fingerprint() == other.fingerprint() != first, "another connection's change is seen"
        a.delete(episode(2).id)
        assert other.fingerprint() == first


def test_changed_record_is_noticed(store):
    store.add(episode(0))
    with store.writing() as connection:
        connection.execute("UPDATE trajectories SET record = replace(record, 'do 0 0', 'do 0 9')")
    with pytest.raises(StoreError, match="was changed from outside"):
        store.get(episode(0).id)


def test_wrong_files(tmp_path):
    (tmp_path / "text.db").write_text("hello, this is no database at all" * 50)
    with pytest.raises(StoreError, match="text.db cannot be opened as a store"):
        Store(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t(x)")
    other.commit(), other.close()
    with pytest.raises(StoreError, match="not an exprag store"):
        Store(tmp_path / "other.db")
    Store(tmp_path / "future.db").close()
    raw = sqlite3.connect(tmp_path / "future.db")
    raw.execute("PRAGMA user_version = 99")
    raw.commit(), raw.close()
    with pytest.raises(StoreError, match="has schema 99 and this release knows schema 1.*upgrade"):
        Store(tmp_path / "future.db")
    with pytest.raises(StoreError, match="is not there"):
        Store(tmp_path / "typo.db", create=False)
    with pytest.raises(StoreError):
        Store(tmp_path)  # a folder
    with pytest.raises(TypeError, match="Trajectory values"):
        Store(tmp_path / "new.db").add({"goal": "x"})


def test_closed_store_says_so(tmp_path):
    store = Store(tmp_path / "a.db")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        len(store)


def test_settings_of_the_promise(store):
    with store.reading() as connection:
        assert [connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("journal_mode", "synchronous", "foreign_keys")] == ["wal", 2, 1]


def test_disk_full_is_an_error_and_loses_nothing(store):
    store.add(episode(0))
    with store.reading() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreError, match="full; this change was undone"):
        store.add_many(episode(i, steps=200) for i in range(1, 50))
    with store.reading() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    assert store.find() == [episode(0).id] and store.add(episode(1))


def test_threads_share_one_store(store):
    def work(k):
        for i in range(20):
            store.add(episode(20 * k + i, steps=1))
            assert store.get(episode(20 * k + i, steps=1).id)

    threads = [threading.Thread(target=work, args=[k]) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(store) == 80


def in_child(store, queue):
    queue.put((len(store), store.add(episode(1000 + os.getpid()))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_store_travels_to_other_processes(store, method):
    store.add(episode(0))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=in_child, args=[store, queue]) for _ in range(2)]
    [c.start() for c in children]
    answers = [queue.get(timeout=60) for _ in children]
    [c.join() for c in children]
    assert all(added for _, added in answers) and len(store) == 3 and store.add(episode(1))


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from test_store import episode
from exprag.store import Store
first, batch = int(sys.argv[2]), int(sys.argv[4])
with Store(sys.argv[1]) as store:
    print("ready", flush=True)
    for start in range(first, first + 100000, batch):
        ids = [episode(i, steps=5).id for i in range(start, start + batch)]
        store.add_many([episode(i, steps=5) for i in range(start, start + batch)], batch=batch)
        print(*ids, flush=True)
"""


def writer(path, first, batch):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first), os.path.dirname(__file__), str(batch)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def kill_rounds(path, rounds, seed):
    chance, acknowledged, known = random.Random(seed), set(), 0
    for number in range(rounds):
        batch = chance.choice([1, 7])
        process = writer(path, 1_000_000 * number, batch)
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        lines = process.stdout.read().split("\n")
        assert process.wait() == -signal.SIGKILL
        for line in lines[:-1]:  # a last line without its end may be cut
            acknowledged.update(line.split())
        with Store(path) as store:
            ids = set(store.find())
            assert acknowledged <= ids
            assert (len(ids) - known) % batch == 0, "half a batch was kept"
            known = len(ids)
            with store.reading() as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    with Store(path) as store:
        assert len(list(store)) == known
    return len(acknowledged)


def test_kill_in_the_middle_of_adding_loses_nothing(tmp_path):
    assert kill_rounds(tmp_path / "bank.db", 6, seed=0) > 0


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    assert kill_rounds(tmp_path / "bank.db", 100, seed=1) > 100


def test_two_writers_and_a_reader_at_once(tmp_path):
    path = tmp_path / "bank.db"
    processes = [writer(path, 0, 1), writer(path, 50, 1)]  # they overlap: both add the same later episodes
    seen = [0]
    with Store(path) as store:
        deadline = time.monotonic() + 20
        while seen[-1] < 100 and time.monotonic() < deadline:
            seen.append(len(store))
            for id in store.find()[:3]:
                store.get(id)
            time.sleep(0.02)
        for process in processes:
            process.kill()
        written = [set(process.stdout.read().split()) for process in processes]
        assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2, "neither writer failed"
        assert seen == sorted(seen) and seen[-1] >= 100
        kept = set(store.find())
    # a last id may be cut short by the kill
    assert all({i for i in ids if len(i) == 32} <= kept for ids in written)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("adfg"), st.integers(0, 6)), max_size=25))
def test_behaves_like_a_dict(tmp_path_factory, moves):
    model = {}
    with Store(tmp_path_factory.mktemp("s") / "bank.db") as store:
        for move, i in moves:
            e = episode(i, steps=1)
            if move == "a":
                assert store.add(e) == (e.id not in model)
                model[e.id] = e
            elif move == "d":
                assert store.delete(e.id) == (model.pop(e.id, None) is not None)
            elif move == "f":
                assert store.find() == sorted(model) and store.fingerprint() == id_set_hash(sorted(model))
            elif e.id in model:
                assert store.get(e.id) == e
            else:
                with pytest.raises(KeyError):
                    store.get(e.id)
        assert {t.id: t for t in store} == model


# Views


def test_chat_view_is_the_whole_chat():
    messages = json.loads(chat(episode(0)))
    assert [m["content"] for m in messages if m["role"] == "assistant"] == list(episode(0).actions)
    assert episode(0).goal in messages[0]["content"] and episode(0).steps[-1].observation in messages[-1]["content"]


def test_actions_view():
    assert actions(episode(0, steps=2)) == (
        "Goal: Your task is to boil thing 0.\nStart | This room is called the hall.\n> do 0 0 | Thing 0 is done.\n> do 0 1 | Thing 1 is done.")
    bare = Trajectory(Task("w", "t", "0", "train"), "g", "", (Step("look", ""),))
    assert actions(bare) == "Goal: g\nStart\n> look"


@given(st.text(max_size=200), st.integers(1, 12))
def test_cue_is_a_beginning_and_short(text, words):
    short = cue(text, words)
    line = " ".join(text.split())
    assert "\n" not in short and len(short.split(" ")) <= words
    assert line.startswith(short) or (short.endswith("...") and line.startswith(short[:-3]))


def test_views_have_names():
    assert view("actions") is actions and set(VIEWS) >= {"chat", "actions"}
    with pytest.raises(KeyError, match="there are chat, actions"):
        view("nonsense")


def test_import_is_light():
    code = "import sys, exprag.store, exprag.query, exprag.select; print([m for m in ('torch', 'transformers', 'faiss', 'sentence_transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
