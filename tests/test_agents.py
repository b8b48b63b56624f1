"Logs that agents and benchmarks leave."
import copy
import json
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from log_records import dump, read
from trajectory_strategies import calm, trajectories, value

from exprag.cli import main
from exprag.logs.benchmarks import AGENTS, agent_format, to_atif
from exprag.logs.files import READABLE, detect, read_log, write_log
from exprag.logs.formats import Options
from exprag.store import Store
from exprag.trajectory import TrajectoryError

ASK, SEEN, ANSWER = "Where is parcel 7?", "depot B", "In depot B."
ARGS = '{"n": 7}'


def text(kind, said): return [{"type": kind, "text": said}]
def line(n, kind, content, **more): return {"type": kind, "uuid": f"u{n}", "sessionId": "s1", "isSidechain": False, "message": {"role": kind, "content": content}, **more}
def item(**payload): return {"type": "response_item", "timestamp": "t", "payload": payload}
def user(said, kind="input_text"): return {"type": "message", "role": "user", "content": text(kind, said)}


CALL = {"type": "function_call", "call_id": "c1", "name": "find", "arguments": ARGS}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": SEEN}
SAID = {"type": "message", "role": "assistant", "content": text("output_text", ANSWER)}
USE, USED = {"type": "tool_use", "id": "c1", "name": "find", "input": {"n": 7}}, {"type": "tool_result", "tool_use_id": "c1", "content": text("text", SEEN)}
BLOCKS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [USED]}, {"role": "assistant", "content": text("text", ANSWER)}]
CHAT = [{"role": "user", "content": ASK}, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": "find", "arguments": {"n": 7}}]},
        {"role": "tool", "tool_call_id": "c1", "content": SEEN}, {"role": "assistant", "content": ANSWER}]
LANG = [{"type": "human", "content": ASK}, {"type": "ai", "content": "", "tool_calls": [{"name": "find", "args": {"n": 7}, "id": "c1", "type": "tool_call"}]},
        {"type": "tool", "content": SEEN, "tool_call_id": "c1"}, {"type": "ai", "content": ANSWER}]
CLASSES = {"human": "HumanMessage", "ai": "AIMessage", "tool": "ToolMessage"}
LC = [{"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", CLASSES[m["type"]]], "kwargs": m} for m in LANG]
GEMINI = [{"role": "user", "parts": [{"text": ASK}]}, {"role": "model", "parts": [{"functionCall": {"name": "find", "args": {"n": 7}}}]},
          {"role": "user", "parts": [{"functionResponse": {"name": "find", "response": SEEN}}]}, {"role": "model", "parts": [{"text": ANSWER}]}]
EVENTS = [{"id": 0, "source": "user", "action": "message", "args": {"content": ASK}}, {"id": 1, "source": "agent", "action": "find", "args": {"n": 7, "thought": ""}},
          {"id": 2, "source": "environment", "observation": "agent_state_changed", "content": ""}, {"id": 3, "cause": 1, "observation": "find", "content": SEEN},
          {"id": 4, "source": "agent", "action": "message", "args": {"content": ANSWER}}]
SDK = [{"kind": "MessageEvent", "source": "user", "llm_message": {"role": "user", "content": text("text", ASK)}}, {"kind": "ConversationStateUpdateEvent", "source": "environment"},
       {"kind": "ActionEvent", "source": "agent", "thought": [], "tool_call_id": "c1", "tool_name": "find", "tool_call": {"id": "c1", "name": "find", "arguments": ARGS}},
       {"kind": "ObservationEvent", "source": "environment", "tool_call_id": "c1", "observation": {"content": text("text", SEEN)}},
       {"kind": "MessageEvent", "source": "agent", "llm_message": {"role": "assistant", "content": text("text", ANSWER)}}]
STEPS = [{"step_id": 1, "source": "user", "message": ASK},
         {"step_id": 2, "source": "agent", "message": "", "tool_calls": [{"tool_call_id": "c1", "function_name": "find", "arguments": {"n": 7}}],
          "observation": {"results": [{"source_call_id": "c1", "content": SEEN}]}},
         {"step_id": 3, "source": "agent", "message": ANSWER}]
