"""Measures an approximate index beside its peers, on the same keys, and writes the figures down.

    python nbs/data/scale.py KEYS OUT.json [--hnsw] [--lance]
    python nbs/data/scale.py EPISODES OUT.json --adding

The chapter memory/03_approximate shows the figures. The goals are encoded once and kept in a
temporary folder. One thread everywhere. Each time is given twice: by the clock, and as CPU time of
the process, which is what the clock would say on an idle machine.
"""
import os

for name in (
    "OMP_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "LANCE_CPU_THREADS",
    "TOKIO_WORKER_THREADS",
    "MKL_NUM_THREADS",
):
    os.environ.setdefault(name, "1")
os.environ.setdefault("RUST_LOG", "error")  # lancedb is talkative

import argparse
import gc
import itertools
import json
import platform
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

QUERIES = 1000
SUBSTANCES = (
    "water,mercury,chocolate,ice cream,orange juice,apple"
    " juice,milk,lead,tin,gallium,soap,rubber,caesium,marshmallow,sodium,butter".split(",")
)
THINGS = (
    "apple,banana,bowl,bread,cup,egg,fork,kettle,knife,lettuce,mug,pan,plate,potato,spoon,tomato,"
    "vase,book,candle,cloth,pencil,pillow,soap bar,towel".split(",")
)
PLACES = (
    "bedroom,kitchen,bathroom,workshop,greenhouse,living room,art studio,foundry,hallway,outside"
    .split(",")
)
SPOTS = (
    "cabinet,countertop,drawer,fridge,shelf,side table,sink,desk,dresser,garbage can,coffee"
    " table,bed".split(",")
)
COLOURS = "red,green,blue,yellow,orange,purple".split(",")
BEINGS = "animal,plant,living thing,non-living thing,insect,bird,flower,tree".split(",")
TEMPLATES = (
    (
        (
            "Your task is to {} {}. First, focus on the substance. Then, take actions that will"
            " cause it to change its state of matter."
        ),
        ("boil", "melt", "freeze", "cool", "warm"),
        SUBSTANCES,
    ),
    (
        (
            "Your task is to measure the temperature of {}, which is located around the {}. First,"
            " focus on the thermometer. If it is above {} degrees, put it in the {} box."
        ),
        SUBSTANCES,
        PLACES[:5],
        ("10", "50"),
        COLOURS[:3],
    ),
    (
        (
            "Your task is to find a(n) {}. First, focus on the thing. Then, move it to the {} box"
            " in the {}."
        ),
        BEINGS,
        COLOURS,
        PLACES,
    ),
    ("put a {} {} in {}.", ("clean", "hot", "cool", "sliced"), THINGS, SPOTS),
    (
        "look at {} under the {}.",
        THINGS,
        ("desk lamp", "floor lamp", "ceiling light", "candle light"),
    ),
    ("find two {} and put them in {}.", THINGS, SPOTS),
    (
        (
            "Your task is to determine whether {} is electrically conductive. The {} is located"
            " around the {}. Put it in the {} box."
        ),
        SUBSTANCES,
        ("sample", "object"),
        PLACES[:6],
        COLOURS[:3],
    ),
)


def goals() -> tuple[list[str], np.ndarray]:
    "All goals, and the template of each."
    made = [
        (t[0].format(*slots), number)
        for number, t in enumerate(TEMPLATES)
        for slots in itertools.product(*t[1:])
    ]
    return [text for text, _ in made], np.array([number for _, number in made])


def encoded(texts: list[str]) -> np.ndarray:
    "The goals by the bundled MiniLM, kept for the next time."
    from exprag.query import SentenceEncoder

    path = Path(tempfile.gettempdir()) / f"exprag-goals-{len(texts)}.npy"
    if not path.exists():
        np.save(path, SentenceEncoder(batch_size=32).encode(texts))
    return np.load(path)


