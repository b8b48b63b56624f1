"""Teacher forcing: what a policy would write given the true history, with three memories."""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exprag.agent import ReplayPolicy
from exprag.models.local import HFPolicy
from exprag.prompt import PromptFormat
from exprag.samples import Sample, collate, make_samples, supervised_loss, token_losses
from exprag.studies.teacher_forcing import (
    THREE_MEMORIES, ForcedTokens, copyable, forced_tokens, procedure_accuracy, procedure_hits,
    spans, step_by_step, summarise, task_actions, teacher_forced, three_memories)
from exprag.trajectory import Step, Task, Trajectory, read_jsonl

SAMPLE = Path(__file__).resolve().parents[1] / "nbs" / "data" / "sample.jsonl"


def made(*actions, type="boil", variation="1", goal="Your task is to boil water.", world="scienceworld"):
    steps = tuple(Step(a, f"You did it: {a}.") for a in actions)
    return Trajectory(Task(world, type, variation, "dev"), goal, "This room is called the kitchen.", steps).finish(100, True)


BOIL = made("go to kitchen", "activate stove", "focus on substance in metal pot", "wait")
FIND = made("look around", "pick up blue box", "focus on dove", type="find-animal", goal="Your task is to find an animal.")


@pytest.fixture(scope="module")
def policy(): return HFPolicy.from_pretrained("nano", batch_size=1, format=PromptFormat(view="numbered", counter="{n}"))


@pytest.fixture(scope="module")
def sample(): return read_jsonl(SAMPLE)[0]


# ---- which actions count ----

def test_navigation_is_not_part_of_the_task():
    assert not any(task_actions(made("go to kitchen", "open door to hallway", "close door to x", "look around", "teleport to foundry")))
    assert all(task_actions(made("open cupboard", "look at box", "pick up door", "focus on red wire", "wait")))
    assert all(task_actions(made("go to kitchen", "", world="unheard-of"))), "a world of which nothing is known"


def test_spans():
    assert spans([0, 1, 1, 0, 1]) == [(1, 3), (4, 5)] and spans([]) == [] and spans([1]) == [(0, 1)]


# ---- one pass ----

@pytest.mark.parametrize("family", ["qwen", "gemma"])
def test_one_pass_answers_as_generation_would(family):
    "A model that has half learnt three episodes: the one-pass answer is what generation gives, step by step."
    import torch
    from chat_models import make_model, make_tokenizer
    tokenizer = make_tokenizer(family)
    model = make_model(family, len(tokenizer), max_position_embeddings=4096)
    words = ("open door to kitchen", "go to kitchen", "focus on metal pot", "look around")
    episodes = [Trajectory(Task("scienceworld", kind, "1", "train"), f"Your task is to {kind} water.", "a kitchen",
                           tuple(Step(words[(i + n) % 4], f"observation {n} {i}") for i in range(4))) for n, kind in enumerate(("boil", "melt", "freeze"))]
    policy = HFPolicy(model, tokenizer, PromptFormat(templates=("open OBJ",)), batch_size=1, max_new_tokens=24, close_call=0.0)
    data = collate(make_samples(episodes, policy.encoder))
    labels, optimizer = data.pop("labels"), torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        supervised_loss(model(**data), labels).backward()
        optimizer.step(), optimizer.zero_grad()
        one_pass = teacher_forced(policy, episodes, [()] * 3, batch=2)
        if sum(map(sum, one_pass)) >= 5: break
    policy = HFPolicy(model, tokenizer, policy.format, batch_size=1, max_new_tokens=24, close_call=0.0)
    assert 5 <= sum(map(sum, one_pass)) < 12, "half learnt"
    assert one_pass == step_by_step(policy, episodes, [()] * 3) == teacher_forced(policy, episodes, [()] * 3, batch=1)


def test_procedure_hits_are_procedure_accuracy_by_episode(policy, sample):
    some = sorted(sample, key=len)[:3]
    if len({e.task.type for e in some}) < 2: some[-1] = next(e for e in sorted(sample, key=len) if e.task.type != some[0].task.type)
    hits = procedure_hits(policy, some, [()] * len(some))
    whole = procedure_accuracy(policy, some, lambda t: ())
    assert sum(a for _, a in hits) == whole.actions and sum(h for h, _ in hits) / whole.actions == pytest.approx(whole.none)


# ---- three memories ----

