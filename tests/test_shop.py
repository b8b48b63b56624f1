"The shop: a world of one's own, its tool, and its way through the library."
import json
import sqlite3
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.agent import Action, rollout
from exprag.evaluation import Condition, EvaluationOptions, evaluate
from exprag.prompt import PromptFormat
from exprag.select import NoMemory
from exprag.store import Store
from exprag.trajectory import Task, read_jsonl, write_jsonl
from exprag.views import from_messages, to_messages
from exprag.world import (
    Environment, difficulty, load_panel, load_world, normalised_score, play, true_fold)
from exprag.worlds.collecting import CollectOptions, collect
from exprag.worlds.shop import (
    HARD_TYPES, QUESTIONS, SHOP_FOLDS, SHOP_TEMPLATES, TOOLS, WORLD, ShopEnv, action_of, guarded,
    open_shop, shop_expert, shop_tasks, tool_call, use_tool, with_tool_calls)

FIRST = Task("shop", "count-orders", 0, "train")


@pytest.fixture
def shop():
    database = open_shop(FIRST)[0]
    yield database
    database.close()


# ---- the tool ----

@pytest.mark.parametrize("sql", [
    "DELETE FROM {p}", "UPDATE {p} SET name = 'x'", "INSERT INTO {p} VALUES (9, 'x')", "DROP TABLE {p}", "CREATE TABLE x(y)", "ATTACH 'x.db' AS x", "VACUUM INTO 'x.db'",
    "PRAGMA user_version = 3", "SELECT 1; DROP TABLE {p}", "SELECT load_extension('x')", "SELECT hex(zeroblob(1000000000))", "", ";", "\0", "\ud800", "SELECT", "BEGIN",
    "SELECT writefile('x', 'y')", "SELECT * FROM nowhere"])
def test_nothing_that_is_typed_does_harm(shop, sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    people = open_shop(FIRST)[2][0]
    before = use_tool(shop, "query", f"SELECT * FROM {people}")
    assert use_tool(shop, "query", sql.format(p=people)).startswith(("Error: ", "Nothing."))
    assert use_tool(shop, "query", f"SELECT * FROM {people}") == before and not list(tmp_path.iterdir())


def test_a_query_without_end_ends(shop):
    start = time.process_time()
    assert use_tool(shop, "query", "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n").startswith("Error: interrupted")
    assert time.process_time() - start < 5 and use_tool(shop, "query", "SELECT 1") == "1", "and the next one runs"


def test_each_query_of_a_guarded_database_has_patience_of_its_own():
    database = guarded(sqlite3.connect(":memory:"))
    count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {}) SELECT count(*) FROM n"
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="interrupted"): database.execute(count.format(5_000_000)).fetchall()
    for _ in range(20): assert database.execute(count.format(50_000)).fetchall() == [(50_000,)]
    database.close()


def test_long_answers_are_cut(shop):
    text = use_tool(shop, "query", "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000) SELECT i FROM n")
    assert text.split("\n") == [str(i) for i in range(1, 21)]


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=80)
def test_any_text_is_answered(text):
    env = ShopEnv()
    env.reset(FIRST)
    observation, reward, ended, cut, info = env.step(text)
    assert isinstance(observation, str) and reward in (0, 1) and set(info) == {"goal", "score", "steps", "success", "task"}
    env.close()


# ---- the environment ----

def test_has_the_shape_of_an_environment():
    env = ShopEnv()
    assert isinstance(env, Environment)
    with pytest.raises(RuntimeError, match="call reset"): env.step("tables")
    env.reset(FIRST)
    env.close(), env.close()
    with pytest.raises(RuntimeError, match="call reset"): env.step("tables")


