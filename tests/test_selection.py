"""Selection's finer stages: what they keep, drop and say; calibration; utility from outcomes; safe display."""
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import Letters
from exprag.query import Hit, Retriever
from exprag.select import Candidate, Memory, Selection, exclude_same_task, order, run_stages, successes_only, top_k
from exprag.selection import (Calibration, Judgement, Outcomes, Utility, as_chosen, by_utility, calibrate, cap_per_type, fit, judge, look, mmr,
                              near_enough, procedure_likeness, regrets, thresholds_between, vector_likeness, with_failures, z_scores)
from exprag.store import VIEWS, Store, view
from exprag.trajectory import Step, Task, Trajectory


def episode(i, type="boil", fold="train", goal=None, success=True, steps=3, tag=""):
    return Trajectory(Task("scienceworld", type, str(i), fold), goal or f"{type} number {i}", "A hall.",
                      tuple(Step(f"open door {tag}{j}", "The door is now open. " * 4) for j in range(steps)), 100.0 if success else -100.0, success)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many([episode(i, t) for t in ("boil", "melt", "grow-plant", "power-component") for i in range(5)])
        store.add_many([episode(i, "boil", success=False, tag="x") for i in range(5, 8)])
        yield store


@pytest.fixture
def retriever(store):
    return Retriever(store, Letters())


def standing(type="boil", i=50, fold="dev", **more):
    return replace(episode(i, type, fold, **more), steps=(), score=None, success=None)


def candidates(*episodes, scores=None):
    scores = scores if scores is not None else [1 - r / 100 for r in range(len(episodes))]
    return [Candidate(Hit(f"{r:032x}", s, r), e) for r, (e, s) in enumerate(zip(episodes, scores), 1)]


def words(text):
    return len(text.split())


def bare(trajectory):
    return "\n".join([trajectory.goal, *trajectory.actions])


VIEWS["bare"] = bare
settings.register_profile("patient", deadline=None)  # a shared core is slow now and then
settings.load_profile("patient")


def teardown_module():
    del VIEWS["bare"]


many = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([True, False, None]), st.integers(1, 12)), max_size=10)


def made(rows):
    return candidates(*(replace(episode(i, f"type{kind}", steps=steps), success=success) for i, (kind, success, steps) in enumerate(rows)))


# Failures and caps


@given(many, st.integers(0, 3))
def test_failures_are_capped_and_unknown_outcomes_dropped(rows, most):
    found = made(rows)
    kept, dropped = with_failures(most)(standing(), found)
    assert [c.hit.id for c in kept if c.experience.success] == [c.hit.id for c in found if c.experience.success]
    failures = [c.hit.id for c in found if c.experience.success is False]
    assert [c.hit.id for c in kept if c.experience.success is False] == failures[:most]
    assert len(kept) + len(dropped) == len(found) and all(d.reason for d in dropped)


def test_failures_stand_under_their_own_header_in_the_prompt(retriever):
    prompt = pytest.importorskip("exprag.prompt")
    chosen = Memory(retriever, (exclude_same_task(), with_failures(1), top_k(10))).recall(standing())
    assert sum(e.success is False for e in chosen) == 1
    text = prompt.PromptFormat().system("scienceworld", chosen.experiences)
    good, bad = text.split("Experience that failed:")
    assert "Experience that succeeded:" in good and "open door x0" in bad and "open door x0" not in good
    assert "a failure" in str(chosen.explain(None))


@given(many, st.integers(1, 3))
def test_caps_keep_the_nearest_of_each_type(rows, most):
    found = made(rows)
    kept, dropped = cap_per_type(most)(standing(), found)
    for kind in {c.experience.task.type for c in found}:
        of_kind = lambda cs: [c.hit.rank for c in cs if c.experience.task.type == kind]
        assert of_kind(kept) == of_kind(found)[:most]
    assert len(kept) + len(dropped) == len(found)


def test_a_cap_makes_the_memory_look_farther(retriever):
    memory = Memory(retriever, (exclude_same_task(), successes_only(), cap_per_type(1), top_k(3)), pool=2)
    assert len({e.task.type for e in memory.recall(standing())}) == 3


# Diversity


