"Splitting files into records: compressed, damaged, too long, in other encodings."
import bz2
import gzip
import json
import lzma
import os
import time
import tracemalloc

import pytest
from hypothesis import given, strategies as st
from log_records import chat, dump, gpt, read
from trajectory_strategies import calm, value

from exprag.logs.files import read_log
from exprag.logs.formats import difference, patched
from exprag.logs.records import is_lines, records, split_lines, split_values
from exprag.trajectory import TrajectoryError


@calm
@given(value, value)
def test_difference_is_exact(a, b):
    both = json.loads(json.dumps([a, b]))
    assert json.dumps(patched(both[0], json.loads(json.dumps(difference(*both)))), sort_keys=True) == json.dumps(both[1], sort_keys=True)
    assert difference(both[0], both[0]) is None


def test_each_bad_line_is_reported_and_the_rest_goes_in(tmp_path):
    path = dump(tmp_path / "log.jsonl", gpt("Goal", "a"), b"{broken", gpt("Goal 2", "b"), {"conversations": [{"from": "human", "value": "x"}, {"value": "y"}]}, b"", b"[1, 2]", gpt("Goal 3", "c"))
    found, problems = read(path)
    assert [t.goal for t in found] == ["Goal", "Goal 2", "Goal 3"]
    assert [p[:3] for p in problems] == [("line", 2, ""), ("line", 4, "conversations[1].from"), ("line", 6, "")]
    with pytest.raises(TrajectoryError, match="log.jsonl, line 2.*refused=problems.append"): list(read_log(path))
    with pytest.raises(TrajectoryError, match="records report=problems.append"): list(records(path, None))
    assert len(list(records(path, report=[].append))) == 5


def test_mixed_encodings(tmp_path):
    path = dump(tmp_path / "log.jsonl", json.dumps(chat("café", "a"), ensure_ascii=False).encode(), json.dumps(chat("thé", "b"), ensure_ascii=False).encode("cp1252"), chat("eau", "c"))
    found, problems = read(path)
    assert [t.goal for t in found] == ["café", "eau"] and problems[0][:2] == ("line", 2) and "0xe9" in problems[0][3] and "encodings=" in problems[0][3]
    assert [t.goal for t in read(path, encodings=("utf-8", "cp1252"))[0]] == ["café", "thé", "eau"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_byte_order_marks(tmp_path, encoding):
    path = tmp_path / "log.jsonl"
    path.write_bytes("\n".join(json.dumps(chat(f"göal {n}", "a" * 800), ensure_ascii=False) for n in range(600)).encode(encoding))
    assert len(list(read_log(path))) == 600


def test_an_enormous_line_is_passed_over_without_being_held(tmp_path):
    path, limit = tmp_path / "log.jsonl", 1 << 20
    with path.open("wb") as file:
        file.write(json.dumps(chat("Goal", "a")).encode() + b'\n{"messages": "')
        for _ in range(60): file.write(b"x" * limit)
        file.write(b'"}\n' + json.dumps(chat("Goal 2", "b")).encode())
    tracemalloc.start()
    found, problems = read(path, limit=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [t.goal for t in found] == ["Goal", "Goal 2"] and problems[0][:2] == ("line", 2) and "limit" in problems[0][3]
    assert peak < 8 * limit


def test_an_enormous_element_of_an_array(tmp_path):
    path = tmp_path / "log.json"
    path.write_bytes(b"[" + json.dumps(chat("Goal", "a")).encode() + b',{"messages": "' + b"x" * 5_000_000 + b'"},' + json.dumps(chat("Goal 2", "b")).encode() + b"]")
    found, problems = read(path, limit=1 << 20)
    assert [t.goal for t in found] == ["Goal", "Goal 2"] and problems[0][:2] == ("record", 2)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress])
