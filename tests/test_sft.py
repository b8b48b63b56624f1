"Behaviour of exprag.sft: adapters, manifests, and run directories that survive a kill."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from exprag.samples import RECIPES, token_losses
from exprag.sft import (Manifest, RunReport, last_checkpoint, match_targets, model_fingerprint, prepare_model, read_losses, run_name,
                        torch_threads, train, training_arguments, training_manifest)
from exprag.trajectory import Task
from sft_fixtures import tiny_model, toy_samples

RECIPE = replace(RECIPES["nano"], name="test", autocast=False, max_steps=12, batch=4, micro_batch=2, warmup=2, dropout=0.1, save_steps=5, dev_steps=6)
HERE = Path(__file__).parent


def weights(report): return (report.adapter/"adapter_model.safetensors").read_bytes()
def losses(report): return [(line["step"], line["loss"], line["grad_norm"]) for line in report.losses]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(model_dir, tmp_path_factory):
    samples, dev = toy_samples(16), toy_samples(3, seed=1, start=100)
    return train(model_dir, samples, RECIPE, tmp_path_factory.mktemp("runs"), dev, progress=False, threads=1), samples, dev


def test_run_directory_holds_what_is_promised(run, model_dir):
    report, samples, dev = run
    assert {p.name for p in report.path.iterdir()} == {"recipe.json", "data.jsonl", "manifest.json", "losses.jsonl", "adapter", "report.json"}
    recipe = json.loads((report.path/"recipe.json").read_text())
    assert recipe["recipe"]["lr"] == RECIPE.lr and recipe["versions"]["peft"] and recipe["model_fingerprint"] == model_fingerprint(model_dir)
    data = [json.loads(line) for line in (report.path/"data.jsonl").read_text().splitlines()]
    assert [d["use"] for d in data] == ["train"] * 16 + ["dev"] * 3 and data[3]["supervised"] == samples[3].supervised
    assert report.steps == len(report.losses) == 12 and report.threads == 1 and report.seconds > 0
    assert report.supervised == sum(samples[i].supervised for line in report.losses for i in line["samples"])
    assert report.computed == sum(len(samples[i]) for line in report.losses for i in line["samples"]) <= report.padded
    assert [step for step, _ in report.dev_losses] == [0, 6, 12]
    assert report.manifest.tasks == tuple(sorted(s.task for s in [*samples, *dev]))


def test_the_first_loss_is_the_base_models(run, model_dir):
    from transformers import AutoModelForCausalLM
    report, samples, dev = run
    nats, count = token_losses(AutoModelForCausalLM.from_pretrained(model_dir), dev).sum(0)
    assert report.dev_losses[0][1] == pytest.approx(nats / count, rel=1e-5)


def test_adapter_loads_and_has_the_recorded_dev_loss(run, model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    report, _, dev = run
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), report.adapter)
    nats, count = token_losses(model, dev).sum(0)
    assert report.dev_losses[-1][1] == pytest.approx(nats / count, rel=1e-5)


def test_finished_is_reused_and_different_goes_elsewhere(run, model_dir, tmp_path):
    report, samples, dev = run
    before = (report.path/"report.json").stat().st_mtime_ns
    again = train(model_dir, samples, replace(RECIPE, name="test", save_steps=3), report.path.parent, dev, progress=False)
    assert again.reused and losses(again) == losses(report) and (report.path/"report.json").stat().st_mtime_ns == before
    names = {run_name(model_dir, s, r, d) for s, r, d in [
        (samples, RECIPE, dev), (samples[:-1], RECIPE, dev), (samples[::-1], RECIPE, dev), (samples, replace(RECIPE, lr=1e-4), dev),
        (samples, RECIPE, ()), (samples[:-1] + [replace(samples[-1], ids=samples[-1].ids[:-1] + (9,))], RECIPE, dev)]}
    assert len(names) == 6
    other = tiny_model(tmp_path/"other", seed=1)
    assert run_name(other, samples, RECIPE, dev) not in names
    with pytest.raises(FileNotFoundError, match="no finished run"): RunReport.read(tmp_path)