def greedy_mmr(scores, alike, k, weight):
    """The definition, written as plainly as can be."""
    taken = []
    while len(taken) < min(k, len(scores)):
        rest = [i for i in range(len(scores)) if i not in taken]
        worth = {i: round(weight * scores[i] - (1 - weight) * max([0.0, *(alike[i][j] for j in taken)]), 9) for i in rest}
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
    kept, dropped = mmr(k, lambda cs: alike, weight)(standing(), found)
    assert [c.hit.rank - 1 for c in kept] == greedy_mmr(scores, alike, k, weight) and len(kept) + len(dropped) == n


def test_mmr_prefers_another_procedure_and_says_so():
    same, twin, other = episode(1), episode(2), replace(episode(3), steps=(Step("pick up seed", "ok"), Step("wait", "ok")))
    found = candidates(same, twin, other)
    assert np.allclose(procedure_likeness(found)[0], [1, 1, 0])
    kept, dropped = mmr(2, weight=0.5)(standing(), found)
    assert [c.experience for c in kept] == [same, other] and "1.00 like one of them" in dropped[0].reason and "likeness 0.00" in kept[1].note


def test_likeness_of_vectors(retriever):
    hits = retriever.search(standing(), 4)
    found = [Candidate(h, retriever.store.get(h.id)) for h in hits]
    alike = vector_likeness(retriever)(found)
    assert np.allclose(np.diag(alike), 1, atol=1e-5) and np.array_equal(alike, alike.T)
    backwards = vector_likeness(retriever)(found[::-1])
    assert np.array_equal(backwards, alike[::-1, ::-1]), "rows belong to their candidates"
    with pytest.raises(ValueError, match="have no vector of letters@1"):
        vector_likeness(retriever)([Candidate(Hit("f" * 32, 1.0, 1), episode(1))])
    plain = Memory(retriever, (exclude_same_task(), successes_only(), top_k(3))).recall(standing())
    assert Memory(retriever, (exclude_same_task(), successes_only(), mmr(3, vector_likeness(retriever), 1.0))).recall(standing()).ids == plain.ids


# The budget


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(0, 400), st.sampled_from([None, 0, 2, 5]), st.permutations(["chat", "actions", "bare"]))
@settings(max_examples=60)
def test_a_budget_tells_briefly_before_it_drops(lengths, room, k, views):
    found = candidates(*(episode(i, steps=n) for i, n in enumerate(lengths)))
    kept, dropped = fit(room, words, views, k)(standing(), found)
    sizes = [[words(view(v)(c.experience)) for v in views] for c in found]
    assert sum(words(as_chosen(c.experience)) for c in kept) <= room
    left, taken = room, []  # what would be kept if all were told in their shortest view
    for i, size in enumerate(sizes):
        if min(size) <= left and (k is None or len(taken) < k):
            taken.append(i)
            left -= min(size)
    assert [c.hit.rank - 1 for c in kept] == taken and len(kept) + len(dropped) == len(found)
    slack = room - sum(words(as_chosen(c.experience)) for c in kept)
    for c in kept:  # nobody could be told more fully with what is left over
        now = views.index(c.experience.provenance["shown_as"])
        mine = sizes[c.hit.rank - 1]
        assert all(mine[better] - mine[now] > slack for better in range(now))
        assert c.experience.id == found[c.hit.rank - 1].experience.id


@given(st.lists(st.integers(1, 30), max_size=8), st.integers(0, 400), st.sampled_from([None, 0, 2, 5]))
@settings(max_examples=60)
def test_a_brief_view_is_the_last_resort(lengths, room, k):  # of an episode without a step the chat may be shorter than the list
    found = candidates(*(episode(i, steps=n) for i, n in enumerate(lengths)))
    whole, resort = fit(room, words, k=k)(standing(), found), fit(room, words, k=k, brief=["bare"])(standing(), found)
    assert {c.experience.provenance["shown_as"] for c in whole[0]} <= {"chat", "actions"}  # views that keep what was done
    assert [c.hit.id for c in whole[0]] == [c.hit.id for c in fit(room, words, ["actions"], k)(standing(), found)[0]]  # a chat never takes the place of a list
    expected = whole if whole[0] else fit(room, words, ["bare"], k)(standing(), found)
    assert [(c.hit.id, c.experience.provenance["shown_as"]) for c in resort[0]] == [(c.hit.id, c.experience.provenance["shown_as"]) for c in expected[0]]
    assert [d.id for d in resort[1]] == [d.id for d in expected[1]]


