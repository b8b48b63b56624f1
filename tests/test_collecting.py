"Collecting, with real worlds and real kills."
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from counting import Count, by_chance, counted, counts, fails, slowly
from exprag import world
from exprag.store import Store
from exprag.trajectory import Task, Trajectory, read_jsonl, write_jsonl
from exprag.world import SimulatorError, World, load_world, play, register_world
from exprag.worlds.collecting import (
    CollectError, CollectOptions, CollectReport, Player, Schedule, collect)
from exprag.worlds.scienceworld import scienceworld_tasks
from exprag.worlds.scienceworld_expert import expert
from killing import compared, harass, pace, player_of
from worlds import MARK, QUICK, gone, java_children, marked

FAILING = Task("scienceworld", "freeze", 11, "train")


def some_tasks() -> list[Task]:
    return [scienceworld_tasks("train", [kind])[i] for kind in ("find-plant", "lifespan-longest-lived") for i in (0, 1)]


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv(MARK, mark)
    yield
    assert gone(mark), f"left behind: {marked(mark)}"


def collected(tasks, sink, **options):
    return collect(tasks, sink, CollectOptions(progress=False, **options))


def quick(tasks, sink, workers, run, **more):
    return collected(tasks, sink, workers=workers, run=run, env_factory=Count, **more)


def test_the_set_does_not_depend_on_workers_or_order():
    tasks, sets, orders = counts(12), [], []
    for workers, order in ((1, 1), (3, 1), (2, -1)):
        made = []
        report = quick(tasks[::order], made.append, workers, slowly)
        sets.append({t.id for t in made})
        orders.append([t.task for t in made])
        assert report == CollectReport(12, 0, (), 0)
    assert sets[0] == sets[1] == sets[2] and orders[0] == tasks and sorted(orders[1]) == tasks


def test_chance_belongs_to_the_task_and_the_seed():
    def ids(tasks, workers, seed):
        made = []
        quick(tasks, made.append, workers, partial(by_chance, seed=seed))
        return {t.id for t in made}
    assert ids(counts(6), 1, 5) == ids(counts(6)[::-1], 3, 5) and not ids(counts(6), 1, 5) & ids(counts(6), 1, 6)
    assert ids(counts(4), 2, 5) < ids(counts(6), 2, 5)


def test_the_sink_is_called_in_this_thread():
    threads = set()
    quick(counts(4), lambda t: threads.add(threading.get_ident()), 2, counted)
    assert threads == {threading.get_ident()}


def test_a_store_is_a_sink_and_knows_what_is_done(tmp_path):
    with Store(tmp_path / "s.db") as store:
        assert quick(counts(3), store, 2, counted) == CollectReport(3, 0, (), 0)
        assert quick(counts(5) * 2, store, 1, counted) == CollectReport(2, 3, (), 0)
        assert quick(counts(5), store, 1, counted) == CollectReport(0, 5, (), 0) and len(store) == 5


@pytest.mark.parametrize("failures, kept", [(None, 4), (True, 4), (False, 0)])
def test_failures_are_kept_when_asked(failures, kept):
    made = []
    report = quick(counts(8), made.append, 2, fails, failures=failures)
    assert report.kept == kept and all(t.success is False for t in made) and len(report.failed) == 8 - kept
    assert {reason for t, reason in report.failed} == {"there is no episode that reaches the goal"} | ({"the episode does not reach the goal (score 0)"} if not kept else set())


def test_functions_travel_by_value_and_what_cannot_travel_is_named():
    made, word = [], "hop"
    quick(counts(2), made.append, 1, lambda env, task: play(env, task, [word] * 3))
    assert {t.actions for t in made} == {("hop",) * 3}
    lock = threading.Lock()
    with pytest.raises(CollectError, match="cannot be sent to a worker process.*lock"): quick(counts(1), print, 1, lambda env, task: lock)


def test_a_mistake_ends_it_with_the_workers_traceback(tmp_path):
    def broken(env, task): return counted(env, task) if task.variation == "0" else {}["no such key"]
    made = []
    with pytest.raises(CollectError, match="(?s)count/up/1@train cannot be played.*in broken.*KeyError: 'no such key'"): quick(counts(9), made.append, 1, broken)
    assert [t.task for t in made] == counts(1)


