"""Keys, tokens and private text never reach a log, a warning, an error or the standard error of a command."""
import asyncio
import json
import logging
import os
import subprocess
import sys
import traceback
import warnings

import pytest
from encoders import Letters
from test_agent_tools import EXPRAG, asks, hook, session
from test_clients import client_of, server  # noqa: F401

from exprag.memory.chat_memory import ChatMemory, ChatMemoryOptions
from exprag.memory.clients import wrap
from exprag.memory.hybrid import WordRetriever
from exprag.memory.mcp import MemoryTools, memory_server
from exprag.store import Store

SECRET = "sk-proj-9fQ2xZ7secret8Kd3"  # in a field of each kind of input; not always one that is redacted
PRIVATE = "Zarathustra owes us 7 million"


def user(text): return {"role": "user", "content": text}
def agent(text): return {"role": "assistant", "content": text}


class Heard:
    "All that is logged, warned of and raised."
    def __init__(self, level=0): self.texts, self.level = [], level
    def __enter__(self):
        heard = self
        class Handler(logging.Handler):
            def emit(self, record): heard.texts.append(f"{record.getMessage()} {record.exc_info and logging.Formatter().formatException(record.exc_info)}")
        self._handler, self._level = Handler(level=0), logging.root.level
        logging.root.addHandler(self._handler), logging.root.setLevel(self.level)
        self._warned = warnings.catch_warnings(record=True)
        self._messages = self._warned.__enter__()
        warnings.simplefilter("always")
        return self
    def call(self, f, *arguments, **more):
        "What a call gives; an error's text, causes included, is noted."
        try: return f(*arguments, **more)
        except Exception as error:
            while error is not None:  # as a traceback prints it, without the lines of this file
                self.texts.append("".join(traceback.format_exception_only(error)))
                error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    def __exit__(self, *error):
        self._warned.__exit__(*error)
        logging.root.removeHandler(self._handler), logging.root.setLevel(self._level)
        self.texts += [str(w.message) for w in self._messages]
        if error[0] is None:
            bad = sorted({t for t in self.texts if SECRET in t or PRIVATE in t})
            assert not bad, "\n".join(bad)


@pytest.fixture(params=["words", "meaning"])
def memory(request, tmp_path):
    with Store(tmp_path / "m.db") as store:
        made = WordRetriever(store) if request.param == "words" else Letters()
        yield ChatMemory(store, made, "me", ChatMemoryOptions())


