"Other people's logs: every format there and back, and every fault we know of."
import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from trajectory_strategies import calm, call, example, text, trajectories, value

from exprag.formats import FORMATS, KEPT, Options, read_record, write_record
from exprag.logs import NAMES, detect, read_log, span_record, traced_episode, write_log
from exprag.records import (
    BadRecord, difference, is_lines, patched, records, split_lines, split_values, to_line, write_records)
from exprag.spans import conversations, spans_of, to_any
from exprag.trajectory import Step, Task, TrajectoryError

ROOT = Path(__file__).resolve().parents[1]
CONVERSATIONS = [name for name in NAMES if name not in ("exprag", "otel")]


def dump(path: Path, *lines) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def chat(*turns: str, **more) -> dict:
    "An OpenAI record whose turns are user, assistant, user, ..."
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)], **more}


def gpt(*turns: str, **more) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)], **more}


def read(path, *args, **options):
    "All episodes, and all refusals as (unit, number, field, reason)."
    problems = []
    found = list(read_log(path, *args, refused=problems.append, **options))
    return found, [(p.unit, p.number, p.field, p.reason) for p in problems]


# -- round trips: trajectory -> record -> trajectory

@calm
@given(trajectories, st.sampled_from(CONVERSATIONS))
def test_a_trajectory_comes_back_from_every_format(trajectory, name):
    record = json.loads(to_line(write_record(trajectory, FORMATS[name])))
    assert read_record(record, FORMATS[name]) == trajectory
    assert read_record(record, FORMATS[name], Options(world="other", fold="test")) == trajectory  # it says itself what it is


@calm
@given(trajectories)
def test_a_trajectory_comes_back_from_spans(trajectory):
    spans = list(spans_of(json.loads(json.dumps(span_record(trajectory)))))
    [talk] = conversations(spans, lambda span, error: pytest.fail(str(error)))
    assert traced_episode(talk, "x", spans, Options()) == trajectory


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


# -- round trips: record -> trajectory -> record

turn_text = text | st.sampled_from(["Thought: a\nAction: b", "Thought:\nx\n\nAction:\ny", "THOUGHT: t\nACTION: go", "Think: m\nAct: bash", "OK", "Action: x"])
more = st.dictionaries(st.sampled_from(["reward", "game_file", "source", "tools"]), value, max_size=2)
losses = st.fixed_dictionaries({}, optional={"loss": st.none() | st.booleans()})


@st.composite
def sharegpt(draw, id="id"):
    turns = []
    if draw(st.booleans()): turns.append({"from": "system", "value": draw(turn_text)})
    for who in draw(st.lists(st.sampled_from(["human", "gpt", "human", "gpt", "observation"]), max_size=6)):
        turns.append({"from": who, "value": draw(turn_text), **draw(losses), **draw(more)})
    if draw(st.booleans()): turns.insert(len(turns), {"from": "function_call", "value": draw(st.sampled_from(
        ['{"name": "f", "arguments": {"a": 1}}', '{"name":"f","arguments":"x"}', '[{"name": "f"}, {"name": "g", "arguments": {}}]']))})
    return {id: draw(st.integers(0, 99) | st.sampled_from(["alfworld_3", "a/b/3@test", "x", ""])), "conversations": turns, **draw(more)}


@st.composite
def openai(draw):
    messages = []
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "user", "assistant", "call"]), max_size=6)):
        if role == "call":
            calls = draw(st.lists(call, min_size=1, max_size=2))
            messages.append({"role": "assistant", "content": draw(st.none() | text), "tool_calls": calls})
            messages += [{"role": "tool", "tool_call_id": c["id"], "content": draw(text), **draw(more)} for c in draw(st.permutations(calls))]
        else: messages.append({"role": role, "content": draw(text), **draw(more)})
    if draw(st.booleans()): messages.insert(0, {"role": draw(st.sampled_from(["system", "developer"])), "content": draw(text)})
    return {"messages": messages, **draw(more)}


