"""The small model's text, its training, and what is in the package."""
import json
import random
from dataclasses import replace
from hashlib import sha256

import pytest

from exprag.worlds.scienceworld import EASY_TYPES
from exprag.world import difficulty
from exprag.models.curriculum import curriculum
from exprag.models.loading import load_model
from exprag.models.lookup import (
    Document, Replay, ReplaySettings, Words, again, alike, done_again, families, longer_name, loops,
    periodic, procedures, repeats, replays, spelled)
from exprag.models.nano import (
    Pretraining, Shape, grow, lookup_accuracy, nano_path, new_model, pretrain, progress_of, wider)
from exprag.models.play import play_texts, train_tokenizer
from exprag.audit import Manifest
from exprag.trajectory import Step, Task, Trajectory, write_jsonl

torch = pytest.importorskip("torch")


def episode(n: int = 12) -> Trajectory:
    rooms = ["kitchen", "hallway", "workshop", "bedroom"]
    steps = tuple(Step(f"go to {rooms[i % 4]}", f"You move to the {rooms[i % 4]}. In it, you see: \n\ta door (that is open)" + "\n\ta red apple" * 12)
                  for i in range(n))
    return Trajectory(Task("scienceworld", "melt", "0", "train"), "Your task is to melt ice.", "This room is called the hallway." * 8, steps)


@pytest.fixture(scope="module")
def words():
    tokenizer = train_tokenizer(play_texts([episode()]) + ["apple banana cherry " * 3, "alpha beta gamma delta epsilon"], 600)
    return Words(tokenizer, [episode()])


GENERATORS = [g for phase in curriculum(Pretraining().ends) for _, _, g in phase.mix]


@pytest.mark.parametrize("generator", GENERATORS)
def test_documents_are_as_long_as_asked_and_the_same_for_the_same_seed(words, generator):
    a, b = (generator(random.Random(5), words, 2000) for _ in range(2))
    assert a == b and len(a.ids) == len(a.mask) <= 2000 and sum(a.mask) > 0


def test_every_supervised_token_of_a_list_stands_before_it(words):
    for seed in range(100):
        for document in (periodic(random.Random(seed), words, 200), repeats(random.Random(seed), words, 200),
                         procedures(random.Random(seed), words, 2000)):
            for n, (token, supervised) in enumerate(zip(document.ids, document.mask)):
                assert not supervised or token == words.end or token in document.ids[:n]


def answers(words, document) -> list[tuple[list[int], int]]:
    "The tokens of each thing that is done in a chat, and whether they are supervised."
    starts = [n for n, token in enumerate(document.ids) if token == words.role["assistant"]]
    ends = [document.ids.index(words.end, n) for n in starts]
    return [(document.ids[a + 1:b], document.mask[a + 1]) for a, b in zip(starts, ends)]


def spell(ids) -> str: return "".join(f"<{i}>" for i in ids)


def numbered_turns(words, document):
    "Of each turn of a numbered list: its number, the list from the line of that number on, and what was done."
    text, *turns = spell(document.ids).split(spell([words.role["user"]]))
    for turn in turns:
        said, done = turn.split(spell([words.end, words.role["assistant"]]))
        number = next(n for n in range(99, 0, -1) if said.endswith(spell(words.number(n))))
        (line,) = [part for mark in words.counters for part in text.split(spell([*words.number(number), *mark]))[1:2]]
        yield number, line, done.removesuffix(spell([words.end]))


def test_in_families_only_the_number_tells_what_is_supervised(words):
    for seed in range(60):
        turns = list(numbered_turns(words, families(random.Random(seed), words, 4000)))
        assert turns and all(line.startswith(done) for _, line, done in turns), seed


def test_in_a_list_that_loops_what_is_done_is_the_line_of_the_number(words):
    again = 0
    for seed in range(40):
        turns = list(numbered_turns(words, loops(random.Random(seed), words, 6000)))
        assert all(line.startswith(done) for _, line, done in turns), seed
        again += len(turns) - len({done for *_, done in turns})
    assert again > 400