def test_procedure_accuracy_separates_right_from_wrong_experience(sample):
    "Replay needs no weights: with the task's own episode it is always right, with another's hardly ever, with none never."
    picked = [next(t for t in sample if t.task.type == kind) for kind in sorted({t.task.type for t in sample})[:4]]
    own = {t.task: t for t in picked}
    accuracy = procedure_accuracy(ReplayPolicy(), picked, lambda t: (own[t.task],))
    assert accuracy.right == 1 and accuracy.none == 0 and accuracy.another_type < 0.5
    hits = procedure_hits(ReplayPolicy(), picked, [(own[t.task],) for t in picked])
    assert all(right == asked > 0 for right, asked in hits) and len(hits) == 4 and sum(asked for _, asked in hits) == accuracy.actions
    assert accuracy.actions == sum(sum(task_actions(t)) for t in picked)
    with pytest.raises(ValueError, match="two task types"): procedure_accuracy(ReplayPolicy(), picked[:1], lambda t: ())


def test_three_memories_right_another_types_and_none():
    melt = made("wait", type="melt")
    memories = three_memories([BOIL, replace(BOIL, first_observation="elsewhere"), melt], lambda t: (t,))
    assert tuple(memories) == THREE_MEMORIES and all(len(found) == 3 for found in memories.values())
    assert all(t.steps == () and t.score is None for found in memories["right"] for t in found)  # asked before the episode began
    assert [found[0].task.type for found in memories["another type's"]] == ["melt", "melt", "boil"] and memories["none"] == [()] * 3
    with pytest.raises(ValueError, match="needs two task types"): three_memories([BOIL], lambda t: (t,))


# ---- token by token ----

def test_every_supervised_token_has_its_row(policy):
    tokens = forced_tokens(policy, [BOIL, FIND], [(), (BOIL,)])
    samples = [Sample(t.task, *policy.encoder.encode(t, e)) for t, e in ((BOIL, ()), (FIND, (BOIL,)))]
    assert len(tokens) == sum(s.supervised for s in samples)
    assert np.allclose([tokens.loss[tokens.action < 4].sum(), tokens.loss[tokens.action >= 4].sum()], token_losses(policy.model, samples)[:, 0], atol=1e-3)
    assert sorted(set(tokens.action)) == list(range(7)) and list(tokens.step[tokens.position == 0]) == [0, 1, 2, 3, 0, 1, 2]
    counts = [*task_actions(BOIL), *task_actions(FIND)]
    assert list(tokens.counts[tokens.position == 0]) == counts and counts.count(False) == 2


def test_whole_actions_are_those_of_one_pass_and_the_batch_does_not_matter(policy):
    found = [(replace(BOIL, provenance={}),), (FIND,)]
    hits = [h for row in teacher_forced(policy, [BOIL, FIND], found) for h in row]
    alone, together = (forced_tokens(policy, [BOIL, FIND], found, batch) for batch in (1, 2))
    assert alone.accuracy(navigation=True) == together.accuracy(navigation=True) == np.mean(hits)
    assert np.allclose(alone.loss, together.loss, atol=1e-4)


def test_one_wrong_token_makes_an_action_wrong():
    column = lambda *values: np.array(values)
    tokens = ForcedTokens(column(0, 0, 1, 1, 2), column(0, 1, 0, 1, 0), column(True, True, True, True, False), column(1.0, 3.0, 0.0, 0.0, 9.0),
                          column(True, False, True, True, False), column(0, 0, 1, 1, 2))
    assert tokens.accuracy() == 0.5 and tokens.accuracy(navigation=True) == pytest.approx(1 / 3)
    row = summarise(tokens, positions=3, steps=2)
    assert row["loss"] == 1.0 and row["actions"] == 2 and json.loads(json.dumps(row)) == row
    assert row["by position"] == [[2, 0.5, 1.0], [2, 1.5, 0.5], [0, None, None]] and row["by step"] == [[2, 2.0, 0.5], [2, 0.0, 1.0]]


def test_the_right_experience_lowers_the_loss(policy):
    pairs = [BOIL, FIND]
    memories = {"right": [(t,) for t in pairs], "another type's": [(FIND,), (BOIL,)], "none": [(), ()]}
    measured = {name: summarise(forced_tokens(policy, pairs, found)) for name, found in memories.items()}
    assert measured["right"]["loss"] < measured["another type's"]["loss"] and measured["right"]["loss"] < measured["none"]["loss"]
    assert all(math.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in measured.values())


def test_what_can_be_copied():
    moved = made("activate stove", "focus on substance in metal pot", "go to kitchen", "eat pot")
    assert copyable([BOIL], [(BOIL,)]) == {"same number": 1.0, "anywhere": 1.0}
    assert copyable([BOIL], [(moved,)]) == {"same number": 0.0, "anywhere": round(2 / 3, 4)}, "three task actions: one of BOIL's four is navigation"
    assert copyable([BOIL, FIND], [(), (FIND,)]) == {"same number": 0.4, "anywhere": 0.4}
