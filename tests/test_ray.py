"Ray carries tasks and answers: the episodes are those of one process, whatever is killed. On a real cluster of several nodes."
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from ray_parts import HERE, Scripted, cluster, collect_all, evaluate_all, expert, falling, lines, panel, pids  # first: it sets what Ray reads

pytest.importorskip("ray", reason="needs the extra: pip install 'exprag[ray]'")

from exprag.agent import Limits, PolicyError
from exprag.models import ray_engine
from exprag.models.ray_engine import RayPolicy, RayWorker, RayWorld, Remote, connect, ray_rollout
from exprag.results import read_episodes
from exprag.store import Store
from exprag.trajectory import Task
from exprag.world import SimulatorError
from exprag.worlds.collecting import CollectError, CollectOptions, CollectReport, collect
from exprag.worlds.shop import ShopEnv, shop_expert, shop_tasks

TASKS = shop_tasks("train")[:12]


@pytest.fixture(scope="module")
def nodes():
    with cluster(3) as made:
        connect(made.address)
        yield made


def digits(trajectory) -> str:
    "All of an episode but how long it took."
    record = trajectory.to_dict()
    record["provenance"].pop("seconds", None)
    return json.dumps(record, sort_keys=True)


def alone() -> dict:
    "The expert's episodes, played here, by task."
    env = ShopEnv()
    return {t: digits(shop_expert(env, t)) for t in TASKS}


def kept(run) -> list: return read_episodes(run.folder / "episodes.jsonl")
def played(folder: Path) -> list[str]: return [line.split(" ")[0] for line in lines(folder / "played.txt")]


