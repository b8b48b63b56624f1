"Conversations in traces."
import base64
import json

import pytest
from hypothesis import given
from log_records import agent_spans, dump, otlp, part, read, span
from trajectory_strategies import calm, trajectories

from exprag.logs.files import read_log, span_record, traced_episode
from exprag.logs.formats import Options
from exprag.logs.messages import chat_task
from exprag.logs.spans import conversations, spans_of, to_any
from exprag.trajectory import TrajectoryError


@calm
@given(trajectories)
def test_a_trajectory_comes_back_from_spans(trajectory):
    spans = list(spans_of(json.loads(json.dumps(span_record(trajectory)))))
    [talk] = conversations(spans, lambda span, error: pytest.fail(str(error)))
    assert traced_episode(talk, "x", spans, Options()) == trajectory


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("traces", [("a" * 32, "b" * 32), ("a" * 32, "a" * 32)], ids=["two traces", "one trace"])
def test_two_agents_interleaved_in_spans(tmp_path, traces, as_text):
    both = [s for pair in zip(agent_spans(traces[0], "ann", 0, as_text), agent_spans(traces[1], "bob", 10, as_text)) for s in pair]
    path = dump(tmp_path / "spans.jsonl", *[otlp(s) for s in reversed(both)])  # no order is promised
    found, problems = read(path)
    assert not problems and sorted(t.goal for t in found) == ["ann's goal", "bob's goal"]
    for t in found:
        assert len(t) == 2 and t.steps[0].observation == "a door" and json.loads(t.steps[0].tool_calls[0]["function"]["arguments"])["at"] in t.goal
        assert t.provenance["model"] == "m" and t.task.world == "chat" and len(t.extra["spans"]) == 2


def test_a_session_over_several_traces(tmp_path):
    spans = agent_spans("a" * 32, "ann")
    for s, trace in zip(spans, ("a", "a", "b")):
        s["traceId"] = trace * 32
        if s["name"] == "chat": s["attributes"].append({"key": "gen_ai.conversation.id", "value": to_any("chat 7")})
    [one], problems = read(dump(tmp_path / "s.jsonl", *map(otlp, spans)))
    assert len(one) == 2 and one.task == chat_task(one.goal) and not problems


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
    ({"gen_ai__input__messages": [*ASKS, part("tool", type="tool_call_response", id="9", response="y")]}, "which nobody made"),
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
