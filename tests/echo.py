"A world that only talks, and policies with random weights, for the tests of rollouts and policies."
import random

from chat_models import CORPUS, make_model, make_tokenizer

from exprag.agent import Action, Limits, rollout
from exprag.models.local import HFPolicy
from exprag.prompt import PromptFormat
from exprag.select import Every, Once, Selection
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Experience
from exprag.world import SimulatorError

WORDS = " ".join(CORPUS).split()
FORMAT = PromptFormat(
    instruction="You act in a text world. Answer each observation with one action.", templates=())
TASKS = [Task("echo", f"t{i % 3}", str(i), "test") for i in range(56)]
CAPS = {"t0": 1, "t1": 2, "t2": 4}
REFUSAL = "No known action matches that input."


class Echo:
    "Answers with words drawn from task, step and action, so that a changed action changes the rest."
    world, world_version, settings = "echo", "1", {}
    made, closed, deaths, shut = 0, 0, (), False

    def __init__(self): type(self).made += 1

    def reset(self, task, cap=None):
        self.task, self.steps = task, 0
        self.goal = self.words(task, 12)
        return self.words(f"{task} first", 20), self.info()

    def step(self, action):
        self.steps += 1
        if (now := (str(self.task), self.steps)) in self.deaths:
            type(self).deaths = tuple(d for d in self.deaths if d != now)
            raise SimulatorError("the simulator died; reset(task) starts a new one")
        seen = self.words(f"{self.task} {self.steps} {action}", len(action) % 30 + 1)
        return seen, 1.0, False, False, self.info()

    def words(self, seed, n): return " ".join(random.Random(str(seed)).choices(WORDS, k=n))

    def info(self):
        return {"goal": self.goal, "score": float(self.steps), "success": False,
                "steps": self.steps, "task": self.task}

    def close(self):
        type(self).closed += not self.shut
        self.shut = True


MODELS = {}


def policy_of(family="qwen", format=FORMAT, **settings):
    "A policy with the random weights of a family; the weights are made once."
    if family not in MODELS:
        tokenizer = make_tokenizer(family)
        MODELS[family] = make_model(family, len(tokenizer)), tokenizer
    return HFPolicy(*MODELS[family], format, **({"max_new_tokens": 6} | settings))


class Recall:
    "A memory that recalls one finished episode of another task."
    when = Once()

    def recall(self, trajectory): return self.selection(trajectory.goal[::-1], "wait")

    def selection(self, goal, action):
        made = Trajectory(Task("echo", "t9", "0", "train"), goal, "look", (Step(action, "ok"),))
        return Selection((Experience(made.finish(100.0, True)),))

    def describe(self): return {"kind": "test", "asked": self.when.describe()}


class Changing(Recall):
    "Recalls another episode every few steps, and counts how often it was asked."
    asked, period = 0, 2

    def __init__(self, when=Once()): self.when = when

    def recall(self, trajectory):
        type(self).asked += 1
        word = WORDS[len(trajectory) // self.period]
        return self.selection(f"{trajectory.goal[::-1]} {word}", f"use {word}")


EVERY_STEP = Every(1)


class Scripted:
    "Plays a list of actions, step by step, and keeps the system texts that it would have read."
    name, batch_size, format = "scripted", 2, FORMAT

    def __init__(self, *actions): self.actions, self.shown = actions, []
    def reset(self): pass
    def describe(self): return {"name": "scripted"}

    def act(self, trajectories, experiences, keys):
        self.shown = [self.format.messages(t, e)[0]["content"]
                      for t, e in zip(trajectories, experiences)]
        last = len(self.actions) - 1
        return [Action(self.actions[min(len(t), last)], 1, 1, 1) for t in trajectories]


def play(policy, tasks, memory=None, **limits):
    "The finished episodes of some tasks in the world of echoes, by task."
    done = list(rollout(policy, Echo, tasks, memory, Limits(**({"caps": CAPS} | limits))))
    assert sorted(t.task for t in done) == sorted(tasks)
    return {t.task: t for t in done}
