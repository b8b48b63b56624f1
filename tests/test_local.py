"HFPolicy: the same actions however they are computed, counted, constrained and kept in their context."
import pytest
import torch
from chat_models import FAMILIES
from echo import (
    CAPS, FORMAT, REFUSAL, TASKS, Echo, Recall, play, policy_of)

from exprag.agent import Action, Limits, PolicyError, rollout
from exprag.models.decoding import Draft
from exprag.models.local import PolicyOptions, just_refused
from exprag.prompt import PromptFormat
from exprag.trajectory import Step, Task, Trajectory
from exprag.world import load_world


def actions(run): return {task: episode.actions for task, episode in run.items()}


def test_same_actions_cached_uncached_alone_and_in_a_batch():
    ways = {"batch": {}, "alone": {"batch_size": 1}, "uncached": {"batch_size": 1, "cache": False}}
    runs = {name: play(policy_of(**way), TASKS, Recall()) for name, way in ways.items()}
    did = {name: [run[task].actions for task in TASKS] for name, run in runs.items()}
    assert len(TASKS) >= 50 and did["batch"] == did["alone"] == did["uncached"]
    assert len({a for episode in did["batch"] for a in episode}) > 50, "actions differ"
    cost = {name: {k: sum(t.provenance["tokens"][k] for t in run.values()) / len(TASKS)
                   for k in ("prompt", "computed", "generated")} for name, run in runs.items()}
    assert cost["batch"] == cost["alone"] and cost["batch"]["prompt"] == cost["uncached"]["prompt"]
    assert cost["batch"]["computed"] < 0.7 * cost["uncached"]["computed"]
    assert cost["uncached"]["computed"] >= cost["uncached"]["prompt"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_in_a_batch_of_three(family):
    ways = {"batch_size": 3}, {"batch_size": 1, "cache": False}
    together, alone = (play(policy_of(family, **way), TASKS[:7]) for way in ways)
    assert actions(together) == actions(alone)


def test_close_calls_are_computed_again_alone():
    policy = policy_of(close_call=1.0)  # every choice: all answers are the model's own, from nothing
    assert actions(play(policy, TASKS[:6])) == actions(play(policy_of(), TASKS[:6]))
    assert policy.writer.close_calls > 0


def test_constrained_actions_fit_the_templates():
    format = PromptFormat("Act.", templates=("open OBJ", "move OBJ to OBJ", "look around"))
    settings = {"format": format, "constrain": "templates", "max_new_tokens": 16}
    runs = [actions(play(policy_of(**settings, batch_size=n), TASKS[:8])) for n in (4, 1)]
    assert runs[0] == runs[1]
    did = [a for episode in runs[0].values() for a in episode]
    assert all(a.startswith(("open ", "move ", "look around")) for a in did) and "look around" in did
    with pytest.raises(PolicyError, match="there are None .* and 'templates'"):
        policy_of(constrain="grammar")
    with pytest.raises(PolicyError, match="'templates'"): PolicyOptions(constrain="grammar")


def test_answers_are_one_line_and_counted():
    action, = policy_of().act([Trajectory(TASKS[0], "open door", "You see a door.")])
    assert isinstance(action, Action)
    assert "\n" not in action.text and action.text == action.text.strip()
    assert action.stop in ("end", "newline", "length") and 1 <= action.tokens_out <= 6
    assert action.tokens_in <= action.tokens_computed <= action.tokens_in + action.tokens_out


def test_more_episodes_than_rows_take_turns():
    policy = policy_of(batch_size=2)
    episodes = [Trajectory(t, f"goal {t.variation}", "look") for t in TASKS[:5]]
    first = [a.text for a in policy.act(episodes)]
    alone = [policy_of(batch_size=1).act([e])[0].text for e in episodes]
    assert first == alone == [a.text for a in policy.act(episodes)]
    twins = policy.act([episodes[0]] * 2)
    assert twins[0].text == twins[1].text == alone[0]
    with pytest.raises(PolicyError, match="one of each"): policy.act(episodes, keys=[1, 2, 3, 4, 4])


def test_an_episode_too_long_ends_and_the_others_go_on():
    long, short = Task("echo", "t2", "0", "test"), Task("echo", "t0", "0", "test")
    class Wordy(Echo):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation + (" door" * 300 if self.task == long else ""), *rest
    policy, limits = policy_of(max_context=150), Limits({"t2": 5, "t0": 1})
    done = {t.task: t for t in rollout(policy, Wordy, [long, short], limits=limits)}
    assert done[long].provenance["stop"] == "context"
    assert len(done[long]) == 1 and done[long].success is False
    assert done[short].provenance["stop"] == "cap" and len(done[short]) == CAPS["t0"]


def ids_of(policy, *texts):
    "The first token of each text."
    read = policy.encoder.tokenizer
    return [read(text, add_special_tokens=False)["input_ids"][0] for text in texts]


def logits_of(policy, *tokens):
    "Logits that prefer these tokens, the first most."
    logits = torch.zeros(policy.model.config.vocab_size)
    for value, token in zip((9.0, 8.0, 7.0), tokens): logits[token] = value
    return logits


def test_an_action_is_not_empty():
    policy = policy_of(batch_size=1)
    end, (newline, wanted) = policy.tokenizer.eos_token_id, ids_of(policy, "\n", "look")
    logits = logits_of(policy, end, newline, wanted)
    assert policy.writer.best(Draft([1], logits, 1, None), logits)[0] == wanted
    begun = Draft([1], logits, 1, None, [wanted], "look")
    assert policy.writer.best(begun, logits) == (end, 1.0)


def test_an_action_does_not_end_as_one_to_be_avoided():
    policy = policy_of(batch_size=1)
    end, (newline, look, more) = policy.tokenizer.eos_token_id, ids_of(policy, "\n", "look", " door")
    logits = logits_of(policy, end, newline, more)
    def next_token(avoid):
        draft = Draft([1], logits, 1, None, [look], "look", avoid=frozenset({avoid}))
        return policy.writer.best(draft, logits)[0]
    assert next_token("look") == more and next_token("look door") == end


CHOICES = ("Ambiguous request: Please enter the number for the action you intended (or blank to "
           "cancel):\n0:\ta\n1:\tb")


def test_rejected_actions_are_avoided_and_questions_answered():
    careful, plain = policy_of(avoid_rejected=True, batch_size=2), policy_of(batch_size=1)
    assert careful.describe()["avoid_rejected"] and not plain.describe()["avoid_rejected"]
    now = begun = Trajectory(Task("scienceworld", "boil", "0", "train"), "open door", "A door.")
    assert careful.act([begun.with_step(Step("open door", CHOICES))])[0].text in ("0", "1")
    said = []
    for _ in range(6):
        said.append(careful.act([now], keys=[0])[0].text)
        now = now.with_step(Step(said[-1], REFUSAL))
    assert len(set(said)) == 6, "no action comes twice"
    assert said[0] == plain.act([begun])[0].text, "the first is the model's own"
    assert just_refused(now) == set(said)
    assert just_refused(now.with_step(Step("wait", "You wait."))) == frozenset()
    unknown = Trajectory(TASKS[0], "", "", (Step("a", REFUSAL),))
    assert just_refused(unknown) == frozenset()


@pytest.mark.parametrize("grammar", ["move", "put"])
def test_templates_are_in_the_dialect_of_the_environment(grammar):
    house = Trajectory(Task("alfworld", "pick_and_place_simple", "here", "test"), "put a mug",
                       "A room.", settings={"grammar": grammar})
    held = [policy_of(format=format, constrain="templates").draft(0, house, ()).templates
            for format in (PromptFormat(), FORMAT)]
    assert held == [load_world("alfworld").action_templates({"grammar": grammar}), ()]


def test_a_constrained_policy_may_answer_a_question():
    task = Task("scienceworld", "grow-plant", "0", "test")
    policy, begun = policy_of(constrain="templates"), Trajectory(task, "grow", "a greenhouse")
    question = begun.with_step(Step(
        "move seed to pot", "Ambiguous request: Please enter the number (or blank to cancel):\n0:\t"
        "move seed (in jar)\n1:\tmove seed (in pot)\n"))
    answered = question.with_step(Step("0", "You move the seed. 3:\tno question"))
    listed, asked, after = (policy.draft(0, t, ()).templates for t in (begun, question, answered))
    assert asked == (*listed, "0", "1") and after == listed
