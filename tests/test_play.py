"""What the small model sees of the real world: random play of easy tasks, and the tokenizer that spells it."""
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprag.worlds.scienceworld import ACTION_TEMPLATES
from exprag.models.play import (
    CHAT_TEMPLATE, END, JOINER, NOT_PLAYED, PAD, ROLES, play_texts, random_play, train_tokenizer)
from exprag.trajectory import Step, Task, Trajectory

MELT = Task("scienceworld", "melt", "0", "train")
LISTED = ["look around", "go to kitchen", "go to hallway", "open door", "pour water in sink", "focus on water", "read book", "reset task", "task", "wait"]


class Rooms:
    """A world of two rooms that counts how often it is asked for its valid actions, and ends when water is poured."""
    world_version, settings, ends_with = "1", {}, "pour"

    def reset(self, task):
        self.asked = self.steps = 0
        self.goal = f"Your task is to {task.type}."
        return "This room is called the hallway.", {"goal": self.goal, "score": 0.0, "success": False}

    def call(self, name):
        assert name == "getValidActionObjectCombinations"
        self.asked += 1
        return LISTED

    def step(self, action):
        self.steps += 1
        over = action.startswith(self.ends_with)
        return f"You do {action}.", 0.0, over, False, {"goal": self.goal, "score": 7.0, "success": False}


class Endless(Rooms):
    ends_with = "never"


@pytest.mark.parametrize("task", [Task("scienceworld", "power-component", "0", "train"), Task("scienceworld", "melt", "14", "dev"),
                                  Task("scienceworld", "melt", "21", "test")])
def test_random_play_refuses_hard_tasks_and_other_folds(task):
    with pytest.raises(ValueError, match="easy tasks of the train fold only"): random_play(None, task)


def test_an_episode_is_the_same_in_every_run():
    first, again, other = random_play(Endless(), MELT), random_play(Endless(), MELT), random_play(Endless(), MELT, seed=1)
    assert first.id == again.id != other.id and first.actions != other.actions
    assert first.provenance["actor"] == "random" and other.provenance["seed"] == 1


def test_an_episode_is_as_long_as_asked_or_ends_with_the_world():
    lengths = {len(random_play(Endless(), MELT, seed, steps=(3, 5))) for seed in range(40)}
    assert lengths == {3, 4, 5}
    ended = [random_play(Rooms(), MELT, seed) for seed in range(20)]
    assert all(not any(a.startswith("pour") for a in t.actions[:-1]) for t in ended) and any(t.actions[-1].startswith("pour") for t in ended)
    assert all(t.score == 7.0 and t.success is False for t in ended)


def test_random_play_leaves_out_four_kinds_of_action():
    done = {action for seed in range(40) for action in random_play(Endless(), MELT, seed).actions}
    assert done == {a for a in LISTED if not a.startswith(NOT_PLAYED)}


def test_the_list_of_valid_actions_is_asked_for_every_third_step_and_after_a_walk():
    for seed in range(10):
        world = Endless()
        played = random_play(world, MELT, seed)
        walked = [n + 1 for n, action in enumerate(played.actions[:-1]) if action.startswith("go ")]
        assert world.asked == len({*range(0, len(played), 3), *walked}) and world.steps == len(played)


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    rooms = ["kitchen", "hallway", "workshop", "bedroom"]
    steps = tuple(Step(f"go to {room}", f"You move to the {room}. In it, you see: \n\ta door (that is open)\n\tan apple") for room in rooms * 5)
    return train_tokenizer(play_texts([Trajectory(MELT, "Your task is to melt ice.", "This room is called the hallway.", steps)]), 2048)


def ids(tokenizer, text): return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_play_texts_hold_the_episode_and_the_templates():
    played = Trajectory(MELT, "a goal", "a room", (Step("go to kitchen", "You go."),))
    texts = play_texts([played])
    assert texts[:4] == ["a goal", "a room", "go to kitchen", "You go."] and set(texts[4:]) == {"; ".join(ACTION_TEMPLATES)}


@pytest.mark.parametrize("word", ["door", "kitchen", "apple", *sorted({t.split()[0] for t in ACTION_TEMPLATES} - {"wait1"})])
def test_a_word_is_one_token_wherever_it_stands(tokenizer, word):
    (one,) = ids(tokenizer, word)
    for before in ("", "the ", "(", "; ", "3: ", "\n", "\n\t", "-", "x=", "7"):
        for after in ("", " it", ")", ".", "\n", "9"):
            assert ids(tokenizer, before + word + after).count(one) == 1, (before, word, after)


text = st.text(st.sampled_from("ab Z(),.:;|=\n\t0189'-_é漢🙂")) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters=JOINER))


@given(text.filter(lambda t: not t.startswith(" ") and not any(token in t for token in (PAD, END, *ROLES.values()))))
def test_a_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_digits_stand_alone(tokenizer):
    tokens = [token.strip() for token in tokenizer.tokenize("it is 120 degrees, or 1200")]
    assert [token for token in tokens if re.search(r"\d", token)] == list("1201200")


def test_a_conversation_is_written_with_a_control_token_each(tokenizer):
    messages = [{"role": role, "content": f"the {role}"} for role in ROLES]
    written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written == "".join(f"{ROLES[m['role']]}{m['content']}{END}" for m in messages) + ROLES["assistant"]
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.eos_token == END and tokenizer.pad_token == PAD
    control = [tokenizer.convert_tokens_to_ids(token) for token in (*ROLES.values(), END)]
    assert [i for i in ids(tokenizer, written) if i in control] == [*(i for c in control[:3] for i in (c, control[3])), control[2]]


def test_the_same_texts_make_the_same_tokenizer():
    pytest.importorskip("transformers")
    one, two = (train_tokenizer(play_texts([]), 700).backend_tokenizer.to_str() for _ in range(2))
    assert one == two and len(re.findall(r"<0x[0-9A-F]{2}>", one)) >= 256
