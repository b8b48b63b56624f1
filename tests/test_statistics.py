"""The statistics against closed forms, scipy, and their own promises."""
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exprag.statistics import (
    FEWEST, METHODS, Bootstrap, Interval, Outcomes, Unit, bca_levels, compare, expanded_level,
    hierarchical_bootstrap, holm, replicates, sign_flip, success_interval, unit_of)


def outcomes(values, group=None) -> Outcomes:
    "Outcomes of an array [types, episodes, seeds]; NaN pads episodes."
    values = np.asarray(values, float)
    rows = [(f"t{t:02}", str(e), s, values[t, e, s]) for t, e, s in np.ndindex(values.shape) if not np.isnan(values[t, e, s])]
    return Outcomes.of(rows, group)


def by_threes(kind, episode): return str(int(episode) // 3)


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 64), (3, 64), (32, 64), (64, 64), (7, 149)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_the_success_interval_is_scipys_wilson(k, n, level):
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert np.allclose(success_interval(k, n, level), (expected.low, expected.high))


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 5), (6, 5), (float("nan"), 5)])
def test_the_success_interval_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="successes of"):
        success_interval(k, n)


def test_no_success_and_no_failure_reach_the_end_of_the_scale():
    (low, high), (other, one) = success_interval(0, 64), success_interval(64, 64)
    assert low == pytest.approx(0, abs=1e-12) and one == pytest.approx(1) and 0.05 < high < 0.06 and high == pytest.approx(1 - other)


