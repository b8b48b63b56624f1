"""Retrieval during an episode: keys of unfinished episodes, places, and when to ask again."""
import json
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.agent import Refresher
from exprag.memory.in_episode import (
    AgentState, Drifted, Moved, PlaceRetriever, agent_state, embed_places, places, replay, rule)
from exprag.query import INSTRUCTION, KEYS, Retriever, SentenceEncoder, history, instructed, recent, start
from exprag.select import Every, Memory, Once, Selection
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Cursor, Experience, Hit, actions, render


def episode(variation, *pairs, goal="Boil the water.", fold="train"):
    steps = tuple(Step(a, o) for a, o in pairs)
    return Trajectory(Task("scienceworld", "boil", str(variation), fold), goal, "This room is called the hall. In it.", steps, score=100.0, success=True)


def until(t, n):
    return replace(t, steps=t.steps[:n], score=None, success=None)


KITCHEN = ("go to kitchen", "You move to the kitchen.")
POT = ("pick up pot", "You move the pot to the inventory.")
STOVE = ("move pot to stove", "You move the pot to the stove.")
FORGE = ("go to foundry", "You move to the foundry.")
BLAST = ("activate blast furnace", "The blast furnace is now activated.")
A, B = episode(1, KITCHEN, POT, STOVE, ("activate stove", "The stove is now activated.")), episode(2, FORGE, POT, BLAST, ("wait", "You wait."), goal="Melt the lead.")
C = episode(3, KITCHEN, ("open fridge", "The fridge is now open."), POT, goal="Freeze the milk.")


class Words:
    """A real, cheap encoder: hashed counts of words, at length one."""

    dim, max_tokens = 64, 10**6

    def __init__(self, name="words@1"):
        self.name, self.texts, self.calls = name, [], 0

    def encode(self, texts, role="document"):
        self.texts, self.calls = self.texts + list(texts), self.calls + 1
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split() + [""]:
                out[row, int(sha256(word.encode()).hexdigest(), 16) % self.dim] += 1
        return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many([A, B, C])
        yield store


# Keys


def test_keys_say_what_they_promise():
    t = until(A, 3)
    assert {"goal", "start", "recent", "so_far", "history"} <= set(KEYS) and KEYS["so_far"](t) == actions(Experience(t))
    assert start(t) == "Boil the water.\nThis room is called the hall. In it." and history(t) == "go to kitchen\npick up pot\nmove pot to stove"
    assert recent(A) == "Boil the water.\n> pick up pot | You move the pot to the inventory.\n> move pot to stove | You move the pot to the stove.\n> activate stove | The stove is now activated."
    assert recent(until(A, 0)) == "Boil the water.\nStart | This room is called the hall." and history(until(A, 0)) == ""


@given(st.integers(0, 4))
def test_keys_do_not_look_ahead_nor_at_the_outcome(n):
    other = replace(A, steps=A.steps[:n] + (Step("dance", "You dance."),), score=-100.0, success=False)
    for name in ("start", "recent", "so_far", "history"):
        assert KEYS[name](until(A, n)) == KEYS[name](until(other, n)) == KEYS[name](replace(until(A, n), success=True))


# Places


@given(st.integers(0, 40))
def test_places_cover_the_episode(length):
    t = episode(1, *[(f"a{i}", f"o{i}") for i in range(length)])
    steps, windows = places(t, "step"), places(t, "window")
    assert [at for at, _ in steps] == list(range(length)) and all(len(p) == at and p.score is None for at, p in steps)
    assert {i for at, p in windows for i in range(at, at + len(p))} == set(range(length)) and all(0 < len(p) <= 6 for _, p in windows)
    assert all(p.first_observation == t.observations[at] and p.actions == t.actions[at:at + len(p)] for at, p in windows)


def test_an_unknown_granularity_is_an_error(store):
    with pytest.raises(ValueError, match="unknown granularity .* step, window"):
        PlaceRetriever(store, Words(), granularity="word")


