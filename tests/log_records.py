"Records of other programs' logs, for tests; not a test itself."
import json
from pathlib import Path

from exprag.logs.files import read_log
from exprag.logs.spans import to_any


def dump(path: Path, *lines) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def chat(*turns: str, **more) -> dict:
    "An OpenAI record whose turns are user, assistant, user, ..."
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)], **more}


def gpt(*turns: str, **more) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)], **more}


def read(path, *args, **options):
    "All episodes, and all refusals as (unit, number, field, reason)."
    problems = []
    found = list(read_log(path, *args, refused=problems.append, **options))
    return found, [(p.unit, p.number, p.field, p.reason) for p in problems]


def span(trace, n, operation, start, parent="", events=(), **attributes):
    return {"traceId": trace, "spanId": f"{n:016x}", "parentSpanId": parent, "name": operation, "startTimeUnixNano": str(start), "events": list(events),
            "attributes": [{"key": k.replace("__", "."), "value": to_any(v)} for k, v in {"gen_ai__operation__name": operation, **attributes}.items()]}


def otlp(*spans): return {"resourceSpans": [{"scopeSpans": [{"spans": list(spans)}]}]}


def part(role, **fields): return {"role": role, "parts": [fields]}


def agent_spans(trace, name, first=0, as_text=True):
    "An agent that calls a tool and then answers, as three spans."
    dumps = json.dumps if as_text else (lambda v: v)
    user, asked = part("user", type="text", content=f"{name}'s goal"), part("assistant", type="tool_call", id=f"{name}1", name="look", arguments={"at": name})
    result = part("tool", type="tool_call_response", id=f"{name}1", response="a door")
    answer = part("assistant", type="text", content=f"{name} is done")
    return [span(trace, first + 1, "chat", first + 1, gen_ai__input__messages=dumps([user]), gen_ai__output__messages=dumps([{**asked, "finish_reason": "tool_call"}]), gen_ai__request__model="m"),
            span(trace, first + 2, "execute_tool", first + 2, gen_ai__tool__call__id=f"{name}1", gen_ai__tool__call__result="a door"),
            span(trace, first + 3, "chat", first + 3, gen_ai__input__messages=dumps([user, asked, result]), gen_ai__output__messages=dumps([answer]), gen_ai__request__model="m")]
