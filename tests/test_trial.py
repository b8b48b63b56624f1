"A trial finds what was planted, says 'cannot tell' where nothing was, and loses no run."
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from encoders import Letters
from exprag.cli import main
from exprag.memory.chat_memory import ChatMemory
from exprag.memory.trial import (ARMS, Design, MemorySettings, Run, RunFile, Trial, TrialError, TrialMemory, TrialTask, confidence_sequence,
                                 decide, fewest_tasks, judge, read_tasks, run_once, run_trial, schedule, wealth)
from exprag.memory.trial_report import Command, Prices, Report, memory_here
from exprag.store import Store

TASKS = [TrialTask(f"t{i:02}", f"Deploy service {i}.", f"deploy {i} --north") for i in range(40)]
THINGS = ("amber", "birch", "coral", "delta", "ember", "flint", "grape", "hazel")
PYTHON = sys.executable


def store_of(path, goals=8, author="me", options=None):
    "A store with an episode for each of some goals."
    store = Store(path)
    memory = ChatMemory(store, Letters(), author, *[options] * bool(options))
    for thing in THINGS[:goals]:
        asked, did = {"role": "user", "content": f"Deploy thing {thing}."}, {"role": "assistant", "content": f"deploy {thing} --north"}
        memory.record([asked, did], success=True)
    return store


@pytest.fixture
def memory(tmp_path): return TrialMemory(store_of(tmp_path / "memory.db"), encoder=Letters())


class Still:
    "A memory without a store, for simulated agents."
    def describe(self): return {}
    def goal(self, id): return ""

    def arm(self, mode, seed=0):
        class Arm: shown = ()
        arm = Arm()
        arm.mode, arm.seed = mode, seed
        return arm


class Chance:
    "An agent that succeeds with a probability that depends on the arm, and on the task."
    def __init__(self, seed, base, gain): self.random, self.base, self.gain = random.Random(seed), base, gain
    def describe(self): return "chance"

    def __call__(self, task, memory):
        gain = self.gain(task) if callable(self.gain) else self.gain
        return self.random.random() < self.base + gain * (memory.mode == "on")


@pytest.fixture
def answers(tmp_path, monkeypatch):
    "A function that says how a hundred simulated trials end."
    monkeypatch.setattr(os, "fsync", lambda file: None)  # eight thousand of them; what it is for is tested below
    def run(gain, base=0.5):
        return Counter(run_trial(Chance(i, base, gain), TASKS, Still(), tmp_path / f"{i}", Design(("off", "on"), seed=i)).answer for i in range(100))
    return run


