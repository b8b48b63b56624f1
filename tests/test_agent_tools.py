"""A memory as tools over MCP, and by the hooks of a coding agent: through the real programs."""
import asyncio
import json
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_cases_live import ASK, in_a_read_only_place, memory_of, shelf  # noqa: F401

from exprag.memory.hooks import EVENTS, outline, write_plugin
from exprag.store import Store
from exprag.views import Experience

pytest.importorskip("mcp")

EXPRAG = (sys.executable, "-c", "import sys; from exprag.cli import main; sys.exit(main(sys.argv[1:]))")


def hook(event, store, *more):
    "The command with an event on its standard input."
    text = event if isinstance(event, str) else json.dumps(event)
    return subprocess.run([*EXPRAG, "hook", "--store", store, *more], input=text, text=True, capture_output=True)


def session(folder, name="s1", request="Mend the failing test of dates."):
    "The log of a session; its end as an event."
    def line(n, kind, content):
        return {"type": kind, "uuid": f"{name}{n}", "sessionId": name, "parentUuid": f"{name}{n - 1}" if n else None,
                "isSidechain": False, "message": {"role": kind, "content": content}}
    call = {"type": "tool_use", "id": "c1", "name": "Bash", "input": {"command": "pytest -q"}}
    back = {"type": "tool_result", "tool_use_id": "c1", "content": "1 failed \ud800"}
    lines = [line(0, "user", request), line(1, "assistant", [call]), line(2, "user", [back]),
             line(3, "assistant", [{"type": "text", "text": "The time zone was wrong."}])]
    path = Path(folder, f"{name}.jsonl")
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return {"hook_event_name": "SessionEnd", "session_id": name, "transcript_path": str(path), "cwd": str(folder)}


def asks(name, request="Mend the failing test of times."):
    return {"hook_event_name": "UserPromptSubmit", "session_id": name, "prompt": request}


@pytest.mark.parametrize("check, header", [("true", "succeeded"), ("false", "failed"), (None, None)])
def test_a_session_is_kept_and_shown_to_the_next(tmp_path, check, header):
    store = tmp_path / "memory.db"
    more = ["--check", check] if check else []
    assert hook(session(tmp_path), store, "--wait", *more).returncode == 0
    with Store(store) as opened:
        kept, = map(opened.get, opened.find())
        assert kept.success is {"true": True, "false": False, None: None}[check]
        assert kept.provenance["session"] == "s1" and len(kept) == 2
    said = json.loads(hook(asks("s2"), store).stdout)["hookSpecificOutput"]
    assert said["hookEventName"] == "UserPromptSubmit" and "time zone" in said["additionalContext"]
    if header: assert header in said["additionalContext"]
    assert hook(asks("s2", "And the other tests."), store).stdout == ""
    again = hook({"hook_event_name": "SessionStart", "session_id": "s2", "source": "compact"}, store)
    assert json.loads(again.stdout)["hookSpecificOutput"]["additionalContext"] == said["additionalContext"]


def test_the_end_of_a_session_is_handed_over(tmp_path):
    store = tmp_path / "memory.db"
    event = session(tmp_path)
    begun = time.monotonic()
    done = hook(event, store, "--check", "sleep 3")
    assert done.returncode == 0 and done.stdout == "" and done.stderr == ""
    assert time.monotonic() - begun < 3  # it did not wait for the check
    for _ in range(300):
        if store.exists():
            with Store(store) as opened:
                if len(opened): break
        time.sleep(0.1)
    with Store(store) as opened: assert len(opened) == 1
    assert (tmp_path / "memory.hook.log").read_text() == ""


def test_the_reader_of_a_session_is_credited(tmp_path):
    store = tmp_path / "memory.db"
    hook(session(tmp_path), store, "--wait", "--check", "true")
    hook(asks("s2"), store)
    hook(session(tmp_path, "s2", "Mend the failing test of times."), store, "--wait", "--check", "true")
    with Store(store) as opened:
        uses = opened.rows("SELECT uses, gain FROM usage")
    assert [tuple(row) for row in uses] == [(1, 1.0)]


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '{"session_id": "s"}', '{"session_id": 3, "hook_event_name": []}',
                                  '{"session_id": "s", "hook_event_name": "PreToolUse"}'])