BAD = [  # conversations that cannot be read, or are odd, with private text in every place
    [], [user(PRIVATE)], [agent(PRIVATE)], [PRIVATE], [{"content": PRIVATE}], [{"role": PRIVATE, "content": "x"}],
    [{"role": 3, "content": PRIVATE}], [user(PRIVATE), {"role": "tool", "tool_call_id": SECRET, "content": PRIVATE}],
    [user(PRIVATE), {"role": "assistant", "content": None, "tool_calls": PRIVATE}],
    [user(PRIVATE), {"role": "assistant", "content": None, "tool_calls": [{"id": SECRET, "function": {"name": PRIVATE}}]}],
    [user(PRIVATE), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{" + PRIVATE}}]}],
    [user({"a": PRIVATE}), agent("x")], [user([{"type": PRIVATE}]), agent("x")], [user([{"type": "text", "text": {PRIVATE: 1}}]), agent("x")],
    [user(PRIVATE), agent(float("nan"))], [user(PRIVATE), agent("x"), {"role": "system", "content": 3}],
    [user(f"{PRIVATE} {SECRET} \ud800"), agent(f"{PRIVATE} {SECRET}")], [{"role": "assistant", "content": "x", "tool_calls": [3, PRIVATE]}]]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_messages(memory, number):
    messages = BAD[number]
    with Heard() as heard:
        for _ in range(2):
            heard.call(memory.augment, messages)
            heard.call(memory.record, messages, True)
            heard.call(memory.recall, messages)
        heard.call(memory.augment, messages, goal=SECRET), heard.call(memory.record, messages, None, goal=PRIVATE)
        heard.call(memory.record, messages, True, receipt="x", token=SECRET)
        heard.call(memory.record, messages, True, token={SECRET})


def test_a_wrapped_client(server, memory):  # noqa: F811
    "Its key, headers and messages; the memory fails, or the server does."
    for kind in ("OpenAI", "Anthropic"):
        with Heard(logging.INFO) as heard:  # below, the client's package notes its own requests
            client = client_of(server, kind).with_options(api_key=SECRET, default_headers={"X-Secret": SECRET})
            wrapped = wrap(client, memory)
            repr(wrapped), str(wrapped)
            heard.texts.append(repr(wrapped))
            method = wrapped.chat.completions.create if kind == "OpenAI" else wrapped.messages.create
            more = {} if kind == "OpenAI" else {"max_tokens": 9}
            for messages in BAD:
                if not json.dumps(messages, default=str).isascii(): continue
                try: method(model="m", messages=messages, extra_headers={"Authorization": SECRET}, **more)
                except Exception: pass  # the client's own refusals are the agent's, and name what it was given
            heard.call(wrapped.record, True)
            heard.call(wrap, wrapped, memory)


def test_tools(memory):
    "Wrong calls over the protocol: what the server logs; what it answers goes to who called."
    async def go():
        from mcp import Client
        async with Client(memory_server(memory)) as client:
            for name in ("search_experience", "read_episode", "record_experience", "report_outcome", SECRET):
                for given in ({"goal": PRIVATE}, {"goal": [PRIVATE], "steps": PRIVATE}, {SECRET: PRIVATE}, {"episode": PRIVATE},
                              {"goal": PRIVATE, "steps": [{"action": PRIVATE, "observation": SECRET}], "success": PRIVATE},
                              {"goal": PRIVATE, "steps": [{"action": SECRET}], "receipt": SECRET}, {"receipt": SECRET, "success": True}):
                    try: await client.call_tool(name, given)
                    except Exception: pass  # told to the caller
    with Heard(logging.WARNING): asyncio.run(go())  # as the program sets it; below, the package notes each refusal


def quiet(done):
    for text in (done.stderr, *([] if done.returncode == 0 else [done.stdout])):
        assert SECRET not in text and PRIVATE not in text, text
    assert "Traceback" not in done.stderr
    return done


def test_hooks(tmp_path):
    store = tmp_path / "m.db"
    for event in (PRIVATE, f'"{SECRET}"', f'{{"x": {PRIVATE}', {"session_id": 3, "prompt": PRIVATE}, {"hook_event_name": "other", "session_id": SECRET, "prompt": PRIVATE},
                  {"hook_event_name": "SessionEnd", "session_id": SECRET}, asks(SECRET, PRIVATE), asks(SECRET, [PRIVATE]),
                  {"hook_event_name": "UserPromptSubmit", "session_id": SECRET, "prompt": {PRIVATE: SECRET}}):
        quiet(hook(event, store))
    end = session(tmp_path, "s1", f"{PRIVATE} {SECRET}")
    quiet(hook(end, store, "--wait", "--check", f"echo {SECRET}; exit 1"))
    log = tmp_path / "s1.jsonl"
    for broken in (log.read_text() + PRIVATE, json.dumps({"type": "user", "message": {"role": "owner", "content": [SECRET, PRIVATE]}}),
                   log.read_text().replace("tool_use_id", "x"), "\n".join([json.dumps([PRIVATE, SECRET])] * 3)):
        log.write_text(broken)
        quiet(hook(end, store, "--wait"))
    quiet(hook({**end, "session_id": "other"}, store))
    assert not any(SECRET in p.read_text() for p in tmp_path.glob("*.log"))


def test_the_token_of_the_server_over_http(tmp_path):
    "It is printed where it is new, and not where the user gave it."
    import socket
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    program = subprocess.Popen([*EXPRAG, "mcp", "--store", tmp_path / "m.db", "--search", "words", "--http", str(port)], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "EXPRAG_TOKEN": SECRET})
    try:
        assert "/mcp" in program.stderr.readline()
        import time, urllib.error, urllib.request
        for token in (SECRET, f"wrong {PRIVATE}"):
            for body in (PRIVATE.encode(), json.dumps({"jsonrpc": "2.0", "id": 1, "method": PRIVATE, "params": {"x": SECRET}}).encode(), b"\xff"):
                ask = urllib.request.Request(f"http://127.0.0.1:{port}/mcp?key={SECRET}", body, {
                    "Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json, text/event-stream"})
                for _ in range(50):
                    try: urllib.request.urlopen(ask, timeout=10).read(); break
                    except urllib.error.HTTPError: break
                    except urllib.error.URLError: time.sleep(0.1)
    finally:
        program.terminate()
        out, err = program.communicate(timeout=20)
    assert SECRET not in out + err and PRIVATE not in out + err, err