def test_lines_can_be_made_to_begin_alike(words):
    for seed in range(40):
        turns = [([10 + n, 20 + n, 30 + n], [n]) for n in range(6)]
        made = alike(random.Random(seed), words, turns)
        assert [t for t in made if t in turns] == turns and len(made) >= len(turns) + 3
        first = [action[0] for action, _ in made]
        assert max(map(first.count, first)) >= 4


def test_a_model_that_is_made_wider_computes_the_same_and_a_grown_one_holds_the_number():
    tokenizer = train_tokenizer(play_texts([episode()]), 600)
    model = new_model(tokenizer, Shape(layers=3), 1)
    ids = torch.tensor([tokenizer("\n4. go to kitchen\n5. go to hallway\n6. go to room\nYou move to it\n5 go to", add_special_tokens=False)["input_ids"]])
    with torch.inference_mode(): before, after = model(ids).logits, wider(model, 6)(ids).logits
    assert torch.allclose(before, after, atol=1e-4)
    new = grow(model, tokenizer)
    assert new.config.num_attention_heads == 6 and new.config.head_dim == 48
    new.set_attn_implementation("eager")
    with torch.inference_mode(): number, same, *_ = (layer[0, 4, -1] for layer in new(ids, output_attentions=True).attentions)
    digits = [n for n, i in enumerate(ids[0].tolist()) if tokenizer.decode([i]) in ("4", "5", "6")]
    assert number.argmax() == digits[-1] and number.max() > 0.8
    lines = [float(same[a:b].sum()) for a, b in zip(digits, digits[1:])]
    assert lines[1] == max(lines)


def test_action_n_is_line_n_whatever_went_wrong(words):
    lost = 0
    for seed in range(60):
        chance, document = random.Random(seed), Document()
        how = ReplaySettings(steps=(3, 10), renamed=0.0, teased=4, looped=3, lengthened=0.5)
        replay = Replay(chance, words, {}, how)
        done_again(chance, document, replay, True, 0.0, 20, 0.5)
        done = answers(words, document)
        assert len(done) == len(replay.turns) == len(replay.listed[1])
        for (said, supervised), (action, _), (line, _) in zip(done, replay.turns, replay.listed[1]):
            assert action == line and (not supervised or said == line)
            lost += not supervised
    assert lost > 60


def test_loops_and_longer_names(words):
    for seed in range(50):
        chance = random.Random(seed)
        turns = again(chance, list(range(8)))
        steps = [b - a for a, b in zip(turns, turns[1:])]
        assert len(turns) > 9 and sorted(set(turns)) == list(range(8)) and set(steps) <= {1, 0, -1, -2}
        assert again(chance, [3])[:3] == [3] * 3
        word, name = spelled(chance, words), longer_name(chance, words, words.pool[0])
        assert word[0] in words.heads and set(word[1:]) <= {*words.pieces, *words.letters} and 2 <= len(word) <= 5
        assert 2 <= len(name) <= 10 and set(name) <= {*words.pool, *words.heads, *words.pieces, *words.letters}


def test_heads_look_back_before_any_training(words):
    tokenizer = train_tokenizer(play_texts([episode()]), 600)
    shape = Shape(hidden=64, layers=2, heads=4, feed_forward=64, look_back=((1, 2), (4,)))
    model = new_model(tokenizer, shape)
    model.set_attn_implementation("eager")
    layers = model(torch.randint(300, 500, (1, 50)), output_attentions=True).attentions
    for layer, head, distance in ((0, 0, 1), (0, 1, 2), (1, 0, 4)): assert layers[layer][0][head].diagonal(-distance)[distance:].mean() > 0.8
    with pytest.raises(ValueError, match="5 distances"): new_model(tokenizer, replace(shape, look_back=((1, 2, 3, 4, 5),)))
    with pytest.raises(ValueError, match="layer 2 is to look back, but the model has 2 layers"): new_model(tokenizer, replace(shape, look_back=((1,), (2,), (3,))))