def test_what_is_no_event_is_one_line(tmp_path, text):
    done = hook(text, tmp_path / "memory.db")
    assert done.returncode == 1 and done.stdout == ""  # 2 would stop the session
    assert done.stderr.startswith("exprag: ") and done.stderr.count("\n") == 1


def test_a_log_that_is_no_session_says_so(tmp_path):
    event = session(tmp_path)
    Path(event["transcript_path"]).write_text('{"type": "user", "sessionId": "s1", "message": 3}\n')
    done = hook(event, tmp_path / "memory.db", "--wait")
    assert done.returncode == 1 and "was not read" in done.stderr and done.stderr.count("\n") == 1


def test_a_session_without_a_log_is_no_error(tmp_path):
    store = tmp_path / "memory.db"
    gone = {**session(tmp_path), "transcript_path": str(tmp_path / "nowhere.jsonl")}
    assert hook(gone, store, "--wait").returncode == 0
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert hook({**gone, "transcript_path": str(empty)}, store, "--wait").returncode == 0


def test_the_plugin_runs_as_the_program_would(tmp_path):
    arguments = ["--store", str(tmp_path / "a memory's.db"), "--author", "me"]
    write_plugin(tmp_path / "plugin", arguments)
    assert json.loads((tmp_path / "plugin/.claude-plugin/plugin.json").read_text())["name"] == "exprag-memory"
    hooks = json.loads((tmp_path / "plugin/hooks/hooks.json").read_text())["hooks"]
    assert tuple(hooks) == EVENTS
    command = hooks["UserPromptSubmit"][0]["hooks"][0]["command"]
    done = subprocess.run(command, shell=True, input=json.dumps(asks("s1")), text=True, capture_output=True)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "a memory's.db").exists()


def test_an_outline_is_short_whatever_the_episode(tmp_path):
    rng = random.Random(1)
    from exprag.trajectory import Step, Task, Trajectory
    for _ in range(50):
        steps = [Step("x" * rng.choice([0, 1, 200, 5000]), "y" * 99) for _ in range(rng.choice([0, 1, 2, 17, 300]))]
        made = Trajectory(Task("chat", "chat", "1", "train"), "g" * rng.choice([1, 9000]), "", steps)
        assert len(outline(Experience(made))) < 5300


async def through_stdio(store, *calls, server=("--search", "words")):
    "Answers of the real program, asked by the protocol's own client."
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client
    given = StdioServerParameters(command=EXPRAG[0], args=[*EXPRAG[1:], "mcp", "--store", str(store), *server],
                                  env=dict(os.environ))
    async with Client(stdio_client(given)) as client:
        names = [t.name for t in (await client.list_tools()).tools]
        return names, [await client.call_tool(name, arguments) for name, arguments in calls]


def test_the_program_speaks_the_protocol(tmp_path):
    steps = [{"action": "pytest -q", "observation": "1 failed"}, {"action": "set TZ=UTC"}]
    names, (kept, found) = asyncio.run(through_stdio(
        tmp_path / "memory.db",
        ("record_experience", {"goal": "Mend the test of dates.", "steps": steps, "success": True}),
        ("search_experience", {"goal": "Mend the test of times."})))
    assert names == ["search_experience", "read_episode", "record_experience", "report_outcome"]
    assert found.structured_content["episodes"] == [kept.content[0].text]
    assert "set TZ=UTC" in found.structured_content["experience"]


def test_no_argument_ends_the_server(tmp_path):
    "Random calls, as a model might make them, and then a right one."
    from mcp import Client

    from exprag.memory.chat_memory import ChatMemory
    from exprag.memory.hybrid import WordRetriever
    from exprag.memory.mcp import memory_server
    rng = random.Random(2)
    atoms = [None, True, 0, -1, 1e308, "", "x", "\ud800", "\x00", "<|im_start|>", "a" * 30_000, [], {}, [[]], {"action": 3},
             {"action": "go"}, [{"action": "go", "observation": "\u202e"}], "' OR 1=1 --", '"*"', "NEAR("]
    fields = ["goal", "steps", "success", "receipt", "episode", "extra"]
    tools = ["search_experience", "read_episode", "record_experience", "report_outcome", "other"]

    async def go():
        store = Store(tmp_path / "memory.db")
        server = memory_server(ChatMemory(store, WordRetriever(store), "me"))
        async with Client(server) as client:
            for _ in range(600):
                given = {f: rng.choice(atoms) for f in rng.sample(fields, rng.randint(0, 4))}
                try: await client.call_tool(rng.choice(tools), given)
                except Exception as error: assert type(error).__name__ == "MCPError", repr(error)
            return await client.call_tool("search_experience", {"goal": "Open the door."})
    assert not asyncio.run(go()).is_error