def compose(base: np.ndarray, kind: np.ndarray, count: int, rng: np.random.Generator,
            ties: float = 0.3) -> np.ndarray:
    """Keys as a store has them: a share are goals met before (the popular ones often: Zipf), the
    others lie between a goal and another of its template, with noise."""
    popular = rng.permutation(len(base))
    first = popular[np.minimum(rng.zipf(1.3, count) - 1, len(base) - 1)]
    first = np.where(rng.random(count) < 0.5, first, rng.integers(len(base), size=count))
    order, starts = np.argsort(kind, kind="stable"), np.searchsorted(
        np.sort(kind), np.arange(kind.max() + 2)
    )
    low, high = starts[kind[first]], starts[kind[first] + 1]
    second = order[low + (rng.random(count) * (high - low)).astype(int)]
    keys = np.empty((count, base.shape[1]), np.float32)
    copied = rng.random(count) < ties
    for a in range(0, count, 20_000):
        s = slice(a, min(a + 20_000, count))
        pull = rng.uniform(0, 0.5, (s.stop - a, 1)).astype(np.float32)
        mixed = (
            (1 - pull) * base[first[s]]
            + pull * base[second[s]]
            + rng.normal(0, 0.01, (s.stop - a, base.shape[1])).astype(np.float32)
        )
        keys[s] = np.where(
            copied[s, None], base[first[s]], mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        )
    return keys


def timed(function, queries) -> tuple[list, dict]:
    "Answers, and milliseconds a query."
    for q in queries[:5]:
        function(q)
    answers, wall, cpu = [], [], []
    for q in queries:
        w, c = time.perf_counter(), time.process_time()
        answers.append(function(q))
        cpu.append(1e3 * (time.process_time() - c))
        wall.append(1e3 * (time.perf_counter() - w))
    spread = {
        f"{name}_{q}": round(float(np.percentile(values, q)), 3)
        for name, values in (("cpu", cpu), ("wall", wall))
        for q in (50, 99)
    }
    return answers, {**spread, "queries": len(queries)}


def once(function) -> tuple:
    "The value, and seconds by the clock and of CPU."
    w, c = time.perf_counter(), time.process_time()
    value = function()
    return value, {
        "wall": round(time.perf_counter() - w, 3),
        "cpu": round(time.process_time() - c, 3),
    }


def megabytes() -> float:
    "Resident memory of this process."
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def truth(keys: np.ndarray, queries: np.ndarray, k: int = 10) -> np.ndarray:
    "The k-th best exact score of each query."
    import faiss

    return faiss.knn(queries, keys, k, metric=faiss.METRIC_INNER_PRODUCT)[0][:, -1]


def recall(rows: list, keys: np.ndarray, queries: np.ndarray, kth: np.ndarray,
           k: int = 10) -> float:
    "Tie-aware: an answer counts if it is as near as the k-th best, to six digits."
    good = [
        (keys[np.asarray(r, int)].astype(np.float64) @ q.astype(np.float64) >= t - 1e-6).sum() / k
        for r, q, t in zip(rows, queries, kth)
    ]
    return round(float(np.mean(good)), 5)


def ours(keys, queries, kth, ids, folder) -> dict:
    "Exact and approximate index of this package, with all that happens to it."
    from exprag.query import ExactIndex
    from exprag.memory.approximate import ApproximateIndex, read_index, write_index

    row = {id: n for n, id in enumerate(ids)}
    gc.collect(); before = megabytes()
    index, build = once(lambda: ApproximateIndex(ids, keys))
    gc.collect(); memory = megabytes() - before
    answers, spread = timed(lambda q: [row[h.id] for h in index.search(q, 10)], queries)
    out = {
        "approximate": {
            **spread,
            "recall": recall(answers, keys, queries, kth),
            "build": build,
            "bytes_a_key": round(memory * 2**20 / len(ids)),
            "distinct": int(index.ivf.ntotal),
            "cells": int(index.ivf.nlist),
            "looked_at": int(index.nprobe),
        }
    }
    for share in (0.5, 0.05):
        allow = frozenset(np.array(ids)[np.random.default_rng(5).random(len(ids)) < share].tolist())
        kept = np.array([row[id] for id in sorted(allow)])
        some = queries[:200]
        answers, spread = timed(lambda q: [row[h.id] for h in index.search(q, 10, allow)], some)
        out["approximate"][f"allowing {share:.0%}"] = {
            **spread,
            "recall": recall(answers, keys, some, truth(keys[kept], some)),
        }
    exact, _ = once(lambda: ExactIndex(ids, keys))
    answers, spread = timed(lambda q: [row[h.id] for h in exact.search(q, 10)], queries[:100])
    out["exact"] = {**spread, "recall": recall(answers, keys, queries[:100], kth[:100])}
    del exact
    new = [f"{n:032x}" for n in range(1 << 100, (1 << 100) + 1000)]
    _, out["approximate"]["add_1000"] = once(lambda: index.add(new, queries[:1000]))
    _, out["approximate"]["remove_1000"] = once(lambda: index.remove(new))
    _, out["approximate"]["add_1"] = once(lambda: index.add(new[:1], queries[:1]))
    _, out["approximate"]["remove_1"] = once(lambda: index.remove(new[:1]))
    made_from = {"encoder": "e", "key": "goal", "store": "s"}
    _, out["approximate"]["save"] = once(lambda: write_index(folder / "index", index, made_from))
    (again, why), out["approximate"]["open"] = once(
        lambda: read_index(folder / "index", made_from, 1)
    )
    assert why == "" and again.search(queries[0], 10) == index.search(queries[0], 10)
    out["approximate"]["file_bytes_a_key"] = round((folder / "index").stat().st_size / len(ids))
    (folder / "index").unlink()
    return out


