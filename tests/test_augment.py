"""Memory for any chat loop: what goes in, what is kept, what stays out; inert text; a real server."""
import copy
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.resources import files

import numpy as np
import pytest
from chat_models import FAMILIES, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.augment import (CLOSES, OPENS, ChatMemory, augment, control_tokens, episode_of, inert, insert, memory_block, record, serving, tidy,
                            without_memory)
from exprag.prompt import PromptFormat
from exprag.query import Retriever
from exprag.select import Memory, Selection, successes_only, top_k
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory, TrajectoryError

settings.register_profile("patient", deadline=None)  # a shared core is slow now and then
settings.load_profile("patient")


class Letters:
    """A tiny deterministic encoder: counts of letters."""

    name, dim, max_tokens = "letters@1", 26, 10**6

    def encode(self, texts, role="document"):
        rows = np.array([[t.lower().count(chr(97 + c)) for c in range(26)] for t in texts], np.float32).reshape(len(texts), 26) + 0.01
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def episode(i):
    return Trajectory(Task("chat", "chat", str(i), "train"), f"goal {i}", "A hall.", (Step("open door", "It is open."),), 1.0, True)


def user(text): return {"role": "user", "content": text}
def agent(text, **more): return {"role": "assistant", "content": text, **more}
def system(text): return {"role": "system", "content": text}
def call(id, name, **arguments): return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
def told(id, text): return {"role": "tool", "tool_call_id": id, "content": text}


ASK = [system("Be brief."), user("Turn on the lamp.")]
DONE = [agent("press switch"), user("The lamp is on."), agent("Done.")]


@pytest.fixture
def memory(tmp_path):
    with Store(tmp_path / "memory.db") as store:
        yield ChatMemory(store, Memory(Retriever(store, Letters()), (successes_only(), top_k(2))), author="me")


class Fixed:
    """Recalls what it is told to."""

    view = "actions"

    def __init__(self, *experiences): self.experiences = experiences
    def recall(self, trajectory): return Selection(tuple(self.experiences))


# Episodes


def test_a_conversation_is_an_episode():
    made = episode_of(ASK + DONE, success=True)
    assert (made.goal, made.first_observation, made.actions) == ("Turn on the lamp.", "", ("press switch", "Done.")) and made.extra["system"] == "Be brief."
    assert made.observations == ("", "The lamp is on.", "") and made.task.world == "chat" and made.task.fold == "train"
    assert made.task == episode_of(ASK).task != episode_of([user("Turn on the radio.")]).task


def test_the_goal_may_be_a_part_of_the_opening():
    opening = user("Boil water.\n\nThis room is the kitchen.\n\nA pot.")
    made = episode_of([opening], Task("scienceworld", "boil", "3", "train"), goal="Boil water.")
    assert (made.goal, made.first_observation) == ("Boil water.", "This room is the kitchen.\n\nA pot.") and made.task.type == "boil"
    assert episode_of([opening]).goal == opening["content"]
    with pytest.raises(TrajectoryError, match="not with the goal 'Freeze"):
        episode_of([opening], goal="Freeze water.")


def test_tool_calls_become_actions_and_thoughts():
    messages = [user("Weather?"), agent(None, tool_calls=[call("1", "weather", city="Lyon")]), told("1", "rain"),
                agent("Two more.", tool_calls=[call("2", "weather", city="Nice"), call("3", "clock")]), told("2", "sun"), told("3", "noon"), agent("Rain, sun, noon.")]
    made = episode_of(messages)
    assert made.actions == ('weather({"city": "Lyon"})', 'weather({"city": "Nice"}); clock({})', "Rain, sun, noon.")
    assert [s.thought for s in made.steps] == [None, "Two more.", None] and made.steps[0].observation == "rain" and made.steps[1].tool_calls[0]["result"] == "sun"
    text = memory_block(Selection((made,)))
    assert '> weather({"city": "Lyon"}) | rain' in text


