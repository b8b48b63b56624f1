"Retrieval quality: nDCG with ties, judging, rankers, tables."
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import WordEncoder
from exprag.studies.quality import (
    QUALITY_MEASURES, Quality, by_chance, by_retriever, by_type, expected_by_rank, judge,
    mean_interval, ndcg, quality_by_novelty, quality_outcomes, quality_table, read_quality,
    results_by_novelty, retrieval_quality, write_quality)
from exprag.query import Retriever
from exprag.results import Episode, Results, Run
from exprag.statistics import Bootstrap
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory, read_jsonl

DATA = Path(__file__).resolve().parents[1] / "nbs" / "data"
GAINS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def episodes():
    return read_jsonl(DATA / "sample.jsonl")[0]


@pytest.fixture
def store(tmp_path, episodes):
    with Store(tmp_path / "bank.db") as made:
        made.add_many(episodes)
        yield made


def made(kind, variation, actions) -> Trajectory:
    return Trajectory(Task("scienceworld", kind, variation, "train"), "goal", "o", tuple(Step(a, "x") for a in actions), 100, True)


# ---- ties ----

def orders(scores):
    "All orders that agree with the scores."
    return [p for p in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in zip(p, p[1:]))]


def dcg(gains): return sum(g / np.log2(r + 2) for r, g in enumerate(gains))


@given(GAINS, st.data())
@settings(deadline=None, max_examples=120)
def test_expected_over_every_order_of_ties(gains, data):
    scores = data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=len(gains), max_size=len(gains)))
    k = data.draw(st.integers(1, 6))
    allowed = orders(scores)
    assert expected_by_rank(gains, scores) == pytest.approx(np.mean([[gains[i] for i in o] for o in allowed], axis=0))
    best = dcg(sorted(gains, reverse=True)[:k])
    expected = np.mean([dcg([gains[i] for i in o][:k]) for o in allowed]) / best if best else 1
    assert ndcg(gains, scores, k) == pytest.approx(expected)
    shuffled = data.draw(st.permutations(range(len(gains))))
    assert ndcg([gains[i] for i in shuffled], [scores[i] for i in shuffled], k) == pytest.approx(expected), "the order of candidates is nothing"


