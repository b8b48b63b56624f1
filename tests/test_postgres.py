"""A store on a PostgreSQL server: what holds of a file holds there, for many writers, bound roles, and a server that is killed."""
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_namespaces
import test_store
from encoders import Letters, WordEncoder
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_store import episode

psycopg = pytest.importorskip("psycopg", reason="needs the extra: pip install 'exprag[postgres]'")
pytest.importorskip("pgserver", reason="needs the extra `dev`, which brings a server")

from exprag.cli import main  # noqa: E402
from exprag.memory import postgres_server  # noqa: E402
from exprag.memory.chat_memory import ChatMemory, ChatMemoryOptions  # noqa: E402
from exprag.memory.curation import Trust, coverage, curate, let_in, plan, rows_of, shut_out, staleness  # noqa: E402
from exprag.memory.hybrid import FusedRetriever, WordRetriever  # noqa: E402
from exprag.memory.in_episode import PlaceRetriever  # noqa: E402
from exprag.memory.maintenance import erase, erase_namespace, finish_erasure  # noqa: E402
from exprag.memory.postgres import LocalServer, PostgresRetriever, PostgresStore, copy_store  # noqa: E402
from exprag.memory.postgres_server import KEYS, MIGRATIONS, Address, bind  # noqa: E402
from exprag.memory.utility import credit, usage  # noqa: E402
from exprag.query import Retriever  # noqa: E402
from exprag.select import top_k  # noqa: E402
from exprag.store import Store, StoreError, UnknownTrajectory, id_set_hash  # noqa: E402
from exprag.trajectory import Step, Task, Trajectory  # noqa: E402
from exprag.words import Filter, match, put_texts  # noqa: E402

OPTIONS = ChatMemoryOptions(trust=Trust(unknown="unverified"), stages=(top_k(3),))
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def server():
    with LocalServer("fsync=off") as server: yield server  # a power cut is not among the tests


def fresh(server, role="postgres"): return server.address(f"s{next(NUMBERS)}", role)


@pytest.fixture
def store(server):
    with Store(fresh(server)) as store: yield store


def raw(store, sql, *values):
    with psycopg.connect(**store.address.parts()[0], autocommit=True) as connection:
        connection.execute(f"SET search_path = {store.schema}, public")
        done = connection.execute(sql, values or None)
        return done.fetchall() if done.description else None


def user(text): return {"role": "user", "content": text}
def agent(text): return {"role": "assistant", "content": text}
def asks(goal): return Trajectory(Task("w", "t", "asked", "test"), goal, "")
def says(goal, n=0): return Trajectory(Task("w", "t", f"{goal[:20]} {n}".replace("/", ""), "train"), goal, "")


# What holds of a file: the same tests


def of_a_file(name): return pytest.param(getattr(test_store, name), id=name)


@pytest.mark.parametrize("test", list(map(of_a_file, (
    "test_round_trip_and_idempotence", "test_an_episode_whose_extra_is_named_like_its_record_is_read_back", "test_iteration_goes_over_pages",
    "test_unknown_id_is_a_key_error_with_a_way_out", "test_find_and_has_task", "test_missing_outcome_is_filled_in", "test_a_partial_outcome_never_wipes_a_known_one",
    "test_delete_takes_vectors_with_it", "test_vectors_are_filed_under_encoder_and_key", "test_changed_record_is_noticed", "test_what_is_no_trajectory_is_refused",
    "test_threads_share_one_store", "test_who_finishes_an_episode_answers_for_it", "test_namespaces_see_their_own", "test_an_outcome_without_an_author_does_not_wipe_the_author"))))
def test_holds_as_of_a_file(store, test): test(store)


@pytest.mark.parametrize("change", [{"score": 50.0}, {"success": False}, {"task": replace(episode(0).task, fold="test")}])
def test_contradictions_are_refused_as_of_a_file(store, change): test_store.test_contradicting_outcome_is_refused_and_the_batch_undone(store, change)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_travels_to_other_processes(store, method): test_store.test_store_travels_to_other_processes(store, method)


def test_words_find_and_follow(store): test_store.test_words_find_and_follow(store)


class Model(test_store.Model):
    "The same machine as of a file, of two connections to a schema."
    server = None

    def __init__(self):
        super().__init__()
        for store in self.stores: store.close()
        self.path = fresh(self.server)
        self.stores = [Store(self.path), Store(self.path)]


@pytest.fixture(scope="module")
def of_machine(server): Model.server = server


