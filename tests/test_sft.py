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

from exprag.samples import CONFIGS, token_losses
from exprag.audit import Manifest
from exprag.sft import (
    RunReport, _last_checkpoint, _read_losses, has_bfloat16, match_targets, model_fingerprint, prepare_model,
    run_name, torch_threads, train, training_arguments, training_manifest)
from exprag.trajectory import Task, alone_in
from sft_fixtures import tiny_model, toy_samples

CONFIG = replace(CONFIGS["nano"], name="test", autocast=False, max_steps=12, batch=4, micro_batch=2, warmup=2, dropout=0.1, save_steps=5, dev_steps=6)
HERE = Path(__file__).parent


def weights(report): return (report.adapter/"adapter_model.safetensors").read_bytes()
def losses(report): return [(line["step"], line["loss"], line["grad_norm"]) for line in report.losses]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(model_dir, tmp_path_factory):
    samples, dev = toy_samples(16), toy_samples(3, seed=1, start=100)
    return train(model_dir, samples, CONFIG, tmp_path_factory.mktemp("runs"), dev, progress=False, threads=1), samples, dev


def test_run_directory_holds_what_is_promised(run, model_dir):
    report, samples, dev = run
    assert {p.name for p in report.path.iterdir()} == {"config.json", "runtime.json", "data.jsonl", "manifest.json", "losses.jsonl", "adapter", "report.json"}
    config, (runtime,) = (json.loads((report.path/name).read_text()) for name in ("config.json", "runtime.json"))
    assert config["config"]["lr"] == CONFIG.lr and config["model_fingerprint"] == model_fingerprint(model_dir) and set(config) == {"config", "model", "model_fingerprint"}
    assert runtime["versions"]["peft"] and (runtime["threads"], runtime["device"]) == (1, "cpu") and isinstance(runtime["bfloat16"], bool)
    data = [json.loads(line) for line in (report.path/"data.jsonl").read_text().splitlines()]
    assert [d["use"] for d in data] == ["train"] * 16 + ["dev"] * 3 and data[3]["supervised"] == samples[3].supervised
    assert report.steps == len(report.losses) == 12 and report.threads == 1 and report.seconds > 0
    assert report.supervised == sum(samples[i].supervised for line in report.losses for i in line["samples"])
    assert report.computed == sum(len(samples[i]) for line in report.losses for i in line["samples"]) <= report.padded
    assert [step for step, _ in report.dev_losses] == [0, 6, 12]
    assert report.manifest.tasks == tuple(sorted(s.task for s in [*samples, *dev]))


def test_two_trainings_of_one_run_do_not_write_over_each_other(run, model_dir, tmp_path):
    """The second is told to wait, and changes nothing; a finished run is read whoever holds it."""
    report, samples, dev = run
    path = tmp_path/report.path.name
    with alone_in(path), pytest.raises(BlockingIOError, match=f"another process is at work in {path}"):
        train(model_dir, samples, CONFIG, tmp_path, dev, progress=False, threads=1)
    assert list(path.iterdir()) == []
    with alone_in(report.path): assert train(model_dir, samples, CONFIG, report.path.parent, dev).reused


def test_a_processor_says_whether_it_has_bfloat16(monkeypatch):
    import torch
    for there in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there)
        assert has_bfloat16() is there and has_bfloat16("cpu") is there


