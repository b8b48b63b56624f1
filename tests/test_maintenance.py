"""Maintenance: redaction, erasure to the byte, and a check that mends what is derived."""
import json
import os
import random
import sqlite3
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from encoders import Letters
from faults import FEW_OR_MANY, killed
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.approximate import INDEX_MARK, ApproximateIndex, write_index
from exprag.memory.maintenance import (
    Redactor, check, erase, erase_namespace, finish_erasure, salvage)
from exprag.store import APPLICATION_ID, MIGRATIONS, Store, StoreError
from exprag.trajectory import Step, Task, Trajectory
from exprag.words import match, put_texts

SECRET = "xylquarzine"
VECTOR = np.frombuffer(b"quarzinevectors!" * 24, "<f4")


def episode(i=0, steps=4, goal=None, **more):
    made = tuple(
        Step(f"do {i} {j}", f"Thing {j} of {i} is done. And more text.") for j in range(steps)
    )
    return Trajectory(
        Task("w", f"type-{i % 3}", str(i), "train"),
        goal or f"Your task is thing {i}.",
        "You see a door.",
        made,
        1.0,
        True,
        "1",
        {},
        {"actor": "expert"},
        **more,
    )


def hidden(i=1):
    steps = tuple(Step(f"say {SECRET} {j}", f"It echoes: {SECRET}. " * 5) for j in range(30))
    return Trajectory(
        Task("w", "secret", str(i), "train"), f"Remember {SECRET} {i}.", SECRET, steps, 1.0, True
    )


def fill(store, count=60, secrets=3):
    all_ = [*map(episode, range(count)), *map(hidden, range(secrets))]
    store.add_many(all_)
    store.put_vectors(
        "e",
        "goal",
        {t.id: VECTOR if SECRET in t.goal else np.eye(96)[i % 96] for i, t in enumerate(all_)},
    )
    for start in range(0, len(all_), 7):
        put_texts(store, "goal", {t.id: t.goal for t in all_[start:start + 7]})
    return [t.id for t in all_ if SECRET in t.goal]


def traces(folder, *needles):
    return sum(
        p.read_bytes().lower().count(n)
        for p in folder.iterdir()
        if p.is_file()
        for n in needles or (SECRET.encode(), b"quarzinevectors!")
    )


# Redaction


@pytest.mark.parametrize("name, text", [
    ("email", "mail a.b+c@sub.example.org now"), ("key", "use sk-" + "ab12" * 6),
    ("key", "AKIAABCDEFGHIJKLMNOP"), ("key", "ghp_" + "a1" * 18),
    ("bearer", "Authorization: Bearer abcdefghijklmnop.qrs"),
    ("private key", "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----"),
    ("private key", "-----BEGIN PRIVATE KEY-----\nwithout an end"),
    ("address", "from 192.168.0.1:80"), ("card", "card 4111 1111 1111 1111.")])
def test_patterns_find(name, text):
    counts = Counter()
    clean = Redactor().text(text, counts)
    assert counts == {name: 1} and f"[{name} removed]" in clean
    assert Redactor().text(clean, Counter()) == clean


@pytest.mark.parametrize("text", [
    "version 1.2.3 of it", "The thermometer measures 15.123456789012345678 degrees", "a @ b",
    "task-1234-5678", "0.1234567890123456", "id 0123456789abcdef0123456789abcdef"])
def test_patterns_leave_alone(text):
    counts = Counter()
    assert Redactor().text(text, counts) == text and not counts


