"""Failures, caps per type, and maximal marginal relevance."""
from dataclasses import replace

import numpy as np
import pytest
from candidates import (
    candidates,
    episode,
    made,
    many,
    retriever,
    starting,
    store,
    words,
)  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.abstention import near_enough
from exprag.memory.budget import fit_budget
from exprag.memory.diversity import (
    cap_per_type, mmr, procedure_likeness, vector_likeness, with_failures)
from exprag.memory.utility import by_utility
from exprag.prompt import PromptFormat
from exprag.select import Memory, exclude_same_task, run_stages, successes_only, top_k
from exprag.trajectory import Step
from exprag.views import Experience, Hit

settings.register_profile("patient", deadline=None)  # a shared core is slow now and then
settings.load_profile("patient")


# Failures and caps


@given(many, st.integers(0, 3))
def test_failures_are_capped_and_unknown_outcomes_dropped(rows, most):
    found = made(rows)
    kept, dropped = with_failures(most)(starting(), found)
    assert [e.id for e in kept if e.success] == [e.id for e in found if e.success]
    failures = [e.id for e in found if e.success is False]
    assert [e.id for e in kept if e.success is False] == failures[:most]
    assert len(kept) + len(dropped) == len(found) and all(d.reason for d in dropped)


def test_failures_have_their_own_header_in_the_prompt(retriever):  # noqa: F811
    chosen = Memory(retriever, (exclude_same_task(), with_failures(1), top_k(10))).recall(
        starting()
    )
    assert sum(e.success is False for e in chosen) == 1
    text = PromptFormat().system("scienceworld", chosen.experiences)
    good, bad = text.split("Experience that failed:")
    assert "Experience that succeeded:" in good and "open door x0" in bad
    assert "open door x0" not in good and "a failure" in str(chosen.explain(None))


@given(many, st.integers(1, 3))
def test_caps_keep_the_nearest_of_each_type(rows, most):
    found = made(rows)
    kept, dropped = cap_per_type(most)(starting(), found)
    for kind in {e.task.type for e in found}:
        of_kind = lambda es: [e.hit.rank for e in es if e.task.type == kind]
        assert of_kind(kept) == of_kind(found)[:most]
    assert len(kept) + len(dropped) == len(found)


def test_a_cap_makes_the_memory_search_farther(retriever):  # noqa: F811
    stages = (exclude_same_task(), successes_only(), cap_per_type(1), top_k(3))
    memory = Memory(retriever, stages, pool=2)
    assert len({e.task.type for e in memory.recall(starting())}) == 3


# Diversity


def greedy_mmr(scores, alike, k, weight):
    """The definition, written as plainly as can be."""
    taken = []
    while len(taken) < min(k, len(scores)):
        rest = [i for i in range(len(scores)) if i not in taken]
        nearest = {i: max([0.0, *(alike[i][j] for j in taken)]) for i in rest}
        worth = {i: round(weight * scores[i] - (1 - weight) * nearest[i], 9) for i in rest}
        taken.append(max(rest, key=lambda i: (worth[i], -i)))
    return taken


@given(st.data(), st.integers(0, 6), st.integers(0, 5), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_mmr_is_its_definition(data, n, k, weight):
    share = st.integers(0, 10).map(lambda i: i / 10)
    scores = sorted(data.draw(st.lists(share, min_size=n, max_size=n)), reverse=True)
    alike = np.eye(n)
    for i in range(n):
        for j in range(i):
            alike[i, j] = alike[j, i] = data.draw(share)
    found = candidates(*(episode(i) for i in range(n)), scores=scores)
    kept, dropped = mmr(k, lambda es: alike, weight)(starting(), found)
    assert [e.hit.rank - 1 for e in kept] == greedy_mmr(scores, alike, k, weight)
    assert len(kept) + len(dropped) == n


def test_mmr_prefers_another_procedure_and_says_so():
    same, twin = episode(1), episode(2)
    other = replace(episode(3), steps=(Step("pick up seed", "ok"), Step("wait", "ok")))
    found = candidates(same, twin, other)
    assert np.allclose(procedure_likeness(found)[0], [1, 1, 0])
    kept, dropped = mmr(2, weight=0.5)(starting(), found)
    assert [e.trajectory for e in kept] == [same, other]
    assert "1.00 like one of them" in dropped[0].reason and "likeness 0.00" in kept[1].note


def test_likeness_of_vectors(retriever):  # noqa: F811
    found = [retriever.fetch(hit) for hit in retriever.search(starting(), 4)]
    alike = vector_likeness(retriever)(found)
    assert np.allclose(np.diag(alike), 1, atol=1e-5) and np.array_equal(alike, alike.T)
    backwards = vector_likeness(retriever)(found[::-1])
    assert np.array_equal(backwards, alike[::-1, ::-1]), "rows belong to their candidates"
    with pytest.raises(ValueError, match="have no vector of letters@1"):
        vector_likeness(retriever)([Experience(episode(1), Hit("f" * 32, 1.0, 1))])
    recall = lambda stage: Memory(retriever, (exclude_same_task(), successes_only(), stage)).recall(
        starting()
    )
    assert recall(mmr(3, vector_likeness(retriever), 1.0)).ids == recall(top_k(3)).ids


# All stages together


STAGES = [
    with_failures(1),
    cap_per_type(2),
    mmr(4),
    near_enough(0.93),
    by_utility({f"{3:032x}": 1.0}),
    fit_budget(80, words, ("chat", "actions")),
]


@given(many, st.permutations(STAGES))
@settings(max_examples=60)
def test_in_any_order_every_candidate_is_kept_or_dropped_once(rows, stages):
    found = made(rows)
    kept, dropped = run_stages(stages, starting(), found)
    assert sorted([e.id for e in kept] + [d.id for d in dropped]) == sorted(e.id for e in found)
    assert run_stages(stages, starting(), found) == (kept, dropped)


@pytest.mark.parametrize("wrong", [
    lambda: with_failures(-1), lambda: cap_per_type(0), lambda: mmr(-1),
    lambda: mmr(1, weight=1.5), lambda: by_utility({}, -1)])
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=r"\("):
        wrong()
