"""Frameworks for agents get a memory by the line that the chapter on clients gives: the real packages, and a server."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from openai import AsyncOpenAI

from exprag.memory.chat_memory import OPENS, ChatMemory
from exprag.memory.clients import wrap
from exprag.memory.hybrid import WordRetriever
from exprag.store import Store

USAGE = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2, "input_tokens_details": {"cached_tokens": 0},
         "output_tokens_details": {"reasoning_tokens": 0}}


class Scripted(BaseHTTPRequestHandler):
    "Answers every request with the same words, or by the tool that ends a run of smolagents."
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(request)
        if self.path.endswith("/responses"):
            said = [{"type": "output_text", "text": "Pull it.", "annotations": []}]
            body = {"id": f"r{len(self.server.asked)}", "object": "response", "created_at": 0, "model": "x", "status": "completed",
                    "output": [{"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": said}],
                    "parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "usage": USAGE}
        else:
            call = {"name": "final_answer", "arguments": '{"answer": "Pull it."}'}
            message = {"role": "assistant", "content": "Pull it."}
            if request.get("tools"): message["tool_calls"] = [{"id": "c", "type": "function", "function": call}]
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": "x",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
        answer = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    made.asked, made.url = [], f"http://127.0.0.1:{made.server_port}/v1"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def memory(tmp_path):
    with Store(tmp_path / "memory.db") as store: yield ChatMemory(store, WordRetriever(store), "me")


@pytest.mark.filterwarnings("error:a request goes on without its memory")
@pytest.mark.parametrize("interface", ["responses", "chat_completions"])
def test_the_agents_sdk(server, memory, interface):
    agents = pytest.importorskip("agents", reason="needs the extra: pip install exprag[frameworks]")
    agents.set_tracing_disabled(True)
    client = wrap(AsyncOpenAI(base_url=server.url, api_key="none"), memory)
    agents.set_default_openai_client(client, use_for_tracing=False)
    agents.set_default_openai_api(interface)
    agent = agents.Agent(name="opener", instructions="You open doors.", model="x")
    assert agents.Runner.run_sync(agent, "Open the red door.").final_output == "Pull it."
    kept = client.record(success=True)
    assert kept.goal == "Open the red door." and kept.actions == ("Pull it.",)
    agents.Runner.run_sync(agent, "Open the blue door.")
    assert OPENS not in json.dumps(server.asked[0]) and OPENS in json.dumps(server.asked[1])


@pytest.mark.filterwarnings("error:a request goes on without its memory")
def test_smolagents(server, memory):
    smolagents = pytest.importorskip("smolagents", reason="needs the extra: pip install exprag[frameworks]")
    model = smolagents.OpenAIServerModel("x", api_base=server.url, api_key="none")
    model.client = wrap(model.client, memory)
    agent = smolagents.ToolCallingAgent(tools=[], model=model, verbosity_level=0)
    assert agent.run("Open the red door.") == "Pull it."
    kept = model.client.record(success=True)
    assert "Open the red door." in kept.goal and len(kept) == 1
    agent.run("Open the blue door.")
    assert OPENS not in json.dumps(server.asked[0]) and OPENS in json.dumps(server.asked[1])


def test_langgraph(memory):
    graphs = pytest.importorskip("langgraph.graph", reason="needs the extra: pip install exprag[frameworks]")
    from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
    from langchain_core.messages import AIMessage
    from langgraph.checkpoint.memory import InMemorySaver
    asked = []

    class Model(GenericFakeChatModel):
        def _generate(self, messages, *given, **more):
            asked.append(messages)
            return super()._generate(messages, *given, **more)

    model = Model(messages=iter([AIMessage("Pull it."), AIMessage("Push it.")]))

    def call_model(state, config):
        thread = config["configurable"]["thread_id"]
        return {"messages": [model.invoke(memory.augment(state["messages"], thread))]}

    graph = graphs.StateGraph(graphs.MessagesState)
    graph.add_node("model", call_model)
    graph.add_edge(graphs.START, "model")
    app = graph.compile(checkpointer=InMemorySaver())
    def run(thread, text):
        return app.invoke({"messages": [{"role": "user", "content": text}]}, {"configurable": {"thread_id": thread}})
    kept = memory.record(run("one", "Open the red door.")["messages"], success=True, receipt="one")
    assert kept.actions == ("Pull it.",)
    state = run("two", "Open the blue door.")
    assert OPENS in str(asked[1]) and OPENS not in str(asked[0])
    assert OPENS not in str(state["messages"])  # the memory stands in the request, not in the state


@pytest.fixture(scope="module")
def litellm():
    "The package, which would else look for its list of prices on the network."
    import os
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    made = pytest.importorskip("litellm", reason="needs the extra: pip install exprag[frameworks]")
    made.telemetry = False
    return made


@pytest.mark.filterwarnings("error:a request goes on without its memory")
@pytest.mark.parametrize("way", ["completion", "acompletion", "responses", "aresponses", "router"])
def test_litellm(server, memory, litellm, way):
    import asyncio
    target, more = litellm, {"api_base": server.url, "api_key": "none"}
    if way == "router":
        one = {"model_name": "openai/x", "litellm_params": {"model": "openai/x", **more}}
        target, way, more = litellm.Router(model_list=[one]), "completion", {}
    client = wrap(target, memory)
    def ask(words):
        said = [{"role": "user", "content": words}]
        if way == "completion": return client.completion("openai/x", said, **more).choices[0].message.content
        if way == "responses": return client.responses(words, "openai/x", **more).output[0].content[0].text
        if way == "acompletion":
            return asyncio.run(client.acompletion(model="openai/x", messages=said, **more)).choices[0].message.content
        return asyncio.run(client.aresponses(input=words, model="openai/x", **more)).output[0].content[0].text
    assert ask("Open the red door.") == "Pull it." and OPENS not in json.dumps(server.asked)
    kept = client.record(True)
    assert kept.goal == "Open the red door." and kept.actions == ("Pull it.",)
    ask("Open the blue door.")
    assert OPENS in json.dumps(server.asked[-1]) and "Open the red door." in json.dumps(server.asked[-1])
    assert client.record(False) is None and OPENS not in "".join(map(str, map(memory.store.get, memory.store.find())))


@pytest.mark.filterwarnings("error:a request goes on without its memory")
def test_litellm_in_pieces(server, memory, litellm, monkeypatch):
    "A stream is read as it comes, and its answer is recorded."
    import asyncio
    client = wrap(litellm, memory)
    about = {"model": "openai/x", "messages": [{"role": "user", "content": "Open the red door."}], "stream": True,
             "mock_response": "Pull it slowly."}  # litellm's own words for a model's, in pieces
    assert "".join(c.choices[0].delta.content or "" for c in client.completion(**about)) == "Pull it slowly."
    assert client.record(True).actions == ("Pull it slowly.",)
    async def listen():
        said = [c.choices[0].delta.content or "" async for c in await client.acompletion(**about)]
        return "".join(said), await client.record_async(True)
    said, kept = asyncio.run(listen())
    assert said == kept.actions[0] == "Pull it slowly."
    with pytest.raises(litellm.exceptions.BadRequestError): client.completion("no-such-provider/x", about["messages"])
