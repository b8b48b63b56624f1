"""The statistics against closed forms, scipy, and their own promises."""
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exprag.statistics import (METHODS, Interval, Outcomes, bca_levels, compare, expanded_level, hierarchical_bootstrap, holm,
                               replicates, sign_flip, wilson)


def outcomes(values) -> Outcomes:
    "Outcomes of an array [types, episodes, seeds]; NaN pads episodes."
    values = np.asarray(values, float)
    rows = [(f"t{t:02}", str(e), s, values[t, e, s]) for t, e, s in np.ndindex(values.shape) if not np.isnan(values[t, e, s])]
    return Outcomes.of(rows)


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 64), (3, 64), (32, 64), (64, 64), (7, 149)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_is_scipys(k, n, level):
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert np.allclose(wilson(k, n, level), (expected.low, expected.high))


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5), (float("nan"), 5)])
def test_wilson_refuses_nonsense(k, n):
    with pytest.raises(ValueError, match="successes of"):
        wilson(k, n)


def test_wilson_takes_a_mean_count():
    assert wilson(3, 10)[0] < wilson(3.5, 10)[0] < wilson(4, 10)[0]


@pytest.mark.parametrize("level", [0, 1, 95, -0.1])
def test_levels_outside_0_1_are_refused(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, level)
    with pytest.raises(ValueError, match="between 0 and 1"):
        hierarchical_bootstrap(outcomes(np.zeros((3, 1, 1))), level=level)


# ---- outcomes ----

def test_outcomes_weigh_types_alike_whatever_their_size():
    x = Outcomes.of([("a", "1", 0, 0), ("a", "2", 0, 0), ("a", "3", 0, 0), ("b", "9", 0, 100)])
    assert x.mean == 50 and x.counts.tolist() == [3, 1] and np.isnan(x.values[1, 1:, 0]).all()


def test_outcomes_do_not_depend_on_the_order_of_types_or_seeds():
    rows = [(t, e, s, float(hash((t, e, s)) % 100)) for t in "ba" for e in "12" for s in (1, 0)]
    a, b = Outcomes.of(rows), Outcomes.of(sorted(rows))
    assert a.types == b.types == ("a", "b") and a.seeds == (0, 1) and np.array_equal(a.values, b.values)


@pytest.mark.parametrize("rows, message", [
    ([], "no outcomes"),
    ([("a", "1", 0, 1.0), ("a", "1", 0, 2.0)], "two outcomes"),
    ([("a", "1", 0, float("nan"))], "not a finite number"),
    ([("a", "1", 0, 1.0), ("a", "2", 1, 1.0)], "every seed must run the whole panel"),
])
def test_bad_outcomes_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        Outcomes.of(rows)


# ---- bootstrap ----

def test_replicates_have_the_variance_that_theory_gives():
    "One episode, one seed: drawing types alone, whose variance is known in closed form."
    x = np.random.default_rng(0).normal(50, 20, 13)
    drawn = replicates(outcomes(x[:, None, None]), None, 40_000, np.random.default_rng(1))
    assert abs(drawn.mean() - x.mean()) < 0.15 and abs(drawn.std() / (x.std() / np.sqrt(13)) - 1) < 0.02


def test_replicates_of_two_levels_have_the_variance_that_theory_gives():
    "Types and episodes: variance of type means / T, plus the mean within-type variance / (T * E)."
    x = np.random.default_rng(0).normal(0, 1, (8, 1, 1)) + np.random.default_rng(1).normal(0, 2, (8, 5, 1))
    drawn = replicates(outcomes(x), None, 40_000, np.random.default_rng(2))
    expected = x.mean((1, 2)).var() / 8 + x[..., 0].var(1).mean() / 40
    assert abs(drawn.var() / expected - 1) < 0.03


def test_crossed_seeds_move_all_episodes_together():
    "Outcomes that depend on the seed alone: crossed seeds keep their whole variance, nested ones average it away."
    x = outcomes(np.broadcast_to(np.array([0.0, 60.0, 90.0]), (10, 5, 3)))
    rng = np.random.default_rng(0)
    crossed, nested = (replicates(x, None, 20_000, rng, n) for n in (False, True))
    assert abs(crossed.std() / (np.std([0, 60, 90]) / np.sqrt(3)) - 1) < 0.02 and nested.std() < crossed.std() / 5