def test_every_place_is_redacted_and_only_counted():
    mail = "a@example.org"
    t = Trajectory(
        Task("w", "t", "1", "train"),
        mail,
        mail,
        (
            Step(
                mail,
                mail,
                0.0,
                mail,
                ({"id": "1", "type": "function", "function": {"name": "f", "arguments": mail}},),
                {mail: [mail, {"x": mail}]},
            ),
        ),
        1.0,
        True,
        mail,
        {"s": mail},
        {"actor": mail, "redacted": {"email": 2}},
        {"e": mail},
    )
    clean, counts = Redactor()(t)
    assert (
        "example.org" not in json.dumps(clean.to_dict())
        and counts == {"email": 13}
        and clean.provenance["redacted"] == {"email": 15}
    )
    assert Redactor()(clean) == (clean, {}) and clean.task == t.task
    with pytest.raises(ValueError, match="tasks are not rewritten") as error:
        Redactor()(replace(t, task=Task("w", "t", mail, "train")))
    assert mail not in str(error.value), "an error must not hold what was to be removed"


@pytest.mark.parametrize("patterns", [{"x": "("}, {"a": "removed"}, {"b": "."}])
def test_bad_patterns_are_refused(patterns):
    with pytest.raises(ValueError, match="no regular expression|give it another name"):
        Redactor(patterns)