@calm
@given(st.sampled_from(["sharegpt", "agentgym", "agentinstruct", "openai"]), st.data())
def test_a_foreign_record_comes_back_as_it_was(name, data):
    fmt = FORMATS[name]
    record = data.draw(openai() if name == "openai" else sharegpt(fmt.id))
    try: trajectory = read_record(record, fmt)
    except BadRecord as error:
        assert error.field and error.reason
        return
    assert json.dumps(write_record(trajectory, fmt), sort_keys=True) == json.dumps(record, sort_keys=True)
    for other in FORMATS.values():  # and through any other format
        assert read_record(json.loads(to_line(write_record(trajectory, other))), other) == trajectory


def test_a_changed_episode_is_written_changed():
    fmt, record = FORMATS["agentgym"], {**gpt("Goal", "Thought:\nhm\n\nAction:\ngo", "seen"), "item_id": "x_1"}
    trajectory = read_record(record, fmt)
    changed = replace(trajectory, steps=(replace(trajectory.steps[0], action="stay"),))
    assert "stay" in write_record(changed, fmt)["conversations"][1]["value"] and read_record(write_record(changed, fmt), fmt) == changed


def test_an_edited_record_with_a_note_is_refused_or_read_as_edited():
    trajectory = example(score=3.0)
    record = write_record(trajectory, FORMATS["openai"])
    assert KEPT in record and KEPT not in write_record(trajectory, FORMATS["openai"], keep=False)
    record[KEPT] = '{"keys": {"steps": {"items": {"7": {"keys": {"reward": {"is": 1.0}}}}, "length": 9}}}'
    with pytest.raises(BadRecord, match="was it edited"): read_record(record, FORMATS["openai"])


@calm
@given(value, value)
def test_difference_is_exact(a, b):
    both = json.loads(json.dumps([a, b]))
    assert json.dumps(patched(both[0], json.loads(json.dumps(difference(*both)))), sort_keys=True) == json.dumps(both[1], sort_keys=True)
    assert difference(both[0], both[0]) is None


# -- the formats themselves

def test_eto():
    record = gpt("Interact with a household.", "OK", "Your task is to: cool a mug.\n\nYou are in the kitchen.", "Thought: I need a mug.\nAction: go to shelf 1", "On the shelf...", id=7, game_file="x/y.tw-pddl")
    read = read_record(record, FORMATS["sharegpt"])
    assert (read.goal, read.first_observation) == ("Your task is to: cool a mug.", "You are in the kitchen.")
    assert [(s.thought, s.action, s.observation) for s in read.steps] == [("I need a mug.", "go to shelf 1", "On the shelf...")]
    assert read.task == Task("sharegpt", "log", "7", "train") and read.extra["log"]["fields"]["game_file"] == "x/y.tw-pddl"


TRAIN = ("Book a train to Paris", "Sure, which day?", "Monday", "book(monday)")
AGREED = ("You play.", "Understood.", "Boil water.", "go")


@pytest.mark.parametrize("name, turns, goal", [
    ("sharegpt", TRAIN, TRAIN[0]), ("openai", TRAIN, TRAIN[0]), ("sharegpt", AGREED, AGREED[2]), ("agentgym", AGREED, AGREED[2]), ("openai", AGREED, AGREED[0]), ("turns", AGREED, AGREED[0])])
def test_only_training_sets_open_with_a_preamble_and_it_asks_nothing(name, turns, goal):
    record = (gpt if FORMATS[name].marks else chat)(*turns)
    assert read_record(record, FORMATS[name]).goal == goal
    assert read_record(record, FORMATS[name], Options(preamble=0)).goal == turns[0]
    assert read_record(record, FORMATS[name], Options(preamble=2)).goal == turns[2]


