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
from exprag.demo import (
    CONTROLS, DEMO_TYPES, FIVE, PLANS, TRACKED_REPLAY, Place, Plan, allowed, condition_of, demo,
    demo_panel, demo_tasks, memory_of, memory_of_demonstrations, shared_environments, train_adapters,
    with_tracking)
from exprag.memory.procedure import procedure, procedure_distances
from exprag.memory.tracking import align
from exprag.models.local import HFPolicy
from exprag.query import Retriever, SentenceEncoder
from exprag.samples import CONFIGS
from exprag.select import Every, Once
from exprag.store import Store
from exprag.world import difficulty
from exprag.worlds.scienceworld import EASY_TYPES, HARD_TYPES, MENDELIAN_TYPES

COMMAND = [sys.executable, "-c", "import sys; from exprag.cli import main; sys.exit(main())", "demo", "--quick", "--threads", "1"]


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "whole"
    done = run(out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_the_quick_demo_prints_its_table_and_writes_everything(finished):
    out, done = finished
    assert (out / "table.txt").read_text() in done.stdout
    assert all(name in done.stdout for name in PLANS["quick"].conditions) and "ExpRAG-LoRA minus LoRA" in done.stdout
    assert "Task by task" in (out / "report.html").read_text() and (out / "figure.png").read_bytes()[:4] == b"\x89PNG" and len(list((out / "episodes").glob("*/episodes.jsonl"))) == 5


def test_run_again_it_reuses_what_is_there(finished):
    out, _ = finished
    before = {f: f.stat().st_mtime_ns for kind in ("episodes/*/episodes.jsonl", "adapters/*/report.json") for f in out.glob(kind)}
    again = run(out)
    assert again.returncode == 0 and {f: f.stat().st_mtime_ns for f in before} == before


def test_no_warning_that_a_user_can_do_nothing_about(finished):
    assert "Warning" not in finished[1].stderr, finished[1].stderr[-2000:]


@pytest.mark.slow
def test_the_oracle_asks_experts_that_want_a_new_simulator(tmp_path):
    plan = replace(PLANS["quick"], types=("test-conductivity", "power-component"), conditions=(*FIVE, *CONTROLS))
    assert set(demo(tmp_path, plan, threads=1, progress=False).names) == {*FIVE, *CONTROLS}


@pytest.mark.slow
def test_killed_while_collecting_training_and_evaluating_it_ends_in_the_same_table(finished, tmp_path):
    out = tmp_path / "killed"
    kill_when(out, lambda: list(out.glob("experience-*.db")))
    kill_when(out, lambda: any(f.stat().st_size for f in out.glob("adapters/*/losses.jsonl")))
    kill_when(out, lambda: any(f.stat().st_size for f in out.glob("episodes/*/episodes.jsonl")))
    assert run(out).returncode == 0
    assert (out / "table.txt").read_text() in finished[1].stdout


def test_controls_join_what_is_there(finished):
    out, _ = finished
    before = {f: f.stat().st_mtime_ns for f in out.glob("episodes/*/episodes.jsonl")}
    done = run(out, ["--controls"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in (*FIVE, *CONTROLS)) and "ExpRAG-LoRA minus replay" in done.stdout
    assert TRACKED_REPLAY not in done.stdout
    assert len(list(out.glob("episodes/*/episodes.jsonl"))) == len(FIVE) + len(CONTROLS) and {f: f.stat().st_mtime_ns for f in before} == before


def test_progress_tracking_is_switched_on_by_name(finished, tmp_path):
    "With its control: nine conditions; the store of experience is the same."
    for store in finished[0].glob("experience-*.db"): (tmp_path / store.name).write_bytes(store.read_bytes())
    done = run(tmp_path, ["--track-progress", "--controls"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in (*FIVE, *CONTROLS, TRACKED_REPLAY)) and f"ExpRAG-LoRA minus {TRACKED_REPLAY}" in done.stdout
    assert len(list(tmp_path.glob("experience-*.db"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "mistral"])  # no system role; strict alternation
def test_another_chat_model_goes_through_it_from_a_folder(family, tmp_path):
    tokenizer = make_tokenizer(family)
    for part in (tokenizer, make_model(family, len(tokenizer), max_position_embeddings=8192)): part.save_pretrained(tmp_path / family)
    done = run(tmp_path / "out", options=["--model", str(tmp_path / family), "--recipe", "nano"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ExpRAG-LoRA minus LoRA" in done.stdout and len(list((tmp_path / "out" / "adapters").glob("*/report.json"))) == 2


def demonstrations(store) -> list:
    return [t for t in map(store.get, store.find(types=PLANS["quick"].easy_types)) if len(t) <= 32]


def test_demonstrations_are_paired_by_what_was_done_or_by_goal(finished):
    def far(found): return procedure_distances([procedure(t) for t in some], [procedure(e.trajectory) for e in found]).diagonal()
    with Store(next(finished[0].glob("experience-*.db"))) as store:
        retriever, some = Retriever(store, SentenceEncoder()), demonstrations(store)
        def recalled(how):
            memory = memory_of_demonstrations(replace(PLANS["quick"], pair=how), retriever, some)
            return [memory.recall(t.opening()).experiences[0] for t in some]
        shown = {how: recalled(how) for how in ("goal", "procedure")}
        with pytest.raises(ValueError, match="unknown way to pair demonstrations 'luck'"): recalled("luck")
    assert all(t.task != e.task for found in shown.values() for t, e in zip(some, found))
    assert (far(shown["procedure"]) <= far(shown["goal"]) + 1e-6).all() and {e.task.type for e in shown["procedure"]} <= set(EASY_TYPES)


def test_demonstrations_that_do_not_agree_with_their_experience_are_left_out(finished, monkeypatch):
    given, plan = [], with_tracking(PLANS["quick"])
    def train(model, samples, *rest, **settings):
        given.append({s.task for s in samples})
        raise InterruptedError
    monkeypatch.setattr("exprag.demo.train", train)
    with Store(next(finished[0].glob("experience-*.db"))) as store:
        retriever, encoder = Retriever(store, SentenceEncoder()), HFPolicy.from_pretrained("nano", batch_size=1).encoder
        some = {t.task: t for t in demonstrations(store)}
        found = retrieve_for_training(some.values(), memory_of_demonstrations(plan, retriever, list(some.values())), adapt=align)
        share = {task: action_agreement(t, found.recall(t).experiences) for task, t in some.items()}
        edge = sorted(share.values())[len(share) // 2]
        def trained(least): train_adapters(replace(plan, agreement=least), store, retriever, Place(finished[0]), CONFIGS["nano"], encoder)
        for least in (0.0, edge):
            with pytest.raises(InterruptedError): trained(least)
        with pytest.raises(ValueError, match="lower `agreement`"): trained(1.1)
    assert given == [set(some), {task for task, agrees in share.items() if agrees >= edge}] and len(given[1]) < len(given[0])


def test_the_batch_is_fitted_to_the_samples_and_the_optimiser_is_not_touched():
    assert allowed(CONFIGS["paper"], 8) == replace(CONFIGS["paper"], batch=8), "train says aloud which optimiser it takes instead"
    assert allowed(CONFIGS["nano"], 500) == CONFIGS["nano"] and allowed(replace(CONFIGS["nano"], micro_batch=4), 7).batch == 4


def test_the_plan_keeps_hard_types_for_retrieval_and_out_of_training():
    plan = Plan()
    assert set(DEMO_TYPES) == set(HARD_TYPES) - set(MENDELIAN_TYPES) and len(DEMO_TYPES) == 11
    tasks = demo_tasks(plan)
    assert {t.fold for t in tasks} == {"train"} and {t.type for t in tasks} == set(EASY_TYPES) | set(DEMO_TYPES)
    panel = demo_panel(plan)
    assert len(panel.tasks) == 11 and {t.fold for t in panel.tasks} == {"test"} and {difficulty(t) for t in panel.tasks} == {"hard"}


def test_the_memory_of_the_plan_is_the_papers(finished):
    "Asked once, by goal, whole episodes, nothing rewritten."
    with Store(next(finished[0].glob("experience-*.db"))) as store:
        retriever = Retriever(store, SentenceEncoder())
        for name in ("ExpRAG (frozen)", "ExpRAG-LoRA", "replay", "random experience"):
            memory = memory_of(Plan(), condition_of(Plan(), name), retriever)
            assert isinstance(memory.when, Once) and [s.name for s in memory.stages] == ["exclude_same_task", "successes_only", "top_k"]
        assert (retriever.key, retriever.query) == ("goal", "goal")


def test_progress_tracking_is_in_every_memory_but_the_plain_replays(finished):
    plan = with_tracking(Plan())
    with Store(next(finished[0].glob("experience-*.db"))) as store:
        retriever = Retriever(store, SentenceEncoder())
        for name in ("ExpRAG (frozen)", "LoRA, retrieval at test only", "ExpRAG-LoRA", TRACKED_REPLAY, "random experience", "replay"):
            chosen = condition_of(plan, name)
            memory = memory_of(plan, chosen, retriever)
            tracked = name != "replay"
            assert isinstance(memory.when, Every) == tracked == ("drop_rejected" in [s.name for s in memory.stages]) and chosen.k == 1
    assert condition_of(plan, "zero-shot").when == "once"


def test_conditions_share_their_simulators():
    made = []
    class Env:
        closed = 0
        def __init__(self): made.append(self)
        def close(self): self.closed += 1
    with shared_environments(Env) as give:
        first, second = give(), give()
        first.close(), first.close()
        assert len(made) == 2 and give() is not second and len(made) == 2 and not any(env.closed for env in made)
    assert [env.closed for env in made] == [1, 1]


def test_the_larger_panel_has_up_to_five_test_episodes_of_each_type():
    panel = demo_panel(PLANS["wide"])
    assert len(panel.tasks) == 54 and {t.type for t in panel.tasks} == set(DEMO_TYPES) and set(panel.left_out) == set(MENDELIAN_TYPES)
    assert {t.fold for t in panel.tasks} == {"test"} and set(demo_panel(Plan()).tasks) <= set(panel.tasks)
    with pytest.raises(ValueError, match="did you mean 'test-hard'"): demo_panel(replace(Plan(), panel="test_hard"))


def test_the_wide_plan_differs_from_the_demo_in_size_alone():
    assert replace(PLANS["wide"], panel="demo", easy=Plan().easy, hard=Plan().hard) == Plan()
    assert set(demo_tasks(Plan())) & set(demo_panel(PLANS["wide"]).tasks) == set() and len(demo_tasks(PLANS["wide"])) > 4 * len(demo_tasks(Plan()))



@pytest.mark.parametrize("arguments, said", [
    (["--recipe", "papre"], "did you mean 'paper'"),
    (["--model", "no/such-model", "--recipe", "nano"], "no/such-model"),
])
def test_a_wrong_name_is_one_line_that_says_what_to_do(arguments, said, tmp_path):
    done = subprocess.run([*COMMAND, "--out", str(tmp_path / "x"), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