@pytest.mark.parametrize("level", [0, 1, 95, -0.1])
def test_levels_outside_0_1_are_refused(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        success_interval(1, 2, level)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Bootstrap(level=level)


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
    crossed, nested = (replicates(x, None, 20_000, rng, Bootstrap(nested=n)) for n in (False, True))
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
    assert np.allclose(replicates(b, a, 1000, np.random.default_rng(1), Bootstrap(nested=nested, shared_seeds=True)), 5)
    assert replicates(b, a, 1000, np.random.default_rng(1), Bootstrap(nested=nested)).std() > 1


def test_with_one_seed_it_makes_no_difference_how_seeds_are_drawn():
    a, b = (outcomes(np.random.default_rng(i).normal(50, 20, (9, 4, 1))) for i in (0, 1))
    assert hierarchical_bootstrap(a, b, Bootstrap(500)) == hierarchical_bootstrap(a, b, Bootstrap(500, shared_seeds=True))


def test_a_narrower_level_gives_a_narrower_interval():
    x = outcomes(np.random.default_rng(3).uniform(0, 100, (13, 5, 1)))
    wide, narrow = (hierarchical_bootstrap(x, how=Bootstrap(2000, level)) for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high and Bootstrap() == Bootstrap(10_000, 0.95, "expanded", 2025, False, False, "auto")


def test_only_equal_seeds_are_drawn_together():
    a, b = (Outcomes.of([(t, "1", s, 1.0) for t in "abcdef" for s in seeds]) for seeds in ((0, 1), (0, 2)))
    assert hierarchical_bootstrap(a, b, Bootstrap(50)).estimate == 0
    with pytest.raises(ValueError, match=r"ran seeds \(0, 1\) and \(0, 2\).*leave shared_seeds out"): hierarchical_bootstrap(a, b, Bootstrap(shared_seeds=True))


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
    how = Bootstrap(3000, method=method)
    one = hierarchical_bootstrap(x, how=how)
    assert one == hierarchical_bootstrap(x, how=how) != hierarchical_bootstrap(x, how=replace(how, seed=1))
    assert (one.level, one.method) == (how.level, method)
    assert one.low < one.estimate < one.high and one.estimate in one and isinstance(one, Interval)


def test_the_block_size_is_no_limit():
    x = outcomes(np.random.default_rng(3).uniform(0, 100, (30, 50, 3)))  # several blocks
    assert hierarchical_bootstrap(x, how=Bootstrap(1500)).low < x.mean


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
    assert hierarchical_bootstrap(outcomes(np.full((5, 2, 2), 7.0)), how=Bootstrap(200, method=method)).low == pytest.approx(7)


def test_bootstrap_refuses():
    x = outcomes(np.zeros((3, 2, 1)))
    with pytest.raises(ValueError, match="unknown method 'magic'.* known: expanded, percentile, bca"): Bootstrap(method="magic")
    with pytest.raises(ValueError, match="draws is 0"): Bootstrap(0)
    with pytest.raises(ValueError, match="unknown unit 'game'.* known: auto, type, episode"): Bootstrap(unit="game")
    with pytest.raises(ValueError, match="only one of the two conditions"):
        hierarchical_bootstrap(x, outcomes(np.zeros((3, 1, 1))))


@pytest.mark.slow
def test_the_default_interval_covers():
    "Coverage of the default over 600 repetitions stays within simulation error of its level, or above."
    for spread in (0, 1, 3):
        rng, hits = np.random.default_rng(7), 0
        for i in range(600):
            x = rng.normal(0, spread, (13, 1, 1)) + rng.normal(0, 1, (13, 5, 1))
            hits += 0 in hierarchical_bootstrap(outcomes(x), how=Bootstrap(600, seed=i))
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
    with pytest.raises(ValueError, match="one finite number per unit"):
        sign_flip(bad)


def test_sign_flip_keeps_its_level():
    rng = np.random.default_rng(0)
    p = [sign_flip(rng.normal(0, 1, 10)) for _ in range(2000)]
    assert 0.035 < np.mean(np.array(p) <= 0.05) < 0.065


# ---- few types ----

def success(counts, games=20):
    "One seed; of so many games of each type so many succeed."
    return outcomes(100.0 * (np.arange(games) < np.array(counts)[:, None])[..., None])


def test_the_unit_follows_a_rule():
    assert unit_of(outcomes(np.zeros((6, 1, 1)))) == Unit("type", 6, 6) and unit_of(outcomes(np.zeros((13, 5, 2)))).name == "type"
    assert unit_of(outcomes(np.zeros((3, 9, 2)))) == Unit("episode", 27, 3) and str(unit_of(outcomes(np.zeros((3, 9, 2))))) == "27 episodes within 3 task types"
    assert unit_of(outcomes(np.zeros((3, 9, 1)), by_threes)) == Unit("group", 9, 3) and unit_of(outcomes(np.zeros((3, 9, 1))), "type").count == 3
    assert unit_of(outcomes(np.zeros((5, 1, 1)))) == Unit("type", 5, 5), "one episode of a type shows no spread within it"
    assert unit_of(outcomes(np.zeros((1, 9, 1)))) == Unit("episode", 9, 1) and str(unit_of(outcomes(np.zeros((1, 1, 1))))) == "1 task type"
    with pytest.raises(ValueError, match="t00 are one group.*unit='type'"): unit_of(outcomes(np.zeros((3, 3, 1)), by_threes), "episode")
    assert [Unit("type", n, n).enough for n in (1, 3, 5, FEWEST)] == [False, False, False, True] and Unit("type", 3, 3).least_p == 0.25
    assert Unit("type", 5, 5).least_p > 0.05 > Unit("type", FEWEST, FEWEST).least_p and Unit("type", 1, 1).least_p == 1


def test_three_types_of_twenty_games_can_be_told_apart():
    "The paper's situation: three hard types, 60% against 20% success."
    a, b = success([12, 13, 11]), success([4, 3, 5])
    c = compare(a, b, ("new", "old"))
    assert c.unit == Unit("episode", 60, 3) and c.p < 1e-4 and c.shown_p == "< 0.0001" and 20 < c.gap.low < 40 < c.gap.high < 60 and (c.better, c.worse) == (3, 0)
    over_types = compare(a, b, ("new", "old"), Bootstrap(unit="type"))
    assert over_types.p == 0.25 and over_types.shown_p == ">= 0.25" and over_types.gap.estimate == c.gap.estimate == 40
    assert str(over_types) == "new minus old: +40.0, p >= 0.25" and 0 in over_types.gap and str(c).endswith("p < 0.0001")
    small = compare(success([1, 1, 1], 4), success([0, 0, 0], 4))
    assert small.p == 0.25 and small.shown_p == "0.2500", "twelve games: p could have been small"


@pytest.mark.parametrize("method", METHODS)
def test_an_interval_over_episodes_keeps_the_types(method):
    "Types that differ add nothing, if each is kept; with groups their episodes go together."
    x = np.random.default_rng(0).normal(0, 10, (3, 12, 2))
    one, far = (hierarchical_bootstrap(outcomes(x + shift), how=Bootstrap(3000, method=method)) for shift in (0, np.array([[[0]], [[500]], [[90]]])))
    assert far.high - far.low == pytest.approx(one.high - one.low) and far.low < far.estimate < far.high
    alike = np.repeat(x[:, :4], 3, 1)
    apart, together = (hierarchical_bootstrap(outcomes(alike, g), how=Bootstrap(3000, method=method)) for g in (None, by_threes))
    assert together.estimate == apart.estimate and together.high - together.low > 1.3 * (apart.high - apart.low)


def test_fewer_than_six_units_have_no_interval():
    x = hierarchical_bootstrap(outcomes(np.random.default_rng(0).normal(0, 1, (5, 1, 3))))
    assert (x.low, x.high) == (-np.inf, np.inf) and str(x) == f"{x.estimate:.1f}" and 1e9 in x
    assert str(hierarchical_bootstrap(outcomes(np.full((1, 2, 1), 7.0)))) == "7.0"


def test_groups_are_part_of_a_panel():
    x = np.zeros((3, 6, 1))
    assert compare(outcomes(x, by_threes), outcomes(x, by_threes)).p == 1
    with pytest.raises(ValueError, match="in other groups"): compare(outcomes(x, by_threes), outcomes(x))


def test_stratified_replicates_have_the_variance_that_theory_gives():
    x = np.random.default_rng(0).normal(0, [[[1]], [[5]], [[2]]], (3, 8, 1))
    drawn = replicates(outcomes(x), None, 40_000, np.random.default_rng(2), Bootstrap())
    assert abs(drawn.var() / (x[..., 0].var(1) / 8).sum() * 9 - 1) < 0.03 and abs(drawn.mean() - x.mean()) < 0.05
    ragged = x.copy()
    ragged[1, 7:] = np.nan  # groups of 3, 3 and 2 episodes, and in one type of 3, 3 and 1
    low, high = (f(replicates(outcomes(ragged, by_threes), None, 2000, np.random.default_rng(0), Bootstrap())) for f in (np.min, np.max))
    assert np.nanmin(ragged) <= low <= high <= np.nanmax(ragged)


def rooms(rng, alike, types=3, count=4, games=3):
    "Differences without any effect; a share of a game's luck is its room's."
    room = np.repeat(rng.normal(0, 1, (types, count, 1)), games, 2).reshape(types, -1)
    return alike * room + np.sqrt(1 - alike ** 2) * rng.normal(0, 1, (types, count * games))


def test_the_stratified_test_keeps_its_level_and_needs_groups():
    "Share of p < 0.05 without an effect: 5%, also of success in games of unlike difficulty; alike games need groups."
    rng, zero = np.random.default_rng(0), np.zeros((3, 12, 1))
    def p(d, group=None): return compare(outcomes(d[..., None], group), outcomes(zero, group), how=Bootstrap(1)).p
    fast = [p(rooms(rng, 0.8), by_threes) for _ in range(400)]
    assert 0.025 < np.mean(np.array(fast) < 0.05) < 0.08
    chance = rng.uniform(0, 1, (3, 6))
    solved = [compare(*(success_draw(rng, chance) for _ in "ab"), how=Bootstrap(1)).p for _ in range(400)]
    assert np.mean(np.array(solved) < 0.05) < 0.08
    alone = [sign_flip(rooms(rng, 0.8).ravel(), draws=2000) for _ in range(400)]
    assert np.mean(np.array(alone) < 0.05) > 0.15, "what taking the games of a room as independent does"


def success_draw(rng, chance): return outcomes(100.0 * (rng.random(chance.shape) < chance)[..., None])


def test_the_stratified_interval_covers():
    "Three types of 20 games, success of 60, 30 and 10%: the true mean of type means in about 95 of 100 intervals."
    rng, hits = np.random.default_rng(3), 0
    for i in range(300):
        x = success_draw(rng, np.repeat([[0.6], [0.3], [0.1]], 20, 1))
        hits += 100 / 3 in hierarchical_bootstrap(x, how=Bootstrap(500, seed=i))
    assert 0.91 < hits / 300 < 0.99


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
    c = compare(a, b, ("new", "old"), Bootstrap(2000))
    assert (c.better, c.worse, c.equal) == (11, 0, 0) and c.p == 2 / 2 ** 11 and c.gap.estimate == pytest.approx(20)
    assert str(c).startswith("new minus old: +20.0 [") and set(c.differences) == set(a.types)


def test_the_module_is_light():
    code = "import sys, exprag.statistics, exprag.results, exprag.evaluation; print([m for m in ('torch', 'scipy', 'matplotlib', 'faiss') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
