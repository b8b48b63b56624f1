"""Conditions, controls, audit and runner, on the real ScienceWorld where a world is needed."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from encoders import WordEncoder
from exprag.agent import Action, Limits, ReplayPolicy, rollout
from exprag.audit import LeakError, Manifest, memory_manifest
from exprag.evaluation import (
    CONDITIONS, Condition, EvaluationOptions, RandomRetriever, _check_dialect, check_leaks, condition, evaluate,
    memory_for, rule, run_config)
from exprag.memory.adaptation import adapt, adapt_to_goal
from exprag.memory.in_episode import Moved
from exprag.memory.insights import WORKFLOW, Insights, insight_leaks, register
from exprag.memory.tracking import track_progress
from exprag.prompt import PromptFormat
from exprag.query import Retriever
from exprag.results import CONDITION_ORDER, load_results, read_episodes, results_table
from exprag.select import Every, Memory, NoMemory, Once
from exprag.statistics import Bootstrap
from exprag.store import Store
from exprag.studies.controls import OracleRetriever
from exprag.trajectory import Step, Task, Trajectory, TrajectoryError, digest, read_jsonl, same_task
from exprag.views import Cursor, Experience, register_view
from exprag.world import Panel, World, load_panel, load_world, register_world
from exprag.worlds.scienceworld import HARD_TYPES, scienceworld_tasks

QUIET = EvaluationOptions(progress=False)
SAMPLE = Path(__file__).resolve().parents[1] / "nbs" / "data" / "sample.jsonl"


@cache
def sample() -> tuple[Trajectory, ...]:
    "The book's expert episodes."
    return tuple(read_jsonl(SAMPLE)[0])


@pytest.fixture
def retriever(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many(sample())
        yield Retriever(store, WordEncoder())


def small_panel(tasks, name="small") -> Panel:
    return Panel(name, tuple(tasks), {t.type: load_world(t.world).step_cap(t.type) for t in tasks}, {"simplification": "easy"})


QUICK = ("chemistry-mix-paint-secondary-color", "power-component", "test-conductivity")


def quick_panel(count=3):
    return small_panel([t for t in load_panel("scienceworld", "demo").tasks if t.type in QUICK][:count])


# ---- conditions ----

def test_the_five_conditions_and_three_controls():
    assert tuple(CONDITIONS) == CONDITION_ORDER and all(name == c.name for name, c in CONDITIONS.items())
    assert {c.memory for c in CONDITIONS.values()} == {"none", "retrieved", "random", "oracle"}
    a, b = condition("ExpRAG-LoRA"), condition("random experience")
    assert replace(a, name="x", memory="none") == replace(b, name="x", memory="none"), "random experience differs in the ranking alone"


@pytest.mark.parametrize("make, message", [
    (lambda: condition("exprag-lora"), "unknown condition 'exprag-lora'.*ExpRAG-LoRA"),
    (lambda: Condition("x", adapter="loro"), "did you mean 'lora'"),
    (lambda: Condition("x", memory="retrieval"), "unknown memory"),
    (lambda: Condition("x", policy="human"), "unknown policy"),
    (lambda: Condition("x", k=0), "k is 0"),
    (lambda: Condition("x", when="every 5"), "there is no memory to ask"),
    (lambda: Condition("x", outcomes="all"), "asks 'once' for 'all'; there is no memory"),
    (lambda: Condition("x", memory="retrieved", outcomes="failures"), "unknown outcomes 'failures'.* known: successes, all"),
    (lambda: rule("often"), "no rule is called 'often'.*'every 5'"), (lambda: rule("every"), "no rule"), (lambda: rule("every 0"), "no rule"),
    (lambda: rule("every -1"), "no rule"), (lambda: rule("once more"), "no rule"),
    (lambda: load_panel("scienceworld", "hard"), "unknown panel of scienceworld 'hard'"),
])
def test_unknown_names_are_refused_with_the_valid_ones(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_has_a_name():
    assert isinstance(rule("once"), Once) and rule("every 5") == Every(5) and rule("every 12").describe() == {"when": "every", "steps": 12}


# ---- the memory of a condition ----

def test_random_experience_is_seeded_and_obeys(retriever):
    store, task = retriever.store, load_panel("scienceworld", "demo").tasks[0]
    here, there = Trajectory(task, "g", "o"), Trajectory(load_panel("scienceworld", "demo").tasks[1], "g", "o")
    one, again = RandomRetriever(store, 1), RandomRetriever(store, 1)
    ids = [h.id for h in one.search(here, 10)]
    assert ids == [h.id for h in again.search(replace(here, goal="another text"), 10)] and [h.rank for h in one.search(here, 3)] == [1, 2, 3]
    assert ids != [h.id for h in one.search(there, 10)] and ids != [h.id for h in RandomRetriever(store, 2).search(here, 10)]
    allowed = set(ids[3:6])
    assert [h.id for h in one.search(here, 10, allowed)] == ids[3:6], "the order of some does not depend on the others"
    assert one.search(here, 10, set()) == [] and one.search(here, 10, {"not there"}) == []


def test_random_experience_is_fair(retriever):
    first = [RandomRetriever(retriever.store, seed).search(Trajectory(load_panel("scienceworld", "demo").tasks[0], "g", "o"), 1)[0].id for seed in range(300)]
    counts = np.array([first.count(id) for id in retriever.store.find()])
    expected = 300 / len(counts)
    assert counts.max() < expected + 6 * np.sqrt(expected) + 2


@pytest.mark.parametrize("name", ["ExpRAG-LoRA", "random experience", "oracle experience", "replay"])
def test_every_memory_obeys_the_same_rules(retriever, name):
    "Same task excluded, successes only, matched difficulty, at most k."
    mine = next(t for t in sample() if t.task.type in HARD_TYPES)
    oracle = OracleRetriever(retriever.store, {mine.task: mine.actions})
    memory = memory_for(condition(name), oracle if name.startswith("oracle") else retriever)
    found = memory.recall(mine.opening())
    assert len(found) == condition(name).k and not any(same_task(mine, e.trajectory) for e in found)
    assert all(e.success and e.task.type in HARD_TYPES and e.task.fold == "train" for e in found)


def test_memories_that_cannot_be_made_are_refused(retriever):
    oracle = OracleRetriever(retriever.store, {load_panel("scienceworld", "demo").tasks[0]: ()})
    assert isinstance(memory_for(condition("LoRA")), NoMemory)
    with pytest.raises(ValueError, match="give a retriever"): memory_for(condition("ExpRAG-LoRA"))
    with pytest.raises(ValueError, match="ranks by 'oracle' and the retriever is a Retriever.*OracleRetriever"): memory_for(condition("oracle experience"), retriever)
    with pytest.raises(ValueError, match="ranks by 'retrieved' and the retriever is a OracleRetriever"): memory_for(condition("ExpRAG-LoRA"), oracle)
    with pytest.raises(ValueError, match="no rule is called 'often'"): memory_for(condition("ExpRAG-LoRA", when="often"), retriever)
    fingerprints = {memory_for(c, oracle if c.memory == "oracle" else retriever).fingerprint for c in
                    (condition("ExpRAG-LoRA"), condition("random experience"), condition("random experience", seed=1), condition("oracle experience"), condition("replay"))}
    assert len(fingerprints) == 5


def test_failures_are_a_condition(retriever):
    "Off by default, and then no part of the configuration; on, a failure ranks like a success, under its own header."
    plain, failing = condition("ExpRAG-LoRA"), condition("ExpRAG-LoRA", outcomes="all")
    assert plain.describe() == {k: v for k, v in asdict(plain).items() if k != "outcomes"} and failing.describe() == asdict(failing)
    best = next(t for t in sample() if t.task.type in HARD_TYPES)
    failed = replace(best, task=replace(best.task, variation="999"), steps=best.steps[:3], score=0.0, success=False)
    retriever.store.add(failed)
    here = replace(best, task=replace(best.task, variation="5", fold="test")).opening()
    shown = {c.outcomes: memory_for(c, retriever).recall(here) for c in (plain, failing)}
    assert {e.success for e in shown["successes"]} == {True} and failed.id in shown["all"].ids and len(shown["all"]) == 2
    texts = {k: PromptFormat().system("scienceworld", found.experiences) for k, found in shown.items()}
    assert PromptFormat().failure_header in texts["all"] and PromptFormat().failure_header not in texts["successes"]
    assert memory_for(plain, retriever).fingerprint != memory_for(failing, retriever).fingerprint


# ---- replay ----

def test_replay_plays_the_actions_adapted_if_asked_and_then_stops():
    old = Trajectory(Task("scienceworld", "find-plant", "1", "train"), "Your task is to find the red apple in the kitchen.", "o",
                     (Step("go to kitchen", "x"), Step("focus on red apple", "y")), score=100, success=True)
    new = Trajectory(Task("scienceworld", "find-plant", "2", "test"), "Your task is to find the red lemon in the bathroom.", "o")
    def played(policy, episode=new):
        actions = []
        while (action := policy.act([episode], [(Experience(old),)])[0]).text:
            actions.append(action.text)
            episode = episode.with_step(Step(action.text, "z"))
        assert action.stop == "done"
        return actions, episode
    assert played(ReplayPolicy())[0] == list(old.actions)
    actions, end = played(policy := ReplayPolicy(adapt))
    assert actions == ["go to bathroom", "focus on red lemon"]
    assert [a.text for a in policy.act([end, end], [(), (old,)])] == ["", ""], "no experience, or no action left"
    assert policy.describe() == {"name": "replay", "adapt": "adapt"} != ReplayPolicy().describe()


def test_replay_starts_where_the_cursor_says():
    lines = ("go to kitchen", "open oven", "wait")
    old = Trajectory(Task("scienceworld", "melt", "1", "train"), "Melt it.", "o", tuple(Step(a, "x") for a in lines), score=100, success=True)
    new = Trajectory(Task("scienceworld", "melt", "2", "test"), "Melt it.", "o", (Step("go to kitchen", "x"), Step("eat", "No known action matches that input.")))
    def next_action(cursor): return ReplayPolicy().act([new], [(Experience(old, cursor=cursor),)])[0].text
    assert [next_action(c) for c in (None, Cursor(done=1, offset=1))] == ["wait", "open oven"]


def test_replay_with_progress_tracking_follows_the_world(retriever, tmp_path):
    "Real ScienceWorld: rejected experience is dropped, and what is shown follows what is seen."
    where, static, tracked = quick_panel(), condition("replay"), condition("replay", name="replay, tracked", when="every 1")
    memory = memory_for(tracked, retriever, extra_stages=[adapt_to_goal()])
    memory = Memory(memory.retriever, track_progress(memory.stages), memory.composition, when=memory.when)
    runs = [evaluate(static, where, tmp_path, ReplayPolicy(adapt), memory_for(static, retriever), options=QUIET), evaluate(tracked, where, tmp_path, ReplayPolicy(adapt), memory, options=QUIET)]
    asks = [t.provenance["asks"] for t in read_episodes(runs[1].folder / "episodes.jsonl")]
    assert all(a["asked"] > 1 for a in asks) and any(len({id for _, ids in a["shown"] for id in ids}) > 1 for a in asks)
    assert sum(e.score for e in runs[1].episodes) > sum(e.score for e in runs[0].episodes)


# ---- the audit ----

def test_a_leak_stops_a_run_before_it_begins(retriever, tmp_path):
    where, trained = quick_panel(), condition("LoRA")
    easy, hard = Task("scienceworld", "boil", "0", "train"), Task("scienceworld", "grow-plant", "0", "train")
    with pytest.raises(LeakError, match="no adapter manifest"): check_leaks(trained, where, ReplayPolicy(), NoMemory())
    check_leaks(trained, where, ReplayPolicy(), NoMemory(), [Manifest("adapter", "good", (easy,))])
    for seen in (hard, where.tasks[0], replace(where.tasks[0], fold="train")):
        with pytest.raises(LeakError): check_leaks(trained, where, ReplayPolicy(), NoMemory(), [Manifest("adapter", "bad", (easy, seen))])
    with pytest.raises(LeakError): check_leaks(trained, where, ReplayPolicy(), NoMemory(), [Manifest("adapter", "made from bad", (easy,), parents=(Manifest("pretraining", "bad", (hard,)),))])
    memory = memory_for(condition("replay"), retriever)
    assert check_leaks(condition("replay"), where, ReplayPolicy(), memory) == ()
    hub = Manifest("pretraining", "some-7B", known=False)
    assert check_leaks(condition("zero-shot"), where, ReplayPolicy(), NoMemory(), [hub]) == ("some-7B",), "not refused, but said"
    assert check_leaks(condition("zero-shot"), where, ReplayPolicy(), NoMemory()) == ("replay",)
    retriever.store.add(replace(sample()[0], task=replace(where.tasks[0], fold="train"), goal="smuggled in"))
    with pytest.raises(LeakError): evaluate(condition("replay"), where, tmp_path / "runs", ReplayPolicy(), memory, options=QUIET)
    assert not (tmp_path / "runs").exists(), "nothing was run, and nothing written"


@pytest.mark.parametrize("name, policy, message", [("LoRA", ReplayPolicy(), "acts by model"), ("replay", object(), "acts by replay"), ("replay", ReplayPolicy(), "remembers 'retrieved'")])
def test_a_policy_or_memory_of_another_condition_is_refused(tmp_path, name, policy, message):
    with pytest.raises(ValueError, match=message): evaluate(condition(name), quick_panel(), tmp_path, policy)


def test_what_decides_the_episodes_names_the_directory(retriever):
    c, where, policy = condition("replay"), quick_panel(), ReplayPolicy()
    memory = memory_for(c, retriever)
    base = run_config(c, where, policy, memory)
    others = [run_config(replace(c, seed=1), where, policy, memory), run_config(c, quick_panel(2), policy, memory),
              run_config(c, where, ReplayPolicy(adapt), memory), run_config(c, replace(where, caps={t.type: 7 for t in where}), policy, memory),
              run_config(c, where, policy, memory_for(replace(c, k=3), retriever)), run_config(c, where, policy, memory_for(c, retriever, extra_stages=[adapt_to_goal()]))]
    assert len({digest(x) for x in (base, *others)}) == 7 and digest(base) == digest(run_config(c, where, policy, memory))
    assert json.loads(json.dumps(base)) == base
    assert set(base["condition"]) == {"name", "adapter", "memory", "policy", "composition", "k", "seed", "when"}, "a field more would rename every run there is"


def test_what_an_agent_is_shown_of_the_world_is_part_of_the_name(monkeypatch):
    "Version, instruction, templates and refusals of the world; nothing of this machine."
    def config(**changes):
        register_world(World("tiny", easy=("a",), instruction="Act.", templates=("open OBJ",), refusals=("No.",), scores=(0, 1), package="exprag") if not changes
                       else replace(load_world("tiny"), **changes))
        return run_config(condition("zero-shot"), Panel("p", (Task("tiny", "a", "1", "test"),), {"a": 3}, {}), ReplayPolicy(), NoMemory())
    base = config()
    assert base["world"]["version"] and set(base) == {"format", "name", "seed", "condition", "policy", "memory", "world", "panel"}
    assert len({digest(x) for x in (base, config(instruction="Do."), config(templates=("close OBJ",)), config(refusals=("What?",)), config(package=""))}) == 5


def test_what_decides_speed_is_recorded_beside_the_configuration(retriever, tmp_path):
    c, where = condition("replay"), quick_panel(2)
    runs = [evaluate(c, replace(where, caps={t.type: 2 for t in where}), tmp_path, ReplayPolicy(), memory_for(c, retriever), options=EvaluationOptions(size, False)) for size in (None, 2)]
    assert runs[0].folder == runs[1].folder, "the batch size is not part of the name"
    (runtime,) = json.loads((runs[0].folder / "runtime.json").read_text())
    assert runtime["batch_size"] == 1 and set(runtime["versions"]) == {"exprag"}, "the second call found all episodes there"
    (runs[0].folder / "episodes.jsonl").unlink()
    again = evaluate(c, replace(where, caps={t.type: 2 for t in where}), tmp_path, ReplayPolicy(), memory_for(c, retriever), options=EvaluationOptions(2, False))
    assert [r["batch_size"] for r in json.loads((again.folder / "runtime.json").read_text())] == [1, 2]
    assert [(e.task, e.score, e.steps) for e in again.episodes] == [(e.task, e.score, e.steps) for e in runs[0].episodes]


def test_options_make_the_world_and_feed_the_audit(retriever, tmp_path):
    c, where, opened = condition("replay"), quick_panel(1), []
    def factory():
        opened.append(load_world("scienceworld").make(simplification="easy"))
        return opened[-1]
    short = replace(where, caps={t.type: 1 for t in where})
    run = evaluate(c, short, tmp_path, ReplayPolicy(), memory_for(c, retriever), options=EvaluationOptions(progress=False, env_factory=factory))
    assert len(opened) == 1 and run.episodes[0].steps == 1
    told = replace(sample()[0], task=replace(sample()[0].task, variation="29", fold="test"))  # the same words under a test task's name
    store = retriever.store
    chosen = condition("replay", name="other", composition="all")
    with pytest.raises(LeakError): evaluate(chosen, where, tmp_path / "x", ReplayPolicy(), memory_for(chosen, retriever), options=EvaluationOptions(recognise=(told,)))
    assert sample()[0].id in store and not (tmp_path / "x").exists()


# ---- the runner, on the real world ----

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_evaluation import *
with Store({bank!r}) as store:
    store.add_many(sample())
    memory = memory_for(condition("replay"), Retriever(store, WordEncoder()))
    run = evaluate(condition("replay"), quick_panel(), {out!r}, ReplayPolicy(), memory, options=QUIET)
print("finished", len(run.episodes))
"""


