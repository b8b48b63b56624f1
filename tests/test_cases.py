"""Small logs that once failed, each made after a public report or a public file; they stand for kinds of faults."""
import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from log_records import chat, dump, gpt, read

from exprag.cli import main
from exprag.logs.files import NAMES, import_log, read_log, write_log
from exprag.logs.formats import FORMATS, Options, read_record, write_record
from exprag.logs.messages import chat_task, goal_split, read_conversation, split_thought, write_conversation
from exprag.logs.records import BadRecord, records
from exprag.memory.chat_memory import episode_of
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory, TrajectoryError
from exprag.views import render

CASES = Path(__file__).parent / "data" / "cases"
WHERE = "Where is parcel 7?"


def case(name: str) -> Path:
    [found] = CASES.glob(name)
    return found


def one(path, **options):
    [episode], problems = read(path, **options)
    assert not problems
    return episode


def goals(found): return [t.goal for t in found]
def user(text): return {"role": "user", "content": text}
def agent(text=None, *calls, **more): return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}
def tool(text, id=None, **more): return {"role": "tool", "content": text, **({"tool_call_id": id} if id else {}), **more}
def call(id="c1", name="find", arguments='{"n": 7}'): return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


# One reading


def test_calls_are_visible_in_every_view():
    episode = one(case("01-*/tl.jsonl"))
    for view in ("chat", "actions", "numbered", "exprag.memory.excerpts:decisive"):
        shown = render(episode, view).replace('\\"', '"')
        assert 'find_parcel({"number": 7})' in shown and 'town_of({"depot": "B"})' in shown
    assert '> find_parcel({"number": 7}) | depot B' in render(episode)


@pytest.mark.parametrize("name", ["01-*/tl.jsonl", "17-*/g-bare-pretty.json", "19-*/f-greeting.jsonl", "20-*/f-sysmid.jsonl", "31-*/oh.jsonl"])
def test_an_import_and_the_memory_of_an_agent_read_the_same_episode(name):
    found = [record for _, _, record in records(case(name))]
    for record in [{"messages": found}] if "role" in found[0] else found:

        imported = read_record(record, FORMATS["openai"])
        live = episode_of(record["messages"])
        assert (imported.id, imported.task, imported.goal) == (live.id, live.task, live.goal)
        assert [s.content() for s in imported.steps] == [s.content() for s in live.steps]


def test_the_format_of_a_file_makes_no_other_episode(tmp_path):
    messages = [user(WHERE), agent("<think>Depot list first.</think>Which depot?"), user("B."), agent("In B.")]
    turns = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in messages]
    spelt = [{"messages": messages}, {"conversations": messages}, {"conversations": turns}, messages]
    read_ = [one(dump(tmp_path / f"{n}.jsonl", record)) for n, record in enumerate(spelt)]
    read_.append(one(dump(tmp_path / "turns.jsonl", *({"session_id": "s", **m} for m in messages))))
    assert len({t.id for t in read_}) == 1 and {t.task for t in read_} == {chat_task(WHERE)}


@pytest.mark.parametrize("shape", [
    call(), {"name": "find", "arguments": '{"n": 7}', "id": "c1"}, {"name": "find", "args": {"n": 7}, "id": "c1", "type": "tool_call"},
    {"id": "c1", "function": "find", "arguments": {"n": 7}}, {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"n": 7}}},
    {"id": "c1", "type": "custom", "custom": {"name": "find", "input": '{"n": 7}'}}, {"id": "c1", "name": "find", "input": {"n": 7}, "index": 0}])
def test_a_call_is_the_same_in_every_shape(shape):
    messages = [user(WHERE), agent(None, shape), tool("B", "c1"), agent("In B.")]
    assert read_conversation(messages) == read_conversation([user(WHERE), agent(None, call()), tool("B", "c1"), agent("In B.")])


@pytest.mark.parametrize("name", ["inspect", "f-langchain-role", "f-dictargs", "f-tau2-nogreet"])
def test_shapes_of_calls_go_in_and_out(name, tmp_path):
    episode = one(case(f"08-*/{name}.jsonl"))
    assert episode.actions == ('find({"n": 7})', "In B.") and episode.observations == ("", "B", "")
    for format in NAMES:
        write_log([episode], tmp_path / "out.jsonl", format)
        assert list(read_log(tmp_path / "out.jsonl", format)) == [episode]


