"""Behaviour of a training run that several processes share: the same steps, adapter, dev loss and files as with one.

Real processes, which talk through gloo. Two sum a step's gradient in another order than one: here the losses differed by 3e-7 of
themselves at most, gradient norms by 6e-6, the adapter by 2e-5 of its norm. The tolerances are ten times that.
"""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exprag.sft import RunReport, _last_checkpoint, _read_losses, prepare_model, run_name, train, training_arguments
from sft_fixtures import tiny_model
from shared_training import CONFIG, DEV, SAMPLES

HERE = Path(__file__).parent
FSDP = HERE.parent/"exprag"/"assets"/"accelerate"/"fsdp.yaml"


def together(model, out, changes="{}", processes=2, **environment):
    "Train in several processes; what each said of itself, and how the launcher ended."
    report = Path(out).with_suffix(".said")
    for old in report.parent.glob(f"{report.name}.*"): old.unlink()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(HERE/"shared_training.py"),
                           model, str(out), str(report), changes], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]), **environment})
    return [json.loads(p.read_text()) for p in sorted(report.parent.glob(f"{report.name}.*"))], done


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder/"adapter_model.safetensors")


def distance(a, b):
    "Of two adapters, as a share of the first one's norm."
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and {t.dtype for t in a.values()} == {t.dtype for t in b.values()}
    return (sum(((a[k] - b[k]) ** 2).sum() for k in a) / sum((t ** 2).sum() for t in a.values())).sqrt().item()


def assert_same_run(one, other):
    assert other.path.name == one.path.name and [(l["step"], l["samples"], l["supervised"], l["lr"]) for l in other.losses] == [(l["step"], l["samples"], l["supervised"], l["lr"]) for l in one.losses]
    assert [l["loss"] for l in other.losses] == pytest.approx([l["loss"] for l in one.losses], rel=3e-6)
    assert [l["grad_norm"] for l in other.losses] == pytest.approx([l["grad_norm"] for l in one.losses], rel=6e-5)
    assert [step for step, _ in other.dev_losses] == [step for step, _ in one.dev_losses] == [0, 3, 4, 6, 7]
    assert [loss for _, loss in other.dev_losses] == pytest.approx([loss for _, loss in one.dev_losses], rel=3e-6)
    assert other.dev_losses[0] == one.dev_losses[0], "before any step the dev loss is the same number"
    assert other.adapters.keys() == one.adapters.keys() == {1} and max(distance(one.adapter, other.adapter), distance(one.adapters[1], other.adapters[1])) < 2e-4
    assert {str(p.relative_to(one.path)) for p in one.path.rglob("*")} == {str(p.relative_to(other.path)) for p in other.path.rglob("*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory): return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def one(model, tmp_path_factory): return train(model, SAMPLES, CONFIG, tmp_path_factory.mktemp("one"), DEV, progress=False, threads=1)


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    "A run of two processes of which one was killed in step 6, taken up again by two."
    out = tmp_path_factory.mktemp("two")/"runs"
    said, launcher = together(model, out, KILL_RANK="1", KILL_CALL="11")
    path = out/run_name(model, SAMPLES, CONFIG, DEV)
    assert launcher.returncode and "SIGKILL" in launcher.stderr and not said, launcher.stderr
    assert _last_checkpoint(path)[0] == 3 and {line["step"] for line in _read_losses(path)} == {0, 1, 2, 3, 4, 5} and not (path/"report.json").exists()
    assert {p.name for p in (path/"checkpoints"/"checkpoint-3").iterdir()} >= {"rng_state_0.pth", "rng_state_1.pth", "whole"}, "whole once every process has written"
    half = out.with_name("half"); subprocess.run(["cp", "-r", str(out), str(half)], check=True)
    said, launcher = together(model, out)
    assert launcher.returncode == 0, launcher.stderr
    return RunReport.read(path), said, half


def test_two_processes_make_the_run_of_one(one, two):
    report, said, half = two
    assert_same_run(one, report)
    assert report.resumed_from == 3 and [r["processes"] for r in json.loads((report.path/"runtime.json").read_text())] == [2, 2]


def test_the_adapter_is_one_that_loads_and_has_its_dev_loss(two, model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from exprag.samples import token_losses
    nats, count = token_losses(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), two[0].adapter), DEV).sum(0)
    assert two[0].dev_losses[-1][1] == pytest.approx(nats / count, rel=1e-5)


def test_the_first_process_alone_writes(two):
    first, second = (set(process["written"]) for process in two[1])
    assert all("/checkpoints" in name for name in second), "nothing but its part of a checkpoint"
    assert {Path(name).name for name in first} >= {"losses.jsonl", "data.jsonl", "adapter.half"}


def test_one_process_ends_what_two_began(one, two, model):
    "The number of processes may change on the way."
    report = train(model, SAMPLES, CONFIG, two[2], DEV, progress=False, threads=1)
    assert_same_run(one, report)
    assert report.resumed_from == 3 and [r["processes"] for r in json.loads((report.path/"runtime.json").read_text())] == [2, 1]


def test_without_seeds_of_their_own_two_processes_would_drop_out_other_activations(one, model, tmp_path, monkeypatch):
    "The comparison can fail: other seeds of dropout are seen in it."
    import exprag.sft
    monkeypatch.setattr(exprag.sft, "count", lambda seed, step: iter(lambda: seed, None))  # the same for each micro-batch of a step
    other = train(model, SAMPLES, CONFIG, tmp_path, DEV, progress=False, threads=1)
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one.losses, other.losses)) > 1e-4 and distance(one.adapter, other.adapter) > 2e-3


