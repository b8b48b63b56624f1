"Ablations: every combination on every task, effects and shares, what can be read, and the saved figures."
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import WordEncoder
from exprag.memory.hybrid import WordRetriever
from exprag.query import Retriever
from exprag.select import composition
from exprag.statistics import Bootstrap, compare
from exprag.store import Store
from exprag.studies.ablation import (
    Ablation, CachedRetriever, Reader, effects, effects_table, factorial, interaction,
    plot_effects, ranking_quality, read_ablations, readable_steps, shares, write_ablations)
from exprag.trajectory import Step, Task, Trajectory, read_jsonl
from exprag.views import Cursor, Experience, load_view, register_view, render

FEW = Bootstrap(draws=20)
DECISIVE, EXTRACT, WINDOW = (f"exprag.memory.excerpts:{name}" for name in ("decisive", "extract", "window"))
DATA = Path(__file__).resolve().parents[1] / "nbs" / "data"


@pytest.fixture(scope="module")
def episodes():
    return [e for e in read_jsonl(DATA / "sample.jsonl")[0] if e.success]


@pytest.fixture
def store(tmp_path, episodes):
    with Store(tmp_path / "bank.db") as made:
        made.add_many(episodes)
        yield made


@pytest.fixture
def cached(store):
    return CachedRetriever(Retriever(store, WordEncoder()), lambda task: composition(store, "all", task))


def episode(kind="boil", variation="0", actions=("look around",), fold="dev") -> Trajectory:
    return Trajectory(Task("scienceworld", kind, variation, fold), "goal", "o", tuple(Step(a, "x") for a in actions)).finish(100, True)


EPISODES = [episode(kind, v) for kind in ("boil", "melt", "freeze") for v in ("0", "1")]


def ablation(values) -> Ablation:
    return Ablation({"a": ("usual", "other"), "b": ("usual", "other", "third")}, tuple(e.task for e in EPISODES), {"worth": np.asarray(values, float)})


class TestFactorial:
    def test_every_combination_meets_every_task_once(self):
        seen = []
        def measure(e, a, b):
            seen.append((e.task, a, b))
            return {"sum": a + b + int(e.task.variation)}
        made = factorial({"a": {"one": 1, "two": 2}, "b": {"ten": 10, "twenty": 20, "forty": 40}}, EPISODES, measure)
        assert len(seen) == len(set(seen)) == 36 and made.values["sum"].shape == (2, 3, 6)
        assert made.at("sum", a="two", b="forty").tolist() == [42, 43] * 3
        assert made.at("sum", a="one").tolist() == pytest.approx([1 + 70 / 3, 2 + 70 / 3] * 3)

    def test_outcomes_pair_the_tasks(self):
        made = ablation(np.arange(36).reshape(2, 3, 6))
        gap = compare(made.outcomes("worth", a="other"), made.outcomes("worth", a="usual"), how=Bootstrap(draws=200)).gap
        assert (gap.estimate, gap.low, gap.high) == pytest.approx((18, 18, 18))  # the same in every task: no doubt is left

    def test_only_keeps_some_tasks(self):
        made = ablation(np.arange(36).reshape(2, 3, 6)).only(lambda t: t.type == "melt")
        assert {t.type for t in made.tasks} == {"melt"} and made.at("worth", a="usual", b="usual").tolist() == [2, 3]

    @pytest.mark.parametrize("ask, message", [
        (lambda s: s.at("price"), "measure of this ablation"), (lambda s: s.at("worth", c="x"), "no factor 'c'; it has a, b"),
        (lambda s: s.at("worth", a="nobody"), "level of a"), (lambda s: s.only(lambda t: False), "none of the 6 tasks"),
        (lambda s: effects(s, "worth", ["c"]), "factor of this ablation"), (lambda s: shares(s, "price"), "measure of this ablation")])
    def test_what_is_not_there_is_named(self, ask, message):
        with pytest.raises(ValueError, match=message): ask(ablation(np.zeros((2, 3, 6))))

    @pytest.mark.parametrize("factors, tasks, message", [
        ({}, EPISODES, "needs factors"), ({"a": {}}, EPISODES, "needs factors"), ({"a": {"x": 1}}, [], "at least one"), ({"a": {"x": 1}}, EPISODES[:1] * 2, "2 episodes of 1 tasks")])
    def test_no_ablation_without_levels_or_with_a_task_twice(self, factors, tasks, message):
        with pytest.raises(ValueError, match=message): factorial(factors, tasks, lambda e, a: {"x": 1})


ARRAYS = st.lists(st.integers(-5, 5), min_size=36, max_size=36).map(lambda v: np.reshape(v, (2, 3, 6)))


