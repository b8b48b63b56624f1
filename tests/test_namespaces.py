"""A memory within a namespace answers as if the store held nothing else: every read of the memory part, both ways."""
import asyncio
import json
import warnings
from dataclasses import replace

import pytest
from encoders import Letters
from hypothesis import given, settings
from hypothesis import strategies as st
from test_clients import client_of, server  # noqa: F401

from exprag.memory.approximate import ApproximateRetriever
from exprag.memory.chat_memory import ChatMemory, ChatMemoryOptions
from exprag.memory.clients import wrap
from exprag.memory.curation import Trust, coverage, curate, nearest_scores, plan, rows_of, staleness
from exprag.memory.hooks import answer_event
from exprag.memory.hybrid import FusedRetriever, WordRetriever
from exprag.memory.in_episode import PlaceRetriever
from exprag.memory.insights import SUMMARY, InsightError, Insights, register
from exprag.memory.mcp import Done, MemoryTools, memory_server
from exprag.memory.trial import MemorySettings, TrialMemory
from exprag.memory.utility import credit, usage
from exprag.query import Retriever
from exprag.select import top_k
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory

SECRET = "zanzibar"  # in every text of blue, in its author's name and in nothing else
OPTIONS = ChatMemoryOptions(trust=Trust(unknown="unverified"), stages=(top_k(3),))


def user(text): return {"role": "user", "content": text}
def agent(text): return {"role": "assistant", "content": text}
def episode(goal, action, success=True): return [user(goal), agent(action), user("done")], success


class Scribe:
    "Writes of an episode what it read."
    name = "scribe"
    def describe(self): return {}
    def act(self, trajectories, experiences=None, keys=None):
        from exprag.agent import Action
        return [Action(text=t.first_observation[:400] if not len(t) else "END") for t in trajectories]


def retrievers(store):
    words, meaning = WordRetriever(store), Retriever(store, Letters())
    return {"words": words, "meaning": meaning, "fused": FusedRetriever([words, meaning]),
            "approximate": ApproximateRetriever(store, Letters()), "places": PlaceRetriever(store, Letters())}


RED = [episode("Turn on the lamp in the hall.", "press switch"), episode("Turn on the fan.", "pull cord"),
       episode("Water the plants.", "pour water", False), episode("Turn off the radio.", "turn knob")]
BLUE = [episode(f"Turn on the {SECRET} lamp.", f"press {SECRET}"), episode(f"Turn the {SECRET}, turn it.", "x"),
        *(episode(f"Turn on the lamp {SECRET} {n} times in the hall.", f"fan {SECRET}") for n in range(9))]


def fill(path, blue):
    "A store with red's episodes; and with blue's, of which one is red's with another verdict, and one is damaged."
    store = Store(path)
    memory = ChatMemory(store, WordRetriever(store), "ann", OPTIONS)
    if blue:
        theirs = ChatMemory(store, WordRetriever(store), f"{SECRET} ltd", OPTIONS).within("blue")
        for messages, success in [(RED[0][0], False), *BLUE]: theirs.record(messages, success, failures=True)
        asked = theirs.augment([user(f"Turn on the {SECRET} fan.")], conversation="c")
        theirs.settle(asked.receipt, True)
        theirs.augment([user("Turn on the fan.")], conversation="mine")
    for messages, success in RED: memory.within("red").record(messages, success, failures=True)
    if blue:
        made = Trajectory(Task("moon", SECRET, "1", "train"), f"Turn on the {SECRET} moon.", SECRET,
                          [Step("x", SECRET)], 1.0, True, provenance={"author": SECRET})
        store.add_many([made], namespace="blue")
        with store.writing() as connection:  # its record cannot be read
            connection.execute("UPDATE trajectories SET record = ? WHERE id = ?", [SECRET, made.id])
    return store


def said(call, *arguments, **more):
    "What a call gives, and what it warns of or raises."
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try: made = call(*arguments, **more)
        except Exception as error: made = f"{type(error).__name__}: {error}"
    return [made, *(str(w.message) for w in warned)]