def numpy_dot(keys, queries, kth) -> dict:
    "The paper's way: a dot product with everything."
    def search(q):
        scores = keys @ q
        best = np.argpartition(-scores, 10)[:10]
        return best[np.argsort(-scores[best], kind="stable")]

    answers, spread = timed(search, queries)
    return {"NumPy dot product": {**spread, "recall": recall(answers, keys, queries, kth)}}


def sentence_transformers(keys, queries, kth) -> dict:
    "The search that comes with the encoder's library."
    import torch
    from sentence_transformers.util import dot_score, semantic_search

    torch.set_num_threads(1)
    corpus = torch.from_numpy(keys)
    answers, spread = timed(
        lambda q: [
            h["corpus_id"]
            for h in semantic_search(
                torch.from_numpy(q[None]),
                corpus,
                top_k=10,
                score_function=dot_score,
                corpus_chunk_size=len(keys),
            )[0]
        ],
        queries,
    )
    return {"semantic_search": {**spread, "recall": recall(answers, keys, queries, kth)}}


def hnsw(keys, queries, kth, distinct=False) -> dict:
    "FAISS's graph index; over distinct vectors, answers are counted with all their copies."
    import faiss

    from exprag.memory.approximate import vector_hashes

    faiss.omp_set_num_threads(1)
    copies, everyone = np.ones(len(keys), int), len(keys)
    if distinct:
        _, first, copies = np.unique(vector_hashes(keys), return_index=True, return_counts=True)
        keys = keys[first]
    gc.collect(); before = megabytes()
    index = faiss.IndexHNSWFlat(keys.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    _, build = once(lambda: index.add(keys))
    memory, out = megabytes() - before, {}
    for effort in (16, 32, 64, 128, 256, 512):
        index.hnsw.efSearch = effort
        answers, spread = timed(lambda q: index.search(q[None], 10)[1][0], queries)
        answers = [np.repeat(a, np.minimum(copies[a], 10))[:10] for a in answers]
        out[f"HNSW{', distinct' * distinct}, efSearch {effort}"] = {
            **spread,
            "recall": recall(answers, keys, queries, kth),
            "build": build,
            "bytes_a_key": round(memory * 2**20 / everyone),
        }
    return out


def lance(keys, queries, kth, folder) -> dict:
    "An embedded vector store, with the same kind of index and with a compressed one, refined."
    import lancedb
    import pyarrow as pa

    db, out = lancedb.connect(str(folder / "lance")), {}
    schema = pa.schema([("row", pa.int64()), ("vector", pa.list_(pa.float32(), keys.shape[1]))])

    def batches():
        for a in range(0, len(keys), 50_000):
            part = np.ascontiguousarray(keys[a:a + 50_000])
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array(np.arange(a, a + len(part))),
                    pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), keys.shape[1]),
                ],
                schema=schema,
            )

    table, filling = once(lambda: db.create_table("keys", batches(), schema=schema))
    for kind, more, refine in (("IVF_FLAT", {}, None), ("IVF_PQ", {"num_sub_vectors": 48}, 10)):
        _, build = once(
            lambda: table.create_index(
                metric="dot",
                vector_column_name="vector",
                index_type=kind,
                num_partitions=max(1, int(len(keys) ** 0.5)),
                replace=True,
                **more
            )
        )
        for probes in (10, 20, 50, 100):
            def search(q):
                asked = (
                    table.search(q)
                    .distance_type("dot")
                    .nprobes(probes)
                    .limit(10)
                    .select(["row", "_distance"])
                )
                return (
                    (asked.refine_factor(refine) if refine else asked).to_arrow()["row"].to_numpy()
                )

            answers, spread = timed(search, queries[:200])
            full = {
                **spread,
                "recall": recall(answers, keys, queries[:200], kth[:200]),
                "build": build,
                "fill": filling,
                "version": lancedb.__version__,
            }
            out[f"lancedb {kind}, {probes} probes"] = full
            print(kind, probes, full, flush=True)
            if full["recall"] >= 0.99:
                break
    return out


