"""wrap(client): the real packages of OpenAI and Anthropic against a server that speaks their protocols."""
import asyncio
import json
import threading
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from encoders import Letters

from exprag.memory.chat_memory import OPENS, ChatMemory, ChatMemoryOptions
from exprag.memory.clients import (
    RememberingClient, add_anthropic_event, add_chat_chunk, anthropic_messages, chat_answer,
    item_messages, wrap)
from exprag.memory.utility import usage
from exprag.store import Store, StoreError

ARGUMENTS = '{"switch": 7, "name": "é"}'


def user(text): return {"role": "user", "content": text}


class Server(BaseHTTPRequestHandler):
    """Three protocols; the first answer of a conversation calls a tool, the second says 'Done <n>.'."""
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        kind = self.path.rsplit("/", 1)[1]
        turns = asked.get("messages", asked.get("input", ()))
        own = [m for m in turns if not (isinstance(m, dict) and m.get("role") == "system")]  # not the memory
        text = json.dumps(own, ensure_ascii=False)
        done = "tool_result" in text or "function_call_output" in text or '"role": "tool"' in text
        answer, events = getattr(self, "say_" + kind)(done and f"Done {'lamp' if 'lamp' in text else 'fan'}.")
        stream = asked.get("stream")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
        self.end_headers()
        if not stream: return self.wfile.write(json.dumps(answer).encode())
        for event in events:
            name = f"event: {event['type']}\n" if "type" in event else ""
            try: self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())
            except ConnectionError: return  # the client has heard enough
        if kind == "completions": self.wfile.write(b"data: [DONE]\n\n")

    def say_completions(self, done):
        call = {"id": "c1", "type": "function", "function": {"name": "press", "arguments": ARGUMENTS}}
        message = {"role": "assistant", "content": done or None, **({} if done else {"tool_calls": [call]})}
        about = {"id": "1", "created": 0, "model": "m"}
        def chunk(**delta):
            return {**about, "object": "chat.completion.chunk",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        pieces = [chunk(role="assistant", content=""), *(chunk(content=c) for c in done)] if done else [
            chunk(role="assistant", tool_calls=[{"index": 0, **call, "function": {"name": "press", "arguments": ""}}]),
            *(chunk(tool_calls=[{"index": 0, "function": {"arguments": c}}]) for c in ARGUMENTS)]
        last = {**about, "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": {}, "finish_reason": "stop" if done else "tool_calls"}]}
        return {**about, "object": "chat.completion",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}, [*pieces, last]

    def say_messages(self, done):
        block = {"type": "text", "text": done} if done else {
            "type": "tool_use", "id": "c1", "name": "press", "input": json.loads(ARGUMENTS)}
        about = {"id": "m1", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None,
                 "stop_reason": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
        empty = {**block, "text": ""} if done else {**block, "input": {}}
        delta = (lambda c: {"type": "text_delta", "text": c}) if done else (
            lambda c: {"type": "input_json_delta", "partial_json": c})
        return {**about, "content": [block], "stop_reason": "end_turn"}, [
            {"type": "message_start", "message": {**about, "content": []}},
            {"type": "content_block_start", "index": 0, "content_block": empty},
            *({"type": "content_block_delta", "index": 0, "delta": delta(c)} for c in done or ARGUMENTS),
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
             "usage": {"output_tokens": 2}}, {"type": "message_stop"}]

    def say_responses(self, done):
        item = {"type": "message", "id": "i1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": done, "annotations": []}]} if done else {
            "type": "function_call", "id": "i1", "call_id": "c1", "name": "press", "arguments": ARGUMENTS,
            "status": "completed"}
        answer = {"id": f"r{len(self.server.asked)}", "object": "response", "created_at": 0, "model": "m",
                  "output": [item], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
                  "status": "completed"}
        return answer, [{"type": "response.created", "sequence_number": 0, "response": {**answer, "output": []}},
                        {"type": "response.completed", "sequence_number": 1, "response": answer}]

    def log_message(self, *_): pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(), server.server_close()


@pytest.fixture
def memory(tmp_path):
    with Store(tmp_path / "m.db") as store: yield ChatMemory(store, Letters(), "me")


def client_of(server, kind):
    url = f"http://127.0.0.1:{server.server_port}"
    if "nthropic" in kind:
        package = pytest.importorskip("anthropic", reason="the extra `anthropic` is not installed")
    else: package, url = pytest.importorskip("openai", reason="the extra `server` is not installed"), url + "/v1"
    return getattr(package, kind)(base_url=url, api_key="none", max_retries=0)


