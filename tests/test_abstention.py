"""Abstention: the threshold with the least regret, from dev tasks only."""
import json

import numpy as np
import pytest
from candidates import episode, retriever, starting, store  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.abstention import (
    Calibration, Judgement, calibrate, judge, near_enough, regrets, thresholds_between)
from exprag.select import Memory, exclude_same_task, order, successes_only, top_k
from exprag.trajectory import Task

settings.register_profile("patient", deadline=None)  # a shared core is slow now and then
settings.load_profile("patient")


def brute_force(judgements, threshold):
    costs = [max(-j.gain, 0) if j.score >= threshold else max(j.gain, 0) for j in judgements]
    return sum(costs) / len(judgements)


number = st.integers(-10, 10).map(lambda i: i / 10)


@given(st.lists(st.tuples(st.sampled_from("abc"), number, number), min_size=1, max_size=12))
def test_the_threshold_has_the_least_regret(rows):
    judged = [Judgement(Task("w", kind, str(i), "dev"), score, gain)
              for i, (kind, score, gain) in enumerate(rows)]
    found = calibrate(judged)
    everywhere = [*found.thresholds, *(j.score for j in judged), -2, 2]
    least = min(brute_force(judged, t) for t in everywhere)
    assert brute_force(judged, found.threshold) == pytest.approx(least)
    assert found.regret == pytest.approx([brute_force(judged, t) for t in found.thresholds])
    lowest = min(t for t, r in zip(found.thresholds, found.regret) if r <= min(found.regret) + 1e-9)
    assert found.threshold == pytest.approx(lowest), "of several, the lowest"
    one_type = len({k for k, *_ in rows}) == 1  # then `held_out` is not a number
    assert calibrate(judged[::-1]) == found or one_type, "the order does not matter"


def test_held_out_is_judged_by_the_others():
    rows = [("a", 0.9, 1.0), ("a", 0.2, -1.0), ("b", 0.5, 1.0), ("b", 0.1, -1.0)]
    judged = [Judgement(Task("w", k, str(i), "dev"), s, g) for i, (k, s, g) in enumerate(rows)]
    found = calibrate(judged)
    assert min(found.regret) == 0 and 0.2 < found.threshold < 0.5
    # a chooses 0.55, which hides b's 0.5; b chooses 0.3, which is right for a
    assert found.held_out == pytest.approx(1 / 4)
    assert found.describe()["always"] == 0.5 == found.describe()["never"]
    assert json.dumps(found.describe())


def test_calibration_refuses_what_would_be_a_leak_or_nonsense():
    ok = Judgement(Task("w", "t", "1", "dev"), 0.5, 1.0)
    for fold in ("test", "seen"):
        with pytest.raises(ValueError, match="must not see test tasks"):
            calibrate([ok, ok._replace(task=Task("w", "t", "2", fold))])
    with pytest.raises(ValueError, match="no judgements"):
        calibrate([])
    with pytest.raises(ValueError, match="finite"):
        calibrate([ok._replace(score=float("nan"))])
    with pytest.raises(ValueError, match="finite"):
        near_enough(float("inf"))
    assert np.isnan(calibrate([ok]).held_out)


def test_regrets_and_thresholds():
    scores, gains = np.array([0.2, 0.6, 0.6]), np.array([-1.0, 0.5, -0.25])
    tried = thresholds_between(scores)
    assert len(tried) == 3 and tried[0] < 0.2 < tried[1] < 0.6 < tried[2]
    harm, missed = regrets(scores, gains, tried)
    assert np.allclose(harm, [1.25 / 3, 0.25 / 3, 0]) and np.allclose(missed, [0, 0, 0.5 / 3])


def test_judging_and_abstaining(retriever):  # noqa: F811
    experts = [episode(60 + i, t, "dev") for t in ("boil", "melt", "grow-plant") for i in range(2)]
    memory = Memory(
        retriever, (exclude_same_task(), successes_only(), top_k(2), order("nearest_last"))
    )
    gain = lambda experience, mine: 1.0 if experience.task.type == mine.task.type else -1.0
    judged = judge(memory, experts, gain)
    assert [j.task for j in judged] == [e.task for e in experts]
    recalled = [memory.recall(starting(j.task.type, j.task.variation)) for j in judged]
    assert [j.score for j in judged] == [max(e.hit.score for e in r) for r in recalled]
    assert judge(Memory(retriever, composition="empty"), experts, gain) == []
    found = calibrate([*judged, Judgement(Task("w", "far", "1", "dev"), 0.3, -1.0)])
    assert isinstance(found, Calibration) and "7 tasks" in repr(found)
    careful = Memory(retriever, (exclude_same_task(), near_enough(found), top_k(2)))
    assert len(careful.recall(starting())) == 2
    nothing = careful.recall(starting(goal="zzzz zzz"))
    assert len(nothing) == 0 and {d.stage for d in nothing.dropped} == {"near_enough"}
    assert "is below" in str(nothing.explain())
    assert near_enough(found).describe()["calibration"] == found.describe()["tasks_hash"]
    assert "calibration" not in near_enough(0.5).describe()


def test_abstention_does_not_read_the_whole_store(retriever, monkeypatch):  # noqa: F811
    asked, search = [], retriever.search
    monkeypatch.setattr(
        retriever, "search", lambda t, n, allow: asked.append(n) or search(t, n, allow)
    )
    Memory(retriever, (near_enough(2.0), top_k(2)), pool=3).recall(starting())
    assert asked == [3]