def adding(count: int, folder: Path) -> dict:
    """Adding episodes, beside a bare executemany of ready rows into the same tables, batch by batch
    in turn: as they come, and sorted by id as `add_many` does it. Then the full-text index."""
    import lzma
    from dataclasses import replace

    from exprag.store import COLUMNS, Store, row_of
    from exprag.trajectory import Trajectory
    from exprag.words import put_texts

    lines = lzma.decompress(
        (Path(__file__).parent / "experience.jsonl.xz").read_bytes()
    ).splitlines()
    real = [Trajectory.from_dict(json.loads(line)) for line in lines]
    stores = {
        name: Store(folder / f"{name}.db") for name in ("bare", "bare, sorted", "add_many", "words")
    }
    insert = f"INSERT INTO trajectories({', '.join(COLUMNS)}) VALUES (?{',?' * (len(COLUMNS) - 1)})"
    spent = {name: Counter() for name in stores}

    def bare(store, rows):
        with store.writing() as connection:
            connection.executemany(insert, rows)

    for a in range(0, count, 1000):
        batch = [
            replace(
                t := real[i % len(real)],
                task=replace(t.task, variation=str(i)),
                goal=f"{t.goal} ({i})",
            )
            for i in range(a, min(a + 1000, count))
        ]
        rows = [row_of(replace(t), 1.0) for t in batch]
        for t in batch:
            t.__dict__.pop("id", None)  # nobody has asked for it yet
        work = {
            "bare": lambda: bare(stores["bare"], rows),
            "bare, sorted": lambda: bare(stores["bare, sorted"], sorted(rows, key=lambda r: r[0])),
            "add_many": lambda: stores["add_many"].add_many(batch),
            "words": (
                lambda: put_texts(stores["add_many"], "goal", dict(zip(ids, (t.goal for t in batch)))
                )
            ),
        }
        ids = [r[0] for r in rows]
        for name in sorted(work, key=lambda n: (n == "words", (a // 1000 + len(n)) % 3)):
            spent[name].update(once(work[name])[1])
    size = stores["add_many"].path.stat().st_size
    return {
        "episodes": count,
        "bytes_an_episode": round(sum(len(r[8]) for r in rows) / len(rows)),
        "file_bytes_an_episode": round(size / count),
        "seconds": {
            name: {k: round(v, 1) for k, v in times.items()} for name, times in spent.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("keys", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hnsw", action="store_true")
    parser.add_argument("--lance", action="store_true")
    parser.add_argument("--adding", action="store_true")
    given = parser.parse_args()
    if given.adding:
        with tempfile.TemporaryDirectory() as name:
            old = json.loads(given.out.read_text()) if given.out.exists() else {}
            given.out.write_text(
                json.dumps({**old, "adding": adding(given.keys, Path(name))}, indent=1) + "\n"
            )
        return
    texts, kind = goals()
    base = encoded(texts)
    keys, queries = compose(base, kind, given.keys, np.random.default_rng(1)), compose(
        base, kind, QUERIES, np.random.default_rng(2)
    )
    ids = sorted(
        f"{n:032x}"
        for n in np.random.default_rng(3).choice(1 << 40, given.keys, replace=False).tolist()
    )
    kth = truth(keys, queries)
    print("keys made", flush=True)
    figures = {
        "keys": given.keys,
        "dim": int(keys.shape[1]),
        "goals": len(texts),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "ours": lambda: ours(keys, queries, kth, ids, folder),
            "numpy": lambda: numpy_dot(keys, queries[:100], kth[:100]),
            "sentence_transformers": lambda: sentence_transformers(keys, queries[:100], kth[:100]),
        }
        if given.hnsw:
            runs["hnsw"] = lambda: hnsw(keys, queries[:500], kth[:500])
            runs["hnsw, distinct"] = lambda: hnsw(keys, queries[:500], kth[:500], distinct=True)
        if given.lance:
            runs["lancedb"] = lambda: lance(keys, queries, kth, folder)
        for label, work in runs.items():
            figures.update(work())
            print(label, json.dumps(figures, indent=1)[-1500:], flush=True)
            old = json.loads(given.out.read_text()) if given.out.exists() else {}
            given.out.write_text(json.dumps({**old, str(given.keys): figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