@pytest.mark.usefixtures("of_machine")
class TestModel(Model.TestCase):
    settings = settings(max_examples=6, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=30, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate), suppress_health_check=list(HealthCheck))
@given(st.lists(test_store.anything, max_size=4))
def test_any_episode_is_kept_as_in_a_file_or_refused_with_a_reason(store, some):
    def told(store, one):
        try: return store.add(one)
        except StoreError as error: return str(error).replace(str(store.path), "")
    def columns(store): return store.rows("SELECT id, world, type, variation, fold, success, score, steps, record, author FROM trajectories ORDER BY id")
    with Store(Path(tempfile.mkdtemp(), "m.db")) as file:
        copy_store(store, file)
        for one in some:
            if "NUL" not in (said := str(told(store, one))): assert said == str(told(file, one))
        assert columns(store) == columns(file) and [t.to_dict() for t in store] == [t.to_dict() for t in file]


# The schema


def test_many_who_open_a_new_schema_at_once(server):
    address = fresh(server)
    def work(_):
        with Store(address) as store: return store.add(episode(1)), store.row("SELECT value FROM state WHERE name = 'schema'")
    with ThreadPoolExecutor(6) as pool: made = list(pool.map(work, range(6)))
    assert sorted(a for a, _ in made) == [False] * 5 + [True] and {v for _, v in made} == {(str(len(MIGRATIONS)),)}


def test_an_older_schema_is_lifted_and_a_newer_one_refused(server, monkeypatch):
    address = fresh(server)
    with monkeypatch.context() as patched:
        patched.setattr(postgres_server, "MIGRATIONS", MIGRATIONS[:1])
        with Store(address) as old:
            old.add_many([episode(1), episode(2)], namespace="a")
            assert old.row("SELECT value FROM state WHERE name = 'schema'") == ("1",) and raw(old, "SELECT to_regclass('bindings')") == [(None,)]
    with Store(address) as store:
        assert store.row("SELECT value FROM state WHERE name = 'schema'") == ("2",) and store.find(namespace="a") == sorted([episode(1).id, episode(2).id])
        assert store.rows("SELECT * FROM bindings") == [] and store.get(episode(1).id) == episode(1)
        raw(store, "UPDATE state SET value = '99' WHERE name = 'schema'")
    with pytest.raises(StoreError, match="has schema 99 and this release knows schema 2.*upgrade"): Store(address)


