"""Symbol tuning: other words for the commands, the same everywhere in a sample, and nothing else changed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprag.models.loading import find_model
from exprag.models.templates import encoder_for
from exprag.samples import fit_samples, make_samples
from exprag.select import Selection
from exprag.sft import load_tokenizer
from exprag.symbols import WORDS, SymbolEncoder
from exprag.trajectory import Step, Task, Trajectory
from exprag.views import Experience

ACTIONS = ("go to desk 1", "take mug 1 from desk 1", "go to shelf 1", "move mug 1 to shelf 1")


def episode(i, actions=ACTIONS, world="alfworld"):
    return Trajectory(Task(world, "pick_and_place_simple", str(i), "train"), f"Your task is to: put mug {i} on shelf.", "A room. You take a look.",
                      tuple(Step(a, f"You {a}.") for a in actions), 1.0, True)


@pytest.fixture(scope="module")
def encoder(): return encoder_for(load_tokenizer(find_model("nano")))


def text(encoder, ids): return encoder.tokenizer.decode(list(ids))


def put(line, words):
    verb, space, rest = line.partition(" ")
    return words[verb] + space + rest


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), i=st.integers(1, 9))
def test_list_experience_and_demonstration_have_the_same_words(encoder, seed, i):
    one, other = episode(i), episode(i + 1)
    tuned = SymbolEncoder(encoder, 1.0, seed)
    words, made = tuned.words_for(one, [other]), tuned.encode(one, [other])
    listed = encoder.format.action_templates("alfworld", one.settings)
    assert len(set(words.values())) == len(words) and not set(words.values()) & set(words) and set(words.values()) <= set(WORDS)
    written = text(encoder, [t for t, m in zip(*made) if m])
    assert all(put(a, words) in written for a in ACTIONS) and not any(a in written for a in ACTIONS), "the targets are the new words"
    before = text(encoder, [t for t, m in zip(*made) if not m])
    assert all(f"> {put(a, words)} | You {a}." in before for a in ACTIONS), "experience: other words, the same observations"
    assert "; ".join(sorted(put(line, words) for line in listed)) in before and "; ".join(listed) not in before
    assert all(f"You {a}." in before for a in ACTIONS[:-1])


def test_an_episode_is_changed_by_chance_whoever_else_is_there(encoder):
    several = [episode(i) for i in range(60)]
    words = [SymbolEncoder(encoder, 0.5, 3).words_for(t) for t in several]
    assert [SymbolEncoder(encoder, 0.5, 3).words_for(t) for t in reversed(several)] == words[::-1]
    assert 15 < sum(map(bool, words)) < 45
    fewer = [SymbolEncoder(encoder, 0.2, 3).words_for(t) for t in several]
    assert 0 < sum(map(bool, fewer)) < sum(map(bool, words)) and all(b for a, b in zip(fewer, words) if a), "a larger share changes more, not others"
    kept = [t for t, w in zip(several, words) if not w]
    assert all(SymbolEncoder(encoder, 0.5, 3).encode(t, several[:1]) == encoder.encode(t, several[:1]) for t in kept)
    assert not any(SymbolEncoder(encoder, 0.0, 3).words_for(t) for t in several)


def test_words_are_none_of_the_commands_at_hand(encoder):
    there = episode(1, (f"{WORDS[0]} it", f"{WORDS[1]} it"))
    for seed in range(30): assert not {WORDS[0], WORDS[1]} & set(SymbolEncoder(encoder, 1.0, seed).words_for(episode(2), [there]).values())
    with pytest.raises(ValueError, match="give more words"): SymbolEncoder(encoder, 1.0, words=("a", "b")).encode(episode(1))
    with pytest.raises(ValueError, match="share is -0.1"): SymbolEncoder(encoder, -0.1)


def test_a_command_that_only_the_experience_has_gets_a_word_too(encoder):
    other = episode(2, ("warm mug 1 with oven 1",))
    tuned = SymbolEncoder(encoder, 1.0)
    words = tuned.words_for(episode(1), [other])
    assert f"> {words['warm']} mug 1 with oven 1" in text(encoder, tuned.encode(episode(1), [Experience(other)]).ids)


def test_the_encoder_of_others_is_not_changed(encoder):
    before = encoder.encode(episode(1), [episode(2)])
    SymbolEncoder(encoder, 1.0).encode(episode(1), [episode(2)])
    assert encoder.encode(episode(1), [episode(2)]) == before


class Remembers:
    def recall(self, trajectory): return Selection((Experience(episode(99)),))


def test_each_group_of_samples_may_have_its_encoder(encoder):
    several = [episode(i) for i in range(12)]
    made = fit_samples(several, {"plain": encoder, "tuned": SymbolEncoder(encoder, 1.0)}, {"plain": Remembers(), "tuned": Remembers()}, 10_000)
    assert list(made["plain"]) == make_samples(several, encoder, Remembers())
    assert [s.source for s in made["plain"]] == [s.source for s in made["tuned"]] and all(a.ids != b.ids for a, b in zip(made["plain"], made["tuned"]))
    assert all(s.experience_ids == (episode(99).id,) for s in made["tuned"]), "provenance is that of the episodes themselves"
