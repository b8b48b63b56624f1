"""Failure analysis: causes, sources, curves, errors of copying; cases on disk."""
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprag.results import EpisodeFile, Results, Run
from exprag.select import Every, Once, Selection
from exprag.studies.failures import (
    CAUSES, COPY_ERRORS, SOURCES, Case, carried_out, cases, cause, causes_table, copy_errors,
    copy_errors_table, following_curve, lines_followed, lines_resumed, read_cases,
    shown_at_each_step, sources, sources_table, write_cases)
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Cursor, Experience
from exprag.world import World, register_world

QUESTION = "Ambiguous request: Please enter the number for the action you intended:\n0:\tgo to hall\n1:\tgo to hall door"
WORDS = st.lists(st.sampled_from(["open door", "open box", "go to hall", "look around", "wait"]), max_size=6)


def made(actions, type="boil", score=10.0, said="done", variation="1", stop="cap"):
    steps = tuple(Step(a, said) for a in actions)
    return Trajectory(Task("scienceworld", type, variation, "dev"), "a goal", "a room", steps).finish(score, score == 100, stop=stop)


def case(actions, lines=("go to hall", "open door", "wait"), **how):
    shown = (made(lines, score=100.0, variation="2"),) if lines is not None else ()
    return Case("ExpRAG", made(actions, **how), shown)


@pytest.mark.parametrize("actions, how, why", [
    (["wait"], {}, "action"), (["go to hall", "open box"], {}, "object"), (["go to hall", "open door", "wait"], {}, "experience"),
    (["go to hall", "open door", "wait", "wait"], {}, "experience"), (["go to hall"], {}, "cap"), ([], {}, "cap"),
    (["go to hall"], {"said": "No known action matches that input."}, "refusal"), (["go to hall"], {"said": QUESTION}, "refusal"),
    (["wait"], {"type": "melt"}, "retrieval"), (["wait"], {"lines": None}, "no experience"), (["wait"], {"score": 100.0}, None)])
def test_the_earliest_cause_is_named(actions, how, why):
    assert cause(case(actions, **how)) == why and (why is None or why in CAUSES)


@pytest.mark.parametrize("actions, stop, why", [
    (["go to hall", "open door"], "failure", "failure"), (["go to hall", "open door", "wait"], "failure", "failure"), (["go to hall"], "context", "context"),
    (["go to hall"], "patience", "stopped"), (["go to hall"], None, "stopped"), (["go to hall", "open door", "wait"], "done", "experience"),
    (["go to hall", "open door", "wait", "wait"], "failure", "experience"), (["go to hall", "open box"], "failure", "object"), (["wait"], "context", "action")])
def test_how_an_episode_ended_counts_where_nothing_went_wrong_before(actions, stop, why):
    assert cause(case(actions, stop=stop)) == why and why in CAUSES


def test_an_action_is_traced_to_the_lines():
    c = case(["go to hall", "wait", "open hall", "fly", ""])
    assert sources(c) == (SOURCES[0], SOURCES[1], SOURCES[2], SOURCES[3], SOURCES[3])
    both = Case("ExpRAG", made(["wait"]), (made(["look around"]), made(["wait"])))
    assert sources(both) == (SOURCES[0],)


def test_a_memory_asked_at_every_step_shows_the_line_of_each_step():
    "The case's lines are those that were next when the agent acted, until there were none."
    one, other = made(["go to hall", "open door"], score=100.0), made(["open box", "wait"], score=100.0, variation="3")
    class Memory:
        when = Every(1)
        def recall(self, now):
            if len(now) > 2: return Selection()
            return Selection((Experience(other, cursor=Cursor(offset=1)) if len(now) else Experience(one),))
    shown, = shown_at_each_step(made(["go to hall", "open box", "fly", "fly"]), Memory())
    assert shown.actions == ("go to hall", "open box", "wait") and shown.task == one.task
    assert shown_at_each_step(made(["fly"]), type("Nothing", (), {"recall": lambda self, now: Selection()})()) == ()


@given(WORDS, WORDS)
def test_lines_followed_is_the_length_of_the_common_beginning(actions, lines):
    common = 0
    while common < min(len(actions), len(lines)) and actions[common] == lines[common]: common += 1
    assert lines_followed(case(actions, tuple(lines))) == common


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_the_curve_counts_only_experiences_that_long(pairs):
    found = [case(actions, tuple(lines)) for actions, lines in pairs]
    curve = following_curve(found)
    assert len(curve) == max(len(lines) for _, lines in pairs) and all(0 <= share <= 1 for share in curve)
    for n, share in enumerate(curve):
        long = [c for c in found if len(c.lines) > n]
        assert share == sum(c.episode.actions[:n + 1] == c.lines[:n + 1] for c in long) / len(long)