def test_untidy_conversations():
    messages = [{"role": "developer", "content": "One."}, system("Two."), agent("Hello! What can I do?"), user("Turn on"), user("the lamp."),
                agent("Let me see."), agent("press switch"), user("It is on."), user("Thanks.")]
    before = copy.deepcopy(messages)
    made = episode_of(messages)
    assert messages == before and made.extra["system"] == "One.\n\nTwo." and made.goal == "Turn on\n\nthe lamp."
    assert made.actions == ("Let me see.", "press switch") and made.observations == ("", "", "It is on.\n\nThanks.")
    assert made.extra["preamble"][0]["content"] == "Hello! What can I do?"
    parts = [user([{"type": "text", "text": "Turn on"}, {"type": "text", "text": "the lamp."}])]
    assert episode_of(parts).goal == "Turn on\n\nthe lamp."


def test_what_cannot_be_an_episode_says_why():
    for messages, match in (([], "no user turn"), ([system("x"), agent("y")], "no user turn"),
                            ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "not text"),
                            ([user("x"), agent(None, tool_calls=[call("1", "f")]), told("9", "?")], "no call has as its id")):
        with pytest.raises(TrajectoryError, match=match):
            episode_of(messages)


turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)), max_size=8)


@given(turns)
def test_no_text_is_lost(rows):
    messages = [{"role": r, "content": t} for r, t in rows]
    tidied, preamble = tidy(messages)
    if not any(r == "user" for r, _ in rows):
        with pytest.raises(TrajectoryError):
            episode_of(messages)
        return
    made = episode_of(messages)
    whole = "\n".join([made.extra.get("system", ""), *(m["content"] for m in made.extra.get("preamble", ())), *made.observations, *made.actions, made.goal])
    assert all(t.strip() in whole for _, t in rows)
    roles = [m["role"] for m in tidied if m["role"] != "system"][preamble:]
    assert all(a != b for a, b in zip(roles, roles[1:])) and roles[0] == "user"


# Augment


def test_nothing_to_remember_changes_nothing(memory):
    messages = copy.deepcopy(ASK)
    assert memory.augment(messages) == ASK == messages


def test_five_lines(memory):
    made = memory.record(ASK + DONE, outcome=True)
    assert made.id in memory.store and made.success and made.score == 1.0 and made.provenance["author"] == "me"
    messages = [system("Be brief."), user("Turn on the radio.")]
    asked = memory.augment(messages)
    block = asked[0]["content"].removeprefix("Be brief.\n\n")
    assert asked[1:] == messages[1:] and "Goal: Turn on the lamp." in block and "> press switch | The lamp is on." in block
    assert block.startswith(OPENS) and block.endswith(CLOSES) and memory.recall(messages).ids == (made.id,)
    assert messages[0] == system("Be brief."), "what was given is not changed"


def test_the_same_task_may_be_remembered(memory):
    memory.record(ASK + DONE, outcome=True)
    assert "press switch" in memory.augment(ASK)[0]["content"]


def test_the_memory_block_is_the_prompts_own(memory):
    memory.record(ASK + DONE, outcome=True)
    chosen = memory.recall(ASK)
    theirs = PromptFormat(instruction="Act.", templates=()).system("chat", chosen.experiences)
    assert theirs == "Act.\n\n" + memory_block(chosen).removeprefix(OPENS + "\n").removesuffix("\n" + CLOSES)
    failed = episode_of(ASK + DONE, success=False)
    assert "Experience that failed:" in memory_block(Selection((failed,))) and "Experience, outcome unknown:" in memory_block(Selection((episode_of(ASK + DONE),)))


def test_a_memory_is_never_remembered(memory):
    first = memory.record(ASK + DONE, outcome=True)
    for _ in range(3):
        asked = memory.augment(ASK)
        assert memory.record(asked + DONE, outcome=True).id == first.id
    assert len(memory.store) == 1 and OPENS not in json.dumps([t.to_dict() for t in memory.store])
    assert memory.augment(asked) == asked and without_memory(asked) == ASK


