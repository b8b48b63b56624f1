"Whole files of logs: every format there and back, detection, memory, tables, commands."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from log_records import chat, dump, gpt, otlp, read
from trajectory_strategies import calm, example, trajectories

from exprag.logs.files import NAMES, detect, read_log, write_log
from exprag.logs.formats import Options
from exprag.logs.records import records, write_records
from exprag.trajectory import Step, TrajectoryError


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "json.xz"])
def test_files_come_back(tmp_path, name, ending):
    ours = [example(goal=f"goal {n}", score=n, provenance={"n": n}) for n in range(5)]
    assert write_log(iter(ours), tmp_path / f"log.{ending}", name) == 5
    assert list(read_log(tmp_path / f"log.{ending}")) == ours


@calm
@given(st.lists(trajectories, max_size=3), st.sampled_from(NAMES))
def test_files_come_back_whatever_is_in_them(tmp_path_factory, ts, name):
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    ts += ts[:1]
    write_log(ts, path, name)
    assert list(read_log(path, name)) == ts


@pytest.mark.parametrize("name", NAMES)
def test_episodes_of_one_id_stay_apart(tmp_path, name):
    ours = [example(score=1), example(score=2), example(score=1, provenance={"actor": "a"}), example(score=1), example(score=1), example(steps=()), example(steps=())]
    assert len({t.id for t in ours}) == 2 and write_log(ours, tmp_path / "log.jsonl", name) == 7
    assert list(read_log(tmp_path / "log.jsonl", name)) == ours


def test_sessions_of_two_logs_that_share_a_name_stay_apart(tmp_path):
    both = [t for n in (1, 2) for t in read_log(dump(tmp_path / f"{n}.jsonl", *[{"session_id": 7, **m} for m in chat(f"Goal {n}", "act", "seen")["messages"]]))]
    write_log(both, tmp_path / "both.jsonl", "turns")
    assert list(read_log(tmp_path / "both.jsonl")) == both and [t.goal for t in both] == ["Goal 1", "Goal 2"]
    assert [line["session_id"] for line in map(json.loads, (tmp_path / "both.jsonl").read_text().splitlines())] == [7] * 3 + ["7#2"] * 3


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_that_messages_cannot_say_comes_back(tmp_path, name):
    calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": ""}, "result": "x"} for id in "aab"]  # two of one id
    write_log([odd := example(steps=(Step("", "x", tool_calls=calls),)), example()], tmp_path / "log.jsonl", name)
    assert list(read_log(tmp_path / "log.jsonl", name)) == [odd, example()]


def test_two_sessions_interleaved(tmp_path):
    lines = [{"conversation_id": who, "role": role, "content": f"{who} {n}", "at": n} for n, role in enumerate(["user", "assistant", "user"]) for who in ("p", "q")]
    path = dump(tmp_path / "log.jsonl", *lines, {"role": "user", "content": "lost"}, {"conversation_id": "p", "content": "no role"})
    found, problems = read(path, options=Options(task="conversation_id"))
    assert [(t.task.variation, t.goal, t.actions, t.steps[0].observation) for t in found] == [("p", "p 0", ("p 1",), "p 2"), ("q", "q 0", ("q 1",), "q 2")]
    assert [p[:3] for p in problems] == [("line", 7, "session_id"), ("line", 8, "role")]
    write_log(found, tmp_path / "again.jsonl", "turns", keep=False)
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, lines))


@pytest.mark.parametrize("record, name", [
    (example().to_dict(), "exprag"), (gpt("a"), "sharegpt"), (gpt("a", item_id="x"), "agentgym"), (chat("a"), "openai"), (chat("a")["messages"], "openai"),
    ({"conversations": [{"role": "user", "content": "x"}]}, "openai"), ({"session_id": 1, "role": "user", "content": "x"}, "turns"), (otlp(), "otel"),
    ({"conversations": [{"from": "human", "value": "x", "loss": None}], "id": "os_1"}, "agentinstruct")])
def test_detection(record, name): assert detect(record) == name


