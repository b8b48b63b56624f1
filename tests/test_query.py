"""Queries: encoders that never cut, an index that is exact, filtered and deterministic, files that are not believed blindly."""
import json
import random
import shutil

import numpy as np
import pytest
from faults import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.query import KEYS, ExactIndex, IndexMismatch, Retriever, SentenceEncoder, TextTooLong, chunks, embed_missing, key_function
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory


def episode(i, goal, fold="train", **more):
    return Trajectory(Task("scienceworld", "boil", str(i), fold), goal, "A hall.", (Step("look", f"{i}"),), **{"score": 100.0, "success": True, **more})


GOALS = ["Boil the water.", "Boil the water.", "Boil the milk.", "Grow an apple tree.", "Focus on the turtle.", "Boil the water."]


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "bank.db") as store:
        store.add_many(episode(i, goal) for i, goal in enumerate(GOALS))
        yield store


class Counting:
    """An encoder that counts what it is asked, and whose vectors are those of another."""

    def __init__(self, inner, name="counting@1"):
        self.inner, self.name, self.dim, self.max_tokens, self.texts = inner, name, inner.dim, inner.max_tokens, []

    def encode(self, texts, role="document"):
        self.texts += [(role, t) for t in texts]
        return self.inner.encode(texts, role)


# The encoder


def test_unit_length_order_and_independence_of_company(encoder):
    texts = ["Boil water.", "x", "", "Grow a banana. " * 10, "Boil water."]
    together = encoder.encode(texts)
    assert together.dtype == np.float32 and together.shape == (5, 384) and np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([encoder.encode([t]) for t in texts])
    assert (together == alone).all() and (together[0] == together[4]).all()
    assert encoder.encode([]).shape == (0, 384)


def test_agrees_with_sentence_transformers_where_nothing_is_long(encoder):
    texts = ["Boil water.", "Determine whether the fork conducts electricity."]
    theirs = encoder.model.encode(texts, normalize_embeddings=True, batch_size=1, show_progress_bar=False)
    assert np.abs(encoder.encode(texts) - theirs).max() < 1e-6


def test_long_text_is_pooled_over_everything(encoder):
    base = "First look around and open the door. " * 80
    long = [base + "Then boil the water.", base + "Then plant the seed."]
    a, b = encoder.encode(long)
    assert a @ b < 0.9999, "the end counts"
    parts = encoder.split(long[0])
    assert "".join(t for t, _ in parts) == long[0] and len(parts) == 3
    vectors = encoder.model.encode([t for t, _ in parts], normalize_embeddings=True, show_progress_bar=False)
    mean = np.average(vectors, axis=0, weights=[n for _, n in parts])
    assert np.abs(a - mean / np.linalg.norm(mean)).max() < 1e-5


def test_long_text_is_refused_on_request(encoder):
    strict = SentenceEncoder(on_long="refuse")
    with pytest.raises(TextTooLong, match=r"reads 254 at once.*on_long='pool'"):
        strict.encode(["word " * 300])
    limit = " ".join(["word"] * 254)
    assert (strict.encode([limit]) == encoder.encode([limit])).all() and strict.name == encoder.name


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab é漢😀 \n\t.-'") | st.characters(codec="utf-8"), max_size=400), st.integers(4, 40))
def test_chunks_are_the_text_and_fit(encoder, text, limit):
    tokenizer = encoder.model.tokenizer
    parts = chunks(text, tokenizer, limit)
    assert "".join(t for t, _ in parts) == text
    for part, n in parts:
        real = len(tokenizer(part, add_special_tokens=False, truncation=False)["input_ids"])
        assert real == n and (n <= limit or len(part) == 1)


def test_prompts_change_vectors_name_and_room(encoder):
    prompted = SentenceEncoder(prompts={"query": "Instruct: find an episode. Query: "})
    assert prompted.name != encoder.name and prompted.room["query"] < prompted.room["document"] == encoder.room["document"]
    text = ["Boil water."]
    assert (prompted.encode(text) == encoder.encode(text)).all() and (prompted.encode(text, "query") != encoder.encode(text, "query")).any()
    # the prompt stands before every chunk, and no chunk is cut by it
    for part, _ in prompted.split("word " * 600, "query"):
        assert len(prompted.model.tokenizer(prompted.prompts["query"] + part)["input_ids"]) <= prompted.max_tokens
    with pytest.raises(ValueError, match="leave no room"):
        SentenceEncoder(prompts={"query": "word " * 250})


