"""Conversations as token ids, and which of them are learnt."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch

from litgpt.chat_template import ChatTemplate, with_input
from litgpt.data.conversations import Conversation, Message
from litgpt.prompts import Llama3, PromptStyle, R1Base

TrainOn = Literal["assistant", "last", "marked", "all"]

Span = tuple[int, int]

MESSAGE_STYLES = (Llama3, R1Base)
"""Styles that take a whole conversation; all others dress one question."""


class Segment(NamedTuple):
    """A stretch of text that is encoded by itself."""

    text: str
    message: int | None = None
    """Number of the assistant's message that this is; None for everything else."""


def encode_conversation(
    conversation: Conversation,
    tokenizer: Any,
    prompt_style: PromptStyle,
    train_on: TrainOn = "assistant",
    ignore_index: int = -100,
) -> dict[str, Any]:
    """Token ids of a conversation and, beneath each, itself or `ignore_index` where it is not learnt.

    With a prompt style, question and answer are encoded apart and each answer ends with EOS. With a chat template, the
    text is encoded as a whole and has no token that the template does not write.

    Args:
        conversation: The messages.
        tokenizer: Encodes text.
        prompt_style: A style, or a `ChatTemplate`.
        train_on: "assistant": all answers but those with `"train": false` or `"weight": 0`; "last": the last of these;
            "marked": the messages with `"train": true` or a weight above 0; "all": every token.
        ignore_index: Label of what is not learnt.

    Returns:
        `{"input_ids": (T,) int64, "labels": (T,) int64, "raw": number of tokens of the bare questions and answers}`
    """
    learnt = learnt_messages(conversation.messages, train_on)
    if isinstance(prompt_style, ChatTemplate):
        ids, is_learnt = encode_templated(conversation, tokenizer, prompt_style, learnt, train_on)
        raw = sum(len(encode(tokenizer, text_content(m) or "")) for m in conversation.messages)
    else:
        ids, is_learnt, raw = encode_segments(conversation, tokenizer, prompt_style, learnt)
    ids = torch.tensor(ids, dtype=torch.int64)
    labels = ids.clone()
    if train_on != "all":
        labels[~torch.tensor(is_learnt, dtype=torch.bool)] = ignore_index
    return {"input_ids": ids, "labels": labels, "raw": raw}


def learnt_messages(messages: Sequence[Message], train_on: TrainOn) -> set[int]:
    """Numbers of the assistant's messages that are learnt."""
    marks = {n: mark_of(message) for n, message in enumerate(messages) if message["role"] == "assistant"}
    if train_on == "marked":
        return {n for n, mark in marks.items() if mark}
    wanted = {n for n, mark in marks.items() if mark is not False}
    return {max(wanted)} if train_on == "last" and wanted else wanted


def mark_of(message: Message) -> bool | None:
    """Whether a message asks to be learnt, by `train` (true or false) or `weight` (0 or 1); None if it says nothing."""
    mark = message.get("train", message.get("weight"))
    return None if mark is None else bool(mark)


def encode_segments(
    conversation: Conversation, tokenizer: Any, style: PromptStyle, learnt: set[int]
) -> tuple[list[int], list[bool], int]:
    """Ids, whether each is learnt, and how many there would be of the bare questions and answers."""
    ids: list[int] = []
    is_learnt: list[bool] = []
    raw = 0
    segments = style_segments(conversation, style)
    for n, segment in enumerate(segments):
        is_answer = segment.message is not None
        part = encode(tokenizer, segment.text, bos=None if n == 0 else False, eos=is_answer)
        if is_answer and n + 1 < len(segments) and segments[n + 1].text.startswith(end_of_turn(style)):
            part = encode(tokenizer, segment.text + end_of_turn(style))  # the style has its own end; EOS ends the last
            segments[n + 1] = Segment(segments[n + 1].text[len(end_of_turn(style)) :])
        ids += part
        is_learnt += [segment.message in learnt] * len(part)
        if is_answer:
            raw += len(part)
    for n, message in enumerate(m for m in conversation.messages if m["role"] == "user"):
        raw += len(encode(tokenizer, text_content(message) or "", bos=None if n == 0 else False))
    return ids, is_learnt, raw


