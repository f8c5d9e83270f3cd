import json
import pickle

import pytest

from litgpt.chat_template import ChatTemplate
from litgpt.prompts import load_prompt_style, save_prompt_style
from litgpt.tokenizer import Tokenizer
from tests.chat_templates import (
    CHATML,
    CONVERSATIONS,
    MARKED,
    PLAIN,
    QWEN,
    THINKING,
    TOOLS,
    WITH_TOOLS,
    without_blocks,
    write_chat_tokenizer,
)

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    folder = write_chat_tokenizer(tmp_path_factory.mktemp("chat"), None)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **TOKENS)


def fitting(name):
    """The conversations that a template takes."""
    return [c for c in CONVERSATIONS if name != "gemma" or c[0]["role"] != "system"]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_render_equals_transformers(name, add_generation_prompt, reference):
    template = ChatTemplate(PLAIN[name], TOKENS)
    for messages in fitting(name):
        for end in range(1 + (messages[0]["role"] == "system"), len(messages) + 1):
            expected = reference.apply_chat_template(
                messages[:end], chat_template=PLAIN[name], tokenize=False, add_generation_prompt=add_generation_prompt
            )
            found = template.render(messages[:end], add_generation_prompt=add_generation_prompt)
            assert found == expected and len(found) > 10


@pytest.mark.parametrize("messages", [WITH_TOOLS, [dict(WITH_TOOLS[1]), {**WITH_TOOLS[2], "reasoning": "hm"}]])
def test_tools_and_thoughts_are_rendered_as_transformers_does(messages, reference):
    source = PLAIN["qwen"]
    expected = reference.apply_chat_template(messages, tools=TOOLS, chat_template=source, tokenize=False)
    found = ChatTemplate(source, TOKENS).render(messages, TOOLS)
    assert found == expected
    assert '"city": "Paris <&>"' in found and '\\"city\\" & region' in found


@pytest.mark.parametrize("name", PLAIN)
def test_spans_without_generation_blocks_are_those_of_the_blocks(name):
    """But for the line break after the token that ends the turn, which the template writes with the turn."""
    conversations = fitting(name) + ([THINKING, WITH_TOOLS] if name == "qwen" else [])
    if name == "mistral":
        conversations.pop()  # see below
    for messages in conversations:
        text, marked = ChatTemplate(MARKED[name], TOKENS).render_with_spans(messages)
        same_text, found = ChatTemplate(PLAIN[name], TOKENS).render_with_spans(messages)
        assert text == same_text
        n_answers = sum(message["role"] == "assistant" for message in messages)
        assert len(found) == len(marked) == n_answers
        for (start, end), (start_marked, end_marked) in zip(found, marked):
            assert start == start_marked
            assert text[end_marked:end] in ("", "\n", "\n</s>")
            assert text[end_marked:].startswith(text[end_marked:end])


def test_spans_of_a_template_that_drops_the_thoughts_of_earlier_turns():
    text, spans = ChatTemplate(PLAIN["qwen"], TOKENS).render_with_spans(THINKING)
    assert [text[slice(*span)] for span in spans] == [
        "It is 42.<|im_end|>\n",
        "<think>\nwhich fox\n</think>\n\nIt read the manual.<|im_end|>\n",
    ]


def test_template_that_changes_the_prompt_of_earlier_turns_is_located_by_content():
    """The generation prompt opens the thoughts, and no turn is rendered that way afterwards."""
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{{ '|' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    text, spans = ChatTemplate(source).render_with_spans(THINKING)
    assert [text[slice(*span)] for span in spans] == ["\n\nIt is 42.|", "\n\nIt read the manual.|"]


def test_template_that_moves_the_system_prompt_to_the_last_question_is_located_by_content():
    text, spans = ChatTemplate(PLAIN["mistral"], TOKENS).render_with_spans(CONVERSATIONS[2])
    assert [text[slice(*span)] for span in spans] == ["</s>", "there was a fox</s>"]


def test_turn_that_cannot_be_found_is_refused():
    source = "{% for m in messages %}{{ m.role }}{% endfor %}{{ messages | length }}"
    with pytest.raises(ValueError, match="does not tell where message 2, of the assistant, begins"):
        ChatTemplate(source).spans(CONVERSATIONS[0])


def test_template_refuses_with_its_own_words():
    with pytest.raises(ValueError, match="refuses the conversation: no system messages here"):
        ChatTemplate(PLAIN["gemma"], TOKENS).render(CONVERSATIONS[2])


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "list in tokenizer_config.json"]
)
def test_template_is_found_in_a_checkpoint_folder(place, tmp_path):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token is defined }}"
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(source)
        config["chat_template"] = "another, of former times"
    elif place == "chat_template.json":
        (tmp_path / place).write_text(json.dumps({"chat_template": source}))
    elif place == "tokenizer_config.json":
        config["chat_template"] = source
    else:
        config["chat_template"] = [
            {"name": "tool_use", "template": "tools: {{ tools | length }}"},
            {"name": "default", "template": source},
        ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_checkpoint(tmp_path)
    assert template.render([{"role": "user", "content": "hi"}]) == "<s>hi</s>False"
    if place.startswith("list"):
        assert template.render([{"role": "user", "content": "hi"}], TOOLS) == "tools: 1"


def test_checkpoint_without_template_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"has no chat template: expected chat_template\.jinja"):
        ChatTemplate.from_checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["{% for m in messages %}", "{{ messages | nosuchfilter }}", "{% include 'x' %}"])
def test_invalid_template_is_refused_in_one_line(source, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ValueError) as caught:
        ChatTemplate.from_checkpoint(tmp_path).render([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value) and "chat template" in str(caught.value)


def test_template_is_a_prompt_style_that_a_checkpoint_keeps(tmp_path):
    template = ChatTemplate(without_blocks(CHATML), TOKENS)
    save_prompt_style(template, tmp_path)
    for again in (load_prompt_style(tmp_path), pickle.loads(pickle.dumps(template))):
        assert again.apply("hi", sys_prompt="be kind", input="there") == (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi\n\nthere<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.parametrize(
    ("name", "stop"), [("chatml", "<|im_end|>"), ("gemma", "<end_of_turn>"), ("llama3", "<|eot_id|>"), ("llama2", None)]
)
def test_end_of_turn_is_a_stop_token(name, stop, tmp_path):
    tokenizer = Tokenizer(write_chat_tokenizer(tmp_path, PLAIN[name]))
    stops = ChatTemplate.from_checkpoint(tmp_path).stop_tokens(tokenizer)
    assert stops == ([tokenizer.eos_id], *([[tokenizer.token_to_id(stop)]] if stop else []))


def test_messages_are_not_changed_by_rendering():
    before = json.dumps(WITH_TOOLS)
    ChatTemplate(QWEN, TOKENS).render_with_spans(WITH_TOOLS, TOOLS)
    assert json.dumps(WITH_TOOLS) == before
