"Model families by the structure of their real templates: what is trained on is what is acted on, and no thought is an action."
from dataclasses import replace

import pytest
from chat_models import FAMILIES, QWEN, QWEN3, make_model, make_tokenizer
from echo import FORMAT, TASKS, Recall, play

from exprag.models.local import HFPolicy
from exprag.models.templates import TEMPLATES, answer_of, encoder_for, read_template
from exprag.prompt import PromptEncoder, PromptError

SILENT = {"enable_thinking": False}
EMPTY = "<think>\n\n</think>\n\n"


def policy_of(family, **settings):
    tokenizer = make_tokenizer(family)
    return HFPolicy(make_model(family, len(tokenizer)), tokenizer, FORMAT, **({"max_new_tokens": 6, "batch_size": 2} | settings))


class Spy:
    "Keeps the tokens of each prompt that a policy answers."
    def __init__(self, policy):
        self.seen, write = [], policy.writer.write
        def written(drafts):
            write(drafts)
            self.seen += [d.prompt for d in drafts.values()]
        policy.writer.write = written


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "qwen3"])
def test_training_reads_and_learns_what_acting_read_and_wrote(family):
    policy = policy_of(family)
    spy = Spy(policy)
    memory, end = Recall(), policy.encoder.end_of_turn
    for episode in play(policy, TASKS[:6], memory).values():
        shown = memory.recall(episode).experiences
        sample = policy.encoder.encode(episode, shown)
        prompts = [prompt for prompt in spy.seen if sample.ids[:len(prompt)] == prompt]
        assert len(prompts) >= len(episode), "every prompt of the episode is the beginning of the sample"
        for n, step in enumerate(episode.steps):
            before = policy.encoder.prompt(replace(episode, steps=episode.steps[:n]), shown)
            ours = policy.encoder.action(step.action)
            assert sample.ids[len(before):len(before) + len(ours)] == ours and ours[-1] == end
            assert sample.mask[len(before):len(before) + len(ours)] == [1] * len(ours) and not sample.mask[len(before) - 1]
        assert sum(sample.mask) == sum(len(policy.encoder.action(s.action)) for s in episode.steps)


def test_qwen3s_own_template_is_refused_and_ours_is_taken():
    tokenizer = make_tokenizer("qwen3")
    for settings in ({}, SILENT, {"enable_thinking": True}):
        with pytest.raises(PromptError, match="prefix-stable"): PromptEncoder(tokenizer, **settings)
    encoder = encoder_for(tokenizer)
    assert encoder.frame == PromptEncoder(tokenizer, chat_template=TEMPLATES["qwen3"]).frame and encoder.frame.ask.endswith(EMPTY)
    assert encoder_for(tokenizer, settings=SILENT).frame == encoder.frame
    with pytest.raises(PromptError, match="prefix-stable"): encoder_for(tokenizer, settings={"enable_thinking": True})


