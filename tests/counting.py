"A world without a simulator, light to import: for what does not depend on one."
import time

from exprag.worlds.collecting import chance_of
from exprag.world import play
from exprag.trajectory import FrozenMap, Task


class Count:
    "A world in which one counts."
    world, world_version, settings = "count", "1", FrozenMap()
    def reset(self, task, cap=None):
        self.task, self.n = task, 0
        return "0", {"goal": "count", "score": 0.0, "success": False}
    def step(self, action):
        self.n += 1
        return str(self.n), 0.0, False, False, {"goal": "count", "score": 0.0, "success": self.n >= 3}
    def close(self): pass


def counted(env, task): return play(env, task, ["on"] * 3)
def counts(n, world="count"): return [Task(world, "up", i, "train") for i in range(n)]
def slowly(env, task, seconds=0.05): return time.sleep(seconds * (int(task.variation) % 3)) or counted(env, task)
def by_chance(env, task, seed): return play(env, task, [str(chance_of(task, seed).randrange(10**9))] * 3)
def fails(env, task): return None if int(task.variation) % 2 else play(env, task, ["on"])
