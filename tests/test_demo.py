"""The demo, as a user runs it: killed at a bad moment, run again, run once more."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from chat_models import make_model, make_tokenizer
from exprag.combined import action_agreement, retrieve_for_training
from exprag.demo import CONTROLS, SIZES, demo_plan
from exprag.memory.procedure import procedure, procedure_distances
from exprag.memory.tracking import align
from exprag.plans import FIVE, Plan, PlanError, collect_tasks, load_plan, plan_panels, variants
from exprag.query import Retriever, SentenceEncoder
from exprag.reproduce import demonstrations, paired, plan_memory, training_memory, training_samples
from exprag.select import Every, Once
from exprag.store import Store
from exprag.world import difficulty
from exprag.worlds.scienceworld import EASY_TYPES, HARD_TYPES, MENDELIAN_TYPES

COMMAND = [sys.executable, "-c", "import sys; from exprag.cli import main; sys.exit(main())", "demo", "--quick", "--threads", "1"]
DEMO_TYPES = set(HARD_TYPES) - set(MENDELIAN_TYPES)
WHOLE_REPLAY = "replay, when=once, stages=adapt_to_goal"


def plan_of(*arguments, changes=()) -> Plan:
    name, own = demo_plan(*arguments)
    return load_plan(name, [*own, *changes])


def run(out: Path, options=(), **settings):
    return subprocess.run([*COMMAND, "--out", str(out), *options], capture_output=True, text=True, timeout=900, **settings)


def kill_when(out: Path, there) -> None:
    "Start the demo and kill it, and all it started, as soon as `there()`."
    process = subprocess.Popen([*COMMAND, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 600
    while not there() and process.poll() is None and time.time() < deadline: time.sleep(0.05)
    assert process.poll() is None, "the demo ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def figures(text: str) -> list[str]:
    "The lines of a report, without the minutes of training, which a kill makes longer."
    return [line.rsplit(None, 1)[0] if "seed 2025" in line else line for line in text.splitlines()]


def report_of(out: Path) -> Path:
    report, = out.glob("report-*")
    return report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "whole"
    done = run(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


@pytest.fixture
def store(finished):
    with Store(next(finished[0].glob("experience-*.db"))) as store: yield store


def test_the_quick_demo_prints_its_table_and_writes_everything(finished):
    out, done = finished
    report = report_of(out)
    assert (report / "tables.txt").read_text() in done.stdout
    assert all(name in done.stdout for name in FIVE) and "ExpRAG-LoRA minus LoRA" in done.stdout and MENDELIAN_TYPES[0] in done.stdout
    assert "Task by task" in (report / "report.html").read_text() and (report / "demo-part.png").read_bytes()[:4] == b"\x89PNG" and len(list((out / "episodes").glob("*/episodes.jsonl"))) == 5
    assert str(report) in done.stdout and "3 of 3: 5 conditions on 2 test tasks" in done.stdout


def test_run_again_it_reuses_what_is_there(finished):
    out, done = finished
    before = {f: f.stat().st_mtime_ns for kind in ("episodes/*/episodes.jsonl", "adapters/*/report.json") for f in out.glob(kind)}
    (report_of(out) / "runs.json").unlink()  # else nothing is even looked at
    again = run(out)
    assert again.returncode == 0 and len(before) == 7 and {f: f.stat().st_mtime_ns for f in before} == before
    assert again.stdout == done.stdout


def test_no_warning_that_a_user_can_do_nothing_about(finished):
    assert "Warning" not in finished[1].stderr, finished[1].stderr[-2000:]


@pytest.mark.slow
def test_the_oracle_asks_experts_that_want_a_new_simulator(tmp_path):
    options = ["--controls", "--set", "types=['find-plant', 'find-animal', 'melt', 'use-thermometer', 'test-conductivity', 'power-component']"]
    done = run(tmp_path, options)
    assert done.returncode == 0 and all(name in done.stdout for name in (*FIVE, *CONTROLS)), done.stderr[-3000:]


@pytest.mark.slow
def test_killed_while_collecting_training_and_evaluating_it_ends_in_the_same_table(finished, tmp_path):
    out = tmp_path / "killed"
    kill_when(out, lambda: list(out.glob("experience-*.db")))
    kill_when(out, lambda: any(f.stat().st_size for f in out.glob("adapters/*/losses.jsonl")))
    kill_when(out, lambda: any(f.stat().st_size for f in out.glob("episodes/*/episodes.jsonl")))
    assert run(out).returncode == 0
    assert figures((report_of(out) / "tables.txt").read_text()) == figures((finished[0] / report_of(out).name / "tables.txt").read_text())


def test_controls_join_what_is_there(finished):
    out, _ = finished
    before = {f: f.stat().st_mtime_ns for f in out.glob("episodes/*/episodes.jsonl")}
    done = run(out, ["--controls"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in (*FIVE, *CONTROLS)) and "ExpRAG-LoRA minus replay" in done.stdout
    assert WHOLE_REPLAY not in done.stdout
    assert len(list(out.glob("episodes/*/episodes.jsonl"))) == len(FIVE) + len(CONTROLS) and {f: f.stat().st_mtime_ns for f in before} == before


def test_progress_tracking_is_switched_on_by_name(finished, tmp_path):
    "With its control: nine conditions; the store of experience is the same."
    for store in finished[0].glob("experience-*.db"): (tmp_path / store.name).write_bytes(store.read_bytes())
    done = run(tmp_path, ["--track-progress", "--controls"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in (*FIVE, *CONTROLS, WHOLE_REPLAY)) and "ExpRAG-LoRA minus replay" in done.stdout
    assert len(list(tmp_path.glob("experience-*.db"))) == 1 and len(list(tmp_path.glob("episodes/*/episodes.jsonl"))) == 9


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "mistral"])  # no system role; strict alternation
def test_another_chat_model_goes_through_it_from_a_folder(family, tmp_path):
    tokenizer = make_tokenizer(family)
    for part in (tokenizer, make_model(family, len(tokenizer), max_position_embeddings=8192)): part.save_pretrained(tmp_path / family)
    done = run(tmp_path / "out", options=["--model", str(tmp_path / family), "--recipe", "nano"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ExpRAG-LoRA minus LoRA" in done.stdout and len(list((tmp_path / "out" / "adapters").glob("*/report.json"))) == 2


def test_demonstrations_are_paired_by_what_was_done_or_by_goal(store):
    def far(found): return procedure_distances([procedure(t) for t in some], [procedure(e.trajectory) for e in found]).diagonal()
    some = demonstrations(plan_of("quick"), store)
    def recalled(how):
        memory = training_memory(plan_of("quick", changes=[f"train.pair={how}"]), store, some)
        return [memory.recall(t.opening()).experiences[0] for t in some]
    shown = {how: recalled(how) for how in ("goal", "procedure")}
    assert all(t.task != e.task for found in shown.values() for t, e in zip(some, found)) and len(some) == 8
    assert (far(shown["procedure"]) <= far(shown["goal"]) + 1e-6).all() and {e.task.type for e in shown["procedure"]} <= set(EASY_TYPES)
    with pytest.raises(PlanError, match="unknown way to pair demonstrations 'luck'"): plan_of("quick", changes=["train.pair=luck"])


def test_demonstrations_that_do_not_agree_with_their_experience_are_left_out(store):
    plan = plan_of("quick", True)
    some = {t.task: t for t in demonstrations(plan, store)}
    found = retrieve_for_training(some.values(), training_memory(plan, store, list(some.values())), adapt=align)
    share = {task: action_agreement(t, found.recall(t).experiences) for task, t in some.items()}
    edge = sorted(share.values())[len(share) // 2]
    def trained(least):
        made = training_samples(plan_of("quick", True, changes=[f"train.agreement={least}"]), store, 2025)
        assert [s.task for s in made["lora"]] == [s.task for s in made["exprag-lora"]]
        return {s.task for s in made["lora"]}
    assert trained(0.0) == set(some) and trained(edge) == {task for task, agrees in share.items() if agrees >= edge} and len(trained(edge)) < len(some)
    with pytest.raises(PlanError, match="lower train.agreement"): trained(1.1)


def test_where_the_memory_tracks_progress_training_contexts_are_aligned_with_the_whole_demonstration(store):
    static, tracked = (plan_of("quick", follows, changes=["train.pair=goal"]) for follows in (False, True))
    for plan, aligned in ((static, False), (tracked, True)):
        chosen, recalled = paired(plan, store, 2025)
        memory = training_memory(plan, store, chosen)
        assert isinstance(memory.when, Once) and ("adapt_to_goal" in [s.name for s in memory.stages]) == aligned
        for t in chosen:
            plain, = memory.recall(t.opening())
            assert recalled.recall(t).experiences[0].actions == (align(plain, t) if aligned else plain).actions
    assert any(align(training_memory(tracked, store, chosen).recall(t.opening()).experiences[0], t).actions != training_memory(tracked, store, chosen).recall(t.opening()).experiences[0].actions for t in chosen)


def test_the_plan_keeps_hard_types_for_retrieval_and_out_of_training():
    for plan in (plan_of(), plan_of("demo", True)):
        tasks = collect_tasks(plan)
        assert {t.fold for t in tasks} == {"train"} and {t.type for t in tasks} == set(EASY_TYPES) | DEMO_TYPES
        panel, = plan_panels(plan)
        assert len(panel.tasks) == 11 and {t.fold for t in panel.tasks} == {"test"} and {difficulty(t) for t in panel.tasks} == {"hard"}
        assert {t.type for t in panel} == DEMO_TYPES and panel.name == "demo"


def memories(plan, store) -> dict:
    "The memory of each condition that is not the oracle's, by name."
    goal = Retriever(store, SentenceEncoder())
    return {v.condition.name: plan_memory(plan, v, goal) for v in variants(plan) if v.condition.memory != "oracle"}


def test_the_memory_of_the_plan_is_the_papers(store):
    "Asked once, by goal, whole episodes, nothing rewritten."
    plan = plan_of("demo", False, True)
    made = memories(plan, store)
    for name in ("ExpRAG (frozen)", "ExpRAG-LoRA", "replay", "random experience"):
        assert isinstance(made[name].when, Once) and [s.name for s in made[name].stages] == ["exclude_same_task", "successes_only", "top_k"]
    assert (plan.memory.key, plan.memory.when, plan.memory.k) == ("goal", "once", 1)


def test_progress_tracking_is_in_every_memory_but_the_whole_replays(store):
    plan = plan_of("demo", True, True)
    made, several = memories(plan, store), {v.condition.name: v for v in variants(plan)}
    for name in ("ExpRAG (frozen)", "LoRA, retrieval at test only", "ExpRAG-LoRA", "replay", "random experience", WHOLE_REPLAY):
        memory, tracked = made[name], name != WHOLE_REPLAY
        names = [s.name for s in memory.stages]
        assert isinstance(memory.when, Every) == tracked == ("drop_rejected" in names) and several[name].condition.k == 1
        assert names[-1] == "adapt_to_goal" and (not tracked or names.index("rank_by_outcome") < names.index("top_k"))
    assert several["zero-shot"].condition.when == "once" and several["oracle experience"].condition.when == "every 1"
    assert (plan.memory.key_within, plan.memory.query_within) == ("goal", "goal"), "what is found does not change; what is done with it does"


def test_the_larger_panel_has_up_to_five_test_episodes_of_each_type():
    panel, = plan_panels(plan_of("wide"))
    small, = plan_panels(plan_of())
    assert len(panel.tasks) == 54 and {t.type for t in panel.tasks} == DEMO_TYPES and set(panel.left_out) == set(MENDELIAN_TYPES)
    assert {t.fold for t in panel.tasks} == {"test"} and set(small.tasks) <= set(panel.tasks)
    with pytest.raises(PlanError, match="did you mean 'test-hard'"): plan_of("demo", changes=["evaluate.panels=['test_hard']"])


def test_the_wide_plan_differs_from_the_demo_in_size_alone():
    demo, wide = plan_of(), plan_of("wide")
    assert replace(wide, name="demo", collect=demo.collect, evaluate=demo.evaluate) == demo
    assert replace(wide.collect, easy=demo.collect.easy, hard=demo.collect.hard) == demo.collect and replace(wide.evaluate, panels=("demo",)) == demo.evaluate
    assert set(collect_tasks(demo)) & set(plan_panels(wide)[0]) == set() and len(collect_tasks(wide)) > 4 * len(collect_tasks(demo))


def test_the_tracked_plan_differs_from_the_demo_in_its_memory_alone():
    demo, tracked = plan_of(), plan_of("demo", True)
    assert replace(tracked, name="demo", about=demo.about, memory=demo.memory, policy=demo.policy, train=demo.train) == demo
    assert replace(tracked.train, pair="goal", agreement=0.0) == demo.train and tracked.policy == {"avoid_rejected": True}
    assert replace(tracked.memory, when="once", stages=(), key_within="history", query_within="so_far") == demo.memory


@pytest.mark.parametrize("size", SIZES)
def test_another_recipe_takes_its_own_settings_but_for_the_size(size):
    from exprag.plans import sft_config
    from exprag.samples import CONFIGS
    config = sft_config(plan_of(size, False, False, "paper"), 2025)
    own = {"max_steps": 12, "batch": 4, "save_steps": 4} if size == "quick" else {}
    assert config == replace(CONFIGS["paper"], seed=2025, **own)
    with pytest.raises(ValueError, match="did you mean 'quick'"): demo_plan("quik")


@pytest.mark.parametrize("arguments, said", [
    (["--recipe", "papre"], "did you mean 'paper'"),
    (["--model", "no/such-model", "--recipe", "nano"], "no/such-model"),
])
def test_a_wrong_name_is_one_line_that_says_what_to_do(arguments, said, tmp_path):
    done = subprocess.run([*COMMAND, "--out", str(tmp_path / "x"), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists(), "nothing is collected for a plan that cannot be run"
