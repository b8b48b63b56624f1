"""Collecting while somebody kills: workers, simulators, the collector itself, and processes that are only stopped (they hang).

    python tests/killing.py harass SECONDS OUT.json     harass for so long, check what is left, write down what came of it

Run as `collect` it is the collector that is harassed.
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from itertools import zip_longest
from pathlib import Path

from worlds import MARK, gone, marked, status

KINDS = ("worker", "world", "hang", "collector")
CHANCES = (0.35, 0.35, 0.2, 0.1)
QUICK_TYPES = ("find-plant", "find-animal", "find-living-thing", "find-non-living-thing", "lifespan-longest-lived", "lifespan-shortest-lived", "power-component")


def tasks_of(worlds: list[str], count: int) -> list:
    "Quick train tasks of some worlds, `count` of each as far as there are so many, world by world in turn."
    from exprag.worlds.scienceworld import scienceworld_tasks
    pools = []
    for world in worlds:
        if world == "scienceworld":
            pools.append(scienceworld_tasks("train", QUICK_TYPES)[:count])
        else:
            from exprag.worlds.textworld_express import GAMES, express_tasks
            games = [express_tasks(game, "train") for game in GAMES]
            pools.append([t for row in zip(*games) for t in row][:count])
    return [t for row in zip_longest(*pools) for t in row if t is not None]


def collect_into(store_path: str, log_path: str, plan: dict) -> None:
    "The collector: an episode is acknowledged, with a line on disk, after the store has it."
    from exprag.worlds.collecting import CollectOptions, collect
    from exprag.store import Store
    from exprag.trajectory import Task
    store, log = Store(store_path), open(log_path, "a")

    def keep(trajectory):
        store.add(trajectory)
        log.write(f"{trajectory.task} {trajectory.id}\n")
        log.flush()
        os.fsync(log.fileno())

    collect([Task.parse(t) for t in plan["tasks"]], keep, CollectOptions(
        workers=plan["workers"], progress=False, done=store.has_task, timeout=plan["timeout"], attempts=1000, failures=True))


def victims(mark: str, collector: int) -> dict[str, list[int]]:
    "Process ids by what they are."
    there = {pid: command for pid, command in marked(mark).items() if pid != os.getpid()}
    java = [pid for pid, command in there.items() if "java" in command.split(" ")[0]]
    workers = [pid for pid in there if pid not in java and pid != collector]
    return {"worker": workers, "world": java, "hang": [pid for pid in workers + java if serves(pid, collector)], "collector": [collector]}


def serves(pid: int, collector: int) -> bool:
    "Whether a process belongs to a worker of this collector: what is already dying, orphaned, is not stopped as well."
    try: leader = status(os.getpgid(pid))
    except ProcessLookupError: return False
    return leader is not None and leader[2] == collector


def kill_one(mark: str, collector: int, chance: random.Random) -> str | None:
    "Kill or stop one process; gives back what it was."
    kind = chance.choices(KINDS, CHANCES)[0]
    if not (there := victims(mark, collector)[kind]): return None
    try: os.kill(chance.choice(sorted(there)), signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
    except ProcessLookupError: return None
    return kind


def pace(worlds: list[str]) -> float:
    "Seconds that the slowest of some worlds takes for a first episode, its start included, on this machine as busy as it is now."
    from exprag.worlds.collecting import CollectOptions, collect
    def one(task):
        began = time.monotonic()
        assert collect([task], lambda t: None, CollectOptions(progress=False, failures=True)).kept == 1
        return time.monotonic() - began
    return max(map(one, tasks_of(worlds, 1)))


def harass(folder: Path, seconds: float, worlds: list[str], count: int, workers: int = 2, timeout: float = 8.0, pause: float = 1.0, seed: int = 0, faults: int = 3, patience: float = 600.0) -> dict:
    """Collect for a while with processes killed at random; then let it finish or, if there is too much left, kill it all.

    The while is `seconds`, and as much longer (`patience` at most) as a busy machine needs for so many `faults` and an episode after the first of them.
    """
    mark, chance = uuid.uuid4().hex, random.Random(seed)
    store, log = folder / "kept.db", folder / "acknowledged.txt"
    plan = {"tasks": [str(t) for t in tasks_of(worlds, count)], "workers": workers, "timeout": timeout}
    (folder / "plan.json").write_text(json.dumps(plan))
    log.touch()
    command = [sys.executable, __file__, "collect", str(store), str(log), str(folder / "plan.json")]
    start = lambda: subprocess.Popen(command, env={**os.environ, MARK: mark}, stderr=open(folder / "said.txt", "ab"))
    acknowledged = lambda: log.read_text().count("\n")
    began, events, timeline, collector = time.monotonic(), [], [], start()
    short = lambda: len(events) < faults or acknowledged() <= events[0][2]
    while ((now := time.monotonic() - began) < seconds or (now < seconds + patience and short())) and collector.returncode != 0:
        time.sleep(min(chance.expovariate(1 / pause), 3 * pause))
        patient = len(events) < 3 or timeline[-1][1] > events[-3][2]  # three faults without an episode between them are enough
        if patient and collector.poll() is None and (kind := kill_one(mark, collector.pid, chance)):
            events.append([round(time.monotonic() - began, 2), kind, acknowledged()])
        if collector.poll() not in (None, 0): collector = start()  # it goes on from the store
        timeline.append([round(time.monotonic() - began, 2), acknowledged()])
    finished = collector.returncode == 0
    if not finished:
        try: finished = collector.wait(timeout=30 if seconds < 60 else 0.1) == 0  # undisturbed now
        except subprocess.TimeoutExpired: collector.kill()
        collector.wait()
    return {"seconds": round(now), "workers": workers, "kills": dict(sorted(Counter(kind for _, kind, _ in events).items())), "finished": finished,
            "tasks": len(plan["tasks"]), "left": not gone(mark, 60), "events": events, "timeline": timeline, **checked(store, log)}


def checked(store_path: Path, log_path: Path) -> dict:
    "What the store holds against what was acknowledged."
    from exprag.store import Store
    with Store(store_path) as store:
        tasks = [t.task for t in store]
        said = [line.split(" ")[-1] for line in log_path.read_text().splitlines()]
        return {"kept": len(store), "acknowledged": len(said), "lost": sum(id not in store for id in said),
                "twice": len(tasks) - len(set(tasks)) + len(said) - len(set(said))}


def player_of(worlds: list[str]):
    "A player of some worlds, with their experts."
    from exprag.world import load_world
    from exprag.worlds.collecting import Player
    return Player({w.name: (w.environment, w.expert) for w in map(load_world, worlds)})


def compared(store_path: Path, count: int | None = None) -> dict:
    "Episodes of the store against the same episodes played undisturbed, here, one after the other."
    from exprag.store import Store
    from exprag.world import spread
    player = player_of(["scienceworld", "textworld-express"])
    with Store(store_path) as store: kept = sorted(store, key=lambda t: t.task)
    sample = kept if count is None else spread(kept, count)
    different = [str(t.task) for t in sample if player.play(t.task).id != t.id]
    player.close()
    return {"compared": len(sample), "different": different}


def main(mode: str, *given: str) -> None:
    if mode == "collect": return collect_into(given[0], given[1], json.loads(Path(given[2]).read_text()))
    seconds, out = float(given[0]), Path(given[1])
    worlds = given[2].split(",") if len(given) > 2 else ["scienceworld", "textworld-express"]
    with tempfile.TemporaryDirectory() as folder:
        result = harass(Path(folder), seconds, worlds, count=4000, timeout=30, pause=4)
        result |= compared(Path(folder) / "kept.db", 100)
    out.write_text(json.dumps(result) + "\n")
    print({k: v for k, v in result.items() if k not in ("events", "timeline")})


if __name__ == "__main__": main(*sys.argv[1:])
