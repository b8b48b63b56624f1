"A training set in TRL's forms: same ids, same targets, same loss."
import json
from dataclasses import replace

import pytest

from chat_models import FAMILIES, make_tokenizer
from exprag.models.export import export_trl, training_template
from exprag.prompt import PromptEncoder, PromptError
from exprag.samples import IGNORED, make_samples, token_losses
from exprag.select import Selection
from exprag.views import Experience
from sft_fixtures import episodes, tiny_model


class Fixed:
    "Always the same experience."
    def recall(self, trajectory): return Selection((Experience(episodes(1, start=70, seed=3)[0]),))


def rows(folder): return [json.loads(line) for line in (folder/"train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("memory", [None, Fixed()], ids=["plain", "combined"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_read_back_are_our_samples_in_the_templates_of_the_families(family, memory, tmp_path):
    encoder, some = PromptEncoder(make_tokenizer(family)), episodes(3)
    samples = make_samples(some, encoder, memory)
    assert [(tuple(r["input_ids"]), tuple(x for x in r["labels"] if x != IGNORED)) for r in rows(export_trl(tmp_path/"t", some, encoder, memory, "tokens"))] \
        == [(s.ids, s.targets) for s in samples]
    folder = export_trl(tmp_path/"m", some, encoder, memory)
    template = (folder/"template.jinja").read_text()
    for row, t, s in zip(rows(folder), some, samples):
        assert [m["content"] for m in row["messages"] if m["role"] == "assistant"] == list(t.actions) and row["messages"][-1]["role"] == "assistant"
        read = encoder.tokenizer.apply_chat_template(row["messages"], chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert (tuple(read["input_ids"]), tuple(read["assistant_masks"])) == (s.ids, s.mask)


def test_what_would_become_a_control_token_is_refused_as_a_conversation(tmp_path):
    encoder, (t,) = PromptEncoder(make_tokenizer("qwen")), episodes(1)
    odd = replace(t, goal="Say <|im_end|> twice.")
    with pytest.raises(PromptError, match=r"find-plant/0@train: tokenised as one text.*im_end.*form='tokens'"): export_trl(tmp_path, [odd], encoder)
    assert not (tmp_path/"train.jsonl").exists() and rows(export_trl(tmp_path, [odd], encoder, form="tokens"))
    with pytest.raises(ValueError, match="unknown form of a data set for TRL 'message'; did you mean 'messages'"): export_trl(tmp_path, [t], encoder, form="message")


@pytest.mark.parametrize("form", ["messages", "tokens"])
def test_the_loss_in_trl_is_ours(form, tmp_path):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    from datasets import load_dataset
    from exprag.models.local import HFPolicy
    from exprag.sft import load_tokenizer, model_path
    place = model_path("nano")
    policy, some = HFPolicy.from_pretrained("nano"), episodes(1)
    nats, count = token_losses(policy.model, make_samples(some, policy.encoder, Fixed())).sum(0)
    folder = export_trl(tmp_path/"data", some, policy.encoder, Fixed(), form)
    how = dict(assistant_only_loss=True, chat_template_path=str(folder/"template.jinja")) if form == "messages" else {}
    args = trl.SFTConfig(str(tmp_path/"out"), max_length=8192, max_steps=1, per_device_train_batch_size=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
                         save_strategy="no", disable_tqdm=True, dataset_num_proc=None, **how)
    trainer = trl.SFTTrainer(place, args=args, train_dataset=load_dataset(str(folder), split="train", cache_dir=str(tmp_path/"cache")), processing_class=load_tokenizer(place))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(nats / count, rel=1e-4)
