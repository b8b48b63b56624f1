"""Conditions, controls, audit and runner, on the real ScienceWorld where a world is needed."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders import WordEncoder
from exprag.agent import Dynamic
from exprag.combined import LeakError
from exprag.environment import HARD_TYPES, OWN_WORLDS, Panel, ScienceWorldEnv, listed_tasks, panel, register_world, scienceworld_tasks, step_cap
from exprag.evaluation import (CONDITION_ORDER, CONDITIONS, MOVES, Condition, OracleRetriever, RandomRetriever, ReplayPolicy, abstract, check_leaks, check_words,
                               condition, edit_distances, evaluate, load_results, memory_for, memory_manifest, oracle_paths, procedure_accuracy, procedure_hits, results_table,
                               run_config, spans, step_by_step, teacher_forced, words_of)
from exprag.insights import WORKFLOW, Insights, insight_leaks, register
from exprag.prompt import PromptFormat
from exprag.query import Retriever
from exprag.results import read_episodes
from exprag.retelling import pointed_at, progress
from exprag.select import NoMemory, same_task
from exprag.sft import Manifest
from exprag.situations import Every, Moved
from exprag.store import VIEWS, Store
from exprag.trajectory import SCORE_RANGES, Step, Task, Trajectory, TrajectoryError, read_jsonl

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
    return Panel(name, tuple(tasks), {t.type: step_cap(t.type) for t in tasks}, {"simplification": "easy"})


QUICK = ("chemistry-mix-paint-secondary-color", "power-component", "test-conductivity")


def quick_panel(count=3):
    return small_panel([t for t in panel("demo").tasks if t.type in QUICK][:count])


# ---- conditions ----

def test_the_five_conditions_and_four_controls():
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
    (lambda: Condition("x", memory="retrieved", when="often"), "no rule is called 'often'"),
    (lambda: Condition("x", when="every 5"), "nobody to ask"),
    (lambda: Condition("x", memory="retrieved", situated=True), "is situated and asks its memory \\(retrieved\\) 'once'.*when='every 1'"),
    (lambda: Condition("x", when="every 1", situated=True), "asks its memory \\(none\\)"),
    (lambda: panel("hard"), "unknown panel 'hard'"),
])
def test_unknown_names_are_refused_with_the_valid_ones(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- abstraction and distance ----

def test_every_expert_action_has_a_template():
    "Digits answer the simulator's questions; all else is an action."
    odd = {a for t in sample() for a in t.actions if "OBJ" not in abstract(a, "scienceworld") and not a.isdigit()}
    assert odd <= {"look around", "inventory", "wait", "wait1", "task"}


@pytest.mark.parametrize("action, template", [
    ("open door to kitchen", "open OBJ"), ("pour jug into cup", "pour OBJ in OBJ"), ("pour jug in cup", "pour OBJ in OBJ"), ("dunk a in b", "dunk OBJ in OBJ"),
    ("connect battery anode to black wire terminal 1", "connect OBJ to OBJ"), ("move seed to pot 3", "move OBJ to OBJ"), ("look in box", "look in OBJ"),
    ("look at box", "look at OBJ"), ("look around", "look around"), ("use thermometer in inventory on pot", "use OBJ on OBJ"), ("wait1", "wait1"), ("dance", "dance"), ("", ""),
])
def test_abstraction(action, template):
    assert abstract(action, "scienceworld") == template


def by_the_book(a, b):
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1] / max(1, len(a), len(b))


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.lists(st.sampled_from("abcd"), max_size=7), max_size=5))
@settings(deadline=None, max_examples=150)
def test_edit_distances_are_levenshteins(path, others):
    assert edit_distances(path, others) == pytest.approx([by_the_book(path, o) for o in others])


# ---- the control retrievers ----

def test_random_experience_is_seeded_and_obeys(retriever):
    store, task = retriever.store, panel("demo").tasks[0]
    here, there = Trajectory(task, "g", "o"), Trajectory(panel("demo").tasks[1], "g", "o")
    one, again = RandomRetriever(store, 1), RandomRetriever(store, 1)
    ids = [h.id for h in one.search(here, 10)]
    assert ids == [h.id for h in again.search(replace(here, goal="another text"), 10)] and [h.rank for h in one.search(here, 3)] == [1, 2, 3]
    assert ids != [h.id for h in one.search(there, 10)] and ids != [h.id for h in RandomRetriever(store, 2).search(here, 10)]
    allowed = set(ids[3:6])
    assert [h.id for h in one.search(here, 10, allowed)] == ids[3:6], "the order of some does not depend on the others"
    assert one.search(here, 10, set()) == [] and one.search(here, 10, {"not there"}) == []


def test_random_experience_is_fair(retriever):
    first = [RandomRetriever(retriever.store, seed).search(Trajectory(panel("demo").tasks[0], "g", "o"), 1)[0].id for seed in range(300)]
    counts = np.array([first.count(id) for id in retriever.store.find()])
    expected = 300 / len(counts)
    assert counts.max() < expected + 6 * np.sqrt(expected) + 2


def test_the_oracle_ranks_by_procedure(retriever):
    mine = sample()[0]
    task = replace(mine.task, fold="test")
    oracle = OracleRetriever(retriever.store, {task: mine.actions})
    hits = oracle.search(Trajectory(task, "nothing in common", "o"), 5)
    assert hits[0].score == 0 and mine.id in [h.id for h in hits if h.score == 0] and [h.score for h in hits] == sorted([h.score for h in hits], reverse=True)
    assert oracle.search(Trajectory(task, "g", "o"), 5, set()) == []
    with pytest.raises(ValueError, match="oracle_paths"): oracle.search(Trajectory(panel("demo").tasks[0], "g", "o"), 5)
    assert oracle.describe() != OracleRetriever(retriever.store, {task: mine.actions[1:]}).describe()


@pytest.mark.parametrize("name", ["ExpRAG-LoRA", "random experience", "oracle experience", "replay", "situated replay"])
def test_every_memory_obeys_the_same_rules(retriever, name):
    "Same task excluded, successes only, matched side, at most k."
    mine = next(t for t in sample() if t.task.type in HARD_TYPES)
    memory = memory_for(condition(name), retriever, {mine.task: mine.actions})
    found = memory.recall(replace(mine, steps=(), score=None, success=None)).experiences
    assert len(found) == condition(name).k and not any(same_task(mine, e) for e in found)
    assert all(e.success and e.task.type in HARD_TYPES and e.task.fold == "train" for e in found)


def test_memories_that_cannot_be_made_are_refused(retriever):
    assert isinstance(memory_for(condition("LoRA")), NoMemory)
    with pytest.raises(ValueError, match="give a retriever"): memory_for(condition("ExpRAG-LoRA"))
    with pytest.raises(ValueError, match="oracle_paths"): memory_for(condition("oracle experience"), retriever)
    fingerprints = {memory_for(c, retriever, {panel("demo").tasks[0]: ()}).fingerprint for c in
                    (condition("ExpRAG-LoRA"), condition("random experience"), condition("random experience", seed=1), condition("oracle experience"), condition("replay"))}
    assert len(fingerprints) == 5


# ---- replay ----

def test_replay_puts_in_the_nouns_and_then_gives_up():
    old = Trajectory(Task("scienceworld", "find-plant", "1", "train"), "Your task is to find the red apple in the kitchen.", "o",
                     (Step("go to kitchen", "x"), Step("focus on red apple", "y")), score=100, success=True)
    new = Trajectory(Task("scienceworld", "find-plant", "2", "test"), "Your task is to find the red lemon in the bathroom.", "o")
    policy = ReplayPolicy()
    actions = []
    while (action := policy.act([new], [(old,)])[0]).text:
        actions.append(action.text)
        new = new.with_step(Step(action.text, "z"))
    assert actions == ["go to bathroom", "focus on red lemon"] and action.stop == "done"
    assert ReplayPolicy(substitute=False).act([replace(new, steps=())], [(old,)])[0].text == "go to kitchen"
    assert [a.text for a in policy.act([new, new], [(), (old,)])] == ["", ""]


def test_replay_says_the_line_that_a_situated_memory_points_at():
    lines = ("go to kitchen", "open oven", "wait")
    old = Trajectory(Task("scienceworld", "melt", "1", "train"), "Melt it.", "o", tuple(Step(a, "x") for a in lines), score=100, success=True)
    new = Trajectory(Task("scienceworld", "melt", "2", "test"), "Melt it.", "o", (Step("go to kitchen", "x"), Step("eat", "No known action matches that input.")))
    assert ReplayPolicy().act([new], [(old,)])[0].text == "wait" and ReplayPolicy().act([new], [(pointed_at(old, new, progress(lines, new.actions, (True, False))),)])[0].text == "open oven"


def test_a_situated_replay_goes_along_with_the_world(retriever, tmp_path):
    "Real ScienceWorld: what is refused is given up, and what is shown follows what is seen."
    where = quick_panel()
    runs = {name: evaluate(condition(name), where, tmp_path, ReplayPolicy(), memory_for(condition(name), retriever, adapted=True), progress=False) for name in ("replay", "situated replay")}
    assert runs["situated replay"].config["condition"]["situated"] and "situated" not in runs["replay"].config["condition"]
    asks = [t.provenance["asks"] for t in read_episodes(runs["situated replay"].folder / "episodes.jsonl")]
    assert all(a["asked"] > 1 for a in asks) and any(len({id for _, ids in a["shown"] for id in ids}) > 1 for a in asks)
    assert sum(e.score for e in runs["situated replay"].episodes) > sum(e.score for e in runs["replay"].episodes)


# ---- the audit ----

def test_a_leak_stops_a_run_before_it_begins(retriever, tmp_path):
    from exprag.combined import LeakError
    from exprag.sft import Manifest
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
    with pytest.raises(LeakError): evaluate(condition("replay"), where, tmp_path / "runs", ReplayPolicy(), memory, progress=False)
    assert not (tmp_path / "runs").exists(), "nothing was run, and nothing written"


@pytest.mark.parametrize("name, policy, message", [("LoRA", ReplayPolicy(), "acts by model"), ("replay", object(), "acts by replay"), ("replay", ReplayPolicy(), "remembers 'retrieved'")])
def test_a_policy_or_memory_of_another_condition_is_refused(tmp_path, name, policy, message):
    with pytest.raises(ValueError, match=message): evaluate(condition(name), quick_panel(), tmp_path, policy)


def test_what_decides_the_episodes_names_the_directory(retriever):
    from exprag.results import fingerprint
    c, where, policy = condition("replay"), quick_panel(), ReplayPolicy()
    memory = memory_for(c, retriever)
    base = run_config(c, where, policy, memory, 1)
    others = [run_config(replace(c, seed=1), where, policy, memory, 1), run_config(c, quick_panel(2), policy, memory, 1),
              run_config(c, where, ReplayPolicy(substitute=False), memory, 1), run_config(c, where, policy, memory, 2),
              run_config(c, replace(where, caps={t.type: 7 for t in where}), policy, memory, 1), run_config(c, where, policy, memory_for(replace(c, k=3), retriever), 1)]
    assert len({fingerprint(x) for x in (base, *others)}) == 7 and fingerprint(base) == fingerprint(run_config(c, where, policy, memory, 1))


# ---- the runner, on the real world ----

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_evaluation import *
with Store({bank!r}) as store:
    store.add_many(sample())
    memory = memory_for(condition("replay"), Retriever(store, WordEncoder()))
    run = evaluate(condition("replay"), quick_panel(), {out!r}, ReplayPolicy(), memory, progress=False)
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
    table = results_table(load_results(out), draws=200)
    assert table.rows[0][0] == "replay" and table.rows[0][6] == "0"


def test_conditions_with_a_model_on_the_real_world(retriever, tmp_path):
    "A random-weight model, two conditions, two tasks, four steps each: the whole way from weights to table."
    from chat_models import make_model, make_tokenizer
    from exprag.agent import HFPolicy
    tokenizer = make_tokenizer("qwen")
    policy = HFPolicy(make_model("qwen", len(tokenizer), max_position_embeddings=8192), tokenizer, batch_size=2, max_new_tokens=4, name="random weights")
    where = replace(quick_panel(2), caps={t.type: 4 for t in quick_panel(2)})
    for name in ("ExpRAG (frozen)", "zero-shot"):
        run = evaluate(condition(name), where, tmp_path, policy, memory_for(condition(name), retriever), progress=False)
        assert run.config["runtime"]["threads"] >= 1 and run.config["policy"]["weights"] and run.config["unknown"] == ["random weights"]
        assert [e.task for e in run.episodes] == list(where.tasks) and all(e.tokens_generated and e.tokens_computed <= e.tokens_prompt + e.tokens_generated for e in run.episodes)
    frozen, zero = (load_results(tmp_path).of(n)[0].episodes for n in ("ExpRAG (frozen)", "zero-shot"))
    assert all(a.tokens_prompt / a.steps > b.tokens_prompt / b.steps for a, b in zip(frozen, zero)), "experience stands in the prompt"
    table = results_table(load_results(tmp_path), draws=200)
    assert [r[0] for r in table.rows] == ["zero-shot", "ExpRAG (frozen)"] and "Nobody can say what went into: random weights" in table.caption


def test_oracle_paths_are_the_experts():
    task = next(t for t in panel("demo").tasks if t.type == "identify-life-stages-2")
    with ScienceWorldEnv() as env:
        assert len(oracle_paths(env, [task])[task]) > 3


# ---- asked again ----

def test_a_condition_says_when_its_memory_is_asked(retriever):
    c, where = condition("replay"), quick_panel()
    static, five = memory_for(c, retriever), memory_for(replace(c, when="every 5"), retriever)
    assert not isinstance(static, Dynamic) and isinstance(five, Dynamic) and five.when == Every(5) and memory_for(replace(c, when="moved"), retriever).when == Moved()
    assert memory_for(replace(c, when="drifted 0.9"), retriever).when.below == 0.9
    with pytest.raises(ValueError, match="needs a dense retriever"): memory_for(replace(c, memory="random", when="drifted 0.9"), retriever)
    config = run_config(c, where, ReplayPolicy(), static, 1)
    assert "when" not in config["condition"] and "asked" not in config["memory"], "static runs keep the directory they had"
    asked = run_config(replace(c, when="every 5"), where, ReplayPolicy(), five, 1)
    assert asked["condition"]["when"] == "every 5" and asked["memory"]["asked"] == {"when": "every", "steps": 5} and asked["memory"] | {"asked": 0} == config["memory"] | {"asked": 0}
    for chosen, memory in ((c, five), (replace(c, when="every 5"), static)):
        with pytest.raises(ValueError, match="use memory_for"): evaluate(chosen, where, "nowhere", ReplayPolicy(), memory)


def test_a_dynamic_run_is_resumed_and_accounts_for_its_asking(retriever, tmp_path):
    where = replace(quick_panel(2), caps={t.type: 6 for t in quick_panel(2)})
    chosen = condition("replay", name="replay, every 2", when="every 2")
    memory = memory_for(chosen, Retriever(retriever.store, retriever.encoder, query="recent"))
    run = evaluate(chosen, where, tmp_path, ReplayPolicy(), memory, progress=False)
    path = run.folder / "episodes.jsonl"
    whole = path.read_bytes()
    for t in read_episodes(path):
        asks = t.provenance["asks"]
        assert asks["asked"] == -(-len(t) // 2) and asks["rebuilt"] == len(asks["shown"]) - 1 and asks["shown"][0][0] == 0
        assert all(step % 2 == 0 for step, _ in asks["shown"]) and list(t.provenance["retrieved"]) == list(dict.fromkeys(i for _, ids in asks["shown"] for i in ids))
    path.write_bytes(whole.splitlines(keepends=True)[0] + b'{"torn')
    again = evaluate(chosen, where, tmp_path, ReplayPolicy(), memory, progress=False)
    first, second = (sorted((t.task, t.id, t.provenance["asks"]["asked"]) for t in read_episodes(p)) for p in (path, again.folder / "episodes.jsonl"))
    assert again.folder == run.folder and first == second and [e.score for e in again.episodes] == [e.score for e in run.episodes]


# ---- the audit at depth: every fold but train is a fold to be tested on ----

def made(task, salt=0, steps=3):
    return Trajectory(task, f"Do {task.type} {task.variation}.", f"A room {salt}.", tuple(Step(f"open box {j}", f"A box {task.variation} {salt} {j}.") for j in range(steps)),
                      100.0 if task.world == "scienceworld" else 1.0, True, "1", {"simplification": "easy"} if task.world == "scienceworld" else {"grammar": "move"})


def folds_of(world):
    if world == "alfworld": return {fold: [t for t in tasks if t.type == "pick_heat_then_place_in_recep"] for fold, tasks in listed_tasks("alfworld").items()}
    return {fold: list(scienceworld_tasks(fold, ["grow-plant"])) for fold in ("train", "dev", "test")}


def panel_of(world):
    kind, settings = ("grow-plant", {"simplification": "easy"}) if world == "scienceworld" else ("pick_heat_then_place_in_recep", {"grammar": "move"})
    return Panel("p", tuple(folds_of(world)["test"][:3]), {kind: 20}, settings)


class Scribe:
    "An author with one thing to say."
    name = "scribe"
    def describe(self): return {"name": self.name}
    def act(self, trajectories, experiences=None, keys=None):
        from exprag.agent import Action
        return [Action("END" if t.steps else "look in {container}", 0, 0, 0, "end") for t in trajectories]


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


def test_words_are_the_same_in_both_languages_of_alfworld():
    from exprag.alfworld_grammar import translate
    task = folds_of("alfworld")["test"][0]
    one = Trajectory(task, "put a hot mug in a desk", "You are in the middle of a room.", (
        Step("go to desk 1", "You arrive at desk 1. On the desk 1, you see nothing."), Step("move mug 1 to desk 1", "You move the mug 1 to the desk 1.")), settings={"grammar": "move"}).finish(1.0, True)
    assert words_of(translate(one, "put")) == words_of(one) != words_of(replace(one, goal="another")) and translate(one, "put").id != one.id


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
    try:
        assert checked(store, view) == () and insight_leaks([good], [task]) == []
        assert memory_manifest(memory_for(condition("replay"), Retriever(store, WordEncoder()), view=view), panel_of(world)).parents[0].contents == tuple(sorted(ids[:3]))
        bad, = insights.write(WORKFLOW, [[*ids[4:8], made(task).id]])
        assert insight_leaks([bad], [task])
        with pytest.raises(LeakError) as caught: checked(store, view)
        assert str(task) in {leak.what for leak in caught.value.leaks} and all("of the view workflow" in leak.artefact for leak in caught.value.leaks)
        assert checked(store) == (), "who shows the episodes themselves shows no insight"
    finally: VIEWS.pop(view)


def test_a_view_written_from_episodes_that_are_not_at_hand_is_refused(clean, monkeypatch):
    def rules(trajectory): return "look in boxes"
    rules.sources = lambda trajectory: ("0" * 32,)
    monkeypatch.setitem(VIEWS, "my rules", rules)
    with pytest.raises(LeakError, match="nobody can say of which task"): checked(clean["scienceworld"], "my rules")


@pytest.mark.parametrize("task, message", [(scienceworld_tasks("test", ["boil"])[0], "neither train nor dev"), (folds_of("scienceworld")["test"][0], "a task of panel"),
                                           (replace(scienceworld_tasks("test", ["boil"])[0], fold="dev"), "the test fold, whatever its label"), (listed_tasks("alfworld")["seen"][0], "neither train nor dev")])
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
            assert check_leaks(chosen, panel("demo"), ReplayPolicy(), memory_for(chosen, Retriever(store, WordEncoder())), recognise=[made(t) for t in panel("demo")]) in ((), ("replay",))


# ---- the words of a world ----

class Speaks:
    name, batch_size = "speaks", 1
    def __init__(self, format): self.format = format


def test_a_prompt_in_the_other_language_is_refused(clean):
    from exprag.environment import action_templates
    moved = panel_of("alfworld")
    old = replace(moved, settings={"grammar": "put"})
    for where in (moved, old):  # left to itself, a prompt speaks as the panel does
        for format in (PromptFormat(), PromptFormat(templates=()), None): check_words(where, Speaks(format), NoMemory())
    check_words(old, Speaks(PromptFormat(templates=action_templates("alfworld", {"grammar": "put"}))), NoMemory())
    with pytest.raises(ValueError, match="the prompt lists 'move OBJ to OBJ', and panel 'p' speaks 'put'"):
        check_words(old, Speaks(PromptFormat(templates=action_templates("alfworld"))), NoMemory())
    with pytest.raises(ValueError, match="lists 'put OBJ in/on OBJ'"): check_words(moved, Speaks(PromptFormat(templates=action_templates("alfworld", {"grammar": "put"}))), NoMemory())
    check_words(panel_of("scienceworld"), Speaks(PromptFormat(templates=("put OBJ in/on OBJ",))), NoMemory())


def test_experience_of_no_known_language_is_refused_before_anything_runs(clean, tmp_path):
    store = clean["alfworld"]
    memory = memory_for(condition("replay"), Retriever(store, WordEncoder()))
    check_words(panel_of("alfworld"), ReplayPolicy(), memory)
    store.add(replace(made(folds_of("alfworld")["train"][30]), settings={}))
    with pytest.raises(TrajectoryError, match="say which"): evaluate(condition("replay"), panel_of("alfworld"), tmp_path / "runs", ReplayPolicy(), memory)
    assert not (tmp_path / "runs").exists()


# ---- a world of one's own ----

def test_a_registered_world_is_evaluated_with_its_sides(tmp_path):
    from exprag.your_world import SHOP_TEMPLATES, ShopEnv, shop_expert, shop_tasks
    register_world("shop", easy=["count-orders", "total-spent"], hard=["last-order", "best-seller", "never-ordered"], templates=SHOP_TEMPLATES, cap=8, scores=(0, 1))
    try:
        kinds = ("count-orders", "last-order")
        where = Panel("shop", shop_tasks("test", kinds)[::4], {k: 8 for k in kinds}, {})
        with Store(tmp_path / "shop.db") as store:
            store.add_many(shop_expert(ShopEnv(), t) for t in shop_tasks("train"))
            memory = memory_for(condition("replay"), Retriever(store, WordEncoder()))
            run = evaluate(condition("replay"), where, tmp_path / "runs", ReplayPolicy(), memory, env_factory=ShopEnv, progress=False)
            shown = [store.get(id).task.type for t in read_episodes(run.folder / "episodes.jsonl") for id in t.provenance["retrieved"]]
            assert shown and all((kind in ("count-orders", "total-spent")) == (t.type == "count-orders") for kind, t in zip(shown, where)), "matched: each side its own"
            results = load_results(tmp_path / "runs")
            assert results.sides == ("easy", "hard") and not run.missing and abstract("query SELECT 1", "shop") == "query OBJ"
            store.add(shop_expert(ShopEnv(), replace(where.tasks[0], fold="train")))
            with pytest.raises(LeakError): evaluate(condition("replay"), where, tmp_path / "leak", ReplayPolicy(), memory, env_factory=ShopEnv)
    finally: OWN_WORLDS.pop("shop", None), SCORE_RANGES.pop("shop", None)


# ---- procedure accuracy ----

def test_moves_are_not_procedure():
    assert [bool(MOVES.fullmatch(a)) for a in ("go to kitchen", "open door to hallway", "close door to x", "look around", "teleport to foundry")] == [True] * 5
    assert not any(MOVES.fullmatch(a) for a in ("open cupboard", "look at box", "pick up door", "focus on red wire", "wait"))


def test_spans():
    assert spans([0, 1, 1, 0, 1]) == [(1, 3), (4, 5)] and spans([]) == [] and spans([1]) == [(0, 1)]


@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_one_pass_answers_as_generation_would(family):
    "A model that has half learnt three episodes: the one-pass answer is what generation gives, step by step."
    import torch
    from chat_models import make_model, make_tokenizer
    from exprag.agent import HFPolicy, PromptFormat
    from exprag.samples import collate, make_samples, supervised_loss
    tokenizer = make_tokenizer(family)
    model = make_model(family, len(tokenizer), max_position_embeddings=4096)
    words = ("open door to kitchen", "go to kitchen", "focus on metal pot", "look around")
    made = [Trajectory(Task("scienceworld", kind, "1", "train"), f"Your task is to {kind} water.", "a kitchen",
                       tuple(Step(words[(i + n) % 4], f"observation {n} {i}") for i in range(4))) for n, kind in enumerate(("boil", "melt", "freeze"))]
    policy = HFPolicy(model, tokenizer, PromptFormat(templates=("open OBJ",)), batch_size=1, max_new_tokens=24, close_call=0.0)
    data = collate(make_samples(made, policy.encoder))
    labels, optimizer = data.pop("labels"), torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        supervised_loss(model(**data), labels).backward()
        optimizer.step(), optimizer.zero_grad()
        one_pass = teacher_forced(policy, made, [()] * 3, batch=2)
        if sum(map(sum, one_pass)) >= 5: break
    policy = HFPolicy(model, tokenizer, policy.format, batch_size=1, max_new_tokens=24, close_call=0.0)
    assert 5 <= sum(map(sum, one_pass)) < 12, "half learnt"
    assert one_pass == step_by_step(policy, made, [()] * 3) == teacher_forced(policy, made, [()] * 3, batch=1)


def test_procedure_accuracy_tells_right_from_wrong_experience():
    "Replay needs no weights: with the task's own episode it is always right, with another's hardly ever, with none never."
    picked = [next(t for t in sample() if t.task.type == kind) for kind in sorted({t.task.type for t in sample()})[:4]]
    own = {t.task: t for t in picked}
    accuracy = procedure_accuracy(ReplayPolicy(), picked, lambda t: (own[t.task],))
    assert accuracy.right == 1 and accuracy.none == 0 and accuracy.shuffled < 0.5
    hits = procedure_hits(ReplayPolicy(), picked, [(own[t.task],) for t in picked])
    assert all(right == asked > 0 for right, asked in hits) and len(hits) == 4 and sum(asked for _, asked in hits) == accuracy.actions
    assert accuracy.actions == sum(not MOVES.fullmatch(a) for t in picked for a in t.actions)
    with pytest.raises(ValueError, match="two task types"): procedure_accuracy(ReplayPolicy(), picked[:1], lambda t: ())