def test_packed_files_whole_and_cut_short(tmp_path, pack):
    noise = os.urandom  # so that the packed file is long
    path = dump(tmp_path / "log", *[chat(f"Goal {n}", noise(1500).hex()) for n in range(400)])
    whole = pack(path.read_bytes())
    path.write_bytes(whole)
    assert len(list(read_log(path))) == 400
    path.write_bytes(whole[:-len(whole) // 3])
    found, problems = read(path)
    assert [t.goal for t in found] == [f"Goal {n}" for n in range(len(found))]
    assert "cut short" in problems[-1][3] and (len(found) > 100 or pack is bz2.compress)


def test_truncated_files(tmp_path):
    lines = dump(tmp_path / "log.jsonl", chat("Goal", "a"), chat("Goal 2", "b"))
    lines.write_bytes(lines.read_bytes()[:-9])
    assert [t.goal for t in read(lines)[0]] == ["Goal"] and read(lines)[1][0][:2] == ("line", 2)
    array = tmp_path / "log.json"
    array.write_text(json.dumps([chat("Goal", "a"), chat("Goal 2", "b")], indent=1)[:-20])
    found, problems = read(array)
    assert [t.goal for t in found] == ["Goal"] and [p[1] for p in problems] == [2, 3] and "not closed" in problems[-1][3]


def test_a_bad_element_of_an_array_costs_only_itself(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("[\n " + json.dumps(chat("Goal", "a")) + ",\n {'single': quotes},\n " + json.dumps(chat("Goal 2", "}]")) + "\n]")
    found, problems = read(path)
    assert [t.goal for t in found] == ["Goal", "Goal 2"] and [p[:2] for p in problems] == [("record", 2)]


def test_what_stands_bare_in_an_array_is_refused_with_its_number(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('[null, ' + json.dumps(chat("Goal", "a")) + ', 3.5, "a, \\"b]", oops{"messages": 1},\n' + json.dumps(chat("Goal 2", "b")) + ', true\n]')
    found, problems = read(path)
    assert [t.goal for t in found] == ["Goal", "Goal 2"]
    assert [(n, reason[:9]) for _, n, _, reason in problems] == [(1, "is null, "), (3, "is 3.5, w"), (4, 'is "a, \\"'), (5, "not JSON:"), (6, "is int: e"), (8, "is true, ")]


@calm
@given(st.lists(value, max_size=4), st.booleans(), st.integers(1, 30), st.sampled_from([None, 1, "\t"]))
def test_values_are_cut_wherever_pieces_end(values, array, size, indent):
    if not array: values = [v for v in values if isinstance(v, (dict, list))]
    parts = [json.dumps(v, indent=indent) for v in values]
    data = ("[" + ",".join(parts) + "]" if array else "\n".join(parts)).encode()
    if not array and data[:1] == b"[": return  # values one after the other are objects
    pieces = [data[i:i + size] for i in range(0, len(data), size)]
    assert [json.loads(v) for _, v in split_values(pieces)] == values


def values_of(data: bytes, size: int = 7) -> list[bytes]:
    return [v for _, v in split_values(data[i:i + size] for i in range(0, len(data), size))]


@pytest.mark.parametrize("data, values", [
    (b'[{"a": 1} {"b": 2}]', [b'{"a": 1}', b'{"b": 2}']),  # a comma is missing
    (b'[{"a": 1}}, {"b": 2}]', [b'{"a": 1}', b"}", b'{"b": 2}']),  # a bracket too many
    (b'{"a": 1}] {"b": 2}', [b'{"a": 1}', b"]", b'{"b": 2}']),
    (b'[{"a": 1}] {"b": 2}]', [b'{"a": 1}', b'{"b": 2}', b"]"]),
    (b'[{"a": "\\\\"}, {"b": "\\\\\\"}"}]', [b'{"a": "\\\\"}', b'{"b": "\\\\\\"}"}']),  # escapes
    (b'{"a": 1}\nnot JSON\n{"b": 2}', [b'{"a": 1}', b"not JSON", b'{"b": 2}']),
    (b'  \n [ ] ', []), (b"", [])])
def test_a_fault_between_two_values_costs_neither(data, values):
    for size in (1, 2, 3, 7, 100): assert values_of(data, size) == values


@pytest.mark.parametrize("depth", [1, 5, 6, 7, 40])
def test_values_of_any_depth_are_cut_alike(depth):
    deep = json.loads("[" * depth + '{"a": "]}"}' + "]" * depth)
    parts = [json.dumps(value) for value in (deep, {"b": deep}, [deep, {}, deep], {"c": 1})]
    data = ("[" + ", ".join(parts) + "]").encode()
    for size in (1, 5, 64, len(data)): assert values_of(data, size) == [p.encode() for p in parts]


def test_an_array_of_brackets_is_read_in_time():  # no quadratic search for the end of a value
    data = b"[" * 50_000 + b'{"a": ' * 50_000
    started = time.process_time()
    try: list(split_values([data[i:i + (1 << 18)] for i in range(0, len(data), 1 << 18)]))
    except ValueError as error: assert "not closed" in str(error)
    assert time.process_time() - started < 20


@calm
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=5), st.integers(1, 9))
def test_lines_are_cut_wherever_pieces_end(lines, size):
    data = b"\n".join(lines)
    found = list(split_lines(data[i:i + size] for i in range(0, len(data), size)))
    assert found == [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def test_lines_or_one_text():
    assert is_lines(b'{"a": 1}\n{"b": 2}') and is_lines(b'{"a": \n{"b": 2}\n') and is_lines(b'[{"role": "user"}]\n[{"role": "user"}]\n') and is_lines(b'{"a": 1')
    assert not is_lines(b'{\n "a": {"b": 1}\n}') and not is_lines(b'[\n{"a": 1},\n{"b": 2}\n]') and not is_lines(b'[{"a": 1}]')