def test_a_budget_counts_each_text_once_and_only_when_needed():
    seen = []
    def count(text):
        seen.append(text)
        return words(text)
    found = candidates(*(episode(i, steps=3) for i in range(6)))
    fit(10**6, count, k=2, brief=["bare"])(standing(), found)
    assert len(seen) == len(set(seen)) == 4  # two views of the two that are kept


def test_a_budget_explains_itself_and_goes_with_the_prompt(retriever):
    prompt = pytest.importorskip("exprag.prompt")
    memory = Memory(retriever, (exclude_same_task(), successes_only(), fit(90, words, ("actions", "bare"), 3, label="words")), view="as_chosen")
    chosen = memory.recall(standing())
    assert {e.provenance["shown_as"] for e in chosen} == {"actions", "bare"} and "as bare:" in str(chosen.explain()) and "as actions it needs" in str(chosen.explain())
    text = prompt.PromptFormat(view="as_chosen").system("scienceworld", chosen.experiences)
    assert all(as_chosen(e) in text for e in chosen)
    assert json.loads(json.dumps(memory.describe())) == memory.describe()
    with pytest.raises(ValueError, match="give both the same view"):
        Memory(retriever, (fit(90, words),), view="actions")
    for wrong in ("actions", (), ("as_chosen",)):
        with pytest.raises(ValueError, match="give a list of one or more views"):
            fit(90, words, wrong)
    for wrong in ("bare", ("as_chosen",)):
        with pytest.raises(ValueError, match="perhaps one of brief views"):
            fit(90, words, brief=wrong)
    with pytest.raises(KeyError, match="nonsense"):
        fit(90, words, ("nonsense",))
    with pytest.raises(ValueError, match="no view of its own"):
        as_chosen(replace(episode(1), provenance={"shown_as": "as_chosen"}))
    assert as_chosen(episode(1)) == view("actions")(episode(1))


def test_adapted_experience_is_counted_as_it_is_read(store, retriever):
    store.add(episode(60, "grow-plant", goal="grow a apple plant from seed"))
    seen = []
    def count(text):
        seen.append(text)
        return 1
    memory = Memory(retriever, (exclude_same_task(), fit(9, count, ("actions", "bare"), 1)), "hard", view="as_chosen", adapted=True)
    assert [s.name for s in memory.stages] == ["exclude_same_task", "adapt_to_goal", "fit"]
    memory.recall(standing("grow-plant", goal="grow a lemon plant from seed"))
    assert any("lemon" in text for text in seen) and not any("apple" in text for text in seen)


# Abstention


def brute_force(judgements, threshold):
    return sum(max(-j.gain, 0) if j.score >= threshold else max(j.gain, 0) for j in judgements) / len(judgements)


number = st.integers(-10, 10).map(lambda i: i / 10)


@given(st.lists(st.tuples(st.sampled_from("abc"), number, number), min_size=1, max_size=12))
def test_the_threshold_has_the_least_regret(rows):
    judged = [Judgement(Task("w", kind, str(i), "dev"), score, gain) for i, (kind, score, gain) in enumerate(rows)]
    found = calibrate(judged)
    everywhere = [*found.thresholds, *(j.score for j in judged), -2, 2]
    assert brute_force(judged, found.threshold) == pytest.approx(min(brute_force(judged, t) for t in everywhere))
    assert found.regret == pytest.approx([brute_force(judged, t) for t in found.thresholds])
    assert found.threshold == pytest.approx(min(t for t, r in zip(found.thresholds, found.regret) if r <= min(found.regret) + 1e-9)), "in doubt, remember"
    assert calibrate(judged[::-1]) == found or len({k for k, *_ in rows}) == 1, "the order does not matter"


def test_held_out_is_judged_by_the_others():
    rows = [("a", 0.9, 1.0), ("a", 0.2, -1.0), ("b", 0.5, 1.0), ("b", 0.1, -1.0)]
    judged = [Judgement(Task("w", k, str(i), "dev"), s, g) for i, (k, s, g) in enumerate(rows)]
    found = calibrate(judged)
    assert min(found.regret) == 0 and 0.2 < found.threshold < 0.5
    # a chooses 0.55, which shuts out b's 0.5; b chooses 0.3, which is right for a
    assert found.held_out == pytest.approx(1 / 4)
    assert found.describe()["always"] == 0.5 and found.describe()["never"] == 0.5 and json.dumps(found.describe())


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