@pytest.mark.parametrize("calls, field", [
    ([{"id": "c1"}], "messages[1].tool_calls[0].function"), ([call(), {"function": None}], "messages[1].tool_calls[1].function"),
    ([{"function": {"arguments": "{}"}}], "messages[1].tool_calls[0].function"), ([{"name": "f", "arguments": [1]}], "messages[1].tool_calls[0].function"),
    (["f"], "messages[1].tool_calls[0]"), ([None], "messages[1].tool_calls[0]"), (3, "messages[1].tool_calls"), ("f(", "messages[1].tool_calls")])
def test_what_is_no_call_is_refused_with_its_place(calls, field, tmp_path):
    bad = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": calls}]}
    found, problems = read(dump(tmp_path / "log.jsonl", bad, chat("Goal", "act")))
    assert goals(found) == ["Goal"] and [p[:3] for p in problems] == [("line", 1, field)]


def test_the_call_of_2023_and_its_result():
    old = {"name": "find", "arguments": '{"n":7}'}
    episode = read_conversation([user(WHERE), agent(None, function_call=old), {"role": "function", "name": "find", "content": "B"}, agent("In B.")])
    assert episode.actions == ('find({"n":7})', "In B.") and episode.steps[0].observation == "B"
    assert episode.steps[0].tool_calls[0]["id"] == "call_1_0"


def test_text_beside_calls_is_a_thought_and_stays_where_it_was():
    messages = [user(WHERE), agent("I look.", call()), tool("B", "c1"), agent("In B.")]
    episode = read_conversation(messages)
    assert episode.steps[0].thought == "I look." and write_conversation(episode) == messages
    both = [user(WHERE), agent("I look.", call(), reasoning_content="Depots."), tool("B", "c1"), agent("In B.")]
    episode = read_conversation(both)
    assert episode.steps[0].thought == "Depots." and write_conversation(episode) == both


@pytest.mark.parametrize("calls", [[{"id": "c1", "function": "find", "arguments": {"n": 7}}], [{"name": "find", "args": {}}], [{"function": None}], [{"id": 3}],
                                   [{"function": {"name": "f"}}], [{"function": {"name": None, "arguments": 3}}]])
def test_what_an_older_release_has_kept_can_be_shown_and_exported(calls, tmp_path, capsys):
    kept = Trajectory(chat_task("a"), "a", "", (Step("", "B", tool_calls=calls),))
    with Store(tmp_path / "s.db") as store: store.add(kept)
    assert main(["show", "", "--store", str(tmp_path / "s.db")]) == 0 and "Traceback" not in capsys.readouterr().err
    for format in NAMES:
        assert main(["export", str(tmp_path / f"{format}.jsonl"), "--store", str(tmp_path / "s.db"), "--format", format]) == 0
        assert list(read_log(tmp_path / f"{format}.jsonl", format)) == [kept]


def test_show_writes_a_call_once(tmp_path, capsys):
    assert main(["import", str(case("01-*/tl.jsonl")), "--store", str(tmp_path / "s.db")]) == 0
    assert main(["show", "", "--store", str(tmp_path / "s.db")]) == 0 and capsys.readouterr().out.count("find_parcel") == 1


# Results


def test_results_that_come_twice_together_or_late():
    twice, same, late = (one(case(f"29-*/{name}.jsonl")) for name in ("f-consec-tools", "f-dup-callids", "f-late-tool"))
    assert twice.steps[0].observation == "part 1\npart 2"
    assert [c["result"] for c in same.steps[0].tool_calls] == ["A", "B"] and len({c["id"] for c in same.steps[0].tool_calls}) == 2
    assert late.actions == ("find({})", "Still waiting.", "In B.") and late.observations == ("", "B", "", "")


def test_ids_that_repeat_in_every_turn_belong_to_their_turn():
    messages = [user("a"), agent(None, call("call_0")), tool("x", "call_0"), agent(None, call("call_0", "town")), tool("y", "call_0"), agent("b")]
    assert read_conversation(messages).observations == ("", "x", "y", "")


def test_results_without_an_id_are_matched_in_order_or_by_name():
    calls = agent(None, call("c1", "f"), call("c2", "g"))
    episode = read_conversation([user("a"), calls, tool("F"), tool("G"), agent("b")])
    assert [c["result"] for c in episode.steps[0].tool_calls] == ["F", "G"]
    named = read_conversation([user("a"), calls, tool("G", name="g"), tool("F", name="f"), agent("b")])
    assert named.id == episode.id


