"Studies: every combination on every task, effects and shares, what can be read, what comes next, and the saved figures."
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import WordEncoder
from exprag.environment import Panel, side
from exprag.hybrid import WordRetriever
from exprag.query import Retriever
from exprag.samples import LeakError
from exprag.select import composition
from exprag.sft import Manifest
from exprag.situations import Every, Once, PlaceRetriever
from exprag.statistics import compare
from exprag.store import VIEWS, Store
from exprag.study import (AHEAD, CHOICES, LIVE, Asked, Choice, Reader, Study, beginning, effects, effects_table, factorial, followed, found,
                          interaction, lived, main, plot_effects, procedure_hits, read_packed, read_studies, readable, shares, write_studies)
from exprag.trajectory import Step, Task, Trajectory, read_jsonl
from exprag.views import view

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
def asked(store):
    return Asked(Retriever(store, WordEncoder()), lambda task: composition(store, "all", task))


def episode(kind="boil", variation="0", actions=("look around",), fold="dev") -> Trajectory:
    return Trajectory(Task("scienceworld", kind, variation, fold), "goal", "o", tuple(Step(a, "x") for a in actions)).finish(100, True)


EPISODES = [episode(kind, v) for kind in ("boil", "melt", "freeze") for v in ("0", "1")]


def study(values) -> Study:
    return Study({"a": ("usual", "other"), "b": ("usual", "other", "third")}, tuple(e.task for e in EPISODES), {"worth": np.asarray(values, float)})


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
        made = study(np.arange(36).reshape(2, 3, 6))
        gap = compare(made.outcomes("worth", a="other"), made.outcomes("worth", a="usual"), draws=200).gap
        assert (gap.estimate, gap.low, gap.high) == pytest.approx((18, 18, 18))  # the same in every task: no doubt is left

    def test_only_keeps_some_tasks(self):
        made = study(np.arange(36).reshape(2, 3, 6)).only(lambda t: t.type == "melt")
        assert {t.type for t in made.tasks} == {"melt"} and made.at("worth", a="usual", b="usual").tolist() == [2, 3]

    @pytest.mark.parametrize("ask, message", [
        (lambda s: s.at("price"), "measure of this study"), (lambda s: s.at("worth", c="x"), "no factor 'c'; it has a, b"),
        (lambda s: s.at("worth", a="nobody"), "level of a"), (lambda s: s.only(lambda t: False), "none of the 6 tasks"),
        (lambda s: effects(s, "worth", ["c"]), "factor of this study"), (lambda s: shares(s, "price"), "measure of this study")])
    def test_what_is_not_there_is_named(self, ask, message):
        with pytest.raises(ValueError, match=message): ask(study(np.zeros((2, 3, 6))))

    @pytest.mark.parametrize("factors, tasks, message", [
        ({}, EPISODES, "needs factors"), ({"a": {}}, EPISODES, "needs factors"), ({"a": {"x": 1}}, [], "at least one"), ({"a": {"x": 1}}, EPISODES[:1] * 2, "2 episodes of 1 tasks")])
    def test_no_study_without_levels_or_with_a_task_twice(self, factors, tasks, message):
        with pytest.raises(ValueError, match=message): factorial(factors, tasks, lambda e, a: {"x": 1})


ARRAYS = st.lists(st.integers(-5, 5), min_size=36, max_size=36).map(lambda v: np.reshape(v, (2, 3, 6)))


