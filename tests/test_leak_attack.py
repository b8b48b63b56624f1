"""The leak audit under attack: leaks are planted among clean artefacts, one at a time and many at once; all must be found, and clean folds must pass.

What is planted goes the way that real leaks go: through a store (added, or imported from JSON Lines), through manifests and their parents.
"""
import random
from collections import Counter
from dataclasses import replace

import pytest

from exprag.audit import LeakError, Manifest, audit, check_experience, index_manifest, leaks
from exprag.store import Store
from exprag.trajectory import Step, Task, Trajectory, read_jsonl, write_jsonl
from exprag.views import Experience
from exprag.world import is_hard, load_panel, load_world
from exprag.worlds.scienceworld import EASY_TYPES, HARD_TYPES, scienceworld_tasks

TEST = load_panel("scienceworld", "test")
EASY_TRAIN = scienceworld_tasks("train", EASY_TYPES)
ALL_TRAIN = scienceworld_tasks("train")
WEIGHTS = ("tokenizer", "pretraining", "adapter")
KINDS = ("same episode", "re-run of a test task", "test fold by import", "hard type in weights")
EACH = 125


def episode(task, salt=0, steps=3):
    return Trajectory(task, f"Do {task.type} {task.variation}.", "A room.", tuple(Step(f"do {task.variation} {salt} {j}", "Done.") for j in range(steps)), 100.0, True, "1.2.3", {"simplification": "easy"})


CONTENTS = frozenset(episode(t).id for t in TEST.tasks)  # what is known to be of the panel


def clean(kind, chance, size=20):
    pool = EASY_TRAIN if kind in WEIGHTS else ALL_TRAIN
    tasks = chance.sample(pool, size)
    return Manifest(kind, f"clean {kind}", tuple(tasks), tuple(episode(t, 1).id for t in tasks))


def buried(manifest, chance):
    "The manifest, or something that was made from it, or from that."
    for depth in range(chance.randrange(3)):
        manifest = replace(clean("adapter" if depth else chance.choice(WEIGHTS), chance), parents=(clean("tokenizer", chance), manifest))
    return manifest


def planted(kind, number, folder):
    "A leak of a kind, and what an audit must name."
    chance = random.Random(f"{kind} {number}")
    if kind == "same episode":  # under a harmless task's name
        id = chance.choice(sorted(CONTENTS))
        base = clean(chance.choice((*WEIGHTS, "index")), chance)
        return buried(replace(base, contents=(*base.contents, id)), chance), id
    if kind == "re-run of a test task":  # other content; often with another fold on the label
        task = replace(chance.choice(TEST.tasks), fold=chance.choice(("train", "train", "dev", "test")))
        with Store(folder / f"{number}.db") as store:
            store.add_many(episode(t, 2) for t in (*chance.sample(EASY_TRAIN, 5), task))
            return buried(index_manifest(store), chance), str(task)
    if kind == "test fold by import":  # also tasks that no panel holds
        task = chance.choice(scienceworld_tasks(chance.choice(("test", "dev"))))
        write_jsonl((episode(t, 3) for t in (*chance.sample(ALL_TRAIN, 5), task)), folder / f"{number}.jsonl")
        with Store(folder / f"{number}.db") as store:
            store.add_many(read_jsonl(folder / f"{number}.jsonl")[0])
            return buried(index_manifest(store), chance), str(task)
    task = chance.choice(scienceworld_tasks("train", HARD_TYPES))
    base = clean(chance.choice(WEIGHTS), chance)
    return buried(replace(base, tasks=(*base.tasks, task)), chance), str(task)


@pytest.mark.parametrize("kind", KINDS)
def test_every_planted_leak_is_found_and_named(kind, tmp_path):
    missed = []
    for number in range(EACH):
        manifest, what = planted(kind, number, tmp_path)
        try:
            audit([clean("adapter", random.Random(number)), manifest], TEST, CONTENTS)
        except LeakError as error:
            if {leak.what for leak in error.leaks} == {what}: continue
        missed.append((number, what))
    assert not missed, f"{len(missed)} of {EACH} were missed, or something else was named: {missed[:5]}"


def test_many_at_once_are_all_named(tmp_path):
    pairs = [planted(kind, number, tmp_path) for kind in KINDS for number in range(25)]
    with pytest.raises(LeakError) as caught:
        audit([m for m, _ in pairs], TEST, CONTENTS)
    named = Counter(leak.what for leak in caught.value.leaks)
    assert set(named) == {what for _, what in pairs}


def test_hardly_any_false_alarm_on_clean_folds():
    """At most one in a hundred; there should be none at all."""
    alarms = 0
    for number in range(500):
        chance = random.Random(number)
        manifests = [clean(kind, chance, chance.randrange(1, 200)) for kind in (*WEIGHTS, "index")]
        manifests += [buried(manifests[3], chance), Manifest("threshold", "t", tuple(chance.sample(scienceworld_tasks("dev"), 20)))]
        alarms += any(leaks(m, TEST, CONTENTS) for m in manifests)
    whole = [Manifest("index", "all", ALL_TRAIN), Manifest("adapter", "easy", EASY_TRAIN)]
    assert alarms == 0 and audit(whole, TEST, CONTENTS) == ()


def test_contexts_of_training_are_checked_example_by_example():
    for number in range(200):
        chance = random.Random(number)
        task = chance.choice(EASY_TRAIN)
        others = [Experience(episode(t)) for t in chance.sample([t for t in EASY_TRAIN if t != task], 3)]
        check_experience(episode(task), others)
        for leak in (episode(task, 9), episode(chance.choice(scienceworld_tasks("test"))), episode(chance.choice(scienceworld_tasks("train", HARD_TYPES)))):
            with pytest.raises(LeakError):
                check_experience(episode(task), chance.sample([*others, Experience(leak)], 4))


# Three that the audit once missed.


def test_hard_types_of_alfworld_in_weights():
    world = load_world("alfworld")
    hard = [t for t in world.tasks("train") if t.type in world.hard]
    missed = [t for t in hard[:125] if not leaks(Manifest("adapter", "a", (t,)), TEST)]
    assert len(hard) > 125 and all(map(is_hard, hard)) and not missed


def test_a_test_variation_that_is_labelled_train_and_is_on_no_panel():
    outside = [t for t in scienceworld_tasks("test") if t not in set(TEST.tasks)]
    chance = random.Random(0)
    missed = [t for t in chance.sample(outside, 125) if not leaks(Manifest("index", "i", (replace(t, fold="train"),)), TEST)]
    assert not missed


def test_a_variation_spelled_otherwise():
    missed = [t for t in TEST.tasks[:125] if not leaks(Manifest("index", "i", (Task(t.world, t.type, "0" + t.variation, "train"),)), TEST)]
    assert not missed
