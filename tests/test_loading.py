"Loading: models, adapters and tokenizers from disk, and what a model is known by."
import warnings

import pytest
from chat_models import make_model, make_tokenizer
from echo import FORMAT, TASKS, play

from exprag.agent import PolicyError
from exprag.models.loading import Adapters, Loading, find_model, load_model, weights_digest
from exprag.models.local import HFPolicy
from exprag.sft import load_tokenizer


@pytest.fixture
def saved(tmp_path):
    "A folder with a base model and an adapter."
    from peft import LoraConfig, get_peft_model
    tokenizer = make_tokenizer("qwen")
    model = make_model("qwen", len(tokenizer))
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():  # PEFT's own
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(model, settings).save_pretrained(tmp_path / "tuned")
    return tmp_path


def test_a_policy_from_a_folder_and_an_adapter(saved):
    where = {"format": FORMAT, "device": "cpu"}
    plain = HFPolicy.from_pretrained(str(saved / "base"), **where)
    tuned = HFPolicy.from_pretrained(str(saved / "base"), saved / "tuned", batch_size=2, **where)
    assert plain.name == "base" and tuned.name == "base+tuned" and tuned.batch_size == 2
    assert plain.weights != tuned.weights
    assert play(plain, TASKS[:3])


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_warning_when_an_adapter_is_loaded_and_acts(saved, dtype):
    policy = HFPolicy.from_pretrained(str(saved / "base"), saved / "tuned", format=FORMAT,
                                      device="cpu", dtype=dtype, batch_size=2)
    assert play(policy, TASKS[:2])


def test_an_adapter_that_is_not_there(saved, monkeypatch):
    def load(adapter): load_model(str(saved / "base"), adapter)
    (saved / "tuned/adapter_model.safetensors").rename(saved / "tuned/adapter_model.bin")
    with pytest.raises(PolicyError, match="no adapter_model.safetensors"): load(saved / "tuned")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: saved / "tuned")
    with pytest.raises(PolicyError, match="some/adapter holds no adapter_model.safetensors"):
        load("some/adapter")
    def nowhere(*_, **__): raise FileNotFoundError("404")
    monkeypatch.setattr("huggingface_hub.snapshot_download", nowhere)
    with pytest.raises(PolicyError, match="'runs/addapter' is no folder here, .* hub: 404"):
        load("runs/addapter")


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(PolicyError, match="load both from the same place"):
        HFPolicy(make_model("qwen", 10), make_tokenizer("qwen"))


