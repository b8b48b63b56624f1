"Tiny random-weight models with the public chat templates of Qwen2.5 and 3, Gemma 2 and 3, Mistral, Ministral, Llama 3 and SmolLM2, rebuilt for tests."
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "open door to kitchen", "The door is now open. You are in the hallway. In it, you see: a picture, the agent.",
    "Your task is to boil water. First, focus on the substance. Then, take actions that will cause it to change.",
    "go to kitchen", "pick up thermometer", "look around", "focus on metal pot", "move metal pot to stove", "activate stove",
    "You act in a text world. Answer each observation with one action.", "Experience that succeeded:", "Actions:",
    "system user assistant model start of turn end of turn im_start im_end INST /INST SYSTEM_PROMPT <|im_end|> [/INST] </s>",
] * 4

QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}"""

# Gemma 2 refuses a system message outright
GEMMA_NO_SYSTEM = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}" + GEMMA

# Mistral 7B v0.3: strict alternation, and the system text stands in the *last* user turn
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Ministral 3: a system turn of its own with a default text, byte-level tokens, no spaces
MINISTRAL = """{%- set default_system_message = 'You are Ministral. Today is ' + strftime_now('%Y-%m-%d') %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {{- '[SYSTEM_PROMPT]' + default_system_message + '[/SYSTEM_PROMPT]' }}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message.role == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user and assistant.') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Qwen3: takes thoughts out of all answers before the last question, writes an empty one into the last answer, and opens an
# answer with an empty one if it is told not to think
QWEN3 = """{%- set last = namespace(question=messages|length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- if last.looking and message.role == 'user' %}
        {%- set last.looking = false %}{%- set last.question = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set thought = '' %}{%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.question and (loop.last or thought) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Llama 3: headers, a system turn that begins with two dates, contents trimmed
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# SmolLM2: ChatML, with a system turn of its own where none is given
SMOLLM2 = """{% for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are an assistant named SmolLM<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FAMILIES = {  # name: (template, control tokens, other added tokens, bos, eos, end-of-turn, style)
    "qwen": (QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"], None, "<|im_end|>", "<|im_end|>", "bytes"),
    "gemma": (GEMMA, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "<table>"], "<bos>", "<eos>", "<end_of_turn>", "pieces"),
    "gemma2": (GEMMA_NO_SYSTEM, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n"], "<bos>", "<eos>", "<end_of_turn>", "pieces"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], [], "<s>", "</s>", "</s>", "metaspace"),
    "ministral": (MINISTRAL, ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"], [], "<s>", "</s>", "</s>", "bytes"),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [], "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "bytes"),
    "smollm2": (SMOLLM2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<repo_name>"], "<|im_start|>", "<|im_end|>", "<|im_end|>", "bytes"),
}
REWRITING = {  # as FAMILIES; templates that change what they have written
    "qwen3": (QWEN3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"], None, "<|im_end|>", "<|im_end|>", "bytes"),
}


def make_tokenizer(family: str, template: str | None = None):
    "A small BPE tokenizer of the family's kind, with its control tokens and chat template."
    rebuilt, control, added, bos, eos, _, style = (FAMILIES | REWRITING)[family]
    backend = Tokenizer(models.BPE(byte_fallback=style != "bytes", unk_token=None if style == "bytes" else "<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if style == "bytes" else [f"<0x{i:02X}>" for i in range(256)]
    if style == "bytes":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        if style == "pieces":
            backend.normalizer = normalizers.Replace(" ", "▁")
            backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if style == "metaspace" else []))
    names = control if style == "bytes" else [*control, "<unk>", *alphabet]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=names, initial_alphabet=alphabet if style == "bytes" else [],
                                  show_progress=False, max_token_length=12)
    backend.train_from_iterator(CORPUS, trainer)
    if style != "bytes":  # only the controls are added tokens; the bytes are ordinary ones
        backend = Tokenizer.from_str(_only_added(backend.to_str(), {*control, "<unk>"}))
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=control[0],
                                        name_or_path=f"tiny-{family}")
    tokenizer.chat_template = template or rebuilt
    return tokenizer


def _only_added(text: str, kept: set) -> str:
    import json
    record = json.loads(text)
    record["added_tokens"] = [token for token in record["added_tokens"] if token["content"] in kept]
    return json.dumps(record)


def make_model(family: str, vocab_size: int, seed: int = 0, **settings):
    "A random-weight model of the family's architecture, small enough for a test."
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
    kind = {"qwen": Qwen2Config, "gemma": Gemma3TextConfig, "gemma2": Gemma3TextConfig, "mistral": MistralConfig, "ministral": MistralConfig,
            "qwen3": Qwen3Config, "llama3": LlamaConfig, "smollm2": LlamaConfig}[family]
    shape = dict(vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, initializer_range=0.2)
    if kind is Gemma3TextConfig: shape |= dict(sliding_window=2048, query_pre_attn_scalar=16)
    if kind is MistralConfig: shape |= dict(sliding_window=None)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(**(shape | settings))).eval()