def test_judging_and_abstaining(retriever):
    experts = [episode(60 + i, t, "dev") for t in ("boil", "melt", "grow-plant") for i in range(2)]
    memory = Memory(retriever, (exclude_same_task(), successes_only(), top_k(2), order("nearest_last")))
    judged = judge(memory, experts, lambda experience, mine: 1.0 if experience.task.type == mine.task.type else -1.0)
    assert [j.task for j in judged] == [e.task for e in experts] and all(j.score == max(h.score for h in memory.recall(standing(j.task.type, j.task.variation)).hits) for j in judged)
    assert judge(Memory(retriever, composition="empty"), experts, lambda a, b: 1.0) == []
    found = calibrate([*judged, Judgement(Task("w", "far", "1", "dev"), 0.3, -1.0)])
    assert isinstance(found, Calibration) and "6 tasks" not in repr(found) and "7 tasks" in repr(found)
    careful = Memory(retriever, (exclude_same_task(), near_enough(found), top_k(2)))
    assert len(careful.recall(standing())) == 2
    nothing = careful.recall(standing(goal="zzzz zzz"))
    assert len(nothing) == 0 and {d.stage for d in nothing.dropped} == {"near_enough"} and "is below" in str(nothing.explain())
    assert near_enough(found).describe()["calibration"] == found.describe()["tasks_hash"] and "calibration" not in near_enough(0.5).describe()


def test_abstention_does_not_read_the_whole_bank(retriever, monkeypatch):
    asked = []
    search = retriever.search
    monkeypatch.setattr(retriever, "search", lambda t, n, allow: asked.append(n) or search(t, n, allow))
    Memory(retriever, (near_enough(2.0), top_k(2)), pool=3).recall(standing())
    assert asked == [3]


# Utility


outcome = st.tuples(st.integers(0, 20), st.sampled_from("ab"), st.lists(st.sampled_from("xyz"), max_size=3), st.integers(0, 7).map(lambda i: i / 7))


@given(st.lists(outcome, max_size=12, unique_by=lambda o: o[0]), st.randoms())
def test_utility_is_a_function_of_the_set(rows, random):
    def learn(rows):
        found = Outcomes()
        for number, kind, used, value in rows:
            assert found.record(str(number), kind, used, value)
        return found
    shuffled = random.sample(rows, len(rows))
    first, second = learn(rows), learn(shuffled)
    for number, kind, used, value in shuffled:
        assert not second.record(str(number), kind, used, value), "told twice is told once"
    half = len(rows) // 2
    merged = learn(shuffled[:half]).merge(learn(shuffled[half:])).merge(learn(rows[:half]))
    assert first.utilities() == second.utilities() == merged.utilities()
    usual = {k: np.mean([v for _, kind, _, v in rows if kind == k]) for k in "ab" if any(kind == k for _, kind, _, _ in rows)}
    for id, utility in first.utilities().items():
        mine = [v - usual[kind] for _, kind, used, v in rows if id in used]
        assert utility.outcomes == len(mine) and utility.value == pytest.approx(sum(mine) / (4 + len(mine)))
        assert -1 <= utility.value <= 1


def test_outcomes_on_disk(tmp_path):
    made = Outcomes(doubt=2.0)
    made.record("e1", "t", ["x", "y"], 1.0)
    made.record("e2", "t", [], 0.0)
    made.save(tmp_path / "o.json")
    again = Outcomes.load(tmp_path / "o.json")
    assert again.kept == made.kept and again.doubt == 2.0 and again.utilities() == {"x": Utility(0.5 / 3, 1), "y": Utility(0.5 / 3, 1)}
    made.save(tmp_path / "o.json")
    assert [p.name for p in tmp_path.iterdir()] == ["o.json"]
    (tmp_path / "o.json").write_text((tmp_path / "o.json").read_text()[:-9])
    with pytest.raises(ValueError, match="does not hold outcomes"):
        Outcomes.load(tmp_path / "o.json")
    for text in ("[]", "{}", '{"doubt": 4, "outcomes": {"a": 1}}'):
        (tmp_path / "o.json").write_text(text)
        with pytest.raises(ValueError, match="o.json"):
            Outcomes.load(tmp_path / "o.json")


