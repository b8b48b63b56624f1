"""What a memory does, as OpenTelemetry's own SDK sees it, and read back from a trace."""
import json
import subprocess
import sys

import pytest

from exprag.logs.files import read_log
from exprag.logs.spans import OPERATION, RECALLED, to_spans
from exprag.memory.chat_memory import ChatMemory
from exprag.memory.hybrid import WordRetriever
from exprag.store import Store
from exprag.trajectory import TrajectoryError

GOAL = {"role": "user", "content": "Open the red door with the brass key."}
DONE = [GOAL, {"role": "assistant", "content": "try the brass key"}]


@pytest.fixture
def spans(monkeypatch):
    "The spans of this test."
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


@pytest.fixture
def memory(tmp_path):
    with Store(tmp_path / "memory.db") as store: yield ChatMemory(store, WordRetriever(store), "me")


def test_the_calls_of_a_memory_are_spans_without_text(spans, memory):
    kept = memory.record(DONE, True)
    asked = memory.augment([{"role": "user", "content": "Open the red door."}], "talk 1")
    memory.forget([kept.id])
    assert [s.name for s in spans()] == ["upsert_memory", "search_memory", "delete_memory"]
    assert [s.attributes[OPERATION] for s in spans()] == [s.name for s in spans()]
    assert asked.receipt.ids == (kept.id,)
    assert spans()[0].attributes[RECALLED] == spans()[1].attributes[RECALLED] == (kept.id,)
    assert all(s.attributes["gen_ai.memory.store.id"] == "memory.db" for s in spans())
    assert "door" not in "".join(s.to_json() for s in spans()) and "brass" not in str([s.attributes for s in spans()])


def test_a_refusal_is_an_error_without_its_text(spans, memory):
    with pytest.raises(TrajectoryError): memory.record([GOAL], True)
    span, = spans()
    assert not span.status.is_ok and span.attributes["error.type"] == "TrajectoryError"
    assert not span.events and span.status.description is None


def test_what_was_recalled_is_read_back(tmp_path):
    trace = "ab" * 16
    export = to_spans(DONE, trace, "opener")
    attributes = [{"key": OPERATION, "value": {"stringValue": "search_memory"}},
                  {"key": RECALLED, "value": {"arrayValue": {"values": [{"stringValue": "b" * 64}, {"stringValue": "a" * 64}]}}}]
    search = {"traceId": trace, "spanId": "cd" * 8, "name": "search_memory", "startTimeUnixNano": "1",
              "endTimeUnixNano": "2", "attributes": attributes}
    export["resourceSpans"][0]["scopeSpans"][0]["spans"].append(search)
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(export))
    read, = read_log(path)
    assert list(read.provenance["recalled"]) == ["a" * 64, "b" * 64]


def test_without_opentelemetry_nothing_changes(tmp_path):
    code = """
import sys
sys.modules["opentelemetry"] = None
from exprag.memory.chat_memory import ChatMemory
from exprag.memory.hybrid import WordRetriever
from exprag.store import Store
with Store(sys.argv[1]) as store:
    memory = ChatMemory(store, WordRetriever(store), "me")
    memory.record([{"role": "user", "content": "Open the door."}, {"role": "assistant", "content": "pull"}], True)
    print("pull" in memory.augment([{"role": "user", "content": "Open the door."}])[0]["content"])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "memory.db"], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
