"A plan runs from nothing to a report; killed anywhere, it goes on, and the report is the same."
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from exprag.curves import curves, curves_said, curves_table
from exprag.page import report_runs
from exprag.plans import PlanError, load_plan, plan_panels, variants
from exprag.reproduce import (Place, _policy, demonstrations, estimate, report_stage, reproduce, store_path,
                              training_samples)
from exprag.results import load_results
from exprag.sft import RunReport
from exprag.store import Store
from exprag.trajectory import read_jsonl
from exprag.view.viewer import Guard, Viewer, application
from exprag.view.viewer import Place as Place_

CHANGES = ["train.change.max_steps=4", "train.change.save_steps=1", "evaluate.max_new_tokens=12",
           "collect.easy=3", "collect.hard=2",
           "evaluate.conditions=['zero-shot', 'LoRA', 'ExpRAG-LoRA', 'ExpRAG-LoRA, symbols']"]


def place(folder): return Place(Path(folder), batch_size=5, workers=1, threads=1, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, reproduce(load_plan("quick-shop", CHANGES), place(folder))


def test_ends_in_tables_and_a_figure(whole):
    folder, text = whole
    report, = folder.glob("report-*")
    assert (report / "tables.txt").read_text() == text
    assert list(report.glob("*.png"))
    written = json.loads((report / "plan.json").read_text())
    assert written["model"] == "nano" and written["memory"]["k"] == 1
    assert written["train"]["change"]["max_steps"] == 4
    for name in ("zero-shot", "ExpRAG-LoRA", "exprag-lora, seed 2025", "ExpRAG-LoRA, symbols", "exprag-lora-symbols, seed 2025"):
        assert name in text


def test_what_is_there_is_not_made_again(whole):
    folder, text = whole
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("episodes.jsonl")}
    for path in folder.glob("report-*/runs.json"): path.unlink()  # else nothing is even looked at
    assert reproduce(load_plan("quick-shop", CHANGES), place(folder)) == text
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("episodes.jsonl")}


def test_a_changed_condition_leaves_the_adapters(whole):
    folder, _ = whole
    adapters = sorted((folder / "adapters").iterdir())
    plan = load_plan("quick-shop", [*CHANGES, "evaluate.conditions=['LoRA', 'ExpRAG-LoRA']",
                                    "evaluate.vary=[{condition='ExpRAG-LoRA', k=[0]}, "
                                    "{condition='ExpRAG-LoRA', when=['every 1']}]"])
    assert "ExpRAG-LoRA, k=0" in reproduce(plan, place(folder))
    assert sorted((folder / "adapters").iterdir()) == adapters
    queries = {}
    for path in (folder / "episodes").glob("*/config.json"):
        config = json.loads(path.read_text())
        if config["memory"]["kind"] == "retrieved":
            queries[config["name"]] = config["memory"]["retriever"]["query"]
    assert queries["ExpRAG-LoRA"] == "goal"
    assert queries["ExpRAG-LoRA, when=every 1"] == "so_far"  # a goal would never change


def test_the_oracle_and_a_memory_that_follows_the_agent_are_plans_too(whole):
    folder, _ = whole
    plan = load_plan("quick-shop", [*CHANGES, "memory.when='every 1'", "memory.stages=['track_progress', 'adapt_to_goal']",
                                    "train.pair='procedure'", "evaluate.conditions=['replay', 'oracle experience']",
                                    "evaluate.vary=[{condition='replay', when=['once'], stages=[['adapt_to_goal']]}]"])
    text = reproduce(plan, place(folder))
    assert all(name in text for name in ("oracle experience", "replay", "replay, when=once, stages=adapt_to_goal"))
    asked = {}
    for path in (folder / "episodes").glob("*/config.json"):
        config = json.loads(path.read_text())
        asked[config["name"]] = [stage["stage"] for stage in config["memory"].get("stages", ())], config["memory"].get("retriever")
    tracked, static = asked["replay"][0], asked["replay, when=once, stages=adapt_to_goal"][0]
    assert static == ["exclude_same_task", "successes_only", "top_k", "adapt_to_goal"] and "drop_rejected" in tracked
    assert asked["oracle experience"][0] == tracked and asked["oracle experience"][1]["retriever"] == "oracle"
    oracle, = folder.glob("oracle-*.jsonl")
    paths, refused = read_jsonl(oracle)
    assert {t.task for t in paths} == set(plan_panels(plan)[0]) and not refused


