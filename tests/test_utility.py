"""Utility: what experience was worth, counted in the store and computed from a set of outcomes."""
import numpy as np
import pytest
from candidates import episode, retriever, starting, store  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.utility import (
    Use, Utility, UtilityLog, by_utility, credit, usage, z_scores)
from exprag.select import Memory, exclude_same_task, successes_only, top_k

settings.register_profile("patient", deadline=None)  # a shared core is slow now and then
settings.load_profile("patient")


# Uses, counted in the store


def test_credit_adds_up_and_is_deleted_with_the_episode(store):  # noqa: F811
    id, other = episode(0).id, "0" * 32
    assert credit(store, [id, id, other], 1.0, now=5.0) == 1
    assert credit(store, [id], 0.5, now=3.0) == 1
    assert usage(store) == {id: Use(2, 1.5, 5.0)}
    assert Use(2, 1.5).utility() == pytest.approx(2.5 / 4) and Use().utility() == 0.5
    store.delete(id)
    assert usage(store) == {} and credit(store, [], 1.0) in (0, -1)
    with pytest.raises(ValueError, match="finite"):
        credit(store, [], float("nan"))


# A set of outcomes


ids = st.lists(st.sampled_from("xyz"), max_size=3)
outcome = st.tuples(
    st.integers(0, 20), st.sampled_from("ab"), ids, st.integers(0, 7).map(lambda i: i / 7)
)


@given(st.lists(outcome, max_size=12, unique_by=lambda o: o[0]), st.randoms())
def test_utility_is_a_function_of_the_set(rows, random):
    def learn(rows):
        found = UtilityLog()
        for number, kind, used, value in rows:
            assert found.record(str(number), kind, used, value)
        return found
    shuffled = random.sample(rows, len(rows))
    first, second = learn(rows), learn(shuffled)
    for number, kind, used, value in shuffled:
        assert not second.record(str(number), kind, used, value), "reported twice counts once"
    half = len(rows) // 2
    merged = learn(shuffled[:half]).merge(learn(shuffled[half:])).merge(learn(rows[:half]))
    assert first.utilities() == second.utilities() == merged.utilities()
    kinds = {kind for _, kind, _, _ in rows}
    mean = {k: np.mean([v for _, kind, _, v in rows if kind == k]) for k in kinds}
    for id, utility in first.utilities().items():
        mine = [v - mean[kind] for _, kind, used, v in rows if id in used]
        assert utility.outcomes == len(mine)
        assert utility.value == pytest.approx(sum(mine) / (4 + len(mine)))
        assert -1 <= utility.value <= 1


def test_outcomes_on_disk(tmp_path):
    log, path = UtilityLog(prior=2.0), tmp_path / "log.json"
    log.record("e1", "t", ["x", "y"], 1.0)
    log.record("e2", "t", [], 0.0)
    log.save(path)
    again = UtilityLog.load(path)
    assert again.outcomes == log.outcomes and again.prior == 2.0
    assert again.utilities() == {"x": Utility(0.5 / 3, 1), "y": Utility(0.5 / 3, 1)}
    log.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["log.json"]
    path.write_text(path.read_text().replace('"prior"', '"doubt"'))
    assert UtilityLog.load(path).utilities() == log.utilities(), "a file of the first release"
    for text in (path.read_text()[:-9], "[]", "{}", '{"prior": 4, "outcomes": {"a": 1}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="log.json does not hold outcomes"):
            UtilityLog.load(path)


def test_outcomes_refuse_contradictions_and_nonsense():
    log = UtilityLog()
    log.record("e", "t", ["x"], 1.0)
    with pytest.raises(ValueError, match="find out which is right"):
        log.record("e", "t", ["x"], 0.0)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            log.record("f", "t", [], wrong)
    with pytest.raises(ValueError, match="positive"):
        UtilityLog(prior=0)


# The stage


def test_utility_reorders_and_the_lack_of_it_does_not(retriever):  # noqa: F811
    def recall(*stages):
        stages = (exclude_same_task(), successes_only(), *stages, top_k(3))
        return Memory(retriever, stages).recall(starting())
    plain = recall()
    assert recall(by_utility({}, 1.0)).ids == plain.ids
    assert recall(by_utility({plain.ids[2]: 0.9}, 0.0)).ids == plain.ids
    chosen = recall(by_utility({plain.ids[2]: Utility(0.9, 5)}, 0.8))
    assert chosen.ids[0] == plain.ids[2] and "utility +0.90" in str(chosen.explain())
    assert by_utility({"a": 0.1}).describe() != by_utility({"a": 0.2}).describe()
    assert by_utility({"a": Utility(0.1, 3)}).describe() == by_utility({"a": 0.1}).describe()
    assert z_scores([]).shape == (0,) and (z_scores([2.0, 2.0]) == 0).all()
    assert z_scores([1, 3]).tolist() == [-1, 1]