PIECES = ["a@b.cc", "sk-" + "x" * 20, "10.1.2.3", " ", "plain", "[email removed]", "\ud800"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_redacting_twice_is_redacting_once(text):
    made = Redactor()(episode(goal=text + "."))[0]
    again, counts = Redactor()(made)
    assert again == made and again.id == made.id and counts == {}


def test_patterns_take_linear_time():
    begun = time.process_time()
    for text in (
        "a" * 300_000,
        "1." * 150_000,
        "a@" * 150_000,
        "-----BEGIN " * 30_000,
        "bearer " * 40_000,
        "1234 " * 60_000,
    ):
        Redactor().text(text, Counter())
    assert time.process_time() - begun < 10


# Deletion


def test_erased_is_gone_to_the_byte_while_the_store_is_open(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        ids = fill(store)
        (tmp_path / "goal.index").write_bytes(b"ids and vectors of " + SECRET.encode())
        assert traces(tmp_path) > 50
        done = erase(store, [*ids, "f" * 32], [tmp_path / "goal.index"])
        assert (
            done.episodes == 3
            and traces(tmp_path) == 0
            and done.files == ("goal.index",)
            and not (tmp_path / "goal.index").exists()
        )
        assert not any(id.encode() in p.read_bytes() for p in tmp_path.iterdir() for id in ids)
        assert (
            len(store) == 60
            and len(store.vector_ids("e", "goal")) == 60
            and match(store, "goal", SECRET) == []
            and len(match(store, "goal", "thing 7")) > 0
        )
    assert check(tmp_path / "bank.db").ok


def test_erase_reports_that_another_process_is_reading(tmp_path):
    with Store(tmp_path / "bank.db", timeout=0.2) as store, Store(tmp_path / "bank.db") as other:
        ids = fill(store, 5, 1)
        with other.reading() as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM trajectories").fetchone()
            with pytest.raises(StoreError, match="its bytes may still be in the file"):
                erase(store, ids)
            assert ids[0] not in store
            connection.execute("COMMIT")
        assert [f.part for f in check(tmp_path / "bank.db").findings] == ["unfinished"]
        finish_erasure(store)
        assert traces(tmp_path) == 0 and finish_erasure(store) == ()


def test_erasing_a_namespace_keeps_what_is_shared(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many([hidden(1), hidden(2)], namespace="red")
        store.add_many([hidden(2), episode(1)], namespace="blue")
        store.add(episode(2))
        assert (
            erase_namespace(store, "red").episodes == 1
            and store.namespaces() == {"blue": 2}
            and len(store) == 3
        )
        assert (
            erase_namespace(store, "blue").episodes == 2
            and traces(tmp_path, SECRET.encode()) == 0
            and store.find() == [episode(2).id]
        )
        with pytest.raises(KeyError, match="no namespace 'red'"):
            erase_namespace(store, "red")


ERASER = """
from exprag.memory.maintenance import erase
from exprag.store import Store
with Store(sys.argv[1]) as store:
    print("ready", flush=True)
    erase(store, sys.argv[2:])
"""


@pytest.mark.parametrize("rounds", FEW_OR_MANY)
def test_kills_in_the_middle_of_erasing(tmp_path, rounds):
    chance, stopped = random.Random(rounds), set()
    for number in range(rounds):
        here = tmp_path / str(number)
        here.mkdir()
        with Store(here / "bank.db") as store:
            ids = fill(store, 200, 5)
        killed(ERASER, here / "bank.db", *ids, within=0.05, chance=chance)
        with Store(here / "bank.db") as store:
            left = sum(id in store for id in ids)
            assert left in (0, 5) and len(store) == 200 + left, "all of them or none"
            if left == 5:
                assert (
                    len(match(store, "goal", SECRET, 50)) == 5
                    and len(store.get_vectors("e", "goal", ids)[0]) == 5
                )
        verdict = check(here / "bank.db", mend=True)
        assert verdict.ok and verdict.episodes == 200 + left
        stopped.add("before" if left else "between" if verdict.findings else "after")
        if not left:
            assert traces(here) == 0
    assert rounds < 100 or "between" in stopped, "no kill ever hit the gap that the note is for"


# The check


def ill(path, *statements):
    raw = sqlite3.connect(path, isolation_level=None)
    for sql in statements:
        raw.execute(*sql) if isinstance(sql, tuple) else raw.execute(sql)
    raw.close()


@pytest.fixture
def path(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        fill(store, 30, 0)
    return tmp_path / "bank.db"


@pytest.mark.parametrize("part, sql", [
    ("columns", "UPDATE trajectories SET fold = 'test' WHERE rowid_ IS NULL"),
    ("columns", "UPDATE trajectories SET author = 'me'"),
    ("columns", "UPDATE trajectories SET score = 3.0"),
    ("orphans", "INSERT INTO vectors VALUES ('other', 'goal', 'nobody', x'00000000')"),
    ("orphans", "INSERT INTO namespaces VALUES ('n', 'nobody')"),
    ("orphans", "INSERT INTO usage VALUES ('nobody', 1, 1.0, 0.0)"),
    ("vectors", "UPDATE vectors SET vector = x'00' WHERE id = (SELECT min(id) FROM vectors)"),
    ("vectors",
     "UPDATE vectors SET vector = substr(vector, 5) WHERE id = (SELECT min(id) FROM vectors)"),
    ("vectors",
    "UPDATE vectors SET vector = zeroblob(384) WHERE id = (SELECT min(id) FROM vectors)"),
    ("words", "UPDATE texts SET text = 'else' WHERE number = 1"),
    ("words", "DELETE FROM words_data WHERE id > 10"),
    ("unfinished", "INSERT INTO unfinished VALUES ('scrub')")])
def test_what_is_derived_is_mended(path, part, sql):
    ill(path, sql.replace("WHERE rowid_ IS NULL", "WHERE id = (SELECT min(id) FROM trajectories)"))
    before = check(path)
    assert not before.ok and {f.part for f in before.findings} == {part} and "WRONG" in repr(before)
    during = check(path, mend=True)
    assert (
        during.ok
        and [f.part for f in during.findings] == [f.part for f in before.findings]
        and "mended" in repr(during)
    )
    after = check(path)
    assert after.findings == () and after.episodes == 30 and "nothing wrong" in repr(after)
    with Store(path) as store:
        assert store.find(folds=["train"], authors=["expert"]) == sorted(
            e.id for e in map(episode, range(30))
        )


def test_what_other_modules_derived_is_checked_too(path):
    from exprag.memory.insights import Insights
    from exprag.memory.in_episode import PlaceRetriever

    class Scribe:
        name = "scribe"
        def describe(self): return {}

    with Store(path) as store:
        PlaceRetriever(store, Letters(), granularity="step").index(store.find()[:3])
        Insights(store, Scribe())
    assert check(path).ok
    ill(
        path,
        "INSERT INTO place_vectors VALUES ('e', 'goal/step', 'nobody', '[]', x'')",
        "INSERT INTO insights VALUES ('i', 'rule', 'scribe', '{}')",
        "INSERT INTO insight_sources VALUES ('i', (SELECT min(id) FROM trajectories))",
        "INSERT INTO insight_sources VALUES ('i', 'nobody')",
    )
    assert sorted(f.what.split(" of ")[1].split()[0] for f in check(path).findings) == [
        "insight_sources",
        "place_vectors",
    ]
    assert check(path, mend=True).ok and check(path).findings == ()
    with Store(path) as store:
        assert (
            store.row("SELECT count(*) FROM insights")[0] == 0
        ), "an insight goes with any of its sources"
        assert store.row("SELECT count(*) FROM place_vectors")[0] == 3


@pytest.mark.parametrize("record", ["replace(record, 'door', 'wall')", "'{'"])
def test_a_changed_record_is_named_and_left_alone(path, record):
    first = "(SELECT min(id) FROM trajectories)"
    ill(path, f"UPDATE trajectories SET record = {record} WHERE id = {first}")
    for mend in (False, True):
        verdict = check(path, mend=mend)
        assert not verdict.ok and [f.part for f in verdict.findings] == ["records"]
    with Store(path) as store:
        assert len(store) == 30


def test_index_files_are_judged_and_removed(path):
    with Store(path) as store:
        ids, vectors = store.get_vectors("e", "goal")
    header, folder = {"encoder": "e", "key": "goal", "store": "x"}, path.parent
    for name in ("good", "cut", "flipped"):
        write_index(folder / name, ApproximateIndex(ids, vectors), header)
    write_index(
        folder / "encoder", ApproximateIndex(ids, vectors), {**header, "encoder": "another"}
    )
    more = ApproximateIndex(["0" * 32, *ids], np.vstack([vectors[:1], vectors]))
    write_index(folder / "unknown", more, header)
    data = (folder / "cut").read_bytes()
    (folder / "cut").write_bytes(data[:-100])
    (folder / "flipped").write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    (folder / "saving.x.part").write_bytes(INDEX_MARK)
    os.utime(folder / "saving.x.part", (1, 1))
    (folder / "now.x.part").write_bytes(INDEX_MARK)
    (folder / "note.txt").write_text("not an index")
    found = {f.what.split(":")[0]: f.what for f in check(path).findings}
    assert set(found) == {"cut", "flipped", "encoder", "unknown", "saving.x.part"}
    assert "damaged or cut short" in found["cut"] and "damaged or cut short" in found["flipped"]
    assert "1 episodes that the store does not have" in found["unknown"]
    assert "of which the store has no vectors" in found["encoder"]
    assert set(f.what.split(":")[0] for f in check(path, indexes=[folder / "cut"]).findings) == {
        "cut"
    }
    assert check(path, mend=True).ok
    left = sorted(p.name for p in folder.iterdir() if not p.name.startswith("bank"))
    assert left == ["good", "note.txt", "now.x.part"], "a saving that may be going on is left alone"


def test_files_that_are_no_store(tmp_path):
    (tmp_path / "text.db").write_text("no database" * 1000)
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t(x)"), other.commit(), other.close()
    Store(tmp_path / "new.db").close()
    ill(tmp_path / "new.db", "PRAGMA user_version = 99")
    for name, words in (
        ("text", "cannot be opened"),
        ("other", "not an exprag store"),
        ("new", "newer exprag"),
        ("none", "is not there"),
    ):
        verdict = check(tmp_path / f"{name}.db", mend=True)
        assert (
            not verdict.ok
            and verdict.findings[0].part == "file"
            and words in verdict.findings[0].what
        )


def damage(path, table):
    with Store(path) as store, store.reading() as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        pages = connection.execute(
            "SELECT pageno, pgsize FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY"
            " pageno",
            [table],
        ).fetchall()
    page, size = pages[len(pages) // 2]
    with open(path, "r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xaa" * size)


def test_a_damaged_page_is_reported_and_the_rest_salvaged(tmp_path):
    path, all_ = tmp_path / "bank.db", [episode(i, steps=20) for i in range(300)]
    with Store(path) as store:
        store.add_many(all_, namespace="n")
    damage(path, "trajectories")
    assert not check(path, mend=True).ok
    saved, lost = salvage(path, tmp_path / "new.db")
    with Store(tmp_path / "new.db") as store:
        kept = list(store)
        assert saved.added == len(kept) >= 250 and set(lost) == {t.id for t in all_} - {
            t.id for t in kept
        }
        assert all(t in all_ for t in kept) and len(store.find(namespace="n")) == len(kept)
    assert check(tmp_path / "new.db").ok
    with pytest.raises(StoreError, match="is there already"):
        salvage(path, tmp_path / "new.db")


def test_a_damaged_sql_index_is_made_again(path):
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("PRAGMA writable_schema = ON")
    raw.execute(
        "UPDATE sqlite_master SET sql = replace(sql, '(author, added)', '(added, author)') WHERE"
        " name = 'trajectories_by_author'"
    )
    raw.close()
    assert not check(path).ok and check(path, mend=True).ok and check(path).findings == ()


# Schemas


def test_an_older_store_is_migrated_with_everything_in_it(tmp_path):
    """The file is made as release 0.1.0 made it: by the first migration alone, with its INSERT."""
    old, many = sqlite3.connect(tmp_path / "old.db", isolation_level=None), [
        episode(0),
        replace(episode(1), provenance={}),
        replace(episode(2), provenance={"actor": {"name": "x"}}),
        replace(episode(3), provenance={"author": "ann", "actor": "bot"}),
    ]
    old.execute("PRAGMA journal_mode = WAL")
    for sql in MIGRATIONS[0].split(";")[:-1]:
        old.execute(sql)
    for t in many:
        old.execute(
            "INSERT INTO trajectories VALUES (?,?,?,?,?,?,?,?,?)",
            (
                t.id,
                t.task.world,
                t.task.type,
                t.task.variation,
                t.task.fold,
                1,
                t.score,
                len(t),
                json.dumps(t.to_dict(), sort_keys=True, separators=(",", ":")),
            ),
        )
    old.execute(
        "INSERT INTO trajectories VALUES ('broken', 'w', 't', '1', 'train', 1, 1.0, 0, '{')"
    )
    old.execute(
        "INSERT INTO vectors VALUES ('e', 'goal', ?, ?)", (many[0].id, np.ones(3, "<f4").tobytes())
    )
    old.execute("PRAGMA user_version = 1"), old.execute(
        f"PRAGMA application_id = {APPLICATION_ID}"
    ), old.close()
    with Store(tmp_path / "old.db") as store:
        assert [store.get(t.id) for t in many] == many and store.vector_ids("e", "goal") == [
            many[0].id
        ]
        assert (
            store.find(authors=["expert"]) == [many[0].id]
            and store.find(authors=["ann"]) == [many[3].id]
            and store.find(authors=['{"name":"x"}']) == [many[2].id]
        )
        assert store.find(added=(None, 1.0)) == store.find() and not store.find(
            added=(1.0, None)
        ), "when they came is not known: long ago"
        assert store.add(episode(9)) and put_texts(store, "goal", {episode(9).id: "words"}) == 1
        store.delete("broken")
    assert check(tmp_path / "old.db").findings == ()


def test_an_address_at_the_end_of_a_sentence():
    assert (
        Redactor().text("Sent from 10.0.0.1. And 1.2.3.4.5 is a version.", Counter())
        == "Sent from [address removed]. And 1.2.3.4.5 is a version."
    )
