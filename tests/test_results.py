"""Runs on disk: durable, resumable, never mixed; tables and figures from them alone."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from exprag.environment import EASY_TYPES, HARD_TYPES
from exprag.results import (PRIMARY, SECONDARY, Episode, EpisodeFile, Question, Results, Run, Table, answer, contrast_table, endings_table, fingerprint,
                            load_results, plot_results, plot_types, read_episodes, results_table, run_directory, types_table)
from exprag.trajectory import Step, Task, Trajectory, json_line

PANEL = tuple(Task("scienceworld", kind, str(v), "test") for kind in (*HARD_TYPES[:4], *EASY_TYPES[:3]) for v in (1, 2))


def episode(task, score, **provenance):
    return Trajectory(task, "a goal", "a room", (Step("look around", "a room"),) * 3, score=score, success=score == 100, provenance=provenance)


def make_run(folder, name, seed=0, score=lambda task, i: 50, tasks=PANEL, panel=PANEL, **more):
    config = {"name": name, "seed": seed, "panel": {"name": "small", "fingerprint": "f" * 64, "tasks": [str(t) for t in panel]}, **more}
    where = run_directory(folder, config)
    with EpisodeFile(where / "episodes.jsonl") as file:
        for i, task in enumerate(tasks):
            file.append(episode(task, score(task, i), tokens={"prompt": 100, "computed": 40, "generated": 9}, seconds=1.5, stop="end"))
    return Run.read(where)


def test_failures_count_as_zero_and_partial_scores_are_no_success():
    task = PANEL[0]
    assert [Episode.of(episode(task, s)).score for s in (-100, -20, 0, 50, 100)] == [0, 0, 0, 50, 100]
    assert [Episode.of(episode(task, s)).success for s in (-100, 99, 100)] == [False, False, True]
    with pytest.raises(ValueError, match="unfinished"):
        Episode.of(Trajectory(task, "g", "o"))


def test_costs_come_from_the_provenance():
    e = Episode.of(episode(PANEL[0], 0, tokens={"prompt": 7, "computed": 5, "generated": 3}, seconds=2.0, stop="cap"))
    assert (e.tokens_prompt, e.tokens_computed, e.tokens_generated, e.seconds, e.stop, e.steps) == (7, 5, 3, 2.0, "cap", 3)


# ---- the file ----

def test_an_episode_is_appended_once(tmp_path):
    with EpisodeFile(tmp_path / "e.jsonl") as file:
        file.append(episode(PANEL[0], 5))
        with pytest.raises(ValueError, match="one episode per task"):
            file.append(episode(PANEL[0], 6))
        with pytest.raises(ValueError, match="unfinished"):
            file.append(Trajectory(PANEL[1], "g", "o"))
    assert [t.score for t in read_episodes(tmp_path / "e.jsonl")] == [5]


@pytest.mark.parametrize("cut", [1, 17, -1])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path, cut):
    path, line = tmp_path / "e.jsonl", json_line(episode(PANEL[1], 7))
    path.write_bytes(json_line(episode(PANEL[0], 5)) + line[:cut])
    assert len(read_episodes(path)) == 1, "reading alone neither fails nor changes the file"
    with EpisodeFile(path) as file:
        assert list(file.done) == [PANEL[0]]
        file.append(episode(PANEL[1], 8))
    assert [t.score for t in read_episodes(path)] == [5, 8]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(json_line(episode(PANEL[0], 5)) + b'{"schema": 1}\n' + json_line(episode(PANEL[1], 5)))
    for read in (read_episodes, EpisodeFile):
        with pytest.raises(ValueError, match="line 2 cannot be read"):
            read(path)


def test_text_with_unicode_line_separators_stays_one_line(tmp_path):
    odd = Trajectory(PANEL[0], "a\u2028b\u0085c\x0bd", "o\r\np", (), score=1.0, success=False)
    with EpisodeFile(tmp_path / "e.jsonl") as file: file.append(odd)
    assert read_episodes(tmp_path / "e.jsonl") == [odd]


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "e.jsonl"
    code = f"from exprag.results import EpisodeFile\ntry: EpisodeFile({str(path)!r})\nexcept BlockingIOError as e: print('refused', e)"
    with EpisodeFile(path):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.startswith("refused")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == ""


def test_a_new_file_is_in_its_directory_before_anything_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("exprag.results.sync_directory", synced.append)
    with EpisodeFile(tmp_path / "e.jsonl"): assert synced == [tmp_path]


WRITER = """
import sys
from exprag.results import EpisodeFile
from exprag.trajectory import Step, Task, Trajectory
with EpisodeFile(sys.argv[1]) as file:
    for i in range(100000):
        task = Task("scienceworld", "boil", str(i), "test")
        if task in file.done: continue
        file.append(Trajectory(task, "g" * 5000, "o", (), score=1.0, success=False))
        print(i, flush=True)