@given(WORDS, WORDS)
def test_what_is_resumed_is_counted_after_the_first_departure(actions, lines):
    c = case(actions, tuple(lines))
    theirs = [a == b for a, b in zip(actions, lines)]
    left = theirs.index(False) + 1 if False in theirs else len(theirs)
    assert lines_resumed([c]) == (sum(theirs[left:]), len(theirs[left:]))
    assert lines_resumed([c, c]) == tuple(2 * n for n in lines_resumed([c]))


def test_a_world_whose_refusals_are_not_known_is_an_error_with_the_way_out(monkeypatch):
    monkeypatch.setattr("exprag.world._REGISTERED", {})
    step = Step("open door", "You cannot.")
    with pytest.raises(ValueError, match="world 'kitchen' is not known.*register_world"): carried_out(step, "kitchen")
    register_world(World("kitchen"))
    with pytest.raises(ValueError, match="'kitchen' has no list of refusals"): carried_out(step, "kitchen")
    register_world(World("kitchen", refusals=["You cannot"]))
    assert not carried_out(step, "kitchen") and carried_out(step, "scienceworld")


def test_a_question_is_no_refusal_but_the_line_was_not_carried_out():
    assert not carried_out(Step("go to hall", QUESTION), "scienceworld")
    assert cause(case(["go to hall"], said=QUESTION)) == "refusal" and cause(case(["go to hall"], said=QUESTION), refusal=False) == "cap"


def test_cases_survive_the_file_with_short_observations(tmp_path):
    found = [case(["go to hall", "wait"], said="x" * 100), case(["wait"], lines=None), case(["wait"], said=QUESTION)]
    write_cases(tmp_path / "cases.xz", found)
    back = read_cases(tmp_path / "cases.xz")
    assert [(c.condition, c.episode.actions, c.lines, c.episode.task) for c in back] == [(c.condition, c.episode.actions, c.lines, c.episode.task) for c in found]
    assert back[0].episode.steps[0].observation == "x" * 40 and str(causes_table(back)) == str(causes_table(found))
    assert back[2].episode.steps[0].observation == QUESTION and back[0].episode.provenance["stop"] == "cap", "a question is kept whole"


def test_cases_ask_the_memory_at_the_beginning_of_each_episode(tmp_path):
    episode, experience = made(["wait", "wait"]), made(["wait"], score=100.0, variation="2")
    with EpisodeFile(tmp_path / "episodes.jsonl") as file: file.append(episode)
    asked = []

    class Memory:
        when = Once()
        def recall(self, trajectory):
            asked.append(trajectory)
            return Selection((Experience(experience),))

    panel = {"name": "one", "fingerprint": "f", "tasks": [str(episode.task)], "caps": {}, "settings": {}}
    (tmp_path / "config.json").write_text(json.dumps({"name": "ExpRAG-LoRA", "seed": 0, "panel": panel}))
    run = Run.read(tmp_path)
    found = cases(Results((run,)), {"ExpRAG-LoRA": Memory()})
    assert found == [Case("ExpRAG-LoRA", episode, (experience,))] and asked[0].steps == () and asked[0].task == episode.task
    assert cases(Results((run,)), {}) == [Case("ExpRAG-LoRA", episode, ())]


def test_tables_count_each_episode_once():
    found = [case(["wait"]), case(["go to hall"]), case(["wait"], score=100.0), Case("LoRA", made(["wait"]))]
    table = causes_table(found)
    assert table.rows[0][:3] == ("ExpRAG", "3", "1") and table.rows[1][:4] == ("LoRA", "1", "0", "1")
    assert [sum(int(x) for x in row[2:] if x) for row in table.rows] == [3, 1]
    assert [row[0] for row in sources_table(found).rows] == ["ExpRAG"]  # nothing was shown to the other


def test_copy_errors_are_another_line_or_another_continuation():
    lines = ["pick up jar", "look around", "move seed in jar to pot", *(f"wait{n}" for n in range(3, 14))]
    def kinds(*actions): return {kind: n for kind, n in copy_errors([case(list(actions), lines)]).items() if n}
    assert kinds(*lines) == {} and tuple(copy_errors([])) == COPY_ERRORS
    assert kinds("pick up jar to pot") == {"continues as another": 1}  # 'jar' is followed by 'to' two lines below
    assert kinds("pick up seed") == {"begins as its line": 1} and kinds("sing") == {"neither": 1}
    assert kinds(*lines[:12], lines[2]) == {"another line": 1, "unique": 1, "same digit": 1, "by chance": pytest.approx(1 / 13)}
    assert kinds(*lines[:11], lines[2]) == {"another line": 1, "unique": 1, "by chance": pytest.approx(1 / 13)}
    assert kinds(*lines, "one more") == {}, "there is no line of that number"
    table = copy_errors_table([Case("reader", made(["sing"]), (made(lines),)), Case("blind", made(["sing"])), Case("true", made(lines), (made(lines),))])
    assert [row[0] for row in table.rows] == ["reader"]