class Chat:
    "A loop of an agent, with what is particular to an interface in methods."
    clients = ("OpenAI", "AsyncOpenAI")
    def __init__(self, goal): self.turns = [user(goal)]
    def request(self): return {"model": "m", "messages": [{"role": "system", "content": "Be brief."}, *self.turns]}
    def method(self, client): return client.chat.completions
    def take(self, answer): self.turns.append(answer.choices[0].message)
    def result(self): self.turns.append({"role": "tool", "tool_call_id": "c1", "content": "pressed"})
    def streamed(self, events):
        answer = {}
        for e in events: add_chat_chunk(answer, e.model_dump())
        self.turns += chat_answer(answer)
    def finished(self, stream): return stream.get_final_completion()
    @staticmethod
    def block(asked): return asked["messages"][0]["content"].removeprefix("Be brief.")


class Messages(Chat):
    clients = ("Anthropic", "AsyncAnthropic")
    def request(self): return {"model": "m", "max_tokens": 9, "messages": list(self.turns), "system": [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]}
    def method(self, client): return client.messages
    def take(self, answer): self.turns.append({"role": "assistant", "content": answer.content})
    def result(self): self.turns.append({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "c1", "content": "pressed"}]})
    def streamed(self, events):
        answer = {}
        for e in events: add_anthropic_event(answer, e.model_dump())
        self.turns.append({"role": "assistant", "content": [
            {k: v for k, v in b.items() if k != "json"} for b in answer["content"]]})
    def finished(self, stream): return stream.get_final_message()
    @staticmethod
    def block(asked):
        assert asked["system"][0]["text"] == "Be brief."
        return "".join("\n\n" + b["text"] for b in asked["system"][1:])


class Responses(Chat):
    def request(self): return {"model": "m", "instructions": "Be brief.", "input": list(self.turns)}
    def method(self, client): return client.responses
    def take(self, answer): self.turns += [item.model_dump(exclude_none=True) for item in answer.output]
    def result(self): self.turns.append({"type": "function_call_output", "call_id": "c1", "output": "pressed"})
    def streamed(self, events): self.take(events[-1].response)
    def finished(self, stream): return stream.get_final_response()
    @staticmethod
    def block(asked): return asked["instructions"].removeprefix("Be brief.")


INTERFACES = (Chat, Messages, Responses)
HOW = ("create", "stream=True", "stream", "raw")


def play(client, talk, how, turns=2, **more):
    "The loop, for a client that answers at once."
    for _ in range(turns):
        method, request = talk.method(client), {**talk.request(), **more}
        if how == "create": talk.take(method.create(**request))
        elif how == "raw": talk.take(method.with_raw_response.create(**request).parse())
        elif how == "stream=True": talk.streamed(list(method.create(**request, stream=True)))
        else:
            with method.stream(**request) as stream: talk.take(talk.finished(stream))
        if _ + 1 < turns: talk.result()