def test_an_episode_of_another_task_is_refused():
    with pytest.raises(CollectError, match="came back is of count/up/7@train"): quick(counts(1), print, 1, lambda env, task: counted(env, counts(8)[7]))


def test_it_ends_when_the_sink_fails_and_leaves_nothing():
    def full(trajectory): raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"): quick(counts(9), full, 3, slowly)


def test_what_a_world_prints_does_no_harm():
    made = []
    quick(counts(3), made.append, 1, lambda env, task: print('{"made": null}', flush=True) or os.system("echo noise") or counted(env, task))
    assert len(made) == 3


def test_nothing_to_do_and_bad_arguments():
    assert collect([], print) == CollectReport(0, 0, (), 0)
    with pytest.raises(ValueError, match="workers is 0"): CollectOptions(workers=0)
    with pytest.raises(TypeError, match="a list's `append`"): collected(counts(1), [])
    with pytest.raises(ValueError, match="world 'count' is not known"): collected(counts(1), print)


def test_a_world_without_an_expert_needs_a_run(monkeypatch):
    monkeypatch.setattr(world, "_REGISTERED", {})
    register_world(World("count", environment=Count))
    with pytest.raises(ValueError, match="'count' has no environment or no expert: give CollectOptions"): collected(counts(1), print)
    assert collected(counts(1), [].append, run=counted).kept == 1


def test_a_worker_that_ends_is_replaced(tmp_path):
    def dies_once(env, task):
        mark = tmp_path / task.variation
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL) if task.variation == "0" else sys.exit("I give up")
        return counted(env, task)
    made = []
    assert quick(counts(3), made.append, 2, dies_once) == CollectReport(3, 0, (), 3)


def test_what_hangs_is_killed_even_in_c_code_and_even_when_stopped(tmp_path):
    def hangs_once(env, task):
        mark = tmp_path / task.variation
        if not mark.exists():
            mark.touch()
            if task.variation == "0": os.kill(os.getpid(), signal.SIGSTOP)
            elif task.variation == "1": sum(range(10**12))  # holds the interpreter's lock
            else: time.sleep(1000)
        return counted(env, task)
    made = []
    assert quick(counts(3), made.append, 3, hangs_once, timeout=4) == CollectReport(3, 0, (), 3)


def test_what_always_kills_is_given_up_with_the_reason(tmp_path):
    def deadly(env, task):
        if task.variation == "1": sys.stderr.write("out of memory, or so"), sys.stderr.flush(), os._exit(3)
        if task.variation == "2": time.sleep(1000)
        if task.variation == "3": raise SimulatorError("the simulator died")
        return counted(env, task)
    made = []
    report = quick(counts(5), made.append, 2, deadly, attempts=2, timeout=2)
    assert report.kept == 2 and report.restarted == 6
    reasons = {t.variation: reason for t, reason in report.failed}
    assert reasons["1"] == "2 worlds died or hung; the last: its process ended; its last output: out of memory, or so"
    assert reasons["2"].endswith("it took more than 2 s") and reasons["3"].endswith("the simulator died")


