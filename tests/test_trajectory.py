"The record: values, identity, files."
import json
import os
import pickle
import stat
import subprocess
import sys

import pytest
from hypothesis import given, strategies as st
from trajectory_strategies import calm, example, mapping, number, tasks, trajectories

from exprag.trajectory import (
    FrozenMap, SCHEMA_VERSION, Step, Table, Task, Trajectory, TrajectoryError, digest, iter_jsonl, known,
    read_jsonl, replacing, write_json, write_jsonl)


# -- values

@calm
@given(mapping)
def test_frozen_map_is_a_value(m):
    frozen = FrozenMap(m)
    assert frozen == FrozenMap(m) and hash(frozen) == hash(FrozenMap(m)) and pickle.loads(pickle.dumps(frozen)) == frozen


@calm
@given(trajectories)
def test_trajectory_can_be_hashed_and_pickled(trajectory):
    again = pickle.loads(pickle.dumps(trajectory))
    assert again == trajectory and again.id == trajectory.id and len({again, trajectory}) == 1


def test_nothing_can_be_changed_in_place():
    source = {"a": {"b": [1]}}
    trajectory = example(settings=source)
    before = trajectory.id
    source["a"]["b"].append(2)
    assert trajectory.id == before and trajectory.settings["a"]["b"] == (1,)
    with pytest.raises(TypeError): trajectory.settings["a"] = 1
    with pytest.raises(AttributeError): trajectory.goal = "x"


@calm
@given(st.lists(tasks, max_size=6))
def test_tasks_sort_the_same_whatever_the_order(ts):
    assert sorted(ts) == sorted(reversed(ts)) and all(Task.parse(str(t)) == t for t in ts)


def test_variations_sort_as_numbers():
    order = [Task("w", "t", v, "train").variation for v in ("trial_b", "10", "9", "trial_a")]
    assert [t.variation for t in sorted(Task("w", "t", v, "train") for v in order)] == ["9", "10", "trial_a", "trial_b"]


def test_alfworld_like_variation_with_slashes_survives():
    task = Task("alfworld", "pick_and_place_simple", "pick/trial_T2019@x/game", "train")
    assert Task.parse(str(task)) == task


# -- identity

def test_id_is_pinned():
    "If this changes, every store in the world disagrees with us: raise SCHEMA_VERSION."
    assert SCHEMA_VERSION == 1 and example().id == "ccbf8f8954acff62f9445e20088992b5"


@calm
@given(trajectories)
def test_id_survives_json(trajectory):
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict()))) == trajectory


@calm
@given(mapping, number)
def test_id_ignores_provenance_and_score(provenance, score):
    assert example(provenance=provenance, score=score, success=True, world_version="9").id == example().id


def test_id_depends_on_every_part_of_the_content():
    step = example().steps[0]
    variants = [example(), example(goal="x"), example(first_observation="x"), example(settings={}), example(steps=()),
                example(task=Task("scienceworld", "boil", 4, "train")), example(task=Task("scienceworld", "melt", 3, "train")),
                example(task=Task("alfworld", "boil", 3, "train")), *(example(steps=(s,)) for s in (
                    Step("x", step.observation), Step(step.action, "x"), Step(step.action, step.observation, thought=""),
                    Step(step.action, step.observation, tool_calls=[{"id": "1"}])))]
    assert len({t.id for t in variants}) == len(variants)
    assert example(task=Task("scienceworld", "boil", 3, "test")).id == example().id  # the fold is the benchmark's, not the episode's


def test_id_is_the_same_in_another_process():
    program = ("from exprag.trajectory import *\n"
               "print(Trajectory(Task('scienceworld','boil',3,'train'),'Boil water.','A kitchen.',(Step('activate stove','It is on.',5),),settings={'simplification':'easy'}).id)")
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert out.stdout.strip() == example().id


# -- wrong input

@pytest.mark.parametrize("change, said", [
    (dict(goal=None), "goal None"), (dict(score=float("nan")), "finite"), (dict(steps=("wait",)), "step 1"), (dict(task="boil"), "task 'boil'"),
    (dict(success=1), "success 1"), (dict(settings={"a": object()}), "only JSON"), (dict(settings={1: 2}), "str keys")])
def test_bad_fields_are_named(change, said):
    with pytest.raises(TrajectoryError, match=said): example(**change)


@pytest.mark.parametrize("line, said", [
    (b"{", "not JSON"), (b"[]", "expected a JSON object"), (b"\xff\xfe", "utf-8"), (b'{"schema": 1}', "lacks"), (b"null", "expected"),
    (b'{"schema": 2, "task": {}, "goal": "", "first_observation": ""}', "upgrade"),
    (b'{"schema": 1, "task": {"world": "w"}, "goal": "", "first_observation": ""}', "world, type, variation and fold"),
    (b'{"schema": 1, "task": {"world": "w", "type": "t", "variation": "1", "fold": "train"}, "goal": "", "first_observation": "", "steps": [{}]}', "step 1"),
    (b'{"schema": 1, "task": {"world": "w", "type": "t", "variation": "1", "fold": "train"}, "goal": "", "first_observation": "", "steps": 3}', "list"),
    (b'{"schema": 1, "task": {"world": "w", "type": "t", "variation": "1", "fold": "train"}, "goal": "", "first_observation": "", "score": NaN}', "finite"),
    (b'{"schema": 1, "id": "0", "task": {"world": "w", "type": "t", "variation": "1", "fold": "train"}, "goal": "", "first_observation": ""}', "edited"),
    (b"[" * 100_000, "not JSON")])