def test_right_wrong_and_cut_off():
    right = use_tool(open_shop(FIRST)[0], "query", open_shop(FIRST)[2][2])
    env = ShopEnv()
    env.reset(FIRST)
    assert env.step(f"answer  {right} ")[1:4] == (1, True, False)
    env.reset(FIRST)
    assert env.step("answer")[1:4] == (0, True, False) and not env.info()["success"]
    env.reset(FIRST, cap=2)
    assert env.step("tables")[2:4] == (False, False) and env.step("tables")[2:4] == (False, True)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_task_has_one_answer_and_the_expert_finds_it(kind):
    for fold in SHOP_FOLDS:
        for task in shop_tasks(fold, [kind]):
            made = shop_expert(ShopEnv(), task)
            assert made.success and made.score == 1 and len(made) == 5, task
            answer = made.actions[-1].removeprefix("answer ")
            assert answer and "\n" not in answer and answer not in ("None", "Nothing.")
            assert made.id == shop_expert(ShopEnv(), task).id, "the same task is the same shop"


def test_folds():
    folds = {fold: shop_tasks(fold) for fold in SHOP_FOLDS}
    assert all(list(tasks) == sorted(tasks) for tasks in folds.values()) and len({(t.type, t.variation) for ts in folds.values() for t in ts}) == 110
    with pytest.raises(ValueError, match="unknown fold 'testing'"): shop_tasks("testing")
    with pytest.raises(ValueError, match="did you mean 'best-seller'"): shop_tasks("test", ["best-sellers"])


# ---- tool calls ----

def test_calls_are_openais():
    assert tool_call(4, "query SELECT 'a \"b\"'") == {"id": "call_4", "type": "function", "function": {"name": "query", "arguments": json.dumps({"sql": "SELECT 'a \"b\"'"})}}
    assert tool_call(1, "tables")["function"] == {"name": "tables", "arguments": "{}"} and tool_call(1, "sing a song") is None and tool_call(1, "") is None


def test_calls_survive_chat_file_and_store(tmp_path):
    made = shop_expert(ShopEnv(), FIRST)
    messages = to_messages(made)
    assert [m["role"] for m in messages[:3]] == ["user", "assistant", "tool"] and messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "call_1"
    assert from_messages(json.loads(json.dumps(messages)), FIRST, world_version="1").id == made.id
    write_jsonl([made], tmp_path / "t.jsonl")
    assert read_jsonl(tmp_path / "t.jsonl")[0] == [made]
    with Store(tmp_path / "s.db") as store:
        store.add(made)
        assert store.get(made.id) == made and len(store.get(made.id).steps[0].tool_calls) == 1


def test_writing_calls_twice_is_writing_them_once():
    plain = play(ShopEnv(), FIRST, ["tables", "nonsense", "answer 1"])
    assert with_tool_calls(with_tool_calls(plain)) == with_tool_calls(plain) and [len(s.tool_calls) for s in with_tool_calls(plain).steps] == [1, 0, 1]


@given(st.sampled_from(sorted(TOOLS)), st.text(max_size=30))
def test_a_call_stands_for_its_action(tool, argument):
    action = f"{tool} {argument.strip()}" if TOOLS[tool] and argument.strip() else tool
    again = action_of(tool_call(1, action))
    assert again.strip() == action.strip() and tool_call(1, again) == tool_call(1, action)


@pytest.mark.parametrize("arguments, seen", [
    ("{", "Error: "), ("[]", "Error: "), ("7", "Error: "), ('{"text": "SELECT 1"}', "Error: "), ('{"sql": "SELECT 1"}', "1"), ('{"sql": 1}', "Error: "),
    *((nothing, "Error: query needs its sql: query OBJ.") for nothing in (None, "", "{}", '{"sql": ""}', '{"sql": " "}'))])
def test_a_call_that_is_none_is_answered(arguments, seen):
    env = ShopEnv()
    env.reset(FIRST)
    assert env.step(action_of({"function": {"name": "query", "arguments": arguments}}))[0].startswith(seen)
    assert env.step(action_of({"function": {"name": "sing", "arguments": '{"sql": "x"}'}}))[0].startswith("There is no tool 'sing'")