def test_agentinstruct_preamble_by_loss_marks():
    turns = gpt("You play.", "Here is an example: ls", "It printed.", "Yes.", "Count the files.", "Think: I list.\nAct: bash", "3 files")["conversations"]
    for turn, loss in zip(turns, [None, False, None, False, None, True, None]): turn["loss"] = loss
    read = read_record({"id": "os_12", "conversations": turns}, FORMATS["agentinstruct"])
    assert read.task == Task("agentinstruct", "os", "12", "train") and read.goal == "Count the files." and read.actions == ("bash",)
    assert len(read.extra["preamble"]) == 4 and "loss" not in read.steps[0].extra


def test_loss_marks_that_say_something_are_kept():
    turns = gpt("Goal", "a", "x", "b", "y")["conversations"]
    for turn, loss in zip(turns, [None, True, None, False, None]): turn["loss"] = loss
    assert [dict(s.extra) for s in read_record({"item_id": "k_1", "conversations": turns}, FORMATS["agentgym"]).steps] == [{}, {"loss": False}]


def test_llama_factory_tools():
    record = {"system": "You may search.", "tools": "[...]", "conversations": [{"from": "human", "value": "Trains?"}, {"from": "function_call", "value": '{"name": "search", "arguments": {"q": "trains"}}'},
                                                                               {"from": "observation", "value": "two"}, {"from": "gpt", "value": "There are two."}]}
    read = read_record(record, FORMATS["sharegpt"])
    assert read.steps[0].tool_calls[0]["function"]["name"] == "search" and read.steps[0].observation == "two" and read.extra["system"] == "You may search."
    assert write_record(read, FORMATS["sharegpt"], keep=False) | {"id": 0} == record | {"id": 0}


def test_tool_calls_and_results_in_any_order():
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": i}} for i in "ab"]
    record = {"messages": [{"role": "user", "content": "Do."}, {"role": "assistant", "content": None, "tool_calls": calls},
                           {"role": "tool", "tool_call_id": "b", "content": "B"}, {"role": "tool", "tool_call_id": "a", "content": "A"}, {"role": "assistant", "content": "Done."}]}
    read = read_record(record, FORMATS["openai"])
    assert [c["result"] for c in read.steps[0].tool_calls] == ["A", "B"] and read.steps[1].action == "Done."
    assert write_record(read, FORMATS["openai"]) == record


