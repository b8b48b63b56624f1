"""The database: opened with care or not at all; a change happens whole or not."""
import pickle
import sqlite3
import threading

import pytest

from exprag.database import MIGRATIONS, Database, StoreError, statements


def test_wrong_files(tmp_path):
    (tmp_path / "text.db").write_text("hello, this is no database at all" * 50)
    with pytest.raises(StoreError, match="text.db cannot be opened as a store"):
        Database(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t(x)")
    other.commit(), other.close()
    with pytest.raises(StoreError, match="not an exprag store"):
        Database(tmp_path / "other.db")
    Database(tmp_path / "future.db").close()
    raw = sqlite3.connect(tmp_path / "future.db")
    raw.execute("PRAGMA user_version = 99")
    raw.commit(), raw.close()
    with pytest.raises(StoreError, match="has schema 99 and this release knows schema 2.*upgrade"):
        Database(tmp_path / "future.db")
    with pytest.raises(StoreError, match="is not there"):
        Database(tmp_path / "typo.db", create=False)
    with pytest.raises(StoreError):
        Database(tmp_path)  # a folder


def test_closed_store_says_so(tmp_path):
    store = Database(tmp_path / "a.db")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.reading().__enter__()


def test_settings_of_the_promise(tmp_path):
    with Database(tmp_path / "a.db") as database, database.reading() as connection:
        assert [connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("journal_mode", "synchronous", "foreign_keys")] == ["wal", 2, 1]


def test_a_change_happens_whole_or_not(tmp_path):
    with Database(tmp_path / "a.db") as database, pickle.loads(pickle.dumps(database)) as other:
        def jobs():
            with other.reading() as connection: return [job for job, in connection.execute("SELECT job FROM unfinished ORDER BY job")]
        with pytest.raises(KeyError), database.writing() as connection:
            connection.execute("INSERT INTO unfinished VALUES ('a')")
            raise KeyError("b")
        with pytest.raises(sqlite3.IntegrityError), database.writing() as connection:
            connection.execute("INSERT INTO unfinished VALUES ('a')")
            connection.execute("INSERT INTO unfinished VALUES ('a')")
        assert jobs() == []
        with database.writing() as connection: connection.execute("INSERT INTO unfinished VALUES ('c')")
        assert jobs() == ["c"] and "a.db" in repr(other)


def test_many_who_open_a_new_file_at_once(tmp_path):
    opened, errors = [], []
    def work():
        try:
            with Database(tmp_path / "new.db") as database, database.reading() as connection: opened.append(connection.execute("PRAGMA user_version").fetchone()[0])
        except Exception as error: errors.append(error)
    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert opened == [len(MIGRATIONS)] * 8 and not errors


def test_a_script_is_cut_into_statements():
    assert [s.split()[1] for s in statements("CREATE TABLE a(x); CREATE TRIGGER t AFTER INSERT ON a BEGIN DELETE FROM a; DELETE FROM a; END; DROP TABLE b;")] == ["TABLE", "TRIGGER", "TABLE"]
    assert sum(len(statements(script)) for script in MIGRATIONS) == 17
