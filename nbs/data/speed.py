"""Measures acting and training beside the plain ways, on the same episodes, and writes the figures.

    python nbs/data/speed.py OUT.json [--model smollm2] [--threads 2] [--rounds 3] [--act N]

Each measurement is a process of its own, so that its memory is its own; the arms take turns. Acting:
ours, and a loop that calls `generate` anew for every action (measured at every fourth step). Training: ours, TRL's `SFTTrainer`, and
the same with its packing (they need `pip install trl`). Number format float32, no checkpointing.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
EVERY = 4  # steps: which of them `generate` takes, for the sake of time
ARMS = {"act": ("ours", "generate"), "train": ("ours", "TRL", "TRL, packing")}


def episodes(count: int, fewest: int, steps: int):
    "Expert episodes of ScienceWorld of so many steps, the first ones of the sample."
    from exprag.trajectory import read_jsonl
    found = [t for t in read_jsonl(HERE / "sample.jsonl")[0] if t.success]
    return [t for t in found if fewest <= len(t) <= steps][:count]


def act(arm: str, model: str, count: int) -> dict:
    "Give every action of some episodes, the expert's earlier actions as history."
    import torch
    from dataclasses import replace
    from exprag.models.local import HFPolicy
    from exprag.models.templates import answer_of
    policy = HFPolicy.from_pretrained(model, batch_size=8, max_new_tokens=24)
    played, said, begun = episodes(count, 16, 40), [], time.perf_counter()
    for n in range(0, max(map(len, played)), 1 if arm == "ours" else EVERY):
        now = [(i, replace(t.opening(), steps=t.steps[:n]))
               for i, t in enumerate(played) if len(t) > n]
        if arm == "ours":
            written = policy.act([t for _, t in now], [()] * len(now), keys=[i for i, _ in now])
            said += [a.text for a in written]
            continue
        for _, t in now:
            ids = torch.tensor([policy.encoder.prompt(t, ())])
            out = policy.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                        max_new_tokens=24, pad_token_id=0)
            text = policy.tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
            said.append(answer_of(text)[0])
    return {"seconds": time.perf_counter() - begun, "units": len(said), "said": said}


def training(model: str):
    "Samples, and the configuration of one pass over them."
    from exprag.models.loading import find_model
    from exprag.models.templates import encoder_for
    from exprag.samples import SFTConfig, make_samples
    from exprag.sft import load_tokenizer
    encoder = encoder_for(load_tokenizer(find_model(model)))
    several = episodes(12, 5, 40)
    return several, encoder, make_samples(several, encoder), SFTConfig.named(
        "smollm2", max_steps=3, batch=4, warmup=0, schedule="constant")


def train_ours(model: str) -> dict:
    "Three steps of four episodes."
    from exprag.sft import train
    _, _, samples, config = training(model)
    with tempfile.TemporaryDirectory() as folder:
        report = train(model, samples, config, folder, progress=False)
        return {"seconds": report.seconds, "units": sum(map(len, samples)),
                "losses": [line["loss"] for line in report.losses]}


def train_trl(model: str, packing: bool) -> dict:
    "The same with TRL, on the same token ids and labels."
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from exprag.models.export import export_trl
    from exprag.models.loading import find_model
    from exprag.sft import load_base, load_tokenizer
    several, encoder, samples, ours = training(model)
    place, marks = find_model(model), []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kw): marks.append(time.perf_counter())
        def on_train_end(self, *args, **kw): marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset("json", data_files=str(export_trl(folder, several, encoder,
                            form="tokens") / "train.jsonl"), cache_dir=folder)["train"]
        longest = max(map(len, samples))
        args = SFTConfig(
            output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=4,
            num_train_epochs=1, learning_rate=ours.lr, lr_scheduler_type="constant", bf16=False,
            use_cpu=True, gradient_checkpointing=False, max_length=longest, packing=packing,
            report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)
        lora = LoraConfig(task_type="CAUSAL_LM", r=ours.r, lora_alpha=ours.alpha, lora_dropout=0.0,
                          target_modules=list(ours.targets))
        trainer = SFTTrainer(load_base(place, "float32"), args=args, train_dataset=data,
                             peft_config=lora, processing_class=load_tokenizer(place),
                             callbacks=[Clock()])
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": marks[1] - marks[0], "units": sum(map(len, samples)), "losses": losses}


def one(what: str, arm: str, given) -> dict:
    "One measurement, in this process."
    import torch
    torch.set_num_threads(given.threads)
    if what == "act": made = act(arm, given.model, given.act)
    elif arm == "ours": made = train_ours(given.model)
    else: made = train_trl(given.model, arm.endswith("packing"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"what": what, "arm": arm, "peak_gib": round(peak, 2), **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--act", type=int, default=8, help="episodes to act in")
    parser.add_argument("--what", choices=tuple(ARMS), help="only this")
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "ARM"))
    given = parser.parse_args()
    if given.only:
        given.out.write_text(json.dumps(one(*given.only, given)))
        return
    rows = []
    for turn in range(given.rounds):
        for what, arms in ARMS.items():
            if given.what not in (None, what): continue
            for arm in arms if turn % 2 else arms[::-1]:
                part = given.out.with_suffix(".part")
                command = [sys.executable, __file__, str(part), "--only", what, arm]
                for name in ("model", "threads", "act"):
                    command += [f"--{name}", str(getattr(given, name))]
                env = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
                subprocess.run(command, check=True, env=env)
                rows.append(json.loads(part.read_text()))
                part.unlink()
                print(turn, what, arm, round(rows[-1]["seconds"], 1), "s", flush=True)
                given.out.write_text(json.dumps({
                    "model": given.model, "threads": given.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