"""


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path):
    path, acknowledged = tmp_path / "e.jsonl", []
    for delay in (0.15, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        acknowledged.append(process.stdout.readline())
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += process.stdout.read().splitlines(keepends=True)
        process.wait()
        kept = [int(t.task.variation) for t in read_episodes(path)]
        numbers = [int(line) for line in acknowledged if line.endswith("\n")]
        assert numbers == sorted(set(numbers)), "an episode that was acknowledged is never run again"
        assert set(numbers) <= set(kept) and kept == sorted(set(kept))


# ---- the directory ----

def test_a_different_configuration_is_a_different_directory(tmp_path):
    one, two = (run_directory(tmp_path, {"name": "LoRA, x/../y", "seed": 0, "panel": {}, "batch_size": b}) for b in (4, 8))
    assert one != two and one.parent == two.parent == tmp_path
    assert run_directory(tmp_path, {"batch_size": 4, "panel": {}, "seed": 0, "name": "LoRA, x/../y"}) == one
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_an_edited_configuration_is_noticed(tmp_path):
    run = make_run(tmp_path, "LoRA")
    (run.folder / "config.json").write_text(json.dumps({**run.config, "seed": 5}))
    with pytest.raises(ValueError, match="was it edited"):
        make_run(tmp_path, "LoRA")


def test_episodes_of_another_panel_are_noticed(tmp_path):
    run = make_run(tmp_path, "LoRA", tasks=PANEL[:2])
    with EpisodeFile(run.folder / "episodes.jsonl") as file: file.append(episode(Task("scienceworld", "boil", "99", "test"), 5))
    with pytest.raises(ValueError, match="boil/99@test, which is not of its panel"):
        Run.read(run.folder)


# ---- results ----

def test_results_are_refused_unless_they_can_be_compared(tmp_path):
    a = make_run(tmp_path / "a", "LoRA")
    with pytest.raises(ValueError, match="3 of 14 episodes"): Results((a, make_run(tmp_path / "b", "zero-shot", tasks=PANEL[:3])))
    with pytest.raises(ValueError, match="only runs of one panel"): Results((a, make_run(tmp_path / "c", "zero-shot", tasks=PANEL[:3], panel=PANEL[:3])))
    with pytest.raises(ValueError, match="different configurations"): Results((a, make_run(tmp_path / "d", "LoRA", batch_size=2)))
    with pytest.raises(ValueError, match="no runs"): Results(())
    with pytest.raises(ValueError, match="no runs in"): load_results(tmp_path / "nowhere")


def test_load_results_orders_chooses_and_names(tmp_path):
    for name in ("ExpRAG-LoRA", "mine", "zero-shot"): make_run(tmp_path, name)
    assert load_results(tmp_path).names == ("zero-shot", "ExpRAG-LoRA", "mine")
    assert load_results(tmp_path, names=["mine", "zero-shot"]).names == ("mine", "zero-shot")
    with pytest.raises(ValueError, match="unknown condition .*zero-shott.*did you mean 'zero-shot'"): load_results(tmp_path, names=["zero-shott"])
    with pytest.raises(ValueError, match="unknown panel .*small"): load_results(tmp_path, panel="test")
    results = load_results(tmp_path)
    for bad in (lambda: results.of("LoRA"), lambda: results.outcomes("mine", "speed"), lambda: results.outcomes("mine", on="middle")):
        with pytest.raises(ValueError, match="known"): bad()


def gap(tmp_path):
    make_run(tmp_path, "LoRA", 0, lambda t, i: 10 + i)
    make_run(tmp_path, "LoRA", 1, lambda t, i: 12 + i)
    make_run(tmp_path, "ExpRAG-LoRA", 0, lambda t, i: 100 if i < 4 else 60 + i)
    return load_results(tmp_path)


def test_tables_are_computed_from_the_episodes(tmp_path):
    results = gap(tmp_path)
    table = results_table(results, on="hard", draws=500, seconds=True)
    assert [r[0] for r in table.rows] == ["LoRA", "ExpRAG-LoRA"] and table.rows[0][1] == "2"
    assert table.rows[0][2].startswith("14.5 [") and table.rows[1][3].startswith("4/8 [") and table.rows[1][-1] == "1.5"
    assert table.rows[0][4:8] == ("3.0", "100", "40", "9")
    types = types_table(results, on="easy")
    assert types.header == ("task type", "LoRA", "ExpRAG-LoRA") and len(types.rows) == 3
    assert str(results_table(results, draws=300)) == str(results_table(load_results(tmp_path), draws=300))


def test_the_table_says_what_nobody_knows(tmp_path):
    make_run(tmp_path, "LoRA", unknown=["some-7B"])
    assert results_table(load_results(tmp_path), draws=200).caption.endswith("Nobody can say what went into: some-7B.")


def test_the_primary_contrast_stands_apart(tmp_path):
    results = gap(tmp_path)
    table = contrast_table(results, draws=500)
    assert [r[0] for r in table.rows] == ["primary", "secondary", "secondary"] and table.rows[0][1] == str(PRIMARY) and table.rows[0][5] == ""
    assert "Not run: ExpRAG-LoRA minus LoRA, retrieval at test only" in table.caption
    assert float(table.rows[0][4]) == 2 / 2 ** 4
    own = contrast_table(results, Question("LoRA", "ExpRAG-LoRA", "easy"), (), draws=200)
    assert len(own.rows) == 1 and own.rows[0][2].startswith("-") and "Not run" not in own.caption
    assert answer(results, SECONDARY[-1]) is None


def test_one_adapter_run_in_two_conditions_brings_its_luck_to_both(tmp_path):
    for weights, folder in (({0: "aaaa", 1: "bbbb"}, "same"), ({0: "cccc", 1: "dddd"}, "other"), ({}, "unknown")):
        for seed, luck in ((0, 0), (1, 40)):
            own = {0: "aaaa", 1: "bbbb"}[seed] if folder != "unknown" else None
            make_run(tmp_path / folder, "LoRA", seed, lambda t, i: 5 + i + luck, policy={"weights": own})
            make_run(tmp_path / folder, "LoRA, retrieval at test only", seed, lambda t, i: 8 + 2 * i + luck, policy={"weights": weights.get(seed)})
    gaps = {f.name: answer(load_results(f), Question("LoRA, retrieval at test only", "LoRA"), draws=500).gap for f in tmp_path.iterdir()}
    assert gaps["other"] == gaps["unknown"] and gaps["other"].estimate == gaps["same"].estimate
    assert gaps["same"].high - gaps["same"].low < 0.5 * (gaps["other"].high - gaps["other"].low)


def test_endings_are_counted_over_all_seeds(tmp_path):
    for seed in (0, 1):
        folder = make_run(tmp_path, "LoRA", seed, tasks=()).folder
        with EpisodeFile(folder / "episodes.jsonl") as file:
            for i, task in enumerate(PANEL): file.append(episode(task, 0, stop=("failure", "context", "asleep")[min(i, 2)] if seed else "cap"))
    table = endings_table(load_results(tmp_path))
    assert table.header == ("condition", "episodes", "failure", "cap", "context", "asleep")
    assert table.rows == (("LoRA", "28", "1", "14", "1", "12"),) and "context: the prompt no longer fitted" in table.caption and "asleep:" not in table.caption


def test_one_type_alone_gives_no_interval(tmp_path):
    make_run(tmp_path, "LoRA", tasks=PANEL[:2], panel=PANEL[:2])
    results = load_results(tmp_path)
    assert results_table(results).rows[0][2] == "50.0"
    plot_results(results)


def test_shown_text_is_escaped():
    table = Table(("a", "b"), (("<img src=x onerror=alert(1)>|`x`\n# h", "$x$ [l](javascript:1)"),), "<b>&")
    assert "<img" not in table.html() and "&lt;img" in table.html() and "&lt;b&gt;&amp;" in table.html()
    line = table.markdown().splitlines()[2]
    assert "<img" not in line and line.count("|") - line.count(r"\|") == 3 and r"\[l\]" in line and r"\$x\$" in line
    assert str(table).splitlines()[0].startswith("a")


def test_figures_show_every_condition_and_type(tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = gap(tmp_path)
    bars = plot_results(results, draws=200)
    assert [t.get_text() for t in bars.get_yticklabels()] == ["LoRA", "ExpRAG-LoRA"] and bars.get_xlabel()
    dumbbells = plot_types(results, on="hard")
    assert sorted(t.get_text() for t in dumbbells.get_yticklabels()) == sorted(HARD_TYPES[:4])
    plot_types(results, "LoRA", "ExpRAG-LoRA", "steps", ax=bars)
    plt.close("all")