def reads(store, kind, theirs):
    "Everything that red can ask, as text; `theirs`: ids of episodes that are not red's."
    whole = ChatMemory(store, retrievers(store)[kind], "ann", OPTIONS)
    red, told = whole.within("red"), []
    def tell(*what): told.append(repr(what))
    tell(red)
    for ask in ("Turn on the lamp.", f"Turn on the {SECRET}.", "Whistle."):
        found = red.recall([user(ask)])
        tell(found.ids, found.explain(None), [(e.hit, e.note, e.trust) for e in found], found.dropped)
        asked = red.augment([user(ask)], conversation=ask)
        tell(list(asked), asked.ids, asked.block, red.receipt(ask).ids, red.receipt(asked.receipt).block)
        tell(red.memory._allowed(red.episode([user(ask)]).task).ids, red.memory.describe())
    tell(red.settle("Turn on the lamp.", True).ids, usage(store, "red").keys())
    for id in ("c", "mine", *theirs[:1]): tell(said(red.receipt, id)), tell(said(red.settle, id, True))
    tell(said(red.forget, theirs[:2])), tell(said(red.within("green").recall, [user("Turn on the lamp.")]))
    tell(credit(store, theirs, 1.0, 1.0, namespace="red"), staleness(store, 9e9, namespace="red").items())
    tell(coverage(store, namespace="red").rows, rows_of(store, "red").__len__(), plan(store, 2, namespace="red"))
    tell(nearest_scores(red.memory.retriever, [red.episode([user("Turn on the lamp.")])]), store.census("red"))
    tell(said(TrialMemory, store, MemorySettings(world="sun", namespace="red"), Letters()))
    trial = TrialMemory(store, MemorySettings(namespace="red"), Letters())
    tell(trial.describe(), [trial.goal(id) for id in theirs], *(trial.arm(a, 1).text("Turn on it.") for a in ("on", "random")))
    tools = MemoryTools(red)
    tell(tools.search_experience("Turn on the lamp, please.").experience)
    tell([said(tools.read_episode, id) for id in theirs], said(tools.report_outcome, "c", True))
    async def through():
        from mcp import Client
        async with Client(memory_server(red)) as client:
            named = [("read_episode", {"episode": id}) for id in theirs] + [
                ("report_outcome", {"receipt": "c", "success": True}), ("record_experience", {"goal": "x", "steps": []})]
            return [(await client.call_tool(*call)).content[0].text for call in named]
    tell(asyncio.run(through()))
    for event in ({"hook_event_name": "UserPromptSubmit", "session_id": "s", "prompt": "Turn on the lamp again."},
                  {"hook_event_name": "SessionStart", "session_id": "c", "source": "compact"}):
        tell(answer_event(red, event))
    insights = Insights(store, Scribe(), namespace="red")
    tell(said(insights.write, SUMMARY, [theirs[:1]]), insights.find(), insights)
    again = red.record(RED[0][0], True)
    tell(again.success, again.provenance, again.id, tools.read_episode(again.id))
    tell(curate(store, 3, namespace="red"), store.find(namespace="red"), red.forget(red.recall([user("Turn")]).ids).episodes)
    tell(store.find(namespace="red"))
    return told


@pytest.mark.parametrize("kind", ["words", "meaning", "fused", "approximate", "places"])
def test_a_namespace_is_as_if_the_store_held_nothing_else(tmp_path, kind):
    with fill(tmp_path / "0/m.db", True) as store: theirs = store.find(namespace="blue")
    told = {}
    for folder in "12":
        with fill(tmp_path / folder / "m.db", folder == "1") as store: told[folder] = reads(store, kind, theirs)
    told = {k: [t.replace(str(tmp_path / k), "") for t in v] for k, v in told.items()}
    for with_blue, alone in zip(told["1"], told["2"]): assert with_blue == alone
    asked_for = f"Turn on the {SECRET}."  # red said this itself
    assert not [t for t in told["1"] if SECRET in t.replace(asked_for, "")]
    assert "press switch" in "".join(told["1"]), "red reads what is red's"


def test_what_blue_has_is_as_it_was(tmp_path):
    with fill(tmp_path / "m.db", True) as store:
        theirs, uses = store.find(namespace="blue"), usage(store, "blue")
        reads(store, "words", theirs)
        assert store.find(namespace="blue") == theirs and usage(store, "blue") == uses


