"Spans of every convention, read by what they hold."
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from log_records import agent_spans, dump, otlp, part, read, span
from trajectory_strategies import calm, value

from exprag.logs.spans import to_any

ASK, ANSWER = "Where is parcel 7?", "In Lyon."
ARGS = '{"n": 7}'


def call(n, parent="", trace="a" * 32, start=None, **attributes):
    "A span without an operation; dots are written `__`."
    made = span(trace, n, "", start or n, parent and f"{parent:016x}", **attributes)
    made["attributes"] = [a for a in made["attributes"] if a["key"] != "gen_ai.operation.name" or a["value"] != to_any("")]
    return made


def log(n, name, trace="a" * 32, **body):
    record = {"traceId": trace, "spanId": f"{n:016x}", "eventName": name, "timeUnixNano": "1", "body": to_any(body)}
    return {"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}


USER, SAID = [part("user", type="text", content=ASK)], [part("assistant", type="text", content=ANSWER)]
PLAIN = {  # how each writes one question and its answer
    "no operation": {"gen_ai.input.messages": json.dumps(USER), "gen_ai.output.messages": json.dumps(SAID)},
    "other operation": {"gen_ai.operation.name": "completion", "gen_ai.input.messages": USER, "gen_ai.output.messages": SAID},
    "openllmetry": {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": ASK, "gen_ai.completion.0.role": "assistant", "gen_ai.completion.0.content": ANSWER,
                    "gen_ai.completion.0.finish_reason": "stop"},
    "openllmetry, parts": {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": json.dumps([{"type": "text", "text": ASK}]),
                           "gen_ai.completion.0.role": "assistant", "gen_ai.completion.0.content": ANSWER},
    "plain prompt": {"gen_ai.prompt": ASK, "gen_ai.completion": ANSWER},
    "openinference": {"openinference.span.kind": "LLM", "llm.input_messages.0.message.role": "user", "llm.input_messages.0.message.contents.0.message_content.type": "text",
                      "llm.input_messages.0.message.contents.0.message_content.text": ASK, "llm.output_messages.0.message.role": "assistant",
                      "llm.output_messages.0.message.content": ANSWER},
    "vercel": {"ai.prompt.messages": json.dumps([{"role": "user", "content": [{"type": "text", "text": ASK}]}]), "ai.response.text": ANSWER},
    "vercel, outer": {"ai.prompt": json.dumps({"prompt": ASK}), "ai.response.text": ANSWER},
    "pydantic-ai 1": {"events": json.dumps([{"event.name": "gen_ai.user.message", "role": "user", "content": ASK},
                                            {"event.name": "gen_ai.choice", "index": 0, "message": {"role": "assistant", "content": ANSWER}}])},
    "pydantic-ai agent": {"pydantic_ai.all_messages": json.dumps([*USER, *SAID])},
    "a call, openai": {"input.value": json.dumps({"messages": [{"role": "user", "content": ASK}], "model": "m"}),
                       "output.value": json.dumps({"choices": [{"message": {"role": "assistant", "content": ANSWER}}]})},
    "a call, langchain": {"input.value": json.dumps({"messages": [[{"lc": 1, "type": "constructor", "id": ["x", "HumanMessage"], "kwargs": {"content": ASK}}]]}),
                          "output.value": json.dumps({"generations": [[{"text": ANSWER, "message": {"lc": 1, "type": "constructor", "id": ["x", "AIMessage"], "kwargs": {"content": ANSWER}}}]]})},
    "a call, gemini": {"gcp.vertex.agent.llm_request": json.dumps({"contents": [{"role": "user", "parts": [{"text": ASK}]}]}),
                       "gcp.vertex.agent.llm_response": json.dumps({"content": {"role": "model", "parts": [{"text": ANSWER}]}})},
    "langfuse": {"langfuse.observation.input": json.dumps([{"role": "user", "content": ASK}]), "langfuse.observation.output": json.dumps({"role": "assistant", "content": ANSWER})},
    "langsmith": {"gen_ai.prompt": json.dumps({"messages": [{"role": "user", "content": ASK}]}),
                  "gen_ai.completion": json.dumps({"choices": [{"message": {"role": "assistant", "content": ANSWER}}]})}}


@pytest.mark.parametrize("name", PLAIN)
def test_one_question_in_every_convention(tmp_path, name):
    made = call(1)
    made["attributes"] = [{"key": k, "value": to_any(v)} for k, v in PLAIN[name].items()]
    [one], problems = read(dump(tmp_path / "s.jsonl", otlp(made)))
    assert not problems and one.goal == ASK and [s.action for s in one.steps] == [ANSWER]
    assert ASK not in str(one.extra["spans"]) and ANSWER not in str(one.extra["spans"])  # kept once


def test_twelve_numbered_messages_stay_in_order(tmp_path):
    turns = [("user", "assistant")[i % 2] for i in range(12)]
    given = {f"gen_ai__prompt__{i}__{k}": v for i, role in enumerate(turns) for k, v in (("role", role), ("content", f"turn {i}"))}
    [one], _ = read(dump(tmp_path / "s.jsonl", otlp(call(1, **given))))
    assert [s.action for s in one.steps] == [f"turn {i}" for i in range(1, 12, 2)] and one.goal == "turn 0"


NUMBERED = {
    "openllmetry": ({"gen_ai__prompt__1__role": "assistant", "gen_ai__prompt__1__tool_calls__0__id": "c1", "gen_ai__prompt__1__tool_calls__0__name": "find",
                     "gen_ai__prompt__1__tool_calls__0__arguments": ARGS, "gen_ai__prompt__2__role": "tool", "gen_ai__prompt__2__tool_call_id": "c1",
                     "gen_ai__prompt__2__content": "B"}, "gen_ai__prompt__0__", "gen_ai__completion__0__"),
    "openinference": ({"llm__input_messages__1__message__role": "assistant", "llm__input_messages__1__message__tool_calls__0__tool_call__id": "c1",
                       "llm__input_messages__1__message__tool_calls__0__tool_call__function__name": "find",
                       "llm__input_messages__1__message__tool_calls__0__tool_call__function__arguments": ARGS, "llm__input_messages__2__message__role": "tool",
                       "llm__input_messages__2__message__tool_call_id": "c1", "llm__input_messages__2__message__content": "B"},
                      "llm__input_messages__0__message__", "llm__output_messages__0__message__")}


@pytest.mark.parametrize("name", NUMBERED)
def test_numbered_tool_calls(tmp_path, name):
    more, first, said = NUMBERED[name]
    attributes = {f"{first}role": "user", f"{first}content": ASK, f"{said}role": "assistant", f"{said}content": ANSWER, **more}
    [one], problems = read(dump(tmp_path / "s.jsonl", otlp(call(1, **attributes))))
    assert not problems and [s.observation for s in one.steps] == ["B", ""]
    assert one.steps[0].tool_calls[0]["function"] == {"name": "find", "arguments": ARGS}


def test_calls_and_results_of_vercel(tmp_path):
    asked = [{"role": "user", "content": ASK}]
    made = {"toolCallId": "c1", "toolName": "find", "input": {"n": 7}}
    first = call(2, 1, ai__prompt__messages=json.dumps(asked), ai__response__toolCalls=json.dumps([made]), ai__response__reasoning="I look.")
    again = [*asked, {"role": "assistant", "content": [{"type": "tool-call", **made}]},
             {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "c1", "toolName": "find", "output": {"type": "text", "value": "B"}}]}]
    last = call(4, 1, ai__prompt__messages=json.dumps(again), ai__response__toolCalls=json.dumps([{**made, "toolCallId": "c2"}]))
    tool = call(5, 1, ai__toolCall__id="c2", ai__toolCall__result="C")
    outer = call(1, ai__prompt=json.dumps({"prompt": ASK}), ai__response__text=ANSWER)
    [one], problems = read(dump(tmp_path / "s.jsonl", otlp(outer, first, last, tool)))
    assert not problems and [s.observation for s in one.steps] == ["B", "C"] and one.steps[0].thought == "I look."