def naive(store, encoder, query, n, allow, granularity, key="recent"):
    best = {}
    vector = encoder.encode([KEYS[key](query)])[0].astype(float)
    for t in store:
        if allow is None or t.id in allow:
            for at, part in places(t, granularity):
                score = round(float(encoder.encode([KEYS[key](part)])[0].astype(float) @ vector), 6)
                if t.id not in best or (-score, at) < best[t.id]: best[t.id] = (-score, at)
    return [(id, -score, at) for id, (score, at) in sorted(best.items(), key=lambda item: (item[1][0], item[0]))][:n]


moves = st.sampled_from([KITCHEN, POT, STOVE, FORGE, BLAST, ("wait", "You wait.")])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(moves, max_size=9), max_size=6), st.lists(moves, max_size=5), st.integers(1, 8), st.sampled_from(["step", "window"]), st.booleans())
def test_search_is_the_naive_one(tmp_path_factory, bank, done, n, granularity, filtered):
    with Store(tmp_path_factory.mktemp("s") / "b.db") as store:
        store.add_many(episode(i, *steps) for i, steps in enumerate(bank))
        allow = set(store.find()[::2]) if filtered else None
        hits = PlaceRetriever(store, Words(), granularity=granularity).search(until(episode(99, *done), len(done)), n, allow)
        assert [(h.id, h.score, h.step) for h in hits] == naive(store, Words(), episode(99, *done), n, allow, granularity)
        assert [h.rank for h in hits] == list(range(1, len(hits) + 1))


def test_the_place_that_matches_is_found_and_shown(store):
    finder = PlaceRetriever(store, SentenceEncoder())
    now = until(episode(9, FORGE, POT, BLAST, goal="Melt the tin."), 3)
    hit = finder.search(now, 1)[0]
    assert (hit.id, hit.step) == (B.id, 3)
    found = finder.fetch(hit)
    assert found.id == B.id and found.hit == hit and found.cursor == Cursor(done=3)
    assert "> wait | You wait." in render(found, "exprag.memory.excerpts:window")
    assert finder.describe()["granularity"] == "step" and json.dumps(finder.describe())
    with pytest.raises(ValueError, match="at least one"):
        finder.search(now, 0)


def test_places_are_encoded_once_deleted_with_the_episode_and_follow_the_store(store):
    encoder = Words()
    finder = PlaceRetriever(store, encoder)
    first = finder.search(until(A, 2), 3)
    count = len(encoder.texts)
    assert PlaceRetriever(store, encoder).search(until(A, 2), 3) == first and len(encoder.texts) == count + 1, "the query alone"
    with Store(store.path) as other:
        other.delete(first[0].id)
        with other.reading() as c: assert c.execute("SELECT count(*) FROM place_vectors").fetchone()[0] == 2
    assert first[0].id not in {h.id for h in finder.search(until(A, 2), 3)}
    store.add(episode(5, KITCHEN, POT))
    assert len(finder.search(until(A, 2), 9)) == 3 and embed_places(store, encoder, "recent", "step", store.find()) == 0
    assert embed_places(store, encoder, "recent", "window", store.find()) == 3 and embed_places(store, Words("words@2"), "recent", "step", store.find()) == 3


def test_a_chosen_set_of_ids_and_an_empty_store(store, tmp_path):
    finder = PlaceRetriever(store, Words()).index([A.id])
    assert [h.id for h in finder.search(until(B, 1), 5)] == [A.id] and finder.search(until(B, 1), 5, allow=[B.id]) == []
    with Store(tmp_path / "empty.db") as empty:
        assert PlaceRetriever(empty, Words()).search(until(A, 1)) == []


# Many at once


def test_prepare_encodes_each_text_once_in_one_call(store):
    encoder = Words()
    retriever = Retriever(store, encoder, query="recent", key="recent")
    retriever.index()
    calls, agents = encoder.calls, [until(A, n) for n in range(4)] + [until(A, 2)]
    assert retriever.prepare(agents) == 4 and retriever.prepare(agents) == 0 and encoder.calls == calls + 1
    hits = [retriever.search(t, 2) for t in agents]
    assert encoder.calls == calls + 1 and hits[2] == hits[4] == Retriever(store, Words(), "recent", "recent").search(agents[2], 2)
    assert retriever.fetch(hits[0][0]) == Experience(store.get(hits[0][0].id), hits[0][0])


