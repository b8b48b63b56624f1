"Records of conversations become episodes, and come back."
import json
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st
from log_records import chat, gpt
from trajectory_strategies import calm, call, example, plain_steps, tasks, text, trajectories, value

from exprag.logs.files import NAMES
from exprag.logs.messages import chat_task
from exprag.logs.formats import FORMATS, KEPT, Options, read_record, write_record
from exprag.logs.records import BadRecord, to_line
from exprag.trajectory import Step, Task, Trajectory


CONVERSATIONS = [name for name in NAMES if name not in ("exprag", "otel")]


@calm
@given(trajectories, st.sampled_from(CONVERSATIONS))
def test_a_trajectory_comes_back_from_every_format(trajectory, name):
    record = json.loads(to_line(write_record(trajectory, FORMATS[name])))
    assert read_record(record, FORMATS[name]) == trajectory
    assert read_record(record, FORMATS[name], Options(world="other", fold="test")) == trajectory  # it says itself what it is


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
@given(st.builds(Trajectory, tasks, text, text, st.lists(plain_steps, max_size=4).map(tuple)),
       st.lists(st.none() | st.booleans(), min_size=4, max_size=4))
def test_sharegpt_round_trip(trajectory, marks):
    steps = tuple(replace(s, extra={"loss": mark}) for s, mark in zip(trajectory.steps, marks))
    marked = replace(trajectory, steps=steps)
    record = json.loads(to_line(write_record(marked, FORMATS["sharegpt"])))
    assert [t["loss"] for t in record["conversations"] if "loss" in t] == marks[:len(steps)]
    back = read_record(record, FORMATS["sharegpt"])
    assert back == marked and write_record(back, FORMATS["sharegpt"]) == record


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


def test_eto():
    record = gpt("Interact with a household.", "OK", "Your task is to: cool a mug.\n\nYou are in the kitchen.", "Thought: I need a mug.\nAction: go to shelf 1", "On the shelf...", id=7, game_file="x/y.tw-pddl")
    read = read_record(record, FORMATS["sharegpt"])
    assert (read.goal, read.first_observation) == ("Your task is to: cool a mug.", "You are in the kitchen.")
    assert [(s.thought, s.action, s.observation) for s in read.steps] == [("I need a mug.", "go to shelf 1", "On the shelf...")]
    assert read.task == chat_task(read.goal) and read.extra["log"]["fields"]["game_file"] == "x/y.tw-pddl"


TRAIN = ("Book a train to Paris", "Sure, which day?", "Monday", "book(monday)")

AGREED = ("You play.", "Understood.", "Boil water.", "go")

ACTED = (*AGREED[:3], "Thought: hot.\nAction: go")


@pytest.mark.parametrize("name, turns, goal", [
    ("sharegpt", TRAIN, TRAIN[0]), ("openai", TRAIN, TRAIN[0]), ("sharegpt", AGREED, AGREED[0]), ("sharegpt", ACTED, AGREED[2]), ("openai", ACTED, AGREED[2]), ("agentgym", AGREED, AGREED[2]), ("openai", AGREED, AGREED[0]), ("turns", AGREED, AGREED[0])])
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


def test_agentgym_form():
    turns = gpt("Instruction", "OK", "Goal\n\nRoom", "Thought:\nI go.\n\nAction:\ngo")["conversations"]
    for turn, loss in zip(turns, (None, False, None, True)): turn["loss"] = loss
    read = read_record({"conversations": turns}, FORMATS["agentgym"])
    assert (read.goal, read.first_observation) == ("Goal", "Room")
    assert (read.steps[0].action, read.steps[0].thought, read.steps[0].observation) == ("go", "I go.", "")


def test_a_thought_may_have_a_field_of_its_own():
    record = gpt("Goal", "Action: go", "seen")
    record["conversations"][1]["reasoning_content"] = "I go."
    read = read_record(record, FORMATS["sharegpt"])
    assert (read.steps[0].action, read.steps[0].thought) == ("Action: go", "I go.")
    assert write_record(read, FORMATS["sharegpt"]) == record


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
    ({"messages": chat("a")["messages"]}, "openai", "messages"), ({"messages": []}, "openai", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "openai", "messages[0].content"), (chat("", "b"), "openai", "messages"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}, "openai", "messages[1]"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "function_call": {"nam": "f"}}]}, "openai", "messages[1].function_call.function"),
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
    for bad in ({"reward": "high", "won": True}, {"reward": 1e400, "won": True}, {"reward": 10 ** 400, "won": 1}, {"won": 2}, {"won": "yes"}, {"reward": [], "won": 1}):
        with pytest.raises(BadRecord) as caught: read_record({**chat("Goal", "act"), **bad}, FORMATS["openai"], Options(score="reward", success="won"))
        assert caught.value.field in ("reward", "won")


def test_the_task_may_be_given_by_a_function():
    options = Options(task=lambda record: Task("alfworld", "pick", record["game_file"].split("/")[0], "test"))
    assert read_record(chat("Goal", "act", game_file="g7/game.tw-pddl"), FORMATS["openai"], options).task == Task("alfworld", "pick", "g7", "test")