def test_prompts_of_a_model_are_found(tmp_path, encoder):
    encoder.model.save(str(tmp_path / "copy"))
    copy = SentenceEncoder(tmp_path / "copy")
    assert copy.name == encoder.name.replace("all-MiniLM-L6-v2", "copy"), "same weights, same fingerprint; no path in the name"
    file = tmp_path / "copy" / "config_sentence_transformers.json"
    config = json.loads(file.read_text())
    config["prompts"] = {"query": "search: ", "passage": "text: "}
    file.write_text(json.dumps(config))
    prompted = SentenceEncoder(tmp_path / "copy")
    assert prompted.prompts == {"query": "search: ", "document": "text: "} and prompted.name != copy.name


def test_other_weights_have_another_name(tmp_path, encoder):
    import torch

    other = SentenceEncoder()
    encoder.model.save(str(tmp_path / "all-MiniLM-L6-v2"))
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-4)
    other.model.save(str(tmp_path / "all-MiniLM-L6-v2"))
    assert SentenceEncoder(tmp_path / "all-MiniLM-L6-v2").name != encoder.name


def test_bad_arguments(encoder):
    for wrong in ({"on_long": "cut"}, {"prompts": {"passage": "x"}}, {"name_or_path": "no/such-model-anywhere"}):
        with pytest.raises(ValueError):
            SentenceEncoder(**wrong)
    with pytest.raises(TypeError, match="list of texts"):
        encoder.encode("one text")
    with pytest.raises(ValueError, match="role"):
        encoder.encode(["x"], role="passage")


# The index


def naive(ids, vectors, query, n, allow):
    scores = [(-round(float(v.astype(float) @ query.astype(float)), 6), i) for i, v in zip(ids, vectors) if allow is None or i in allow]
    return [(i, -s) for s, i in sorted(scores)[:n]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 8), st.integers(1, 70), st.booleans())
def test_index_is_exact_filtered_and_breaks_ties_by_id(seed, size, distinct, n, filtered):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(distinct, 7)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    vectors = points[rng.integers(distinct, size=size)]  # many ties
    ids = [f"{i:04d}" for i in range(size)]
    allow = {i for i in ids if rng.random() < 0.4} if filtered else None
    hits = ExactIndex(ids, vectors).search(points[0], n, allow)
    assert [(h.id, h.score) for h in hits] == naive(ids, vectors, points[0], n, allow)
    assert [h.rank for h in hits] == list(range(1, len(hits) + 1))


def test_faiss_threads_are_put_back():
    import faiss

    before = faiss.omp_get_max_threads()
    ExactIndex(["a"], np.ones((1, 2), np.float32), threads=1).search(np.ones(2, np.float32), 1)
    assert faiss.omp_get_max_threads() == before


# The retriever


def test_search_ranks_and_breaks_ties_by_id(store, encoder):
    hits = Retriever(store, encoder).search(episode(99, "Boil the water.", fold="test", score=None), n=4)
    water = sorted(episode(i, GOALS[i]).id for i in (0, 1, 5))
    assert [h.id for h in hits] == [*water, episode(2, GOALS[2]).id] and hits[0].score == hits[2].score == pytest.approx(1, abs=1e-5)
    assert hits == Retriever(store, encoder).search(episode(98, "Boil the water."), n=4)


def test_same_answer_whatever_the_order_of_adding(tmp_path, encoder, store):
    with Store(tmp_path / "other.db") as other:
        retriever = Retriever(other, encoder)
        query = episode(99, "Heat the milk until it boils.")
        for i in reversed(range(len(GOALS))):  # indexed again after each
            other.add(episode(i, GOALS[i]))
            retriever.search(query)
        assert retriever.search(query) == Retriever(store, encoder).search(query)


def test_allow_works_inside(store, encoder):
    retriever, query = Retriever(store, encoder), episode(99, "Boil the water.")
    turtle, tree = episode(4, GOALS[4]).id, episode(3, GOALS[3]).id
    assert {h.id for h in retriever.search(query, 5, allow={turtle, tree})} == {turtle, tree}
    assert retriever.search(query, 5, allow=set()) == [] and retriever.search(query, 5, allow={"stranger"}) == []
    assert len(retriever.search(query, 50)) == len(GOALS)
    with pytest.raises(ValueError, match="at least one"):
        retriever.search(query, 0)


