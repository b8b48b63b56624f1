"""Makes fit.json, which the chapter on selection (04b_selection) reads: what an agent can read within a budget of tokens.

    python nbs/data/fit.py   # needs neither games nor Java; half a minute of one idle core

As in study.py: experience of the train fold, the four nearest by goal, asked for every dev task; no test task takes part.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import tempfile
from pathlib import Path

from exprag.agent import load_model
from exprag.prompt import PlainText
from exprag.query import Retriever, SentenceEncoder
from exprag.select import Memory, composition, exclude_same_task, successes_only, token_budget, top_k
from exprag.selection import fit
from exprag.statistics import compare
from exprag.store import Store
from exprag.study import Asked, Reader, beginning, factorial, read_packed
from exprag.views import TokenCount

HERE = Path(__file__).resolve().parent
TOKENS = (125, 250, 500, 1000, 2000, 4000)
USUAL = "actions or nothing"
PLANS = {  # view that is shown, and the stage for so many tokens
    USUAL: ("actions", lambda n, count: token_budget(n, count, "actions")),
    "chat or nothing": ("chat", lambda n, count: token_budget(n, count, "chat")),
    "chat, actions or extract": ("as_chosen", lambda n, count: fit(n, count, ("chat", "actions", "extract"))),
    "chat or actions": ("as_chosen", lambda n, count: fit(n, count)),
    "chat or actions; extract if none fits": ("as_chosen", lambda n, count: fit(n, count, brief=("extract",))),
}


def episodes(fold: str, name: str) -> list:
    """Successes of one fold: ScienceWorld's and ALFWorld's."""
    return [e for e in (*read_packed(HERE / name), *read_packed(HERE / "study_alfworld.jsonl.xz")) if e.task.fold == fold and e.success]


if __name__ == "__main__":
    reader = Reader(TokenCount(PlainText(load_model("nano")[1]).encode, "nano"))
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "bank.db") as store:
        store.add_many(episodes("train", "experience.jsonl.xz"))
        asked = Asked(Retriever(store, SentenceEncoder()), lambda task: composition(store, "all", task))
        def measure(episode, plan, tokens):
            view, stage = plan
            chosen = Memory(asked, (exclude_same_task(), successes_only(), top_k(4), stage(tokens, reader.count)), view=view).recall(beginning(episode))
            return reader.read(episode, chosen.experiences, view)
        study = factorial({"plan": PLANS, "tokens": {str(n): n for n in TOKENS}}, episodes("dev", "selection_dev.jsonl.xz"), measure)
    means = {plan: {m: [round(study.outcomes(m, plan=plan, tokens=str(n)).mean, 3) for n in TOKENS] for m in study.values} for plan in PLANS}
    gaps = {plan: [compare(study.outcomes("best", plan=plan, tokens=str(n)), study.outcomes("best", plan=USUAL, tokens=str(n)), (plan, USUAL)) for n in TOKENS] for plan in PLANS if plan != USUAL}
    against = {plan: [[round(x, 3) for x in (c.gap.estimate, c.gap.low, c.gap.high)] + [c.better, c.equal, c.worse] for c in row] for plan, row in gaps.items()}
    (HERE / "fit.json").write_text(json.dumps({"tokens": TOKENS, "tasks": len(study.tasks), "types": len({t.type for t in study.tasks}), "usual": USUAL, "means": means, "against the usual": against}, indent=0) + "\n")