def style_segments(conversation: Conversation, style: PromptStyle) -> list[Segment]:
    """Prompts and answers in turn. A style for single questions dresses each question of a conversation by itself.

    Raises:
        ValueError: A message has no place in a prompt style. One line.
    """
    messages = conversation.messages
    for message in messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            raise ValueError(
                f"calls tools, for which prompt style {type(style).__name__} has no place: use the tokenizer's chat "
                "template with --data.prompt_style template"
            )
    texts = [{"role": message["role"], "content": text_content(message)} for message in messages]
    system = texts[0]["content"] if texts[0]["role"] == "system" else None
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if isinstance(style, MESSAGE_STYLES) and len(answers) > 1:
        return message_style_segments(texts, style, answers)
    segments = []
    for n in answers:
        sys_prompt = system if n == answers[0] else None
        segments.append(Segment(style.apply(texts[n - 1]["content"], sys_prompt=sys_prompt, **conversation.fields)))
        segments.append(Segment(texts[n]["content"], n))
    return segments


def message_style_segments(texts: list[Message], style: PromptStyle, answers: list[int]) -> list[Segment]:
    """The segments of a style that writes whole conversations: what it writes up to each answer, and the answer."""
    segments, done = [], ""
    for n in answers:
        text = style.apply(texts[:n])
        answer = texts[n]["content"].strip()
        segments += [Segment(text[len(done) :]), Segment(answer, n)]
        done = text + answer
    return segments


def end_of_turn(style: PromptStyle) -> str:
    """What the style itself writes after an answer in the middle of a conversation."""
    return "<|eot_id|>" if isinstance(style, Llama3) else "\0"


def prompt_text(conversation: Conversation, style: PromptStyle) -> str:
    """The text before the last answer, from which a model goes on."""
    last = max(n for n, message in enumerate(conversation.messages) if message["role"] == "assistant")
    if isinstance(style, ChatTemplate):
        return style.render(template_messages(conversation)[:last], conversation.tools, add_generation_prompt=True)
    return "".join(s.text for s in style_segments(conversation, style) if s.message is None or s.message < last)


def text_content(message: Message) -> str | None:
    """The text of a message whose content may be a list of parts."""
    content = message["content"]
    if not isinstance(content, list):
        return content
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if any(not isinstance(text, str) for text in texts):
        raise ValueError(f"a message of {message['role']!r} has a part that is no text; only text can be learnt")
    return "".join(texts)


def encode_templated(
    conversation: Conversation, tokenizer: Any, template: ChatTemplate, learnt: set[int], train_on: TrainOn
) -> tuple[list[int], list[bool]]:
    """Ids of the whole text, and whether each is learnt: tokens that touch the span of a learnt message are."""
    messages, tools = template_messages(conversation), conversation.tools
    if train_on == "all":
        ids, _ = encode_with_offsets(tokenizer, template.render(messages, tools), [])
        return ids, [True] * len(ids)
    text, spans = template.render_with_spans(messages, tools)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) == len(answers):
        spans = [span for n, span in zip(answers, spans) if n in learnt]
    elif train_on == "last":
        spans = spans[-1:]
    elif learnt != set(answers):
        raise ValueError(
            f"has {len(answers)} messages of the assistant, but the chat template marks {len(spans)} as generated: "
            "single messages cannot be chosen"
        )
    ids, offsets = encode_with_offsets(tokenizer, text, spans)
    is_learnt, at = [], 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        is_learnt.append(at < len(spans) and start < spans[at][1] and max(end, start + 1) > spans[at][0])
    return ids, is_learnt


def template_messages(conversation: Conversation) -> list[Message]:
    """The messages for a template: the input of an instruction joined to it, without what is said to the training."""
    messages = [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in conversation.messages]
    if conversation.fields.get("input"):
        asked = next(message for message in messages if message["role"] == "user")
        asked["content"] = with_input(asked["content"], conversation.fields)
    return messages


def encode(tokenizer: Any, text: str, bos: bool | None = False, eos: bool = False) -> list[int]:
    """Ids of a text."""
    return tokenizer.encode(text, bos=bos, eos=eos).tolist()