def test_training_does_not_depend_on_where_or_on_the_callers_random_state(run, model_dir, tmp_path):
    import torch
    report, samples, dev = run
    torch.manual_seed(7)
    state = torch.get_rng_state()
    other = train(model_dir, samples, RECIPE, tmp_path, dev, progress=False, threads=1)
    assert losses(other) == losses(report) and weights(other) == weights(report)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("micro", [1, 4])
def test_the_micro_batch_is_memory_not_mathematics(model_dir, tmp_path, micro):
    recipe = replace(RECIPE, dropout=0.0, max_steps=5)
    one, other = (train(model_dir, toy_samples(16), replace(recipe, micro_batch=m), tmp_path, progress=False, threads=1) for m in (2, micro))
    assert [l["loss"] for l in one.losses] == pytest.approx([l["loss"] for l in other.losses], rel=1e-4)
    assert [l["grad_norm"] for l in one.losses] == pytest.approx([l["grad_norm"] for l in other.losses], rel=1e-3)


KILLED = """
import sys
sys.path.insert(0, {here!r})
from test_sft import *
train({model!r}, toy_samples(16), {recipe}, {out!r}, toy_samples(3, seed=1, start=100), progress=False, threads=1)
"""
LONG = "replace(RECIPE, max_steps=28, save_steps=4)"


@pytest.mark.parametrize("lines", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_and_the_same_end(model_dir, tmp_path_factory, tmp_path, lines):
    samples, dev, recipe = toy_samples(16), toy_samples(3, seed=1, start=100), replace(RECIPE, max_steps=28, save_steps=4)
    path = tmp_path/run_name(model_dir, samples, recipe, dev)
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(here=str(HERE), model=model_dir, recipe=LONG, out=str(tmp_path))],
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while len(read_losses(path)) < lines and process.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
    finally: os.kill(process.pid, signal.SIGKILL); process.wait()
    assert process.returncode == -signal.SIGKILL and not (path/"report.json").exists()
    done, checkpoint = last_checkpoint(path)
    assert done > 0 and done % 4 == 0
    if lines == 12:  # the newest checkpoint was being written: it has no mark, so it does not count
        half = path/"checkpoints"/f"checkpoint-{done + 4}"; half.mkdir(exist_ok=True); (half/"adapter_model.safetensors").write_bytes(b"half")
        with open(path/"losses.jsonl", "a") as f: f.write('{"step": 9')
    resumed = train(model_dir, samples, recipe, tmp_path, dev, progress=False, threads=1)
    assert resumed.resumed_from == done and [l["step"] for l in resumed.losses] == list(range(1, 29))
    whole = train(model_dir, samples, recipe, tmp_path_factory.getbasetemp()/"whole", dev, progress=False, threads=1)
    assert losses(resumed) == losses(whole) and resumed.dev_losses == whole.dev_losses and weights(resumed) == weights(whole)
    assert not (path/"checkpoints").exists()


def test_a_target_that_matches_nothing_is_an_error_that_lists_what_there_is(model_dir):
    with pytest.raises(ValueError, match=r"'gate_up_proj' matches no module of LlamaForCausalLM.*down_proj.*q_proj"):
        prepare_model(model_dir, replace(RECIPE, targets=("q_proj", "gate_up_proj")))