@pytest.mark.parametrize("record, name, field", [
    (chat("a") | {"messages": [{"content": "x"}]}, "openai", "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "y"}]}, "openai", "messages[1].role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "openai", "messages[0].role"),
    ({"messages": [*chat("a", "b", "c")["messages"], {"role": "system", "content": "x"}]}, "openai", "messages[3].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "openai", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}, "openai", "messages[1]"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "openai", "messages[1].function_call"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": "f"}]}, "openai", "messages[1].tool_calls"),
    ({"messages": "x"}, "openai", "messages"), ({"messages": ["x"]}, "openai", "messages[0]"), ([], "openai", ""), (3, "sharegpt", ""),
    ({"conversations": [{"value": "x"}]}, "sharegpt", "conversations[0].from"), ({"conversations": [{"from": "human"}]}, "sharegpt", "conversations[0].value"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "bing", "value": "y"}]}, "sharegpt", "conversations[1].from"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{"}]}, "sharegpt", "conversations[1].value"), ({}, "agentgym", "conversations")])
def test_the_field_at_fault_is_named(record, name, field):
    with pytest.raises(BadRecord) as caught: read_record(record, FORMATS[name])
    assert caught.value.field == field and caught.value.reason


def test_scores_come_from_named_fields():
    record = chat("Goal", "act", "seen", reward=0.5, won=True)
    read = read_record(record, FORMATS["openai"], Options(score="reward", success="won"))
    assert (read.score, read.success) == (0.5, True) and write_record(read, FORMATS["openai"], keep=False) == record
    for bad in ({"reward": "high", "won": True}, {"reward": True, "won": True}, {"reward": 1, "won": 1}, {"won": True}):
        with pytest.raises(BadRecord) as caught: read_record({**chat("Goal", "act"), **bad}, FORMATS["openai"], Options(score="reward", success="won"))
        assert caught.value.field in ("reward", "won")


def test_the_task_may_be_given_by_a_function():
    options = Options(task=lambda record: Task("alfworld", "pick", record["game_file"].split("/")[0], "test"))
    assert read_record(chat("Goal", game_file="g7/game.tw-pddl"), FORMATS["openai"], options).task == Task("alfworld", "pick", "g7", "test")


# -- files with faults

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


@calm
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=5), st.integers(1, 9))
def test_lines_are_cut_wherever_pieces_end(lines, size):
    data = b"\n".join(lines)
    found = list(split_lines(data[i:i + size] for i in range(0, len(data), size)))
    assert found == [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def test_lines_or_one_text():
    assert is_lines(b'{"a": 1}\n{"b": 2}') and is_lines(b'{"a": \n{"b": 2}\n') and is_lines(b'[{"role": "user"}]\n[{"role": "user"}]\n') and is_lines(b'{"a": 1')
    assert not is_lines(b'{\n "a": {"b": 1}\n}') and not is_lines(b'[\n{"a": 1},\n{"b": 2}\n]') and not is_lines(b'[{"a": 1}]')


# -- several agents in one log

def test_two_sessions_interleaved(tmp_path):
    lines = [{"conversation_id": who, "role": role, "content": f"{who} {n}", "at": n} for n, role in enumerate(["user", "assistant", "user"]) for who in ("p", "q")]
    path = dump(tmp_path / "log.jsonl", *lines, {"role": "user", "content": "lost"}, {"conversation_id": "p", "content": "no role"})
    found, problems = read(path)
    assert [(t.task.variation, t.goal, t.actions, t.steps[0].observation) for t in found] == [("p", "p 0", ("p 1",), "p 2"), ("q", "q 0", ("q 1",), "q 2")]
    assert [p[:3] for p in problems] == [("line", 7, "session_id"), ("line", 8, "role")]
    write_log(found, tmp_path / "again.jsonl", "turns")
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, lines))


def span(trace, n, operation, start, parent="", events=(), **attributes):
    return {"traceId": trace, "spanId": f"{n:016x}", "parentSpanId": parent, "name": operation, "startTimeUnixNano": str(start), "events": list(events),
            "attributes": [{"key": k.replace("__", "."), "value": to_any(v)} for k, v in {"gen_ai__operation__name": operation, **attributes}.items()]}


def otlp(*spans): return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


def part(role, **fields): return {"role": role, "parts": [fields]}


def agent_spans(trace, name, first=0, as_text=True):
    "An agent that calls a tool and then answers, as three spans."
    dumps = json.dumps if as_text else (lambda v: v)
    user, asked = part("user", type="text", content=f"{name}'s goal"), part("assistant", type="tool_call", id=f"{name}1", name="look", arguments={"at": name})
    result = part("tool", type="tool_call_response", id=f"{name}1", response="a door")
    answer = part("assistant", type="text", content=f"{name} is done")
    return [span(trace, first + 1, "chat", first + 1, gen_ai__input__messages=dumps([user]), gen_ai__output__messages=dumps([{**asked, "finish_reason": "tool_call"}]), gen_ai__request__model="m"),
            span(trace, first + 2, "execute_tool", first + 2, gen_ai__tool__call__id=f"{name}1", gen_ai__tool__call__result="a door"),
            span(trace, first + 3, "chat", first + 3, gen_ai__input__messages=dumps([user, asked, result]), gen_ai__output__messages=dumps([answer]), gen_ai__request__model="m")]


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("traces", [("a" * 32, "b" * 32), ("a" * 32, "a" * 32)], ids=["two traces", "one trace"])
def test_two_agents_interleaved_in_spans(tmp_path, traces, as_text):
    both = [s for pair in zip(agent_spans(traces[0], "ann", 0, as_text), agent_spans(traces[1], "bob", 10, as_text)) for s in pair]
    path = dump(tmp_path / "spans.jsonl", *[otlp(s) for s in reversed(both)])  # no order is promised
    found, problems = read(path)
    assert not problems and sorted(t.goal for t in found) == ["ann's goal", "bob's goal"]
    for t in found:
        assert len(t) == 2 and t.steps[0].observation == "a door" and json.loads(t.steps[0].tool_calls[0]["function"]["arguments"])["at"] in t.goal
        assert t.provenance["model"] == "m" and t.task.world == "otel" and len(t.extra["spans"]) == 2


