"""A store in a file and one on a server, side by side: how long a call takes, and what an approximate index finds under a filter.

    python nbs/data/postgres.py [EPISODES]      writes postgres.json beside this file; minutes

The server is that of the wheel `pgserver`, on this machine, over a socket, with its own settings (fsync on). Every add is a commit of its
own. Calls of the two stores take turns, so that what else the machine does falls on both.
"""
import json
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from exprag.memory.hybrid import WordRetriever
from exprag.memory.postgres import LocalServer, PostgresRetriever
from exprag.memory.postgres_server import Vector
from exprag.query import Retriever
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory

DIM, CALLS, ASKED, SHARES = 384, 200, 100, (1, 10, 100)  # SHARES: an episode in so many passes the filter


class Words:
    "Sums of a random vector for each word: as long as a sentence encoder's, and made in no time."
    name, dim, max_tokens = "words@384", DIM, 10 ** 6

    def encode(self, texts, role="document"):
        def vector(word): return np.random.default_rng(zlib.crc32(word.encode())).normal(size=DIM)
        rows = np.array([sum(vector(word) for word in text.lower().split()) for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def goal(n: int) -> str:
    "One of many goals that share words."
    chance = np.random.default_rng(n)
    words = [f"{kind}{chance.zipf(1.5) % size}" for kind, size in (("verb", 30), ("thing", 900), ("room", 60), ("with", 900), ("then", 30))]
    return f"please {words[0]} the {words[1]} in the {words[2]} with the {words[3]} and {words[4]} it"


def episode(n: int) -> Trajectory:
    steps = tuple(Step(f"do {n} {i}", f"Part {i} of {n} is done, and here is what it looked like.") for i in range(8))
    return Trajectory(Task("shop", f"type{n % 100}", str(n), "train"), goal(n), "You are in a room.", steps, 1.0, True)


def asked(n: int) -> Trajectory: return Trajectory(Task("shop", "asked", str(n), "test"), goal(10_000_000 + n), "")


def calls(store, on_server: bool) -> dict:
    "What is measured, by name: functions of a number."
    words, inside = WordRetriever(store), Retriever(store, Words())
    found = {"add": lambda n: store.add(episode(1_000_000 + n)), "find by type": lambda n: store.find(types=[f"type{n % 100}"]),
             "get": lambda n: store.get(episode(n).id), "recall by words": lambda n: words.search(asked(n), 10),
             "recall by meaning, in the process": lambda n: inside.search(asked(n), 10)}
    if on_server:
        there = PostgresRetriever(store, Words())
        found["recall by meaning, on the server"] = lambda n: there.search(asked(n), 10)
    return found


def times(stores: dict) -> dict:
    "Milliseconds of each call, by name and store."
    made = {place: calls(store, place == "server") for place, store in stores.items()}
    taken = {}
    for name in made["server"]:
        for n in range(-3, CALLS):  # the first three are not counted
            for place in stores:
                if name not in made[place]: continue
                begun = time.perf_counter()
                made[place][name](abs(n) if n < 0 else n + 3)
                if n >= 0: taken.setdefault(name, {}).setdefault(place, []).append(1000 * (time.perf_counter() - begun))
    return {name: {place: [round(float(np.percentile(ms, p)), 2) for p in (50, 99)] for place, ms in places.items()} for name, places in taken.items()}


def recalls(store) -> list[dict]:
    "What share of the true ten nearest is found: exactly, and by an HNSW index of pgvector, which filters what it has found."
    exact = PostgresRetriever(store, Words())
    with store.reading() as connection: connection.raw.execute(f"CREATE INDEX trial ON vectors USING hnsw ((vector::vector({DIM})) vector_ip_ops)")
    rows, encoder = [], Words()
    for share in SHARES:
        ids = store.find(types=[f"type{k}" for k in range(0, 100, share)])
        allow = json.dumps(ids)
        found = {"exact": [], "hnsw": []}
        truth = Retriever(store, Words())
        for n in range(ASKED):
            query = encoder.encode([asked(n).goal])[0]
            true = {h.id for h in truth.search(asked(n), 10, ids)}
            with store.writing() as connection:
                connection.execute("SET LOCAL enable_seqscan = off")
                connection.execute("SET LOCAL enable_sort = off")
                near = connection.execute(f"SELECT id FROM vectors WHERE id IN (SELECT value FROM json_each(?)) ORDER BY vector::vector({DIM}) <#> ? LIMIT 10",
                                          [allow, Vector(query.astype("<f4").tobytes())]).fetchall()
            found["exact"].append(len(true & {h.id for h in exact.search(asked(n), 10, ids)}) / 10)
            found["hnsw"].append(len(true & {id for id, in near}) / 10)
        rows.append({"passes the filter": f"1 in {share}", **{k: round(float(np.mean(v)), 3) for k, v in found.items()}})
    with store.reading() as connection: connection.raw.execute("DROP INDEX trial")
    return rows


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, LocalServer() as server, Store(Path(folder, "memory.db")) as file, Store(server.address()) as there:
        stores, filled = {"file": file, "server": there}, {}
        for place, store in stores.items():
            begun = time.perf_counter()
            store.add_many(map(episode, range(count)))
            filled[place] = round(time.perf_counter() - begun, 1)
            WordRetriever(store).index(), Retriever(store, Words()).index()
        with there.reading() as connection: connection.raw.execute("ANALYZE")
        same = {name: all([h.id for h in calls(file, False)[name](n)] == [h.id for h in calls(there, True)[name](n)] for n in range(20))
                for name in ("recall by words", "recall by meaning, in the process")}
        made = {"episodes": count, "calls": CALLS, "seconds to fill": filled, "same answers": same, "milliseconds (p50, p99)": times(stores), "recall of the ten nearest": recalls(there)}
    Path(__file__).with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
