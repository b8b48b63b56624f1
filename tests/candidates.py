"""Made-up candidates for the tests of selection stages."""
from dataclasses import replace

import pytest
from encoders import Letters
from hypothesis import strategies as st

from exprag.query import Retriever
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Experience, Hit


def episode(i, type="boil", fold="train", goal=None, success=True, steps=3, tag=""):
    made = tuple(Step(f"open door {tag}{j}", "The door is now open. " * 4) for j in range(steps))
    return Trajectory(
        Task("scienceworld", type, str(i), fold),
        goal or f"{type} number {i}",
        "A hall.",
        made,
        100.0 if success else -100.0,
        success,
    )


def starting(type="boil", i=50, fold="dev", **more):
    return replace(episode(i, type, fold, **more), steps=(), score=None, success=None)


def candidates(*episodes, scores=None):
    scores = scores if scores is not None else [1 - r / 100 for r in range(len(episodes))]
    return [
        Experience(e, Hit(f"{r:032x}", s, r)) for r, (e, s) in enumerate(zip(episodes, scores), 1)
    ]


def words(text):
    return len(text.split())


rows = st.tuples(st.integers(0, 3), st.sampled_from([True, False, None]), st.integers(1, 12))
many = st.lists(rows, max_size=10)


def made(rows):
    return candidates(*(replace(episode(i, f"type{kind}", steps=steps), success=success)
                        for i, (kind, success, steps) in enumerate(rows)))


@pytest.fixture
def store(tmp_path):
    types = ("boil", "melt", "grow-plant", "power-component")
    with Store(tmp_path / "store.db") as store:
        store.add_many([episode(i, t) for t in types for i in range(5)])
        store.add_many([episode(i, "boil", success=False, tag="x") for i in range(5, 8)])
        yield store


@pytest.fixture
def retriever(store):
    return Retriever(store, Letters())