def test_a_session_over_several_traces(tmp_path):
    spans = agent_spans("a" * 32, "ann")
    for s, trace in zip(spans, ("a", "a", "b")):
        s["traceId"] = trace * 32
        if s["name"] == "chat": s["attributes"].append({"key": "gen_ai.conversation.id", "value": to_any("chat 7")})
    [one], problems = read(dump(tmp_path / "s.jsonl", *map(otlp, spans)))
    assert len(one) == 2 and one.task.variation == "chat 7" and not problems


def test_a_tool_result_that_no_call_was_given(tmp_path):
    [one], _ = read(dump(tmp_path / "s.jsonl", otlp(*agent_spans("a" * 32, "ann")[:2])))
    assert one.steps[0].observation == "a door"


def test_inputs_that_hold_only_what_is_new(tmp_path):
    first, tool, last = agent_spans("a" * 32, "ann")
    last["attributes"][1]["value"] = to_any([part("tool", type="tool_call_response", id="ann1", response="a door")])
    [one], _ = read(dump(tmp_path / "s.jsonl", otlp(first, last)))
    assert len(one) == 2 and one.goal == "ann's goal"


@pytest.mark.parametrize("change, said", [
    ({"gen_ai__input__messages": None}, "CAPTURE_MESSAGE_CONTENT"), ({"gen_ai__input__messages": '[{"role": "us'}, "limit for attributes"),
    ({"gen_ai__input__messages": [part("user", type="blob", content="")]}, "blob"), ({"gen_ai__input__messages": [{"parts": []}]}, "is missing"),
    ({"gen_ai__input__messages": [part("user", type="text", content="x")], "gen_ai__output__messages": [part("assistant", type="text", content="x")] * 2}, "2 choices")])
def test_bad_spans_are_named_and_the_rest_goes_in(tmp_path, change, said):
    bad = span("c" * 32, 99, "chat", 1, **{k: v for k, v in change.items() if v is not None})
    found, problems = read(dump(tmp_path / "s.jsonl", otlp(*agent_spans("a" * 32, "ann")), otlp(bad)))
    assert len(found) == 1 and len(problems) == 1 and problems[0][1] == 2 and problems[0][2].startswith("attributes.gen_ai") and said in problems[0][3]


ASKS = [part("user", type="text", content="x"), part("assistant", type="tool_call", id="1", name="f", arguments="")]


@pytest.mark.parametrize("change, said", [
    ({"gen_ai__input__messages": [*ASKS, part("tool", type="tool_call_response", id="9", response="y")]}, "no call has as its id"),
    ({"gen_ai__input__messages": [{"role": "assistant", "content": "x", "tool_calls": ["f"]}]}, "trace cccc"),
    ({"gen_ai__input__messages": ASKS[:1], "seconds": float("nan")}, "no such number"),
    ({"gen_ai__input__messages": ASKS[:1], "exprag__kept": 3}, "was it edited")])
def test_one_bad_trace_is_named_and_the_rest_goes_in(tmp_path, change, said):
    bad = otlp(span("c" * 32, 99, "chat", 1, gen_ai__output__messages=[part("assistant", type="text", content="done")], **change))
    path = dump(tmp_path / "s.jsonl", bad, otlp(*agent_spans("a" * 32, "ann")))
    found, problems = read(path)
    assert [t.goal for t in found] == ["ann's goal"] and [p[:2] for p in problems] == [("line", 1)] and said in problems[0][3]
    with pytest.raises(TrajectoryError, match="s.jsonl, line 1"): list(read_log(path))