def there(pid: int) -> bool:
    "Whether a process is running."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def all_gone(some: set[int], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while any(map(there, some)) and time.monotonic() < end: time.sleep(0.5)
    return not any(map(there, some))


# ---- collecting ----

@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_episodes_with_any_number_of_workers(nodes, tmp_path, workers):
    made = []
    report = collect(TASKS, made.append, CollectOptions(workers, progress=False, worker=RayWorker))
    assert report == CollectReport(12, 0, (), 0)
    assert {t.task: digits(t) for t in made} == alone()


def test_an_actor_that_is_killed_costs_its_episode_alone(nodes, tmp_path):
    made = []
    run = partial(expert, folder=tmp_path, kills=True)
    assert collect(TASKS, made.append, CollectOptions(2, run, ShopEnv, progress=False, worker=RayWorker)) == CollectReport(12, 0, (), 1)
    assert {t.task: digits(t) for t in made} == alone()
    assert len(played(tmp_path)) == 13 and len(pids(tmp_path)) == 3
    assert all_gone(pids(tmp_path))


def test_what_takes_too_long_is_killed_and_a_mistake_ends_it(nodes, tmp_path):
    def sleeps_once(env, task):
        if not (tmp_path / "slept").exists():
            (tmp_path / "slept").touch()
            time.sleep(1000)
        return shop_expert(env, task)
    made = []
    assert collect(TASKS[:1], made.append, CollectOptions(1, sleeps_once, ShopEnv, progress=False, worker=RayWorker, timeout=3)) == CollectReport(1, 0, (), 1)
    assert [digits(t) for t in made] == [alone()[TASKS[0]]]
    with pytest.raises(CollectError, match="(?s)cannot be played.*ZeroDivisionError"):
        collect(TASKS, print, CollectOptions(1, lambda env, task: 1 / 0, ShopEnv, progress=False, worker=RayWorker))


# ---- evaluation ----

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "The condition's episodes without Ray."
    folder = tmp_path_factory.mktemp("plain")
    return {t.task: digits(t) for t in kept(evaluate_all(folder, Scripted(folder)))}


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_the_same_answers_with_any_number_of_policies(nodes, tmp_path, plain, copies):
    policy = RayPolicy(partial(Scripted, tmp_path, together=copies), copies)
    run = evaluate_all(tmp_path, policy, rollout=ray_rollout)
    policy.close()
    assert {t.task: digits(t) for t in kept(run)} == plain and len(plain) == 8
    assert len(pids(tmp_path)) == copies, "every copy has played"


def test_a_policy_that_is_killed_costs_nothing_and_a_world_its_episode(nodes, tmp_path, plain):
    policy = RayPolicy(partial(Scripted, tmp_path, kills=True), 2)
    run = evaluate_all(tmp_path, policy, rollout=ray_rollout, env_factory=partial(falling, tmp_path))
    policy.close()
    assert (tmp_path / "killed").exists() and (tmp_path / "fell").exists()
    fell = [t for t in kept(run) if t.provenance["restarts"]]
    assert [t.provenance["restarts"] for t in fell] == [1] and len(played(tmp_path)) == 9
    same = {t.task: digits(t) for t in kept(run)}
    assert same[fell[0].task].replace('"restarts": 1', '"restarts": 0') == plain[fell[0].task]
    assert {k: v for k, v in same.items() if k != fell[0].task} == {k: v for k, v in plain.items() if k != fell[0].task}


def test_policies_that_are_not_the_same_are_refused(nodes, tmp_path):
    policy = RayPolicy(partial(Scripted, tmp_path, differs=True), 2)
    with pytest.raises(PolicyError, match="do not load the same policy"): evaluate_all(tmp_path, policy, rollout=ray_rollout)
    policy.close()
    assert all_gone(pids(tmp_path))


def test_a_policy_whose_actors_all_die_is_given_up(nodes, tmp_path):
    policy = RayPolicy(partial(Scripted, tmp_path))
    policy.actors[0].kill(closed=True)
    with pytest.raises(PolicyError, match="3 actors were lost while one question was asked"): policy.reset()


def test_a_rollout_that_is_left_ends_its_threads_and_worlds(nodes, tmp_path):
    policy = RayPolicy(partial(Scripted, tmp_path, 0.1), 2)
    going = ray_rollout(policy, ShopEnv, panel().tasks, None, Limits({}, 1))
    first = next(going)
    going.close()
    assert first.task in panel().tasks and len(played(tmp_path)) < 8
    policy.close()


def test_the_exceptions_of_a_world_come_back_as_they_are(nodes):
    env = RayWorld(ShopEnv)
    assert env.reset(TASKS[0])[1]["task"] == TASKS[0] and env.world_version == "1"
    for _ in range(10): assert env.step("tables")[0]
    with pytest.raises(RuntimeError, match="^the episode is over, or none was begun: call reset"): env.step("tables")
    with pytest.raises(ValueError, match="^unknown question 'no such question'"): env.reset(Task("shop", "no such question", 0, "train"))
    env.close()
    with pytest.raises(SimulatorError, match="it was stopped"): env.step("tables")


def test_no_room_is_an_error_if_no_node_is_big_enough(nodes, monkeypatch):
    monkeypatch.setattr(ray_engine, "PLACE_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match="no node of the Ray cluster has what an actor needs, {'CPU': 1, 'GPU': 7}"):
        Remote(ShopEnv, gpus=7).call("info")


# ---- nodes and drivers ----

def test_a_node_that_goes_costs_the_work_on_it(nodes, tmp_path):
    "Three workers on three nodes, then two nodes: the third worker's task waits until another worker has ended."
    made, run = [], partial(expert, folder=tmp_path, seconds=0.3)
    def keep(trajectory):
        made.append(trajectory)
        if len(made) == 3: nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    report = collect(TASKS, keep, CollectOptions(3, run, ShopEnv, progress=False, worker=RayWorker))
    assert report == CollectReport(12, 0, (), report.restarted) and report.restarted >= 1
    assert {t.task: digits(t) for t in made} == alone() and len(made) == 12
    again = [task for task in set(played(tmp_path)) if played(tmp_path).count(task) > 1]
    assert len(again) <= report.restarted


def test_a_node_that_goes_in_the_middle_of_an_evaluation(nodes, tmp_path, plain):
    "Two policies on the two nodes left, then one node: one policy waits until the other has played all that it can."
    policy = RayPolicy(partial(Scripted, tmp_path, 0.3), 2)
    played_now = iter(ray_rollout(policy, ShopEnv, panel().tasks, None, Limits(panel().caps)))
    made = [next(played_now)]
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    made += played_now
    policy.close()
    nodes.add()
    assert sorted(t.task for t in made) == sorted(panel().tasks)
    ids = {json.loads(record)["id"] for record in plain.values()}
    assert {t.id for t in made} == ids


def drive(what: str, folder: Path, kill_after: int | None) -> None:
    "A driver in a process of its own, killed once so many episodes are on disk, or left to end."
    process = subprocess.Popen([sys.executable, str(HERE / "ray_parts.py"), what, str(folder)], start_new_session=True)
    if kill_after is None:
        assert process.wait(timeout=600) == 0
        return
    while len(stored(what, folder)) < kill_after:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


def stored(what: str, folder: Path) -> list[str]:
    "A line an episode that is kept."
    if what == "collect": return lines(folder / "acknowledged.txt")
    return [line for path in (folder / "runs").glob("*/episodes.jsonl") for line in path.read_text().splitlines(True) if line.endswith("\n")]


@pytest.mark.parametrize("what", ["collect", "evaluate"])
def test_a_killed_driver_goes_on_from_what_is_stored(nodes, tmp_path, plain, what):
    drive(what, tmp_path, kill_after=3)
    before = stored(what, tmp_path)
    assert all_gone(pids(tmp_path)), "actors end with their driver"
    kept = [line.split(" ")[0] for line in before] if what == "collect" else [str(t.task) for t in read_episodes(next((tmp_path / "runs").glob("*/episodes.jsonl")))]
    drive(what, tmp_path, kill_after=None)
    assert stored(what, tmp_path)[:len(before)] == before
    for task in kept: assert played(tmp_path).count(task) == 1, f"{task} was stored and is played again"
    if what == "collect":
        with Store(tmp_path / "kept.db") as store: assert {t.task: digits(t) for t in store} == alone()
    else:
        episodes = read_episodes(next((tmp_path / "runs").glob("*/episodes.jsonl")))
        assert {t.task: digits(t) for t in episodes} == plain and len(episodes) == len(plain)


# ---- the command ----

def test_the_commands_make_the_same_store_and_runs(nodes, tmp_path):
    "With the real model, two copies of it, and a memory."
    few = ["collect.easy=2", "collect.hard=1", "evaluate.conditions=['zero-shot', 'ExpRAG (frozen)']", "evaluate.per_type=1", "evaluate.max_new_tokens=8"]
    for engine in ("processes", "ray"):
        command = ["evaluate", "quick-shop", "--out", str(tmp_path / engine), "--engine", engine, "--threads", "1", "--batch-size", "2", *["--policies", "2"] * (engine == "ray")]
        code = "import sys; from exprag.cli import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code, *command, *(part for text in few for part in ("--set", text))], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    def episodes(engine): return {(p.parent.name, t.task): digits(t) for p in (tmp_path / engine / "episodes").glob("*/episodes.jsonl") for t in read_episodes(p)}
    assert episodes("ray") == episodes("processes") and len(episodes("ray")) >= 4
    stores = [next((tmp_path / engine).glob("experience-*.db")) for engine in ("processes", "ray")]
    kept = []
    for path in stores:
        with Store(path) as store: kept.append({digits(t) for t in store})
    assert kept[0] == kept[1] and kept[0]


def test_it_listens_on_this_machine_only(nodes):
    psutil = pytest.importorskip("psutil")
    ours = [p for p in psutil.Process().children(recursive=True) if any(word in " ".join(p.cmdline()) for word in ("gcs_server", "raylet"))]
    found = {c.laddr.ip for p in ours for c in p.net_connections() if c.status == "LISTEN"}
    assert found and all(ip.removeprefix("::ffff:") in ("127.0.0.1", "::1") for ip in found), found