@pytest.mark.parametrize("record", [{}, [], {"prompt": "x"}, {"conversations": []}, chat("a") | gpt("a"), {"role": "user"}, 3, None, [[1]]])
def test_unsure_is_refused_with_the_way_out(tmp_path, record):
    with pytest.raises(TrajectoryError, match="say which it is .format= one of.*turns="): detect(record)
    with pytest.raises(TrajectoryError, match="log.jsonl, line 1: the record "): list(read_log(dump(tmp_path / "log.jsonl", record, record)))


def test_messages_under_another_name_come_back(tmp_path):
    record = {"conversations": chat("a", "b", "c")["messages"], "agent": "t2"}
    found = list(read_log(dump(tmp_path / "a.jsonl", record)))
    write_log(found, tmp_path / "b.jsonl", "openai", keep=False)
    assert json.loads((tmp_path / "b.jsonl").read_text()) == record


def test_unknown_names_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="sharegpt"): list(read_log(dump(tmp_path / "a.jsonl", chat("a")), "sharegtp"))
    with pytest.raises(ValueError, match="agentgym"): write_log([], tmp_path / "x.jsonl", "agentgim")
    with pytest.raises(TrajectoryError, match="ends in .jsonl"): write_log([], tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError): list(read_log(tmp_path / "nowhere.jsonl"))
    (tmp_path / "z").write_bytes(b"\x28\xb5\x2f\xfd1234")
    with pytest.raises(TrajectoryError, match="unpack it first"): list(read_log(tmp_path / "z"))


def test_empty_files(tmp_path):
    for name in ("a.jsonl", "b.json"):
        assert write_log([], tmp_path / name, "openai") == 0 and list(read_log(tmp_path / name)) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "log.jsonl.gz"
    write_log([example()], path, "openai")
    before = path.read_bytes()

    def broken():
        yield example(goal="other")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): write_log(broken(), path, "openai")
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
def test_a_private_log_stays_private(tmp_path):
    path = tmp_path / "log.json.gz"
    path.touch(0o600)
    write_log([example()], path)
    assert path.stat().st_mode & 0o777 == 0o600 and list(read_log(path)) == [example()]


def test_a_folder_of_files_has_folds(tmp_path):
    for name, fold in (("data/train-00000-of-00001.jsonl", "train"), ("validation.jsonl", "dev"), ("test/0.jsonl", "test")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        dump(tmp_path / name, chat(f"of {fold}", "a"))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert {t.goal: t.task.fold for t in read_log(tmp_path)} == {"of train": "train", "of dev": "dev", "of test": "test"}
    with pytest.raises(TrajectoryError, match="holds no file"): list(read_log((tmp_path / "empty").mkdir() or tmp_path / "empty"))


PEAK = """
import re, sys
from exprag.logs.files import read_log
n = sum(1 for _ in read_log(sys.argv[1]))
print(n, re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
"""  # not ru_maxrss, which a process inherits from the one that started it


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's own figures")
@pytest.mark.parametrize("name, ending", [("sharegpt", "jsonl"), ("openai", "json"), ("otel", "jsonl"), ("turns", "jsonl")])
def test_memory_does_not_follow_the_size(tmp_path, name, ending):
    long = "You see a door. " * 900
    peaks = []
    for count in (30, 700):
        path = tmp_path / f"{count}.{ending}"
        write_log((example(goal=f"goal {n}", first_observation=long, steps=[Step("look", long)]) for n in range(count)), path, name)
        done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True).stdout.split()
        assert int(done[0]) == count
        peaks.append(int(done[1]) * 1024)
    assert path.stat().st_size > 15e6 and peaks[1] - peaks[0] < path.stat().st_size / 2