@given(GAINS, st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_the_oracle_has_one(gains, k):
    assert ndcg(gains, gains, k) == pytest.approx(1) and ndcg(gains, [0] * len(gains), k) <= 1 + 1e-9


def test_what_was_not_found_comes_last():
    assert expected_by_rank([1, 0, 0.5], [-np.inf, 3, -np.inf]).tolist() == [0, 0.75, 0.75]


@pytest.mark.parametrize("call, message", [
    (lambda: ndcg([1, 0], [1, float("nan")], 2), "is not a number"), (lambda: ndcg([float("inf"), 0], [1, 0], 2), "is not a number"),
    (lambda: ndcg([1, 0], [1], 2), "one of each"), (lambda: ndcg([1, 0], [1, 0], 0), "1 or more"), (lambda: ndcg([-1, 0], [1, 0], 1), "from 0 to 1"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


# ---- judging ----

def test_judge():
    expert = made("boil", 1, ["open a", "wait", "wait", "close a"])
    same, near, far = made("melt", 2, ["open b", "wait", "wait", "close b"]), made("boil", 3, ["open b", "wait"]), made("boil", 4, ["eat c"])
    right, wrong = judge(expert, [same, near, far], [3, 2, 1], 2), judge(expert, [same, near, far], [1, 2, 3], 2)
    assert (right.ndcg, right.relevance, right.best, right.gap, right.type_precision, right.candidates) == (1, 0.75, 0.75, 0, 0.5, 3)
    assert wrong.relevance == 0.25 and wrong.gap == 0.5 and wrong.type_precision == 1 and wrong.ndcg < right.ndcg
    assert judge(expert, [same], [0], 5).relevance == 1, "fewer candidates than k"
    with pytest.raises(ValueError, match="nothing to judge"): judge(expert, [], [], 2)


def test_the_task_itself_is_no_candidate_and_the_expert_is_not_shown(store, episodes):
    seen = []
    def spy(trajectory, ids, candidates):
        seen.append((trajectory, ids, candidates))
        return np.zeros(len(ids))
    rows = retrieval_quality(spy, episodes[:3], store)
    for (trajectory, ids, candidates), expert, row in zip(seen, episodes, rows):
        assert not trajectory.steps and trajectory.score is None and not trajectory.provenance and trajectory.goal == expert.goal
        assert expert.task not in {c.task for c in candidates} and ids == sorted(ids) and row.candidates == len(ids) == len(episodes) - 1
        assert [c.id for c in candidates] == ids


def test_rankers(store, episodes):
    retriever = Retriever(store, WordEncoder())
    judged = {name: retrieval_quality(r, episodes, store, k=3) for name, r in (("goal", by_retriever(retriever)), ("type", by_type), ("chance", by_chance))}
    several = [q.task.type for q in judged["type"] if sum(t.task.type == q.task.type for t in episodes) > 1]
    assert all(q.type_precision >= 1 / 3 - 1e-9 for q in judged["type"] if q.task.type in several)
    means = {name: np.mean([q.ndcg for q in rows]) for name, rows in judged.items()}
    assert means["chance"] < means["goal"] and means["chance"] < means["type"]
    assert {q.best for q in judged["goal"]} == {q.best for q in judged["chance"]}, "the oracle is the same for all"


def test_a_retriever_that_finds_little(store, episodes):
    class Lazy:
        def __init__(self, inner): self.inner = inner
        def search(self, trajectory, n, allow): return self.inner.search(trajectory, 1, allow)
    whole, lazy = (retrieval_quality(by_retriever(r), episodes[:5], store, k=1) for r in (Retriever(store, WordEncoder()), Lazy(Retriever(store, WordEncoder()))))
    assert all(a.relevance >= 0 and b.candidates == a.candidates for a, b in zip(whole, lazy))


def test_compositions_and_own_indexes(store, episodes):
    hard = [t for t in episodes if t.task.type == "grow-plant"]
    matched = retrieval_quality(by_chance, hard, store, "matched")
    assert all(q.candidates < len(episodes) - 1 for q in matched)
    ids = store.find(types=["boil"])
    assert [q.candidates for q in retrieval_quality(by_chance, hard, store, lambda task: ids)] == [len(ids)] * len(hard)
    with pytest.raises(ValueError, match="nothing to judge"): retrieval_quality(by_chance, hard, store, "empty")


# ---- tables and files ----

def rows(values: dict) -> list[Quality]:
    return [Quality(Task("scienceworld", kind, i, "test"), 2, 9, v, v, v, 1.0) for kind, vs in values.items() for i, v in enumerate(vs)]


def test_types_weigh_alike():
    outcomes = quality_outcomes(rows({"boil": [1.0] * 9, "melt": [0.0]}), "relevance")
    assert outcomes.mean == 0.5 and quality_outcomes(rows({"boil": [0.25]}), "gap").mean == 0.75
    with pytest.raises(ValueError, match="did you mean 'relevance'"): quality_outcomes(rows({"boil": [1]}), "relevanc")
    assert np.isnan(mean_interval(quality_outcomes(rows({"boil": [1.0, 0.0]}))).low)


def test_tables():
    judged = {"a": rows({"boil": [0.2, 0.4, 0.3], "melt": [0.6] * 3}), "b": rows({"boil": [0.5] * 3, "melt": [0.5] * 3})}
    table = quality_table(judged, how=Bootstrap(draws=200))
    assert len(table.rows) == 2 and table.header[1:] == tuple(QUALITY_MEASURES.values()) and table.rows[0][1].startswith("0.45 [") and "6 tasks of 2 types" in table.caption
    strata = {q.task: "new" if q.task.type == "boil" else "familiar" for q in judged["a"]}
    split = quality_by_novelty(judged, strata, "ndcg", how=Bootstrap(draws=200))
    assert split.header == ("", "familiar (3 tasks)", "between (0 tasks)", "new (3 tasks)") and split.rows[0] == ("a", "0.60", "-", "0.30")
    with pytest.raises(ValueError, match="has no novelty"): quality_by_novelty(judged, {}, "ndcg")


def test_qualities_survive_their_file(tmp_path):
    judged = {"here": {"a": rows({"boil": [0.12345, 1.0]}), "b": []}, "there": {}}
    write_quality(judged, tmp_path / "q.json")
    back = read_quality(tmp_path / "q.json")
    assert back["there"] == {} and back["here"]["b"] == [] and back["here"]["a"][1] == judged["here"]["a"][1] and back["here"]["a"][0].ndcg == pytest.approx(0.12345, abs=1e-4)
    judged = {"here": {"a": rows({'a "quoted], [" type': [0.5]})}}
    write_quality(judged, tmp_path / "q.json")
    assert read_quality(tmp_path / "q.json") == judged


def test_results_by_novelty(tmp_path):
    tasks = [Task("scienceworld", kind, i, "test") for kind in ("boil", "melt") for i in (21, 22)]
    config = {"name": "x", "seed": 0, "panel": {"name": "p", "fingerprint": "f", "tasks": [str(t) for t in tasks]}}
    def run(name, seed, scores): return Run(tmp_path, {**config, "name": name, "seed": seed}, tuple(Episode(t, s, s == 100, 3, 0, 0, 0, 0.0, "end") for t, s in zip(tasks, scores)))
    results = Results((run("a", 0, [100, 0, 50, 50]), run("a", 1, [100, 0, 50, 50]), run("b", 0, [0, 0, 0, 100])))
    strata = dict(zip(tasks, ("familiar", "new", "new", "new")))
    table = results_by_novelty(results, strata, how=Bootstrap(draws=200))
    assert table.header == ("", "familiar (1 tasks)", "between (0 tasks)", "new (3 tasks)")
    assert table.rows[0][:3] == ("a", "100.0", "-") and table.rows[0][3] == "25.0", "three tasks are too few for an interval"
    assert table.rows[1][1] == "0.0"
    assert results_by_novelty(results, strata, "success", how=Bootstrap(draws=200)).rows[0][3].startswith("0.0")
    with pytest.raises(ValueError, match="unknown measure"): results_by_novelty(results, strata, "scores")


class TestTheBooksOwnFile:
    def test_covers_both_worlds_with_numbers_only(self):
        kept = read_quality(DATA / "quality.json")
        assert set(kept) == {f"{w}, {c}" for w in ("scienceworld", "alfworld") for c in ("all", "matched", "mismatched")}
        for by_ranker in kept.values():
            assert set(by_ranker) == {"goal", "type", "chance"} and len({tuple(q.task for q in qs) for qs in by_ranker.values()}) == 1
            assert all(q.task.fold == "test" and 0 <= q.relevance <= q.best + 1e-4 for qs in by_ranker.values() for q in qs)
        assert len(kept["alfworld, all"]["goal"]) == 134