@pytest.mark.parametrize("messages, said", [
    ([user("a"), tool("x", "c1"), agent("b")], "no call is open"), ([user("a"), agent("b"), tool("x")], "no call is open"),
    ([user("a"), agent(None, call("c1")), tool("x", "c9")], "result of call 'c9', which nobody made; the calls before it are c1")])
def test_a_result_of_nothing_is_refused_with_the_cause(messages, said):
    with pytest.raises(BadRecord, match=said): read_conversation(messages)


def test_sharegpt_tools():
    hermes, toolace = one(case("18-*/f-hermes.jsonl")), one(case("18-*/f-toolace.jsonl"))
    assert hermes.actions == ('find({"n": 7})', "In depot B.") and hermes.steps[0].observation == '{"depot": "B"}'
    assert toolace.actions == ("[find(n=7)]", "In depot B.") and "B" in toolace.steps[0].observation


def test_two_calls_between_tags_and_both_responses_in_one_turn():
    asked = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    told = "<tool_response>\nF\n</tool_response>\n<tool_response>\nG\n</tool_response>"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": asked}, {"from": "tool", "value": told}, {"from": "gpt", "value": "b"}]
    episode = read_record({"conversations": turns}, FORMATS["sharegpt"])
    assert episode.actions == ("f({}); g({})", "b") and [c["result"] for c in episode.steps[0].tool_calls] == ["F", "G"]
    broken = read_conversation([user("a"), agent("<tool_call>find(7)</tool_call>")])
    assert broken.actions == ("<tool_call>find(7)</tool_call>",)  # no call of ours: text


def test_ids_that_are_numbers_and_results_that_are_objects():
    episode = read_conversation([user(WHERE), agent(None, call(5)), tool({"depot": "B"}, 5), agent("In B.")])
    assert episode.steps[0].observation == '{"depot": "B"}' and episode.steps[0].tool_calls[0]["id"] == "5"