def adapter_bytes(folder): return (folder/"adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def with_epochs(model_dir, tmp_path_factory):
    "16 samples in steps of 4: epochs end at 4, 8, 12."
    return train(model_dir, toy_samples(16), replace(CONFIG, keep_epochs=(1, 2)), tmp_path_factory.mktemp("epochs"), toy_samples(3, seed=1, start=100),
                 progress=False, threads=1)


def test_adapters_are_kept_at_the_end_of_epochs_and_nothing_else_changes(run, with_epochs, model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    report, samples, dev = run
    assert with_epochs.path.name == report.path.name and losses(with_epochs) == losses(report) and weights(with_epochs) == weights(report)
    assert with_epochs.epochs == {1: 4, 2: 8, 3: 12} and report.epochs == {3: 12} and report.adapters == {3: report.adapter}
    assert [p.name for p in with_epochs.adapters.values()] == ["1", "2", "adapter"] and len({adapter_bytes(p) for p in with_epochs.adapters.values()}) == 3
    assert [step for step, _ in with_epochs.dev_losses] == [0, 4, 6, 8, 12], "a dev loss at the end of every kept epoch"
    for epoch, folder in with_epochs.adapters.items():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder)
        nats, count = token_losses(model, dev).sum(0)
        assert with_epochs.epoch_losses[epoch] == pytest.approx(nats / count, rel=1e-5)
        manifest = Manifest.read(folder)
        assert (manifest.tasks, manifest.contents, manifest.parents) == (report.manifest.tasks, report.manifest.contents, report.manifest.parents)
        assert manifest.name == report.path.name + ("" if epoch == 3 else f", epoch {epoch}")


def test_an_epoch_that_a_run_did_not_keep_is_refused_with_the_way_out(run, with_epochs, model_dir):
    report, samples, dev = run
    def again(keep, of=report): return train(model_dir, samples, replace(CONFIG, keep_epochs=keep), of.path.parent, dev, progress=False)
    assert again((3,)).reused and again((2,), with_epochs).reused and again("all", with_epochs).adapters == with_epochs.adapters
    for keep, named in (((1, 3), "1"), ("all", "1, 2")):
        with pytest.raises(ValueError, match=rf"past the end of epoch {named} and did not keep its adapter \(kept: 3\).*keep_epochs.*remove"): again(keep)
    with pytest.raises(ValueError, match="names epoch 4, and with max_steps=12, batch=4 and 16 samples only 3 end"): again((4,))


def test_a_run_under_way_does_not_give_epochs_that_it_passed(model_dir, tmp_path, monkeypatch):
    import exprag.sft
    def killed(*args, **facts): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(exprag.sft, "_finish_run", killed)
        with pytest.raises(KeyboardInterrupt): train(model_dir, toy_samples(16), CONFIG, tmp_path, progress=False, threads=1)
    with pytest.raises(ValueError, match="past the end of epoch 1, 2, 3 and did not keep its adapter .kept: none"):
        train(model_dir, toy_samples(16), replace(CONFIG, keep_epochs="all"), tmp_path, progress=False, threads=1)


def test_the_names_of_earlier_runs_stay(monkeypatch):
    monkeypatch.setattr("exprag.sft.model_fingerprint", lambda model: "f" * 32)
    paper = replace(CONFIGS["paper"], window=8, optimizer="adamw_torch", dropout=0.0)
    assert [run_name("nano", toy_samples(8), c, toy_samples(2, seed=1, start=100)) for c in (CONFIGS["nano"], paper)] == ["nano-916b4f5e6faa", "paper-bd57abd79ca4"]
    dropped = run_name("nano", toy_samples(8), replace(paper, dropout=0.1), toy_samples(2, seed=1, start=100))
    assert dropped == "paper-a08ba342b50d", "dropout is seeded by micro-batch now: another run than paper-1c9feed2436f"
    assert run_name("nano", toy_samples(8), replace(CONFIGS["nano"], keep_epochs="all")) == run_name("nano", toy_samples(8), CONFIGS["nano"])
    assert run_name("nano", toy_samples(8), replace(CONFIGS["nano"], loss_per="average")) != run_name("nano", toy_samples(8), CONFIGS["nano"])


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
    again = train(model_dir, samples, replace(CONFIG, name="test", save_steps=3), report.path.parent, dev, progress=False)
    assert again.reused and losses(again) == losses(report) and (report.path/"report.json").stat().st_mtime_ns == before
    names = {run_name(model_dir, s, r, d) for s, r, d in [
        (samples, CONFIG, dev), (samples[:-1], CONFIG, dev), (samples[::-1], CONFIG, dev), (samples, replace(CONFIG, lr=1e-4), dev),
        (samples, CONFIG, ()), (samples[:-1] + [replace(samples[-1], ids=samples[-1].ids[:-1] + (9,))], CONFIG, dev)]}
    assert len(names) == 6
    other = tiny_model(tmp_path/"other", seed=1)
    assert run_name(other, samples, CONFIG, dev) not in names
    with pytest.raises(FileNotFoundError, match="no finished run"): RunReport.read(tmp_path)


def test_training_does_not_depend_on_where_or_on_the_callers_random_state(run, model_dir, tmp_path):
    import torch
    report, samples, dev = run
    torch.manual_seed(7)
    state = torch.get_rng_state()
    other = train(model_dir, samples, CONFIG, tmp_path, dev, progress=False, threads=1)
    assert losses(other) == losses(report) and weights(other) == weights(report)
    assert torch.equal(state, torch.get_rng_state())


def test_checkpointing_changes_no_number_and_no_name(run, model_dir, tmp_path):
    report, samples, dev = run
    other = train(model_dir, samples, replace(CONFIG, checkpointing=not CONFIG.checkpointing), tmp_path, dev, progress=False, threads=1)
    assert losses(other) == losses(report) and weights(other) == weights(report) and other.path.name == report.path.name


@pytest.mark.parametrize("micro", [1, 4])
def test_the_micro_batch_is_memory_not_mathematics(model_dir, tmp_path, micro):
    config = replace(CONFIG, dropout=0.0, max_steps=5)
    one, other = (train(model_dir, toy_samples(16), replace(config, micro_batch=m), tmp_path, progress=False, threads=1) for m in (2, micro))
    assert [l["loss"] for l in one.losses] == pytest.approx([l["loss"] for l in other.losses], rel=1e-4)
    assert [l["grad_norm"] for l in one.losses] == pytest.approx([l["grad_norm"] for l in other.losses], rel=1e-3)


KILLED = """
import sys
sys.path.insert(0, {here!r})
from test_sft import *
train({model!r}, toy_samples(16), {config}, {out!r}, toy_samples(3, seed=1, start=100), progress=False, threads=1)
"""
LONG = "replace(CONFIG, max_steps=28, save_steps=4, keep_epochs=(1, 2, 3, 5))"


@pytest.mark.parametrize("lines", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_kill_9_in_the_middle_and_the_same_end(model_dir, tmp_path_factory, tmp_path, lines):
    samples, dev, config = toy_samples(16), toy_samples(3, seed=1, start=100), replace(CONFIG, max_steps=28, save_steps=4, keep_epochs=(1, 2, 3, 5))
    path = tmp_path/run_name(model_dir, samples, config, dev)
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(here=str(HERE), model=model_dir, config=LONG, out=str(tmp_path))],
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while len(_read_losses(path)) < lines and process.poll() is None and time.monotonic() < deadline: time.sleep(0.02)
    finally: os.kill(process.pid, signal.SIGKILL); process.wait()
    assert process.returncode == -signal.SIGKILL and not (path/"report.json").exists()
    done, checkpoint = _last_checkpoint(path)
    assert done > 0 and done % 4 == 0
    if lines == 12:  # the newest checkpoint was being written: it has no mark, so it does not count
        half = path/"checkpoints"/f"checkpoint-{done + 4}"; half.mkdir(exist_ok=True); (half/"adapter_model.safetensors").write_bytes(b"half")
        with open(path/"losses.jsonl", "a") as f: f.write('{"step": 9')
    before = {p.name: adapter_bytes(p) for p in (path/"epochs").iterdir() if p.name.isdigit()}
    assert set(before) >= {str(e) for e in (1, 2, 3, 5) if 4 * e <= done}, "what was kept before the last checkpoint is there"
    resumed = train(model_dir, samples, config, tmp_path, dev, progress=False, threads=1)
    assert len(json.loads((path/"runtime.json").read_text())) == 2, "one entry for each process that worked on it"
    assert resumed.resumed_from == done and [l["step"] for l in resumed.losses] == list(range(1, 29))
    whole = train(model_dir, samples, config, tmp_path_factory.getbasetemp()/"whole", dev, progress=False, threads=1)
    assert losses(resumed) == losses(whole) and resumed.dev_losses == whole.dev_losses and weights(resumed) == weights(whole)
    assert list(resumed.adapters) == list(whole.adapters) == [1, 2, 3, 5, 7]
    assert all(adapter_bytes(p) == adapter_bytes(whole.adapters[e]) for e, p in resumed.adapters.items())
    assert before == {name: adapter_bytes(path/"epochs"/name) for name in before}, "kept adapters are as they were"
    assert not (path/"checkpoints").exists()


def test_a_target_that_matches_nothing_is_an_error_that_lists_what_there_is(model_dir):
    with pytest.raises(ValueError, match=r"'gate_up_proj' matches no module of LlamaForCausalLM.*down_proj.*q_proj"):
        prepare_model(model_dir, replace(CONFIG, targets=("q_proj", "gate_up_proj")))


def test_only_the_named_modules_are_adapted(model_dir):
    model = prepare_model(model_dir, replace(CONFIG, targets=("self_attn.q_proj", "v_proj"), r=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora_" in n and (".q_proj." in n or ".v_proj." in n) for n in trained)
    found = match_targets(model.get_base_model(), replace(CONFIG, targets=("down_proj",)))
    assert [n.endswith("mlp.down_proj") for n in found["down_proj"]] == [True, True]


def test_bfloat16_and_checkpointing_run_here_too(model_dir, tmp_path):
    paper = replace(CONFIGS["paper"], optimizer="adamw_torch", batch=4, max_steps=3)
    report = train(model_dir, toy_samples(8), paper, tmp_path, progress=False, threads=1)
    exact = train(model_dir, toy_samples(8), replace(paper, weights="float32", autocast=False, checkpointing=False), tmp_path, progress=False, threads=1)
    assert [l["loss"] for l in report.losses] == pytest.approx([l["loss"] for l in exact.losses], rel=0.02)


@pytest.mark.parametrize("there", [True, False])
def test_products_are_in_bfloat16_where_the_device_has_them(tmp_path, monkeypatch, there):
    monkeypatch.setattr("exprag.sft.has_bfloat16", lambda device: there)
    assert training_arguments(replace(CONFIGS["nano"]), 3, tmp_path).bf16 is there and not training_arguments(CONFIG, 3, tmp_path).bf16


def test_an_optimiser_that_cannot_run_here_is_replaced_aloud_and_on_the_record(model_dir, tmp_path, monkeypatch):
    if __import__("torch").cuda.is_available(): pytest.skip("there is a GPU")
    paper = replace(CONFIGS["paper"], batch=4, max_steps=2)
    with pytest.warns(UserWarning, match="optimizer 'paged_adamw_8bit' needs bitsandbytes and a GPU.*'adamw_torch'"):
        report = train(model_dir, toy_samples(8), paper, tmp_path, progress=False, threads=1)
    runtime, = json.loads((report.path/"runtime.json").read_text())
    assert (runtime["optimizer"], runtime["optimizer_asked"]) == ("adamw_torch", "paged_adamw_8bit")
    assert json.loads((report.path/"config.json").read_text())["config"]["optimizer"] == "adamw_torch", "the record says what was computed with"
    assert report.path.name == run_name(model_dir, toy_samples(8), replace(paper, optimizer="adamw_torch")) != run_name(model_dir, toy_samples(8), paper)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_record_says_which_number_format_was_used_and_not_what_the_machine_has(model_dir, tmp_path, monkeypatch, autocast):
    monkeypatch.setattr("exprag.sft.has_bfloat16", lambda device: True)
    report = train(model_dir, toy_samples(8), replace(CONFIG, autocast=autocast, max_steps=1), tmp_path, progress=False, threads=1)
    runtime, = json.loads((report.path/"runtime.json").read_text())
    assert (runtime["bfloat16"], runtime["weights"], runtime["device"]) == (autocast, "float32", "cpu")


def test_divided_by_the_average_every_token_weighs_alike(model_dir, tmp_path):
    "One step from the same weights: the gradient of a short step is smaller by its share of tokens, the recorded loss is not."
    short, long = ([s for s in toy_samples(200) if low <= s.supervised <= high][:4] for low, high in ((1, 5), (15, 30)))
    samples, plain = [*short, *long], replace(CONFIG, dropout=0.0, window=2, max_steps=2, warmup=0, schedule="constant", lr=1e-9, max_grad_norm=1e9)
    step, average = (train(model_dir, samples, replace(plain, loss_per=per), tmp_path, progress=False, threads=1) for per in ("step", "average"))
    assert [sorted(l["samples"]) for l in step.losses] in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[4, 5, 6, 7], [0, 1, 2, 3]])
    mean = sum(s.supervised for s in samples) / 2
    for a, b in zip(step.losses, average.losses):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"] * a["supervised"] / mean, rel=1e-4)


def test_what_was_left_out_or_shortened_is_on_the_record(model_dir, tmp_path):
    samples, (gone,) = [replace(toy_samples(1)[0], dropped=("e",)), *toy_samples(7, start=1)], toy_samples(1, seed=9, start=50)
    report = train(model_dir, samples, replace(CONFIG, max_steps=1), tmp_path, progress=False, threads=1, left_out=[gone])
    assert (report.left_out, report.shortened) == ((str(gone.task),), (str(samples[0].task),)) and gone.task not in report.manifest.tasks
    lines = [json.loads(line) for line in (report.path/"data.jsonl").read_text().splitlines()]
    assert lines[0]["dropped"] == ["e"] and "dropped" not in lines[1] and (lines[-1]["use"], lines[-1]["task"]) == ("left out", str(gone.task))


def test_trackers_are_the_trainers(model_dir, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("exprag.sft._make_trainer", lambda model, args, *more: seen.update(args=args) or 1 / 0)
    with pytest.raises(ZeroDivisionError): train(model_dir, toy_samples(8), replace(CONFIG, max_steps=1), tmp_path, progress=False, report_to=["tensorboard"])
    assert seen["args"].report_to == ["tensorboard"] and seen["args"].run_name.startswith("test-")
    with pytest.raises(TypeError, match="tracker"): train(model_dir, toy_samples(8), CONFIG, tmp_path, tracker="tensorboard")


def test_a_loss_that_is_no_number_stops_the_run(model_dir, tmp_path):
    with pytest.raises(FloatingPointError, match="loss of step .* is nan; lower lr"):
        train(model_dir, toy_samples(16), replace(CONFIG, lr=1e30, warmup=0, schedule="constant", max_grad_norm=1e30), tmp_path, progress=False)


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
    def killed(*args, **facts): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(exprag.sft, "_finish_run", killed)
        with pytest.raises(KeyboardInterrupt): train(model_dir, samples, CONFIG, tmp_path, dev, progress=False, threads=1)
    resumed = train(model_dir, samples, CONFIG, tmp_path, dev, progress=False, threads=1)
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
    config, samples = replace(CONFIG, targets=CONFIGS["paper"].targets, max_steps=2), toy_samples(8, vocabulary=110)
    assert train(tmp_path/"model", samples, config, tmp_path, progress=False, threads=1).steps == 2
    model = prepare_model(tmp_path/"model", config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 16 and not any("vision" in n for n in trained)
    nats, count = token_losses(model, samples[:2]).sum(0)
    data = collate(samples[:2]); data.pop("logits_to_keep")
    with torch.no_grad(): assert float(model.eval()(**data).loss) == pytest.approx(nats / count, rel=1e-4)


def test_a_model_that_is_registered_as_one_that_sees_can_be_trained_and_can_act(tmp_path):
    import torch
    from chat_models import make_tokenizer
    from exprag.models.local import HFPolicy
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
    report = train(tmp_path/"model", samples, replace(CONFIG, lr=1e-2, max_steps=6), tmp_path, samples[:2], progress=False, threads=1)
    bare, trained = (HFPolicy.from_pretrained(str(tmp_path/"model"), adapter, format=PromptFormat("Act.", ()), device="cpu", max_new_tokens=4)
                     for adapter in (None, report.adapter))
    measured = [nats / count for nats, count in (token_losses(policy.model, samples[:2]).sum(0) for policy in (bare, trained))]
    assert measured == pytest.approx([report.dev_losses[0][1], report.dev_losses[-1][1]], rel=1e-4) and measured[1] < 0.99 * measured[0]
    action, = trained.act([Trajectory(Task("toy", "walk", "0", "test"), "walk", "You see a door.")])
    assert 1 <= action.tokens_out <= 4 and action.stop != "context"