class TestParquet:
    @pytest.fixture(autouse=True)
    def extra(self): self.pa = pytest.importorskip("pyarrow", reason="needs the extra: pip install 'exprag[parquet]'")

    @calm
    @given(st.lists(trajectories, min_size=1, max_size=3), st.sampled_from(["sharegpt", "agentgym", "agentinstruct", "openai"]))
    def test_round_trip(self, tmp_path_factory, ts, name):
        path = tmp_path_factory.mktemp("t") / "t.parquet"
        write_log(ts, path, name)
        assert list(read_log(path, name)) == ts

    @pytest.mark.parametrize("name, record", [("agentgym", gpt("Goal", "Thought:\na\n\nAction:\nb", "c", item_id="sci_3")), ("openai", chat("Goal", "act", "seen"))])
    def test_a_table_of_somebody_else(self, tmp_path, name, record):
        import datetime
        rows = [{**record, "made": datetime.datetime(2026, 1, n)} for n in range(1, 4)]
        self.pa.parquet.write_table(self.pa.Table.from_pylist(rows), tmp_path / "train.parquet") if hasattr(self.pa, "parquet") else __import__("pyarrow.parquet").parquet.write_table(self.pa.Table.from_pylist(rows), tmp_path / "train.parquet")
        found = list(read_log(tmp_path))
        assert len(found) == 3 and found[0].extra["log"]["fields"]["made"] == "2026-01-01T00:00:00" and found[0].goal == "Goal"

    def test_save_to_disk_folders(self, tmp_path):
        table = self.pa.Table.from_pylist([chat(f"Goal {n}", "act") for n in range(5)])
        (tmp_path / "train").mkdir()
        with self.pa.OSFile(str(tmp_path / "train/data-00000-of-00001.arrow"), "wb") as file, self.pa.ipc.new_stream(file, table.schema) as stream: stream.write_table(table)
        (tmp_path / "train/state.json").write_text("{}")
        assert [t.goal for t in read_log(tmp_path)] == [f"Goal {n}" for n in range(5)]

    def test_a_bad_row_is_named(self, tmp_path):
        rows = [gpt("Goal", "a"), {"conversations": [{"from": None, "value": "x"}]}, gpt("Goal 2", "b")]
        write_records(rows, tmp_path / "t.parquet")
        found, problems = read(tmp_path / "t.parquet", "sharegpt")
        assert [t.goal for t in found] == ["Goal", "Goal 2"] and problems[0][:3] == ("row", 2, "conversations[0].from")

    @pytest.mark.parametrize("late, said", [
        ({"a": 1, "b": 2}, "row 67 has b,"), ({"a": 1, "turns": [{"from": "x"}, {"from": "x", "loss": True}]}, r"row 67 has turns\[1\].loss,")])
    @pytest.mark.parametrize("given", [False, True])
    def test_a_field_that_no_column_holds_is_an_error(self, tmp_path, late, said, given):
        rows = [{"a": 1, "turns": [{"from": "x"}]} for _ in range(66)]
        schema = self.pa.schema([("a", self.pa.int64()), ("turns", self.pa.list_(self.pa.struct([("from", self.pa.string())])))]) if given else None
        assert write_records(rows, tmp_path / "t.parquet", schema) == 66
        with pytest.raises(TrajectoryError, match=said): write_records([*rows, late], tmp_path / "t.parquet", schema)

    def test_columns_come_from_all_of_the_first_rows(self, tmp_path):
        write_records([{"a": 1}, {"b": {"c": "x"}}, {"b": {"d": 2}}], tmp_path / "t.parquet")
        assert [row for _, _, row in records(tmp_path / "t.parquet", None)] == [{"a": 1, "b": None}, {"a": None, "b": {"c": "x", "d": None}}, {"a": None, "b": {"c": None, "d": 2}}]

    def test_an_episode_that_no_table_holds_is_not_written_empty(self, tmp_path):
        odd = example(goal="\ud800")
        with pytest.raises(TrajectoryError, match="does not fit a table of openai"): write_log([odd], tmp_path / "t.parquet", "openai", keep=False)
        write_log([odd], tmp_path / "t.parquet", "openai")
        assert list(read_log(tmp_path / "t.parquet", "openai")) == [odd]

    def test_what_json_cannot_hold_is_refused_with_its_column(self, tmp_path):
        from decimal import Decimal
        sums = [Decimal(text) for text in ("12.00", "0.10", "12345678901234567890.12")]
        write_records([{**gpt("Goal", "act"), "sum": s, "picture": {"bytes": b}} for s, b in zip([*sums, sums[0]], [None] * 3 + [b"\xff"])], tmp_path / "t.parquet")
        problems = []
        assert [(row["sum"], type(row["sum"])) for _, _, row in records(tmp_path / "t.parquet", problems.append)] == [(12, int), (0.1, float)]
        assert [(p.number, p.field, p.reason[:12]) for p in problems] == [(3, "sum", "is a Decimal"), (4, "picture.bytes", "is a bytes, ")]
        assert len(list(read_log(tmp_path / "t.parquet", refused=[].append))) == 2

    def test_a_truncated_table(self, tmp_path):
        path = tmp_path / "t.parquet"
        write_log([example()], path, "openai")
        path.write_bytes(path.read_bytes()[:-50])
        assert "damaged or cut short" in read(path, "openai")[1][0][3]