class TestEffects:
    @settings(deadline=None, max_examples=30)
    @given(ARRAYS)
    def test_shares_add_up_to_one_in_two_factors(self, values):
        made = shares(study(values), "worth", draws=20)
        total = sum(x.estimate for x in made.values())
        assert set(made) == {("a",), ("b",), ("a", "b")} and all(x.estimate >= -1e-9 for x in made.values())
        assert total == pytest.approx(1) or np.ptp(values.mean(-1)) < 1e-9 and total == 0

    @settings(deadline=None, max_examples=30)
    @given(ARRAYS)
    def test_effects_and_interactions_are_differences_of_means(self, values):
        made, v = study(values), values.mean(-1)
        assert effects(made, "worth", draws=20)["a", "other"].gap.estimate == pytest.approx(v[1].mean() - v[0].mean())
        assert effects(made, "worth", ["b"], draws=20)["b", "third"].gap.estimate == pytest.approx(v[:, 2].mean() - v[:, 0].mean())
        x = interaction(made, "worth", ("a", "other", "usual"), ("b", "third", "usual"), draws=20)
        assert x.estimate == pytest.approx((v[1, 2] - v[0, 2]) - (v[1, 0] - v[0, 0]))

    def test_a_factor_that_alone_matters_has_the_whole_share(self):
        values = np.zeros((2, 3, 6)); values[:, 1] = 1
        made = shares(study(values), "worth", draws=50)
        assert made["b",].estimate == pytest.approx(1) and made["b",].low == pytest.approx(1)
        assert made["a",].estimate == pytest.approx(0) and made["a", "b"].estimate == pytest.approx(0)

    def test_types_weigh_the_same_however_many_episodes_they_have(self):
        tasks = (*(e.task for e in EPISODES[:3]),)  # boil twice, melt once
        made = Study({"a": ("usual", "other")}, tasks, {"worth": np.array([[0, 0, 0], [1, 1, 4]], float)})
        assert effects(made, "worth", draws=50)["a", "other"].gap.estimate == 2.5

    def test_table_and_figure_show_each_effect(self):
        import matplotlib.pyplot as plt
        found_ = effects(study(np.random.default_rng(0).random((2, 3, 6))), "worth", draws=100)
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
        steps = readable("\n".join(lines), episode(actions=actions))
        assert len(steps) == longest(actions, lines) and list(steps) == sorted(set(steps))

    def test_whole_words_only(self):
        one = episode(actions=("open door", "look at cup"))
        assert readable("> open doorway\n> look at cup", one) == (1,) and readable("> open door | The door is open.", one) == (0,)

    def test_full_views_keep_everything_and_a_goal_nothing(self, episodes):
        for e in episodes:
            for name in ("chat", "actions", "numbered"): assert readable(view(name)(e), e) == tuple(range(len(e)))
            assert len(readable(e.goal, e)) == 0 and len(readable(view("decisive")(e), e)) <= len(e)