def test_a_tokenizer_is_the_file_in_its_folder(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = make_tokenizer("mistral")  # not byte-level, beside a model of Qwen2's architecture
    make_model("qwen", len(tokenizer)).save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    text = "open door to kitchen"
    automatic = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert automatic != tokenizer(text)["input_ids"], "the trap is real"
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == tokenizer(text)["input_ids"]
    policy = HFPolicy.from_pretrained(str(tmp_path), format=FORMAT, device="cpu", max_new_tokens=4)
    assert play(policy, TASKS[:2])


def test_a_model_is_known_by_its_weights():
    one, two, again = (weights_digest(make_model("qwen", 300, seed=seed)) for seed in (0, 1, 1))
    assert one != two == again


def test_a_misspelt_loading_setting_names_the_nearest(saved):
    with pytest.raises(ValueError, match="unknown loading setting 'dtpye'; did you mean 'dtype'"):
        load_model(str(saved / "base"), dtpye="bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'bf16'; did you mean 'bfloat16'"): Loading(dtype="bf16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_number_format_and_the_attention_are_the_ones_asked_for(saved, dtype):
    model, _ = load_model(str(saved / "base"), dtype=dtype, attention="eager", device="cpu")
    assert str(model.dtype) == f"torch.{dtype}" and model.config._attn_implementation == "eager"
    assert load_model(str(saved / "base"), device="cpu")[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("device", ["cuda:9", "gpu", "cuda"])
def test_a_device_that_is_not_there_is_missed_in_one_line(saved, monkeypatch, device):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(PolicyError, match=f"device '{device}' was asked for, .* sees no GPUs here") as said:
        HFPolicy.from_pretrained(str(saved / "base"), device=device, format=FORMAT)
    assert "\n" not in str(said.value)


def test_four_bits_need_a_gpu_and_a_package(saved, monkeypatch):
    with pytest.raises(PolicyError, match="NVIDIA GPU and the package bitsandbytes"):
        load_model(str(saved / "base"), four_bit=True, device="cpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("exprag.models.loading.find_spec", lambda name: None)
    with pytest.raises(PolicyError, match="bitsandbytes"): load_model(str(saved / "base"), four_bit=True)
    monkeypatch.setattr("exprag.models.loading.find_spec", lambda name: True)
    given = Loading("bfloat16", four_bit=True).arguments()
    assert given["quantization_config"].load_in_4bit and given["device_map"] == {"": "cuda"}


def test_a_revision_is_a_snapshot_of_the_hub(saved, monkeypatch):
    asked = {}
    def snapshot(name, revision, **_): asked[name] = revision; return str(saved / "base")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model, _ = load_model("owner/name", revision="abc", device="cpu")
    assert asked == {"owner/name": "abc"} and weights_digest(model) == weights_digest(load_model(str(saved / "base"), device="cpu")[0])
    with pytest.raises(PolicyError, match="revision 'abc' is of a name on the hub, and .* is a folder"):
        load_model(str(saved / "base"), revision="abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("404\nnot\nfound")))
    with pytest.raises(OSError, match="'owner/name' at revision 'abc' was not found on the hub: 404 not found"):
        find_model("owner/name", "abc")


def test_a_model_that_does_not_exist_is_one_line():
    with pytest.raises(OSError, match="^model 'no-such/model' cannot be loaded: ") as said: load_model("no-such/model")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("layers, width, said", [(2, 32, "size mismatch"), (4, 64, "missing adapter keys"), (1, 64, "no place for .*layers.1.")])
def test_an_adapter_of_another_base_is_refused_and_leaves_the_base_as_it_was(saved, layers, width, said):
    other = make_model("qwen", len(make_tokenizer("qwen")), num_hidden_layers=layers, hidden_size=width)
    base = Adapters(other)
    with pytest.raises(PolicyError, match=f"does not fit this model; was it trained on another one.*{said}") as error: base.hold(saved / "tuned")
    assert "\n" not in str(error.value) and base.held is None
    base.release()
    assert weights_digest(other) == base.base


def same(a, b):
    import torch
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def second(saved):
    "Another adapter of the same base, on other modules, the tied embedding among them."
    import torch
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(5)
    model = make_model("qwen", len(make_tokenizer("qwen")))
    settings = LoraConfig(r=3, init_lora_weights=False, target_modules=["o_proj", "down_proj", "embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, settings).save_pretrained(saved / "second")
    return saved / "second"


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_swapped_in_one_base_without_a_trace(saved, second, dtype):
    import torch
    how = {"dtype": dtype, "device": "cpu"}
    fresh = {a: load_model(str(saved / "base"), a, **how)[0] for a in (None, saved / "tuned", second)}
    shared = Adapters(load_model(str(saved / "base"), **how)[0])
    ids = torch.arange(24)[None]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*second time.*|.*already.*")
        for adapter in (None, saved / "tuned", second, saved / "tuned", None, second, None):
            shared.hold(adapter)
            assert shared.weights == weights_digest(fresh[adapter])
            with torch.inference_mode(): assert torch.equal(shared.model(ids).logits, fresh[adapter](ids).logits)
            if adapter is None: assert same(shared.model, fresh[None]) and not shared.copies
            elif dtype == "float32": assert same(shared.model, fresh[adapter])
    assert shared.hold(second) and not shared.hold(second)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policies_share_a_base_and_take_turns(saved, second, dtype):
    how = {"format": FORMAT, "device": "cpu", "dtype": dtype, "batch_size": 2, "max_new_tokens": 6}
    adapters = {"base": None, "base+tuned": saved / "tuned", "base+second": second}
    alone = {n: HFPolicy.from_pretrained(str(saved / "base"), a, **how) for n, a in adapters.items()}
    base = HFPolicy.from_pretrained(str(saved / "base"), **how)
    shared = {name: base.with_adapter(adapter) for name, adapter in adapters.items()}
    assert [p.describe() for p in shared.values()] == [p.describe() for p in alone.values()]
    assert len({p.describe()["weights"] for p in shared.values()}) == 3 and [p.name for p in shared.values()] == [*adapters]
    assert len({id(p.model) for p in shared.values()}) == len({id(p.engine) for p in shared.values()}) == 1
    did = {name: [] for name in adapters}
    for task in TASKS[:4]:
        for name, policy in shared.items(): did[name].append(play(policy, [task])[task].actions)
    want = {name: [play(policy, [task])[task].actions for task in TASKS[:4]] for name, policy in alone.items()}
    assert did == want and did["base"] != did["base+tuned"] != did["base+second"]
    assert shared["base+second"].with_adapter(saved / "tuned", name="mine").name == "mine"


def test_turns_within_an_episode_change_no_answer(saved, second):
    from exprag.trajectory import Trajectory
    how = {"format": FORMAT, "device": "cpu", "max_new_tokens": 6}
    base = HFPolicy.from_pretrained(str(saved / "base"), **how)
    tuned, start = base.with_adapter(second), Trajectory(TASKS[0], "open door", "You see a door.")
    first = [p.act([start])[0].text for p in (base, tuned, base, tuned)]
    want = [HFPolicy.from_pretrained(str(saved / "base"), a, **how).act([start])[0].text for a in (None, second)]
    assert first == want * 2 and want[0] != want[1]


def test_what_cannot_be_swapped_is_said(saved, second):
    how = {"format": FORMAT, "device": "cpu", "max_new_tokens": 4}
    with pytest.raises(PolicyError, match="loaded with its adapter: load the base alone"):
        HFPolicy.from_pretrained(str(saved / "base"), saved / "tuned", **how).with_adapter(second)
    base = HFPolicy.from_pretrained(str(saved / "base"), **how)
    with pytest.raises(PolicyError, match="no adapter_model.safetensors"): base.with_adapter(saved / "base")
    tuned = base.with_adapter(saved / "tuned")
    import os
    file = saved / "tuned/adapter_model.safetensors"
    from safetensors.torch import load_file, save_file
    save_file({k: 2 * v for k, v in load_file(file).items()}, file, {"format": "pt"})
    os.utime(file, (1, 1))
    assert play(base, TASKS[:1])
    with pytest.raises(PolicyError, match=r"was changed after base\+tuned was made"): play(tuned, TASKS[:1])
    assert play(base, TASKS[:1])


def test_lora_targets_are_found_by_what_a_module_is():
    from dataclasses import replace

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.integrations.finegrained_fp8 import FP8Linear

    from exprag.samples import CONFIGS
    from exprag.sft import match_targets
    class Ours(torch.nn.Linear): "A layer of a class that nobody has heard of."
    model, config = make_model("qwen", 300), replace(CONFIGS["paper"], targets=("q_proj", "v_proj"))
    plain = match_targets(model, config)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = FP8Linear(64, 64), Ours(64, 32)
    assert match_targets(model, config) == plain and all(plain.values())
    names = [n for found in plain.values() for n in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    assert sum("lora_A" in n for n, _ in tuned.named_parameters()) == len(names) == 4
    with pytest.raises(ValueError, match="'layernorm' matches no module"): match_targets(make_model("qwen", 300), replace(config, targets=("layernorm",)))


def test_a_tokenizer_is_transformers_own_where_mistral_common_is_installed(tmp_path, monkeypatch):
    from transformers import AutoTokenizer
    make_tokenizer("ministral").save_pretrained(tmp_path)
    made = load_tokenizer(str(tmp_path))
    class MistralCommonBackend:  # what AutoTokenizer gives then, where there is a tekken.json: the same ids, no template
        def __call__(self, text): return made(text)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: MistralCommonBackend())
    found = load_tokenizer(str(tmp_path))
    assert found.chat_template == made.chat_template and found.added_tokens_decoder == made.added_tokens_decoder
    from exprag.models.templates import encoder_for
    assert encoder_for(found, FORMAT).frame == encoder_for(made, FORMAT).frame