def test_a_picture_is_counted_and_any_other_part_is_refused(tmp_path):
    shown = {"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": "x"}}, "at it"]}
    record = {"messages": [agent("Hi"), shown, agent("A cat."), {"role": "user", "content": [shown["content"][1]]}, agent("Two.")]}
    used = {"messages": [user("a"), {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]}
    [episode], problems = read(dump(tmp_path / "log.jsonl", record, used))
    assert (episode.goal, episode.steps[0].observation) == ("Look\n\nat it", "[image_url]") and dict(episode.provenance["left_out"]) == {"image_url": 2}
    assert [p[:3] for p in problems] == [("line", 2, "messages[1].content")]
    for format in NAMES:
        write_log([episode], tmp_path / "out.jsonl", format)
        assert list(read_log(tmp_path / "out.jsonl", format)) == [episode]
    assert write_record(episode, FORMATS["openai"]) == record


def test_calls_before_the_user_has_spoken_are_preamble_in_the_usual_form(tmp_path):
    record = {"messages": [agent(None, {"name": "who", "args": {}, "id": "w"}), tool("ann", "w"), user("a"), agent("b")]}
    episode = one(dump(tmp_path / "log.jsonl", record))
    assert episode.extra["preamble"][0]["tool_calls"][0]["function"]["name"] == "who" and episode.actions == ("b",)
    for format in NAMES:
        write_log([episode], tmp_path / "out.jsonl", format)
        assert list(read_log(tmp_path / "out.jsonl", format)) == [episode]


def test_what_is_nested_too_deeply_costs_only_itself(tmp_path):
    deep = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"x":' + b"[" * 800 + b"]" * 800 + b"}"
    found, problems = read(dump(tmp_path / "log.jsonl", deep, chat("Goal", "act")))
    assert goals(found)[-1] == "Goal" and all("nested too deeply" in p[3] for p in problems)


# Goals, preambles, thoughts


def test_a_polite_answer_is_an_answer():
    episode = one(case("10-*/sure.jsonl"))
    assert episode.goal == "Put these four battles in order" and len(episode) == 2 and "preamble" not in episode.extra


@pytest.mark.parametrize("answer, skipped", [
    ("OK", True), ("Ok.", True), ("OK. I'll follow your instructions and try my best to solve the task.", True), ("Understood.", True), ("Yes, I understand the rules.", True),
    ("Got it. The result is 4.", False), ("Sure! Here is a list", False), ("Okay, the best is Paris.", False), ("I understand your concern. Restart it.", False),
    ("OK, done: it is in B.", False), ("Sure.\n1. a\n2. b", False), ("Understood. Which one?", False)])
def test_only_an_answer_that_agrees_and_does_nothing_else_is_preamble(answer, skipped):
    texts = ("You play.", answer, "Boil water.\n\nA kitchen.", "Thought: hot.\nAction: go", "done")
    for record, name in ((gpt(*texts), "sharegpt"), (chat(*texts), "openai")):
        episode = read_record(record, FORMATS[name])
        assert (episode.goal, episode.first_observation) == (("Boil water.", "A kitchen.") if skipped else ("You play.", ""))
    plain = ("You play.", answer, "Boil water.", "go")
    assert read_record(chat(*plain), FORMATS["openai"]).goal == "You play."  # nothing says that it was a drill


def test_an_agent_that_greets_first(tmp_path):
    for name in ("f-greeting", "f-tau2-sims"):
        episode = one(case(f"19-*/{name}.jsonl"))
        assert episode.goal == WHERE and episode.extra["preamble"][0]["content"].startswith("H") and episode.actions[-1] == "In B."
        write_log([episode], tmp_path / "out.jsonl", "sharegpt")
        assert one(tmp_path / "out.jsonl") == episode


def test_a_system_message_in_the_middle_is_read():
    episode = one(case("20-*/f-sysmid.jsonl"))
    assert episode.extra["system"] == "Be brief.\n\nReminder: 2 turns left." and episode.actions == ("I look.", "In B.")


def test_thought_and_action_are_apart_however_they_are_spelt():
    ways = [one(case(f"30-*/k-react-{name}.json")) for name in ("openai", "conv-role", "sharegpt")]
    assert len({t.id for t in ways}) == 1
    assert [(s.thought, s.action) for s in ways[0].steps] == [("it is shut.", "open door"), ("done.", "finish")]
    think, reasoning = one(case("30-*/f-think.jsonl")), one(case("30-*/f-reasoning.jsonl"))
    assert (think.steps[0].thought, think.steps[0].action) == ("Depot list first.", "In B.")
    assert [(s.thought, s.action) for s in reasoning.steps] == [("Depot list first.", "In B."), ("x", "Yes.")]


@pytest.mark.parametrize("text, action, thought", [
    ("<think>\n\n</think>\n\nIn B.", "In B.", None), ("a</think>b", "b", "a"), ("<thinking>a</thinking>\nThought: c\nAction: b", "b", "a\n\nc"),
    ("THOUGHT: a\n\nACTION: b", "b", "a"), ("I say <think> is a tag", "I say <think> is a tag", None), ("A thought: none.", "A thought: none.", None)])
def test_marks_of_thoughts(text, action, thought): assert split_thought(text) == (action, thought)


def test_goals_by_all_of_the_turn_its_first_paragraph_or_a_pattern():
    path = case("31-*/oh.jsonl")
    whole, first, by_pattern = (list(read_log(path, options=Options(goal=how))) for how in (None, "first", "<issue>(.*)</issue>"))
    assert len(set(goals(whole))) == 3 and "thumbnails" in whole[2].goal
    assert len(set(goals(first))) == 1 and goals(by_pattern)[1] == "The login form loses focus" and "Fix it." in by_pattern[1].first_observation
    record = json.loads(path.read_text().splitlines()[0])
    for read_ in (whole, first, by_pattern):
        for fmt in ("openai", "sharegpt"):  # the turn comes back as it was, in either
            written = write_record(read_[0], FORMATS[fmt], keep=False)
            turn = written[FORMATS[fmt].turns][0]
            assert turn.get("content", turn.get("value")) == record["messages"][0]["content"]


def test_a_pattern_that_finds_nothing_is_refused_and_one_that_is_none_is_an_error(tmp_path):
    _, problems = read(case("31-*/oh.jsonl"), options=Options(goal="<bug>(.*)</bug>"))
    assert len(problems) == 3 and problems[0][2] == "messages[0].content" and "'<bug>(.*)</bug>' is not in the first user turn" in problems[0][3]
    with pytest.raises(ValueError, match="regular expression"): Options(goal="(")
    with pytest.raises(ValueError, match="preamble -1"): Options(preamble=-1)
    assert goal_split("parcel (\\d)")("find parcel 7 please") == ("7", "find parcel  please")


# Writing


def test_an_export_adds_no_turn_and_no_blank_line(tmp_path):
    episode = one(case("09-*/chat.jsonl"))
    for format in NAMES[1:-1]:
        write_log([episode], tmp_path / "out.jsonl", format, keep=False)
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        turns = lines if format == "turns" else lines[0][FORMATS[format].turns]
        assert [t.get("content", t.get("value")) for t in turns] == ["Book a table", "Which day?", "Friday", "Done"]


@pytest.mark.parametrize("messages", [
    [user("a"), agent("b"), agent("c"), user("d"), agent("e")], [user("a"), agent(None, call()), agent("b"), agent("c")], [user("a"), agent(None, call())],
    [user("a\n\nb"), agent("c")], [agent("hi"), user("a"), agent("b")], [{"role": "system", "content": "s"}, user("a"), agent("b", call("x"), call("y")), tool("Y", "y"), agent("c")],
    [user("a"), agent("b"), user(""), agent("c")], [user("a"), agent(None, call()), tool("", "c1"), agent("b")]])
def test_what_is_read_is_written_as_it_was(messages):
    episode = read_conversation(messages)
    assert write_conversation(episode) == messages and read_conversation(write_conversation(episode)) == episode


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("path", sorted(p for p in CASES.rglob("*.json*") if "38-" not in str(p)), ids=lambda p: f"{p.parent.name[:2]}-{p.stem}")
def test_import_export_import_is_the_identity(path, format, tmp_path):
    found, _ = read(path, options=Options(score="reward", success="ok", author="me"), **{"format": "openai"} if "dataset_infos" in path.name else {})
    write_log(found, tmp_path / "out.jsonl", format)
    assert list(read_log(tmp_path / "out.jsonl", format)) == found


# Outcomes


def test_outcomes_that_are_missing_or_written_otherwise():
    scores = one_each(case("15-*/k-null-score.jsonl"), score="reward")
    assert [t.score for t in scores] == [None, 1.0, None, 1.0, 1.0]
    assert [t.success for t in one_each(case("15-*/k-success.jsonl"), success="ok")] == [True, True, None, True]
    assert [t.score for t in one_each(case("15-*/k-nested-score.jsonl"), score="info.reward")] == [1.0]


def one_each(path, **options):
    found, problems = read(path, options=Options(**options))
    assert not problems
    return found


def test_numbers_that_json_does_not_have_cost_only_themselves(tmp_path):
    lines = [b'{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "b"}], "reward": %s}' % (n, value)
             for n, value in enumerate([b"NaN", b"1", b"Infinity", b"1e400", b"1" + b"0" * 400, b"9" * 5000, b"-0.5", b'"x"'])]
    found, problems = read(dump(tmp_path / "log.jsonl", *lines), options=Options(score="reward"))
    assert [(t.goal, t.score) for t in found] == [("0", None), ("1", 1.0), ("6", -0.5)]
    assert [(p[1], p[2]) for p in problems] == [(3, "reward"), (4, "reward"), (5, "reward"), (6, ""), (8, "reward")] and "too many digits" in problems[3][3]
    beside, problems = read(tmp_path / "log.jsonl")  # none of it is looked at: it is kept, or null
    assert len(beside) == 7 and len(problems) == 1
    with Store(tmp_path / "s.db") as store: assert store.add_many(beside).added == 7
    write_log(beside, tmp_path / "out.jsonl", "openai")
    assert list(read_log(tmp_path / "out.jsonl")) == beside


def test_our_own_lines_with_a_huge_number_cost_only_themselves(tmp_path):
    good = one(case("17-*/g-bare-oneline.jsonl"))
    bad = {**good.to_dict(), "score": 10 ** 400}
    found, problems = read(dump(tmp_path / "log.jsonl", bad, good.to_dict()))
    assert found == [good] and problems[0][1] == 1


# Pairs and labels


@pytest.mark.parametrize("record", [
    json.loads(case("21-*/dpo.jsonl").read_text()), {"prompt": WHERE, "chosen": "In B.", "rejected": "?"}, {"prompt": WHERE, "completion": "In B."},
    {"prompt": [user(WHERE)], "chosen": [agent("In B.")], "rejected": [agent("?")]}, {"chosen": [user(WHERE), agent("In B.")], "rejected": [user(WHERE), agent("?")]},
    {"prompt": WHERE, "messages": [user(WHERE), agent("In B.")], "chosen": [user(WHERE), agent("In B.")], "rejected": [user(WHERE), agent("?")]},
    {"messages": [user(WHERE)], "chosen": agent("In B."), "rejected": agent("?")}], ids=range(7))
def test_of_a_pair_the_chosen_answer_was_done(record, tmp_path):
    episode = one(dump(tmp_path / "log.jsonl", record))
    assert (episode.goal, episode.actions, episode.task) == (WHERE, ("In B.",), chat_task(WHERE))
    write_log([episode], tmp_path / "out.jsonl", "sharegpt" if "conversations" in record else "openai", keep=False)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == record


def test_labels_say_whether_the_answer_was_good(tmp_path):
    rows = [{**chat("a", "b"), "label": True}, {**chat("a", "c"), "label": False}, {**chat("a", "d"), "label": 3}, {**chat("a", "e"), "kto_tag": False}]
    assert [t.success for t in read(dump(tmp_path / "log.jsonl", *rows))[0]] == [True, False, None, False]


@pytest.mark.parametrize("record, field", [
    ({"conversations": [{"from": "human", "value": "a"}]}, "conversations"), ({"messages": [user("a")], "rejected": agent("?")}, "messages"),
    ({"messages": [], "chosen": "Human: a"}, "chosen"), ({"messages": [agent("b")]}, "messages[0].role")])
def test_a_record_in_which_nothing_was_done_is_refused(record, field, tmp_path):
    found, problems = read(dump(tmp_path / "log.jsonl", record, record))
    assert not found and [p[2] for p in problems] == [field] * 2


# Files


def test_one_contradiction_costs_only_itself(tmp_path, capsys):
    problems = []
    with Store(tmp_path / "s.db") as store:
        done = import_log(store, case("05-*/k-contra.jsonl"), refused=problems.append, options=Options(score="reward"))
        assert (done.added, len(store)) == (9, 9) and [str(p)[:38] for p in problems] == ["k-contra.jsonl, line 6: is the episode"]
        assert "score 1.0" in problems[0].reason and "0.0 here" in problems[0].reason
        problems.clear()
        other = dump(tmp_path / "other.jsonl", chat("Task 1", "done 1", reward=0.5), chat("Task 9", "done 9", reward=0.5))
        assert import_log(store, other, refused=problems.append, options=Options(score="reward")).added == 1 and problems[0].number == 1
        with pytest.raises(TrajectoryError, match="other.jsonl, line 1: is the episode"): import_log(store, other, options=Options(score="reward"))
    assert main(["import", str(other), "--store", str(tmp_path / "s.db"), "--score", "reward"]) == 1
    assert "0 episodes added, 1 known before, 1 records refused" in capsys.readouterr().out


def test_a_folder_with_other_files_in_it(tmp_path):
    assert goals(read(case("06-*/folder"))[0]) == [WHERE]
    for name, text in {"a/notes.json": '{"x": 1}', "b.json": "version https://git-lfs.github.com/spec/v1\nsize 3\n", "c.json": "", ".cache/d.json": "{}",
                       "e.jsonl.gz": "no gzip", "a/train.jsonl": json.dumps(chat("Goal", "act"))}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "f.json").symlink_to(tmp_path / "gone")
    (tmp_path / "z.jsonl").write_bytes(b"\x28\xb5\x2f\xfd1234")
    problems = []
    assert goals(read_log(tmp_path, refused=problems.append)) == ["Goal"]
    assert [p.source for p in problems] == ["a/notes.json", "b.json", "e.jsonl.gz", "f.json", "z.jsonl"]