def test_the_agents_span_is_read_where_its_calls_have_nothing(tmp_path):
    agent = span("a" * 32, 1, "invoke_agent", 1, gen_ai__input__messages=json.dumps(USER), gen_ai__output__messages=json.dumps(SAID), gen_ai__agent__name="clerk")
    chat = span("a" * 32, 2, "chat", 2, f"{1:016x}", gen_ai__request__model="m")
    [one], problems = read(dump(tmp_path / "s.jsonl", otlp(agent, chat)))
    assert not problems and one.goal == ASK and one.task.type == "clerk"


def test_the_agents_span_covers_calls_within_its_time(tmp_path):
    agent = {**span("a" * 32, 1, "invoke_agent", 1, gen_ai__input__messages=json.dumps(USER), gen_ai__output__messages=json.dumps(SAID)), "endTimeUnixNano": "9"}
    inside, after = ({**span("a" * 32, n, "chat", n, "f" * 16), "endTimeUnixNano": str(n + 1)} for n in (2, 9))
    found, problems = read(dump(tmp_path / "s.jsonl", otlp(agent, inside, after)))
    assert len(found) == 1 and len(problems) == 1 and f"{9:016x}" in problems[0][3]


def test_what_a_span_around_repeats_is_not_read_twice(tmp_path):
    calls = agent_spans("a" * 32, "ann", 1)
    for each in calls: each["parentSpanId"] = f"{1:016x}"
    agent = span("a" * 32, 1, "invoke_agent", 0, gen_ai__input__messages=json.dumps([part("user", type="text", content="ann's goal")]),
                 gen_ai__output__messages=json.dumps([part("assistant", type="text", content="ann is done")]))
    [one], problems = read(dump(tmp_path / "s.jsonl", otlp(agent, *calls)))
    assert not problems and len(one) == 2


