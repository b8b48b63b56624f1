"""Runs on disk: durable, resumable, never mixed; tables and figures from them alone."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from exprag.worlds.scienceworld import EASY_TYPES, HARD_TYPES
from exprag.results import (
    PRIMARY, SECONDARY, USUAL, Episode, EpisodeFile, Question, Results, Run, answer, contrast_table,
    endings_table, load_results, plot_results, plot_types, read_episodes, results_table,
    run_directory, types_table)
from exprag.statistics import Bootstrap, hierarchical_bootstrap
from exprag.trajectory import Step, Table, Task, Trajectory, json_line

PANEL = tuple(Task("scienceworld", kind, str(v), "test") for kind in (*HARD_TYPES[:4], *EASY_TYPES[:3]) for v in (1, 2))


def episode(task, score, **provenance):
    return Trajectory(task, "a goal", "a room", (Step("look around", "a room"),) * 3, score=score, success=score == (1 if task.world == "alfworld" else 100), provenance=provenance)


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
    one, two = (run_directory(tmp_path, {"name": "LoRA, x/../y", "seed": s, "panel": {}, "k": 2}) for s in (4, 8))
    assert one != two and one.parent == two.parent == tmp_path
    assert run_directory(tmp_path, {"k": 2, "panel": {}, "seed": 4, "name": "LoRA, x/../y"}) == one, "the order of the keys is no difference"


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
    with pytest.raises(ValueError, match="both 'LoRA', seed 0, and differ in policy.weights; give one another name"): Results((a, make_run(tmp_path / "d", "LoRA", policy={"weights": "b"})))
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
    table = results_table(results, on="hard", how=Bootstrap(500), seconds=True)
    assert [r[0] for r in table.rows] == ["LoRA", "ExpRAG-LoRA"] and table.rows[0][1] == "2"
    assert table.rows[0][2].startswith("14.5 [") and table.rows[1][3].startswith("4/8 [") and table.rows[1][-1] == "1.5"
    assert table.rows[0][4:8] == ("3.0", "100", "40", "9")
    types = types_table(results, on="easy")
    assert types.header == ("task type", "LoRA", "ExpRAG-LoRA") and len(types.rows) == 3
    assert str(results_table(results, how=Bootstrap(300))) == str(results_table(load_results(tmp_path), how=Bootstrap(300)))


def test_the_table_says_what_nobody_knows(tmp_path):
    make_run(tmp_path, "LoRA", unknown=["some-7B"])
    assert results_table(load_results(tmp_path), how=Bootstrap(200)).caption.endswith("Nobody can say what went into: some-7B.")


def test_the_primary_contrast_stands_apart(tmp_path):
    results = gap(tmp_path)
    table = contrast_table(results, how=Bootstrap(500))
    assert [r[0] for r in table.rows] == ["primary", "secondary", "secondary"] and table.rows[0][1] == str(PRIMARY) and table.rows[0][5] == ""
    assert "Not run, or not on this panel (easy and hard types): " in table.caption
    assert "ExpRAG-LoRA minus LoRA, retrieval at test only, hard, score" in table.caption
    assert float(table.rows[0][4]) == round(2 / 2 ** 8, 4), "four hard types of two tasks: eight episodes are the unit"
    assert "8 episodes within 4 task types; 6 episodes within 3 task types" in table.caption and "Seeds, drawn apart: ExpRAG-LoRA 1, LoRA 2." in table.caption
    own = contrast_table(results, Question("LoRA", "ExpRAG-LoRA", "easy"), (), Bootstrap(200))
    assert len(own.rows) == 1 and own.rows[0][2].startswith("-") and "Not run" not in own.caption
    assert answer(results, SECONDARY[-1]) is None


def test_one_adapter_run_in_two_conditions_brings_its_luck_to_both(tmp_path):
    for weights, folder in (({0: "aaaa", 1: "bbbb"}, "same"), ({0: "cccc", 1: "dddd"}, "other"), ({}, "unknown")):
        for seed, luck in ((0, 0), (1, 40)):
            own = {0: "aaaa", 1: "bbbb"}[seed] if folder != "unknown" else None
            make_run(tmp_path / folder, "LoRA", seed, lambda t, i: 5 + i + luck, policy={"weights": own})
            make_run(tmp_path / folder, "LoRA, retrieval at test only", seed, lambda t, i: 8 + 2 * i + luck, policy={"weights": weights.get(seed)})
    gaps = {f.name: answer(load_results(f), Question("LoRA, retrieval at test only", "LoRA"), Bootstrap(500)).gap for f in tmp_path.iterdir()}
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


def test_an_answer_uses_the_bootstrap_it_is_given(tmp_path):
    results, q = gap(tmp_path), Question("ExpRAG-LoRA", "LoRA", "easy")
    wide, narrow = (answer(results, q, Bootstrap(500, level)) for level in (0.95, 0.5))
    assert (wide.a, wide.b) == ("ExpRAG-LoRA", "LoRA") and str(q) == "ExpRAG-LoRA minus LoRA, easy, score"
    assert wide.gap.low <= narrow.gap.low <= narrow.gap.high <= wide.gap.high and (wide.gap.level, narrow.gap.level) == (0.95, 0.5)
    assert str(answer(results, q, Bootstrap(500))) == str(wide), "seeded"
    successes = answer(results, Question("ExpRAG-LoRA", "LoRA", "hard", "success"), Bootstrap(200))
    assert successes.gap.estimate == 50 and successes.better == 2, "two of four types, each with both episodes"
    assert answer(results, Question("ExpRAG-LoRA", "replay")) is None, "one of its conditions was not run"


def test_success_has_a_count_and_an_interval(tmp_path):
    results = gap(tmp_path)
    one, two = ({r[0]: r[3] for r in results_table(results, how=Bootstrap(300)).rows}[n] for n in ("ExpRAG-LoRA", "LoRA"))
    how = Bootstrap(300)
    interval = hierarchical_bootstrap(results.outcomes("ExpRAG-LoRA", "success"), how=how)
    assert one == f"4/14 [{interval.low:.0f}%, {interval.high:.0f}%]", "seven types of two episodes: the types are the unit"
    assert two == "0/14 [0%, 35%]", "no success: Wilson's for seven types, since a bootstrap would give no width"
    four = {on: {r[0]: r[3] for r in results_table(results, on=on, how=how).rows} for on in ("easy", "hard")}
    assert four["hard"]["ExpRAG-LoRA"] == "4/8 [22%, 78%]", "few types, one seed: Wilson's for eight episodes"
    for seed, solved in ((0, 1), (1, 2)): make_run(tmp_path / "mean", "LoRA", seed, lambda t, i: 100 if i < solved else 0)
    mean = load_results(tmp_path / "mean")
    how = Bootstrap(300)
    interval = hierarchical_bootstrap(mean.outcomes("LoRA", "success"), how=how)
    assert results_table(mean, how=how).rows[0][3] == f"1.5/14 [{interval.low:.0f}%, {interval.high:.0f}%]", "else the bootstrap's"


def test_fewer_than_six_units_give_no_interval_and_no_small_p(tmp_path):
    few = [t for t in PANEL if t.variation == "1"][:3]
    for name in ("LoRA", "ExpRAG-LoRA"): make_run(tmp_path, name, 0, lambda t, i: 50 + 10 * (name != "LoRA"), tasks=few, panel=few)
    results = load_results(tmp_path)
    table, row = results_table(results), contrast_table(results).rows[0]
    assert table.rows[0][2] == "50.0" and "Unit of intervals and tests: 3 task types. Fewer than 6 units" in table.caption
    assert row[2] == "+10.0" and row[4] == ">= 0.25" and contrast_table(results, Question("ExpRAG-LoRA", "LoRA", measure="steps"), [PRIMARY]).rows[1][5] == "-"
    assert table.rows[0][3] == "0/3 [0%, 56%]", "independent episodes have Wilson's interval, however few"
    plot_results(results)


GAMES = [Task("alfworld", kind, f"Mug-None-Fridge-{room}/trial_{i}", "test") for kind in ("pick_cool_then_place_in_recep", "pick_heat_then_place_in_recep", "pick_two_obj_and_place") for room in (1, 2, 3) for i in (1, 2)]


def test_what_a_world_calls_alike_is_one_unit(tmp_path):
    "ALFWorld's trials of one goal in one room; 18 games in 9 groups."
    for seed in (0, 1): make_run(tmp_path, "ExpRAG-LoRA", seed, lambda t, i: int(i % 5 > seed), tasks=GAMES, panel=GAMES)
    make_run(tmp_path, "LoRA", 0, lambda t, i: int(i % 6 == 0), tasks=GAMES, panel=GAMES)
    results, how = load_results(tmp_path), Bootstrap(400)
    assert results.outcomes("LoRA").groups[0] == ("Mug-None-Fridge-1",) * 2 + ("Mug-None-Fridge-2",) * 2 + ("Mug-None-Fridge-3",) * 2
    found = answer(results, PRIMARY, how)
    assert str(found.unit) == "9 groups of alike episodes within 3 task types" and found.p >= found.unit.least_p
    assert f"{found.unit}." in contrast_table(results, how=how).caption and f"{found.unit}." in results_table(results, how=how).caption
    success = hierarchical_bootstrap(results.outcomes("LoRA", "success"), how=how)
    assert {r[0]: r[3] for r in results_table(results, how=how).rows}["LoRA"].endswith(f"[{success.low:.0f}%, {success.high:.0f}%]"), "alike episodes are not Wilson's"


def test_conditions_with_one_and_with_three_seeds_stand_in_one_table(tmp_path):
    "Without an adapter one seed is all there is; with one, the table says that its luck is not in the interval."
    make_run(tmp_path, "zero-shot", 0, lambda t, i: i, condition={"adapter": "none"})
    make_run(tmp_path, "LoRA", 0, lambda t, i: 2 * i, condition={"adapter": "lora"})
    for seed in (0, 1, 2): make_run(tmp_path, "ExpRAG-LoRA", seed, lambda t, i: 40 + 10 * seed + i, condition={"adapter": "exprag-lora"})
    results, how = load_results(tmp_path), Bootstrap(400)
    table = results_table(results, how=how)
    assert [(r[0], r[1]) for r in table.rows] == [("zero-shot", "1"), ("LoRA", "1"), ("ExpRAG-LoRA", "3")] and "One training seed, whose luck no interval holds: LoRA." in table.caption
    contrasts = contrast_table(results, Question("ExpRAG-LoRA", "zero-shot"), how=how)
    assert "Seeds, drawn apart: ExpRAG-LoRA 3, zero-shot 1, LoRA 1." in contrasts.caption and contrasts.rows[0][2].startswith("+50.0 [")
    gap, alone = answer(results, Question("ExpRAG-LoRA", "zero-shot"), how).gap, answer(load_results(tmp_path, names=["LoRA", "zero-shot"]), Question("LoRA", "zero-shot"), how).gap
    assert gap.high - gap.low > 10 and alone.low > 0, "the luck of three seeds is in the interval"


# ---- names ----

def sweep(tmp_path, *settings, name="ExpRAG-LoRA", seeds=(0, 1)):
    for more in settings:
        for seed in seeds: make_run(tmp_path, name, seed, policy={"weights": f"w{seed}"}, **({"condition": {"k": 2, "composition": "matched", "seed": seed, **more}} if "memory" not in more else {"condition": {"k": 2}, **more}))
    return load_results(tmp_path)


def test_a_sweep_in_one_directory_is_told_apart(tmp_path):
    results = sweep(tmp_path / "a", {}, {"k": 4}, {"k": 1}, {"composition": "empty"}, {"outcomes": "all"})
    assert sorted(results.names) == ["ExpRAG-LoRA", "ExpRAG-LoRA, composition=empty", "ExpRAG-LoRA, k=1", "ExpRAG-LoRA, k=4", "ExpRAG-LoRA, outcomes=all"]
    assert all([r.seed for r in results.of(n)] == [0, 1] for n in results.names) and results.names[0] == "ExpRAG-LoRA"
    assert load_results(tmp_path / "a", names=["ExpRAG-LoRA, k=4", "ExpRAG-LoRA"]).names == ("ExpRAG-LoRA, k=4", "ExpRAG-LoRA")
    views = sweep(tmp_path / "b", *({"memory": {"retriever": {"encoder": "minilm"}, "view": v}} for v in ("actions", "chat")))
    assert views.names == ("ExpRAG-LoRA, view=actions", "ExpRAG-LoRA, view=chat")
    alone = sweep(tmp_path / "c", {"k": 4})
    assert alone.names == ("ExpRAG-LoRA",), "nothing to be told from"
    replayed = sweep(tmp_path / "d", {"k": 1}, {"k": 3}, name="replay", seeds=(0,))
    assert replayed.names == ("replay", "replay, k=3")


def test_usual_values_are_those_of_the_conditions():
    from exprag.evaluation import CONDITIONS
    assert all(getattr(c, field) == (1 if (c.name, field) == ("replay", "k") else value) for c in CONDITIONS.values() for field, value in USUAL.items())


def test_seeds_with_other_settings_are_not_one_condition(tmp_path):
    make_run(tmp_path, "LoRA", 0, condition={"k": 2})
    make_run(tmp_path, "LoRA", 1, condition={"k": 4})
    assert load_results(tmp_path).names == ("LoRA", "LoRA, k=4")


def test_runs_that_nothing_tells_apart_are_refused(tmp_path):
    one = make_run(tmp_path, "LoRA", policy={"weights": "a"})
    make_run(tmp_path, "LoRA", policy={"weights": "b"})
    with pytest.raises(ValueError, match=r"differ in policy.weights; give one another name, such as condition\(..., name='LoRA, epoch 2'\)"): load_results(tmp_path)
    shutil.rmtree(next(p for p in tmp_path.iterdir() if p != one.folder))
    shutil.copytree(one.folder, tmp_path / "copy")
    with pytest.raises(ValueError, match="and differ in nothing"): load_results(tmp_path)


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
    bars = plot_results(results, how=Bootstrap(200))
    assert [t.get_text() for t in bars.get_yticklabels()] == ["LoRA", "ExpRAG-LoRA"] and bars.get_xlabel()
    dumbbells = plot_types(results, on="hard")
    assert sorted(t.get_text() for t in dumbbells.get_yticklabels()) == sorted(HARD_TYPES[:4])
    plot_types(results, "LoRA", "ExpRAG-LoRA", "steps", ax=bars)
    plt.close("all")