text = st.text(st.characters(codec="utf-8"), max_size=30)
openings = st.one_of(st.just([]), text.filter(bool).map(lambda t: [system(t)]), text.filter(bool).map(lambda t: [{"role": "developer", "content": t}]))
contents = st.one_of(text.filter(bool), st.lists(text.map(lambda t: {"type": "text", "text": t}), min_size=1, max_size=2))


@given(openings, contents, st.sampled_from(["system", "last"]), st.lists(st.sampled_from([OPENS, CLOSES, "x\n\n", "<|end|>"]), max_size=4))
def test_taking_the_block_out_is_the_inverse_of_putting_it_in(opening, content, place, sly):
    messages = [*opening, {"role": "user", "content": content}]
    experience = Trajectory(Task("chat", "chat", "1", "train"), "go " + "".join(sly), "", (Step("a " + "\n".join(sly), "b"),), 1.0, True)
    asked = insert(messages, memory_block(Selection((experience,))), place)
    assert without_memory(asked) == messages and asked != messages and json.dumps(asked).count(OPENS) == 1
    refreshed = augment(asked, Fixed(experience), place=place)
    assert refreshed == asked and augment(asked, Fixed(), place=place) == messages


def test_where_the_block_goes():
    block = memory_block(Selection((episode(1),)))
    assert insert([user("x")], block) == [system(block), user("x")] and insert([], block, "last") == [user(block)]
    assert insert([system("s"), user("x")], block, "last") == [system("s"), user("x\n\n" + block)]
    call_turns = [user("x"), agent(None, tool_calls=[call("1", "f")]), told("1", "y")]
    assert insert(call_turns, block, "last") == [*call_turns, user(block)] and without_memory(insert(call_turns, block, "last")) == call_turns
    assert insert([{"role": "developer", "content": "d"}], block)[0]["content"] == "d\n\n" + block
    with pytest.raises(ValueError, match="place='middle'"):
        insert([user("x")], block, "middle")
    assert memory_block(Selection()) == "" and insert(ASK, "") == ASK


# Record


def test_record_refuses_what_is_no_experience(memory):
    for messages, outcome, match in ((ASK, True, "no turn of the assistant"), (ASK + DONE, "ok", "outcome 'ok'"), (ASK + DONE, 0.5, "outcome 0.5"), ([system("x")], True, "no user turn")):
        with pytest.raises(ValueError, match=match):
            memory.record(messages, outcome)
    assert len(memory.store) == 0


def test_record_keeps_outcome_and_provenance(memory):
    failed = memory.record(ASK + DONE, False, actor="model-x", retrieved=["0" * 32])
    assert (failed.success, failed.score) == (False, 0.0) and failed.provenance["actor"] == "model-x" and failed.provenance["author"] == "me"
    unknown = memory.record([user("Sing."), agent("La.")], None)
    assert unknown.success is None and unknown.score is None and len(memory.augment([user("Sing.")])) == 1, "neither is a success"
    task = Task("scienceworld", "boil", "3", "train")
    world = record([user("Boil water.\n\nA room."), agent("look around"), user("A pot.")], True, memory.store, task, "Boil water.", score=100.0)
    assert memory.store.get(world.id) == world and (world.task, world.score, world.first_observation) == (task, 100.0, "A room.")


def test_any_store_and_any_memory_will_do():
    kept = []
    class Keeper:
        def add(self, trajectory): kept.append(trajectory)
    record(ASK + DONE, True, Keeper())
    assert "press switch" in augment(ASK, Fixed(*kept))[0]["content"]


# Inert text


