"""Makes what the chapter on choices (08f_study) reads: ALFWorld's episodes, and every combination of choices on every dev task.

    python nbs/data/study.py collect   # -> study_alfworld.jsonl.xz; needs the games (ALFWORLD_DATA); minutes
    python nbs/data/study.py measure   # -> study.json.xz; needs neither games nor Java; about five minutes of one idle core

Experience is of the train fold, tasks are of the dev fold. ScienceWorld's come from files that the book has already:
experience.jsonl.xz (137 episodes of 28 types) and selection_dev.jsonl.xz (56 episodes). No test task takes part.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import lzma
import tempfile
from collections import defaultdict
from pathlib import Path

from exprag.environment import ALFWORLD, ALFWORLD_EASY, ALFWORLD_HARD, TOPICS, listed_tasks, side, spread
from exprag.hybrid import FusedRetriever, WordRetriever
from exprag.novelty import Yardstick, novelties
from exprag.prompt import PlainText
from exprag.query import Retriever, SentenceEncoder
from exprag.select import Memory, composition, exclude_same_task, successes_only, token_budget, top_k
from exprag.selection import cap_per_type, calibrate, fit, judge, mmr, near_enough, procedure_likeness
from exprag.situations import Every, Moved, Once, PlaceRetriever
from exprag.store import VIEWS, Store
from exprag.study import Asked, Reader, Study, beginning, factorial, followed, found, read_packed, write_studies
from exprag.trajectory import Trajectory
from exprag.views import TokenCount, pointed

HERE = Path(__file__).resolve().parent
TRAIN, DEV = 10, 5  # games of each of ALFWorld's types
WALKED = 10  # of ScienceWorld's types, and all of ALFWorld's: a text is encoded for every step of every episode
VIEWS_TRIED = ("chat", "numbered", "actions", "decisive", "extract", "window")


def some(episodes: list[Trajectory], count: int) -> list[Trajectory]:
    """Evenly spread episodes of each type."""
    by_type = defaultdict(list)
    for episode in sorted(episodes, key=lambda e: e.task): by_type[episode.task.type].append(episode)
    return [e for kind in sorted(by_type) for e in spread(by_type[kind], count)]


def collect_games() -> None:
    """ALFWorld's searching expert on some games of every type."""
    from exprag.collecting import collect
    tasks = [t for fold, count in (("train", TRAIN), ("dev", DEV)) for kind in ALFWORLD_EASY + ALFWORLD_HARD
             for t in spread([t for t in listed_tasks(ALFWORLD)[fold] if t.type == kind], count)]
    episodes = []
    print(collect(tasks, episodes.append))
    keep(episodes)


