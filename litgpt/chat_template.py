"""The chat template of a tokenizer: conversations as the model was trained to see them, and whose words are whose."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.prompts import PromptStyle

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
MAX_FILE_BYTES = 50_000_000
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""What the thoughts before an answer are called; templates look under the first or the second."""

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class ChatTemplate(PromptStyle):
    """A chat template. It is a prompt style too, so that whatever takes a style takes it.

    The template comes with the tokenizer, from strangers: it runs in a sandbox, and is stopped when it does not end.

    Args:
        template: Source text, in Jinja as transformers understands it.
        special_tokens: What the names `bos_token`, `eos_token` ... stand for in it.
        tool_template: Source text that is used instead where a conversation has tools.

    Raises:
        ValueError: The template is not valid.
    """

    def __init__(
        self, template: str, special_tokens: dict[str, str] | None = None, tool_template: str | None = None
    ) -> None:
        self.template, self.tool_template = template, tool_template
        self.special_tokens = special_tokens or {}
        _ = self._compiled

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path | str) -> "ChatTemplate":
        """The template of a checkpoint folder: chat_template.jinja, or `chat_template` in tokenizer_config.json.

        Raises:
            ValueError: There is none, or it is not valid.
        """
        folder = Path(checkpoint_dir)
        config = _load_json(folder / "tokenizer_config.json")
        found = None
        if (file := folder / TEMPLATE_FILE).is_file():
            found = _read_text(file)
        elif (file := folder / "chat_template.json").is_file():
            found = _load_json(file).get("chat_template")
        found = found or config.get("chat_template")
        if isinstance(found, list):
            found = {t["name"]: t["template"] for t in found if isinstance(t, dict) and {"name", "template"} <= set(t)}
        templates = {"default": found} if isinstance(found, str) else found if isinstance(found, dict) else {}
        default = templates.get("default") or next(iter(templates.values()), None)
        if not isinstance(default, str):
            raise ValueError(
                f"{folder} has no chat template: expected {TEMPLATE_FILE}, or chat_template in tokenizer_config.json; "
                "give the name of a prompt style instead"
            )
        tokens = {**_load_json(folder / "special_tokens_map.json"), **config}
        tokens = {name: _token_text(value) for name, value in tokens.items() if name.endswith("_token")}
        try:
            special_tokens = {name: text for name, text in tokens.items() if text is not None}
            return cls(default, special_tokens, templates.get("tool_use"))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def __reduce__(self) -> tuple:
        return type(self), (self.template, self.special_tokens, self.tool_template)

    @cached_property
    def _compiled(self) -> tuple[Any, Any, Any]:
        """The sandbox, the template, and the one for conversations with tools."""
        from litgpt.template_sandbox import TemplateSandbox

        sandbox = TemplateSandbox()
        template = sandbox.build(self.template)
        return sandbox, template, sandbox.build(self.tool_template) if self.tool_template else template

    def render(
        self, messages: Messages, tools: list[Any] | None = None, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation.

        Args:
            messages: Each with `role` and `content`, and whatever else the template knows.
            tools: JSON schemas of the functions that the assistant may call.
            add_generation_prompt: End with what comes before an answer.
            variables: Further names for the template, such as `enable_thinking`.

        Raises:
            ValueError: The template refuses the conversation, fails, or does not end. One line.
        """
        return self._run(messages, tools, add_generation_prompt, variables)

    def _run(
        self,
        messages: Messages,
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        marks: tuple[str, str] | None = None,
    ) -> str:
        sandbox, plain, for_tools = self._compiled
        names = {
            **self.special_tokens,
            **{"documents": None, "add_generation_prompt": add_generation_prompt},
            **variables,
            **{"messages": [_with_reasoning(message) for message in messages], "tools": tools},
        }
        return sandbox.run(plain if tools is None else for_tools, names, marks)

    def spans(self, messages: Messages, tools: list[Any] | None = None) -> list[Span]:
        """Where in the text of `render` the turns of the assistant are, see `render_with_spans`."""
        return self.render_with_spans(messages, tools)[1]

    def render_with_spans(self, messages: Messages, tools: list[Any] | None = None) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters `(start, end)` of each turn of the assistant in it.

        A turn is what stands in a `{% generation %}` block, where the template has such; else everything from the end
        of the generation prompt up to the next message, the token that ends the turn included.

        Raises:
            ValueError: As `render`; or the template changes earlier messages so that a turn cannot be found.
        """
        text = self.render(messages, tools)
        source = self.tool_template if tools is not None and self.tool_template else self.template
        if "endgeneration" in source and (spans := self._marked_spans(messages, tools, text)):
            return text, spans
        spans = []
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._turn(text, messages, n, tools))
        if any(start > end for start, end in spans) or any(a[1] > b[0] for a, b in pairwise(spans)):
            raise ValueError("the turns of the assistant cannot be told apart in the text of the chat template")
        return text, spans

    def _marked_spans(self, messages: Messages, tools: list[Any] | None, text: str) -> list[Span]:
        """The generation blocks in `text`."""
        secret = secrets.token_hex(8)
        opening, closing = f"<{secret}>", f"</{secret}>"
        rest, clean, spans = self._run(messages, tools, False, {}, (opening, closing)), "", []
        while opening in rest:
            before, _, rest = rest.partition(opening)
            inside, _, rest = rest.partition(closing)
            start = len(clean) + len(before)
            clean += before + inside
            spans.append((start, len(clean)))
        if clean + rest != text:
            raise ValueError("the chat template changes the text of its generation blocks; they cannot be located")
        return spans

    def _turn(self, text: str, messages: Messages, n: int, tools: list[Any] | None) -> Span:
        """Characters of message `n` in `text`."""
        before = self._try(messages[:n], tools, True)
        through = text if n == len(messages) - 1 else self._try(messages[: n + 1], tools)
        fits_before = before is not None and text.startswith(before)
        fits_through = through is not None and text.startswith(through)
        if fits_before and fits_through and len(before) <= len(through):
            return len(before), len(through)
        # The template writes earlier messages in another way than the last one, e.g. without the thoughts.
        inside = self._content_span(text, messages, n, tools)
        if inside is None:
            raise ValueError(
                f"the chat template does not tell where message {n + 1}, of the assistant, begins and ends; use a "
                "template with {% generation %} blocks, or a prompt style"
            )
        start, end = inside
        history = self._try(messages[:n], tools)
        if before is not None and history is not None and text.startswith(history):  # another generation prompt only
            start = min(start, len(_marker_free(before, text)))
        if fits_through:
            end = len(through)
        elif through is not None and (inner := self._content_span(through, messages[: n + 1], n, tools)):
            end += len(_marker_free(through[inner[1] :], text[end:]))
        return start, end

    def _content_span(self, text: str, messages: Messages, n: int, tools: list[Any] | None) -> Span | None:
        """Characters of the content of message `n` in `text`: what is another when the content is."""
        content = messages[n].get("content")
        if not isinstance(content, str):
            return None
        ends = {content.strip()[:1], content.strip()[-1:]}
        other = next(letter for letter in "QXZ" if letter not in ends)
        changed = self._try([*messages[:n], {**messages[n], "content": other}, *messages[n + 1 :]], tools)
        if changed is None or changed == text:
            return None
        start = _n_common(text, changed)
        n_after = _n_common(text[start:][::-1], changed[start:][::-1])
        return start, len(text) - n_after

    def _try(self, messages: Messages, tools: list[Any] | None, add_generation_prompt: bool = False) -> str | None:
        try:
            return self.render(messages, tools, add_generation_prompt)
        except ValueError:  # some templates refuse a conversation that breaks off
            return None

    def apply(self, prompt: str | list[dict[str, Any]], *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """The text up to where the assistant answers; `prompt` is a question, or a list of messages."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": with_input(prompt, kwargs)}]
        if sys_prompt and not (prompt and prompt[0].get("role") == "system"):
            prompt = [{"role": "system", "content": sys_prompt}, *prompt]
        return self.render(prompt, add_generation_prompt=True)

    def stop_tokens(self, tokenizer: "Tokenizer") -> tuple[list[int], ...]:
        """EOS, and the special token that the template writes at the end of an answer."""
        stops = super().stop_tokens(tokenizer)
        question, answer = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}
        text, spans = self.render_with_spans([question, answer])
        after = text[slice(*spans[0])].partition("Answer")[2].strip()
        if ids := tokenizer.encode(after, bos=False).tolist() if after else []:
            is_special = not tokenizer.decode(ids[:1]).strip()
            if is_special and ids[:1] not in stops:
                return (*stops, ids[:1])
        return stops


def _n_common(a: str, b: str) -> int:
    """With how many equal characters two texts begin."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _marker_free(a: str, b: str) -> str:
    """With what two texts begin, without half a marker such as `<|us` at its end."""
    common = a[: _n_common(a, b)]
    return common if common in (a, b) else re.sub(r"[<\[][^<>\[\]\s]*$", "", common)


def with_input(instruction: str, fields: Mapping[str, Any]) -> str:
    """An instruction with the `input` of its sample, as one message."""
    return f"{instruction}\n\n{fields['input']}" if fields.get("input") else instruction


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its thoughts, if it has some, under the names that templates look for."""
    thoughts = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _token_text(value: Any) -> str | None:
    """A special token, which config files give as text or as an object with its `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _read_text(file: Path) -> str:
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, which no such file needs; fetch it again")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text; fetch it again") from None


def _load_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); fetch it again") from None
    return value if isinstance(value, dict) else {}