@pytest.mark.parametrize("name, count", [("g-bare-pretty.json", 1), ("g-bare-oneline.jsonl", 1), ("g-bare-lines.jsonl", 2)])
def test_one_conversation_in_a_file(name, count):
    for format in (None, "openai"):
        found, problems = read(case(f"17-*/{name}"), format)
        assert goals(found) == [WHERE] * count and not problems and found[0].actions == ("In B.",)


def test_a_message_a_line_without_a_session_is_one_conversation(tmp_path):
    lines = [user(WHERE), agent(None, call()), tool("B", "c1"), b"{broken", agent("In B."), 3]
    [episode], problems = read(dump(tmp_path / "log.jsonl", *lines))
    assert episode.actions == ('find({"n": 7})', "In B.") and [p[:2] for p in problems] == [("line", 4), ("line", 6)]
    turns = [{"from": "human", "value": WHERE}, {"from": "gpt", "value": "In B."}]
    assert one(dump(tmp_path / "b.json", turns)).actions == ("In B.",)
    assert read(tmp_path / "log.jsonl", limit=200)[1][0][:2] == ("line", 1)


def test_lists_in_columns_and_turns_as_text():
    assert one(case("27-*/row.jsonl")).actions == ("In B.",)
    episode = one(case("28-*/f-strmessages.jsonl"), options=Options(success="resolved", task="instance_id"))
    assert (episode.actions, episode.success, episode.task) == (("In B.",), True, Task("chat", "x__y", "1", "train"))