class TestEffects:
    @settings(deadline=None, max_examples=30)
    @given(ARRAYS)
    def test_shares_add_up_to_one_in_two_factors(self, values):
        made = shares(ablation(values), "worth", draws=20)
        total = sum(x.estimate for x in made.values())
        assert set(made) == {("a",), ("b",), ("a", "b")} and all(x.estimate >= -1e-9 for x in made.values())
        assert total == pytest.approx(1) or np.ptp(values.mean(-1)) < 1e-9 and total == 0

    @settings(deadline=None, max_examples=30)
    @given(ARRAYS)
    def test_effects_and_interactions_are_differences_of_means(self, values):
        made, v = ablation(values), values.mean(-1)
        assert effects(made, "worth", how=FEW)["a", "other"].gap.estimate == pytest.approx(v[1].mean() - v[0].mean())
        assert effects(made, "worth", ["b"], how=FEW)["b", "third"].gap.estimate == pytest.approx(v[:, 2].mean() - v[:, 0].mean())
        x = interaction(made, "worth", ("a", "other", "usual"), ("b", "third", "usual"), how=FEW)
        assert x.estimate == pytest.approx((v[1, 2] - v[0, 2]) - (v[1, 0] - v[0, 0]))

    def test_a_factor_that_alone_matters_has_the_whole_share(self):
        values = np.zeros((2, 3, 6)); values[:, 1] = 1
        made = shares(ablation(values), "worth", draws=50)
        assert made["b",].estimate == pytest.approx(1) and made["b",].low == pytest.approx(1)
        assert made["a",].estimate == pytest.approx(0) and made["a", "b"].estimate == pytest.approx(0)

    def test_types_weigh_the_same_however_many_episodes_they_have(self):
        tasks = (*(e.task for e in EPISODES[:3]),)  # boil twice, melt once
        made = Ablation({"a": ("usual", "other")}, tasks, {"worth": np.array([[0, 0, 0], [1, 1, 4]], float)})
        assert effects(made, "worth", how=FEW)["a", "other"].gap.estimate == 2.5

    def test_table_and_figure_show_each_effect(self):
        import matplotlib.pyplot as plt
        found_ = effects(ablation(np.random.default_rng(0).random((2, 3, 6))), "worth", how=FEW)
        table = effects_table(found_)
        assert [row[1] for row in table.rows] == ["other for usual", "other for usual", "third for usual"] and "Holm" in table.caption
        figure, axis = plt.subplots()
        plot_effects(axis, found_)
        assert [t.get_text() for t in axis.get_yticklabels()] == ["a: other for usual", "b: other for usual", "b: third for usual"]
        plt.close(figure)


def longest(actions, lines):
    "The longest common subsequence, naively."
    if not actions or not lines: return 0
    if actions[0] == lines[0]: return 1 + longest(actions[1:], lines[1:])
    return max(longest(actions[1:], lines), longest(actions, lines[1:]))


class TestReadable:
    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abcx"), max_size=6))
    def test_as_many_steps_as_can_be_in_order(self, actions, lines):
        steps = readable_steps("\n".join(lines), episode(actions=actions))
        assert len(steps) == longest(actions, lines) and list(steps) == sorted(set(steps))

    def test_whole_words_only(self):
        one = episode(actions=("open door", "look at cup"))
        assert readable_steps("> open doorway\n> look at cup", one) == (1,) and readable_steps("> open door | The door is open.", one) == (0,)

    def test_full_views_keep_everything_and_a_goal_nothing(self, episodes):
        for e in episodes:
            for name in ("chat", "actions", "numbered"): assert readable_steps(render(e, name), e) == tuple(range(len(e)))
            assert len(readable_steps(e.goal, e)) == 0 and len(readable_steps(render(e, DECISIVE), e)) <= len(e)