COLLECTOR = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background may have had Ctrl-C ignored
from functools import partial
sys.path.insert(0, sys.argv[1])
from exprag.worlds.collecting import CollectOptions, collect
from counting import Count, counts, slowly
collect(counts(60), lambda t: print(t.task.variation, flush=True), CollectOptions(2, partial(slowly, seconds=300), progress=False, env_factory=Count))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_collector_that_is_killed_leaves_no_worker_not_even_a_busy_one(how):
    collector = subprocess.Popen([sys.executable, "-c", COLLECTOR, str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert collector.stdout.readline().strip() == "0"
    while len(marked(os.environ[MARK])) < 3 and collector.poll() is None: time.sleep(0.05)
    assert len(marked(os.environ[MARK])) == 3  # it, and two workers that sleep for minutes
    collector.send_signal(how)
    collector.wait(timeout=60)
    collector.stdout.close()
    assert gone(os.environ[MARK], 60)


def test_a_ctrl_c_that_comes_while_nobody_waits_is_not_lost():
    """The signal reaches another thread, so nothing ends the wait of the main one: as when it comes a moment before."""
    code = ("import threading\ndef keep(t):\n    print(t.task.variation, flush=True)\n    threading.Timer(0.5, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)).start()\n"
            + COLLECTOR.replace("lambda t: print(t.task.variation, flush=True)", "keep"))
    collector = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert collector.stdout.readline().strip() == "0"
    try: assert collector.wait(timeout=60) != 0
    finally: collector.kill(), collector.wait(), collector.stdout.close()
    assert gone(os.environ[MARK], 60)


def test_a_script_without_a_main_guard_works(tmp_path):
    "A start method that imports the main module again would start workers in workers."
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from counting import Count, counts
from exprag.world import play
from exprag.worlds.collecting import CollectOptions, collect
def mine(env, task): return play(env, task, ["on"] * 3)
print(collect(counts(3), lambda t: None, CollectOptions(2, mine, Count, progress=False)).kept)
"""
    (tmp_path / "script.py").write_text(code)
    assert subprocess.run([sys.executable, "script.py", str(Path(__file__).parent)], cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout == "3\n"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4), st.randoms())
def test_schedule_hands_out_each_task_once_and_keeps_to_worlds(worlds, workers, chance):
    tasks = [Task(w, "t", n, "train") for n, w in enumerate(worlds)]
    schedule, at, taken, changes = Schedule(tasks), [None] * workers, [], 0
    busy = set(range(workers))
    while busy:
        n = chance.choice(sorted(busy))
        task = schedule.take(at[n])
        if task is None: busy.discard(n)
        else:
            changes += at[n] not in (None, task.world)
            if at[n] not in (None, task.world): assert not schedule.waiting[at[n]]
            at[n] = task.world
            taken.append(task)
    assert sorted(taken) == sorted(tasks) and changes <= workers * max(0, len(set(worlds)) - 1)
    for w in set(worlds): assert [t for t in taken if t.world == w] == [t for t in tasks if t.world == w]


def test_schedule_spreads_workers_over_worlds():
    schedule = Schedule([Task(w, "t", n, "train") for w in ("a", "b", "c") for n in range(4)])
    assert {schedule.take(None).world for _ in range(3)} == {"a", "b", "c"}


def test_several_worlds_side_by_side(monkeypatch):
    monkeypatch.setattr(world, "_REGISTERED", {})
    register_world(World("count", environment=Count, expert=counted))
    register_world(World("tally", environment=Count, expert=slowly))
    made, mixed = [], [t for pair in zip(counts(5), counts(5, "tally")) for t in pair]
    assert collected(mixed, made.append, workers=2).kept == 10 and {t.task for t in made} == set(mixed)
    assert sorted(t.task for t in made) == sorted(mixed)


# -- ScienceWorld

def test_scienceworld_does_not_depend_on_workers_and_resumes(tmp_path):
    before, alone, path = java_children(), [], tmp_path / "kept.jsonl"
    assert collected(some_tasks()[:2], alone.append) == CollectReport(2, 0, (), 0)
    write_jsonl(alone, path)
    again = {t.task: t for t in read_jsonl(path)[0]}
    second = collected([*some_tasks()[::-1], FAILING], lambda t: again.setdefault(t.task, t), workers=2, done=again.__contains__, failures=True)
    assert (second.kept, second.skipped, second.failed) == (3, 2, ()) and set(again) == {*some_tasks(), FAILING} and again[FAILING].success is False
    player = player_of(["scienceworld"])
    assert [player.play(t).id for t in some_tasks()] == [again[t].id for t in some_tasks()]
    player.close()
    assert java_children() == before


def test_a_simulator_that_is_killed_is_replaced_with_its_episode(tmp_path):
    def dies_once(env, t):
        env.reset(t)
        if not (tmp_path / "mark").exists():
            (tmp_path / "mark").touch()
            os.kill(env._process.pid, signal.SIGKILL)
        return expert(env, t)
    made = []
    assert collected(some_tasks()[:2], made.append, run=dies_once) == CollectReport(2, 0, (), 1)


def test_settings_reach_the_world():
    made = []
    collected([QUICK], made.append, failures=True, settings={"scienceworld": {"simplification": ""}})
    assert made[0].settings == {"simplification": ""}


# -- kills

def clean(result, store):
    assert result["lost"] == result["twice"] == 0 and not result["left"], result
    assert not compared(store, 40)["different"]


def test_twenty_seconds_of_killing(tmp_path):
    pytest.importorskip("textworld_express", reason="needs the extra: pip install 'exprag[express]'")
    result = harass(tmp_path, 20, ["textworld-express"], count=400, timeout=max(6, 4 * pace(["textworld-express"])), pause=0.7)
    assert sum(result["kills"].values()) >= 3 and result["kept"] >= result["acknowledged"] > 0
    clean(result, tmp_path / "kept.db")


@pytest.mark.slow
def test_ten_minutes_of_killing(tmp_path):
    pytest.importorskip("textworld_express", reason="needs the extra: pip install 'exprag[express]'")
    worlds = ["scienceworld", "textworld-express"]
    result = harass(tmp_path, 600, worlds, count=4000, timeout=max(40, 4 * pace(worlds)), pause=4)
    assert min(result["kills"][k] for k in ("worker", "world", "hang", "collector")) > 0
    clean(result, tmp_path / "kept.db")


# -- determinism

def opening(env, task) -> Trajectory:
    "The first 25 actions of the expert's path."
    if task.world == "scienceworld":
        from exprag.worlds.scienceworld import gold_path
        return play(env, task, gold_path(env, task)[:25])
    if task.world == "alfworld":
        from exprag.worlds.alfworld_expert import walkthrough
        return play(env, task, walkthrough(env, task).actions[:25])
    from exprag.worlds.textworld_express import gold_path
    return play(env, task, gold_path(env, task)[:25])


def random_tasks(world: str, count: int) -> list[Task]:
    chance = random.Random(f"determinism/{world}")
    if world == "scienceworld": return chance.sample([t for fold in ("train", "dev", "test") for t in scienceworld_tasks(fold)], count)
    if world == "alfworld":
        from exprag.worlds.alfworld import alfworld_tasks
        return chance.sample([t for fold in ("seen", "test") for t in alfworld_tasks(fold)], count)
    from exprag.worlds.textworld_express import GAMES, express_tasks
    return chance.sample([t for game in GAMES for fold in ("train", "dev", "test") for t in express_tasks(game, fold)], count)


def transcripts(tasks: list[Task], workers: int) -> dict[str, str]:
    "Task -> hash of its episode's content."
    made = []
    report = collected(tasks, made.append, workers=workers, run=opening)
    assert report.kept == len(tasks) and not report.failed
    return {str(t.task): t.id for t in made}


def same_everywhere(world: str, count: int):
    tasks = random_tasks(world, count)
    first = transcripts(tasks, 1)
    other = transcripts(tasks[::-1], 2)  # other processes, another order, another number of workers
    assert [name for name, id in sorted(other.items()) if first[name] != id] == [] and len(other) == len(first)
    player = Player({world: (load_world(world).environment, opening)})
    here = {str(t): player.play(t).id for t in sorted(tasks)}  # this process, a third order
    player.close()
    assert [name for name, id in here.items() if first[name] != id] == []


def needs(world: str):
    if world == "textworld-express": pytest.importorskip("textworld_express", reason="needs the extra: pip install 'exprag[express]'")
    if world == "alfworld":
        if not os.environ.get("ALFWORLD_DATA"): pytest.skip("ALFWORLD_DATA does not say where the games are")  # asked first: importing alfworld sets it
        pytest.importorskip("alfworld", reason="needs the extra: pip install 'exprag[alfworld]'")


@pytest.mark.parametrize("world, count", [("scienceworld", 4), ("textworld-express", 16), ("alfworld", 4)])
def test_transcripts_are_the_same_everywhere(world, count):
    needs(world)
    same_everywhere(world, count)


@pytest.mark.slow
@pytest.mark.parametrize("world", ["scienceworld", "textworld-express", "alfworld"])
def test_fifty_transcripts_are_the_same_everywhere(world):
    needs(world)
    same_everywhere(world, 50)
