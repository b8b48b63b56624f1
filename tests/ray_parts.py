"""A Ray cluster of several nodes on this machine, and what plays on it in the tests: light to import, and killed on purpose.

    python tests/ray_parts.py collect|evaluate FOLDER     a driver that can be killed; RAY_ADDRESS says where the cluster is
"""
import os
import secrets
import signal
import socket
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from exprag.agent import Action
from exprag.world import World, load_world
from exprag.worlds.shop import ShopEnv, shop_expert, shop_tasks

HERE = Path(__file__).resolve().parent
os.environ |= {"RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # which Ray reads when it is imported
PATIENT = {"worker_register_timeout_seconds": 900, "health_check_timeout_ms": 60000, "health_check_period_ms": 1000,
           "agent_register_timeout_ms": 900000, "enable_worker_prestart": False}


def free_ports() -> dict:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return dict(zip(("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"), ports))


def start_without_agents(node, start) -> None:
    "Start a node's processes; it gives its monitoring, which nothing here asks, 15 s to say its ports: too few on a busy machine."
    import ray._raylet as names
    for name in ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"):
        port = getattr(node._ray_params, name) or free_ports()[name]
        names.persist_port(node._session_dir, node._node_id, getattr(names, f"{name}_name".upper()), port)
    start(node)


@contextmanager
def cluster(nodes: int):
    "A head that plays nothing and nodes of one processor each; gives a function that adds one, too."
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])  # actors import what the tests import
    import ray
    from ray._private.node import Node
    from ray.cluster_utils import Cluster
    start, Node.start_ray_processes = Node.start_ray_processes, lambda node: start_without_agents(node, start)
    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}
    made = Cluster(True, head_node_args={**common, **free_ports(), "num_cpus": 0, "include_dashboard": False, "no_monitor": True,
                                         "include_log_monitor": False, "_system_config": PATIENT})
    made.add = lambda: made.add_node(num_cpus=1, **common, **free_ports())
    for _ in range(nodes): made.add()
    os.environ["RAY_ADDRESS"] = made.address
    try: yield made
    finally:
        ray.shutdown()
        made.shutdown()
        Node.start_ray_processes = start


def once(mark: Path) -> bool:
    "Whether it is the first time, over all processes."
    try: os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError: return False
    return True


def lines(path: Path) -> list[str]: return path.read_text().splitlines() if path.exists() else []
def pids(folder: Path) -> set[int]: return {int(line.split(" ")[1]) for line in lines(folder / "played.txt")}


def note(path: Path, text: str) -> None:
    with open(path, "a") as file: file.write(text + "\n")


def expert(env, task, folder: Path, seconds: float = 0.0, kills: bool = False):
    "The shop's expert, who notes what it plays and where; perhaps slow, perhaps killed the first time."
    note(folder / "played.txt", f"{task} {os.getpid()}")
    time.sleep(seconds)
    if kills and once(folder / "killed"): os.kill(os.getpid(), signal.SIGKILL)
    return shop_expert(env, task)


class Scripted:
    "Looks at the tables and their schema, and answers with a number that depends on all it has read."
    name, batch_size = "scripted", 2
    def __init__(self, folder: Path, seconds: float = 0.0, kills: bool = False, differs: bool = False, together: int = 1):
        self.folder, self.seconds, self.kills, self.together, self.keys = folder, seconds, kills, together, set()
        self.word = str(os.getpid()) if differs else ""
    def reset(self): self.keys.clear()
    def describe(self): return {"name": self.name, "weights": "none" + self.word}
    def act(self, trajectories, experiences=None, keys=None):
        time.sleep(self.seconds)
        if self.kills and any(t.steps for t in trajectories) and once(self.folder / "killed"): os.kill(os.getpid(), signal.SIGKILL)
        for t in trajectories:
            if not t.steps: note(self.folder / "played.txt", f"{t.task} {os.getpid()}")
        until = time.monotonic() + 300  # a copy that is quick would else have played all before another has started
        while len(pids(self.folder)) < self.together and time.monotonic() < until: time.sleep(0.05)
        return [self.action(t, list(e)) for t, e in zip(trajectories, experiences)]
    def action(self, trajectory, found):
        if not trajectory.steps: return Action("tables", 1, 1, 1)
        if len(trajectory) == 1: return Action("schema " + trajectory.steps[0].observation.split("\n")[0], 2, 1, 1)
        return Action(f"answer {sum(len(s.observation) for s in trajectory.steps) + len(found)}", 3, 1, 1)


class Falling(ShopEnv):
    "A shop whose process is killed at the second step, the first time."
    folder: Path
    def step(self, action):
        if self.steps and once(self.folder / "fell"): os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def falling(folder: Path) -> Falling:
    env = Falling()
    env.folder = folder
    return env


def collect_all(folder: Path, workers: int, seconds: float = 0.0, **more):
    "Collect the shop's easy train tasks into a store."
    from exprag.models.ray_engine import RayWorker
    from exprag.store import Store
    from exprag.worlds.collecting import CollectOptions, collect
    tasks = shop_tasks("train")[:12]
    with Store(folder / "kept.db") as store:
        def keep(trajectory):
            store.add(trajectory)
            note(folder / "acknowledged.txt", f"{trajectory.task} {trajectory.id}")
        run = partial(expert, folder=folder, seconds=seconds)
        return collect(tasks, keep, CollectOptions(workers, run, ShopEnv, done=store.has_task, progress=False, worker=RayWorker, **more))


def panel():
    "Eight dev tasks of the shop."
    from exprag.world import Panel
    tasks = shop_tasks("dev", ["count-orders", "last-order"])
    return Panel("few", tasks, {t.type: 6 for t in tasks}, {})


def evaluate_all(folder: Path, policy, memory=None, **more):
    "A condition on the panel."
    from exprag.evaluation import Condition, EvaluationOptions, evaluate
    from exprag.select import NoMemory
    kind = "none" if memory is None or isinstance(memory, NoMemory) else "retrieved"
    return evaluate(Condition("x", memory=kind, k=1), panel(), folder / "runs", policy, memory, (), EvaluationOptions(progress=False, **more))


def main(what: str, folder: Path) -> None:
    from exprag.models.ray_engine import RayPolicy, ray_rollout
    if what == "collect": collect_all(folder, 2, seconds=0.5)
    else: evaluate_all(folder, RayPolicy(partial(Scripted, folder, 0.5), 2), rollout=ray_rollout)


if __name__ == "__main__": main(sys.argv[1], Path(sys.argv[2]))
