"""What the tests of worlds share: tasks, one simulator a module, and which processes there are."""
import os
import signal
import time

import pytest

from exprag.worlds.scienceworld import EASY_TYPES, HARD_TYPES, ScienceWorldEnv
from exprag.trajectory import Task

MARK = "EXPRAG_TEST_MARK"  # an environment variable: whatever a marked process starts is marked too
TYPES = EASY_TYPES + HARD_TYPES
QUICK = Task("scienceworld", "find-plant", 0, "train")


def task(kind: str, variation: int = 0, fold: str = "train") -> Task:
    return Task("scienceworld", kind, variation, fold)


@pytest.fixture(scope="module")
def env():
    with ScienceWorldEnv() as made: yield made


def stop(pid: int):
    "Stop a process of ours, and return when it has stopped: until then it may still answer a question."
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)


def status(pid: int) -> tuple[str, str, int] | None:
    "Name, state and parent of a process; None when it is gone."
    try:
        with open(f"/proc/{pid}/stat") as file: name, rest = file.read().split("(", 1)[1].rsplit(")", 1)
    except OSError: return None
    state, parent = rest.split()[:2]
    return name, state, int(parent)


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def java_children() -> set[int]:
    "Process ids of this process's own JVMs."
    found = {pid: status(pid) for pid in pids()}
    return {pid for pid, s in found.items() if s and s[0] == "java" and s[2] == os.getpid() and s[1] != "Z"}


def marked(value: str) -> dict[int, str]:
    "Process ids of what was started with the mark, each with its command line; a zombie is gone."
    found = {}
    for pid in pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file: mine = f"{MARK}={value}".encode() in file.read().split(b"\0")
            with open(f"/proc/{pid}/cmdline", "rb") as file: command = file.read().replace(b"\0", b" ").decode()
        except OSError: continue
        if mine and (s := status(pid)) and s[1] != "Z": found[pid] = command
    return found


def gone(value: str, seconds: float = 10.0) -> bool:
    "Whether nothing with the mark is left, now or soon: a killed process takes a moment."
    deadline = time.monotonic() + seconds
    while (left := {p for p in marked(value) if p != os.getpid()}) and time.monotonic() < deadline: time.sleep(0.1)
    return not left
