from itertools import pairwise

import pytest
import torch

from litgpt.chat_template import ChatTemplate
from litgpt.data.conversations import Conversation, as_conversation
from litgpt.data.encoding import (
    close_gaps,
    encode_conversation,
    encode_with_offsets,
    learnt_messages,
    piece_offsets,
    prompt_text,
    show_tokens,
)
from litgpt.prompts import Alpaca, ChatML, Default, Llama3, R1Base
from litgpt.tokenizer import Tokenizer
from tests.chat_templates import CONVERSATIONS, MARKED, PLAIN, TEXT, THINKING, TOOLS, WITH_TOOLS, write_chat_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat"), None)


@pytest.fixture(scope="module")
def chat_tokenizer(chat_folder):
    return Tokenizer(chat_folder)


@pytest.fixture(scope="module")
def reference(chat_folder):
    """The tokenizer of transformers."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(chat_folder / "tokenizer.json"), **TOKENS)


def twenty_conversations():
    """Conversations of one to three exchanges with words, other scripts, spaces at both ends and empty answers."""
    texts = [line for line in TEXT.replace("?", "?\n").replace(",", ",\n").split("\n") if line] + [
        "",
        "  two  ",
        "\n\n",
    ]
    samples = []
    for n in range(20):
        turns = []
        for k in range(1 + n % 3):
            turns.append({"role": "user", "content": texts[(3 * n + k) % len(texts)] or "and?"})
            turns.append({"role": "assistant", "content": texts[(5 * n + 2 * k + 1) % len(texts)]})
        samples.append(turns)
    return samples


@pytest.mark.parametrize("name", MARKED)
def test_ids_and_masks_of_twenty_samples_are_those_of_transformers(name, chat_tokenizer, reference):
    conversations = twenty_conversations() + ([THINKING] if name == "qwen" else [])
    for messages in conversations:
        found = encode_conversation(Conversation(messages), chat_tokenizer, ChatTemplate(MARKED[name], TOKENS))
        expected = reference.apply_chat_template(
            messages, chat_template=MARKED[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert found["input_ids"].tolist() == expected["input_ids"]
        assert (found["labels"] != -100).long().tolist() == expected["assistant_masks"]
        learnt = found["labels"] != -100
        assert torch.equal(found["labels"][learnt], found["input_ids"][learnt])


@pytest.mark.parametrize("name", PLAIN)
def test_without_generation_blocks_the_mask_is_what_each_turn_adds(name, chat_tokenizer, reference):
    """Token by token against rendering message by message, as transformers does it."""
    for messages in twenty_conversations():
        found = encode_conversation(Conversation(messages), chat_tokenizer, ChatTemplate(PLAIN[name], TOKENS))
        text = reference.apply_chat_template(messages, chat_template=PLAIN[name], tokenize=False)
        encoded = reference(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found["input_ids"].tolist() == encoded["input_ids"]
        if name in ("phi3", "qwen") and len(messages) > 2:
            continue  # rendered as a part, a conversation has another end; see test_chat_template
        expected = [0] * len(encoded["input_ids"])
        for n in range(1, len(messages), 2):
            start = len(reference.apply_chat_template(
                messages[:n], chat_template=PLAIN[name], tokenize=False, add_generation_prompt=True
            ))  # fmt: skip
            end = len(reference.apply_chat_template(messages[: n + 1], chat_template=PLAIN[name], tokenize=False))
            for at, (_, stop) in enumerate(encoded["offset_mapping"]):
                begin = encoded["offset_mapping"][at - 1][1] if at else 0
                expected[at] |= int(start < max(stop, begin + 1) and begin < end)
        assert (found["labels"] != -100).long().tolist() == expected


def test_tools_reach_the_template_and_tool_results_are_not_learnt(chat_tokenizer):
    template = ChatTemplate(PLAIN["qwen"], TOKENS)
    found = encode_conversation(Conversation(WITH_TOOLS, TOOLS), chat_tokenizer, template)
    learnt = show_tokens(chat_tokenizer, found["input_ids"][found["labels"] != -100].tolist())
    assert '"name": "weather", "arguments": {"city": "Paris <&>"}' in learnt and "# Tools" not in learnt
    assert "tool_response" not in learnt and "21 degrees.<|im_end|>" in learnt
    assert "# Tools" in show_tokens(chat_tokenizer, found["input_ids"].tolist())


def learnt_text(messages, tokenizer, style, train_on):
    found = encode_conversation(Conversation(messages), tokenizer, style, train_on)
    return show_tokens(tokenizer, found["input_ids"][found["labels"] != -100].tolist())


MARKS = [dict(m) for m in CONVERSATIONS[1]]
MARKS[3]["train"], MARKS[5]["weight"] = True, 0


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", "Paris.<|im_end|> 42, naïve façade 日本語 🦙\n<|im_end|>"),
        ("last", " 42, naïve façade 日本語 🦙\n<|im_end|>"),
        ("marked", " 42, naïve façade 日本語 🦙\n<|im_end|>"),
    ],
)
def test_train_on_chooses_turns(train_on, expected, chat_tokenizer):
    assert learnt_text(MARKS, chat_tokenizer, ChatTemplate(MARKED["chatml"], TOKENS), train_on) == expected
    with_breaks = expected.replace("<|im_end|>", "<|im_end|>\n")
    assert learnt_text(MARKS, chat_tokenizer, ChatTemplate(PLAIN["chatml"], TOKENS), train_on) == with_breaks
    in_style = expected.replace("<|im_end|>", "</s>")
    assert learnt_text(MARKS, chat_tokenizer, ChatML(), train_on) == in_style


@pytest.mark.parametrize("style", [ChatTemplate(PLAIN["chatml"], TOKENS), ChatML(), Llama3()])
def test_train_on_all_learns_every_token(style, chat_tokenizer):
    found = encode_conversation(Conversation(MARKS), chat_tokenizer, style, "all")
    assert torch.equal(found["labels"], found["input_ids"]) and len(found["labels"]) > 50


def test_learnt_messages():
    assert learnt_messages(CONVERSATIONS[1], "assistant") == {1, 3, 5}
    assert learnt_messages(CONVERSATIONS[1], "last") == {5}
    assert learnt_messages(CONVERSATIONS[1], "marked") == set()
    assert learnt_messages(MARKS, "assistant") == {1, 3}


def test_instruction_in_a_style_is_prompt_then_answer_then_eos(chat_tokenizer):
    row = {"instruction": "How do magnets work?", "input": "iron", "output": "They pull."}
    found = encode_conversation(as_conversation(row), chat_tokenizer, Alpaca())
    prompt = chat_tokenizer.encode(Alpaca().apply(row["instruction"], input="iron"))
    answer = chat_tokenizer.encode(row["output"], bos=False, eos=True)
    assert found["input_ids"].tolist() == [*prompt.tolist(), *answer.tolist()]
    assert found["labels"].tolist() == [-100] * len(prompt) + answer.tolist()
    assert answer[-1] == chat_tokenizer.eos_id
    assert found["raw"] == len(chat_tokenizer.encode(row["instruction"])) + len(answer)


def test_instruction_with_a_template_has_its_input_in_the_question(chat_tokenizer):
    row = {"instruction": "Say it", "input": "iron", "output": "They pull."}
    found = encode_conversation(as_conversation(row), chat_tokenizer, ChatTemplate(MARKED["chatml"], TOKENS))
    assert show_tokens(chat_tokenizer, found["input_ids"].tolist()) == (
        "<|im_start|>user\nSay it\n\niron<|im_end|>\n<|im_start|>assistant\nThey pull.<|im_end|>\n"
    )


def test_turns_in_a_style_for_single_questions_are_joined(chat_tokenizer):
    found = encode_conversation(Conversation(CONVERSATIONS[2]), chat_tokenizer, ChatML())
    assert show_tokens(chat_tokenizer, found["input_ids"].tolist()) == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant\n"
        "</s><|im_start|>user\nOnce upon a time<|im_end|>\n<|im_start|>assistant\nthere was a fox</s>"
    )


def test_turns_in_a_style_for_conversations(chat_tokenizer):
    llama = encode_conversation(Conversation(CONVERSATIONS[1]), chat_tokenizer, Llama3())
    text = show_tokens(chat_tokenizer, llama["input_ids"].tolist())
    asked = [m for m in CONVERSATIONS[1][:5]]
    assert text == Llama3().apply(asked) + CONVERSATIONS[1][5]["content"] + "</s>"
    learnt = show_tokens(chat_tokenizer, llama["input_ids"][llama["labels"] != -100].tolist())
    assert learnt == "Paris.<|eot_id|>42, naïve façade 日本語 🦙<|eot_id|>They pull on iron.\n\nParis.</s>"
    r1 = encode_conversation(Conversation(CONVERSATIONS[1]), chat_tokenizer, R1Base())
    learnt = show_tokens(chat_tokenizer, r1["input_ids"][r1["labels"] != -100].tolist())
    assert learnt == "Paris.</s>42, naïve façade 日本語 🦙</s>They pull on iron.\n\nParis.</s>"


def test_bos_comes_once_and_only_first(tiny_tokenizer_dir):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    tokenizer.use_bos = True
    ids = encode_conversation(Conversation(CONVERSATIONS[1]), tokenizer, Default())["input_ids"].tolist()
    assert ids[0] == tokenizer.bos_id and ids[1:].count(tokenizer.bos_id) == (
        3 if tokenizer.bos_id == tokenizer.eos_id else 0
    )


def test_tool_calls_have_no_place_in_a_style(chat_tokenizer):
    with pytest.raises(ValueError, match=r"prompt style Alpaca has no place.*--data.prompt_style template"):
        encode_conversation(Conversation(WITH_TOOLS, TOOLS), chat_tokenizer, Alpaca())


def test_content_in_parts_is_joined_and_images_are_refused(chat_tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    answer = {"role": "assistant", "content": "c"}
    found = encode_conversation(Conversation([*parts, answer]), chat_tokenizer, Default())
    assert show_tokens(chat_tokenizer, found["input_ids"].tolist()) == "abc</s>"
    parts[0]["content"][1] = {"type": "image_url", "image_url": "x"}
    with pytest.raises(ValueError, match="a part that is no text"):
        encode_conversation(Conversation([*parts, answer]), chat_tokenizer, Default())


@pytest.mark.parametrize(
    "style", [ChatTemplate(PLAIN["chatml"], TOKENS), ChatTemplate(MARKED["qwen"], TOKENS), ChatML()]
)
def test_prompt_text_is_what_stands_before_the_last_answer(style):
    text = prompt_text(Conversation(CONVERSATIONS[0]), style)
    assert text == "<|im_start|>user\nHow do magnets work?<|im_end|>\n<|im_start|>assistant\n"


def test_single_turns_cannot_be_chosen_where_blocks_are_fewer_than_turns(chat_tokenizer):
    source = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    with pytest.raises(ValueError, match="has 3 messages of the assistant, but the chat template marks 1"):
        encode_conversation(Conversation(MARKS), chat_tokenizer, ChatTemplate(source))


class WordTokenizer:
    """A tokenizer that nothing is known about: an id for each word."""

    def encode(self, text, bos=None, eos=False):
        return torch.tensor([len(word) for word in text.split()])


def test_unknown_tokenizer_is_encoded_piece_by_piece():
    found = encode_conversation(
        Conversation([{"role": "user", "content": "a bb"}, {"role": "assistant", "content": "ccc dddd"}]),
        WordTokenizer(),
        ChatTemplate("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"),
    )
    assert found["input_ids"].tolist() == [4, 1, 2, 9, 3, 4]
    assert found["labels"].tolist() == [-100, -100, -100, 9, 3, 4]  # there is no generation prompt to tell the role


def test_offsets_reach_from_one_token_to_the_next(chat_tokenizer):
    text = "<s>  a  日本 🦙 \n\n b</s>"
    ids, offsets = encode_with_offsets(chat_tokenizer, text, [])
    assert len(ids) == len(offsets) and offsets[0] == (0, 3) and offsets[-1] == (len(text) - 4, len(text))
    assert all(begin <= before[1] for before, (begin, _) in pairwise(offsets))
    assert close_gaps([(0, 1), (2, 3), (2, 3), (5, 5)]) == [(0, 1), (1, 3), (2, 3), (3, 5)]


def test_pieces_tell_what_they_stand_for_unless_the_text_was_changed():
    assert piece_offsets(["\u2581a", "\u2581", "<0xC3>", "<0xA9>", "b"], "a éb") == [
        (0, 1),
        (1, 2),
        (2, 3),
        (2, 3),
        (3, 4),
    ]
    assert piece_offsets(["\u2581", "a"], "a") == [(0, 0), (0, 1)]
    assert piece_offsets(["\u2581a"], "A") is None and piece_offsets(["\u2581a"], "a ") is None


def test_sentencepiece_that_changes_the_text_begins_anew_at_each_turn(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(TEXT * 5)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=360, byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False, remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc_cf",
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path)
    found = encode_conversation(Conversation(CONVERSATIONS[1]), tokenizer, ChatTemplate(MARKED["llama2"], TOKENS))
    learnt = tokenizer.decode(found["input_ids"][found["labels"] != -100])
    assert "pull on iron" in learnt and "france" not in learnt and "thanks" not in learnt


def test_sentencepiece_reads_special_tokens_in_the_text(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(TEXT * 5)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=360, byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path)
    for messages in CONVERSATIONS[:2]:
        template = ChatTemplate(MARKED["llama2"], TOKENS)
        found = encode_conversation(Conversation(messages), tokenizer, template)
        ids = found["input_ids"]
        n = len(messages) // 2
        assert (ids == tokenizer.bos_id).sum() == (ids == tokenizer.eos_id).sum() == n
        text, spans = template.render_with_spans(messages)
        learnt = tokenizer.decode(ids[found["labels"] != -100]).replace(" ", "").replace("⁇", "")
        expected = "".join(text[slice(*span)] for span in spans).replace("</s>", "").replace(" ", "")
        assert learnt == expected
        assert (found["labels"] == tokenizer.eos_id).sum() == n and not (found["labels"] == tokenizer.bos_id).any()