HISTORY = [{"role": "user", "content": ASK, "agent": "main"},
           {"role": "assistant", "content": "", "agent": "main", "action": "find 7", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "find", "arguments": ARGS}}]},
           {"role": "tool", "content": SEEN, "agent": "main", "tool_call_ids": ["c1"]}, {"role": "assistant", "content": ANSWER, "agent": "main"}]
TAGS = f'<tool_call>{{"name": "find", "arguments": {ARGS}}}</tool_call>'
SAMPLE = {"id": 3, "epoch": 1, "target": "B", "scores": {"match": {"value": "C"}}, "messages": CHAT}
SIMULATION = {"id": "s", "task_id": "0", "reward_info": {"reward": 1.0}, "messages": CHAT}
JS = {"type": "function_call", "callId": "c1", "name": "find", "arguments": ARGS, "status": "completed"}
JS_RESULT = {"type": "function_call_result", "callId": "c1", "name": "find", "output": {"type": "text", "text": SEEN}}

SAME = {  # name: (format, lines) of one conversation
    "claude-code": ("claude-code", [{"type": "summary", "summary": "x", "leafUuid": "u4"}, *(line(n, m["role"], m["content"]) for n, m in enumerate(BLOCKS))]),
    "codex": ("codex", [{"type": "session_meta", "payload": {"id": "s1"}}, item(**user("<environment_context>x")), item(**user(ASK)),
                        {"type": "event_msg", "payload": {"type": "user_message", "message": ASK}}, item(type="ghost_snapshot"), item(**CALL), item(**RESULT), item(**SAID)]),
    "codex, bare": ("codex", [{"id": "s1", "timestamp": "t", "instructions": None}, user(ASK), {"record_type": "state"}, CALL, RESULT, SAID]),
    "anthropic": ("anthropic", [{"messages": BLOCKS, "system": "Be brief."}]),
    "anthropic, a list": ("anthropic", [BLOCKS]),
    "responses": ("responses", [{"object": "response", "instructions": "Be brief.", "input": [user(ASK)], "output": [CALL, RESULT, SAID]}]),
    "responses, a list": ("responses", [[user(ASK), CALL, RESULT, SAID]]),
    "responses, items": ("responses", [user(ASK), CALL, RESULT, SAID]),
    "agents sdk": ("responses", [{"$schemaVersion": "1.0", "originalInput": ASK, "generatedItems": [
        {"type": "tool_call_item", "rawItem": JS}, {"type": "tool_approval_item", "rawItem": JS}, {"type": "tool_call_output_item", "rawItem": JS_RESULT},
        {"type": "message_output_item", "rawItem": SAID}]}]),
    "agents sdk, python": ("responses", [{"$schemaVersion": "1.0", "original_input": [user(ASK)], "generated_items": [{"type": "x", "raw_item": i} for i in (CALL, RESULT, SAID)]}]),
    "langchain": ("langchain", [{"messages": LANG}]), "langchain, constructors": ("langchain", [{"messages": LC}]),
    "langchain, data": ("langchain", [{"messages": [{"type": m["type"], "data": m} for m in LANG]}]), "langchain, lines": ("langchain", LANG),
    "langsmith": ("langsmith", [{"id": "r1", "run_type": "llm", "inputs": {"messages": [LC[:3]]}, "outputs": {"generations": [[{"text": ANSWER, "message": LC[3]}]]}}]),
    "langsmith, a graph": ("langsmith", [{"id": "r1", "run_type": "chain", "inputs": {"messages": LANG[:1]}, "outputs": {"messages": LANG}}]),
    "langsmith, an example": ("langsmith", [{"id": "e1", "inputs": {"messages": LANG[:3]}, "outputs": {"output": LC[3]}}]),
    "gemini, snake case": ("gemini", [{"contents": [{"role": m["role"], "parts": [{{"functionCall": "function_call", "functionResponse": "function_response"}.get(k, k): v
                                                     for k, v in {"functionCall": None, "text": None, **p}.items()} for p in m["parts"]]} for m in GEMINI]}]),
    "gemini": ("gemini", [{"contents": GEMINI}]), "gemini, answer": ("gemini", [{"contents": GEMINI[:3], "candidates": [{"content": GEMINI[3]}]}]), "gemini, lines": ("gemini", GEMINI),
    "gemini, a session": ("gemini", [{"sessionId": "s1", "messages": [
        {"type": "user", "content": ASK}, {"type": "info", "content": "x"},
        {"type": "gemini", "content": "", "toolCalls": [{"id": "c1", "name": "find", "args": {"n": 7}, "result": [{"functionResponse": {"response": {"output": SEEN}}}]}]},
        {"type": "gemini", "content": ANSWER}]}]),
    "swe-agent": ("swe-agent", [{"trajectory": [{"action": "x", "observation": "y"}], "history": HISTORY, "info": {}}]),
    "openhands": ("openhands", [{"instance_id": "i", "history": EVENTS}]), "openhands, lines": ("openhands", EVENTS),
    "openhands, pairs": ("openhands", [{"history": [[EVENTS[0], {"observation": "null", "content": ""}], [EVENTS[1], EVENTS[3]], [EVENTS[4], {"observation": "null"}]]}]),
    "openhands, kit": ("openhands", [{"history": SDK}]), "openhands, kit, lines": ("openhands", SDK),
    "inspect": ("inspect", [{"eval": {"task": "t"}, "plan": {}, "samples": [SAMPLE]}]), "inspect, a sample": ("inspect", [SAMPLE]),
    "tau": ("tau", [{"task_id": 0, "reward": 1.0, "traj": CHAT, "trial": 0}]), "tau2": ("tau", [{"info": {}, "tasks": [], "simulations": [SIMULATION]}]), "tau2, one": ("tau", [SIMULATION]),
    "atif": ("atif", [{"schema_version": "ATIF-v1.6", "session_id": "s", "agent": {"name": "a", "version": "1"}, "steps": STEPS}]),
    "hermes": ("hermes", [{"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": TAGS}, {"from": "tool", "value": f"<tool_response>{SEEN}</tool_response>"},
                                             {"from": "gpt", "value": ANSWER}]}]),
    "hermes, function_call": ("hermes", [{"conversations": [{"from": "human", "value": ASK}, {"from": "function_call", "value": json.dumps({"name": "find", "arguments": {"n": 7}})},
                                                            {"from": "tool", "value": SEEN}, {"from": "gpt", "value": ANSWER}]}]),
    "toolace": ("hermes", [{"system": "x", "conversations": [{"from": "user", "value": ASK}, {"from": "assistant", "value": "[find(n=7)]"}, {"from": "tool", "value": SEEN},
                                                            {"from": "assistant", "value": ANSWER}]}]),
    "llama-factory": ("llama-factory", [{"messages": [{"role": "user", "content": [{"type": "text", "value": ASK}], "loss_weight": 0.0},
                                                      {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps({"name": "find", "arguments": {"n": 7}})}]},
                                                      {"role": "tool", "content": [{"type": "text", "value": SEEN}]}, {"role": "assistant", "content": [{"type": "text", "value": ANSWER}]}]}])}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_format(tmp_path, name):
    kind, lines = SAME[name]
    path = dump(tmp_path / "log.jsonl", *lines)
    if len(lines) == 1: path.write_text(json.dumps(lines[0], indent=1) if isinstance(lines[0], dict) else json.dumps(lines[0]) + "\n" + json.dumps(lines[0]))
    found, problems = read(path)
    assert detect(lines[0]) == kind and not problems and len(found) == 1 + (len(lines) == 1 and isinstance(lines[0], list))
    assert found[0].goal == ASK
    assert [s.observation for s in found[0].steps] == [SEEN, ""] and found[0].steps[1].action == ANSWER
    assert json.loads(found[0].steps[0].tool_calls[0]["function"]["arguments"]) == {"n": 7} and found[0].steps[0].tool_calls[0]["function"]["name"] == "find"
    for form in ("openai", "atif", "exprag"):
        write_log(found, tmp_path / "again.jsonl", form)
        assert [t.to_dict() for t in read_log(tmp_path / "again.jsonl", form)] == [t.to_dict() for t in found]