@pytest.mark.parametrize("turns, said", [({"from": ["human"], "value": []}, "different lengths"), ("[{", "not JSON"), ("[1]", "expected an object"), (3, "expected a list")])
def test_turns_that_are_no_list_are_refused(turns, said, tmp_path):
    _, problems = read(dump(tmp_path / "log.jsonl", {"conversations": turns}), "sharegpt")
    assert said in problems[0][3] and problems[0][2].startswith("conversations")


def test_half_a_character_costs_only_itself(tmp_path):
    with Store(tmp_path / "s.db") as store:
        assert import_log(store, case("14-*/k-surrogate-id.jsonl")).added == 1
        odd = dump(tmp_path / "log.jsonl", chat("Find \ud83d now", "ok \udc00", id="r\udfff"), chat("\ud83d\ude00", "b"))
        done = import_log(store, odd, options=Options(task="id"), refused=[].append)
        assert done.added == 1
        for episode in store:
            for text in (episode.goal, str(episode.task), *episode.actions, json.dumps(dict(episode.provenance), ensure_ascii=False)): text.encode("utf-8")
    assert read(odd)[0][0].goal == "Find \ufffd now" and read(odd)[0][1].goal == "\U0001f600"


def test_an_encoding_that_nobody_knows(tmp_path, capsys):
    path = str(case("34-*/x.jsonl"))
    assert main(["import", path, "--store", str(tmp_path / "s.db"), "--encoding", "utf-8,latin-99"]) == 1
    assert capsys.readouterr().err.startswith("exprag: no encoding is called 'latin-99'")
    with pytest.raises(ValueError, match="base64"): list(records(path, encodings=["base64"]))
    assert main(["import", path, "--store", str(tmp_path / "s.db"), "--preamble", "-1"]) == 1 and "preamble -1" in capsys.readouterr().err
    assert main(["import", path, "--store", str(tmp_path / "s.db"), "--fold", "a@b"]) == 1 and capsys.readouterr().err.startswith("exprag: task fold")
    assert main(["import", path, "--store", str(tmp_path / "s.db"), "--limit", "0"]) == 1 and "limit 0" in capsys.readouterr().err