def test_a_failed_migration_changes_nothing(server, monkeypatch):
    address = fresh(server)
    Store(address).close()
    monkeypatch.setattr(postgres_server, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE more(x integer); SELECT 1 / 0;"))
    with pytest.raises(StoreError, match="division by zero"): Store(address)
    monkeypatch.setattr(postgres_server, "MIGRATIONS", MIGRATIONS)
    with Store(address) as store: assert raw(store, "SELECT to_regclass('more')") == [(None,)]


def test_wrong_places(server, tmp_path):
    with pytest.raises(StoreError, match="is not there; check the address"): Store(fresh(server), create=False)
    with pytest.raises(StoreError, match="cannot be opened as a store.*whether the database is there"): Store(f"postgresql://postgres@/nowhere?host={server.folder}")
    with pytest.raises(StoreError, match="schema 'A b': expected"): Store(f"postgresql://postgres@/postgres?host={server.folder}&schema=A%20b")
    with psycopg.connect(f"postgresql://postgres@/postgres?host={server.folder}", autocommit=True) as other: other.execute("CREATE SCHEMA taken; CREATE TABLE taken.t(x integer)")
    with pytest.raises(StoreError, match="has tables, but is not an exprag store"): Store(server.address("taken"))
    store = Store(fresh(server))
    assert type(store) is PostgresStore and isinstance(store, Store) and type(Store(tmp_path / "postgres.db")) is Store
    store.close()
    with pytest.raises(StoreError, match="was closed"): store.find()


def test_what_is_sqlites_own_says_so(store):
    with pytest.raises(StoreError, match="PRAGMA is SQLite's.*exprag copy"): store.row("PRAGMA integrity_check")
    with store.writing() as connection, pytest.raises(StoreError, match="no table more, and makes none"): connection.execute("CREATE TABLE IF NOT EXISTS more(x)")
    with pytest.raises(StoreError, match="character NUL"): store.add_many([episode(1)], namespace="a\0b")


# Transactions


def test_a_change_happens_whole_or_not(store):
    with pickle.loads(pickle.dumps(store)) as other:
        def jobs(): return [job for job, in other.rows("SELECT job FROM unfinished ORDER BY job")]
        with pytest.raises(KeyError), store.writing() as connection:
            connection.execute("INSERT INTO unfinished VALUES ('a')")
            raise KeyError("b")
        with pytest.raises(StoreError, match="duplicate key"), store.writing() as connection:
            for _ in range(2): connection.execute("INSERT INTO unfinished VALUES ('a')")
        with pytest.raises(StoreError, match="the server undid this change"), store.writing() as connection:
            connection.execute("INSERT INTO unfinished VALUES ('a')")
            try: connection.execute("INSERT INTO unfinished VALUES ('a')")
            except StoreError: pass  # somebody goes on, and the server would say ROLLBACK to a COMMIT
        assert jobs() == []
        with store.writing() as connection, store.writing(): connection.execute("INSERT INTO unfinished VALUES ('c')")
        assert jobs() == ["c"]


def test_another_writer_is_waited_for_and_not_for_ever(store):
    with PostgresStore(store.address, timeout=0.3) as other:
        with store.writing():
            with pytest.raises(StoreError, match="let the other writer finish"): other.add(episode(1))
            assert len(other) == 0, "readers do not wait"
        assert other.add(episode(1))


def test_marks_move_with_what_they_are_for(store):
    with pickle.loads(pickle.dumps(store)) as other:
        def marks(): return store.changes(), store.writes()
        first = marks()
        assert marks() == first
        other.add_many([episode(1), episode(2)])
        second = marks()
        assert second[0][0] == 2 and second[1] != first[1]
        shut_out(other, episode(1).id)
        assert marks()[0] == second[0] and marks()[1] != second[1]
        assert store.fingerprint() == id_set_hash(store.find()) == other.fingerprint()
        with pytest.raises(RuntimeError), other.writing() as connection:
            connection.execute("DELETE FROM trajectories")
            inside = other.fingerprint()
            raise RuntimeError
        assert inside == id_set_hash([]) and other.fingerprint() == store.fingerprint() != inside
        assert store.keep_derived("x", store.changes(), "of two") and other.derived("x", other.changes()) == "of two"
        assert not store.keep_derived("x", (1, None), "stale")
        with other.writing(): assert not store.keep_derived("x", store.changes(), "while others write")
        other.delete(episode(2).id)
        assert store.derived("x", store.changes()) is None


# The server is killed


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_store import episode
from exprag.store import Store, StoreError
first, batch = int(sys.argv[2]), int(sys.argv[4])
with Store(sys.argv[1]) as store:
    print("ready", flush=True)
    for start in range(first, first + 100_000, batch):
        some = [episode(i, steps=3) for i in range(start, start + batch)]
        while True:
            try: store.add_many(some, batch=batch); break
            except StoreError as error: print("! " + str(error).replace(chr(10), " "), flush=True)
        print(*[one.id for one in some], flush=True)
"""


def test_a_killed_server_loses_nothing_that_was_acknowledged():
    """Eight processes write while the server is killed (SIGKILL) and started again, three times; they go on with the store that they have."""
    with LocalServer() as server:  # as it comes: fsync and synchronous_commit are on
        address = server.address()
        Store(address).close()
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, address, str(1_000_000 * n), os.path.dirname(__file__), str(1 + n % 3)], stdout=subprocess.PIPE, text=True)
                   for n in range(8)]
        for process in writers: assert process.stdout.readline() == "ready\n"
        counts = []
        for _ in range(3):
            with Store(address) as store:
                before, deadline = len(store), time.monotonic() + 60
                while len(store) < before + 40 and time.monotonic() < deadline: time.sleep(0.05)
                counts.append(len(store) - before)
            server.kill()
            server.start()
        with Store(address) as store:
            before, deadline = len(store), time.monotonic() + 60
            while len(store) < before + 40 and time.monotonic() < deadline: time.sleep(0.05)
            counts.append(len(store) - before)
        for process in writers: process.kill()
        lines = [line for process in writers for line in process.stdout.read().split("\n")[:-1]]
        assert [process.wait() for process in writers] == [-signal.SIGKILL] * 8, "no writer had failed"
        acknowledged = {id for line in lines if not line.startswith("! ") for id in line.split()}
        with Store(address) as store:
            kept = set(store.find())
            assert acknowledged <= kept and len(acknowledged) > 100 and min(counts) >= 40
            assert all(store.get(id).id == id for id in sorted(kept)[::10]) and store.fingerprint() == id_set_hash(sorted(kept))
            assert store.changes()[0] == len(kept)
        assert all("was kept is not known" in line or "cannot be opened" in line for line in lines if line.startswith("! "))


def test_a_lost_connection_is_made_anew(store):
    store.add(episode(1))
    def cut(): raw(store, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'exprag' AND pid <> pg_backend_pid()"), time.sleep(0.2)
    cut()
    assert store.find() == [episode(1).id] and store.add(episode(2))
    with pytest.raises(StoreError, match="connection was lost.*do it again"), store.writing() as connection:
        connection.execute("DELETE FROM trajectories")
        cut()
        connection.execute("DELETE FROM trajectories")
    with pytest.raises(StoreError, match="connection was lost"), store.writing():
        cut()
        with pytest.raises(StoreError, match="connection was lost"): len(store)
        store.add(episode(3))
    assert len(store) == 2, "a transaction is not continued on another connection"


# Answers


def filled(store, goals):
    store.add_many(says(goal, n) for n, goal in enumerate(goals))
    return store


goal = st.lists(st.sampled_from("lamp fan hall press the the the zebra Ökologie café CAFE x_1 x1 a_b_c b_c naïve 3.5 日本 _ ß".split()), min_size=1, max_size=7).map(" ".join)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(goal, max_size=25), st.lists(goal, min_size=1, max_size=4), st.data())
def test_words_are_weighed_as_in_a_file(server, tmp_path_factory, goals, queries, data):
    with Store(tmp_path_factory.mktemp("w") / "m.db") as file, Store(fresh(server)) as there:
        for store in (file, there):
            filled(store, goals)
            put_texts(store, "goal", {t.id: t.goal for t in store})
            put_texts(store, "other", {id: "lamp lamp" for id in store.find()[::2]})
        some = data.draw(st.lists(st.sampled_from(file.find()))) if goals else []
        for query in queries:
            for allow in (None, some):
                (one, two), close = (match(s, "goal", query, 9, allow) for s in (file, there)), pytest.approx
                assert [score for _, score in two] == close([score for _, score in one]) and dict(two) == {id: close(score) for id, score in one}
            assert [(id, close(score)) for id, score in match(file, "goal", query, 5, Filter(file, success=None))] == match(there, "goal", query, 5, Filter(there, success=None))


def test_common_words_are_left_out_as_in_a_file(store, tmp_path):
    with Store(tmp_path / "m.db") as file:
        for each in (file, store):
            filled(each, (f"turn the lamp number{n} of {n % 7}" for n in range(1200)))
            WordRetriever(each).index()
        for query in ("the lamp number77", "the lamp", "number5 of 3 the", "nothing"):
            one, two = (match(each, "goal", query, 8) for each in (file, store))
            assert [id for id, _ in one] == [id for id, _ in two] and [s for _, s in one] == pytest.approx([s for _, s in two])


def test_a_word_too_long_for_an_index_is_found(store):
    filled(store, ["key " + "x" * 9000, "key " + "x" * 9001])
    put_texts(store, "goal", {t.id: t.goal for t in store})
    assert [store.get(id).goal for id, _ in match(store, "goal", "x" * 9000)] == ["key " + "x" * 9000]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(goal, min_size=1, max_size=25), st.lists(goal, min_size=1, max_size=3), st.data())
def test_meaning_is_found_as_in_a_file(server, tmp_path_factory, goals, queries, data):
    "Ties (equal goals) included, with and without filters: by FAISS in the process, and on the server."
    with Store(tmp_path_factory.mktemp("w") / "m.db") as file, Store(fresh(server)) as there:
        found = [Retriever(filled(file, goals), WordEncoder()), Retriever(filled(there, goals), WordEncoder()), PostgresRetriever(there, WordEncoder())]
        some = data.draw(st.lists(st.sampled_from(file.find())))
        for query in map(asks, queries):
            for allow in (None, some):
                one, two, three = ([(h.id, h.score, h.rank) for h in r.search(query, 4, allow)] for r in found)
                assert one == two == three
        for each in (file, there): each.delete(each.find()[0]), each.add_many([says("press the lamp", 99)], namespace="n")
        assert found[0].search(queries and asks(queries[0]), 5) == found[2].search(asks(queries[0]), 5)
        assert [h.id for h in found[2].within("n").search(asks("fan"))] == there.find(namespace="n") and len(found[2]) == len(there)


def conversations(memory):
    "What a memory is asked and told, and what it says."
    told = []
    for goal, action, success in (("Turn on the lamp in the hall.", "press switch", True), ("Turn on the fan.", "pull cord", True),
                                  ("Water the plants.", "pour water", False), ("Turn off the radio.", "turn knob", True)):
        asked = memory.augment([user(goal)], conversation=goal)
        told.append((list(asked), asked.ids, asked.block))
        kept = memory.record([user(goal), agent(action), user("done")], success, failures=True, receipt=goal)
        told.append((kept.id, kept.success))
    told += [memory.recall([user(text)]).ids for text in ("Turn on the lamp.", "Water it.", "Whistle.")]
    told += [memory.settle("Turn on the fan.", False).ids, memory.receipt("Turn on the fan.").block, sorted((id, u.uses, u.gain) for id, u in usage(memory.store).items())]
    return told


@pytest.mark.parametrize("kind", ["words", "meaning", "fused", "server", "places"])
@pytest.mark.parametrize("namespace", [None, "red"])
def test_a_memory_answers_as_from_a_file(store, tmp_path, kind, namespace):
    def memory(store, there):
        words, meaning = WordRetriever(store), (PostgresRetriever if there and kind == "server" else Retriever)(store, Letters())
        found = {"words": words, "meaning": meaning, "server": meaning, "fused": FusedRetriever([words, meaning]), "places": PlaceRetriever(store, Letters())}
        return ChatMemory(store, found[kind], "ann", replace(OPTIONS, namespace=namespace))
    with Store(tmp_path / "m.db") as file:
        other = [ChatMemory(s, WordRetriever(s), "bob", OPTIONS).within("blue") for s in (file, store)]
        for m in other: m.record([user("Turn on the blue lamp."), agent("press blue")], True)
        one, two = (conversations(memory(s, s is store)) for s in (file, store))
        assert one == two
        for ask in (rows_of, coverage, plan, staleness, lambda s: s.census(), lambda s: s.namespaces(), Store.shut_outs):
            made = [ask(s) if ask is not rows_of else [r._replace(added=0, use=replace(r.use, last=0)) for r in ask(s)] for s in (file, store)]
            assert made[0] == made[1], ask
        assert curate(file, 2, policy="success") == curate(store, 2, policy="success") and file.find() == store.find()


# Deleting


def everything(store, secret):
    "A memory of two, one with a secret in each table that can hold it; gives back the id of that one."
    memory = ChatMemory(store, FusedRetriever([WordRetriever(store), Retriever(store, Letters())]), "ann", replace(OPTIONS, namespace="home"))
    one = memory.record([user(f"Say {secret}."), agent(f"say {secret}")], True).id
    memory.record([user("Say hello."), agent("say hello")], True)
    memory.augment([user(f"Say {secret} again.")], conversation="c")
    PlaceRetriever(store, Letters()).index()
    credit(store, [one], 1.0)
    shut_out(store, one, f"it says {secret}")
    return memory, one


def counted(store, id): return {t: store.row(f"SELECT count(*) FROM {t} WHERE id = ?", id)[0] for t in ("trajectories", "namespaces", "vectors", "texts", "usage", "shut_out", "place_vectors", "receipt_reads")}


def test_erased_is_gone_from_every_table_and_from_the_files(server):
    secret = "zanzibar" + os.urandom(8).hex()
    with Store(fresh(server)) as store:
        memory, one = everything(store, secret)
        assert all(counted(store, one).values()) and len(memory.receipt("c").ids) == 2
        raw(store, "CHECKPOINT")
        def in_files():
            raw(store, "CHECKPOINT")
            base = server.folder / "data" / "base"
            return sum(secret.encode() in path.read_bytes() for path in base.rglob("*") if path.is_file())
        assert in_files() > 0
        erased = erase(store, [one, "0" * 32])
        assert erased.episodes == 1 and erased.before > 0 and not any(counted(store, one).values())
        assert memory.receipt("c").block is None and one not in memory.receipt("c").ids
        assert in_files() == 0 and store.rows("SELECT 1 FROM unfinished") == [] and len(store) == 1
        assert erase_namespace(store, "home").episodes == 1 and store.namespaces() == {} and len(store) == 0


def test_an_erasure_waits_for_who_still_reads_an_older_state(store):
    store.add(episode(1))
    reader = psycopg.connect(**store.address.parts()[0])
    reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"), reader.execute("SELECT 1")
    store.add(episode(2))
    with pytest.raises(StoreError, match="still read an older state"): erase(store, [episode(1).id])
    assert store.find() == [episode(2).id] and store.rows("SELECT job FROM unfinished") == [("scrub",)]
    reader.close()
    time.sleep(0.2)
    finish_erasure(store)
    assert store.rows("SELECT 1 FROM unfinished") == []


# Copying


def contents(store):
    tables = {table: columns for table, columns in {**postgres_server.OF_EPISODES, **postgres_server.OF_OTHERS}.items()
              if store.row("SELECT 1 FROM sqlite_master WHERE name = ?", table)}
    found = {table: sorted(store.rows(f"SELECT {columns} FROM {table}"), key=repr) for table, columns in tables.items()}
    found["texts"] = [row for row in store.rows("SELECT key, id, text FROM texts ORDER BY number")]
    found = {table: rows for table, rows in found.items() if rows}  # a file has no table that it does not need
    return {**found, "trajectories": store.rows("SELECT id, success, score, record, author, added FROM trajectories ORDER BY id")}


def test_a_store_goes_to_a_server_and_back_with_all_that_it_has(server, tmp_path):
    with Store(tmp_path / "a.db") as file, Store(fresh(server)) as there, Store(tmp_path / "b.db") as back:
        everything(file, "zanzibar")
        file.add_many(says(f"goal {n}", n) for n in range(30))
        first = copy_store(file, there, batch=7)
        assert first.added == len(file) == 32 and first.known == 0 and first.rows >= 10
        assert contents(there) == contents(file) and there.fingerprint() == file.fingerprint()
        again = copy_store(file, there)
        assert again.added == 0 and again.known == 32 and contents(there) == contents(file)
        copy_store(there, back)
        assert contents(back) == contents(file)
        with pytest.raises(ValueError, match="into itself"): copy_store(there, there)
        memories = [ChatMemory(s, WordRetriever(s), "ann", replace(OPTIONS, namespace="home")) for s in (file, there, back)]
        assert len({repr([m.recall([user("Say hello, please.")]).ids, m.receipt("c")]) for m in memories}) == 1


def test_a_copy_takes_nothing_from_what_is_there(server, tmp_path):
    with Store(tmp_path / "a.db") as file, Store(fresh(server)) as there:
        file.add(episode(1)), there.add_many([episode(2)], namespace="mine")
        assert copy_store(file, there)[:2] == (1, 0) and there.namespaces() == {"mine": 1} and len(there) == 2
        file.add(episode(3)), there.add(replace(episode(3), score=1.0))
        with pytest.raises(StoreError, match="was offered again with score"): copy_store(file, there)


def test_the_command_copies_both_ways(server, tmp_path, capsys):
    address, file, back = fresh(server), tmp_path / "a.db", tmp_path / "b.db"
    with Store(file) as store: store.add_many(map(episode, range(5)))
    assert main(["copy", str(file), address]) == 0 and main(["copy", address, str(back)]) == 0
    assert "5 episodes" in capsys.readouterr().out
    with Store(back) as store: assert len(store) == 5
    assert main(["copy", str(tmp_path / "no.db"), address]) == 1 and "is not there" in capsys.readouterr().err
    assert main(["show", episode(1).id, "--store", address]) == 0 and "do 1 0" in capsys.readouterr().out
    for command in (["doctor", "--store", address], ["view", address]):
        with pytest.raises(SystemExit): main(command)
        assert "exprag copy" in capsys.readouterr().err


# Namespaces


@pytest.mark.parametrize("kind", ["fused", "places"])
def test_a_namespace_is_as_if_the_server_held_nothing_else(server, kind):
    told = {}
    with test_namespaces.fill(fresh(server), True) as store: theirs = store.find(namespace="blue")
    for blue in (True, False):
        with test_namespaces.fill(fresh(server), blue) as store:
            told[blue] = [text.replace(str(store.path), "").replace(repr(store), "") for text in test_namespaces.reads(store, kind, theirs)]
    assert told[True] == told[False]


# Roles that are bound to namespaces


@pytest.fixture
def bound(server):
    "A store, and stores of two roles that are bound to a namespace each."
    number = next(NUMBERS)
    address = server.address(f"b{number}")
    with Store(address) as store:
        for name in ("red", "blue"):
            raw(store, f"CREATE ROLE {name}{number} LOGIN")
            bind(store, f"{name}{number}", [name])
        with Store(server.address(f"b{number}", f"red{number}")) as red, Store(server.address(f"b{number}", f"blue{number}")) as blue: yield store, red, blue


def test_the_database_shows_a_role_its_namespaces_only(bound):
    store, red, blue = bound
    assert not store.bound and red.bound
    for each, name in ((red, "red"), (blue, "blue")):
        memory = ChatMemory(each, FusedRetriever([WordRetriever(each), PostgresRetriever(each, Letters())]), name, replace(OPTIONS, namespace=name))
        memory.record([user(f"Turn on the {name} lamp."), agent(f"press {name}")], True)
        memory.augment([user("Turn on the lamp.")], conversation="c")
        PlaceRetriever(each, Letters()).index()
        credit(each, each.find(), 1.0)
    assert len(store) == 2 and len(red) == len(blue) == 1 and red.namespaces() == {"red": 1} and red.find() != blue.find()
    mine, theirs = red.find()[0], blue.find()[0]
    for table in (*KEYS, "bindings"):  # whatever is asked, in SQL too
        assert "blue" not in repr(raw(red, f"SELECT * FROM {table}")), table
        assert raw(red, f"SELECT count(*) FROM {table}") <= raw(store, f"SELECT count(*) FROM {table}")
    with pytest.raises(UnknownTrajectory): red.get(theirs)
    assert not red.delete(theirs) and erase_quietly(red, [theirs]).episodes == 0 and theirs in blue
    assert red.put_vectors("e", "goal", {theirs: np.ones(3)}) == 0 == put_texts(red, "goal", {theirs: "x"}) and credit(red, [theirs], 1.0) == 0
    for sql in ("UPDATE trajectories SET writer = 'x'", "INSERT INTO bindings VALUES (current_user, 'blue')", "UPDATE state SET value = '0'", "DELETE FROM state",
                "DROP TABLE texts", "ALTER TABLE texts DISABLE ROW LEVEL SECURITY", "TRUNCATE trajectories", f"INSERT INTO namespaces VALUES ('blue', '{mine}')",
                f"INSERT INTO namespaces VALUES ('red', '{theirs}')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege): raw(red, sql)
    for sql in ("UPDATE trajectories SET author = 'x'", "DELETE FROM trajectories", "DELETE FROM namespaces", "DELETE FROM vectors", "DELETE FROM receipts"): raw(red, sql)
    assert len(red) == 0 and len(store) == len(blue) == 1 and blue.get(theirs).provenance["author"] == "blue" and blue.row("SELECT count(*) FROM receipts") == (1,)


def erase_quietly(store, ids):
    with pytest.warns(UserWarning, match="until the owner calls finish_erasure"): return erase(store, ids)


def test_what_others_hold_is_neither_seen_nor_changed(bound):
    store, red, blue = bound
    blue.add_many([episode(1)], namespace="blue")
    with pytest.raises(StoreError, match="held where this role sees nothing"): red.add_many([episode(1)], namespace="red")
    with pytest.raises(StoreError, match="row-level security"): red.add_many([episode(2)], namespace="blue")
    store.add_many([episode(1)], namespace="red")  # the owner shares it
    assert episode(1).id in red and red.namespaces() == {"red": 1} and store.namespaces() == {"blue": 1, "red": 1}
    with pytest.raises(StoreError, match="in a namespace of others, too"): red.delete(episode(1).id)
    for act in (lambda: shut_out(red, episode(1).id), lambda: raw(red, "UPDATE trajectories SET record = '{}'")):
        with pytest.raises((StoreError, psycopg.Error), match="row-level security"): act()
    memory = ChatMemory(red, WordRetriever(red), "expert", replace(OPTIONS, namespace="red"))
    with pytest.warns(UserWarning, match="finish_erasure"): memory.forget([episode(1).id])
    assert episode(1).id not in red and episode(1).id in blue and red.rows("SELECT job FROM unfinished") == [("scrub",)]
    finish_erasure(store)
    assert store.rows("SELECT job FROM unfinished") == []


def test_what_the_owner_gave_can_be_forgotten(bound):
    store, red, _ = bound
    store.add_many([episode(1)], namespace="red")
    memory = ChatMemory(red, WordRetriever(red), "expert", replace(OPTIONS, namespace="red"))
    with pytest.warns(UserWarning): memory.forget([episode(1).id])
    assert len(store) == 0


def test_a_role_sees_at_once_what_it_is_given_and_loses_what_is_taken(bound):
    store, red, _ = bound
    retriever, words = PostgresRetriever(red, Letters()), WordRetriever(red)
    store.add(episode(1))
    assert not retriever.search(asks("boil")) and not words.search(asks("boil")) and red.fingerprint() == id_set_hash([])
    store.add_many([episode(1)], namespace="red")
    assert [h.id for h in retriever.search(asks("boil"))] == [episode(1).id] == [h.id for h in words.search(asks("boil"))] and red.fingerprint() == store.fingerprint()
    assert not red.keep_derived("x", red.changes(), "mine") and not store.rows("SELECT 1 FROM state WHERE name = 'x'")
    bind(store, red.address.parts()[0]["user"], [])
    assert red.find() == [] and not words.search(asks("boil"))


def test_who_cannot_be_bound(store):
    with pytest.raises(StoreError, match="no role 'nobody_of_that_name'"): bind(store, "nobody_of_that_name", ["a"])
    with pytest.raises(StoreError, match="nothing binds it"): bind(store, "postgres", ["a"])


def test_a_role_without_rights_is_told(server, store):
    raw(store, "CREATE ROLE stranger LOGIN")
    with pytest.raises(StoreError, match="permission denied.*bind"): Store(server.address(store.schema, "stranger"))


# Passwords


SECRET = "hunter%2F2-Zq9"  # hunter/2-Zq9


def test_a_password_is_never_shown(server, capsys, caplog, tmp_path):
    place = f"host={server.folder}&schema=x"
    shown = []
    for address in (f"postgresql://ann:{SECRET}@/nowhere?{place}", f"postgresql://ann:{SECRET}@no-such-host.invalid/db", f"postgresql://ann@/nowhere?{place}&password={SECRET}",
                    f"postgresql://ann:{SECRET}@[bad/db", f"postgresql://ann:a@{SECRET}@/db?{place}", f"postgresql://ann:{SECRET}@/db?{place}&{SECRET}=1", f"postgresql://ann:{SECRET}@host:{SECRET}/db"):
        made = Address(address)
        shown += [str(made), repr(made), f"{made}", f"{made!r:>3}", "%s" % made]
        with pytest.raises(StoreError) as refused: Store(address)
        shown += ["".join(traceback.format_exception(refused.value)), repr(refused.value)]
        for command in (["show", "x", "--store", address], ["import", os.devnull, "--store", address], ["copy", address, str(tmp_path / "a.db")]): assert main(command) == 1
        for command in (["doctor", "--store", address], ["hook", "--store", address], ["view", address]):
            with pytest.raises(SystemExit): main(command)
    shown += [*capsys.readouterr(), caplog.text]
    for text in shown: assert not [part for part in ("hunter", "Zq9") if part in text], text


def test_a_password_opens_and_stays_out_of_what_is_written(server, monkeypatch):
    address = fresh(server)
    with Store(address) as owner: raw(owner, "CREATE ROLE locked LOGIN PASSWORD 'hunter/2-Zq9'"), bind(owner, "locked", ["a"])
    hba = server.folder / "data" / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text("local all locked scram-sha-256\n" + before)
    with Store(address) as owner: raw(owner, "SELECT pg_reload_conf()")
    time.sleep(0.5)
    place = f"host={server.folder}&schema={owner.schema}"
    wrong = f"postgresql://locked:wrong-Zq9@/postgres?{place}"
    try:
        with pytest.raises(StoreError, match="password authentication failed") as refused: Store(wrong)
        assert "Zq9" not in "".join(traceback.format_exception(refused.value))
        with Store(f"postgresql://locked:{SECRET}@/postgres?{place}") as store:
            assert store.bound and store.find() == []
            assert not any("Zq9" in text for text in (repr(store), str(store), str(store.path), repr(vars(store)), repr(store.address)))
            with pytest.raises(StoreError, match="not written into a pickle.*PGPASSWORD") as refused: pickle.dumps(store)
            with pytest.raises(StoreError) as failed: store.row("SELECT nothing FROM nowhere")
            assert not [e for e in (refused, failed) if "Zq9" in "".join(traceback.format_exception(e.value))]
        monkeypatch.setenv("PGPASSWORD", "hunter/2-Zq9")
        with Store(f"postgresql://locked@/postgres?{place}") as store, pickle.loads(pickle.dumps(store)) as other:
            assert b"Zq9" not in pickle.dumps(store) and other.find() == []
    finally: hba.write_text(before)