@pytest.mark.parametrize("name", [["a", 1], "\ud800", 7])
def test_a_conversation_may_have_any_id(tmp_path, name):
    spans = agent_spans("a" * 32, "ann")
    for s in spans: s["attributes"].append({"key": "gen_ai.conversation.id", "value": to_any(name)})
    [one], problems = read(dump(tmp_path / "s.jsonl", otlp(*spans)))
    assert len(one) == 2 and not problems


def test_spans_that_are_not_otlp(tmp_path):
    path = dump(tmp_path / "s.jsonl", otlp(*agent_spans("a" * 32, "ann")), {"resourceSpans": 3}, {"resourceMetrics": []}, otlp({"traceId": "x"}))
    found, problems = read(path)
    assert len(found) == 1 and [p[:3] for p in problems] == [("line", n, "resourceSpans") for n in (2, 3, 4)]


def test_base64_ids_and_pretty_printed_exports(tmp_path):
    import base64
    spans = agent_spans("ab" * 16, "ann")
    for s in spans: s["traceId"], s["spanId"] = base64.b64encode(bytes.fromhex(s["traceId"])).decode(), base64.b64encode(bytes.fromhex(s["spanId"])).decode()
    path = tmp_path / "s.json"
    path.write_text(json.dumps(otlp(*spans), indent=2))
    [one], _ = read(path)
    assert one.provenance["trace"] == "ab" * 16 and len(one) == 2


# -- which format

@pytest.mark.parametrize("record, name", [
    (example().to_dict(), "exprag"), (gpt("a"), "sharegpt"), (gpt("a", item_id="x"), "agentgym"), (chat("a"), "openai"), (chat("a")["messages"], "openai"),
    ({"conversations": [{"role": "user", "content": "x"}]}, "openai"), ({"session_id": 1, "role": "user", "content": "x"}, "turns"), (otlp(), "otel"),
    ({"conversations": [{"from": "human", "value": "x", "loss": None}], "id": "os_1"}, "agentinstruct")])
def test_detection(record, name): assert detect(record) == name


@pytest.mark.parametrize("record", [{}, [], {"prompt": "x"}, {"conversations": []}, chat("a") | gpt("a"), {"role": "user", "content": "x"}, 3, None])
def test_unsure_is_refused_with_the_way_out(tmp_path, record):
    with pytest.raises(TrajectoryError, match="say which it is: format="): detect(record)
    with pytest.raises(TrajectoryError, match="log.jsonl: the first record"): list(read_log(dump(tmp_path / "log.jsonl", record, record)))


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


# -- memory

PEAK = """
import resource, sys
from exprag.logs import read_log
n = sum(1 for _ in read_log(sys.argv[1]))
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


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


# -- tables

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
    code = ("import sys; sys.modules['pyarrow'] = None\nfrom exprag.logs import read_log, write_log\n"
            "open(sys.argv[1], 'wb').write(b'PAR1xxxx')\n"
            "for call in (lambda: list(read_log(sys.argv[1])), lambda: write_log([], sys.argv[1] + '.parquet', 'openai')):\n"
            "    try: call()\n    except ImportError as error: print(error)")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.parquet")], capture_output=True, text=True, check=True).stdout
    assert out.count("pip install 'exprag[parquet]'") == 2


def test_import_is_light():
    code = "import sys, exprag.logs; print([m for m in ('numpy', 'pyarrow', 'torch', 'sqlite3') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "['sqlite3']"


def test_the_measurement_in_the_book_is_whole():
    saved = json.loads((ROOT / "nbs/data/logs_benchmark.json").read_text())["formats"]
    assert set(saved) >= set(NAMES) and all(m[what]["episodes"] == 10_000 for m in saved.values() for what in ("write", "read"))


# -- the command line

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