async def play_async(client, talk, how, turns=2, **more):
    "The same for a client of coroutines."
    for _ in range(turns):
        method, request = talk.method(client), {**talk.request(), **more}
        if how == "create": talk.take(await method.create(**request))
        elif how == "raw":
            found = (await method.with_raw_response.create(**request)).parse()
            talk.take(await found if asyncio.iscoroutine(found) else found)
        elif how == "stream=True":
            async with await method.create(**request, stream=True) as stream:
                talk.streamed([event async for event in stream])
        else:
            async with method.stream(**request) as stream: talk.take(await talk.finished(stream))
        if _ + 1 < turns: talk.result()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("waits", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("interface", INTERFACES)
def test_a_client_remembers(server, memory, interface, waits, how):
    client = wrap(client_of(server, interface.clients[waits]), memory)
    def go(goal):
        talk = interface(goal)
        if not waits:
            play(client, talk, how)
            return client.record(True, run=how)
        async def all_of_it():
            await play_async(client, talk, how)
            return await client.record_async(True, run=how)
        return asyncio.run(all_of_it())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a request goes on without")
        first, second = go("Turn on the lamp."), go("Turn on the fan.")
    assert first.actions == (f"press({ARGUMENTS})", "Done lamp.") and first.extra["system"] == "Be brief."
    assert first.observations == ("", "pressed", "") and first.provenance["run"] == how
    assert second.goal == "Turn on the fan." and second.actions[1] == "Done fan."
    blocks = [interface.block(asked) for asked in server.asked]
    assert blocks[:2] == ["", ""] and blocks[2] == blocks[3], "asked once, and pinned"
    assert OPENS in blocks[2] and f"> press({ARGUMENTS}) | pressed" in blocks[2]
    assert not any("conversation_name" in asked for asked in server.asked)
    assert usage(memory.store)[first.id].uses == 1 and OPENS not in json.dumps(second.to_dict())


@pytest.mark.parametrize("interface", INTERFACES)
def test_sixteen_agents_share_a_client(server, memory, interface):
    "They all begin with the same words, and half of them have names."
    client = wrap(client_of(server, interface.clients[1]), memory)
    async def agent(n):
        more = {"conversation_name": f"c {n}"} if n % 2 else {}
        goal = "Turn on the lamp." if n % 2 else f"Turn on the lamp {chr(97 + n)}."
        await play_async(client, interface(goal), "create", **more)
        return client.conversation, (await client.record_async(True, agent=n)).goal
    async def all_of_them(): return await asyncio.gather(*map(agent, range(16)))
    found = asyncio.run(all_of_them())
    assert len({name for name, _ in found}) == 16
    for n, (name, goal) in enumerate(found):
        assert (name == f"c {n}" and goal == "Turn on the lamp.") if n % 2 else goal.endswith(f"{chr(97 + n)}.")
    assert memory.store.row("SELECT count(*), sum(gain) FROM receipts") == (16, 16.0)


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_memory_may_stand_in_the_last_message(server, tmp_path, interface):
    with Store(tmp_path / "last.db") as store:
        memory = ChatMemory(store, Letters(), "me", ChatMemoryOptions(place="last"))
        client = wrap(client_of(server, interface.clients[0]), memory)
        for goal in ("Turn on the lamp.", "Turn on the fan."):
            play(client, interface(goal), "create")
            client.record(True)
        asked = server.asked[2]
        last = json.dumps(asked.get("messages", asked.get("input"))[-1])
        assert OPENS in last and OPENS not in json.dumps(asked.get("system", asked.get("instructions", "")))
        assert len(store) == 2


def test_a_chain_of_responses_is_one_conversation(server, memory):
    client = wrap(client_of(server, "OpenAI"), memory)
    memory.record([user("Turn on the lamp!"), {"role": "assistant", "content": "look"}], True)
    first = client.responses.create(model="m", input="Turn on the lamp.")
    client.responses.create(model="m", previous_response_id=first.id, input=[
        {"type": "function_call_output", "call_id": "c1", "output": "pressed"}])
    blocks = [asked["instructions"] for asked in server.asked]
    assert blocks[0] == blocks[1] and OPENS in blocks[0]
    assert client.record(True).actions == (f"press({ARGUMENTS})", "Done fan.")


def test_conversations_that_begin_alike_are_told_apart(server, memory):
    client = wrap(client_of(server, "OpenAI"), memory)
    a, b = Chat("Turn on the lamp."), Chat("Turn on the lamp.")
    names = []
    for talk in (a, b):
        play(client, talk, "create", turns=1)
        names.append(client.conversation)
    assert names[0] != names[1], "the same request again begins anew"
    a.turns.append(user("Which one?"))
    b.turns[-1] = {"role": "assistant", "content": "changed by the agent"}
    b.turns.append(user("Which one?"))
    play(client, b, "create", turns=1)
    assert client.conversation in names, "an answer that the agent changed is no new conversation"


def test_a_memory_that_fails_does_not_stop_the_agent(server, memory):
    client = wrap(client_of(server, "OpenAI"), memory)
    memory.store.close()
    with pytest.warns(UserWarning, match="goes on without its memory: StoreError: .* was closed"):
        answer = client.chat.completions.create(model="m", messages=[user("Hi")], conversation_name="c")
    assert answer.choices[0].message.tool_calls and server.asked[-1]["messages"] == [user("Hi")]
    assert "conversation_name" not in server.asked[-1]
    with pytest.raises(StoreError): client.record(True)


def test_what_is_not_about_messages_is_the_clients_own(server, memory):
    inner = client_of(server, "OpenAI")
    client = wrap(inner, memory)
    assert client.base_url == inner.base_url and client.models is inner.models
    assert "OpenAI" in repr(client) and client.memory is memory
    again = client.with_options(timeout=3)
    assert isinstance(again, RememberingClient) and again.timeout == 3
    play(again, Chat("Turn on the lamp."), "create")
    assert client.record(True, conversation=again.conversation).goal == "Turn on the lamp."
    with client as same: assert same is client
    for wrong in (client, memory, None):
        with pytest.raises(TypeError, match="wrap.. takes a client"): wrap(wrong, memory)


def test_recording_asks_for_what_it_lacks(server, memory):
    client = wrap(client_of(server, "OpenAI"), memory)
    with pytest.raises(ValueError, match="no conversation '' is going on .* there are none"): client.record(True)
    play(client, Chat("Turn on the lamp."), "create", conversation_name="c")
    with pytest.raises(ValueError, match="'d' is going on .* there are c"): client.record(True, "d")
    assert client.record(False, "c") is None and memory.receipt("c").ids == ()
    with pytest.raises(ValueError, match="'c' is going on"): client.record(True, "c")
    talk = [user("Turn on the lamp."), {"role": "assistant", "content": "look"}]
    assert client.record(True, "c", talk).actions == ("look",), "in another process, by its name"


def test_the_first_choice_and_odd_pieces():
    answer = {}
    for chunk in ({"choices": []}, {"choices": [{"index": 1, "delta": {"content": "x"}}]},
                  {"choices": [{"index": 0, "delta": {"content": "a", "reasoning_content": "hm"}}]},
                  {"choices": [{"delta": {"tool_calls": [{"id": "1", "function": {"name": "f"}}]}}]},
                  {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}}]}):
        add_chat_chunk(answer, chunk)
    assert chat_answer(answer) == [{"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": "{}"}}]}]
    assert chat_answer({"choices": [{"message": {"content": None, "refusal": "No."}}]})[0]["content"] == "No."
    answer = {}
    for event in ({"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "1", "name": "f", "input": {}}},
                  {"type": "content_block_delta", "index": 0, "delta": {"partial_json": "{broken"}},
                  {"type": "content_block_stop", "index": 0}): add_anthropic_event(answer, event)
    made = anthropic_messages({"messages": [user("x"), {"role": "assistant", "content": answer["content"]}]})
    assert made[1]["tool_calls"][0]["function"]["arguments"] == "{broken"


def test_thoughts_results_and_pictures_of_anthropic():
    made = anthropic_messages({"messages": [
        user([{"type": "text", "text": "See"}, {"type": "image", "source": {}}]),
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"},
                                          {"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
        user([{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "ok"}]},
              {"type": "text", "text": "Go on."}])]})
    from exprag.memory.chat_memory import episode_of
    episode = episode_of(made)
    assert episode.goal == "See" and episode.provenance["left_out"] == {"image": 1}
    step, = episode.steps
    assert (step.action, step.thought, step.observation) == ("f({})", "Hm.", "Go on.")
    assert step.tool_calls[0]["result"] == "ok"
    assert [m["role"] for m in item_messages([{"type": "reasoning", "id": "x"}, user("a")])] == ["user"]