def test_ours_writes_before_each_action_what_qwen3s_own_writes_there():
    tokenizer = make_tokenizer("qwen3")
    encoder, made = encoder_for(tokenizer, FORMAT), play(policy_of("qwen3"), TASKS[:6])
    for episode in made.values():
        messages = encoder.format.messages(episode)
        for n in range(2, len(messages) + 1, 2):
            own = tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True, **SILENT)
            text = tokenizer.decode(encoder.prompt(replace(episode, steps=episode.steps[:n // 2 - 1])))
            assert text.replace(EMPTY, "") == own.replace(EMPTY, "") and text.endswith(EMPTY) and own.endswith(EMPTY)
            assert text.count(EMPTY) == n // 2 and own.count(EMPTY) == 1
            if n == 2: assert text == own


def test_empty_thoughts_are_read_and_not_learnt():
    encoder = encoder_for(make_tokenizer("qwen3"), FORMAT)
    thinks = set(encoder.tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    episode = play(policy_of("qwen3"), [t for t in TASKS if t.type == "t2"][:1]).popitem()[1]
    ids, mask = encoder.encode(episode)
    assert sum(i in thinks for i in ids) == 2 * len(episode) and not any(m for i, m in zip(ids, mask) if i in thinks)


def test_other_rewriting_templates_stay_refused():
    tokenizer = make_tokenizer("qwen3", QWEN3.replace("<|im_start|>", "<|im_start|>the "))
    with pytest.raises(PromptError, match="prefix-stable"): encoder_for(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="no chat template"): encoder_for(tokenizer)
    assert encoder_for(tokenizer, chat_template="qwen3").frame.ask.endswith(EMPTY)


def test_a_template_is_given_by_name_file_or_text(tmp_path):
    (tmp_path / "mine.jinja").write_text(QWEN)
    assert read_template("qwen3") == TEMPLATES["qwen3"] and read_template(QWEN) == QWEN and read_template(None) is None
    assert read_template(str(tmp_path / "mine.jinja")) == QWEN
    with pytest.raises(PromptError, match="'mine.jinja' is no file .* none of ours .qwen3."): read_template("mine.jinja")
    given, own = policy_of("qwen3", chat_template=str(tmp_path / "mine.jinja")), policy_of("qwen3")
    assert given.encoder.frame == policy_of("qwen").encoder.frame != own.encoder.frame
    assert given.describe()["prompt"] != own.describe()["prompt"]


def test_settings_reach_the_template():
    style = QWEN.replace("{%- for message in messages %}", "{{- style }}{%- for message in messages %}", 1)
    policy = policy_of("qwen", chat_template=style, template_settings={"style": "brief"})
    assert "brief" in policy.encoder.frame.between


@pytest.mark.parametrize("wrong, right", [("constrian", "constrain"), ("max_contxt", "max_context"), ("batchsize", "batch_size"), ("template_setings", "template_settings")])
def test_a_misspelt_setting_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"unknown setting of a policy '{wrong}'; did you mean '{right}'"): policy_of("qwen", **{wrong: 1})
    with pytest.raises(ValueError, match="unknown setting of a policy 'enable_thinking'.*template_settings"): policy_of("qwen", enable_thinking=False)
    with pytest.raises(ValueError, match="did you mean 'dtype'"): HFPolicy.from_pretrained("nano", dtpye="bfloat16")


@pytest.mark.parametrize("written, action", [
    ("open door", ("open door", "end")), ("  open door \nlook", ("open door", "end")), ("", ("", "end")),
    ("<think>\nI see\na door.\n</think>\n\nopen door\nlook", ("open door", "end")), ("I see.</think>\nopen door", ("open door", "end")),
    ("<think>\n\n</think>\n\nopen door", ("open door", "end")), ("[THINK]hm[/THINK]open door", ("open door", "end")),
    ("<think>\nI see a door and", ("", "length")), ("<think>", ("", "length")), ("<think>a</think><think>b</think>go", ("go", "end"))])
def test_no_thought_becomes_an_action(written, action): assert answer_of(written) == action


def test_a_model_that_wants_to_think_acts_all_the_same():
    import torch
    policy = policy_of("qwen3")
    think, = policy.tokenizer.convert_tokens_to_ids(["<think>"])
    with torch.no_grad(): policy.model.lm_head.weight[think] *= 0
    head = policy.model.lm_head.forward
    def eager(hidden):
        logits = head(hidden)
        logits[..., think] = logits.max() + 100
        return logits
    policy.model.lm_head.forward = eager
    actions = [step.action for e in play(policy, TASKS[:3]).values() for step in e.steps]
    assert actions and all(actions) and not any("think" in a for a in actions)


def test_letters_that_spell_a_thought_are_taken_out_in_the_process_and_behind_a_server(monkeypatch):
    from types import SimpleNamespace as Fake
    from exprag.models.server import _read_completion
    policy = policy_of("qwen")
    def thinking(drafts):
        for draft in drafts.values(): draft.text, draft.stop = "<think>the door</think>open door\n", "newline"
    monkeypatch.setattr(policy.writer, "write", thinking)
    from exprag.trajectory import Trajectory
    action, = policy.act([Trajectory(TASKS[0], "goal", "a door")])
    assert (action.text, action.stop) == ("open door", "newline")
    def said(text, reason="stop"): return _read_completion(Fake(choices=[Fake(message=Fake(content=text), finish_reason=reason)], usage=None))
    assert said("<think>\nthe door\n</think>\n\nopen door").text == "open door" and said("open door\nlook").stop == "end"
    assert (said("<think>").text, said("<think>").stop) == ("", "length") and said("open", "length").stop == "length"