def test_a_shared_episode_leaves_one_namespace(tmp_path):
    "Episodes that two namespaces share were imported into both; what one forgets the other keeps."
    with Store(tmp_path / "m.db") as store:
        memory = ChatMemory(store, WordRetriever(store), "ann", OPTIONS)
        one = memory.episode(RED[0][0], success=True, score=1.0)
        for name in ("red", "blue"): store.add_many([one], namespace=name)
        red, blue = memory.within("red"), memory.within("blue")
        texts = [m.augment([user("Turn on the lamp.")], conversation="c").block for m in (red, blue)]
        assert texts[0] == texts[1] != ""
        assert red.forget([one.id]).episodes == 1
        assert red.receipt("c").block is None and blue.receipt("c").block == texts[1]
        assert red.augment([user("Turn on the lamp.")], conversation="c").block == "" and blue.holds(one.id)
        red.settle("c", True)
        assert usage(store) == {}, "what has left is not credited"
        assert blue.forget([one.id]).episodes == 1 and len(store) == 0
        assert not store.rows("SELECT 1 FROM unfinished")


def test_an_insight_is_shown_where_all_its_sources_are(tmp_path):
    with Store(tmp_path / "m.db") as store:
        memory = ChatMemory(store, WordRetriever(store), "ann", OPTIONS)
        red, blue = memory.within("red"), memory.within("blue")
        mine, theirs = red.record(*RED[0]).id, blue.record(*BLUE[0]).id
        everywhere = Insights(store, Scribe())
        everywhere.write(SUMMARY, [[mine, theirs]])
        shown = ChatMemory(store, WordRetriever(store), "ann", replace(OPTIONS, namespace="red", view=register(everywhere, SUMMARY)))
        found = shown.recall([user("Turn on the lamp.")])
        assert found.ids == () and found.dropped[0].stage == "own_sources" and SECRET not in repr(found.dropped[0].reason)
        inside = Insights(store, Scribe(), namespace="red")
        assert inside.find() == [] and len(everywhere.find()) == 1
        with pytest.raises(InsightError, match="is not in namespace 'red'") as refused: inside.write(SUMMARY, [[theirs]])
        assert SECRET not in str(refused.value)
        inside.write(SUMMARY, [[mine]])
        assert len(inside.find()) == 1 and "switch" in "".join(inside.find()[0].lines)


def test_a_wrapped_client_asks_its_namespace(server, tmp_path):  # noqa: F811
    with fill(tmp_path / "m.db", True) as store:
        client = wrap(client_of(server, "OpenAI"), ChatMemory(store, WordRetriever(store), "ann", OPTIONS).within("red"))
        client.chat.completions.create(model="m", messages=[user("Turn on the lamp now.")])
        assert "press switch" in json.dumps(server.asked) and SECRET not in json.dumps(server.asked)
        with pytest.raises(ValueError) as refused: client.record(True, conversation="c")
        assert SECRET not in str(refused.value)


words = st.lists(st.sampled_from("lamp fan hall press the the the zebra Ökologie x1".split()), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(words, st.sampled_from(["red", "blue"]), st.booleans()), max_size=25), words)
def test_words_are_counted_in_the_namespace_alone(tmp_path_factory, steps, query):
    "Added, removed and searched in any order, a namespace's answers are those of a store that holds it alone."
    folder = tmp_path_factory.mktemp("words")
    with Store(folder / "all.db") as store, Store(folder / "red.db") as alone:
        inside, other = WordRetriever(store).within("red"), WordRetriever(alone)
        asks = Trajectory(Task("w", "t", "q", "test"), " ".join(query), "")
        for n, (goal, name, gone) in enumerate(steps):
            made = Trajectory(Task("w", "t", str(n), "train"), " ".join(goal), "")
            store.add_many([made], namespace=name)
            if name == "red": alone.add(made)
            if gone and name == "red": store.delete(made.id), alone.delete(made.id)
            if n % 3 == 0: assert inside.search(asks, 4) == other.search(asks, 4)
        assert inside.search(asks) == other.search(asks) and inside.describe()["store"] == other.describe()["store"]
