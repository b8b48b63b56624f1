"""Measures what a chat memory costs an agent in a large store, and writes the figures down.

    python nbs/data/memory_scale.py EPISODES OUT.json

The chapter memory/14_chat_memory shows the figures. The store is made in a temporary folder, of
small episodes (a goal, two steps) whose goals are made of a few common and many rare words. Then
agents ask and record, one after the other and sixteen threads at once; each call is timed by the
clock.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np

from exprag.memory.chat_memory import ChatMemory
from exprag.memory.hybrid import WordRetriever
from exprag.query import goal
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory

VERBS = "mend,write,move,rename,speed up,document,remove,review,split,port".split(",")
KINDS = "failing,slow,old,first,public,hidden,long,nightly,flaky,missing,last,small".split(",")
PAIRS = 100  # of calls, one after the other
AGENTS, EACH = 16, 5  # agents at once, and their pairs of calls


def request(rng: Random) -> str:
    "A goal: common words, and rarer and rarer ones."
    thing, module = int(300 * rng.random() ** 2), int(20_000 * rng.random() ** 2)
    return f"{rng.choice(VERBS)} the {rng.choice(KINDS)} test of thing{thing} in module{module}"


def episode(number: int, rng: Random) -> Trajectory:
    asked = request(rng)
    steps = (Step(f"open {asked.rsplit(' ', 1)[1]}.py", "def test(): ..."), Step("edit it", "done"))
    return Trajectory(Task("chat", "chat", f"{number}", "train"), asked, "", steps, 1.0, True,
                      provenance={"author": "me"})


def fill(store: Store, count: int) -> None:
    "Episodes and their words, in batches."
    rng, words = Random(1), WordRetriever(store)
    for start in range(0, count, 5000):
        some = [episode(n, rng) for n in range(start, min(start + 5000, count))]
        store.add_many(some, batch=5000)
        store.put_texts("goal", {t.id: goal(t) for t in some})
    words.index()


def pair(memory: ChatMemory, rng: Random, name: str) -> tuple[float, float]:  # seconds of each
    "A conversation: it asks the memory, acts, and is recorded."
    asked = [{"role": "user", "content": f"{request(rng)}, for {name}"}]
    begun = time.perf_counter()
    memory.augment(asked, name)
    half = time.perf_counter()
    said = {"role": "assistant", "content": f"opened, edited, tested for {name}"}
    memory.record([*asked, said], True, receipt=name)
    return half - begun, time.perf_counter() - half


def spread(times: list) -> dict:
    "Milliseconds of both calls."
    columns = zip(("augment", "record"), np.array(times).T * 1000)
    return {name: {f"p{q}": round(float(np.percentile(column, q)), 1) for q in (50, 99)}
            for name, column in columns}


def measure(store: Store) -> dict:
    memory, made = ChatMemory(store, WordRetriever(store), "me"), {}
    pair(memory, Random(0), "warm")
    rng = Random(2)
    made["one"] = spread([pair(memory, rng, f"one {n}") for n in range(PAIRS)])
    ready = threading.Barrier(AGENTS)
    def agent(number):
        own = Random(100 + number)
        ready.wait()
        return [pair(memory, own, f"{number} {n}") for n in range(EACH)]
    with ThreadPoolExecutor(AGENTS) as pool: several = list(pool.map(agent, range(AGENTS)))
    made["sixteen"] = spread([times for one in several for times in one])
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("episodes", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--store", type=Path, help="kept, and used if it is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.store or Path(folder, "memory.db")
        with Store(path) as store:
            if len(store) < given.episodes: fill(store, given.episodes)
            made = measure(store)
            made["bytes_an_episode"] = round(path.stat().st_size / len(store))
    old = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.write_text(json.dumps({**old, str(given.episodes): made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