class Caller:
    "A policy whose model reads messages and answers with tool calls, here those of the expert."
    name, batch_size = "caller", 3

    def reset(self): pass
    def describe(self): return {"name": self.name}
    def act(self, trajectories, experiences=None, keys=None): return [Action(action_of(self.call(to_messages(with_tool_calls(t)), t.task)), 0, 0, 0, "end") for t in trajectories]

    def call(self, messages, task):
        answered = sum(m["role"] == "tool" for m in messages)
        assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == [f"call_{i}" for i in range(1, answered + 1)], "it sees its calls with their results"
        return shop_expert(ShopEnv(), task).steps[answered].tool_calls[0]


def test_a_policy_that_calls_tools_rolls_out():
    tasks = shop_tasks("test", ["count-orders"])[:4]
    made = sorted((with_tool_calls(t) for t in rollout(Caller(), ShopEnv, tasks)), key=lambda t: t.task)
    assert [t.id for t in made] == [shop_expert(ShopEnv(), t).id for t in tasks] and all(t.success and all(s.tool_calls for s in t.steps) for t in made)


# ---- through the library ----

def test_it_is_collected_with_its_calls_and_known_by_its_record(tmp_path):
    with Store(tmp_path / "s.db") as store:
        report = collect(shop_tasks("train", ["count-orders", "best-seller"])[::6], store, CollectOptions(workers=2, progress=False))
        assert report.kept == 4
        kept = list(store)
    assert all(action_of(s.tool_calls[0]) == s.action for t in kept for s in t.steps)
    assert {WORLD.canonical(a) for t in kept for a in t.actions} == set(SHOP_TEMPLATES) and load_world("shop") is WORLD
    assert {difficulty(t.task) for t in kept} == {"easy", "hard"} and {normalised_score(t) for t in kept} == {1} and WORLD.step_cap("best-seller") == 10
    assert "; ".join(SHOP_TEMPLATES) in PromptFormat().system("shop") and true_fold(Task("shop", "best-seller", 21, "train")) == "test"


def test_collects_like_any_world(tmp_path):
    with Store(tmp_path / "s.db") as store:
        first = collect(shop_tasks("dev")[:3], store, CollectOptions(progress=False))
        again = collect(shop_tasks("dev")[:5], store, CollectOptions(workers=2, progress=False))
        assert (first.kept, again.kept, again.skipped) == (3, 2, 3) and store.types("shop") == ["best-seller", "count-orders"]


def test_its_panel_is_evaluated(tmp_path):
    "A policy that knows the query of every task, on all tasks of the test fold."
    class Knows:
        name, batch_size = "knows", 4
        def reset(self): pass
        def describe(self): return {"name": self.name}
        def act(self, trajectories, experiences=None, keys=None):
            return [Action(shop_expert(ShopEnv(), t.task).actions[len(t)]) for t in trajectories]
    panel = load_panel("shop", "test")
    run = evaluate(Condition("zero-shot"), panel, tmp_path, Knows(), options=EvaluationOptions(progress=False))
    assert len(run.episodes) == len(panel) == 30 and all(e.success and e.score == 100 for e in run.episodes)
    assert sum(e.task.type in HARD_TYPES for e in run.episodes) == 12


def test_rolls_out_side_by_side():
    "Episodes share threads in a pool, and each keeps its own shop."
    class Looker:
        name, batch_size = "looker", 4
        def reset(self): pass
        def describe(self): return {}
        def act(self, trajectories, experiences=None, keys=None):
            return [Action("tables" if len(t) < 3 else "answer ?", 0, 0, 0, "end") for t in trajectories]
    tasks = shop_tasks("test")[:9]
    made = {t.task: t for t in rollout(Looker(), ShopEnv, tasks, NoMemory())}
    assert set(made) == set(tasks)
    for task, t in made.items(): assert t.steps[2].observation.split() == list(open_shop(task)[2][:2]) and not t.success


def test_a_prompt_for_it():
    text = PromptFormat(instruction="Ask the shop.", templates=SHOP_TEMPLATES).messages(shop_expert(ShopEnv(), FIRST))
    assert text[0]["content"] == "Ask the shop.\n\nActions:\ntables; schema OBJ; query OBJ; answer OBJ" and text[2]["content"] == "tables"


def test_sqlite_is_the_real_one():
    assert isinstance(open_shop(FIRST)[0], sqlite3.Connection)