def test_a_missing_extra_says_how_to_get_it(tmp_path):
    code = ("import sys; sys.modules['pyarrow'] = None\nfrom exprag.logs.files import read_log, write_log\n"
            "open(sys.argv[1], 'wb').write(b'PAR1xxxx')\n"
            "for call in (lambda: list(read_log(sys.argv[1])), lambda: write_log([], sys.argv[1] + '.parquet', 'openai')):\n"
            "    try: call()\n    except ImportError as error: print(error)")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.parquet")], capture_output=True, text=True, check=True).stdout
    assert out.count("pip install 'exprag[parquet]'") == 2


def test_import_is_light():
    code = "import sys, exprag.logs.files; print([m for m in ('numpy', 'pyarrow', 'torch', 'sqlite3') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "['sqlite3']"


def test_the_measurement_in_the_book_is_whole():
    saved = json.loads((ROOT / "nbs/data/logs_benchmark.json").read_text())["formats"]
    assert set(saved) >= set(NAMES) and all(m[what]["episodes"] == 10_000 for m in saved.values() for what in ("write", "read"))


class TestCommandLine:
    def run(self, *arguments) -> int:
        from exprag.cli import main
        return main(list(map(str, arguments)))

    def test_import_show_export(self, tmp_path, capsys):
        log, store = dump(tmp_path / "log.jsonl", {**gpt("Boil water.\n\nA kitchen.", "go", "seen"), "item_id": "k_1"}, b"{", {**gpt("Cool it.", "go"), "item_id": "k_2"}), tmp_path / "s.db"
        assert self.run("import", log, "--store", store, "--format", "agentgym", "--fold", "dev") == 1
        out, err = capsys.readouterr()
        assert "2 episodes added, 0 known before, 1 records refused" in out and "log.jsonl, line 2: not JSON" in err
        assert self.run("import", log, "--store", store, "--fold", "dev") == 1 and "0 episodes added, 2 known" in capsys.readouterr().out
        assert self.run("export", tmp_path / "out.jsonl", "--store", store, "--format", "openai") == 0
        assert {t.task.fold for t in read_log(tmp_path / "out.jsonl")} == {"dev"}
        assert self.run("export", tmp_path / "out.jsonl", "--store", store) == 1 and "--force" in capsys.readouterr().err
        first = next(iter(read_log(tmp_path / "out.jsonl")))
        assert self.run("show", first.id[:10], "--store", store) == 0 and first.goal in capsys.readouterr().out
        assert self.run("show", "", "--store", store) == 1 and "holds 2 episodes" in capsys.readouterr().err

    def test_nothing_steers_the_terminal(self, tmp_path, capsys):
        log, store = dump(tmp_path / "log.jsonl", chat("Goal\x1b[2J", "act", "\x1b]0;seen\x07")), tmp_path / "s.db"
        assert self.run("import", log, "--store", store) == 0 and self.run("show", "", "--store", store) == 0
        assert "\x1b" not in capsys.readouterr().out

    def test_errors_are_one_line(self, tmp_path, capsys):
        assert self.run("import", tmp_path / "nowhere", "--store", tmp_path / "s.db") == 1
        assert self.run("show", "x", "--store", tmp_path / "none.db") == 1
        assert all(line.startswith("exprag: ") for line in capsys.readouterr().err.splitlines())