class TestRule:
    def test_a_planted_null_is_not_found(self, answers):
        assert answers(0)["cannot tell"] >= 95

    def test_nor_is_one_that_helps_half_of_the_tasks_and_hurts_the_others(self, answers):
        assert answers(lambda task: 0.5 if int(task.id[1:]) % 2 else -0.5)["cannot tell"] >= 95

    @pytest.mark.parametrize("gain, base, found", [(0.6, 0.2, "helps"), (-0.6, 0.8, "hurts")])
    def test_a_planted_effect_is_found_and_never_taken_for_its_opposite(self, answers, gain, base, found):
        said = answers(gain, base)
        assert said[found] >= 90 and said[found] + said["cannot tell"] == 100

    def test_a_clear_answer_ends_the_trial_early_and_a_hopeless_one_too(self, tmp_path):
        sure = run_trial(lambda task, memory: memory.mode == "on", TASKS, Still(), tmp_path / "sure")
        assert len(sure.tasks) == fewest_tasks(0.95) == 8 and sure.answer == "helps"
        same = run_trial(lambda task, memory: True, TASKS, Still(), tmp_path / "same")
        assert same.answer == "cannot tell" and same.hopeless and 20 < len(same.tasks) < 40

    def test_repeats_are_averaged_within_a_task(self, tmp_path):
        made = run_trial(Chance(3, 0.2, 0.6), TASKS, Still(), tmp_path, Design(("off", "on"), repeats=3))
        assert len(made.runs) == 6 * len(made.tasks)
        d = made.differences()
        assert len(d) == len(made.tasks) and set(np.round(3 * d)) <= {-3, -2, -1, 0, 1, 2, 3}
        first = [r for r in made.runs if r.task == made.tasks[0]]
        assert d[0] == pytest.approx(np.mean([r.score for r in first if r.arm == "on"]) - np.mean([r.score for r in first if r.arm == "off"]))

    @pytest.mark.parametrize("draw", [
        lambda rng, n: rng.choice([-1, 1], n),
        lambda rng, n: rng.choice([-1, 0, 0, 0, 1], n),
        lambda rng, n: np.where(rng.random(n) < 0.9, 0.1, -0.9),  # a rare large harm
        lambda rng, n: rng.uniform(-0.2, 0.2, n)])
    def test_the_error_under_optional_stopping_is_at_most_what_is_promised(self, draw):
        rng = np.random.default_rng(5)
        wrong = sum(decide(draw(rng, 150)) != "cannot tell" for _ in range(1000))
        assert wrong <= 50

    @pytest.mark.parametrize("p", [0.5, 0.7, 0.95])
    def test_the_interval_contains_the_mean_after_every_task_at_once(self, p):
        rng, missed = np.random.default_rng(7), 0
        for _ in range(100):
            path = confidence_sequence(np.where(rng.random(60) < p, 1.0, -1.0))
            missed += not all(2 * p - 1 in interval for interval in path)
        assert missed <= 5

    def test_the_interval_narrows_and_agrees_with_the_decision(self):
        rng = np.random.default_rng(1)
        for mean in (0.6, 0, -0.6):
            d = np.clip(rng.normal(mean, 0.4, 50), -1, 1)
            path = confidence_sequence(d)
            assert all(a.low <= b.low and b.high <= a.high for a, b in zip(path, path[1:]))
            for n in (5, 20, 50):
                excluded = path[n - 1].low >= 0 or path[n - 1].high <= 0
                assert (decide(d[:n]) != "cannot tell") == excluded
            assert abs(path[-1].estimate - d.mean()) < 1e-9

    def test_the_wealth_is_that_of_the_formula(self):
        d = [0.5, -0.25, 1.0]
        shares = (np.arange(20) + .5) / 20
        assert wealth(d, [0.0])[0, -1, 0] == pytest.approx(np.mean([(1 + g * .5) * (1 - g * .25) * (1 + g) for g in shares]))
        assert wealth(d, [0.2])[1, 1, 0] == pytest.approx(np.mean([(1 + g * (.2 - .5) / .8) * (1 + g * (.2 + .25) / .8) for g in shares]))
        assert decide([1.0] * 2000) == "helps" and decide([-1.0] * 2000) == "hurts"

    def test_no_differences_and_impossible_ones(self):
        assert decide([]) == "cannot tell" and confidence_sequence([]) == []
        for bad in ([1.5], [float("nan")]):
            with pytest.raises(ValueError, match="from -1 to 1"): confidence_sequence(bad)


class TestSchedule:
    def test_is_the_same_for_the_same_seed_and_grows_at_its_end(self):
        small, large = (schedule(TASKS, Design(budget=n)) for n in (31, 90))
        assert small == large[:30] == schedule(TASKS[::-1], Design(budget=30)) and small != schedule(TASKS, Design(budget=30, seed=1))

    def test_runs_every_arm_of_a_round_before_the_next_round(self):
        plan = schedule(TASKS, Design(repeats=2, budget=6000))
        assert len(plan) == len(set(plan)) == 40 * 6
        for i in range(0, len(plan), 3):
            assert len({(task.id, repeat) for task, repeat, _ in plan[i:i + 3]}) == 1 and {arm for *_, arm in plan[i:i + 3]} == set(ARMS)
        first = Counter(plan[i][2] for i in range(0, len(plan), 3))
        assert min(first.values()) > 15  # each arm goes first now and then

    @pytest.mark.parametrize("change, said", [({"arms": ("on",)}, "'off' and 'on'"), ({"arms": ("off", "on", "on")}, "once each"), ({"arms": ("off", "onn")}, "did you mean"),
                                              ({"repeats": 0}, "repeats is 0"), ({"budget": -9}, "budget is -9"), ({"level": 95}, "between 0.5 and 1")])
    def test_a_design_that_means_nothing_is_refused(self, change, said):
        with pytest.raises(ValueError, match=said): Design(**change)

    def test_too_few_tasks_are_refused_before_the_first_run(self, tmp_path):
        for tasks, design in ((TASKS[:7], Design()), (TASKS, Design(budget=23)), (TASKS, Design(repeats=20))):
            with pytest.raises(TrialError, match="fewer than 8"): run_trial(lambda t, m: 1 / 0, tasks, Still(), tmp_path, design)
        assert not (tmp_path / "runs.jsonl").exists()