def test_a_pair_shares_types_and_episodes_but_not_seeds():
    x = np.random.default_rng(0).normal(50, 30, (9, 4, 1))
    same = replicates(outcomes(x), outcomes(x), 1000, np.random.default_rng(1))
    assert np.allclose(same, 0)
    y = np.broadcast_to(np.array([0.0, 30.0]), (9, 4, 2))
    assert replicates(outcomes(y), outcomes(y), 1000, np.random.default_rng(1)).std() > 5


@pytest.mark.parametrize("nested", [False, True])
def test_the_luck_of_an_adapter_that_both_ran_cancels(nested):
    luck, rng = np.array([-30.0, 0.0, 30.0]), np.random.default_rng(0)
    a = outcomes(rng.normal(50, 10, (9, 4, 1)) + luck)
    b = outcomes(a.values + 5)
    assert np.allclose(replicates(b, a, 1000, np.random.default_rng(1), nested, shared_seeds=True), 5)
    assert replicates(b, a, 1000, np.random.default_rng(1), nested).std() > 1


def test_with_one_seed_it_makes_no_difference_how_seeds_are_drawn():
    a, b = (outcomes(np.random.default_rng(i).normal(50, 20, (9, 4, 1))) for i in (0, 1))
    assert hierarchical_bootstrap(a, b, draws=500) == hierarchical_bootstrap(a, b, draws=500, shared_seeds=True)


def test_only_equal_seeds_are_drawn_together():
    a, b = (Outcomes.of([(t, "1", s, 1.0) for t in "ab" for s in seeds]) for seeds in ((0, 1), (0, 2)))
    assert hierarchical_bootstrap(a, b, draws=50).estimate == 0
    with pytest.raises(ValueError, match=r"ran seeds \(0, 1\) and \(0, 2\).*leave shared_seeds out"): hierarchical_bootstrap(a, b, shared_seeds=True)


def test_padding_never_enters():
    full = np.random.default_rng(0).normal(50, 10, (6, 3, 2))
    ragged = full.copy()
    ragged[2, 2] = np.nan
    low, high = (f(replicates(outcomes(ragged), None, 3000, np.random.default_rng(0))) for f in (np.min, np.max))
    assert np.nanmin(ragged) <= low <= high <= np.nanmax(ragged)
    assert hierarchical_bootstrap(outcomes(ragged)).estimate == pytest.approx(np.mean([np.nanmean(t) for t in ragged]))


@pytest.mark.parametrize("method", METHODS)
def test_intervals_are_seeded_and_hold_the_estimate(method):
    x = outcomes(np.random.default_rng(3).uniform(0, 100, (13, 5, 2)))
    one = hierarchical_bootstrap(x, method=method, draws=3000)
    assert one == hierarchical_bootstrap(x, method=method, draws=3000) != hierarchical_bootstrap(x, method=method, draws=3000, seed=1)
    assert one.low < one.estimate < one.high and one.estimate in one and isinstance(one, Interval)


def test_the_block_size_is_no_limit():
    x = outcomes(np.random.default_rng(3).uniform(0, 100, (30, 50, 3)))  # several blocks
    assert hierarchical_bootstrap(x, draws=1500).low < x.mean


def test_expanded_is_wider_and_tends_to_the_level():
    assert expanded_level(0.95, 5) < expanded_level(0.95, 13) < 0.025 and expanded_level(0.95, 10_000) == pytest.approx(0.025, abs=1e-4)


