"""Makes readers.json, which the chapter on what training adds (10b_versions) reads: what five versions of the small model do with the same memory, frozen and trained.

    python nbs/data/readers.py [FOLDER]                              # needs the games, Java and a full clone of this repository; some six hours of a core
    python nbs/data/readers.py FOLDER --versions 0.3 --seed 1        # some versions, dev only; what comes out goes to FOLDER/readers.json

It goes on where it stopped.

The weights of each version come from the git history. All play the same dev tasks, two of each type of the demo's panel, with the same
store, memory and prompt; both adapters learn from the same lessons for as many steps with each. One version, the last before that of
the package, also plays the test panel of the wide demo.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

from exprag.agent import HFPolicy, load_model
from exprag.demo import DEMO_TYPES, PLANS, allowed, condition_of, demo_panel, gather, lessons_of
from exprag.environment import Panel, scienceworld_tasks, spread, step_cap
from exprag.evaluation import ReplayPolicy, evaluate, memory_for
from exprag.lookup import Words, steady
from exprag.nano import lookup_accuracy
from exprag.query import Retriever, SentenceEncoder
from exprag.results import read_episodes
from exprag.samples import RECIPES, make_samples
from exprag.sft import Manifest, train

HERE = Path(__file__).resolve().parent
VERSIONS = {"0.1": "ca0b34c", "0.2": "7b0c153", "0.3": "4ad08e8", "0.5": "1b6f331", "0.6": "f6d78eb"}  # commits with their weights
FILES = ("chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CONDITIONS = {"frozen": "ExpRAG (frozen)", "lora": "LoRA, retrieval at test only", "exprag-lora": "ExpRAG-LoRA"}  # its name in a run: the demo's
TESTED = "0.5"  # chosen before any of its test episodes with this memory was seen; the wide demo plays the version after it
ON_TEST = {**CONDITIONS, "plain": "LoRA"}
EACH = 2  # dev tasks of a type


def weights(version: str, folder: Path) -> Path:
    "The small model of a version, as the history has it."
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if not (folder / name).exists():
            shown = subprocess.run(["git", "show", f"{VERSIONS[version]}:exprag/assets/nano/{name}"], cwd=HERE, capture_output=True)
            if shown.returncode: raise SystemExit(f"version {version} is not in this history; get the whole of it (`git fetch --unshallow`): {shown.stderr.decode().strip()}")
            (folder / f"{name}.part").write_bytes(shown.stdout)
            (folder / f"{name}.part").replace(folder / name)
    return folder


def reading(path: Path, adapter: Path | None, play: list) -> float:
    "The share of generated lines of which every token is predicted right, where a list is done line by line with mistakes on the way."
    model, tokenizer = load_model(str(path), adapter)
    words = Words(tokenizer, play)
    made = [generator for name, _, generator in steady(1).mix if "steady" in name]
    return round(sum(lookup_accuracy(model, lambda chance: make(chance, words, 3072), 16)[1] for make in made) / len(made), 3)


def outcomes(run) -> dict:
    "The score of each task, failures as 0, and how episodes ended."
    episodes = sorted(read_episodes(run.folder / "episodes.jsonl"), key=lambda t: (t.task.type, t.task.variation))
    return {"scores": [[t.task.type, t.task.variation, max(0.0, t.score)] for t in episodes], "solved": sum(bool(t.success) for t in episodes),
            "stops": dict(sorted(Counter(t.provenance["stop"] for t in episodes).items()))}


if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    options = argparse.ArgumentParser()
    options.add_argument("folder", nargs="?", type=Path, default=Path("runs/readers"))
    options.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    options.add_argument("--seed", type=int, default=PLANS["wide"].seed, help="of the adapters")
    asked = options.parse_args()
    folder, plan = asked.folder, replace(PLANS["wide"], seed=asked.seed)
    whole = plan == PLANS["wide"] and asked.versions == list(VERSIONS)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = tuple(t for kind in DEMO_TYPES for t in spread(scienceworld_tasks("dev", [kind]), EACH))
    dev = Panel("hard-dev", tasks, {kind: step_cap(kind) for kind in DEMO_TYPES}, {"simplification": "easy"})
    kept = {"each": EACH, "tasks": len(tasks), "versions": {}}
    with gather(plan, folder) as store:
        retriever = Retriever(store, SentenceEncoder())
        retriever.load(folder / "experience.index")
        lessons, recalled = lessons_of(plan, store, retriever)
        kept["lessons"] = len(lessons)
        play = list(map(store.get, store.find(types=["melt"], folds=["train"])))[:1]

        def played(name, shown, policy, manifests, where, panel=dev):
            chosen = replace(condition_of(plan, shown), name=name)
            return outcomes(evaluate(chosen, panel, where, policy, memory_for(chosen, retriever, None, view=plan.view, adapted=plan.adapted), manifests))

        kept["situated replay"] = played("situated replay", "situated replay", ReplayPolicy(), [], folder / "episodes")
        for version in asked.versions:
            path = weights(version, folder / "weights" / version)
            writer = HFPolicy.from_pretrained(str(path), format=plan.format, batch_size=1).encoder

            def trained(name, memory=None):
                samples = make_samples(lessons, writer, memory)
                recipe = replace(allowed(replace(RECIPES["nano"], max_steps=plan.steps, seed=plan.seed), len(samples)), name=name)
                report = train(str(path), samples, recipe, folder / version / "adapters", threads=1)
                return report.adapter, report.manifest

            read = {"frozen": (None, Manifest.read(path)), "lora": trained("lora"), "exprag-lora": trained("exprag-lora", recalled)}
            policies = {name: HFPolicy.from_pretrained(str(path), adapter, format=plan.format, batch_size=plan.batch_size, max_new_tokens=plan.max_new_tokens, heeds=plan.heeds)
                        for name, (adapter, _) in read.items()}
            kept["versions"][version] = {
                name: {"lines": reading(path, adapter, play), **played(name, CONDITIONS[name], policies[name], [manifest], folder / version / "episodes")}
                for name, (adapter, manifest) in read.items()}
            if whole and version == TESTED:
                kept["test"] = {"version": version, "replay": played("replay", "replay", ReplayPolicy(), [], folder / version / "test", demo_panel(plan))}
                for name, shown in ON_TEST.items():
                    taught = "lora" if name == "plain" else name  # whose weights these are
                    kept["test"][name] = played(name, shown, policies[taught], [read[taught][1]], folder / version / "test", demo_panel(plan))
    (HERE if whole else folder).joinpath("readers.json").write_text(json.dumps(kept, indent=0) + "\n")  # all versions or none