def test_a_killed_evaluation_goes_on_and_gives_the_same(tmp_path):
    "kill -9 after the first acknowledged episode, and again at once; then to the end; then beside an undisturbed run."
    def start(out):
        code = RUN.format(tests=str(Path(__file__).parent), bank=str(tmp_path / "bank.db"), out=str(out))
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    def lines(out): return [line for path in out.glob("*/episodes.jsonl") for line in path.read_bytes().splitlines()]

    out, process = tmp_path / "killed", start(tmp_path / "killed")
    deadline = time.time() + 120
    while not lines(out) and process.poll() is None and time.time() < deadline: time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = lines(out)
    assert 1 <= len(kept) < 3, "killed in the middle"
    path, = out.glob("*/episodes.jsonl")
    path.write_bytes(path.read_bytes() + b'{"schema": 1, "torn')
    assert "finished 3" in start(out).communicate(timeout=120)[0]
    assert lines(out)[:len(kept)] == kept, "what was acknowledged was not run again"
    assert "finished 3" in start(tmp_path / "whole").communicate(timeout=120)[0]
    whole, = (tmp_path / "whole").glob("*/episodes.jsonl")
    assert path.parent.name == whole.parent.name
    a, b = ({t.task: (t.id, t.score) for t in read_episodes(p)} for p in (path, whole))
    assert a == b
    table = results_table(load_results(out), how=Bootstrap(200))
    assert table.rows[0][0] == "replay" and table.rows[0][6] == "0"


