"""Measures what the chapter on the token budget reads: what can be read within a budget.

    python nbs/data/fit.py   # -> fit.json; half a minute of one core, no simulator

As in ablation.py: experience of the train fold, the four nearest by goal, for every dev task; no
test task takes part. `--tasks 2` measures two tasks only, to try it.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import tempfile
from pathlib import Path

from ablation import HERE, VIEWS, episodes

from exprag.memory.budget import fit_budget
from exprag.prompt import PlainText
from exprag.query import Retriever, SentenceEncoder
from exprag.select import (Memory, composition, exclude_same_task, successes_only, token_budget,
                           top_k)
from exprag.sft import load_tokenizer, model_path
from exprag.statistics import compare
from exprag.store import Store
from exprag.studies.ablation import CachedRetriever, Reader, factorial
from exprag.views import TokenCount

TOKENS = (125, 250, 500, 1000, 2000, 4000)
USUAL, EXTRACT = "actions or nothing", VIEWS["extract"]
PLANS = {  # view, and the stage for so many tokens
    USUAL: ("actions", lambda n, count: token_budget(n, count, "actions")),
    "chat or nothing": ("chat", lambda n, count: token_budget(n, count, "chat")),
    "chat, actions or extract": (
        "chat", lambda n, count: fit_budget(n, count, ("chat", "actions", EXTRACT))),
    "chat or actions": ("chat", lambda n, count: fit_budget(n, count)),
    "chat or actions; extract if none fits": (
        "chat", lambda n, count: fit_budget(n, count, brief=(EXTRACT,))),
}


def measure_all(count: int | None) -> dict:
    """Every plan with every budget on every task."""
    reader = Reader(TokenCount(PlainText(load_tokenizer(model_path("nano"))).encode, "nano"))
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "experience.db") as store:
        store.add_many(episodes("train", "experience.jsonl.xz"))
        retriever = CachedRetriever(Retriever(store, SentenceEncoder()),
                                    lambda task: composition(store, "all", task))

        def measure(episode, plan, tokens):
            view, stage = plan
            stages = exclude_same_task(), successes_only(), top_k(4), stage(tokens, reader.count)
            chosen = Memory(retriever, stages, view=view).recall(episode.opening())
            return reader.read(episode, chosen.experiences, view)

        tasks = episodes("dev", "selection_dev.jsonl.xz")[:count]
        made = factorial({"plan": PLANS, "tokens": {str(n): n for n in TOKENS}}, tasks, measure)

    def of(plan, measure): return [made.outcomes(measure, plan=plan, tokens=str(n)) for n in TOKENS]
    def against(plan):
        found = [compare(a, b, (plan, USUAL)) for a, b in zip(of(plan, "best"), of(USUAL, "best"))]
        return [[*(round(x, 3) for x in (c.gap.estimate, c.gap.low, c.gap.high)), c.better, c.equal,
                 c.worse] for c in found]
    means = {plan: {m: [round(x.mean, 3) for x in of(plan, m)] for m in made.values}
             for plan in PLANS}
    return {"tokens": TOKENS, "tasks": len(made.tasks), "types": len({t.type for t in made.tasks}),
            "usual": USUAL, "means": means,
            "against the usual": {plan: against(plan) for plan in PLANS if plan != USUAL}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, help="measure only the first so many")
    parser.add_argument("--out", type=Path, default=HERE / "fit.json")
    options = parser.parse_args()
    options.out.write_text(json.dumps(measure_all(options.tasks), indent=0) + "\n")
