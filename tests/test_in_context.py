"""What experience is worth to a model, token by token."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from exprag.agent import HFPolicy
from exprag.evaluation import MOVES, teacher_forced
from exprag.in_context import THREE, Tokens, copying, forced_tokens, in_context, summary, three_memories
from exprag.prompt import PromptFormat
from exprag.samples import Sample, token_losses
from exprag.trajectory import Step, Task, Trajectory


def told(*actions, type="boil", variation="1", goal="Your task is to boil water."):
    steps = tuple(Step(a, f"You did it: {a}.") for a in actions)
    return Trajectory(Task("scienceworld", type, variation, "dev"), goal, "This room is called the kitchen.", steps).finish(100, True)


BOIL = told("go to kitchen", "activate stove", "focus on substance in metal pot", "wait")
FIND = told("look around", "pick up blue box", "focus on dove", type="find-animal", goal="Your task is to find an animal.")


@pytest.fixture(scope="module")
def policy(): return HFPolicy.from_pretrained("nano", batch_size=1, format=PromptFormat(view="numbered", counter="{n}"))


def test_every_supervised_token_has_its_row(policy):
    tokens = forced_tokens(policy, [BOIL, FIND], [(), (BOIL,)])
    samples = [Sample(t.task, *policy.encoder.encode(t, e)) for t, e in ((BOIL, ()), (FIND, (BOIL,)))]
    assert len(tokens) == sum(s.supervised for s in samples)
    assert np.allclose([tokens.loss[tokens.action < 4].sum(), tokens.loss[tokens.action >= 4].sum()], token_losses(policy.model, samples)[:, 0], atol=1e-3)
    assert sorted(set(tokens.action)) == list(range(7)) and list(tokens.step[tokens.place == 0]) == [0, 1, 2, 3, 0, 1, 2]
    deeds = [not MOVES.fullmatch(a) for t in (BOIL, FIND) for a in t.actions]
    assert list(tokens.deed[tokens.place == 0]) == deeds and deeds.count(False) == 2


def test_whole_actions_are_those_of_the_evaluation_and_the_batch_does_not_matter(policy):
    found = [(replace(BOIL, provenance={}),), (FIND,)]
    hits = [h for row in teacher_forced(policy, [BOIL, FIND], found) for h in row]
    alone, together = (forced_tokens(policy, [BOIL, FIND], found, batch) for batch in (1, 2))
    assert alone.whole(deeds=False) == together.whole(deeds=False) == np.mean(hits)
    assert np.allclose(alone.loss, together.loss, atol=1e-4)


def test_one_wrong_token_makes_an_action_wrong():
    column = lambda *values: np.array(values)
    tokens = Tokens(column(0, 0, 1, 1, 2), column(0, 1, 0, 1, 0), column(True, True, True, True, False), column(1.0, 3.0, 0.0, 0.0, 9.0),
                    column(True, False, True, True, False), column(0, 0, 1, 1, 2))
    assert tokens.whole() == 0.5 and tokens.whole(deeds=False) == pytest.approx(1 / 3)
    row = summary(tokens, places=3, steps=2)
    assert row["loss"] == 1.0 and row["asked"] == 2 and json.loads(json.dumps(row)) == row
    assert row["by place"] == [[2, 0.5, 1.0], [2, 1.5, 0.5], [0, None, None]] and row["by step"] == [[2, 2.0, 0.5], [2, 0.0, 1.0]]


def test_three_memories_right_another_types_and_none():
    melt = told("wait", type="melt")
    memories = three_memories([BOIL, replace(BOIL, first_observation="elsewhere"), melt], lambda t: (t,))
    assert tuple(memories) == THREE and all(len(found) == 3 for found in memories.values())
    assert all(t.steps == () and t.score is None for found in memories["right"] for t in found)  # asked before the episode began
    assert [found[0].task.type for found in memories["another type's"]] == ["melt", "melt", "boil"] and memories["none"] == [()] * 3
    with pytest.raises(ValueError, match="needs two task types"): three_memories([BOIL], lambda t: (t,))


def test_a_model_told_the_very_actions_is_less_surprised_than_one_told_others(policy):
    pairs = [BOIL, FIND]
    measured = in_context(policy, pairs, {"right": [(t,) for t in pairs], "another type's": [(FIND,), (BOIL,)], "none": [(), ()]})
    assert measured["right"]["loss"] < measured["another type's"]["loss"] and measured["right"]["loss"] < measured["none"]["loss"]
    assert all(math.isfinite(row["loss"]) and 0 <= row["actions"] <= 1 for row in measured.values())


def test_how_far_copying_can_come():
    moved = told("activate stove", "focus on substance in metal pot", "go to kitchen", "eat pot")
    assert copying([BOIL], [(BOIL,)]) == {"same number": 1.0, "anywhere": 1.0}
    assert copying([BOIL], [(moved,)]) == {"same number": 0.0, "anywhere": round(2 / 3, 4)}, "three deeds: one of BOIL's four actions is getting about"
    assert copying([BOIL, FIND], [(), (FIND,)]) == {"same number": 0.4, "anywhere": 0.4}