@pytest.mark.parametrize("written, given", [("utf-16", "utf-8"), ("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"), ("utf-32", "utf-8"), ("utf-32-be", "utf-32-be"), ("cp1252", "utf-8,cp1252")])
def test_wide_encodings_are_read_before_lines_are_split(written, given, tmp_path):
    text = "\n".join(json.dumps(chat(f"caf\u00e9 {n} \u010a" if "utf" in written else f"caf\u00e9 {n}", "a"), ensure_ascii=False) for n in range(3))
    (tmp_path / "log.jsonl").write_bytes(text.encode(written))
    assert len(one_by_one := read(tmp_path / "log.jsonl", encodings=given.split(","))[0]) == 3 and one_by_one[2].goal.startswith("caf\u00e9 2")


@pytest.mark.parametrize("data, said", [
    (case("38-*/pointer.json").read_bytes(), "git lfs pull"), (b"<!DOCTYPE html><html>404</html>", "HTML page"), (b"PK\x03\x04zip", "unpack it first"),
    (b"<html>404</html>", "HTML page"), (b"SQLite format 3\x00" + b"\x00" * 20, "SQLite")])
def test_a_file_that_is_no_log_is_one_sentence(data, said, tmp_path, capsys):
    (tmp_path / "log.json").write_bytes(data)
    problems = []
    assert list(read_log(tmp_path / "log.json", refused=problems.append)) == [] and len(problems) == 1
    assert str(problems[0]).startswith("log.json: is ") and said in problems[0].reason
    assert main(["import", str(tmp_path / "log.json"), "--store", str(tmp_path / "s.db")]) == 1
    assert "nothing was brought in: every record was refused" in capsys.readouterr().err