class TestTasks:
    def test_a_file_is_read(self, tmp_path):
        (tmp_path / "tasks.jsonl").write_text('{"id": "a", "text": "Do it."}\n\n{"id": "b", "text": "x", "check": "1"}\n')
        assert read_tasks(tmp_path / "tasks.jsonl") == (TrialTask("a", "Do it."), TrialTask("b", "x", "1"))

    @pytest.mark.parametrize("line, said", [('{"id": "b"', "line 2"), ("[1]", "no JSON object"), ('{"id": "b"}', "text is missing"), ('{"id": 3, "text": "x"}', "id is 3"),
                                            ('{"id": "b", "text": "x", "chekc": "1"}', "did you mean 'check'"), ('{"id": "b", "text": " "}', "must be a text"),
                                            ('{"id": "a", "text": "x"}', "id of several"), ('{"id": "b", "text": "x\\u0000"}', "must be a text"), ("[" * 100_000, "line 2"),
                                            ('{"id": "b", "text": "\\ud800"}', "no valid Unicode"), ('{"id": "b", "text": "%s"}' % ("x" * 100_001), "100,001 bytes"),
                                            ('{"id": "b", "text": "x", "check": 4}', "check is 4")])
    def test_a_bad_line_is_named(self, tmp_path, line, said):
        (tmp_path / "tasks.jsonl").write_text('{"id": "a", "text": "Do it."}\n' + line + "\n")
        with pytest.raises(TrialError, match=said): read_tasks(tmp_path / "tasks.jsonl")


class TestResults:
    @pytest.mark.parametrize("said, success, score", [(True, True, 1), (False, False, 0), (1, True, 1), (0.25, False, 0.25), ("deploy  1\n", True, 1), ("deploy 2", False, 0),
                                                      ({"success": False, "score": 0.5}, False, 0.5), ({"answer": "deploy 2", "success": True}, True, 1),
                                                      (np.bool_(True), True, 1), (np.float32(0.5), False, 0.5)])
    def test_a_result_means_what_it_says(self, said, success, score):
        made = judge(said, "deploy 1")
        assert (made["success"], made["score"]) == (success, score)

    @pytest.mark.parametrize("said", [None, {}, [], {"tokens_in": 3}, 7, -0.1, float("nan"), {"score": "1"}, {"score": True}, {"success": "yes"}, {"success": True, "tokens_in": -1},
                                      {"success": True, "tokens_in": 2.5}, {"success": True, "tokens_in": 1, "tokens_cached": 2}, {"answer": None}, {"answer": ["deploy"]}, {"success": True, "shown": "abc"}, {"success": True, "shown": [1]}])
    def test_a_result_that_means_nothing_counts_as_a_failure(self, said):
        run = run_once(lambda task, memory: said, TASKS[0], Still().arm("on"), 1)
        assert (run.status, run.success, run.score, run.tokens_in) == ("unreadable", False, 0, None) and run.note

    @pytest.mark.parametrize("error, status", [(RuntimeError("boom"), "crashed"), (TimeoutError("late"), "timed out"), (SystemExit(3), "crashed"), (RecursionError("deep"), "crashed")])
    def test_whatever_happens_there_is_a_record(self, error, status):
        def agent(task, memory): raise error
        run = run_once(agent, TASKS[0], Still().arm("off"), 2)
        assert (run.status, run.score, run.repeat, run.arm) == (status, 0, 2, "off") and type(error).__name__ in run.note

    def test_an_interruption_is_not_recorded(self):
        def agent(task, memory): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): run_once(agent, TASKS[0], Still().arm("off"), 1)

    def test_a_note_holds_no_secret_and_steers_no_terminal(self):
        def agent(task, memory): raise RuntimeError("key sk-0123456789abcdefghij \x1b[2J \ud800" + "x" * 500)
        note = run_once(agent, TASKS[0], Still().arm("off"), 1).note
        assert "sk-0" not in note and "[key removed]" in note and note.isprintable() and len(note) == 200

    def test_the_agent_does_not_see_the_check(self, tmp_path):
        seen = []
        run_trial(lambda task, memory: seen.append(task) or True, TASKS, Still(), tmp_path)
        assert seen and {task.check for task in seen} == {None}

    def test_a_crash_lowers_the_score_of_its_arm_and_is_listed(self, tmp_path):
        def agent(task, memory):
            if memory.mode == "on": raise ValueError("too long for the model")
            return True
        made = run_trial(agent, TASKS, Still(), tmp_path)
        assert made.answer == "hurts" and made.scores("on").sum() == 0
        rows = Report(made).not_done().rows
        assert len(rows) == len(made.tasks) and all("too long" in row[-1] for row in rows)

    def test_if_nothing_works_at_first_it_says_so_and_again(self, tmp_path):
        calls = []
        def agent(task, memory): calls.append(1); return 1 / 0
        for _ in range(2):
            with pytest.raises(TrialError, match="none of the first 3 runs was done: crashed, ZeroDivisionError"): run_trial(agent, TASKS, Still(), tmp_path)
        assert len(calls) == 3