MINUTES = float(os.environ.get("EXPRAG_FUZZ_MINUTES", "1"))  # for each of the two


class Fuzz:
    "What a model, or a broken program, may send: wrong and right arguments, and what earlier answers gave."
    def __init__(self, seed):
        self.rng, self.known = random.Random(seed), {"receipt": ["x"], "episode": ["0" * 32]}
        self.atoms = [None, True, 0, -1, 1e308, 10 ** 40, "", "x", "\ud800", "\x00", "<|im_start|>system", "</s>", "a" * 30_000,
                      [], {}, [[]], {"action": 3}, {"action": "go"}, [{"action": "go", "observation": "\u202e"}],
                      "' OR 1=1 --", '"*"', "NEAR(", "lamp AND fan", "[End of memory]", "e\u0301" * 50, {"$ref": "#"}, "-0"]

    def text(self):
        words = "open the red blue door lamp fan 7 \u00e9t\u00e9 \u65e5\u672c <|im_end|> [INST] NOT AND * ( \" ' \x1b[31m \n".split(" ")
        return " ".join(self.rng.choices(words, k=self.rng.randint(1, 12)))

    def value(self, depth=0):
        kind = self.rng.random()
        if kind < 0.6 or depth > 3: return self.rng.choice([*self.atoms, self.text(), self.text()])
        if kind < 0.8: return [self.value(depth + 1) for _ in range(self.rng.randint(0, 4))]
        return {self.rng.choice(["action", "observation", "goal", "x"]): self.value(depth + 1) for _ in range(self.rng.randint(0, 3))}

    def steps(self):
        return [{"action": self.text(), "observation": self.text()} for _ in range(self.rng.randint(1, 4))]

    def call(self):
        rng, goal = self.rng, self.text()
        right = {"search_experience": {"goal": goal}, "read_episode": {"episode": rng.choice(self.known["episode"])},
                 "record_experience": {"goal": goal, "steps": self.steps(), "success": rng.choice([True, False, None]),
                                       "receipt": rng.choice([None, *self.known["receipt"]])},
                 "report_outcome": {"receipt": rng.choice(self.known["receipt"]), "success": rng.random() < 0.5}}
        name = rng.choice([*right, *right, "other"])
        given = right.get(name, {})
        for _ in range(rng.choice([0, 0, 1, 2])): given = {**given, rng.choice(["goal", "steps", "success", "receipt", "episode", "x"]): self.value()}
        if given and rng.random() < 0.1: given.pop(rng.choice(list(given)))
        return name, given

    def learn(self, name, answer):
        if name == "search_experience":
            self.known["receipt"].append(answer["receipt"]), self.known["episode"].extend(answer["episodes"])
        for several in self.known.values(): del several[1:-20]


@pytest.mark.slow
def test_calls_for_minutes(tmp_path):
    "No call ends the server, is answered by an error of the server's own, or lets a control token through."
    from collections import Counter

    from mcp import Client

    from exprag.memory.chat_memory import ChatMemory, ChatMemoryOptions
    from exprag.memory.hybrid import WordRetriever
    from exprag.memory.maintenance import check
    from exprag.memory.mcp import memory_server
    fuzz, told = Fuzz(int(time.time())), Counter()

    async def go(store):
        server = memory_server(ChatMemory(store, WordRetriever(store), "me", ChatMemoryOptions(most=300)))
        ends = time.monotonic() + 60 * MINUTES
        async with Client(server) as client:
            while time.monotonic() < ends:
                name, given = fuzz.call()
                try: answer = await client.call_tool(name, given)
                except Exception as error:
                    assert type(error).__name__ == "MCPError", (name, given, error)
                    told[name, "refused"] += 1
                    continue
                text = answer.content[0].text if answer.content else ""
                told[name, "error" if answer.is_error else "answered"] += 1
                assert "Internal" not in text and "Traceback" not in text, (name, given, text)
                assert answer.is_error or "<|im_" not in text, (name, given, text)
                if not answer.is_error: fuzz.learn(name, answer.structured_content)
            return await client.call_tool("search_experience", {"goal": "Open the door."})
    with Store(tmp_path / "m.db") as store: assert not asyncio.run(go(store)).is_error
    assert check(tmp_path / "m.db").ok and min(told[n, "answered"] for n in ("search_experience", "record_experience")) > 10
    print(f"\n{sum(told.values())} calls: {dict(told)}")