def test_a_training_run_can_be_stopped_and_continued(tmp_path):
    recipe, shape = Pretraining(tokens=8_000, reach=4_000, places=6_000, pointing=3_000, steady=3_000, numbering=40_000, counting=1_000, looping=1_000, batch=4, play_episodes=1), Shape(hidden=32, layers=1, heads=2, feed_forward=32, look_back=((1, 2),))
    hashes, stopped = [], []
    for name, stops in (("whole", (None,)), ("resumed", (2, 4, 7, 8, 9, None))):
        (tmp_path / name).mkdir()
        write_jsonl([episode()], tmp_path / name / "play.jsonl")
        for stop in stops:
            done = pretrain(tmp_path / name, recipe, shape, stop_after=stop)
            stopped.append(progress_of(tmp_path / name))
        hashes.append(sha256((done / "model.safetensors").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    assert any("grown" in p and p["tokens"] < recipe.ends[-1] for p in stopped), "no stop after the heads were added"
    assert {t.type for t in Manifest.read(done).tasks} == {"melt"}


def test_a_run_is_not_continued_with_another_recipe_or_shape(tmp_path):
    recipe, shape = Pretraining(tokens=8_000, batch=4, play_episodes=1), Shape(hidden=32, layers=1, heads=2, feed_forward=32, look_back=((1, 2),))
    write_jsonl([episode()], tmp_path / "play.jsonl")
    pretrain(tmp_path, recipe, shape, stop_after=1)
    checkpoint = (tmp_path / "checkpoint.safetensors").read_bytes()
    for other in ((replace(recipe, play_episodes=2), shape, "recipe play_episodes = 1, and now it is 2: give another directory"),
                  (recipe, replace(shape, look_back=((1,),)), r"shape look_back = \[\[1, 2\]\], and now it is \[\[1\]\]: give another directory")):
        with pytest.raises(ValueError, match=other[2]): pretrain(tmp_path, *other[:2], stop_after=2)
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ValueError, match="no recipe.json.*give another directory"): pretrain(tmp_path, recipe, shape, stop_after=2)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == checkpoint


def test_documents_are_those_that_nano_was_trained_on(words):
    "The generators draw the same documents as the version that trained the model in the package."
    drawn = sha256()
    for phase in curriculum(Pretraining().ends):
        for name, share, generate in phase.mix:
            for seed in range(20):
                made, about = generate(random.Random(seed), words, phase.length), (phase.until, phase.length)
                drawn.update(json.dumps([*about, phase.batch, phase.parts, name, share, made.ids, made.mask]).encode())
    assert drawn.hexdigest()[:16] == "5390082e3a3bc270"


def test_settings_are_checked(words):
    for generate in (procedures, replays):
        with pytest.raises(TypeError, match="colour"): generate(random.Random(0), words, 100, colour=1)


def test_the_package_holds_the_model_its_card_and_a_clean_manifest():
    place, manifest = nano_path(), Manifest.read(nano_path())
    assert sum(f.stat().st_size for f in place.rglob("*")) < 20e6 and (place / "README.md").exists()
    assert {t.fold for t in manifest.tasks} == {"train"} and {t.type for t in manifest.tasks} == set(EASY_TYPES)
    assert all(difficulty(t) == "easy" for t in manifest.tasks)
    recorded = json.loads((place / "pretraining.json").read_text())["sha256"]
    for name in ("model.safetensors", "tokenizer.json"): assert sha256((place / name).read_bytes()).hexdigest() == recorded[name]


def test_the_model_of_the_package_repeats_what_it_read():
    model, tokenizer = load_model("nano", device="cpu")
    words = Words(tokenizer, [])
    words.all = words.pool
    assert lookup_accuracy(model, lambda chance: repeats(chance, words, 256, (16, 32)), documents=8)[0] > 0.9


def test_the_tokenizer_of_the_package_loses_nothing_and_spells_a_word_one_way():
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(nano_path())  # as anybody would load it
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    for text in ("open door to kitchen", "In it, you see: \n\tthe agent\n\ta cup (containing nothing)", "Ünïcödé 漢字 🙂", "a\n\nb  c", "x=3.14; y"):
        assert tokenizer.decode(ids(text)) == text
    (door,) = ids("door")
    assert all(door in ids(text) for text in ("a door", "(door)", "\n\tdoor", "door."))
