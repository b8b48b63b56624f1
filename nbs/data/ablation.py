"""Measures what the chapter on ablation reads: every combination of choices on every dev task.

    python nbs/data/ablation.py collect   # -> ablation_alfworld.jsonl.xz; needs ALFWORLD_DATA
    python nbs/data/ablation.py measure   # -> ablation.json.xz; minutes of one core, no simulator

Experience is of the train fold, tasks are of the dev fold. ScienceWorld's come from files that
the book has already: experience.jsonl.xz (137 episodes of 28 types) and selection_dev.jsonl.xz
(56 episodes). No test task takes part. `--tasks 2` measures two tasks only, to try it.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import lzma
import tempfile
from dataclasses import replace
from pathlib import Path

from exprag.memory.diversity import cap_per_type, mmr
from exprag.memory.hybrid import FusedRetriever, WordRetriever
from exprag.prompt import PlainText
from exprag.query import Retriever, SentenceEncoder
from exprag.select import Memory, composition, exclude_same_task, successes_only, top_k
from exprag.sft import load_tokenizer, model_path
from exprag.store import Store
from exprag.studies.ablation import (Ablation, CachedRetriever, Reader, factorial,
                                     write_ablations)
from exprag.trajectory import Trajectory
from exprag.views import Cursor, Experience, TokenCount
from exprag.world import load_world, spread

HERE = Path(__file__).resolve().parent
GAMES = {"train": 10, "dev": 5}  # of each of ALFWorld's types
EXCERPTS = "exprag.memory.excerpts:"
VIEWS = {"chat": "chat", "numbered": "numbered", "actions": "actions",
         **{name: EXCERPTS + name for name in ("decisive", "extract", "window")}}
K = {str(k): k for k in (2, 1, 4, 8)}


def read_episodes(name: str) -> list[Trajectory]:
    """The episodes of a packed file of the book."""
    with lzma.open(HERE / name, "rt", encoding="utf-8") as lines:
        return [Trajectory.from_dict(json.loads(line)) for line in lines]


def episodes(fold: str, name: str) -> list[Trajectory]:
    """The successes of one fold, of both worlds."""
    some = [*read_episodes(name), *read_episodes("ablation_alfworld.jsonl.xz")]
    return [e for e in some if e.task.fold == fold and e.success]


def collect_games() -> None:
    """ALFWorld's searching expert on some games of every type."""
    from exprag.worlds.collecting import collect

    world = load_world("alfworld")
    tasks = [t for fold, count in GAMES.items() for kind in world.easy + world.hard
             for t in spread([t for t in world.tasks(fold) if t.type == kind], count)]
    made = []
    print(collect(tasks, made.append))
    with lzma.open(HERE / "ablation_alfworld.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
        for episode in sorted(made, key=lambda e: (e.task.fold, e.task)):
            file.write(json.dumps(episode.to_dict(), ensure_ascii=False) + "\n")


def storage(reader: Reader, experience: list[Trajectory]) -> Ablation:
    """View: what does it cost, and what does it keep of an episode?"""
    def measure(episode, view):
        shown = Experience(episode)
        if view.endswith(":window"): shown = replace(shown, cursor=Cursor(done=len(episode) // 2))
        return reader.kept(shown, view)
    return factorial({"view": VIEWS}, experience, measure)


def retrievers(store: Store, encoder, key: str) -> dict[str, CachedRetriever]:
    """Vectors, words and both, over whole episodes."""
    def index(task): return composition(store, "all", task)
    dense, words = Retriever(store, encoder, key, key), WordRetriever(store, key, key)
    found = {"MiniLM": dense, "BM25": words, "fused": FusedRetriever([dense, words])}
    return {name: CachedRetriever(r, index, relative=True) for name, r in found.items()}


def reading(reader: Reader, store: Store, encoder, tasks: list[Trajectory]) -> Ablation:
    """View x text x encoder x rule x K: what can be read, and what does it cost?"""
    made = {text: retrievers(store, encoder, text) for text in ("goal", "start")}
    rules = {"nearest": lambda k: (top_k(k),), "MMR": lambda k: (mmr(k),),
             "one of a type": lambda k: (cap_per_type(1), top_k(k))}
    selected = {}

    def measure(episode, view, text, encoder, rule, K):
        key = episode.task, text, encoder, rule, K
        if key not in selected:
            stages = exclude_same_task(), successes_only(), *rules[rule](K)
            selected[key] = Memory(made[text][encoder], stages).recall(episode.opening())
        return reader.read(episode, selected[key].experiences, view)

    def names(*levels): return {name: name for name in levels}
    shown = {name: VIEWS[name] for name in ("actions", "chat", "decisive", "extract")}
    return factorial({"view": shown, "text": names("goal", "start"),
                      "encoder": names("MiniLM", "BM25", "fused"), "rule": names(*rules), "K": K},
                     tasks, measure)


def measure_all(count: int | None, out: Path) -> None:
    """Both ablations, in one file."""
    experience = episodes("train", "experience.jsonl.xz")
    tasks = episodes("dev", "selection_dev.jsonl.xz")[:count]
    encode = PlainText(load_tokenizer(model_path("nano"))).encode
    reader = Reader(TokenCount(encode, "nano"))
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "experience.db") as store:
        store.add_many(experience)
        made = {"storage": storage(reader, experience[:count]),
                "reading": reading(reader, store, SentenceEncoder(), tasks)}
    write_ablations(out, made)
    print(made)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "measure"))
    parser.add_argument("--tasks", type=int, help="measure only the first so many")
    parser.add_argument("--out", type=Path, default=HERE / "ablation.json.xz")
    options = parser.parse_args()
    collect_games() if options.what == "collect" else measure_all(options.tasks, options.out)