def test_a_share_of_the_demonstrations_has_other_words_where_a_condition_wants_it(whole):
    folder, _ = whole
    with Store(store_path(load_plan("quick-shop", CHANGES), place(folder))) as store:
        made = training_samples(load_plan("quick-shop", CHANGES), store, 2025)
        same = [a.ids == b.ids for a, b in zip(made["exprag-lora"], made["exprag-lora-symbols"])]
        assert 0 < sum(same) < len(same) == 9
        none = training_samples(load_plan("quick-shop", [*CHANGES, "train.symbols=0.0"]), store, 2025)
        assert none["exprag-lora-symbols"] == none["exprag-lora"] == made["exprag-lora"]
        five = load_plan("quick-shop", [*CHANGES, "evaluate.conditions=['LoRA', 'ExpRAG-LoRA']"])
        assert set(training_samples(five, store, 2025).groups) == {"lora", "exprag-lora"}


def test_only_easy_episodes_of_the_train_fold_are_imitated(whole):
    folder, _ = whole
    plan = load_plan("quick-shop", CHANGES)
    with Store(store_path(plan, place(folder))) as store:
        chosen = demonstrations(plan, store)
        assert len(chosen) == 9 and all(t.success for t in chosen)
        assert {t.task.type for t in chosen} == {"count-orders", "total-spent", "last-order"}
        assert len(store.find(types=["best-seller"])) == 2  # in the index, and not in a weight


COMMAND = [sys.executable, "-c", "import sys; from exprag.cli import main; sys.exit(main())",
           "reproduce", "quick-shop", "--threads", "1", "--workers", "1", "--batch-size", "5",
           *(part for change in CHANGES for part in ("--set", change))]


@pytest.mark.parametrize("sign", ["losses.jsonl", "episodes.jsonl"])
def test_a_kill_costs_nothing_but_the_step_in_hand(whole, tmp_path, sign):
    process = subprocess.Popen([*COMMAND, "--out", tmp_path], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    def begun(): return any(p.stat().st_size for p in tmp_path.rglob(sign))
    while not begun() and time.monotonic() < deadline and process.poll() is None: time.sleep(0.05)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*COMMAND, "--out", tmp_path], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    def figures(text):  # without minutes, which a kill makes longer
        return [line.rsplit(None, 1)[0] if "seed 2025" in line else line
                for line in text.splitlines()]
    report, = tmp_path.glob("report-*")
    assert figures((report / "tables.txt").read_text()) == figures(whole[1])


def test_a_dry_run_says_what_it_would_cost_and_leaves_nothing(tmp_path):
    plan = load_plan("quick-shop", CHANGES)
    table = estimate(plan, place(tmp_path))
    assert [row[0] for row in table.rows] == ["collect", "train", "evaluate", "all"]
    assert "4 steps on 9 demonstrations" in table.rows[1][1]
    assert f"{len(variants(plan)) * 5} episodes" in table.rows[2][1]
    assert not list(tmp_path.iterdir())


def test_a_report_without_runs_says_how_to_make_them(tmp_path):
    with pytest.raises(PlanError, match="exprag evaluate quick-shop"):
        report_stage(load_plan("quick-shop"), place(tmp_path))


def test_an_epoch_that_was_not_kept_is_one_line(whole):
    folder, _ = whole
    plan = load_plan("quick-shop", [*CHANGES, "evaluate.vary=[{condition='LoRA', epoch=[1]}]"])
    with pytest.raises(PlanError, match="keep_epochs"): reproduce(plan, place(folder))


