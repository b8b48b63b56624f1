"""Queries: encoders that never cut, an index that is exact, filtered and deterministic."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.query import (
    KEYS, ExactIndex, Retriever, SentenceEncoder, TextTooLong, chunks, embed_missing, instructed, key_function)
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Experience, actions


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


def test_unknown_key(store, encoder):
    with pytest.raises(ValueError, match="there are goal"):
        Retriever(store, encoder, key="mood")
    assert key_function("goal") is KEYS["goal"]


def test_keys():
    empty = episode(1, "Boil the water.")
    empty = Trajectory(empty.task, empty.goal, "A hall. It is big.")
    walk = Trajectory(empty.task, empty.goal, empty.first_observation, tuple(Step(f"go {i}", f"Room {i}. Here is more.") for i in range(1, 5)))
    assert (KEYS["goal"](walk), KEYS["start"](walk)) == ("Boil the water.", "Boil the water.\nA hall. It is big.")
    assert KEYS["recent"](walk) == "Boil the water.\n> go 2 | Room 2.\n> go 3 | Room 3.\n> go 4 | Room 4."
    assert KEYS["recent"](empty) == "Boil the water.\nStart | A hall."
    assert KEYS["so_far"](walk) == actions(Experience(walk)) and KEYS["history"](walk) == "go 1\ngo 2\ngo 3\ngo 4" and KEYS["history"](empty) == ""


def test_a_key_of_ones_own(store, encoder, monkeypatch):
    monkeypatch.setitem(KEYS, "last", lambda t: t.steps[-1].observation if t.steps else "")
    hits = Retriever(store, encoder, key="last", query="last").search(episode(3, "x"))
    assert hits[0].id == episode(3, GOALS[3]).id and hits[0].score == pytest.approx(1, abs=1e-5)


def test_a_hit_is_fetched_as_experience(store, encoder):
    retriever = Retriever(store, encoder)
    hit = retriever.search(episode(99, "Grow an apple tree."), n=1)[0]
    experience = retriever.fetch(hit)
    assert isinstance(experience, Experience) and experience.hit == hit and experience.trajectory == store.get(hit.id) == episode(3, GOALS[3])


def test_queries_are_encoded_together_and_kept(store, encoder):
    counting = Counting(encoder)
    retriever = Retriever(store, counting)
    assert retriever.prepare([episode(i, goal) for i, goal in enumerate(GOALS)]) == len(set(GOALS))
    assert retriever.prepare([episode(9, "Boil the water.")]) == 0 and (retriever.vector(episode(9, GOALS[2])) == encoder.encode([GOALS[2]], "query")[0]).all()
    assert len(counting.texts) == len(set(GOALS))


def test_describe_names_what_decides_the_answers(store, encoder):
    first = Retriever(store, encoder).describe()
    assert first == {"encoder": encoder.name, "key": "goal", "query": "goal", "store": store.fingerprint()}
    store.add(episode(50, "Freeze the tea."))
    assert Retriever(store, encoder).describe() != first


def test_vectors_of_an_earlier_release_are_used(tmp_path, encoder):
    data = Path(__file__).parent / "data"
    said = json.loads((data / "store-v2.json").read_text())
    shutil.copy(data / "store-v2.sqlite", tmp_path / "old.db")
    with Store(tmp_path / "old.db") as store:
        counting, ids = Counting(encoder, encoder.name), [hit[0] for hit in said["hits"]]
        assert encoder.name == said["encoder"], "if the encoder's name changes, every kept vector is lost"
        query = episode(99, "Your task is to turn on the electric buzzer.")
        hits = Retriever(store, counting).index(ids).search(query, 4)
        assert [[h.id, h.score, h.rank] for h in hits] == said["hits"] and [role for role, _ in counting.texts] == ["query"]


def test_a_text_that_utf8_cannot_hold_is_encoded(encoder):
    assert (encoder.encode(["Boil \ud800 it."]) == encoder.encode(["Boil ? it."])).all()


def test_an_instruction_for_the_query():
    assert instructed("find it") == {"query": "Instruct: find it\nQuery:", "document": ""}