class TestReader:
    def test_one_that_knows_everything_reads_all(self, episodes):
        reader = Reader(len)
        for e in episodes:
            assert reader.read(e, [e], "chat") == {"best": 1, "mean": 1, "deeds": 1, "tokens": len(view("chat")(e)), "shown": 1}
            assert reader.kept(e, "actions")["actions"] == reader.kept(e, "actions")["deeds"] == 1

    def test_nothing_selected_is_nothing_read(self, episodes):
        assert Reader(len).read(episodes[0], [], "actions") == {"best": 0, "mean": 0, "deeds": 0, "tokens": 0, "shown": 0}

    def test_a_view_of_ones_own_is_judged_by_its_text(self, episodes, monkeypatch):
        monkeypatch.setitem(VIEWS, "first half", lambda t: "\n".join(t.actions[:len(t) // 2]))
        e = max(episodes, key=len)
        assert Reader(len).kept(e, "first half")["actions"] == (len(e) // 2) / len(e)

    def test_windows_of_one_episode_are_different_sheets(self, episodes):
        from exprag.views import pointed
        reader, e = Reader(len), max(episodes, key=len)
        assert reader.sheet(pointed(e, 0), "window").steps != reader.sheet(pointed(e, len(e) - 1), "window").steps


class TestAsked:
    def test_a_task_never_gets_itself(self, asked, episodes):
        for e in episodes:
            assert all(asked.get(h.id).task != e.task for h in asked.search(beginning(e), 50)) and e.id not in asked.allow(e.task)

    def test_a_question_is_asked_once(self, asked, episodes, monkeypatch):
        asked.search(beginning(episodes[0]))
        monkeypatch.setattr(asked.retriever, "search", None)
        assert asked.search(beginning(episodes[0]), 3) == asked.search(beginning(episodes[0]), 5)[:3]

    def test_relative_scores_keep_the_order_and_begin_at_one(self, store, episodes):
        index = lambda task: composition(store, "all", task)
        plain, relative = (Asked(WordRetriever(store), index, relative=r) for r in (False, True))
        for e in episodes[:3]:
            a, b = (x.search(beginning(e)) for x in (plain, relative))
            assert [h.id for h in a] == [h.id for h in b] and (not b or b[0].score == 1 and min(h.score for h in b) >= 0)

    def test_the_beginning_knows_nothing_of_what_came_later(self, episodes):
        now = beginning(episodes[0], 2)
        assert len(now) == 2 and now.score is None and now.success is None and not now.provenance and beginning(now) == beginning(episodes[0])

    def test_found_agrees_with_the_chapter_on_quality(self, asked, store, episodes):
        from exprag.quality import by_retriever, retrieval_quality
        theirs = retrieval_quality(by_retriever(Retriever(store, WordEncoder())), episodes[:4], store, k=2)
        for e, q in zip(episodes, theirs):
            assert found(e, asked, 2) == pytest.approx({"nDCG": q.ndcg, "type precision": q.type_precision, "relevance": q.relevance, "gap": q.gap})


class TestFollowed:
    def test_a_twin_is_followed_to_the_end(self, tmp_path):
        actions = ["go to kitchen", "open cupboard", "pick up pot", "activate stove", "focus on water", "wait"]
        with Store(tmp_path / "s.db") as store:
            twin = replace(episode(variation="3", actions=actions, fold="train"), goal="boil water")
            store.add(twin)
            e = replace(episode(variation="15", actions=actions), goal="boil water")
            for retriever in (Retriever(store, WordEncoder()), PlaceRetriever(store, WordEncoder(), "history", "history")):
                got = followed(e, Asked(retriever, lambda task: store.find()), Every(1), 1)
                assert got["somewhere"] == 1 and got["asked"] == 1
            assert followed(e, Asked(Retriever(store, WordEncoder()), lambda task: store.find()), Once(), 1) == {"next": 1, "somewhere": 1, "asked": 1 / 6, "rebuilt": 0}

    def test_nothing_found_is_worth_nothing(self, asked, episodes):
        got = followed(episodes[0], Asked(asked.retriever, lambda task: []), Every(1))
        assert got["next"] == got["somewhere"] == got["rebuilt"] == 0

    def test_whoever_looks_anywhere_sees_no_less(self, asked, episodes):
        for e in episodes[:3]:
            got = followed(e, asked, Every(AHEAD))
            assert 0 <= got["next"] <= got["somewhere"] <= 1


class TestFiles:
    def test_round_trip_beside_what_is_there(self, tmp_path):
        path, a, b = tmp_path / "s.json.xz", study(np.random.default_rng(1).random((2, 3, 6))), study(np.zeros((2, 3, 6)))
        write_studies(path, {"a": a}, {"note": 1})
        write_studies(path, {"b": b})
        back, notes = read_studies(path)
        assert set(back) == {"a", "b"} and notes == {"note": 1} and back["a"].tasks == a.tasks and dict(back["a"].factors) == dict(a.factors)
        assert np.allclose(back["a"].values["worth"], a.values["worth"], atol=5e-4) and [p.name for p in tmp_path.iterdir()] == ["s.json.xz"]

    def test_saved_studies_hold_dev_tasks_and_train_experience_only(self):
        studies, notes = read_studies(DATA / "study.json.xz")
        for name, s in studies.items():
            assert {t.fold for t in s.tasks} == {"train" if name == "storage" else "dev"}
            assert all(v.shape == (*map(len, s.factors.values()), len(s.tasks)) and np.isfinite(v).all() for v in s.values.values())
        assert {e.task.fold for e in read_packed(DATA / "study_alfworld.jsonl.xz")} == {"train", "dev"}

    def test_saved_studies_can_be_measured_again(self):
        "One combination of the study of storage, anew from the episodes."
        studies, _ = read_studies(DATA / "study.json.xz")
        there = {e.task: e for name in ("experience", "study_alfworld") for e in read_packed(DATA / f"{name}.jsonl.xz")}
        tasks = studies["storage"].tasks[::20]
        kept = dict(zip(studies["storage"].tasks, studies["storage"].at("deeds", view="extract")))
        for t in tasks: assert Reader(len).kept(there[t], "extract")["deeds"] == pytest.approx(kept[t], abs=1e-3)

    def test_saved_policy_results_are_of_easy_dev_tasks(self):
        policy = json.loads((DATA / "study_policy.json").read_text("utf-8"))
        tasks = [Task.parse(t) for t in policy["tasks"]] + [Task.parse(row[0]) for rows in policy["lived"].values() for row in rows]
        assert {(t.fold, side(t.type)) for t in tasks} == {("dev", "easy")} and policy["policy"]["weights"]
        for name, record in policy["taught"].items():
            assert name in CHOICES and len(record["tokens"]) == len(record["deeds"]) == len(policy["tasks"])
        assert set(policy["lived"]) <= set(LIVE) <= set(CHOICES)

    def test_the_script_says_what_it_does(self):
        spec = importlib.util.spec_from_file_location("study_script", DATA / "study.py")
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        assert "collect" in script.__doc__ and "measure" in script.__doc__


def test_procedure_hits_are_procedure_accuracy_by_episode(episodes):
    from exprag.agent import HFPolicy
    from exprag.evaluation import procedure_accuracy
    some = sorted(episodes, key=len)[:3]
    if len({e.task.type for e in some}) < 2: some[-1] = next(e for e in sorted(episodes, key=len) if e.task.type != some[0].task.type)
    policy = HFPolicy.from_pretrained("nano", batch_size=1)
    hits = procedure_hits(policy, some, [()] * len(some))
    whole = procedure_accuracy(policy, some, lambda t: ())
    assert sum(a for _, a in hits) == whole.actions and sum(h for h, _ in hits) / whole.actions == pytest.approx(whole.none)


def test_choices_recall_what_they_say(store, episodes):
    encoder = WordEncoder()
    for name, choice in CHOICES.items():
        made = choice.recall(store, encoder, episodes).recall(beginning(episodes[0]))
        assert len(made) <= choice.k and (len(made) == 0) == (choice.memory == "none") and choice.format().view == choice.view, name
        assert all(e.task != episodes[0].task for e in made), name
    assert len(Choice(k=1).recall(store, encoder).recall(beginning(episodes[0]))) == 1


MELT = Task("scienceworld", "melt", "14", "dev")


def adapter_of(folder, tasks=(), kind="adapter"):
    (folder / "adapter").mkdir(parents=True)
    Manifest(kind, "planted", tuple(tasks)).write(folder)
    return str(folder / "adapter")


@pytest.mark.parametrize("task", [MELT, replace(MELT, variation="15"), Task("scienceworld", "grow-plant", "0", "train")])
def test_an_adapter_that_saw_dev_or_hard_tasks_is_refused_before_it_is_asked_anything(tmp_path, task, monkeypatch):
    monkeypatch.setattr("exprag.study.load_model", None)
    with pytest.raises(LeakError, match=rf"adapter 'planted': .*{task.type}"):
        main([str(DATA), "--adapter", adapter_of(tmp_path / "run", [task]), "--live", "0"])


def test_an_adapter_that_saw_easy_train_tasks_is_let_in(tmp_path, monkeypatch):
    def load(model, adapter): raise InterruptedError(adapter)
    monkeypatch.setattr("exprag.study.load_model", load)
    saw = replace(MELT, variation="0", fold="train")
    with pytest.raises(InterruptedError, match="run/adapter"): main([str(DATA), "--adapter", adapter_of(tmp_path / "run", [saw])])


def test_an_adapter_of_which_nobody_knows_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(LeakError, match="there is no .*manifest.json.*give the folder adapter/ of a run"):
        main([str(DATA), "--adapter", str(tmp_path / "adapter")])
    with pytest.raises(LeakError, match="is the manifest of a pretraining"):
        main([str(DATA), "--adapter", adapter_of(tmp_path / "run", kind="pretraining")])


def test_what_an_adapter_saw_is_known_to_the_audit_when_it_acts(store, tmp_path):
    from exprag.agent import load_model
    panel = Panel("one", (MELT,), {"melt": 1}, {})
    play = lambda seen: lived(*load_model("nano"), store, WordEncoder(), panel, tmp_path, {"alone": Choice("none")}, seen)
    with pytest.raises(LeakError, match="adapter 'planted': a task of panel 'one'"): play([Manifest("adapter", "planted", (MELT,))])
    with pytest.raises(LeakError, match="no adapter manifest"): play([Manifest("pretraining", "nano")])
