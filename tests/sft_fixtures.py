"A tiny random Llama with a BPE tokenizer and a simple chat template, and toy samples; for the tests of samples, sft and combined."
import random

from exprag.samples import Sample
from exprag.trajectory import Step, Task, Trajectory

TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
ROOMS, THINGS = ("kitchen", "workshop", "bathroom", "hallway", "greenhouse"), ("pot", "lamp", "battery", "apple", "thermometer", "cup")


def tiny_model(path, seed=0, vocabulary=400, **config):
    "Saves a random model; with a tokenizer trained on the toy episodes."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    special = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [t for e in episodes(20) for t in (e.goal, *e.actions, *e.observations)]
    tok.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**dict(dict(
            vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=8192, pad_token_id=fast.pad_token_id, bos_token_id=None, eos_token_id=fast.eos_token_id), **config)))
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return str(path)


def episodes(n, type="find-plant", fold="train", seed=0, world="scienceworld", start=0):
    "Toy episodes with goals that name a thing and a room."
    rng = random.Random(seed)
    made = []
    for i in range(start, start + n):
        thing, room = rng.choice(THINGS), rng.choice(ROOMS)
        actions = [f"go to {room}", f"look at {thing}", *(f"move {rng.choice(THINGS)} to {thing}" for _ in range(rng.randrange(1, 5))), f"focus on {thing}"]
        steps = tuple(Step(a, f"You {a}. You see the {rng.choice(THINGS)} and the {rng.choice(THINGS)}.") for a in actions)
        made.append(Trajectory(Task(world, type, str(i), fold), f"Your task is to find the {thing} in the {room}.", f"This room is called the {room}.",
                               steps, score=100.0, success=True))
    return made


def toy_samples(n, seed=0, low=20, high=60, vocabulary=128, start=0):
    "Samples of random ids; nothing of a tokenizer is needed."
    rng = random.Random(seed)
    made = []
    for i in range(start, start + n):
        length = rng.randint(low, high)
        mask = [0] * 8 + [int(rng.random() < 0.3) for _ in range(length - 9)] + [1]
        made.append(Sample(Task("toy", "walk", str(i), "train"), [rng.randrange(8, vocabulary) for _ in range(length)], mask, source=f"{i:032x}"))
    return made