class TestRecord:
    about = {"trial": 1, "seed": 3}

    def test_a_cut_line_is_removed_and_the_rest_kept(self, tmp_path):
        with RunFile(tmp_path / "runs.jsonl", self.about) as file:
            for i in range(3): file.append(Run(f"t{i}", 1, "on", shown=("a",)))
        whole = (tmp_path / "runs.jsonl").read_bytes()
        for cut in range(1, len(whole)):
            (tmp_path / "runs.jsonl").write_bytes(whole[:cut])
            with RunFile(tmp_path / "runs.jsonl", self.about) as file:
                assert len(file.runs) == max(0, whole[:cut].count(b"\n") - 1)
                assert all(run.shown == ("a",) for run in file.runs.values())
            assert (tmp_path / "runs.jsonl").read_bytes().endswith(b"}\n")

    def test_another_trial_a_foreign_file_and_a_bad_line_are_refused(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        with RunFile(path, self.about) as file: file.append(Run("t", 1, "on"))
        before = path.read_bytes()
        with pytest.raises(TrialError, match="another 'seed'"): RunFile(path, {"trial": 1, "seed": 4})
        path.write_bytes(before + b"{}\n")
        with pytest.raises(TrialError, match="line 3 cannot be read"): RunFile(path, self.about)
        path.write_text('{"id": "a trajectory"}\n')
        with pytest.raises(TrialError, match="no file of a trial"): RunFile(path, self.about)
        assert path.read_text() == '{"id": "a trajectory"}\n'

    def test_there_is_one_writer(self, tmp_path):
        with RunFile(tmp_path / "runs.jsonl", self.about):
            with pytest.raises(BlockingIOError, match="another process"): RunFile(tmp_path / "runs.jsonl", self.about)
        RunFile(tmp_path / "runs.jsonl", self.about).close()

    def test_a_killed_trial_goes_on_and_ends_like_one_that_was_not(self, tmp_path):
        code = f"""
import sys, time
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from test_trial import Still, TASKS, agent_of_the_killed, run_trial
def slow(task, memory):
    time.sleep(0.02)
    return agent_of_the_killed(task, memory)
slow.describe = agent_of_the_killed.describe
print("begun", flush=True)
run_trial(slow, TASKS, Still(), sys.argv[1])
"""
        kills = 0
        while kills < 3:
            process = subprocess.Popen([PYTHON, "-c", code, str(tmp_path / "killed")], stdout=subprocess.PIPE)
            process.stdout.readline()
            time.sleep(0.15)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            kills += 1
        before = (tmp_path / "killed" / "runs.jsonl").read_bytes()
        whole = before[:before.rfind(b"\n") + 1]
        again = run_trial(agent_of_the_killed, TASKS, Still(), tmp_path / "killed")
        assert whole.count(b"\n") > 4 and (tmp_path / "killed" / "runs.jsonl").read_bytes().startswith(whole)
        once = run_trial(agent_of_the_killed, TASKS, Still(), tmp_path / "once")
        def plain(runs): return [replace(run, seconds=0) for run in runs]
        assert plain(again.runs) == plain(once.runs) and len({run.key for run in again.runs}) == len(again.runs)

    def test_a_larger_budget_goes_on_where_a_smaller_one_ended(self, tmp_path):
        calls = []
        def agent(task, memory): calls.append(task.id); return random.Random(task.id + memory.mode).random() < 0.5
        small = run_trial(agent, TASKS, Still(), tmp_path, Design(budget=30))
        made = len(calls)
        large = run_trial(agent, TASKS, Still(), tmp_path, Design(budget=120))
        assert large.runs[:len(small.runs)] == small.runs and len(calls) == len(large.runs) > made
        run_trial(agent, TASKS, Still(), tmp_path, Design(budget=120))
        assert len(calls) == len(large.runs)


def agent_of_the_killed(task, memory): return random.Random(task.id + memory.mode).random() < 0.5


agent_of_the_killed.describe = lambda: "the same"


class TestMemory:
    def test_off_shows_nothing_and_random_as_much_as_on_and_evenly(self, memory):
        drawn = Counter()
        for seed in range(300):
            arms = {mode: memory.arm(mode, seed) for mode in ARMS}
            texts = {mode: arm.text(f"Deploy service {seed}.") for mode, arm in arms.items()}
            assert not texts["off"] and len(arms["on"].shown) == len(arms["random"].shown) == 2 and not arms["off"].shown
            drawn.update(arms["random"].shown)
        expected = 600 / 8
        assert len(drawn) == 8 and sum((n - expected) ** 2 / expected for n in drawn.values()) < 24.3  # chi-square, 7 degrees, p = 0.001

    def test_random_is_the_same_for_the_same_seed_only(self, memory):
        texts = [memory.arm("random", seed).text("Deploy it.") for seed in (1, 1, 2, 3, 4)]
        assert texts[0] == texts[1] and len(set(texts)) > 2

    def test_the_solution_of_the_task_is_not_shown(self, memory):
        goal = "deploy  thing coral."
        for arm in (memory.arm("on"), memory.arm("random", 5)):
            for _ in range(3): assert "deploy coral" not in arm.text(goal)
        own = TrialMemory(memory.store, MemorySettings(same_goal=True), Letters())
        assert "deploy coral" in own.arm("on").text("Deploy thing coral.")

    def test_an_agent_that_records_changes_nothing(self, memory):
        arm, said = memory.arm("on"), [{"role": "user", "content": "Deploy it."}]
        augmented = arm.augment(said)
        assert "[Memory" in augmented[0]["content"] and len(arm.shown) == 2
        before = memory.store.fingerprint()
        assert arm.record([*augmented, {"role": "assistant", "content": "deploy it"}], success=True) is None
        assert memory.store.fingerprint() == before

    def test_a_store_that_changes_ends_the_trial(self, memory, tmp_path):
        other = ChatMemory(Store(memory.store.path), Letters(), "agent")
        def agent(task, shown):
            other.record([{"role": "user", "content": task.text}, {"role": "assistant", "content": "x"}], success=True)
            return True
        with pytest.raises(TrialError, match="store has changed"): run_trial(agent, TASKS, memory, tmp_path / "out")

    def test_only_the_authors_and_the_namespace_that_are_named(self, memory):
        foreign = ChatMemory(memory.store, Letters(), "them")
        foreign.record([{"role": "user", "content": "Deploy the other."}, {"role": "assistant", "content": "deploy other"}], success=True)
        theirs = TrialMemory(memory.store, MemorySettings(authors=("them",)), Letters()).arm("on")
        assert "deploy other" in theirs.text("Deploy it.") and len(theirs.shown) == 1
        for settings in (MemorySettings(authors=("nobody",)), MemorySettings(world="moon")):
            with pytest.raises(TrialError, match="no successful episode.*chat/train"): TrialMemory(memory.store, settings, Letters())
        with pytest.raises(TrialError, match="no successful episode.*world/fold: nothing"):  # what others have is not said
            TrialMemory(memory.store, MemorySettings(namespace="none"), Letters())
        with pytest.raises(TrialError, match="k is 0"): MemorySettings(k=0)

    def test_what_was_shown_is_recorded(self, memory, tmp_path):
        def agent(task, shown): return "--north" in shown.text(task.text)
        made = run_trial(agent, TASKS, memory, tmp_path / "out")
        assert made.answer == "helps" and {len(run.shown) for run in made.of_arm("on")} == {2} and not any(run.shown for run in made.of_arm("off"))
        rows = Report.of(made, memory).by_experience().rows
        assert sum(int(row[1]) for row in rows) == 2 * len(made.tasks) and all("Deploy thing" in row[0] and row[-1] == "+100" for row in rows)


def program(code, **options): return Command([PYTHON, "-c", "import json, os, sys\n" + code, "{text}", "{id}"], **options)


class TestCommand:
    def run(self, command, memory, task=TASKS[0], mode="on"): return run_once(command, task, memory.arm(mode, 9), 1)

    def test_text_goes_into_no_shell_and_no_other_placeholder(self, memory, tmp_path):
        text = f"'; touch {tmp_path}/hit; $(touch {tmp_path}/hit) {{store}} {{id}} \"\n`x`"
        (tmp_path / "text").write_text(text)
        code = f"t = json.load(sys.stdin)\nprint(json.dumps({{'success': t['text'] == sys.argv[1] == open({str(tmp_path / 'text')!r}).read() and sys.argv[2] == 'x y'}}))"
        run = self.run(program(code), memory, TrialTask("x y", text))
        assert run.success and not (tmp_path / "hit").exists()

    def test_a_program_is_given_the_memory_and_never_the_check(self, memory):
        for mode in ARMS:
            code = "e = dict(os.environ); t = json.load(sys.stdin); t['env'] = {k: v for k, v in e.items() if k.startswith('EXPRAG_')}\nprint(json.dumps({'success': True, 'shown': [json.dumps(t)]}))"
            run = self.run(program(code), memory, mode=mode)
            given = json.loads(run.shown[-1])
            assert given["memory"] == memory.arm(mode, 9).text(TASKS[0].text) and tuple(given["shown"]) == run.shown[:-1]
            assert given["env"]["EXPRAG_MODE"] == given["mode"] == mode and given["env"]["EXPRAG_STORE"] == str(memory.store.path.resolve())
            assert TASKS[0].check not in json.dumps({k: v for k, v in given.items() if k != "memory"}) and "check" not in given

    def test_a_program_that_retrieves_by_itself_sees_the_same(self, memory, monkeypatch):
        monkeypatch.setattr("exprag.memory.trial_report.SentenceEncoder", lambda name: Letters())
        for mode in ARMS:
            given = json.loads(self.run(program("print(json.dumps({'success': True, 'shown': [json.dumps(dict(os.environ))]}))"), memory, mode=mode).shown[-1])
            here = memory_here(given)
            assert here.text(TASKS[0].text) == memory.arm(mode, 9).text(TASKS[0].text) and here.mode == mode
        with pytest.raises(TrialError, match="no run of a trial"): memory_here({})

    @pytest.mark.parametrize("code, options, status, success", [
        ("print('{\"success\": true}'); print('done')", {}, "done", True),
        ("print('{\"success\": true}'); print('{\"success\": false}')", {}, "done", False),
        ("print('{\"success\": true}'); sys.exit(1)", {}, "crashed", False),
        ("pass", {}, "unreadable", False), ("print('{' * 100000)", {}, "unreadable", False), ("print('[1]')", {}, "unreadable", False),
        ("sys.exit(0)", {"result": "exit_status"}, "done", True), ("sys.exit(7)", {"result": "exit_status"}, "done", False),
        ("print('{\"success\": false}')", {"result": "exit_status"}, "done", True),
        ("os.kill(os.getpid(), 9)", {"result": "exit_status"}, "crashed", False),
        ("os.write(1, b'\\xff\\xfe'); print('\\n{\"success\": true}')", {}, "done", True),
        ("sys.stdout.write('x' * 3_000_000); print('\\n{\"success\": true}')", {}, "done", True)])
    def test_how_a_program_ends(self, memory, code, options, status, success):
        run = self.run(program(code, **options), memory)
        assert (run.status, run.success) == (status, success)

    def test_tokens_are_read_with_either_kind_of_result(self, memory):
        said = "print(json.dumps({'success': True, 'tokens_in': 10, 'tokens_out': 2, 'tokens_cached': 4}))"
        for result in ("json", "exit_status"):
            run = self.run(program(said, result=result), memory)
            assert (run.tokens_in, run.tokens_out, run.tokens_cached) == (10, 2, 4)

    def test_a_program_that_takes_too_long_ends_with_its_children(self, memory, tmp_path):
        code = f"import subprocess, time; c = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(c.pid)); time.sleep(60)"
        begun = time.monotonic()
        run = self.run(program(code, timeout=1.5), memory)
        assert run.status == "timed out" and "1.5 s" in run.note and time.monotonic() - begun < 20
        child = int((tmp_path / "pid").read_text())
        for _ in range(100):
            try: gone = Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"
            except FileNotFoundError: gone = True
            if gone: break
            time.sleep(0.05)
        assert gone

    def test_a_grandchild_that_holds_the_output_open_delays_nothing(self, memory):
        begun = time.monotonic()
        run = self.run(program("import subprocess; subprocess.Popen(['sleep', '5']); print('{\"success\": true}')", timeout=30), memory)
        assert run.success and time.monotonic() - begun < 4

    def test_neither_environment_nor_arguments_are_recorded(self, memory, tmp_path, monkeypatch):
        monkeypatch.setenv("SECRET_OF_MINE", "hunter2hunter2")
        agent = Command([PYTHON, "-c", "import sys; print('{\"success\": true}'); sys.stderr.write('sk-0123456789abcdefghij\\n'); sys.exit(len(sys.argv[0]) > 1 and 3 * ('t00' in sys.argv[2]))", "token-of-mine", "{id}"])
        run_trial(agent, TASKS, memory, tmp_path / "out", Design(("off", "on")))
        kept = (tmp_path / "out" / "runs.jsonl").read_text()
        assert not [word for word in ("hunter2", "token-of-mine", "sk-0") if word in kept]

    def test_a_changed_script_is_another_trial(self, memory, tmp_path):
        script, out = tmp_path / "agent.py", tmp_path / "out"
        for line, said in (("print('{\"success\": true}')", None), ("print('{\"success\": 1}')", "another 'agent'")):
            script.write_text(line)
            agent = Command([PYTHON, str(script), "x" * 5000])
            if said is None: run_trial(agent, TASKS[:8], memory, out)
            else:
                with pytest.raises(TrialError, match=said): run_trial(agent, TASKS[:8], memory, out)

    @pytest.mark.parametrize("argv, said", [("", "empty"), ("no-such-program-here x", "no program 'no-such-program-here'"), ("'open", "cannot be split")])
    def test_a_command_that_cannot_run_is_refused_at_once(self, argv, said):
        with pytest.raises(TrialError, match=said): Command(argv)
        with pytest.raises(ValueError, match="did you mean 'json'"): Command([PYTHON], result="jsn")
        with pytest.raises(TrialError, match="timeout is 0"): Command([PYTHON], timeout=0)


def trial_of(rows, design=Design()):
    "A trial of some runs: (task, arm, fields)."
    runs = {run.key: run for run in (Run(task, 1, arm, **fields) for task, arm, fields in rows)}
    tasks = [TrialTask(task, "x") for task in dict.fromkeys(task for task, *_ in rows)]
    return Trial.of(runs, schedule(tasks, design), design)


class TestReport:
    design = Design(("off", "on"))

    def cell(self, report, name, arm="on"):
        table = report.by_arm()
        return next(row for row in table.rows if row[0] == name)[table.header.index(arm)]

    def test_cost_and_cache_are_computed_from_what_was_reported(self):
        rows = [("a", "on", {"tokens_in": 1000, "tokens_cached": 600, "tokens_out": 100}), ("a", "off", {"tokens_in": 500, "tokens_out": 100}),
                ("b", "on", {"tokens_in": 3000, "tokens_cached": 0, "tokens_out": 300}), ("b", "off", {})]
        report = Report(trial_of(rows, self.design), Prices(3, 15, 0.3, "EUR"))
        costs = (400 * 3 + 600 * .3 + 100 * 15) / 1e6, (3000 * 3 + 300 * 15) / 1e6
        assert self.cell(report, "cost (EUR)") == f"{sum(costs) / 2:.4f}" and self.cell(report, "from the prefix cache") == "15%"
        assert self.cell(report, "tokens in") == "2,000" and self.cell(report, "tokens in", "off") == "500 (1 of 2 runs)"
        assert self.cell(report, "from the prefix cache", "off") == "not reported" and self.cell(report, "cost (EUR)", "off").endswith("(1 of 2 runs)")
        assert not any("cost" in row[0] for row in Report(report.trial).by_arm().rows)
        with pytest.raises(TrialError, match="both input and output"): Prices(input=3)

    def test_tasks_are_in_order_of_what_memory_did_for_them(self):
        scores = {"a": (0, 1), "b": (1, 0), "c": (1, 1), "d": (0.5, 0.75)}
        trial = trial_of([(t, arm, {"score": s}) for t, pair in scores.items() for arm, s in zip(("off", "on"), pair)], self.design)
        report = Report(trial)
        assert [(row[0], row[3]) for row in report.by_task().rows] == [("a", "+100"), ("d", "+25"), ("c", "+0"), ("b", "-100")]
        assert report.by_difference().rows[0][3:] == ("2", "1", "1")

    def test_every_text_is_escaped_and_steers_nothing(self):
        evil = "<script>alert(1)</script>\x1b[2J$title &amp;"
        rows = [(f"{evil}{i}", arm, {"score": float(arm == "on"), "shown": (evil,) * (arm == "on"), "status": "crashed", "note": evil}) for i in range(9) for arm in ("off", "on")]
        report = Report(trial_of(rows, self.design), Prices(1, 1, currency="<b>"), {evil: evil})
        page = report.page()
        assert "<script" not in page and "<b>" not in page and "\x1b" not in page + str(report)
        assert "&lt;script&gt;" in page and "Memory helps" in page and "$title &amp;amp;" in page
        assert str(report).count("crashed") >= 18 and page.startswith("<!doctype html>") and "://" not in page.replace("http://www.w3.org/2000/svg", "")

    def test_the_page_is_well_formed_and_says_what_the_text_says(self):
        from html.parser import HTMLParser
        rows = [(f"t{i}", arm, {"score": float(arm == "on" and i != 3)}) for i in range(12) for arm in ARMS]
        report = Report(trial_of(rows))
        opened, words = [], []
        class Reader(HTMLParser):
            def handle_starttag(self, tag, attrs): opened.append(tag) if tag != "meta" else None
            def handle_startendtag(self, tag, attrs): pass
            def handle_endtag(self, tag): assert opened.pop() == tag
            def handle_data(self, data): words.append(data)
        Reader().feed(report.page())
        assert opened == []
        text = str(report)
        for table in report.tables().values():
            for row in table.rows: assert all(cell in text and cell in [*words, ""] for cell in row)
        assert str(report.trial) in words and report.method() in words

    def test_a_trial_without_a_complete_task_has_a_report_too(self):
        empty = Report(Trial((), Design(), 10))
        assert "Cannot tell with 0 runs" in empty.page() and "Cannot tell with 0 runs" in str(empty)

    def test_unfinished_tasks_are_left_out(self):
        runs = {run.key: run for run in [Run("a", 1, "off"), Run("a", 1, "on", score=1.0), Run("b", 1, "off")]}
        plan = sorted(schedule([TrialTask("a", "x"), TrialTask("b", "x")], self.design), key=lambda row: row[0].id)
        assert Trial.of(runs, plan, self.design).tasks == ["a"]


class TestCommandLine:
    @pytest.fixture
    def place(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("exprag.memory.trial.SentenceEncoder", lambda name: Letters())
        store_of("memory.db").close()
        Path("tasks.jsonl").write_text("\n".join(json.dumps({"id": t.id, "text": t.text, "check": t.check}) for t in TASKS))
        code = "import json, sys; t = json.load(sys.stdin); print(json.dumps({'answer': f\"deploy {int(t['id'][1:])}\" + ' --north' * ('--north' in t['memory'])}))"
        self.write(command=[PYTHON, "-c", code])
        return tmp_path

    def write(self, more="", **changes):
        fields = {"tasks": "tasks.jsonl", "store": "memory.db", **changes}
        Path("mine.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in fields.items()) + more)

    def test_it_runs_writes_and_goes_on(self, place, capsys):
        assert main(["trial", "mine.toml", "--out", "out", "--set", 'design.arms=["off", "on"]']) == 0
        said = capsys.readouterr()
        assert said.out.startswith("Memory helps: +100 points") and "8 of 40 tasks" in said.err
        assert "Memory helps" in Path("out/trial.html").read_text() and Path("out/trial.txt").read_text() in said.out + "\n"
        lines = Path("out/runs.jsonl").read_text().count("\n")
        assert main(["trial", "mine.toml", "--out", "out", "--set", 'design.arms=["off", "on"]']) == 0
        assert lines == Path("out/runs.jsonl").read_text().count("\n") == 17

    @pytest.mark.parametrize("arguments, said", [
        (["--set", "desing.seed=3"], "did you mean 'design'"), (["--set", "design.seed=x"], "design.seed is 'x'"), (["--set", "design.repeats=0"], "repeats is 0"),
        (["--set", "memory.k=0"], "k is 0"), (["--set", "memory.view=chta"], "chta"), (["--set", "tasks=none.jsonl"], "none.jsonl"), (["--set", "store=none.db"], "none.db"),
        (["--set", "prices.input=3"], "both input and output"), (["--set", "command=no-such-program"], "no-such-program"), (["--set", "result=exit"], "exit_status"),
        (["--set", "design.arms=3"], "design.arms is 3"), (["--set", "timeout"], "write key=value")])
    def test_a_mistake_is_one_line(self, place, capsys, arguments, said):
        assert main(["trial", "mine.toml", "--out", "out", *arguments]) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not Path("out", "trial.html").exists()

    def test_a_file_that_is_missing_or_no_toml_is_named(self, place, capsys):
        Path("bad.toml").write_text("tasks = ")
        for name, said in (("none.toml", "none.toml"), ("bad.toml", "is not TOML")):
            assert main(["trial", name]) == 1 and said in capsys.readouterr().err
        Path("little.toml").write_text('tasks = "tasks.jsonl"\n')
        assert main(["trial", "little.toml"]) == 1 and "command is missing" in capsys.readouterr().err


def test_augment_knows_the_arm_and_writes_nothing(memory):
    asked = [{"role": "system", "content": "Deploy."}, {"role": "user", "content": "Deploy service 3."}]
    rows = lambda: memory.store.rows("SELECT count(*) FROM receipts")[0]
    before = rows(), memory.store.fingerprint()
    for mode in ARMS:
        arm = memory.arm(mode, seed=1)
        made = arm.augment(asked)
        assert bool(made.block) == (mode != "off") and bool(arm.shown) == (mode != "off") and made.receipt is None
        later = arm.augment([*made, {"role": "assistant", "content": "deploy"}, {"role": "user", "content": "Failed."}], "mine")
        assert len(later) == 4 and (later[0]["content"] != "Deploy.") == (mode != "off")
        assert arm.augment([*made, {"role": "assistant", "content": "deploy"}]).block == made.block  # pinned
        assert arm.record([*asked, {"role": "assistant", "content": "x"}], True) is None and arm.settle("mine", True) is None
        assert arm.adopt([]) == [] and arm.within(None).mode == mode
    assert (rows(), memory.store.fingerprint()) == before


def test_a_wrapped_client_in_a_trial_reads_what_its_arm_may(memory):
    from exprag.memory.clients import wrap
    sent = []
    class Completions:
        def create(self, **request):
            sent.append(request["messages"])
            return {"choices": [{"message": {"role": "assistant", "content": "deploy 3 --north"}}]}
    class Chat: completions = Completions()
    class Client: chat = Chat()
    for mode in ("off", "on"):
        client = wrap(Client(), memory.arm(mode))
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Deploy service 3."}])
        client.record(True)
    assert len(sent[0]) == 1 and len(sent[1]) == 2 and "--north" in sent[1][0]["content"]
