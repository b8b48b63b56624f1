"""One of several processes that train together; started by torchrun, see test_distributed.py.

    shared_training.py MODEL OUT REPORT [CHANGES]     trains CONFIG with CHANGES (JSON), and says in REPORT.RANK what this process did

KILL_RANK and KILL_CALL kill a process in its so many-th forward pass; SHARD has Accelerate shard the model, on a CPU too.
"""
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import exprag.sft
from exprag.samples import CONFIGS
from exprag.sft import train
from sft_fixtures import toy_samples

# 15 samples in steps of 4: the fourth step holds the end of one pass and the beginning of the next; 3 dev samples are no multiple of 2
CONFIG = replace(CONFIGS["nano"], name="shared", autocast=False, max_steps=7, batch=4, micro_batch=1, warmup=2, dropout=0.1, save_steps=3, dev_steps=3, keep_epochs=(1,))
SAMPLES, DEV = toy_samples(15), toy_samples(3, seed=1, start=100)
RANK = int(os.environ.get("RANK", 0))


def killed_at(rank: int, call: int) -> None:
    "Have a process of the run killed in the middle of a step."
    loss, calls = exprag.sft.supervised_loss, []
    def counted(*args, **settings):
        calls.append(1)
        if RANK == rank and len(calls) == call: os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args, **settings)
    exprag.sft.supervised_loss = counted


def shard_on_a_cpu() -> None:
    "Accelerate shards over accelerators only, though PyTorch does over CPUs as well: call these processes an accelerator's."
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    begin = PartialState.__init__
    def called_accelerator(self, *args, **settings):
        begin(self, *args, **settings)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU: self._shared_state["distributed_type"] = DistributedType.MULTI_NPU
    PartialState.__init__ = called_accelerator


def main(model: str, out: str, report: str, changes: str = "{}") -> None:
    written, wrapped, seen = [], exprag.sft._save_adapter, {}
    def watch(event, given):  # what Python itself writes, makes, renames or removes
        if event == "open" and not (isinstance(given[1], str) and set(given[1]) & set("wax+")): return
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree") and isinstance(given[0], (str, os.PathLike)):
            if Path(given[0]).is_relative_to(out): written.append(str(Path(given[0]).relative_to(out)))
    def look(model, *args):
        seen["sharded"] = all("DTensor" in type(p).__name__ for p in model.parameters())
        return wrapped(model, *args)
    sys.addaudithook(watch)
    exprag.sft._save_adapter = look
    try: train(model, SAMPLES, replace(CONFIG, **json.loads(changes)), out, DEV, progress=False, threads=1)
    except ValueError as error: seen["error"] = str(error)
    Path(f"{report}.{RANK}").write_text(json.dumps({"written": written, **seen}))


if __name__ == "__main__":
    if "KILL_RANK" in os.environ: killed_at(int(os.environ["KILL_RANK"]), int(os.environ["KILL_CALL"]))
    if "SHARD" in os.environ: shard_on_a_cpu()
    main(*sys.argv[1:])