def test_a_curve_over_epochs_comes_from_one_run(tmp_path):
    changes = ["train.change.max_steps=0", "train.change.epochs=2", "train.change.keep_epochs='all'",
               "collect.easy=2", "collect.hard=1", "evaluate.max_new_tokens=8",
               "evaluate.conditions=['LoRA']", "train.change.warmup=0",
               "evaluate.vary=[{condition='LoRA', epoch=[1, 2]}]"]
    text = reproduce(load_plan("quick-shop", changes), place(tmp_path))
    assert "LoRA, epoch=1" in text and "LoRA, epoch=2" in text
    adapters, = (tmp_path / "adapters").iterdir()
    results = load_results(tmp_path / "episodes")
    curve, = curves(results)  # the last epoch was run under two names, and stands in it once
    assert curve.condition == "LoRA" and curve.names == {1: "LoRA, epoch=1", 2: "LoRA"}
    report = RunReport.read(adapters)
    steps = {x["step"]: (x["loss"], x["supervised"]) for x in report.losses}
    first = [steps[n] for n in range(1, report.epochs[1] + 1)]
    assert curve.losses[1] == pytest.approx(sum(a * b for a, b in first) / sum(b for _, b in first))
    assert str(curves_table(results)) in text and list(tmp_path.glob("report-*/*-epochs.png"))
    (tmp_path / "other").mkdir()
    for folder in (tmp_path / "episodes").iterdir(): shutil.copytree(folder, tmp_path / "other" / folder.name)
    written, = tmp_path.glob("report-*/report.html")
    pages = [written.read_text("utf-8"), report_runs(tmp_path / "other").read_text("utf-8")]
    guarded = TestClient(Guard(application(Viewer(Place_.open(tmp_path))), "t", 8000), base_url="http://127.0.0.1:8000")
    pages.append(guarded.get("/runs?token=t").text)
    words = html.escape(curves_said(results))
    figures = {re.search(f'alt="{re.escape(words)}" src="data:image/png;base64,([^"]+)"', page)[1] for page in pages}
    assert len(figures) == 1 and "on hard types (unseen), training loss" in words  # the report, `exprag report` and the viewer: one figure
    assert all(page.count("Over epochs") == 1 and page.count(f"<td>{curve.losses[2]:.3f}</td>") == 1 for page in pages)
    for path in (tmp_path / "other").glob("*/epoch.json"): path.unlink()
    assert "Over epochs" not in report_runs(tmp_path / "other").read_text("utf-8")


def test_the_plans_template_is_read_in_training_and_in_acting(whole, tmp_path):
    folder, _ = whole
    own = ("{% for m in messages %}<|{{ m['role'] }}|>~{{ m['content'] }}<|end|>{% endfor %}"
           "{% if add_generation_prompt %}<|assistant|>~{% endif %}")
    (tmp_path / "own.jinja").write_text(own)
    plain = load_plan("quick-shop", CHANGES)
    plan = load_plan("quick-shop", [*CHANGES, f"policy.chat_template='{tmp_path / 'own.jinja'}'"])
    with Store(store_path(plan, place(folder))) as store:
        sample = training_samples(plan, store, 2025)["lora"][0]
        usual = training_samples(plain, store, 2025)["lora"][0]
        episode = store.get(sample.source)
    condition = next(v for v in variants(plan) if v.condition.name == "zero-shot")
    policy = _policy(plan, place(folder), condition, None, {})
    prompt = policy.encoder.prompt(episode.opening(), ())
    assert sample.ids[:len(prompt)] == tuple(prompt) and len(sample.ids) > len(usual.ids)
    assert policy.encoder.tokenizer.decode(prompt).endswith("<|assistant|>~")


def test_a_probe_stops_when_a_machine_is_slow(tmp_path, monkeypatch):
    import exprag.reproduce as module
    lengths = []
    def slow(outputs, labels): lengths.append(labels.shape[1]); time.sleep(0.4); return real(outputs, labels)
    real = module.supervised_loss
    monkeypatch.setattr(module, "supervised_loss", slow)
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    estimate(load_plan("quick-shop", CHANGES), place(tmp_path))
    assert lengths == [32]