def test_outcomes_refuse_contradictions_and_nonsense():
    made = Outcomes()
    made.record("e", "t", ["x"], 1.0)
    with pytest.raises(ValueError, match="find out which is right"):
        made.record("e", "t", ["x"], 0.0)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            made.record("f", "t", [], wrong)
    with pytest.raises(ValueError, match="positive"):
        Outcomes(doubt=0)


def test_utility_reorders_and_ignorance_does_not(retriever):
    plain = Memory(retriever, (exclude_same_task(), successes_only(), top_k(3))).recall(standing())
    with_stage = lambda values, weight: Memory(retriever, (exclude_same_task(), successes_only(), by_utility(values, weight), top_k(3))).recall(standing())
    assert with_stage({}, 1.0).ids == plain.ids == with_stage({plain.ids[2]: 0.9}, 0.0).ids
    chosen = with_stage({plain.ids[2]: Utility(0.9, 5)}, 0.8)
    assert chosen.ids[0] == plain.ids[2] and "utility +0.90" in str(chosen.explain())
    assert by_utility({"a": 0.1}).describe() != by_utility({"a": 0.2}).describe() and by_utility({"a": Utility(0.1, 3)}).describe() == by_utility({"a": 0.1}).describe()
    assert z_scores([]).shape == (0,) and (z_scores([2.0, 2.0]) == 0).all() and z_scores([1, 3]).tolist() == [-1, 1]


# All stages together


@given(many, st.permutations([with_failures(1), cap_per_type(2), mmr(4), near_enough(0.93), by_utility({f"{3:032x}": 1.0}), fit(80, words, ("actions", "bare"))]))
@settings(max_examples=60)
def test_in_any_order_everybody_is_kept_or_dropped_once(rows, stages):
    found = made(rows)
    kept, dropped = run_stages(stages, standing(), found)
    assert sorted([c.hit.id for c in kept] + [d.id for d in dropped]) == sorted(c.hit.id for c in found)
    assert run_stages(stages, standing(), found) == (kept, dropped)


def test_bad_settings():
    for wrong in (lambda: with_failures(-1), lambda: cap_per_type(0), lambda: mmr(-1), lambda: mmr(1, weight=1.5), lambda: by_utility({}, -1)):
        with pytest.raises(ValueError, match=r"\("):
            wrong()


# Display


class Seen(HTMLParser):
    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = set(), set(), []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data): self.text.append(data)
    def handle_comment(self, data): self.tags.add("!comment")
    def handle_decl(self, data): self.tags.add("!declaration")


nasty = st.one_of(st.text(max_size=30), st.sampled_from(["<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>", '" onmouseover="x', "<!-- ", "]]>", "&lt;b&gt;", "$x$"]))


@given(nasty, nasty, nasty)
def test_text_stays_text(goal, action, observation):
    shown = Trajectory(Task("w", "<b>t", "1", "train"), goal, observation, (Step(action, observation),), 1.0, True)
    selection = Selection((shown,), (Hit("<i>" + "0" * 29, 0.5, 1),), (), (action,))
    for thing in (shown, selection, [shown, shown], selection.explain()):
        seen = Seen(look(thing)._repr_html_())
        assert seen.tags <= {"table", "tr", "th", "td", "details", "summary", "b", "br", "p"} and seen.attributes <= {"style", "class", "open"}
    whole = "".join(Seen(look(shown).markup).text)
    for text in (goal, action, observation):  # a parser reads back what went in, but for characters that HTML has no place for
        assert text.replace("\r\n", "\n").replace("\r", "\n") in whole.replace("\r\n", "\n").replace("\r", "\n") or "\0" in text


def test_look_at_everything(retriever):
    chosen = Memory(retriever).recall(standing())
    assert look(chosen).text == repr(chosen.explain()) and look(chosen).markup.count("<details") == 2
    assert "more</p>" in look(chosen.explain(1)).markup and "not near" not in look(chosen).markup
    assert look(chosen.hits).markup == look(list(chosen.hits)).markup and chosen.ids[0][:8] in look(chosen.hits[0]).markup
    assert "nothing" in look([]).markup and repr(look([])) == "nothing" and "unfinished" in repr(look(standing()))