def test_arrow_files_and_streams(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra: pip install 'exprag[parquet]'")
    table = pa.Table.from_pylist([chat(f"Goal {n}", "act") for n in range(3)])
    for name, new in (("a.arrow", pa.ipc.new_file), ("b.feather", pa.ipc.new_file), ("c.arrow", pa.ipc.new_stream), ("d", pa.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as file: file.write_table(table, max_chunksize=2)
        assert goals(read(tmp_path / name)[0]) == ["Goal 0", "Goal 1", "Goal 2"], name
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-40])
    assert "damaged or cut short" in read(tmp_path / "a.arrow")[1][0][3]


@pytest.mark.parametrize("text", ["{0}{1}", "{0} {1}\n", "{0}\n\n{1}", "[{0},{1}]", "[[{2}],[{2}]]"])
def test_values_one_after_the_other(text, tmp_path):
    first, second = json.dumps(chat("a", "b")), json.dumps(chat("a", "b"))
    (tmp_path / "log.json").write_text(text.replace("{0}", first).replace("{1}", second).replace("{2}", ", ".join(map(json.dumps, chat("a", "b")["messages"]))))
    found, problems = read(tmp_path / "log.json")
    assert goals(found) == ["a", "a"] and not problems


@pytest.mark.parametrize("lines, said", [([[[chat("a", "b")]]], "is a list of dict"), ([[chat("a", "b"), chat("c", "d")]] * 2, "is a list of dict, and not of messages"), ([[["human", "a"], ["gpt", "b"]]] * 2, "is a list of list")])
def test_lists_of_lists_get_one_sentence(lines, said, tmp_path):
    found, problems = read(dump(tmp_path / "log.jsonl", *lines))
    assert not found and len(problems) == len(lines) and said in problems[0][3]


# Streams


def piped(data: bytes, *arguments) -> subprocess.CompletedProcess:
    code = "import sys; from exprag.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], input=data, capture_output=True)


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
def test_streams_are_read_once_and_whole(tmp_path):
    import gzip
    lines = "\n".join(json.dumps(chat(f"Goal {n}", "act " * 200)) for n in range(600)).encode()  # more than a pipe holds
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for data in (lines, gzip.compress(lines)):
        writer = threading.Thread(target=fifo.write_bytes, args=[data])
        writer.start()
        assert len(read(fifo)[0]) == 600
        writer.join()
    store = ["--store", str(tmp_path / "s.db")]
    done = piped(lines, "import", "-", *store)
    assert (done.returncode, b"600 episodes added" in done.stdout) == (0, True), done.stderr
    (tmp_path / "log.jsonl").write_bytes(lines)
    code = "import sys; from exprag.cli import main; sys.exit(main(sys.argv[1:]))"
    shell = f'"{sys.executable}" -c "{code}" import <(cat "{tmp_path}/log.jsonl") --store "{tmp_path}/t.db"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True)
    assert (done.returncode, b"600 episodes added" in done.stdout) == (0, True), done.stderr
    bad = piped(b"{oops\n" + lines[:900], "import", "-", *store)
    assert bad.returncode == 1 and b"refused: standard input, line 1: not JSON" in bad.stderr


# The command


def test_an_import_that_brings_in_nothing_says_why_and_fails(tmp_path, capsys):
    store = ["--store", str(tmp_path / "s.db")]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert main(["import", str(tmp_path / "empty.jsonl"), *store]) == 1 and "holds no record" in capsys.readouterr().err
    assert main(["import", str(dump(tmp_path / "x.jsonl", {"prompt": "x"})), *store]) == 1
    assert "x.jsonl: nothing was brought in: every record was refused" in capsys.readouterr().err
    good = str(dump(tmp_path / "good.jsonl", chat("Goal", "act")))
    assert main(["import", good, *store]) == 0 == main(["import", good, *store]) and "1 known before" in capsys.readouterr().out


def test_the_command_notices_goals_and_fields(tmp_path, capsys):
    path, store = str(case("31-*/oh.jsonl")), ["--store", str(tmp_path / "s.db")]
    assert main(["import", path, *store, "--goal", "first", "--success", "sucess"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 episodes have the same goal, '<uploaded_files>" in out and "--goal" in out and "No record says 'sucess'" in out
    assert main(["import", path, "--store", str(tmp_path / "t.db"), "--author", "me", "--task", "id"]) == 0 and "same goal" not in capsys.readouterr().out
    with Store(tmp_path / "t.db") as kept: assert {str(t.task) for t in kept} == {f"chat/a/{n}@train" for n in (1, 2, 3)} and {t.provenance["author"] for t in kept} == {"me"}


def test_a_changed_episode_is_written_changed_whatever_it_was_read_from():
    episode = read_record({"prompt": WHERE, "chosen": "In B.", "rejected": "?"}, FORMATS["openai"])
    changed = replace(episode, steps=(replace(episode.steps[0], action="In C."),))
    again = read_record(write_record(changed, FORMATS["openai"]), FORMATS["openai"])
    assert again == changed and again.actions == ("In C.",)