def test_each_bad_line_is_reported_and_the_rest_goes_in(tmp_path, line, said):
    path = tmp_path / "t.jsonl"
    write_jsonl([example()], path)
    good = path.read_bytes()
    path.write_bytes(good + line + b"\n\n" + good)
    read, rejected = read_jsonl(path)
    assert read == [example(), example()] and [r.line for r in rejected] == [2] and said in rejected[0].reason
    with pytest.raises(TrajectoryError, match="line 2"): list(iter_jsonl(path))


def test_unknown_fields_are_kept():
    record = {**example().to_dict(), "cost": 3}
    record["steps"][0]["entropy"] = 0.5
    read = Trajectory.from_dict(record)
    assert read.extra["cost"] == 3 and read.steps[0].extra["entropy"] == 0.5 and read.id == example().id


def test_finished_is_finished():
    with pytest.raises(TrajectoryError, match="finished"): example(score=3).with_step(Step("a", "b"))


def test_an_episode_before_its_first_action():
    finished = example(score=5, provenance={"actor": "expert"}, extra={"cost": 3}, world_version="1.2.3")
    opening = finished.opening()
    assert (opening.task, opening.goal, opening.first_observation) == (finished.task, finished.goal, finished.first_observation)
    assert (opening.settings, opening.world_version) == (finished.settings, "1.2.3"), "the settings decide the dialect"
    assert (opening.steps, opening.score, opening.success, opening.provenance, opening.extra) == ((), None, None, {}, {})
    assert opening.with_step(finished.steps[0]).id == finished.id and opening.opening() == opening


# -- files

@calm
@given(st.lists(trajectories, max_size=4))
def test_jsonl_round_trip(tmp_path_factory, ts):
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    assert write_jsonl(iter(ts), path) == len(ts)
    assert read_jsonl(path) == (ts, []) and list(iter_jsonl(path)) == ts


def test_an_extra_may_be_named_like_what_tells_of_the_record():
    trajectory = example(extra={"id": "x", "schema": 9}, steps=(Step("a", "b", extra={"id": 3, "schema": None, "extra": {}}),))
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict()))) == trajectory
    with pytest.raises(TrajectoryError, match="schema version None"): Trajectory.from_dict({k: v for k, v in trajectory.to_dict().items() if k != "schema"})


@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_permissions(tmp_path):
    path, before = tmp_path / "t.jsonl", os.umask(0o027)
    try:
        for mode in (0o640, 0o600, 0o444):
            if mode != 0o640: path.chmod(mode)
            write_jsonl([example()], path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally: os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
def test_a_private_file_is_private_while_it_is_replaced(tmp_path):
    path = tmp_path / "t.jsonl"
    path.touch(0o600)
    with replacing(path) as temporary: assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.jsonl"
    write_jsonl([example()], path)
    before = path.read_bytes()

    def broken():
        yield example(goal="other")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): write_jsonl(broken(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["t.jsonl"]


def test_bom_and_windows_line_ends(tmp_path):
    path = tmp_path / "t.jsonl"
    write_jsonl([example(), example(goal="b")], path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_jsonl(path)[0]) == 2


# -- what all chapters share

def test_digest_is_of_the_value():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    assert len(digest("x")) == 16 and digest("x", 32).startswith(digest("x"))
    with pytest.raises(ValueError): digest(float("nan"))


def test_json_is_written_whole(tmp_path):
    path = write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é", "b": 1}
    with pytest.raises(TypeError): write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == 1 and os.listdir(tmp_path) == ["a.json"]


def test_an_unknown_name_is_refused_with_near_and_all():
    assert known("boil", ("boil", "melt"), "task type") == "boil"
    with pytest.raises(ValueError, match=r"unknown task type 'boyl'; did you mean 'boil'\? The 2 known: boil, melt"):
        known("boyl", ("boil", "melt"), "task type")
    with pytest.raises(ValueError, match="unknown fold 'x'; The 1 known: train"): known("x", ("train",), "fold")


TABLE = Table(("name", "n"), (("a|b $x$ <i>", "1"), ("c", "20")), "Two *rows*")


def test_a_table_in_three_forms():
    assert str(TABLE) == repr(TABLE) == "name          n\n---------------\na|b $x$ <i>   1\nc            20\nTwo *rows*"
    assert str(Table(("name", "n"), (("a", "1"),), right=False)) == "name  n\n-------\na     1"
    assert TABLE.markdown().splitlines() == ["| name | n |", "| :-- | --: |", r"| a\|b \$x\$ &lt;i&gt; | 1 |", "| c | 20 |", "", r"Two \*rows\*"]
    html = TABLE._repr_html_()
    assert "<td>a|b $x$ &lt;i&gt;</td>" in html and "<caption>Two *rows*</caption>" in html and "mathjax_ignore" in html


@pytest.mark.parametrize("success, how", [(True, "succeeded"), (False, "failed"), (None, "outcome unknown")])
def test_an_episode_as_a_table(success, how):
    episode = example(score=None if success is None else 7.5, success=success, steps=(Step("<b>", "one", -2), Step("wait", "two")))
    table = episode.table()
    assert table.rows == (("0", "", "A kitchen.", ""), ("1", "<b>", "one", "-2"), ("2", "wait", "two", ""))
    assert how in table.caption and "Boil water." in table.caption and ("score 7.5" in table.caption) == (success is not None)
    assert "<b>" not in episode._repr_html_() and "&lt;b&gt;" in episode._repr_html_()


def test_import_is_light():
    code = "import sys, exprag.trajectory; print(any(m in sys.modules for m in ('torch', 'numpy', 'py4j')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_chapter_holds_no_other_format():
    "Conversations are in exprag.views."
    import exprag.trajectory
    assert not {"to_messages", "from_messages", "to_sharegpt", "from_sharegpt"} & set(dir(exprag.trajectory))
