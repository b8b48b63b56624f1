"""The demo, as a user runs it: killed at a bad moment, run again, run once more."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exprag.demo import DEMO_TYPES, PLANS, Plan, demo_panel, demo_tasks
from exprag.environment import EASY_TYPES, HARD_TYPES, MENDELIAN_TYPES, side

COMMAND = [sys.executable, "-c", "import sys; from exprag.cli import main; sys.exit(main())", "demo", "--quick", "--threads", "1"]


def run(out: Path, **settings):
    return subprocess.run([*COMMAND, "--out", str(out)], capture_output=True, text=True, timeout=900, **settings)


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
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG" and len(list((out / "episodes").glob("*/episodes.jsonl"))) == 5


def test_run_again_it_reuses_what_is_there(finished):
    out, _ = finished
    before = {f: f.stat().st_mtime_ns for kind in ("episodes/*/episodes.jsonl", "adapters/*/report.json") for f in out.glob(kind)}
    again = run(out)
    assert again.returncode == 0 and {f: f.stat().st_mtime_ns for f in before} == before


@pytest.mark.slow
def test_killed_while_collecting_training_and_evaluating_it_ends_in_the_same_table(finished, tmp_path):
    out = tmp_path / "killed"
    kill_when(out, lambda: list(out.glob("experience-*.db")))
    kill_when(out, lambda: any(f.stat().st_size for f in out.glob("adapters/*/losses.jsonl")))
    kill_when(out, lambda: any(f.stat().st_size for f in out.glob("episodes/*/episodes.jsonl")))
    assert run(out).returncode == 0
    assert (out / "table.txt").read_text() == (finished[0] / "table.txt").read_text()


def test_the_plan_keeps_hard_types_for_retrieval_and_out_of_training():
    plan = Plan()
    assert set(DEMO_TYPES) == set(HARD_TYPES) - set(MENDELIAN_TYPES) and len(DEMO_TYPES) == 11
    tasks = demo_tasks(plan)
    assert {t.fold for t in tasks} == {"train"} and {t.type for t in tasks} == set(EASY_TYPES) | set(DEMO_TYPES)
    panel = demo_panel(plan)
    assert len(panel.tasks) == 11 and {t.fold for t in panel.tasks} == {"test"} and {side(t.type) for t in panel.tasks} == {"hard"}


@pytest.mark.parametrize("arguments, said", [
    (["--recipe", "papre"], "did you mean 'paper'"),
    (["--model", "no/such-model", "--recipe", "nano"], "no/such-model"),
])
def test_a_wrong_name_is_one_line_that_says_what_to_do(arguments, said, tmp_path):
    done = subprocess.run([*COMMAND, "--out", str(tmp_path / "x"), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
