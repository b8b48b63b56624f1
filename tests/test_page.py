"A page of runs: the answer first, every condition, episodes side by side, and no text that acts."
import re
from dataclasses import replace
from pathlib import Path

import pytest

from exprag.agent import Action
from exprag.cli import main
from exprag.evaluation import Condition, EvaluationOptions, evaluate
from exprag.page import report_page, report_runs
from exprag.results import Question, Results, load_results
from exprag.trajectory import Step, Task, Trajectory
from exprag.view.pieces import inert, said, step_rows
from exprag.world import load_panel

HOSTILE = "<script>alert(1)</script> \x1b[2J \u202egnp.exe \ud800 </td></table>{{ 7 * 7 }}"


class Says:
    "A policy that says the same words in every step."
    batch_size = 5

    def __init__(self, *words): self.words = words
    def reset(self): pass
    def describe(self): return {"name": self.words[0], "says": [w.encode("ascii", "replace").decode() for w in self.words]}
    name = property(lambda self: "says")

    def act(self, trajectories, experiences=None, keys=None):
        return [Action(self.words[len(t) % len(self.words)]) for t in trajectories]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("runs")
    panel = load_panel("shop", "test")
    some = {t.type: t for t in panel}.values()
    panel = replace(panel, tasks=tuple(some), name="five")
    for name, words in (("a", ("tables", "schema people")), ("b", ("tables", HOSTILE.replace("\ud800", "")))):
        evaluate(Condition(name, policy="model", adapter="none", memory="none"), panel, where / "episodes", Says(*words),
                 options=EvaluationOptions(progress=False))
    return where


def test_nothing_in_a_page_acts(folder):
    page = report_runs(folder).read_text("utf-8")
    assert page.count("<script") == 0 and "&lt;script&gt;alert(1)" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page)
    assert "\\u001b[2J" in page and "\\u202egnp" in page and "{{ 7 * 7 }}" in page
    assert "default-src 'none'" in page and not re.search(r"(?:src|href)=\"(?!data:image/png|#)", page)


def test_what_cannot_be_written_is_shown_by_its_code():
    assert inert("a\ud800b\x00") == "a\\ud800b\\u0000" and inert("tab\tline\nç") == "tab\tline\nç"


def test_every_condition_and_task_is_there_and_the_first_difference_is_marked(folder):
    runs = load_results(folder / "episodes").runs
    page = report_page(runs, "T", question=Question("a", "b", measure="success"))
    assert all(f"<th>{name}</th>" in page for name in "ab")
    for task in runs[0].config["panel"]["tasks"]: assert page.count(task) >= 2
    assert page.count('class="parts"') == 5  # once a task, at step 2
    few = report_page(runs, "T", most=2)
    assert few.count("<details") == 2 and few.count('<a href="#five-') == 2


def test_the_answer_is_a_sentence(folder):
    results = Results(load_results(folder / "episodes").runs)
    assert said(results, Question("a", "b")) == (
        "a minus b on hard types: +0.0 points of score, p >= 0.5. Too few independent units for an interval.")
    assert "was not run here" in said(results, Question("c", "b"))


def test_rows_mark_a_parting_once_and_an_episode_that_ended_parts_too():
    task = Task("shop", "last-order", "1", "test")
    def told(*actions): return Trajectory(task, "g", "o", tuple(Step(a, "x", 0) for a in actions))
    rows = step_rows([told("a", "b", "c"), None, told("a", "b"), told("a", "d")])
    assert [r["parts"] for r in rows] == [False, True, False]
    assert [r["parts"] for r in step_rows([told("a", "b"), told("a")])] == [False, True]
    assert rows[2]["cells"][1:] == [None, None, None]


def test_the_command_reports_a_directory_of_runs(folder, tmp_path, capsys):
    assert main(["report", str(folder)]) == 0
    assert str(Path(folder, "report.html")) in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 1
    assert "no runs in" in capsys.readouterr().err


def test_a_directory_with_the_name_of_a_plan_does_not_hide_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("quick-shop").mkdir()
    assert main(["report", "quick-shop"]) == 1 and "exprag evaluate quick-shop" in capsys.readouterr().err
