"""Wrote store-v2.sqlite and store-v2.json, with the code of commit ea44689 (schema 2, before the package was split into parts).

Not to be run again: that the file was written by that code is the point of it.
"""
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from exprag.care import credit, usage
from exprag.query import Retriever, SentenceEncoder, embed_missing
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory, canonical_json, read_jsonl


def sha(data: bytes) -> str: return hashlib.sha256(data).hexdigest()


here = Path(__file__).parent
sample = {str(t.task): t for t in read_jsonl(here.parents[1] / "nbs" / "data" / "sample.jsonl")[0]}
bulb, other, plant = (sample[f"scienceworld/{name}@train"] for name in ("power-component/0", "power-component/2", "find-plant/0"))
bulb, other, plant = (replace(t, steps=t.steps[:3]) for t in (bulb, other, plant))
failed = replace(plant, steps=plant.steps[:2], success=False, score=-100.0, provenance={"actor": "nano", "author": "ann"})
thinking = Trajectory(
    Task("shop", "count-orders", 3, "dev"), "Count the orders of Ann é 漢.", "A prompt.\ud800",
    (Step("query SELECT 1", "1", 0.5, thought="One will do.",
          tool_calls=[{"id": "call_1", "type": "function", "function": {"name": "query", "arguments": "{\"sql\": \"SELECT 1\"}"}}],
          extra={"seconds": 0.25}),), settings={"rows": 7}, provenance={"actor": {"name": "m", "n": 1}}, extra={"id": "x", "tags": ["a", {"b": None}]})
house = Trajectory(
    Task("alfworld", "pick_and_place_simple", "trial_T2019", "train"), "put a mug in desk.", "You are in the middle of a room.",
    (Step("go to desk 1", "On the desk 1, you see nothing."), Step("put mug 1 in/on desk 1", "You put the mug 1 in/on the desk 1.")),
    1.0, True, "0.4.2", {"grammar": "put"}, {"actor": "expert", "adapted_from": "0" * 32, "at_step": 1})

encoder = SentenceEncoder()
with Store(here / "store-v2.sqlite") as store:
    store.add_many([bulb, other], namespace="team")
    store.add_many([plant, failed, thinking, house])
    store.add_many([plant], namespace="mine")
    ids = store.find()
    embed_missing(store, encoder, "goal", [bulb.id, plant.id])
    store.put_vectors("letters@1", "start", {id: np.arange(4, dtype=np.float32) + n for n, id in enumerate(ids[:4])})
    store.put_texts("goal", {id: store.get(id).goal for id in ids if store.get(id).task.world != "shop"})
    credit(store, [bulb.id, other.id], 0.0, now=1e9)
    credit(store, [bulb.id], 0.5, now=2e9)
    query = replace(bulb, goal="Your task is to turn on the electric buzzer.", steps=(), score=None, success=None)
    wanted = {
        "ids": ids, "records": {id: sha(canonical_json(store.get(id).to_dict())) for id in ids}, "fingerprint": store.fingerprint(),
        "encoder": encoder.name, "census": [[*k, n] for k, n in store.census().items()], "namespaces": store.namespaces(),
        "find": [[filters, store.find(**filters)] for filters in (
            {"world": "scienceworld"}, {"types": ["power-component"]}, {"folds": ["dev"]}, {"success": False}, {"success": True},
            {"namespace": "team"}, {"authors": ["ann"]}, {"authors": ["expert"]}, {"authors": ['{"n":1,"name":"m"}', '{"name":"m","n":1}']})],
        "vectors": [[name, key, store.vector_ids(name, key), sha(store.get_vectors(name, key)[1].tobytes())]
                    for name, key in ((encoder.name, "goal"), ("letters@1", "start"))],
        "match": [[text, store.match("goal", text)] for text in ("red light bulb", "plant", "mug!", "nothing of it")],
        "usage": {id: [u.uses, u.gain, u.last] for id, u in usage(store).items()},
        "hits": [[h.id, h.score, h.rank] for h in Retriever(store, encoder).index([bulb.id, plant.id]).search(query, 4)]}
(here / "store-v2.json").write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