def test_each_episode_is_encoded_once(store, encoder):
    counting = Counting(encoder)
    retriever = Retriever(store, counting)
    retriever.search(episode(99, "Boil the water."))
    retriever.search(episode(97, "Boil the water."))
    assert [r for r, _ in counting.texts].count("document") == len(GOALS) and [r for r, _ in counting.texts].count("query") == 1
    store.add(episode(50, "Freeze the tea."))
    assert retriever.search(episode(99, "Freeze the tea."))[0].id == episode(50, "Freeze the tea.").id
    assert [t for r, t in counting.texts if r == "document"][len(GOALS):] == ["Freeze the tea."]
    assert embed_missing(store, Counting(encoder), "goal", store.find()) == 0
    assert embed_missing(store, Counting(encoder, "counting@2"), "goal", store.find()) == len(GOALS) + 1, "another encoder starts from nothing"


def test_a_chosen_set_of_ids_stays_chosen(store, encoder):
    some = store.find()[:2]
    retriever = Retriever(store, encoder).index(some)
    store.add(episode(50, "Freeze the tea."))
    assert len(retriever) == 2 and {h.id for h in retriever.search(episode(99, "x"))} == set(some)
    store.delete(some[0])
    assert len(retriever) == 1


def test_empty_store(tmp_path, encoder):
    with Store(tmp_path / "empty.db") as store:
        retriever = Retriever(store, encoder)
        assert retriever.search(episode(1, "x")) == []
        retriever.save(tmp_path / "i")
        assert Retriever(store, encoder).load(tmp_path / "i") == "loaded"


def test_unknown_key(store, encoder):
    with pytest.raises(KeyError, match="there are goal"):
        Retriever(store, encoder, key="mood")
    assert key_function("goal") is KEYS["goal"]


# The file


def test_save_and_load(store, encoder, tmp_path):
    path, query = tmp_path / "sub" / "goal.index", episode(99, "Boil the milk.")
    first = Retriever(store, encoder)
    hits = first.search(query)
    first.save(path)
    counting = Counting(encoder, encoder.name)
    second = Retriever(store, counting)
    assert second.load(path) == "loaded" and second.search(query) == hits
    assert [r for r, _ in counting.texts] == ["query"] and b"pickle" not in path.read_bytes()
    store.add(episode(60, "Boil the milk."))
    assert len(second.search(query)) == len(hits) + 1, "stale in memory: noticed"
    assert Retriever(store, encoder).load(path) == "rebuilt: the store has changed"
    assert Retriever(store, encoder).load(path) == "loaded", "rebuilt on disk too"
    assert Retriever(store, encoder).load(tmp_path / "none") == "rebuilt: there was no file"
    assert not list(tmp_path.glob("**/*.part"))


def test_index_of_another_encoder_or_key_is_refused(store, encoder, tmp_path, monkeypatch):
    Retriever(store, encoder).save(tmp_path / "i")
    other = Counting(encoder, "other@123")
    with pytest.raises(IndexMismatch) as error:
        Retriever(store, other).load(tmp_path / "i")
    assert encoder.name in str(error.value) and "other@123" in str(error.value) and "remove the file" in str(error.value)
    monkeypatch.setitem(KEYS, "first", lambda t: t.first_observation)
    with pytest.raises(IndexMismatch, match="key 'goal'.*key 'first'"):
        Retriever(store, encoder, key="first").load(tmp_path / "i")


def test_damaged_or_swapped_file_is_rebuilt(store, encoder, tmp_path):
    path, query = tmp_path / "i", episode(99, "Boil the milk.")
    retriever = Retriever(store, encoder)
    right = retriever.search(query)
    retriever.save(path)
    whole = path.read_bytes()
    head = whole.index(b"}") + 2
    faults = [part for _, part in damaged(whole, 40, head, random.Random(0))]  # the name of the encoder and the dimension are hit as well
    for fault in (b"", b"hello", whole[:-1], b"\x80\x04K\x01.", whole.replace(b'"dim": 384', b'"dim": 383'), *faults):
        assert fault != whole
        path.write_bytes(fault)
        fresh = Retriever(store, encoder)
        assert fresh.load(path) == "rebuilt: the file was damaged" and fresh.search(query) == right
    with Store(tmp_path / "b.db") as other:
        other.add(episode(0, "Grow a plum."))
        Retriever(other, encoder).save(tmp_path / "other")
    shutil.copy(tmp_path / "other", path)
    assert Retriever(store, encoder).load(path) == "rebuilt: the store has changed"