def test_the_memory_of_queries_is_bounded(store, monkeypatch):
    monkeypatch.setattr("exprag.query._QUERIES_KEPT", 3)
    retriever = Retriever(store, Words(), query="history")
    for n in range(5):
        retriever.search(until(A, n % 4), 1)
        assert len(retriever._queries) <= 3
    assert retriever.prepare([until(A, n) for n in range(4)]) == 4 and len(retriever.search(until(A, 3), 2)) == 2


# Instructions


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat template"])
def test_an_instruction_goes_with_the_query_and_not_with_the_document(tmp_path, chat):
    """A tiny random Qwen3, pooled at its last token, as Qwen3-Embedding is; a chat template takes room too."""
    import torch
    from chat_models import make_tokenizer
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = make_tokenizer("qwen")
    if not chat: tokenizer.chat_template = None
    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                           head_dim=16, max_position_embeddings=512)).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    words = Transformer(str(tmp_path / "qwen"), max_seq_length=256)
    SentenceTransformer(modules=[words, Pooling(32, pooling_mode="lasttoken"), Normalize()], prompts={"query": "Instruct: web search\nQuery:", "document": ""}).save(str(tmp_path / "encoder"))
    plain, ours = SentenceEncoder(tmp_path / "encoder"), SentenceEncoder(tmp_path / "encoder", prompts=instructed())
    assert plain.prompts["query"] == "Instruct: web search\nQuery:" and ours.prompts == {"query": f"Instruct: {INSTRUCTION}\nQuery:", "document": ""}
    assert plain.name != ours.name and ours.room["query"] < plain.room["query"] and (chat or plain.room["query"] < ours.room["document"])
    text = ["boil the water"]
    assert (plain.encode(text) == ours.encode(text)).all() and (plain.encode(text, "query") != ours.encode(text, "query")).any()
    if not chat: assert np.allclose(ours.encode(text, "query")[0], ours.encode([ours.prompts["query"] + text[0]])[0], atol=1e-5)
    for part, _ in ours.split("boil the water on the stove " * 90, "query"):
        cut = ours.model.preprocess([part], prompt=ours.prompts["query"])["input_ids"].shape[-1]
        assert cut <= 256 and cut == ours.model.preprocess([part], prompt=ours.prompts["query"], max_length=999)["input_ids"].shape[-1], "nothing is cut"


# When


def test_agent_state_reads_place_and_what_is_held():
    assert [agent_state(until(A, n)) for n in range(4)] == [AgentState("hall", frozenset()), AgentState("kitchen", frozenset()),
                                                        AgentState("kitchen", frozenset({"pot"})), AgentState("kitchen", frozenset())]
    house = Trajectory(Task("alfworld", "pick", "g", "train"), "put a mug in the cabinet", "You are in the middle of a room. Looking quickly around you, you see a desk 1.", (
        Step("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 2."), Step("take mug 2 from desk 1", "You pick up the mug 2 from the desk 1."),
        Step("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."), Step("x", "Nothing happens."),
        Step("move mug 2 to cabinet 1", "You move the mug 2 to the cabinet 1.")))
    assert [agent_state(until(house, n)) for n in (1, 2, 4, 5)] == [("desk 1", set()), ("desk 1", {"mug 2"}), ("cabinet 1", {"mug 2"}), ("cabinet 1", set())]
    assert agent_state(replace(house, first_observation="", steps=())) == (None, set())


def test_a_world_that_does_not_say_where_an_agent_is_is_an_error(monkeypatch):
    """It would be a rule that never asks again, without a word."""
    from exprag import world as registry
    monkeypatch.setattr(registry, "_REGISTERED", {"inn": registry.World("inn")})
    at_inn = Trajectory(Task("inn", "serve", "1", "train"), "g", "You are in the bar.")
    with pytest.raises(ValueError, match=r"'inn' has no patterns for the state of an agent; give World\(state="): Moved()(at_inn, at_inn)
    registry.register_world(registry.World("inn", state={"place": "You are in the (.+?)\\."}))
    assert agent_state(at_inn) == AgentState("bar", frozenset())


