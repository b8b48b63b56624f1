"""What a cluster costs and gives, for nbs/models/13_ray.ipynb: python nbs/data/cluster.py, with a cluster at RAY_ADDRESS or none.

Paired: the same work in this process and in an actor, in turn, so that both see the same machine.
"""
import json
import time
from functools import partial
from pathlib import Path

from exprag.agent import rollout
from exprag.models.local import HFPolicy
from exprag.models.ray_engine import RayPolicy, RayWorker, Remote, connect, ray_rollout
from exprag.worlds.collecting import CollectOptions, Player, collect, packed
from exprag.worlds.shop import ShopEnv, shop_expert, shop_tasks


def slow_expert(env, task, seconds: float):
    "The shop's expert, who takes a while: an episode's length of a slower world."
    time.sleep(seconds)
    return shop_expert(env, task)


def clocked(call, *arguments) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def one_worker(seconds: float, episodes: int) -> dict:
    "A task in this process, the same in an actor, and so on."
    player = Player({"shop": (ShopEnv, partial(slow_expert, seconds=seconds))})
    worker, tasks = RayWorker(packed(player)), shop_tasks("train")[:episodes]
    worker.ask(tasks[0], 900), player.play(tasks[0])
    spent = {"plain": 0.0, "ray": 0.0}
    for task in tasks:
        spent["plain"] += clocked(player.play, task)
        spent["ray"] += clocked(worker.ask, task, 900)
    worker.kill(closed=True)
    return {"episodes": episodes, "seconds": seconds, **{k: round(v, 3) for k, v in spent.items()}}


def several_workers(seconds: float, episodes: int, rounds: int = 2) -> dict:
    "The same tasks with one and with two workers, in turn; starting them counts."
    spent, tasks = {"1": 0.0, "2": 0.0}, shop_tasks("train")[:episodes]
    for _ in range(rounds):
        for workers in (1, 2):
            options = CollectOptions(workers, partial(slow_expert, seconds=seconds), ShopEnv, progress=False, worker=RayWorker)
            spent[str(workers)] += clocked(collect, tasks, [].append, options)
    return {"episodes": episodes * rounds, "seconds": seconds, **{k: round(v, 2) for k, v in spent.items()}}


def acting(episodes: int, rounds: int = 2) -> dict:
    "nano answers the shop's questions: all in this process, the policy in an actor, the worlds as well (with their start)."
    make = partial(HFPolicy.from_pretrained, "nano", max_new_tokens=48, batch_size=4)
    here, there = make(), RayPolicy(make, 1)
    ways = {"plain": (here, rollout), "policy": (there, rollout), "worlds": (there, ray_rollout)}
    spent, ids, tasks = dict.fromkeys(ways, 0.0), [], shop_tasks("test")[:episodes]
    for _ in range(rounds):
        for name, (policy, play) in ways.items():
            made = []
            spent[name] += clocked(lambda: made.extend(play(policy, ShopEnv, tasks)))
            ids.append(sorted(t.id for t in made))
    assert all(some == ids[0] for some in ids)
    return {"episodes": episodes * rounds, **{k: round(v, 2) for k, v in spent.items()}}


def calls(count: int = 100) -> dict:
    "A call that does nothing: seconds each."
    remote = Remote(ShopEnv, cpus=0)
    remote.call("close")
    return {"calls": count, "milliseconds": round(1000 * clocked(lambda: [remote.call("close") for _ in range(count)]) / count, 2)}


if __name__ == "__main__":
    connect()
    made = {"call": calls(), "one worker": [one_worker(0.0, 24), one_worker(1.0, 12)], "workers": several_workers(1.0, 12), "acting": acting(24)}
    Path(__file__).with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))
