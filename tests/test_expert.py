"The expert and the collecting of its episodes, in the real simulator."
import os
import signal
import threading

import pytest

from exprag.environment import EASY_TYPES, EXPERT_LENGTHS, HARD_TYPES, MENDELIAN_TYPES, ScienceWorldEnv, fits_template, play, scienceworld_tasks, spread
from exprag.expert import AMBIGUOUS, REJECTED, WAIT_TICKS, accepted, collect, expert, shortest_walk, tidied, wait_instead
from exprag.trajectory import Step, Task, Trajectory, read_jsonl, write_jsonl

TYPES = EASY_TYPES + HARD_TYPES
QUICK = Task("scienceworld", "find-plant", 0, "train")


def task(kind: str, variation: int = 0, fold: str = "train") -> Task:
    return Task("scienceworld", kind, variation, fold)


def java_children() -> set[int]:
    "Process ids of this process's own JVMs."
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try: fields, name = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split(), open(f"/proc/{pid}/comm").read().strip()
        except OSError: continue
        if name == "java" and int(fields[1]) == os.getpid() and fields[0] != "Z": found.add(int(pid))
    return found


@pytest.fixture(scope="module")
def env():
    with ScienceWorldEnv() as made: yield made


# -- the expert

def told(*turns) -> Trajectory:
    return Trajectory(QUICK, "goal", "This room is called the kitchen. You also see:\n\tA door to the hallway (that is open)", tuple(Step(*t) for t in turns))


def test_rejected_lines_and_unanswered_questions_go():
    question = AMBIGUOUS + " Please enter the number"
    assert accepted(told(("a", "fine"), ("b", REJECTED), ("c", question), ("0", "done"), ("d", question), ("e", "fine"))) == ("a", "c", "0", "e")


def test_tidied_walks_and_teleports():
    story = told(("open door to hallway", "The door is already open."), ("go to hallway", "You move to the hallway."), ("go to kitchen", "You move to the kitchen."),
                 ("go to hallway", "You move to the hallway."), ("go to workshop", "You move to the workshop."), ("look around", "This room is called the workshop."),
                 ("examine wire", "a wire"), ("go to hallway", "You move to the hallway."))
    assert tidied(story) == ("go to hallway", "go to workshop", "look around", "look at wire", "go to hallway")
    assert tidied(story, "teleport") == ("teleport to workshop", "look around", "look at wire", "teleport to hallway")
    assert tidied(story, "words") == tuple(a.replace("examine", "look at") for a in story.actions)


def test_shortest_walk():
    doors = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}
    assert shortest_walk("a", "d", doors) == ["b", "d"] and shortest_walk("a", "a", doors) == [] and shortest_walk("d", "a", doors) is None


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 23, 24, 300])
def test_waiting_takes_as_long_as_watching(count):
    short = wait_instead(["look at x"] * count)
    assert sum(WAIT_TICKS if a == "wait" else 1 for a in short) == count and len(short) <= count


@pytest.mark.parametrize("kind", ["power-component", "identify-life-stages-2"])
def test_expert_reaches_the_goal_tidy_or_not(env, kind):
    t = scienceworld_tasks("train", [kind])[0]
    plain = expert(env, t)
    for way in (True, "teleport"):
        made = expert(env, t, tidy=way)
        assert made.success and made.score == 100 and len(made) <= len(plain) and accepted(made) == made.actions
        assert made.provenance["actor"] == "expert" and made.provenance["gold_steps"] == len(plain) == EXPERT_LENGTHS[kind][0]
        assert all(fits_template(a) or a.isdigit() for a in made.actions)
        assert play(env, t, made.actions, cap=1000).id == made.id


def test_waiting_is_exactly_as_long_in_the_real_simulator(env):
    t = scienceworld_tasks("train", ["inclined-plane-friction-named-surfaces"])[0]
    plain, short = expert(env, t), expert(env, t, tidy="words")
    assert len(short) < len(plain) and plain.steps[-2].observation == short.steps[-2].observation


def test_a_gold_path_that_fails_is_not_kept(env):
    assert expert(env, task("freeze", 11)) is None and expert(env, task("freeze", 11), tidy=True) is None


# -- collecting

def some_tasks() -> list[Task]:
    return [scienceworld_tasks("train", [kind])[i] for kind in ("find-plant", "lifespan-longest-lived") for i in (0, 1)]


def test_collect_does_not_depend_on_workers_and_leaves_nothing():
    before, alone, together = java_children(), [], []
    threads = set()
    one = collect(some_tasks(), lambda t: (alone.append(t), threads.add(threading.get_ident())), progress=False)
    two = collect(some_tasks() * 2, together.append, workers=2, progress=False)
    assert one == two and one.kept == 4 and not one.failed and {t.id for t in alone} == {t.id for t in together}
    assert threads == {threading.get_ident()} and java_children() == before


def test_collect_replaces_a_simulator_that_dies_and_resumes(tmp_path):
    kept, killed, path = {}, [], tmp_path / "kept.jsonl"

    def dies_once(env, t):
        env.reset(t)
        if not killed:
            killed.append(t)
            os.kill(env._process.pid, signal.SIGKILL)
        return expert(env, t)

    first = collect(some_tasks()[:2], lambda t: kept.setdefault(t.task, t), run=dies_once, progress=False)
    assert (first.kept, first.restarted, first.failed) == (2, 1, ())
    write_jsonl(kept.values(), path)
    again = {t.task: t for t in read_jsonl(path)[0]}
    second = collect(some_tasks(), lambda t: again.setdefault(t.task, t), done=again.__contains__, progress=False)
    assert (second.kept, second.skipped) == (2, 2) and set(again) == set(some_tasks())


def test_collect_kills_what_hangs_and_says_so():
    def hangs(env, t):
        env.reset(t)
        while True: env.step("look around") if not env.over else env.reset(t)

    report = collect([QUICK], print, run=hangs, progress=False, timeout=6, attempts=1)
    assert report.kept == 0 and report.restarted == 1 and "took more than 6 s" in report.failed[0][1]


def test_collect_ends_when_the_sink_fails():
    before = java_children()
    def full(trajectory): raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"): collect(some_tasks(), full, workers=2, progress=False)
    assert java_children() == before


def test_collect_nothing():
    assert collect([], print, progress=False).kept == 0


def test_the_type_that_remembers_is_made_to_forget(env):
    first, second = scienceworld_tasks("train", ["test-conductivity-of-unknown-substances"])[:2]
    alone = expert(env, first).id
    expert(env, second)
    assert expert(env, first).id == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", [t for t in TYPES if t not in MENDELIAN_TYPES])
def test_expert_lengths_are_what_the_simulator_gives(env, kind):
    made = [expert(env, t) for t in spread(scienceworld_tasks("train", [kind]), 5)]
    assert tuple(m and len(m) for m in made) == EXPERT_LENGTHS[kind]