def test_a_sharded_model_makes_the_same_run(one, model, tmp_path):
    "FSDP2 through Accelerate, with the settings of the file that the package brings; that the processes have GPUs is only said."
    said, launcher = together(model, tmp_path/"runs", SHARD="1", **fsdp_environment())
    assert launcher.returncode == 0, launcher.stderr
    assert [process["sharded"] for process in said] == [True, True]
    assert_same_run(one, RunReport.read(tmp_path/"runs"/one.path.name))


def fsdp_environment():
    "What `accelerate launch` tells the processes that it starts, of the configuration in the package."
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env
    given, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(FSDP), "--no_python", "exprag", "train", "paper-scienceworld"]))
    assert given.use_fsdp and given.no_python and given.num_processes == 8
    return {name: value for name, value in prepare_multi_gpu_env(given).items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def test_the_configuration_in_the_package_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file
    read, told = load_config_from_file(str(FSDP)), fsdp_environment()
    assert (read.num_processes, read.mixed_precision, read.distributed_type.value) == (8, "no", "FSDP")
    assert (told["ACCELERATE_USE_FSDP"], told["FSDP_VERSION"], told["FSDP_STATE_DICT_TYPE"], told["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == ("true", "2", "FULL_STATE_DICT", "true")


def test_fsdp_that_is_not_to_be_had_is_an_error_and_no_silent_copy(model, tmp_path, monkeypatch):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, and Accelerate shards a model over GPUs only.*torchrun"):
        train(model, SAMPLES, CONFIG, tmp_path, progress=False, threads=1)


def test_a_step_that_cannot_be_shared_evenly_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="'shared': 4 micro-batches a step cannot be shared by 3 processes; change batch or micro_batch"):
        training_arguments(CONFIG, 7, tmp_path)


def test_four_bits_need_a_gpu_and_say_so(model):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="weights='nf4' needs an NVIDIA GPU and the package bitsandbytes"): prepare_model(model, replace(CONFIG, weights="nf4"))


def test_four_bits_are_not_sharded_and_say_so(model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("exprag.sft.find_spec", lambda name: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP does not shard weights='nf4': start with torchrun"): prepare_model(model, replace(CONFIG, weights="nf4"))


def test_the_commands_of_the_chapter_name_settings_that_there_are():
    from exprag.plans import load_plan, sft_config
    four = load_plan("paper-scienceworld", ["train.change.weights=nf4", "loading.four_bit=true"])
    sharded = load_plan("paper-scienceworld", ["train.change.optimizer=adamw_torch"])
    assert sft_config(four, 1).weights == "nf4" and four.loading["four_bit"] is True
    config = sft_config(sharded, 1)
    assert config.optimizer == "adamw_torch" and config.batch // config.micro_batch % 8 == 0, "eight processes share a step"


def test_several_processes_share_training_and_nothing_else(tmp_path, monkeypatch):
    from exprag.plans import PlanError, load_plan
    from exprag.reproduce import Place, collect_stage, reproduce
    plan, place = load_plan("quick-shop", ["train.change.max_steps=1"]), Place(tmp_path, progress=False, threads=1)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(PlanError, match="2 processes can share training and nothing else"): reproduce(plan, place, "evaluate")
        with pytest.raises(PlanError, match="lacks 60 episodes of the plan.*exprag collect quick-shop"): reproduce(plan, place, "train")
    collect_stage(plan, place).close()
    reached = []
    monkeypatch.setattr("exprag.reproduce.train_stage", lambda plan, place, store: reached.append(len(store)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    reproduce(plan, place, "train")
    assert reached == [60]