def test_inert_leaves_ordinary_text_alone():
    for text in ("a < b > c", "list[0] and [1, 2]", "<div>", "x <= y | z", "[Note] [a]", "It is 5 o'clock.", "", "A|B <|", "[A]"):
        assert inert(text) == text
    assert inert("<|im_end|>") == "< |im_end|>" and inert("[/INST]") == "[ /INST]" and inert("aXb", ["X"[:1] + "b"]) == "aX b"
    with pytest.raises(ValueError, match="however it is broken up"):
        inert("a#b", ["#"])


PIECES = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|system|>", "</s>", "<s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>", "<tool_call>",
          "[SYSTEM_PROMPT]", "<|", "|>", "<", ">", "[", "]", "<<SYS>>", "\n", " ", "system", "door", OPENS, CLOSES]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_nothing_of_the_known_forms_is_left(text):
    safe = inert(text)
    assert not [p for p in PIECES if len(p) > 6 and p not in ("system",) and p in safe] and "<s>" not in safe and "</s>" not in safe and "<eos>" not in safe
    assert inert(safe) == safe and "".join(safe.split()) == "".join(text.split()), "only spaces were added"


def nano_tokenizer():
    from exprag.agent import load_tokenizer
    return load_tokenizer(str(files("exprag") / "assets" / "nano"))


@pytest.mark.parametrize("family", ["nano", *FAMILIES])
def test_recorded_text_never_becomes_a_control_token(family):
    """As a server does it: the messages into the chat template, and the whole into the tokenizer."""
    tokenizer = nano_tokenizer() if family == "nano" else make_tokenizer(family)
    control = control_tokens(tokenizer)
    assert control and not any(t in inert("".join(control), control) for t in control)

    def controls(word):
        made = Trajectory(Task("chat", "chat", "1", "train"), "Open " + word, word, (Step("open " + word, f"It says{word}{word}."), Step(word, word)), 1.0, True)
        messages = augment([user("Open the door.")], Fixed(made), place="last", control=control)
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return [tokenizer.decode([i]).strip() for i in ids if tokenizer.decode([i]).strip() in control]
    harmless = controls("door")
    for word in [*control, "".join(control), " ".join(control)]:
        assert controls(word) == harmless


# A server


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'exprag\[server\]'"):
        with serving():
            pass


def post(url, body):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with direct.open(request, timeout=300) as answer:
        return json.load(answer)


def test_a_real_server_reads_the_memory(memory):
    pytest.importorskip("fastapi", reason="the extra `server` is not installed")
    pytest.importorskip("uvicorn", reason="the extra `server` is not installed")
    pytest.importorskip("openai", reason="the extra `server` is not installed")
    memory.record([user("Turn on the lamp."), agent("press switch<|end|><|system|>"), user("The lamp is on.")], outcome=True)
    question = [user("Turn on the radio.")]
    with serving(device="cpu") as (url, name):
        assert url.startswith("http://127.0.0.1:")
        ask = lambda messages: post(url, {"model": name, "messages": messages, "temperature": 0, "max_tokens": 8})
        plain, remembering = ask(question), ask(memory.augment(question))
    tokenizer = nano_tokenizer()
    expected = tokenizer.apply_chat_template(memory.augment(question), add_generation_prompt=True, return_dict=True)["input_ids"]
    assert remembering["usage"]["prompt_tokens"] == len(expected) > plain["usage"]["prompt_tokens"] + 20
    assert isinstance(remembering["choices"][0]["message"]["content"], str)
    with pytest.raises(urllib.error.URLError):
        ask(question)  # it ended with the block


def test_a_server_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    monkeypatch.setattr("exprag.augment.SERVE", "import sys; sys.exit('no such luck')")
    with pytest.raises(RuntimeError, match="ended. It said: no such luck"):
        with serving(seconds=60):
            pass
    monkeypatch.setattr("exprag.augment.SERVE", "import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="did not answer within 1 seconds"):
        with serving(seconds=1):
            pass


def test_importing_is_light():
    code = "import sys, exprag.augment; print([m for m in ('torch', 'transformers', 'fastapi', 'openai') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True)
    assert done.stdout.strip() == "[]"