def test_only_the_named_modules_are_adapted(model_dir):
    model = prepare_model(model_dir, replace(RECIPE, targets=("self_attn.q_proj", "v_proj"), r=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in n and (".q_proj." in n or ".v_proj." in n) for n in trained)
    found = match_targets(model.get_base_model(), replace(RECIPE, targets=("down_proj",)))
    assert [n.endswith("mlp.down_proj") for n in found["down_proj"]] == [True, True]


def test_bfloat16_and_checkpointing_run_here_too(model_dir, tmp_path):
    paper = replace(RECIPES["paper"], optimizer="adamw_torch", batch=4, max_steps=3)
    report = train(model_dir, toy_samples(8), paper, tmp_path, progress=False, threads=1)
    exact = train(model_dir, toy_samples(8), replace(paper, weights="float32", autocast=False, checkpointing=False), tmp_path, progress=False, threads=1)
    assert [l["loss"] for l in report.losses] == pytest.approx([l["loss"] for l in exact.losses], rel=0.02)


@pytest.mark.parametrize("there", [True, False])
def test_products_are_in_bfloat16_where_the_device_has_them(tmp_path, monkeypatch, there):
    monkeypatch.setattr("exprag.sft.has_bfloat16", lambda device: there)
    assert training_arguments(replace(RECIPES["nano"]), 3, tmp_path).bf16 is there and not training_arguments(RECIPE, 3, tmp_path).bf16


def test_the_8_bit_optimiser_needs_its_library(tmp_path):
    if __import__("importlib.util").util.find_spec("bitsandbytes"): pytest.skip("it is installed")
    with pytest.raises(ValueError, match="needs bitsandbytes.*adamw_torch"): training_arguments(RECIPES["paper"], 3, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(model_dir, tmp_path):
    with pytest.raises(FloatingPointError, match="loss of step .* is nan; lower lr"):
        train(model_dir, toy_samples(16), replace(RECIPE, lr=1e30, warmup=0, schedule="constant", max_grad_norm=1e30), tmp_path, progress=False)


def test_manifest_round_trip_and_faults(tmp_path):
    base = Manifest("pretraining", "base", (Task("toy", "a", "1", "train"),))
    made = Manifest("adapter", "x", (Task("w", "t", "10", "train"), Task("w", "t", "2", "train"), Task("w", "t", "2", "train")), ("b", "a"), (base,))
    assert [t.variation for t in made.tasks] == ["2", "10"] and made.contents == ("a", "b")
    assert Manifest.read(made.write(tmp_path)) == made == Manifest.read(tmp_path)
    with pytest.raises(ValueError, match="kind 'weights' is unknown"): Manifest("weights", "x")
    with pytest.raises(FileNotFoundError, match="not known; make it again"): Manifest.read(tmp_path/"nowhere.json")
    (tmp_path/"bad.json").write_text('{"kind": "index"}')
    with pytest.raises(ValueError, match="is not a manifest"): Manifest.read(tmp_path/"bad.json")


def test_a_manifest_names_the_experience_too_and_inherits(model_dir, tmp_path):
    sample = toy_samples(1)[0]
    other = Task("toy", "fly", "3", "train")
    made = training_manifest("x", [replace(sample, experience_ids=("e",), experience_tasks=(other,))], model_dir)
    assert made.tasks == tuple(sorted([sample.task, other])) and "e" in made.contents and not made.parents[0].known
    own = tiny_model(tmp_path/"own")
    before = model_fingerprint(own)
    Manifest("pretraining", "own", (other,)).write(own)
    assert training_manifest("x", [sample], own).parents[0].tasks == (other,)
    assert model_fingerprint(own) == before


def test_threads_are_set_and_put_back():
    import torch
    before = torch.get_num_threads()
    with torch_threads(before + 1) as used: assert used == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_importing_is_light():
    code = "import sys, exprag.sft, exprag.samples; print([m for m in ('torch', 'transformers', 'peft', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_kill_between_the_last_step_and_the_report(run, model_dir, tmp_path, monkeypatch):
    import exprag.sft
    report, samples, dev = run
    def killed(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(exprag.sft, "finish_run", killed)
        with pytest.raises(KeyboardInterrupt): train(model_dir, samples, RECIPE, tmp_path, dev, progress=False, threads=1)
    resumed = train(model_dir, samples, RECIPE, tmp_path, dev, progress=False, threads=1)
    assert resumed.resumed_from == 12 and losses(resumed) == losses(report) and weights(resumed) == weights(report) and resumed.dev_losses == report.dev_losses


SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
FAMILIES = {
    "Qwen2": dict(SMALL), "Mistral": dict(SMALL),
    "Gemma3": dict(text_config=dict(SMALL, head_dim=16, sliding_window=64), vision_config=VISION, mm_tokens_per_image=4, image_token_index=120, boi_token_index=121, eoi_token_index=122),
    "Mistral3": dict(text_config=dict(SMALL, model_type="ministral3", head_dim=16), vision_config=dict(VISION, model_type="pixtral", num_channels=3, head_dim=16), image_token_index=120)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_targets_and_our_loss_on_the_papers_families(family, tmp_path):
    import torch
    import transformers
    from exprag.samples import collate
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    auto = transformers.AutoModelForCausalLM if family != "Mistral3" else transformers.AutoModelForImageTextToText
    auto.from_config(config).save_pretrained(tmp_path/"model")
    recipe, samples = replace(RECIPE, targets=RECIPES["paper"].targets, max_steps=2), toy_samples(8, vocabulary=110)
    assert train(tmp_path/"model", samples, recipe, tmp_path, progress=False, threads=1).steps == 2
    model = prepare_model(tmp_path/"model", recipe)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 16 and not any("vision" in n for n in trained)
    nats, count = token_losses(model, samples[:2]).sum(0)
    data = collate(samples[:2]); data.pop("logits_to_keep")
    with torch.no_grad(): assert float(model.eval()(**data).loss) == pytest.approx(nats / count, rel=1e-4)


def test_a_model_that_is_registered_as_one_that_sees_can_be_trained_and_can_act(tmp_path):
    import torch
    from chat_models import make_tokenizer
    from exprag.agent import HFPolicy
    from exprag.prompt import PromptFormat
    from exprag.trajectory import Trajectory
    from transformers import AutoModelForImageTextToText, Mistral3Config
    tokenizer, settings = make_tokenizer("ministral"), FAMILIES["Mistral3"]
    size = len(tokenizer) + 1  # the last token stands for an image
    text = dict(settings["text_config"], vocab_size=size, max_position_embeddings=2048)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(Mistral3Config(**{**settings, "text_config": text, "image_token_index": size - 1})).save_pretrained(tmp_path/"model")
    tokenizer.save_pretrained(tmp_path/"model")
    samples = toy_samples(8)
    report = train(tmp_path/"model", samples, replace(RECIPE, lr=1e-2, max_steps=6), tmp_path, samples[:2], progress=False, threads=1)
    bare, trained = (HFPolicy.from_pretrained(str(tmp_path/"model"), adapter, format=PromptFormat("Act.", ()), device="cpu", max_new_tokens=4)
                     for adapter in (None, report.adapter))
    measured = [nats / count for nats, count in (token_losses(policy.model, samples[:2]).sum(0) for policy in (bare, trained))]
    assert measured == pytest.approx([report.dev_losses[0][1], report.dev_losses[-1][1]], rel=1e-4) and measured[1] < 0.99 * measured[0]
    action, = trained.act([Trajectory(Task("toy", "walk", "0", "test"), "walk", "You see a door.")])
    assert 1 <= action.tokens_out <= 4 and action.stop != "context"


SHARED = """
import sys
sys.path.insert(0, {here!r})
from test_sft import *
if __name__ == "__main__": train({model!r}, toy_samples(16), replace(RECIPE, dropout=0.0, micro_batch=1), {out!r}, progress=False, threads=1)
"""


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(model_dir, tmp_path):
    (tmp_path/"run.py").write_text(SHARED.format(here=str(HERE), model=model_dir, out=str(tmp_path/"two")))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path/"run.py")], check=True,
                   timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one = train(model_dir, toy_samples(16), replace(RECIPE, dropout=0.0, micro_batch=1), tmp_path/"one", progress=False, threads=1)
    two = RunReport.read(tmp_path/"two"/one.path.name)
    assert [l["loss"] for l in two.losses] == pytest.approx([l["loss"] for l in one.losses], rel=1e-4)