def test_bca_is_scipys():
    x = np.random.default_rng(0).gamma(1, 20, 13)
    drawn = x[np.random.default_rng(1).integers(13, size=(50_000, 13))].mean(1)
    ours = np.quantile(drawn, bca_levels(0.95, x.mean(), drawn, (x.sum() - x) / 12))
    theirs = stats.bootstrap((x,), np.mean, method="BCa", n_resamples=50_000, random_state=2).confidence_interval
    assert np.allclose(ours, theirs, rtol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_equal_outcomes_give_a_point(method):
    assert hierarchical_bootstrap(outcomes(np.full((5, 2, 2), 7.0)), method=method, draws=200).low == pytest.approx(7)


def test_bootstrap_refuses():
    x = outcomes(np.zeros((3, 2, 1)))
    with pytest.raises(ValueError, match="known: expanded, percentile, bca"):
        hierarchical_bootstrap(x, method="magic")
    with pytest.raises(ValueError, match="at least two"):
        hierarchical_bootstrap(outcomes(np.zeros((1, 2, 1))))
    with pytest.raises(ValueError, match="only one of the two conditions"):
        hierarchical_bootstrap(x, outcomes(np.zeros((3, 1, 1))))


@pytest.mark.slow
def test_the_default_interval_covers():
    "Coverage of the default over 600 repetitions stays within simulation error of its level, or above."
    for spread in (0, 1, 3):
        rng, hits = np.random.default_rng(7), 0
        for i in range(600):
            x = rng.normal(0, spread, (13, 1, 1)) + rng.normal(0, 1, (13, 5, 1))
            hits += 0 in hierarchical_bootstrap(outcomes(x), draws=600, seed=i)
        assert hits / 600 > 0.92, (spread, hits)


# ---- sign-flip ----

@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_sign_flip_counts_every_flip(differences):
    d = np.array(differences, float)
    sums = [abs(np.dot(signs, d)) for signs in product((1, -1), repeat=len(d))]
    assert sign_flip(d) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))


def test_sign_flip_is_scipys_permutation_test():
    a, b = np.random.default_rng(0).normal(1, 2, 11), np.random.default_rng(1).normal(0, 2, 11)
    expected = stats.permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True, n_resamples=np.inf)
    assert sign_flip(a, b) == pytest.approx(expected.pvalue)


def test_sign_flip_exact_up_to_twenty_types_and_sampled_above():
    d = np.random.default_rng(0).normal(0.4, 1, 20)
    exact = sign_flip(d)
    assert exact * 2 ** 20 == round(exact * 2 ** 20)
    assert sign_flip(d, exact_up_to=19, draws=200_000) == pytest.approx(exact, abs=0.005)
    many = np.random.default_rng(1).normal(1, 1, 30)
    assert sign_flip(many, draws=10_000) == sign_flip(many, draws=10_000) >= 1 / 10_001


def test_sign_flip_rounding_makes_no_difference():
    assert sign_flip([0.1] * 3 + [0.3]) == sign_flip([1] * 3 + [3])
    assert sign_flip([1e-12, 2e-12, 3e-12]) == sign_flip([1, 2, 3])


@pytest.mark.parametrize("bad", [[], [float("nan"), 1], [[1, 2]]])
def test_sign_flip_refuses(bad):
    with pytest.raises(ValueError, match="one finite number per task type"):
        sign_flip(bad)


def test_sign_flip_keeps_its_level():
    rng = np.random.default_rng(0)
    p = [sign_flip(rng.normal(0, 1, 10)) for _ in range(2000)]
    assert 0.035 < np.mean(np.array(p) <= 0.05) < 0.065


# ---- holm and compare ----

@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_is_monotone_and_at_least_as_large(p):
    adjusted = holm(p)
    assert list(adjusted) == list(p) and all(p[k] <= adjusted[k] <= 1 for k in p)
    ranked = sorted(p, key=p.get)
    assert all(adjusted[a] <= adjusted[b] for a, b in zip(ranked, ranked[1:]))


def test_holm_on_a_known_case():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def test_compare_puts_them_together():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 60, (11, 1, 1)) + rng.normal(0, 5, (11, 5, 1))
    a, b = outcomes(base + 20), outcomes(base)
    c = compare(a, b, ("new", "old"), draws=2000)
    assert (c.better, c.worse, c.equal) == (11, 0, 0) and c.p == 2 / 2 ** 11 and c.gap.estimate == pytest.approx(20)
    assert str(c).startswith("new minus old: +20.0 [") and set(c.differences) == set(a.types)


def test_the_module_is_light():
    code = "import sys, exprag.statistics, exprag.results, exprag.evaluation; print([m for m in ('torch', 'scipy', 'matplotlib', 'faiss') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