def test_an_agent_around_another_keeps_its_own_messages(tmp_path):
    outer = span("a" * 32, 1, "invoke_agent", 1, gen_ai__agent__name="boss", gen_ai__input__messages=json.dumps(USER), gen_ai__output__messages=json.dumps(SAID))
    inner = span("a" * 32, 2, "invoke_agent", 2, f"{1:016x}", gen_ai__agent__name="clerk")
    calls = agent_spans("a" * 32, "ann", 2)
    for each in calls: each["parentSpanId"] = f"{2:016x}"
    found, problems = read(dump(tmp_path / "s.jsonl", otlp(outer, inner, *calls)))
    assert not problems and [(t.task.type, t.goal, len(t)) for t in found] == [("boss", ASK, 1), ("clerk", "ann's goal", 2)]


@pytest.mark.parametrize("exported", [True, False], ids=["with its span", "alone"])
def test_events_as_log_records(tmp_path, exported):
    lines = [log(1, "gen_ai.system.message", content="Be brief."), log(1, "gen_ai.user.message", content=ASK), log(1, "other", content="x"),
             log(1, "gen_ai.choice", index=0, message={"content": ANSWER, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": ARGS}}]})]
    if exported: lines.insert(2, otlp(span("a" * 32, 1, "chat", 1, gen_ai__request__model="m")))
    [one], problems = read(dump(tmp_path / "s.jsonl", *lines))
    assert not problems and one.goal == ASK and one.extra["system"] == "Be brief." and one.steps[0].tool_calls[0]["id"] == "c1"
    assert one.provenance.get("model") == ("m" if exported else None)


def test_events_of_a_span(tmp_path):
    def event(name, **attributes): return {"name": name, "attributes": [{"key": k.replace("__", "."), "value": to_any(v)} for k, v in attributes.items()]}
    events = [event("gen_ai.user.message", gen_ai__event__content=json.dumps({"content": ASK})), event("exception", message="x"),
              event("gen_ai.choice", gen_ai__event__content=json.dumps({"message": {"content": ANSWER}}))]
    old = [event("gen_ai.content.prompt", gen_ai__prompt=json.dumps([{"role": "user", "content": "Old?"}])), event("gen_ai.content.completion", gen_ai__completion="Yes.")]
    found, problems = read(dump(tmp_path / "s.jsonl", otlp(span("a" * 32, 1, "chat", 1, events=events)), otlp(span("b" * 32, 1, "chat", 1, events=old))))
    assert not problems and [(t.goal, t.steps[0].action) for t in found] == [(ASK, ANSWER), ("Old?", "Yes.")]


def test_a_trace_without_messages_is_refused_with_its_names_and_the_rest_goes_in(tmp_path):
    web = call(1, trace="b" * 32, http__request__method="GET", url__path="/")
    found, problems = read(dump(tmp_path / "s.jsonl", otlp(web), otlp(*agent_spans("a" * 32, "ann"))))
    assert [t.goal for t in found] == ["ann's goal"] and len(problems) == 1 and problems[0][:3] == ("line", 1, "attributes")
    assert "b" * 32 in problems[0][3] and "http.request.method, url.path" in problems[0][3]


def test_text_that_goes_into_a_function_is_no_message(tmp_path):
    found, problems = read(dump(tmp_path / "s.jsonl", otlp(call(1, input__value="Where?", output__value='["a"]'))))
    assert not found and "input.value, output.value" in problems[0][3]


FUZZED = {**PLAIN, **{name: {k.replace("__", "."): v for k, v in {f"{a}role": "user", f"{a}content": ASK, **more}.items()} for name, (more, a, _) in NUMBERED.items()}}


@calm
@given(st.sampled_from(sorted(FUZZED)), st.data())
def test_no_attribute_crashes_the_reader(name, data):
    attributes = dict(FUZZED[name])
    for _ in range(data.draw(st.integers(1, 3))):
        key, new = data.draw(st.sampled_from(sorted(attributes))), data.draw(value)
        attributes[data.draw(st.sampled_from([key, key + ".0", key.rpartition(".")[0] or key]))] = data.draw(st.sampled_from([new, json.dumps(new)]))
    with tempfile.TemporaryDirectory() as folder:
        made = {**call(1), "attributes": [{"key": k, "value": to_any(v)} for k, v in attributes.items()]}
        found, problems = read(dump(Path(folder, "s.jsonl"), otlp(made), otlp(*agent_spans("b" * 32, "ann"))))
    assert "ann's goal" in [t.goal for t in found] and len(found) + len(problems) >= 2


def test_numbered_names_that_clash_are_refused(tmp_path):
    made = call(1, llm__prompts__0="x", llm__prompts__0__role="user")
    found, problems = read(dump(tmp_path / "s.jsonl", otlp(made), otlp(*agent_spans("b" * 32, "ann"))))
    assert [t.goal for t in found] == ["ann's goal"] and len(problems) == 1
