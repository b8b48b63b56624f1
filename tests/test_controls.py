"""The oracle control: it ranks by the test task's own expert path, and shows it to nobody."""
from dataclasses import replace
from pathlib import Path

import pytest

from encoders import WordEncoder
from exprag.evaluation import condition, memory_for
from exprag.query import Retriever
from exprag.store import Store
from exprag.studies.controls import OracleRetriever, oracle_paths
from exprag.trajectory import Trajectory, read_jsonl
from exprag.views import Experience
from exprag.world import load_panel
from exprag.worlds.scienceworld import ScienceWorldEnv

SAMPLE = Path(__file__).resolve().parents[1] / "nbs" / "data" / "sample.jsonl"


@pytest.fixture(scope="module")
def sample(): return read_jsonl(SAMPLE)[0]


@pytest.fixture
def store(tmp_path, sample):
    with Store(tmp_path / "bank.db") as made:
        made.add_many(sample)
        yield made


def test_the_oracle_ranks_by_procedure(store, sample):
    mine = sample[0]
    task, other = replace(mine.task, fold="test"), load_panel("scienceworld", "demo").tasks[0]
    oracle = OracleRetriever(store, {task: mine.actions})
    hits = oracle.search(Trajectory(task, "nothing in common", "o"), 5)
    assert hits[0].score == 0 and mine.id in [h.id for h in hits if h.score == 0] and [h.score for h in hits] == sorted([h.score for h in hits], reverse=True)
    assert [h.rank for h in hits] == [1, 2, 3, 4, 5] and oracle.search(Trajectory(task, "g", "o"), 5, set()) == []
    with pytest.raises(ValueError, match="oracle_paths"): oracle.search(Trajectory(other, "g", "o"), 5)
    assert oracle.describe()["retriever"] == "oracle" and oracle.describe() != OracleRetriever(store, {task: mine.actions[1:]}).describe()


def test_what_it_finds_is_experience(store, sample):
    oracle = OracleRetriever(store, {sample[0].task: sample[0].actions})
    hit, = oracle.search(sample[0], 1)
    assert oracle.fetch(hit) == Experience(store.get(hit.id), hit)


def test_it_serves_oracle_experience_and_nothing_else(store, sample):
    oracle, task = OracleRetriever(store, {sample[0].task: sample[0].actions}), sample[0]
    found = memory_for(condition("oracle experience"), oracle).recall(task.opening())
    assert len(found) == 2 and all(e.task != task.task for e in found), "its own task is excluded as ever"
    with pytest.raises(ValueError, match="OracleRetriever"): memory_for(condition("oracle experience"), Retriever(store, WordEncoder()))
    with pytest.raises(ValueError, match="ranks by 'retrieved'"): memory_for(condition("ExpRAG-LoRA"), oracle)


def test_oracle_paths_are_the_experts():
    task = next(t for t in load_panel("scienceworld", "demo").tasks if t.type == "identify-life-stages-2")
    with ScienceWorldEnv() as env:
        assert len(oracle_paths(env, [task])[task]) > 3