def test_conditions_with_a_model_on_the_real_world(retriever, tmp_path):
    "A random-weight model, two conditions, two tasks, four steps each: the whole way from weights to table."
    from chat_models import make_model, make_tokenizer
    from exprag.models.local import HFPolicy
    tokenizer = make_tokenizer("qwen")
    policy = HFPolicy(make_model("qwen", len(tokenizer), max_position_embeddings=8192), tokenizer, batch_size=2, max_new_tokens=4, name="random weights")
    where = replace(quick_panel(2), caps={t.type: 4 for t in quick_panel(2)})
    for name in ("ExpRAG (frozen)", "zero-shot"):
        run = evaluate(condition(name), where, tmp_path, policy, memory_for(condition(name), retriever), options=QUIET)
        runtime, = json.loads((run.folder / "runtime.json").read_text())
        assert runtime["threads"] >= 1 and runtime["batch_size"] == 2 and runtime["device"] == "cpu" and runtime["versions"]["torch"] and "runtime" not in run.config
        assert run.config["policy"]["weights"] and run.config["unknown"] == ["random weights"]
        assert [e.task for e in run.episodes] == list(where.tasks) and all(e.tokens_generated and e.tokens_computed <= e.tokens_prompt + e.tokens_generated for e in run.episodes)
    frozen, zero = (load_results(tmp_path).of(n)[0].episodes for n in ("ExpRAG (frozen)", "zero-shot"))
    assert all(a.tokens_prompt / a.steps > b.tokens_prompt / b.steps for a, b in zip(frozen, zero)), "experience stands in the prompt"
    table = results_table(load_results(tmp_path), how=Bootstrap(200))
    assert [r[0] for r in table.rows] == ["zero-shot", "ExpRAG (frozen)"] and "Nobody can say what went into: random weights" in table.caption