def test_a_stream_is_read_as_the_agent_likes(server, memory):
    client = wrap(client_of(server, "OpenAI"), memory)
    def asked(name, done=True):
        told = {"role": "tool", "tool_call_id": "c1", "content": "pressed"}
        call = {"id": "c1", "type": "function", "function": {"name": "press", "arguments": "{}"}}
        turns = [user("Turn on the lamp."), {"role": "assistant", "content": None, "tool_calls": [call]}, told]
        return client.chat.completions.create(model="m", messages=turns, stream=True, conversation_name=name)
    stream, pieces = asked("next"), []
    while (piece := next(stream, None)) is not None: pieces.append(piece.choices[0].delta.content or "")
    assert "".join(pieces) == "Done lamp." and stream.response.status_code == 200
    assert client.record(True, "next").actions[-1] == "Done lamp."
    for piece in asked("broken off"):
        if piece.choices[0].delta.content == "e": break
    del piece
    with asked("left") as stream: next(iter(stream))
    assert client.record(True, "broken off").actions[-1] == "Done"
    assert client.record(True, "left").actions[-1] == "press({})", "nothing was said yet"


def test_a_real_model_behind_a_real_server(memory):
    pytest.importorskip("fastapi", reason="the extra `server` is not installed")
    openai = pytest.importorskip("openai", reason="the extra `server` is not installed")
    from exprag.models.server import serving
    with serving(device="cpu") as (url, name):
        client = wrap(openai.OpenAI(base_url=url, api_key="none", max_retries=0), memory)
        about = {"model": name, "temperature": 0, "max_tokens": 8}
        answers = []
        for goal in ("Turn on the lamp.", "Turn on the lamp!"):
            answers.append(client.chat.completions.create(messages=[user(goal)], **about))
            kept = client.record(True)
            assert kept.actions == (answers[-1].choices[0].message.content,)
    read = [answer.usage.prompt_tokens for answer in answers]
    assert read[1] > read[0] + 20 and sum(u.uses for u in usage(memory.store).values()) == 1
