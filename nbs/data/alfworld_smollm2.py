"""Packs the result of `exprag reproduce small-alfworld` for the chapter that shows it.

    python nbs/data/alfworld_smollm2.py RUNS/small-alfworld

Writes alfworld_smollm2.tar.xz beside this file: the plan, every episode of every condition, and of the adapters what they
cost and their losses, without the weights; and alfworld_smollm2_cases.jsonl.xz: the episodes with the experience that was
shown in them.
"""
import json
import sys
import tarfile
from pathlib import Path

from exprag.plans import from_table, Plan, variants
from exprag.reproduce import Place, _memory, _retrievers, store_path
from exprag.results import Results, Run
from exprag.store import Store
from exprag.studies.failures import cases, write_cases

HERE = Path(__file__).parent
KEPT = ("losses.jsonl", "report.json", "config.json", "manifest.json", "runtime.json", "data.jsonl")


def main(folder: Path) -> None:
    report = max(folder.glob("report-*"), key=lambda p: p.stat().st_mtime)
    listed = json.loads((report / "runs.json").read_text())
    def plain(info):  # the same bytes wherever and whenever it is packed
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info
    with tarfile.open(HERE / "alfworld_smollm2.tar.xz", "w:xz") as packed:
        for name in ("plan.json", "runs.json"): packed.add(report / name, name, filter=plain)
        for run in sorted(listed["runs"]):
            for path in sorted((folder / run).iterdir()): packed.add(path, f"{run}/{path.name}", filter=plain)
        for path in listed["adapters"].values():
            for name in KEPT: packed.add(folder / path / name, f"{path}/{name}", filter=plain)
    plan = from_table(Plan, json.loads((report / "plan.json").read_text()), "")
    runs = [Run.read(folder / name) for name in listed["runs"]]
    place = Place(folder)
    with Store(store_path(plan, place)) as store:
        find = _retrievers(plan, store)
        memories = {v.condition.name: _memory(plan, v, find(v.condition.when)) for v in variants(plan)
                    if v.condition.memory == "retrieved"}
        write_cases(HERE / "alfworld_smollm2_cases.jsonl.xz", cases(Results(tuple(runs)), memories))


if __name__ == "__main__": main(Path(sys.argv[1]))