# ---- asked again ----

def test_a_condition_says_when_its_memory_is_asked(retriever):
    c, where = condition("replay"), quick_panel()
    static, five = memory_for(c, retriever), memory_for(replace(c, when="every 5"), retriever)
    moved = memory_for(replace(c, when="moved"), retriever, when=Moved())
    assert (static.when, five.when, moved.when) == (Once(), Every(5), Moved()) and isinstance(five, Memory)
    config = run_config(c, where, ReplayPolicy(), static)
    asked = run_config(replace(c, when="every 5"), where, ReplayPolicy(), five)
    assert config["memory"]["asked"] == {"when": "once"} and asked["condition"]["when"] == "every 5" and asked["memory"]["asked"] == {"when": "every", "steps": 5}
    assert asked["memory"] | {"asked": 0} == config["memory"] | {"asked": 0}
    for chosen, memory in ((c, five), (replace(c, when="every 5"), static)):
        with pytest.raises(ValueError, match="use memory_for"): evaluate(chosen, where, "nowhere", ReplayPolicy(), memory)


def test_a_dynamic_run_is_resumed_and_accounts_for_its_asking(retriever, tmp_path):
    where = replace(quick_panel(2), caps={t.type: 6 for t in quick_panel(2)})
    chosen = condition("replay", name="replay, every 2", when="every 2")
    memory = memory_for(chosen, Retriever(retriever.store, retriever.encoder, query="recent"))
    run = evaluate(chosen, where, tmp_path, ReplayPolicy(), memory, options=QUIET)
    path = run.folder / "episodes.jsonl"
    whole = path.read_bytes()
    for t in read_episodes(path):
        asks = t.provenance["asks"]
        assert asks["asked"] == -(-len(t) // 2) and asks["rebuilt"] == len(asks["shown"]) - 1 and asks["shown"][0][0] == 0
        assert all(step % 2 == 0 for step, _ in asks["shown"]) and list(t.provenance["retrieved"]) == list(dict.fromkeys(i for _, ids in asks["shown"] for i in ids))
    path.write_bytes(whole.splitlines(keepends=True)[0] + b'{"torn')
    again = evaluate(chosen, where, tmp_path, ReplayPolicy(), memory, options=QUIET)
    first, second = (sorted((t.task, t.id, t.provenance["asks"]["asked"]) for t in read_episodes(p)) for p in (path, again.folder / "episodes.jsonl"))
    assert again.folder == run.folder and first == second and [e.score for e in again.episodes] == [e.score for e in run.episodes]


# ---- the audit at depth: every fold but train is a fold to be tested on ----

def made(task, salt=0, steps=3):
    return Trajectory(task, f"Do {task.type} {task.variation}.", f"A room {salt}.", tuple(Step(f"open box {j}", f"A box {task.variation} {salt} {j}.") for j in range(steps)),
                      100.0 if task.world == "scienceworld" else 1.0, True, "1", {"simplification": "easy"} if task.world == "scienceworld" else {"grammar": "move"})


def folds_of(world):
    kind, folds = ("pick_heat_then_place_in_recep", ("train", "dev", "seen", "test")) if world == "alfworld" else ("grow-plant", ("train", "dev", "test"))
    return {fold: [t for t in load_world(world).tasks(fold) if t.type == kind] for fold in folds}


def panel_of(world):
    kind, settings = ("grow-plant", {"simplification": "easy"}) if world == "scienceworld" else ("pick_heat_then_place_in_recep", {"grammar": "move"})
    return Panel("p", tuple(folds_of(world)["test"][:3]), {kind: 20}, settings)


class Scribe:
    "An author with one thing to say."
    name = "scribe"
    def describe(self): return {"name": self.name}
    def act(self, trajectories, experiences=None, keys=None): return [Action("END" if t.steps else "look in {container}") for t in trajectories]


FOLDS = [(world, fold) for world in ("scienceworld", "alfworld") for fold in folds_of(world) if fold != "train"]


@pytest.fixture
def clean(tmp_path):
    "Stores of clean train episodes, a world each."
    stores = {}
    for world in ("scienceworld", "alfworld"):
        stores[world] = Store(tmp_path / f"{world}.db")
        stores[world].add_many(made(t) for t in folds_of(world)["train"][:8])
    yield stores
    for store in stores.values(): store.close()


def checked(store, view="actions", manifests=(), recognise=(), **changes):
    world = store.get(store.find()[0]).task.world
    chosen = condition("replay", **changes)
    return check_leaks(chosen, panel_of(world), ReplayPolicy(), memory_for(chosen, Retriever(store, WordEncoder()), view=view), manifests, recognise)


@pytest.mark.parametrize("world, fold", FOLDS)
@pytest.mark.parametrize("number", [0, -1])
def test_an_episode_of_any_other_fold_is_found_under_a_train_label(clean, world, fold, number):
    store, task = clean[world], folds_of(world)[fold][number]
    assert checked(store) == ()
    store.add(made(task, 1))
    assert checked(store) == (), "under its own label it is not in the index"
    store.add(made(replace(task, fold="train"), 2))
    with pytest.raises(LeakError) as caught: checked(store)
    assert {leak.what for leak in caught.value.leaks} == {str(replace(task, fold="train"))}


@pytest.mark.parametrize("world, fold", FOLDS)
def test_its_words_are_found_under_the_name_of_another_task(clean, world, fold):
    store, train, told = clean[world], folds_of(world)["train"], made(folds_of(world)[fold][-1], 5)
    shouted = replace(told, task=train[20], goal=told.goal.upper(), first_observation=f"  {told.first_observation}\n")
    store.add(shouted)
    assert checked(store) == (), "nobody knows those words"
    for where in ({"recognise": [told]}, {}):
        if not where: store.add(told)
        with pytest.raises(LeakError) as caught: checked(store, **where)
        assert [leak.what for leak in caught.value.leaks] == [shouted.id]


def test_episodes_of_weights_are_recognised(clean):
    task = folds_of("scienceworld")["dev"][0]
    told = made(task)
    adapter = Manifest("adapter", "a", (scienceworld_tasks("train", ["boil"])[0],), parents=(Manifest("pretraining", "p", (), (told.id,)),))
    assert checked(clean["scienceworld"], manifests=[adapter], adapter="lora") == ()
    with pytest.raises(LeakError, match="pretraining 'p'"): checked(clean["scienceworld"], manifests=[adapter], recognise=[told], adapter="lora")


@pytest.mark.parametrize("world, fold", FOLDS)
def test_an_insight_learnt_from_another_fold_is_found(clean, world, fold):
    store, task = clean[world], folds_of(world)[fold][0]
    store.add(made(task))
    insights = Insights(store, Scribe(), folds=("train", fold))
    ids = store.find(folds=["train"])
    good, = insights.write(WORKFLOW, [ids[:3]])
    view = register(insights, WORKFLOW)
    assert checked(store, view) == () and insight_leaks([good], [task]) == []
    assert memory_manifest(memory_for(condition("replay"), Retriever(store, WordEncoder()), view=view), panel_of(world)).parents[0].contents == tuple(sorted(ids[:3]))
    bad, = insights.write(WORKFLOW, [[*ids[4:8], made(task).id]])
    assert insight_leaks([bad], [task])
    with pytest.raises(LeakError) as caught: checked(store, view)
    assert str(task) in {leak.what for leak in caught.value.leaks} and all("of the view workflow" in leak.artefact for leak in caught.value.leaks)
    assert checked(store) == (), "a memory that shows the episodes themselves shows no insight"


def test_a_view_written_from_episodes_that_are_not_in_the_store_is_refused(clean):
    def rules(experience): return "look in boxes"
    rules.sources = lambda experience: ("0" * 32,)
    with pytest.raises(LeakError, match="nobody can say of which task"): checked(clean["scienceworld"], register_view("my rules", rules))


@pytest.mark.parametrize("task, message", [(scienceworld_tasks("test", ["boil"])[0], "neither train nor dev"), (folds_of("scienceworld")["test"][0], "a task of panel"),
                                           (replace(scienceworld_tasks("test", ["boil"])[0], fold="dev"), "the test fold, whatever its label"), (load_world("alfworld").tasks("seen")[0], "neither train nor dev")])
def test_thresholds_are_set_on_dev(clean, task, message):
    store = clean["scienceworld"]
    assert checked(store, manifests=[Manifest("threshold", "t", (scienceworld_tasks("dev", ["boil"])[0], scienceworld_tasks("train", ["boil"])[0]))]) == ()
    with pytest.raises(LeakError, match=message): checked(store, manifests=[Manifest("threshold", "t", (task,))])


def test_a_dev_panel_is_a_panel(clean):
    store, dev = clean["scienceworld"], scienceworld_tasks("dev", ["grow-plant"])
    where, chosen = Panel("dev", dev[:3], {"grow-plant": 9}, {"simplification": "easy"}), condition("replay")
    memory = memory_for(chosen, Retriever(store, WordEncoder()))
    check_leaks(chosen, where, ReplayPolicy(), memory, [Manifest("threshold", "t", dev[5:])])
    with pytest.raises(LeakError, match="tuned on a task of panel"): check_leaks(chosen, where, ReplayPolicy(), memory, [Manifest("threshold", "t", dev[1:])])
    store.add(made(replace(dev[0], fold="train"), 3))
    with pytest.raises(LeakError, match="a task of panel 'dev'"): check_leaks(chosen, where, ReplayPolicy(), memory)


def test_clean_experience_raises_no_alarm(tmp_path):
    "The book's own expert episodes, beside dev and test episodes that are honestly labelled."
    with Store(tmp_path / "all.db") as store:
        store.add_many(sample())
        store.add_many(made(t) for fold in ("dev", "test") for kind in HARD_TYPES for t in scienceworld_tasks(fold, [kind])[:3])
        for name in ("replay", "random experience"):
            chosen = condition(name, adapter="none")
            assert check_leaks(chosen, load_panel("scienceworld", "demo"), ReplayPolicy(), memory_for(chosen, Retriever(store, WordEncoder())), recognise=[made(t) for t in load_panel("scienceworld", "demo")]) in ((), ("replay",))


# ---- the dialect of a world ----

class Speaks:
    name, batch_size = "speaks", 1
    def __init__(self, format): self.format = format


def test_a_prompt_in_the_other_dialect_is_refused(clean):
    moved = panel_of("alfworld")
    old = replace(moved, settings={"grammar": "put"})
    templates = {spoken: load_world("alfworld").action_templates({"grammar": spoken}) for spoken in ("move", "put")}
    for where in (moved, old):  # left to itself, a prompt lists the templates of the panel
        for format in (PromptFormat(), PromptFormat(templates=()), None): _check_dialect(where, Speaks(format), NoMemory())
    _check_dialect(old, Speaks(PromptFormat(templates=templates["put"])), NoMemory())
    with pytest.raises(ValueError, match="the prompt lists 'move OBJ to OBJ', and panel 'p' speaks 'put'"):
        _check_dialect(old, Speaks(PromptFormat(templates=templates["move"])), NoMemory())
    with pytest.raises(ValueError, match="lists 'put OBJ in/on OBJ'"): _check_dialect(moved, Speaks(PromptFormat(templates=templates["put"])), NoMemory())
    _check_dialect(panel_of("scienceworld"), Speaks(PromptFormat(templates=("put OBJ in/on OBJ",))), NoMemory())


def test_experience_of_no_known_dialect_is_refused_before_anything_runs(clean, tmp_path):
    store = clean["alfworld"]
    memory = memory_for(condition("replay"), Retriever(store, WordEncoder()))
    _check_dialect(panel_of("alfworld"), ReplayPolicy(), memory)
    store.add(replace(made(folds_of("alfworld")["train"][30]), settings={}))
    with pytest.raises(TrajectoryError, match="no step that shows its dialect: state it"): evaluate(condition("replay"), panel_of("alfworld"), tmp_path / "runs", ReplayPolicy(), memory)
    assert not (tmp_path / "runs").exists()


# ---- another world ----

def test_any_world_with_a_record_is_evaluated_by_difficulty(tmp_path):
    from exprag.worlds.shop import EASY_TYPES, ShopEnv, shop_expert, shop_tasks
    kinds = ("count-orders", "best-seller")
    where = Panel("shop", tuple(t for kind in kinds for t in shop_tasks("test", [kind])[:2]), {k: 8 for k in kinds}, {})
    with Store(tmp_path / "shop.db") as store:
        store.add_many(shop_expert(ShopEnv(), t) for t in shop_tasks("train"))
        memory = memory_for(condition("replay"), Retriever(store, WordEncoder()))
        run = evaluate(condition("replay"), where, tmp_path / "runs", ReplayPolicy(), memory, options=QUIET)
        shown = [(store.get(id).task.type, t.task.type) for t in read_episodes(run.folder / "episodes.jsonl") for id in t.provenance["retrieved"]]
        assert shown and all((kind in EASY_TYPES) == (own in EASY_TYPES) for kind, own in shown), "matched: each difficulty its own"
        assert load_results(tmp_path / "runs").difficulties == ("easy", "hard") and not run.missing
        store.add(shop_expert(ShopEnv(), replace(where.tasks[0], fold="train")))
        with pytest.raises(LeakError): evaluate(condition("replay"), where, tmp_path / "leak", ReplayPolicy(), memory)


def test_limits_left_out_are_the_worlds_and_the_policys():
    from exprag.worlds.shop import ShopEnv, shop_tasks
    class Same:
        "Says the same for ever."
        name, batch_size, asked = "same", 2, []
        def reset(self): self.asked.clear()
        def describe(self): return {"name": self.name}
        def act(self, trajectories, experiences=None, keys=None):
            self.asked.append(len(trajectories))
            return [Action("say nothing")] * len(trajectories)
    tasks, cap = shop_tasks("test", ["count-orders"])[:3], load_world("shop").step_cap("count-orders")
    def ends(**limits): return {(len(t), t.provenance["stop"]) for t in rollout(Same(), ShopEnv, tasks, limits=Limits(**limits))}
    assert ends() == {(cap, "cap")} and max(Same.asked) == 2
    assert ends(caps={"count-orders": 2, "best-seller": 1}, batch_size=3) == {(2, "cap")} and max(Same.asked) == 3
    assert ends(caps={"best-seller": 1}) == {(cap, "cap")} and ends(patience=3) == {(3, "patience")}
