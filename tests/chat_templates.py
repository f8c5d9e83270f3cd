"""Chat templates in the formats of well-known models, and a tokenizer that knows their special tokens."""

import json
from pathlib import Path

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<tool_call>", "</tool_call>"),
)

CHATML = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set rest = messages[1:] %}
    {%- set head = '<<SYS>>\n' ~ messages[0]['content'] ~ '\n<</SYS>>\n\n' %}
{%- else %}
    {%- set rest = messages %}
    {%- set head = '' %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (head if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

LLAMA3 = """
{%- set ns = namespace(text='') %}
{%- for message in messages %}
    {{- (bos_token if loop.index0 == 0 else '') + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

MISTRAL = """
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {%- if loop.last and messages[0].role == 'system' %}
            {{- '[INST] ' + messages[0].content + '\n\n' + message.content + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{% endif %}
    {%- else %}
        {%- generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('no system messages here') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' }}
    {%- if role == 'model' %}
        {%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}
    {%- else %}{{- message['content'] | trim + '<end_of_turn>' }}{% endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}
"""

PHI3 = """
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>\n' }}{% generation %}{{- message['content'] + '<|end|>' }}{% endgeneration %}{{- '\n' }}
    {%- else %}{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{- eos_token }}{% endif %}
"""

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{% endif %}
    {{- '# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{% endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_question=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages|length - 1 - loop.index0 %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}{%- set ns.last_question = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}{%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last_question and (loop.last or thoughts) %}
            {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}{{- content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

MARKED = {
    **{"llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML, "mistral": MISTRAL, "gemma": GEMMA},
    **{"phi3": PHI3, "qwen": QWEN},
}
"""The templates with `{% generation %}` blocks."""


def without_blocks(template: str) -> str:
    """The same template as most checkpoints have it: without `{% generation %}`."""
    for tag in ("generation", "endgeneration"):
        template = template.replace("{%- " + tag + " %}", "{%- if true %}" if tag == "generation" else "{%- endif %}")
        template = template.replace("{% " + tag + " %}", "{% if true %}" if tag == "generation" else "{% endif %}")
    return template


PLAIN = {name: without_blocks(template) for name, template in MARKED.items()}

TEXT = """How do magnets work? They pull on iron, and on each other. What is the capital of France? Paris, on the Seine.
Thanks! Once upon a time there was a fox who read the manual. Answer briefly. 12 + 30 = 42, naïve façade, 日本語, 🦙.
"""


def write_chat_tokenizer(folder: Path, template: str | None) -> Path:
    """Train a byte-level BPE with the special tokens of all formats into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CONVERSATIONS = [
    [{"role": "user", "content": "How do magnets work?"}, {"role": "assistant", "content": "They pull on iron."}],
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": " And 12 + 30? "},
        {"role": "assistant", "content": " 42, naïve façade 日本語 🦙\n"},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": "They pull on iron.\n\nParis."},
    ],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Thanks!"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Once upon a time"},
        {"role": "assistant", "content": "there was a fox"},
    ],
]

THINKING = [
    {"role": "user", "content": "12 + 30?"},
    {"role": "assistant", "content": "<think>\nadd them\n</think>\n\nIt is 42."},
    {"role": "user", "content": "And a fox?"},
    {"role": "assistant", "content": "<think>\nwhich fox\n</think>\n\nIt read the manual."},
]

WITH_TOOLS = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "How warm is Paris?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris <&>"}}}],
    },
    {"role": "tool", "content": "21 degrees"},
    {"role": "assistant", "content": "21 degrees."},
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tells the weather in a "city" & region',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
