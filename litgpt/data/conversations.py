"""Samples as users have them, told apart by their keys, and turned into conversations.

    instruction     {"instruction": ..., "output": ...}, optionally "input" and whatever a prompt style uses
    messages        {"messages": [{"role": ..., "content": ...}, ...]}, optionally "tools" (OpenAI)
    conversations   {"conversations": [{"from": "human", "value": ...}, ...]}, optionally "system", "tools" (ShareGPT)
    completion      {"prompt": ..., "completion": ...}, each a text or a list of messages
    preference      {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages
    unpaired        {"prompt": ..., "completion": ..., "label": true or false}

A sample stays the plain dict that stood in the file until it is needed.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"},
    **{"gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool"},
    **{"function": "tool", "function_call": "assistant", "function_response": "tool", "observation": "tool"},
}
"""What a role may be called -> its name in a conversation."""

KINDS = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "completion": ("prompt", "completion"),
}
"""Kind of a sample -> the keys by which it is known; the first that fits counts."""

KNOWN_FORMS = (
    "instruction + output, messages, conversations, prompt + completion, chosen + rejected, prompt + completion + label"
)

Message = dict[str, Any]


@dataclass
class Conversation:
    """Messages in their order, and what else a sample says."""

    messages: list[Message]
    """Each has `role` ("system", "user", "assistant", "tool") and `content`, and may have `tool_calls`, `name` ..."""
    tools: list[Any] | None = None
    """Descriptions of the functions that the assistant may call, as JSON schemas."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further keys of an instruction, such as `input`, that a prompt style may use."""


@dataclass
class PreferencePair:
    """Two answers to one prompt, of which the first is the better one."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None


@dataclass
class UnpairedAnswer:
    """An answer that was liked or not."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: list[Any] | None = None


def kind_of(row: Mapping[str, Any]) -> str | None:
    """Which of `KINDS` a sample is, None if it is none of them."""
    return next((kind for kind, keys in KINDS.items() if all(row.get(key) is not None for key in keys)), None)