def test_every_format_is_tried_and_has_its_own_name():
    assert {kind for kind, _ in SAME.values()} == set(AGENTS) - {"scienceworld"} and len(set(READABLE)) == len(READABLE)


@pytest.mark.parametrize("record", [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, {"resourceSpans": []},
                                    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "Thought: a\nAction: b"}]},
                                    {"session_id": 1, "role": "user", "content": "x"}, {"a": 1}, [], 3, {"messages": "x", "system": "y"}, {"messages": [3], "history": 4}])
def test_what_is_no_agents_log_is_left_to_the_others(record):
    assert agent_format(record) is None


BAD = {"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "f"}, {"type": "hologram"}]}]}


@pytest.mark.parametrize("name, bad, field", [
    ("anthropic", BAD, "messages[0].parts"), ("tau2, one", {"task_id": "9", "reward_info": {}, "messages": [{"role": "narrator"}]}, "messages[0].role"),
    ("langsmith", {"id": "r9", "run_type": "llm", "inputs": {"question": "x"}}, "inputs"), ("responses", {"object": "response", "output": [SAID]}, "input"),
    ("swe-agent", {"trajectory": [{"action": "x", "observation": "y"}]}, "history"), ("inspect, a sample", {**SAMPLE, "messages": CHAT[2:3]}, "messages"),
    ("hermes", {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": "<tool_call>{</tool_call>"}]}, "conversations[1].value")])
def test_a_bad_record_costs_only_itself(tmp_path, name, bad, field):
    good = SAME[name][1][0]
    found, problems = read(dump(tmp_path / "log.jsonl", good, bad, b"{not json", good), SAME[name][0])
    assert len(found) == (1 if name == "langsmith" else 2)  # a run twice is one
    assert [(p[1], p[2]) for p in problems if "JSON" not in p[3][:12]] == [(2, field)] and len(problems) == 2


def test_a_bad_sample_costs_only_itself(tmp_path):
    runs = [SIMULATION, {**SIMULATION, "messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, {**SIMULATION, "task_id": "1"}]
    found, problems = read(dump(tmp_path / "log.json", {"simulations": runs}))
    assert [t.task.variation for t in found] == ["0", "1"] and [p[2] for p in problems] == ["simulations[1].messages[0].parts"]


@calm
@given(st.sampled_from(sorted(SAME)), st.data())
def test_no_record_crashes_the_reader(name, data):
    kind, lines = SAME[name]
    lines = copy.deepcopy(lines)
    at = data.draw(st.sampled_from(lines))
    for _ in range(data.draw(st.integers(1, 3))):  # replace something, somewhere, by anything
        where = at
        while isinstance(where, (dict, list)) and where:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(where[key], (dict, list)) or not where[key] or data.draw(st.booleans()): break
            where = where[key]
        if isinstance(where, (dict, list)) and where: where[key] = data.draw(value)
    with tempfile.TemporaryDirectory() as folder:
        path, problems = dump(Path(folder, "log.jsonl"), *lines), []
        list(read_log(path, kind, problems.append))
        agent_format(lines[0])


@calm
@given(trajectories)
def test_a_trajectory_comes_back_from_atif(trajectory):
    from exprag.logs.agents import agent_episodes
    record = json.loads(json.dumps(to_atif(trajectory)))
    [(_, _, back)] = agent_episodes([("line", 1, record)], AGENTS["atif"], Options(), lambda *r: pytest.fail(str(r)), 1 << 20)
    assert back == trajectory and record["steps"][0]["step_id"] == 1
    assert all(isinstance(c["arguments"], dict) for s in record["steps"] for c in s.get("tool_calls", ()))


def test_a_session_of_claude_code(tmp_path):
    lines = [{"type": "file-history-snapshot", "messageId": "m", "snapshot": {}}, line(1, "user", "Caveat: The messages below were generated by the user while running local commands.", isMeta=True),
             line(2, "user", "<command-name>/clear</command-name>"), line(3, "user", "<local-command-stdout></local-command-stdout>"),
             line(4, "user", [*text("text", "<system-reminder>Today is Monday.</system-reminder>"), *text("text", ASK)]),
             line(5, "assistant", [{"type": "thinking", "thinking": "I look."}, {"type": "redacted_thinking", "data": "x"}]), line(6, "assistant", text("text", "Let me see.")),
             line(7, "assistant", [USE]), line(8, "assistant", [{**USE, "id": "c2"}]),
             line(9, "user", "Search.", isSidechain=True, parentUuid=None), line(10, "assistant", text("text", "Nothing."), isSidechain=True, parentUuid="u9"),
             line(11, "user", [{**USED, "tool_use_id": "c2", "content": "two"}]), line(12, "user", [USED, {"type": "image", "source": {}}]),
             line(13, "assistant", text("text", ANSWER)), line(13, "assistant", text("text", ANSWER)),
             line(14, "user", "Find it.", agentId="a1", isSidechain=True), line(15, "assistant", text("text", "Found."), agentId="a1", isSidechain=True)]
    found, problems = read(dump(tmp_path / "s.jsonl", *lines, 42, {**line(16, "user", "x"), "message": "error"}))
    own, side, sub = found
    assert (own.goal, side.goal, sub.goal) == (ASK, "Search.", "Find it.") and sub.provenance["session"] == "s1/a1" and len(own) == 2
    assert own.steps[0].thought == "I look." and own.steps[0].extra["said"] == "Let me see." and [c["result"] for c in own.steps[0].tool_calls] == [SEEN, "two"]
    assert "[image]" in own.steps[0].observation and own.first_observation.startswith("<system-reminder>")
    assert [p[1] for p in problems] == [18, 19]


def test_a_file_without_any_message_is_refused(tmp_path):
    found, problems = read(dump(tmp_path / "s.jsonl", {"type": "summary", "summary": "x", "leafUuid": "u"}))
    assert not found and len(problems) == 1 and "no line" in problems[0][3]


def test_the_folder_of_a_project_is_no_fold(tmp_path):
    (tmp_path / "-Users-me-dev-app").mkdir()
    dump(tmp_path / "-Users-me-dev-app" / "s.jsonl", *SAME["claude-code"][1])
    (tmp_path / "test").mkdir()
    dump(tmp_path / "test" / "h.jsonl", *SAME["hermes"][1])
    found, problems = read(tmp_path)
    assert not problems and [(t.task.world, t.task.fold) for t in found] == [("chat", "train"), ("chat", "test")]


def test_two_sessions_in_one_file(tmp_path):
    lines = [{**each, "sessionId": s} for pair in zip(SAME["claude-code"][1][1:], SAME["claude-code"][1][1:]) for s, each in zip(("a", "b"), pair)]
    found, problems = read(dump(tmp_path / "s.jsonl", *({**each, "uuid": f"{each['sessionId']}{each['uuid']}"} for each in lines)))
    assert [t.provenance["session"] for t in found] == ["a", "b"] and not problems and len(found[0]) == 2


def test_a_prompt_of_codex_in_an_editor(tmp_path):
    prompt = "# Context from my IDE setup:\n\n## Open tabs:\n- a.py\n\n## My request for Codex:\nFix it."
    [one], _ = read(dump(tmp_path / "s.jsonl", {"type": "session_meta", "payload": {"id": "s1"}}, {"type": "turn_context", "payload": {"model": "m"}},
                         item(**user("# AGENTS.md instructions\n\nx")), item(**user(prompt)), item(**SAID), item(**user("<environment_context>y"))))
    assert one.goal == "Fix it." and one.first_observation.startswith("# Context") and one.extra["system"].startswith("# AGENTS") and one.provenance["model"] == "m"
    assert one.steps[0].observation == "<environment_context>y"


def test_runs_of_langsmith_in_any_order(tmp_path):
    def run(n, parent, kind, inputs, outputs): return {"id": f"r{n}", "trace_id": "t", "parent_run_id": parent, "run_type": kind, "start_time": f"2026-01-01T00:00:0{n}", "inputs": inputs, "outputs": outputs}
    runs = [run(1, None, "chain", {"messages": LANG[:1]}, {"messages": LANG}), run(2, "r1", "llm", {"messages": [LC[:1]]}, {"generations": [[{"message": LC[1]}]]}),
            run(3, "r1", "tool", {"input": "7"}, {"output": SEEN}), run(4, "r1", "llm", {"messages": [LC[:3]]}, {"generations": [[{"message": LC[3]}]]})]
    [one], problems = read(dump(tmp_path / "s.jsonl", *reversed(runs)))
    assert not problems and len(one) == 2 and one.steps[0].observation == SEEN and one.provenance["session"] == "t"


def test_an_agent_of_tau2_greets_first_and_the_user_has_tools(tmp_path):
    messages = [{"role": "assistant", "content": "Hello!"}, CHAT[0], {"role": "user", "content": None, "tool_calls": [{"id": "u1", "name": "look", "requestor": "user"}]},
                {"role": "tool", "id": "u1", "requestor": "user", "content": "a door"}, *CHAT[1:2],
                {"role": "tool", "tool_messages": [{"role": "tool", "id": "c1", "content": SEEN, "requestor": "assistant"}]}, CHAT[3]]
    record = {"info": {"environment_info": {"domain_name": "post"}}, "simulations": [{**SIMULATION, "messages": messages, "reward_info": {"reward": 0.5}}]}
    [one], problems = read(dump(tmp_path / "s.json", record))
    assert not problems and str(one.task) == "tau/post/0@train" and (one.score, one.success) == (0.5, False)
    assert one.extra["preamble"][0]["content"] == "Hello!" and one.goal == ASK and one.steps[0].observation == SEEN
    write_log([one], tmp_path / "again.jsonl")
    assert list(read_log(tmp_path / "again.jsonl", "openai")) == [one]


@pytest.mark.parametrize("value, score, success", [("C", 1.0, True), ("I", 0.0, False), ("P", 0.5, False), (0.25, 0.25, None), (True, 1.0, True), ("other", None, None), ({"a": 1}, None, None)])
def test_scores_of_inspect(tmp_path, value, score, success):
    [one], _ = read(dump(tmp_path / "s.jsonl", {**SAMPLE, "scores": {"m": {"value": value}}}))
    assert (one.score, one.success) == (score, success)


def test_a_zipped_log_of_inspect(tmp_path):
    path = tmp_path / "run.eval"
    failed = {"role": "tool", "tool_call_id": "c1", "content": "", "error": {"type": "timeout", "message": "too slow"}}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.json", json.dumps({"eval": {"task": "team/parcels", "model": "m"}}))
        file.writestr("samples/1_epoch_1.json", json.dumps({**SAMPLE, "messages": [*CHAT[:2], failed, {"role": "assistant", "content": "attachment://h"}], "attachments": {"h": ANSWER}}))
        file.writestr("samples/2_epoch_1.json", "{not json")
        file.writestr("samples/3_epoch_1.json", json.dumps({**SAMPLE, "id": 4, "more": "x" * 3000}))
        file.writestr("summaries.json", "[]")
    found, problems = read(path)
    assert [str(t.task) for t in found] == ["inspect/team-parcels/3@train", "inspect/team-parcels/4@train"] and found[0].provenance["model"] == "m"
    assert found[0].steps[0].observation == "too slow" and found[0].steps[1].action == ANSWER
    assert [p[:3] for p in problems] == [("sample", 2, "samples/2_epoch_1.json")]
    found, problems = read(path, limit=2000)
    assert len(found) == 1 and "raise the limit" in problems[1][3]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TrajectoryError, match="run.eval cannot be read.*inspect log convert"): read(path)


def test_a_folder_of_trajectories(tmp_path):
    (tmp_path / "a.traj").write_text(json.dumps(SAME["swe-agent"][1][0], indent=2))
    (tmp_path / "b.traj").write_text(json.dumps({"instance_id": "x__y-1", "target": True, "trajectory": [
        {"role": "system", "system_prompt": "s", "text": None}, {"role": "user", "text": ASK}, {"role": "ai", "text": ANSWER}]}))
    found, problems = read(tmp_path)
    assert not problems and [t.success for t in found] == [None, True] and found[1].extra["system"] == "s" and found[1].task.variation == "1"


def test_thought_and_action_of_swe_agent(tmp_path):
    history = [{"role": "system", "content": "s", "agent": "main"}, {"role": "user", "content": "Demo.", "agent": "main", "is_demo": True}, {"role": "user", "content": ASK, "agent": "main"},
               {"role": "assistant", "content": "I look.\n```\nls\n```", "thought": "I look.\n", "action": "ls\n", "agent": "main"}, {"role": "user", "content": "a.py", "agent": "main"}]
    [one], _ = read(dump(tmp_path / "s.json", {"trajectory": [{"action": "ls", "observation": "a.py"}], "history": history}))
    assert one.goal == ASK and (one.steps[0].thought.strip(), one.steps[0].action, one.steps[0].observation) == ("I look.", "ls", "a.py")


def test_histories_of_scienceworld_are_episodes_of_that_world(tmp_path):
    def run(variation, score): return {"episodeIdx": variation, "notes": {}, "history": {"taskName": "boil", "taskIdx": "0", "variationIdx": str(variation), "taskDescription": "Boil water.",
                                       "history": [{"action": "look around", "observation": "A kitchen.", "score": "0.0"}, {"action": "wait", "observation": "Time.", "score": score}]}}
    [a, b], problems = read(dump(tmp_path / "s.json", {"0": run(3, "0.25"), "1": run(4, "1.0")}), options=Options(fold="test"))
    assert not problems and [str(t.task) for t in (a, b)] == ["scienceworld/boil/3@test", "scienceworld/boil/4@test"]
    assert (a.score, a.success, b.success) == (25, False, True) and a.first_observation == "A kitchen." and [s.action for s in a.steps] == ["wait"]


def test_turns_at_a_path(tmp_path, capsys):
    log = dump(tmp_path / "log.jsonl", {"meta": {"runs": [{"id": "a", "chat": {"turns": json.dumps(BLOCKS)}, "info": {"reward": 0.5, "ok": [True]}},
                                                          {"id": "b", "chat": {"turns": GEMINI}, "info": {"reward": 1, "ok": [False]}},
                                                          {"id": "c", "chat": {"turns": [{"role": "narrator"}]}}]}}, {"meta": {}})
    with pytest.raises(TrajectoryError, match="fits no format"): list(read_log(log))
    store = tmp_path / "s.db"
    status = main(["import", str(log), "--store", str(store), "--turns", "meta.runs[].chat.turns", "--score", "info.reward", "--success", "info.ok.0", "--world", "mine"])
    out = capsys.readouterr()
    assert status == 1 and "2 episodes added" in out.out and "meta.runs[2].chat.turns[0].role" in out.err and "meta.runs" in out.err.splitlines()[1]
    with Store(store) as kept: found = sorted(kept, key=lambda t: t.provenance["session"])
    assert [(t.task.world, t.provenance["session"], t.score, t.success) for t in found] == [("mine", "a", 0.5, True), ("mine", "b", 1, False)]


def test_a_late_result_a_second_one_and_one_of_no_call(tmp_path):
    turns = [{"role": "user", "content": ASK}, CALL, {**SAID, "content": text("output_text", "Still waiting.")}, RESULT, {**RESULT, "output": "and C"}, {**RESULT, "call_id": "c9", "output": "?"}, SAID]
    [one, _], problems = read(dump(tmp_path / "s.jsonl", turns, turns))
    assert not problems and [s.observation for s in one.steps] == [f"{SEEN}\n\nand C", "?", ""] and [s.action for s in one.steps[1:]] == ["Still waiting.", ANSWER]