class TestReader:
    def test_one_that_knows_everything_reads_all(self, episodes):
        reader = Reader(len)
        for e in episodes:
            assert reader.read(e, [e], "chat") == {"best": 1, "mean": 1, "task actions": 1, "tokens": len(render(e, "chat")), "shown": 1}
            assert reader.kept(e, "actions")["actions"] == reader.kept(e, "actions")["task actions"] == 1

    def test_nothing_selected_is_nothing_read(self, episodes):
        assert Reader(len).read(episodes[0], [], "actions") == {"best": 0, "mean": 0, "task actions": 0, "tokens": 0, "shown": 0}

    def test_a_view_of_ones_own_is_judged_by_its_text(self, episodes, monkeypatch):
        monkeypatch.setattr("exprag.views._VIEWS", {})
        register_view("first half", lambda e: "\n".join(e.actions[:len(e) // 2]))
        e = max(episodes, key=len)
        assert Reader(len).kept(e, "first half")["actions"] == (len(e) // 2) / len(e)

    def test_an_experience_that_names_its_view_is_read_in_it(self, episodes):
        reader, e = Reader(len), max(episodes, key=len)
        assert reader.reading(Experience(e, view=EXTRACT), "chat").steps == reader.reading(e, EXTRACT).steps != reader.reading(e, "chat").steps

    def test_windows_of_one_episode_are_different_readings(self, episodes):
        reader, e = Reader(len), max(episodes, key=len)
        first, last = (reader.reading(Experience(e, cursor=Cursor(done=n)), WINDOW) for n in (0, len(e) - 1))
        assert first.steps != last.steps


class TestCachedRetriever:
    def test_a_task_never_gets_itself(self, cached, episodes):
        for e in episodes:
            assert all(cached.get(h.id).task != e.task for h in cached.search(e.opening(), 50)) and e.id not in cached.allow(e.task)

    def test_a_question_is_asked_once(self, cached, episodes, monkeypatch):
        cached.search(episodes[0].opening())
        monkeypatch.setattr(cached.retriever, "search", None)
        assert cached.search(episodes[0].opening(), 3) == cached.search(episodes[0].opening(), 5)[:3]

    def test_relative_scores_keep_the_order_and_begin_at_one(self, store, episodes):
        index = lambda task: composition(store, "all", task)
        plain, relative = (CachedRetriever(WordRetriever(store), index, relative=r) for r in (False, True))
        for e in episodes[:3]:
            a, b = (x.search(e.opening()) for x in (plain, relative))
            assert [h.id for h in a] == [h.id for h in b] and (not b or b[0].score == 1 and min(h.score for h in b) >= 0)

    def test_what_it_finds_is_experience(self, cached, episodes):
        hit, = cached.search(episodes[0].opening(), 1)
        assert cached.fetch(hit) == Experience(cached.get(hit.id), hit) and cached.describe()["relative"] is False

    def test_ranking_quality_agrees_with_the_chapter_on_quality(self, cached, store, episodes):
        from exprag.studies.quality import by_retriever, retrieval_quality
        theirs = retrieval_quality(by_retriever(Retriever(store, WordEncoder())), episodes[:4], store, k=2)
        for e, q in zip(episodes, theirs):
            assert ranking_quality(e, cached, 2) == pytest.approx({"nDCG": q.ndcg, "type precision": q.type_precision, "relevance": q.relevance, "gap": q.gap})


class TestFiles:
    def test_round_trip_beside_what_is_there(self, tmp_path):
        path, a, b = tmp_path / "a.json.xz", ablation(np.random.default_rng(1).random((2, 3, 6))), ablation(np.zeros((2, 3, 6)))
        write_ablations(path, {"a": a})
        write_ablations(path, {"b": b})
        back = read_ablations(path)
        assert set(back) == {"a", "b"} and back["a"].tasks == a.tasks and dict(back["a"].factors) == dict(a.factors)
        assert np.allclose(back["a"].values["worth"], a.values["worth"], atol=5e-4) and [p.name for p in tmp_path.iterdir()] == ["a.json.xz"]

    def test_the_saved_ablations_hold_dev_tasks_and_train_experience_only(self, script):
        for name, a in read_ablations(DATA / "ablation.json.xz").items():
            assert {t.fold for t in a.tasks} == {"train" if name == "storage" else "dev"}
            assert all(v.shape == (*map(len, a.factors.values()), len(a.tasks)) and np.isfinite(v).all() for v in a.values.values())
        assert {e.task.fold for e in script.read_episodes("ablation_alfworld.jsonl.xz")} == {"train", "dev"}

    def test_the_saved_ablations_can_be_measured_again(self, script):
        "One level of the ablation of storage, anew from the episodes."
        storage = read_ablations(DATA / "ablation.json.xz")["storage"]
        there = {e.task: e for name in ("experience", "ablation_alfworld") for e in script.read_episodes(f"{name}.jsonl.xz")}
        kept = dict(zip(storage.tasks, storage.at("task actions", view="extract")))
        for t in storage.tasks[::20]: assert Reader(len).kept(there[t], EXTRACT)["task actions"] == pytest.approx(kept[t], abs=1e-3)

    def test_the_script_says_what_it_does(self, script):
        assert "collect" in script.__doc__ and "measure" in script.__doc__


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ablation_script", DATA / "ablation.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