def encode_with_offsets(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Ids of a text that spells out its special tokens, and the characters `(start, end)` that each stands for.

    Args:
        tokenizer: Anything that can encode.
        text: The text.
        spans: Where an unknown tokenizer, which cannot say what a token stands for, must begin a new token.
    """
    backend = getattr(tokenizer, "backend", None)
    if backend == "huggingface":
        encoding = tokenizer.processor.encode(text, add_special_tokens=False)
        return encoding.ids, close_gaps(encoding.offsets)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    if backend == "sentencepiece":
        for start, end, special in split_at_special(tokenizer, text):
            if special is not None:
                ids.append(special)
                offsets.append((start, end))
            else:
                for part, here in encode_plain(tokenizer, text[start:end], start, spans):
                    ids += part
                    offsets += here
        return ids, offsets
    for start, end in stretches(text, 0, spans):
        part = encode(tokenizer, text[start:end])
        ids += part
        offsets += [(start, end)] * len(part)
    return ids, offsets


def stretches(text: str, start: int, spans: Sequence[Span]) -> Iterable[Span]:
    """The text between the edges of `spans`, for a `text` that begins at `start`; counted from its own beginning."""
    edges = {edge - start for span in spans for edge in span if 0 < edge - start < len(text)}
    return pairwise(sorted({0, len(text), *edges}))


def encode_plain(
    tokenizer: Any, text: str, start: int, spans: Sequence[Span]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Ids and offsets of a text without special tokens, which begins at `start`, by a sentencepiece model.

    Where the model changes the text before it splits it, the pieces do not tell what they stand for: then a new piece
    begins at each edge of `spans`.
    """
    processor = tokenizer.processor
    if (offsets := piece_offsets(processor.encode(text, out_type=str), text)) is not None:
        yield processor.encode(text), [(start + begin, start + end) for begin, end in offsets]
        return
    for begin, end in stretches(text, start, spans):
        ids = processor.encode(text[begin:end])
        yield ids, [(start + begin, start + end)] * len(ids)


def piece_offsets(pieces: Sequence[str], text: str) -> list[Span] | None:
    """Characters of `text` that each piece stands for; None if the pieces joined are another text."""
    raw = text.encode("utf-8", "replace")
    character = [n for n, letter in enumerate(text) for _ in letter.encode("utf-8", "replace")]  # of each byte
    offsets, at = [], 0
    for n, piece in enumerate(pieces):
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        content = bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()
        if n == 0 and content[:1] == b" " and not raw.startswith(content):
            content = content[1:]  # the space that is put in front of every text
        if not raw.startswith(content, at):
            return None
        begin = character[at] if at < len(raw) else len(text)
        at += len(content)
        offsets.append((begin, character[at - 1] + 1 if content else begin))
    return offsets if at == len(raw) else None


def close_gaps(offsets: Sequence[Span]) -> list[Span]:
    """Offsets of which each begins where the one before ends: some tokenizers leave out the space before a word."""
    closed, before = [], 0
    for begin, end in offsets:
        closed.append((min(begin, before), max(begin, end)))
        before = end
    return closed


def split_at_special(tokenizer: Any, text: str) -> list[tuple[int, int, int | None]]:
    """Stretches `(start, end, id)` of a text: the special tokens that it spells out, and what lies between (id None).

    Sentencepiece itself reads "<s>" in a text as three letters.
    """
    found_stretches, at = [], 0
    specials = special_pieces(tokenizer)
    while at < len(text):
        found = [(place, name) for name in specials if (place := text.find(name, at)) >= 0]
        place, name = min(found, default=(len(text), ""))
        if place > at:
            found_stretches.append((at, place, None))
        if name:
            found_stretches.append((place, place + len(name), specials[name]))
        at = place + len(name)
    return found_stretches


@lru_cache(maxsize=8)
def special_pieces(tokenizer: Any) -> dict[str, int]:
    """Spelling of each control token of a sentencepiece model, with its id."""
    processor = tokenizer.processor
    return {processor.id_to_piece(i): i for i in range(processor.vocab_size()) if processor.is_control(i)}


def show_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Text of ids with the special tokens in it."""
    if getattr(tokenizer, "backend", None) == "huggingface":
        return tokenizer.processor.decode(ids, skip_special_tokens=False)
    if getattr(tokenizer, "backend", None) != "sentencepiece":
        return tokenizer.decode(torch.tensor(ids))
    names = {i: name for name, i in special_pieces(tokenizer).items()}
    parts: list[str] = []
    plain: list[int] = []
    for i in [*ids, None]:
        if i is None or i in names:
            parts += [tokenizer.decode(torch.tensor(plain))] if plain else []
            parts += [names[i]] if i is not None else []
            plain = []
        else:
            plain.append(i)
    return "".join(parts)