def as_conversation(row: Mapping[str, Any], where: str = "sample") -> Conversation:
    """The conversation that a sample of any kind but preference and unpaired is.

    Args:
        row: The sample; it is not changed.
        where: Names the sample in errors: file and number.

    Raises:
        ValueError: A key is missing or of another type, or the roles are out of order. One line.
    """
    kind = kind_of(row)
    if kind in ("messages", "conversations"):
        messages = read_messages(row[kind], where, kind)
        if isinstance(system := row.get("system"), str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        check_turns(messages, where, kind)
        return Conversation(messages, read_tools(row, where))
    if kind == "completion":
        messages = [*read_side(row, "prompt", "user", where), *read_side(row, "completion", "assistant", where)]
        check_turns(messages, where, "completion")
        return Conversation(messages, read_tools(row, where))
    if kind == "instruction":
        prompt, answer = (text_of(row, key, where) for key in KINDS["instruction"])
        fields = {key: value for key, value in row.items() if key not in KINDS["instruction"]}
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        if isinstance(system := fields.pop("system", None), str) and system:
            messages.insert(0, {"role": "system", "content": system})
        return Conversation(messages, fields={key: "" if v is None else v for key, v in fields.items()})
    raise ValueError(describe_misfit(row, where, kind))


def describe_misfit(row: Mapping[str, Any], where: str, kind: str | None) -> str:
    """Why a sample is no conversation, as far as its keys tell."""
    keys = ", ".join(map(str, row)) or "none"
    if kind:
        return f"{where}: is a {kind} sample (keys {keys}); those are for `litgpt finetune_dpo`"
    for name in ("instruction", "completion"):
        first, second = KINDS[name]
        if first in row or (second in row and name == "instruction"):
            missing = second if row.get(first) is not None else first
            what = "is null" if missing in row else f"is missing (keys {keys})"
            return f"{where}: the key {missing!r} {what}; a sample with {first!r} needs a text in {missing!r}"
    return f"{where}: has the keys {keys}; expected those of one known form: {KNOWN_FORMS}"


def as_preference(row: Mapping[str, Any], where: str = "sample") -> PreferencePair:
    """The pair that a sample with `chosen` and `rejected` is. Without `prompt` the answers are whole conversations."""
    for key in KINDS["preference"]:
        if row.get(key) is None:
            raise ValueError(f"{where}: needs the key {key!r}, a text or a list of messages; has {', '.join(row)}")
    chosen, rejected = (read_side(row, key, "assistant", where) for key in KINDS["preference"])
    if row.get("prompt") is not None:
        prompt = read_side(row, "prompt", "user", where)
    else:
        n = 0
        while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
            n += 1
        if n == 0:
            raise ValueError(
                f"{where}: 'prompt' is missing; without it, 'chosen' and 'rejected' must be conversations that begin "
                "alike"
            )
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt and len(prompt) < len(chosen):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # some files repeat the prompt in each answer
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        check_turns([*prompt, *answer], where, key)
    return PreferencePair(prompt, chosen, rejected, read_tools(row, where))


def as_unpaired(row: Mapping[str, Any], where: str = "sample") -> UnpairedAnswer:
    """The judged answer that a sample with `prompt`, `completion` and `label` is."""
    for key in KINDS["unpaired"]:
        if row.get(key) is None:
            raise ValueError(f"{where}: needs the key {key!r}; has {', '.join(map(str, row))}")
    labels = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    label = labels.get(str(row["label"]).strip().lower())
    if label is None:
        raise ValueError(f"{where}: 'label' is {row['label']!r}; expected true or false")
    prompt, completion = read_side(row, "prompt", "user", where), read_side(row, "completion", "assistant", where)
    check_turns([*prompt, *completion], where, "completion")
    return UnpairedAnswer(prompt, completion, label, read_tools(row, where))


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text under `key`."""
    if not isinstance(value := row[key], str):
        raise ValueError(f"{where}: {key!r} is a {type(value).__name__}; expected a text")
    return value


def read_side(row: Mapping[str, Any], key: str, role: str, where: str) -> list[Message]:
    """The messages under `key`; a text is one message of `role`."""
    value = row[key]
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        return [{"role": role, "content": value}]
    return read_messages([value] if isinstance(value, Mapping) else value, where, key)


def read_messages(value: Any, where: str, key: str) -> list[Message]:
    """Messages in OpenAI's form out of a list in that form or in ShareGPT's; a table may hold the list as JSON text."""
    value = parse_json_text(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        what = "an empty list" if isinstance(value, list) else f"a {type(value).__name__}"
        raise ValueError(f"{where}: {key!r} is {what}; expected a list of messages")
    return [read_message(message, f"{where}: message {n} of {key!r}") for n, message in enumerate(value, start=1)]


def read_message(message: Any, where: str) -> Message:
    """One message with our names for role and text; everything else is passed through."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is a {type(message).__name__}; expected an object with 'role' and 'content'")
    role_key, text_key = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role = message.get(role_key)
    if role not in ROLES:
        known = "system, user, assistant, tool" if role_key == "role" else "system, human, gpt, tool"
        raise ValueError(f"{where} has {role_key!r}: {role!r}; expected one of {known}")
    rest = {k: v for k, v in message.items() if k not in (role_key, text_key) and v is not None}
    content = message.get(text_key)
    if content is None and not rest.get("tool_calls"):
        raise ValueError(f"{where} has no {text_key!r}; expected a text")
    if not isinstance(content, (str, list, type(None))):
        raise ValueError(f"{where} has a {type(content).__name__} as {text_key!r}; expected a text")
    return {"role": ROLES[role], "content": content, **rest}


def check_turns(messages: Sequence[Message], where: str, key: str) -> None:
    """Refuse an order of roles from which no turn of the assistant can be learnt."""
    roles = [message["role"] for message in messages]
    places = f"{where}: {key!r} has the roles {', '.join(roles[:8])}{' ...' if len(roles) > 8 else ''}"
    if "system" in roles[1:]:
        raise ValueError(f"{places}: 'system' may only come first")
    if "assistant" not in roles:
        raise ValueError(f"{places}: no message of the assistant, so there is nothing to learn")
    if roles[roles[0] == "system"] != "user":
        raise ValueError(f"{places}: the first message after 'system' must be of the user")
    for before, after in pairwise(roles):
        if before == after and before != "tool":
            raise ValueError(f"{places}: two messages of {before!r} follow each other")
        if after == "tool" and before not in ("assistant", "tool"):
            raise ValueError(f"{places}: a 'tool' message must follow a call of the assistant")


def read_tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools of a sample; a table may hold them as JSON text."""
    tools = parse_json_text(row.get("tools")) or None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: 'tools' is a {type(tools).__name__}; expected a list of tool descriptions")
    return tools


def parse_json_text(value: Any) -> Any:
    """What a text that is a JSON list says, as tables hold lists; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def check_rows(
    rows: Sequence[Mapping[str, Any]], places: Callable[[int], str], reader: Callable[..., Any] = as_conversation
) -> None:
    """Read all samples once, so that the first bad one is named before anything else happens."""
    for n, row in enumerate(rows):
        reader(row, places(n))


def exchanges(conversation: Conversation) -> Iterable[tuple[str, str]]:
    """Each text of the user with the assistant's answer to it."""
    messages = conversation.messages
    for asked, answered in pairwise(messages):
        if asked["role"] == "user" and answered["role"] == "assistant":
            yield asked["content"], answered["content"]