@pytest.mark.slow
def test_lines_for_minutes(tmp_path):
    "Whatever is written to the program: it answers the next right request, or has ended with its input."
    fuzz, lines, ends, answers = Fuzz(int(time.time())), 0, time.monotonic() + 60 * MINUTES, queue.Queue()
    def start():
        made = subprocess.Popen([*EXPRAG, "mcp", "--store", tmp_path / "m.db", "--search", "words"], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        def read():  # else a full pipe would hold both
            for told in made.stdout: answers.put(told)
            answers.put(b"")
        threading.Thread(target=read, daemon=True).start()
        send(made, {"jsonrpc": "2.0", "id": "hello", "method": "initialize", "params": {
            "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "fuzz", "version": "1"}}})
        assert until(made, "hello")["result"]
        send(made, {"jsonrpc": "2.0", "method": "notifications/initialized"})
        return made
    def send(program, line):
        program.stdin.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
        program.stdin.flush()
    def until(program, id):
        while line := answers.get(timeout=60):
            if (said := json.loads(line)).get("id") == id: return said
        raise AssertionError(f"the program has ended with {program.wait()}")
    def line():
        rng, (name, given) = fuzz.rng, fuzz.call()
        request = {"jsonrpc": "2.0", "id": lines, "method": "tools/call", "params": {"name": name, "arguments": given}}
        kind = rng.randrange(8)
        if kind < 3: return request
        if kind == 3: return {**request, rng.choice(["jsonrpc", "id", "method", "params"]): fuzz.value()}
        if kind == 4: return {**request, "params": fuzz.value()}
        if kind == 5: return fuzz.value()
        if kind == 6: return bytes(rng.randrange(256) for _ in range(rng.randrange(200))).replace(b"\n", b"")
        return json.dumps(request).encode()[:rng.randrange(1, 80)]
    program = start()
    try:
        while time.monotonic() < ends:
            for _ in range(50): send(program, line()); lines += 1
            send(program, {"jsonrpc": "2.0", "id": f"ping {lines}", "method": "ping"})
            assert until(program, f"ping {lines}")["result"] == {}
        program.stdin.close()
        assert program.wait(timeout=20) == 0
    finally: program.kill()
    print(f"\n{lines} lines")


def test_a_store_that_cannot_be_written_offers_reading(shelf):
    from exprag.memory.mcp import MemoryTools, memory_server
    folder, id = shelf
    def job():
        with Store(folder / "s.db") as store:
            memory = memory_of(store)
            names = [t.name for t in asyncio.run(memory_server(memory).list_tools())]
            tools = MemoryTools(memory)
            found = tools.search_experience(ASK[0]["content"])
            return [store.read_only, names, found.episodes, found.receipt, "press switch" in tools.read_episode(id)]
    assert in_a_read_only_place(folder, job) == [True, ["search_experience", "read_episode"], [id], "", True]


def test_over_http_a_token_is_needed(tmp_path):
    import httpx
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = subprocess.Popen([*EXPRAG, "mcp", "--store", tmp_path / "memory.db", "--search", "words", "--http", str(port)],
                              env={**os.environ, "EXPRAG_TOKEN": "secret"}, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr.readline().strip() == f"http://127.0.0.1:{port}/mcp"
        url, hello = f"http://127.0.0.1:{port}/mcp", {
            "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
                "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}}
        def status(**headers):
            headers = {"accept": "application/json, text/event-stream", **headers}
            for _ in range(100):
                try: return httpx.post(url, json=hello, headers=headers, timeout=30).status_code
                except httpx.ConnectError: time.sleep(0.1)
        assert status() == 401 and status(authorization="Bearer x") == 401
        right = {"authorization": "Bearer secret"}
        assert status(**right) == 200
        assert status(**right, host="evil.example") in (403, 421)  # a page of another host, by DNS
    finally:
        server.terminate()
        server.wait(10)
    assert "secret" not in server.stderr.read()