def test_rules(store):
    retriever = Retriever(store, Words(), query="recent", key="recent")
    now = [until(A, n) for n in range(5)]
    assert not any(Once()(t, now[0]) for t in now)
    assert [Every(2)(now[n], now[1]) for n in range(1, 5)] == [False, False, True, True]
    assert [Moved()(now[n], now[1]) for n in (0, 1, 2, 3)] == [True, False, True, False]
    assert not Moved(holding=False)(now[2], now[1]) and Moved(holding=False)(now[1], now[0])
    assert Drifted(retriever, 1.1)(now[1], now[1]) and not Drifted(retriever, 1.0)(now[1], now[1]) and not Drifted(retriever, -1.1)(now[4], now[0])
    for each in (Once(), Every(3), Moved(), Drifted(retriever, 0.9)):
        assert json.dumps(each.describe()) and each.describe()["when"]


def test_rules_have_names(store):
    retriever = Retriever(store, Words())
    assert [rule(n) for n in ("once", "every 1", "every 12", "moved", "moved room")] == [Once(), Every(1), Every(12), Moved(), Moved(holding=False)]
    assert rule("drifted 0.85", retriever) == Drifted(retriever, 0.85) and rule("drifted 1.0", retriever).below == 1
    for name in ("every 0", "every", "every -1", "often", "drifted", "drifted 2", "Once", ""):
        with pytest.raises(ValueError, match="no rule is called .* there are once, every N"): rule(name, retriever)
    with pytest.raises(ValueError, match="needs a dense retriever"): rule("drifted 0.9")


def found(*ids, done=None):
    """A selection of episodes, told apart by the goal."""
    return Selection(tuple(Experience(replace(A, goal=id), Hit(id, 1.0, rank, done), cursor=None if done is None else Cursor(done=done))
                           for rank, id in enumerate(ids, 1)))


def test_what_counts_as_another_answer_can_be_said():
    refresher = Refresher(lambda t: found("a", done=len(t)), Every(1), key=lambda selection: selection.ids)
    first = refresher(until(A, 0))
    assert refresher(until(A, 1)) is first and (refresher.asked, refresher.rebuilt) == (2, 0)


class Scripted:
    def __init__(self, answers): self.answers, self.asked = answers, 0
    def __call__(self, t):
        self.asked += 1
        return found(*self.answers[len(t)])


@given(st.lists(st.text("ab", max_size=2), min_size=1, max_size=12), st.integers(1, 5))
def test_a_refresher_counts_what_happened(answers, every):
    t = episode(1, *[(f"a{i}", "o") for i in range(len(answers) - 1)])
    recall = Scripted(answers)
    refresher = Refresher(recall, Every(every))
    got = ["".join(refresher(until(t, n)).ids) for n in range(len(answers))]
    assert got == [answers[n - n % every] for n in range(len(answers))]
    assert refresher.asked == recall.asked == -(-len(answers) // every) and refresher.steps == len(answers)
    assert refresher.rebuilt == sum(a != b for a, b in zip(got, got[1:]))


def test_an_answer_that_is_the_same_is_not_replaced():
    refresher = Refresher(lambda t: replace(found("a"), dropped=()), Every(1))
    first = refresher(until(A, 0))
    assert refresher(until(A, 1)) is first and (refresher.asked, refresher.rebuilt) == (2, 0)
    moving = Refresher(lambda t: found("a", done=len(t)), Every(1))
    moving(until(A, 0)), moving(until(A, 1))
    assert moving.rebuilt == 1, "another step of the same episode is another text"


def test_replay_compares_with_asking_at_each_step():
    recall = Scripted(["a", "a", "b", "b"])
    assert replay([A], recall, Every(1)) == (1.0, 1 / 3, 1.0)
    assert replay([A], recall, Once()) == (0.25, 0.0, 0.5)
    assert replay([A], recall, Every(2)) == (0.5, 1 / 3, 1.0)


def test_a_selection_counts_by_its_hits(store):
    memory = Memory(Retriever(store, Words(), "recent", "recent"))
    refresher = Refresher(memory.recall, Moved())
    for n in range(len(A) + 1): selection = refresher(until(replace(A, task=replace(A.task, variation="77")), n))
    assert refresher.asked == 4 and len(selection) == 2 and refresher.names == tuple((id, None, "") for id in selection.ids)