def keep(episodes: list[Trajectory]) -> None:
    """Write episodes, packed."""
    with lzma.open(HERE / "study_alfworld.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
        for episode in sorted(episodes, key=lambda e: (e.task.fold, e.task)): file.write(json.dumps(episode.to_dict(), ensure_ascii=False) + "\n")


def retrievers(store: Store, encoder, key: str, index, **how) -> dict[str, Asked]:
    """Vectors, words and both, over whole episodes."""
    dense, words = Retriever(store, encoder, key, key), WordRetriever(store, key, key)
    return {"MiniLM": Asked(dense, index, **how), "BM25": Asked(words, index, **how), "fused": Asked(FusedRetriever([dense, words]), index, **how)}


def finding(store, encoder, tasks) -> Study:
    """Text x encoder x K: how good is the ranking?"""
    made = {text: retrievers(store, encoder, text, lambda task: composition(store, "all", task)) for text in ("goal", "start", "so_far")}
    def measure(episode, text, encoder, K): return found(episode, made[text][encoder], K)
    return factorial({"text": {"goal": "goal", "start": "start", "whole": "so_far"}, "encoder": {n: n for n in ("MiniLM", "BM25", "fused")}, "K": {str(k): k for k in (2, 1, 4, 8)}}, tasks, measure)


def reading(store, encoder, tasks, reader) -> Study:
    """View x text x encoder x rule x K: what can be read, and what does it cost?"""
    made = {text: retrievers(store, encoder, text, lambda task: composition(store, "all", task), relative=True) for text in ("goal", "start")}
    rules = {"nearest": lambda k: (top_k(k),), "MMR": lambda k: (mmr(k, procedure_likeness),), "one of a type": lambda k: (cap_per_type(1), top_k(k))}
    known = {}
    def measure(episode, view, text, encoder, rule, K):
        key = episode.task, text, encoder, rule, K
        if key not in known: known[key] = Memory(made[text][encoder], (exclude_same_task(), successes_only(), *rules[rule](K))).recall(beginning(episode)).experiences
        return reader.read(episode, known[key], view)
    names = lambda *levels: {n: n for n in levels}
    return factorial({"view": names("actions", "chat", "decisive", "extract"), "text": names("goal", "start"), "encoder": names("MiniLM", "BM25", "fused"),
                      "rule": names("nearest", "MMR", "one of a type"), "K": {str(k): k for k in (2, 1, 4, 8)}}, tasks, measure)


def bare(store, encoder, tasks, reader) -> Study:
    """View x K once more, for the usual question: with moves, and without them."""
    asked = Asked(Retriever(store, encoder), lambda task: composition(store, "all", task))
    def measure(episode, view, K): return reader.read(episode, [asked.fetch(hit) for hit in asked.search(beginning(episode), K)], view)
    return factorial({"view": {n: n for n in ("actions", "decisive", "extract")}, "K": {str(k): k for k in (2, 1, 4, 8)}}, tasks, measure)


def budget(store, encoder, tasks, reader) -> Study:
    """Tokens x what happens when they run out."""
    asked = Asked(Retriever(store, encoder), lambda task: composition(store, "all", task))
    plans = {"drop whole chats": ("chat", ("chat",)), "chats, shorter if need be": ("as_chosen", ("chat", "actions", "decisive", "extract")),
             "drop actions": ("actions", ("actions",)), "actions, shorter if need be": ("as_chosen", ("actions", "decisive", "extract")), "decisive only": ("decisive", ("decisive",))}
    def measure(episode, plan, tokens):
        view, views = plan
        stage = fit(tokens, reader.count, views, k=4) if view == "as_chosen" else token_budget(tokens, reader.count, view)
        chosen = Memory(asked, (exclude_same_task(), successes_only(), top_k(4), stage), view=view).recall(beginning(episode))
        return reader.read(episode, chosen.experiences, view)
    return factorial({"plan": plans, "tokens": {str(n): n for n in (1000, 250, 500, 2000, 4000)}}, tasks, measure)


def abstaining(store, encoder, tasks, train) -> tuple[Study, dict]:
    """Composition x abstention: is silence kept where nothing is near? The threshold is chosen on train tasks."""
    retriever = Retriever(store, encoder)
    reader = Reader(len)
    def gain(experience, episode): return reader.read(episode, [experience], "actions")["best"] - 0.5
    judged = [j for index in ("matched", "mismatched") for j in judge(Memory(retriever, (exclude_same_task(), successes_only(), top_k(1)), composition=index), train, gain)]
    threshold = calibrate(judged)
    stages = {"always": (), "when near": (near_enough(threshold),)}
    def measure(episode, index, show):
        chosen = Memory(retriever, (exclude_same_task(), successes_only(), *stages[show], top_k(1)), composition=index).recall(beginning(episode))
        best = reader.read(episode, chosen.experiences, "actions")["best"]
        return {"shown": len(chosen), "net": best - 0.5 if len(chosen) else 0.0}
    return factorial({"index": {n: n for n in ("matched", "all", "mismatched")}, "show": {n: n for n in stages}}, tasks, measure), threshold.describe()


def standing(store, encoder, tasks, index) -> dict[str, Study]:
    """When x text x (granularity, encoder): is what is before the agent what it needs next?"""
    rules = {"once": Once(), "every 5": Every(5), "moved": Moved(), "every step": Every(1)}
    texts = {"recent": "recent", "actions so far": "history", "whole so far": "so_far"}
    short = {name: key for name, key in texts.items() if key != "so_far"}  # of every place of every episode, the whole is too long to be worth it
    grains = {(text, grain): Asked(PlaceRetriever(store, encoder, text, text, grain), index) for text in short.values() for grain in ("window", "step")}
    for asked in grains.values(): asked.retriever.index(set().union(*(index(t.task) for t in tasks)))
    whole = {text: retrievers(store, encoder, text, index) for text in texts.values()}
    grains |= {(text, "episode"): whole[text]["MiniLM"] for text in short.values()}
    goal = Asked(Retriever(store, encoder), index)
    return {"grain": factorial({"when": rules, "text": short, "grain": {g: g for g in ("episode", "window", "step")}}, tasks, lambda e, when, text, grain: followed(e, grains[text, grain], when)),
            "words": factorial({"when": rules, "text": texts, "encoder": {n: n for n in ("MiniLM", "BM25", "fused")}}, tasks, lambda e, when, text, encoder: followed(e, whole[text][encoder], when)),
            "goal": factorial({"when": {"once": Once()}}, tasks, lambda e, when: followed(e, goal, when))}


def strata(encoder, train, dev) -> dict[str, str]:
    """How new each dev task is to experience of easy types, as in the chapter on novelty."""
    made = {}
    for world, topics in (("scienceworld", {kind: topic for topic, kinds in TOPICS.items() for kind in kinds}), (ALFWORLD, {kind: kind for kind in ALFWORLD_EASY + ALFWORLD_HARD})):
        easy, tasks = [t for t in train if t.task.world == world and side(t.task.type) == "easy"], [t for t in dev if t.task.world == world]
        yardstick = Yardstick.fit(easy, topics, encoder)
        made |= {str(n.task): yardstick.stratum(n) for n in novelties(tasks, easy, yardstick, encoder)}
    return made


def measure_all(parts: list[str]) -> None:
    """All studies, in one file."""
    from exprag.agent import load_model
    encoder, games = SentenceEncoder(), read_packed(HERE / "study_alfworld.jsonl.xz")
    train, dev = ([*read_packed(HERE / name), *(g for g in games if g.task.fold == fold)] for name, fold in (("experience.jsonl.xz", "train"), ("selection_dev.jsonl.xz", "dev")))
    train, dev = [t for t in train if t.success], [t for t in dev if t.success]
    reader = Reader(TokenCount(PlainText(load_model("nano")[1]).encode, "nano"))
    out = HERE / "study.json.xz"
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "bank.db")
        store.add_many(train)
        for part in parts:
            made, notes = {}, {}
            if part == "storage":
                middle = {v: (lambda e, v=v: reader.kept(pointed(e, len(e) // 2) if v == "window" else e, v)) for v in VIEWS_TRIED}
                made = {"storage": factorial({"view": middle}, train, lambda e, view: view(e))}
            if part == "novelty": notes["strata"] = strata(encoder, train, dev)
            if part == "finding": made = {"finding": finding(store, encoder, dev)}
            if part == "reading": made = {"reading": reading(store, encoder, dev, reader)}
            if part == "bare": made = {"bare": bare(store, encoder, dev, reader)}
            if part == "budget": made = {"budget": budget(store, encoder, dev, reader)}
            if part == "abstaining":
                made["abstaining"], notes["threshold"] = abstaining(store, encoder, dev, train)
            if part == "standing":
                walked = {*spread(sorted({t.task.type for t in dev if t.task.world != ALFWORLD}), WALKED), *ALFWORLD_EASY, *ALFWORLD_HARD}
                small = Store(Path(folder) / "small.db")
                small.add_many(some([t for t in train if t.task.type in walked], 2))
                tasks = some([t for t in dev if t.task.type in walked], 1)
                made = standing(small, encoder, tasks, lambda task: composition(small, "all", task))
            write_studies(out, made, notes)
            print(part, {k: repr(v) for k, v in made.items()}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "measure"))
    parser.add_argument("--only", nargs="+", default=["storage", "novelty", "finding", "reading", "bare", "budget", "abstaining", "standing"], help="parts to measure anew; the others stay as they are")
    options = parser.parse_args()
    collect_games() if options.what == "collect" else measure_all(options.only)
