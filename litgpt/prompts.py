"""Prompt styles: how an instruction is dressed for a model that was tuned on a certain form.

Most styles are data: a template with a slot `{}` for the system prompt and one for the user's text. Your own style is a
subclass of `PromptStyle` with an `apply`; prompt_style.yaml in a checkpoint folder names the style in use.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from litgpt.class_path import class_path, find_subclass, init_args
from litgpt.config import nearest

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.tokenizer import Tokenizer

STYLE_FILE = "prompt_style.yaml"


class PromptStyle(ABC):
    """Turns what a user asks into the text a model continues."""

    stops: ClassVar[tuple[tuple[str | int, ...], ...]] = ()
    """What ends an answer besides EOS: sequences of tokens or token ids."""

    @abstractmethod
    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """The text to feed to the model.

        Args:
            prompt: what the user asks.
            sys_prompt: replaces the style's own system prompt, where the style has a place for one.
            kwargs: further fields of the sample, such as `input`.
        """

    def stop_tokens(self, tokenizer: "Tokenizer") -> tuple[list[int], ...]:
        """Sequences of token ids that end an answer: each EOS of the checkpoint, then `stops`."""
        sequences = [] if tokenizer.eos_id is None else [[tokenizer.eos_id]]
        more = getattr(tokenizer, "eos_ids", ())
        sequences += [[i] for i in more if i != tokenizer.eos_id] if isinstance(more, tuple) else []
        for stop in self.stops:
            ids = [token if isinstance(token, int) else tokenizer.token_to_id(token) for token in stop]
            if ids not in sequences:
                sequences.append(ids)
        return tuple(sequences)

    @classmethod
    def from_name(cls, name: str) -> "PromptStyle":
        """The style registered as `name` in `prompt_styles`."""
        if name not in prompt_styles:
            likely = nearest(name, prompt_styles)
            hint = f"did you mean {' or '.join(likely)}?" if likely else f"known are {', '.join(prompt_styles)}."
            raise ValueError(f"There is no prompt style {name!r}: {hint}")
        return prompt_styles[name]()

    @classmethod
    def from_config(cls, config: "Config") -> "PromptStyle":
        """The style that the model called `config.name` was tuned on; `Default` if none is known."""
        return model_name_to_prompt_style(config.name)


def _fill(template: str, text: str) -> str:
    return template.replace("{}", str(text), 1)


class TemplateStyle(PromptStyle):
    """A style that is a template: `head`, the system prompt in `system`, the user's text in `user`."""

    head: ClassVar[str] = ""
    system: ClassVar[str] = ""
    """Place of the system prompt; empty if the style has none."""
    system_message: str | None = None
    """System prompt where none is given; None leaves `system` out."""
    user: ClassVar[str] = "{}"

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        if isinstance(prompt, list):
            raise ValueError(
                f"Prompt style {type(self).__name__} takes a text, no list of messages; llama3 and r1-base take both."
            )
        sys_prompt = sys_prompt or self.system_message
        return self.head + (_fill(self.system, sys_prompt) if sys_prompt else "") + _fill(self.user, prompt)


class Default(TemplateStyle):
    """The prompt as it is."""


_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


class FLAN(TemplateStyle):
    system = "{}"
    system_message = _TASK
    user = "### Instruction:\n{}\n\n### Response:\n"


class Alpaca(FLAN):
    """FLAN's form, with a place for the sample's `input`."""

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        if kwargs.get("input"):
            prompt = f"{prompt}\n\n### Input:\n{kwargs['input']}"
            sys_prompt = sys_prompt or _TASK_WITH_INPUT
        return super().apply(prompt, sys_prompt=sys_prompt)


class Longform(FLAN):
    system_message = _TASK_WITH_INPUT


class StableLMAlpha(TemplateStyle):
    system = "<|SYSTEM|>{}"
    system_message = (
        "# StableLM Tuned (Alpha version)\n"
        "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
        "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered "
        "harmful to the user.\n"
        "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, "
        "and make jokes.\n"
        "- StableLM will refuse to participate in anything that could harm a human."
    )
    user = "<|USER|>{}<|ASSISTANT|>"
    stops = (("<|SYSTEM|>",), ("<|ASSISTANT|>",), ("<|USER|>",))


class StableLMZephyr(TemplateStyle):
    user = "<|user|>\n{}<|endoftext|>\n<|assistant|>\n"


class Falcon(TemplateStyle):
    user = "{}\nAnswer:"
    stops = (("User", ":"), (193, "User"))  # 193: line break


class Falcon3(TemplateStyle):
    user = "<|user|>\n{}<|endoftext|>\n<|assistant|>\n"
    stops = (("<|endoftext|>",),)


class Llama2FunctionCalling(TemplateStyle):
    # The doubled braces and "aspossible" are what the model was tuned on.
    system = (
        '<FUNCTIONS>{{"function": "search_bing", "description": "Search the web for content on Bing. This allows users '
        'to search online/the internet/the web for content.", "arguments": [{{"name": "query", "type": "string", '
        '"description": "The search query string"}}]}}</FUNCTIONS>\n\n[INST]<<SYS>>\n{}\n<</SYS>>\n\n'
    )
    system_message = (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully aspossible. "
        "Your only response should be JSON formatted functions"
    )
    user = "{}[/INST]\n\n"


class Llama2(TemplateStyle):
    system = "[INST] <<SYS>>\n{}\n<</SYS>>\n\n"
    system_message = (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
        " Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content."
        " Please ensure that your responses are socially unbiased and positive in nature.\n\n"
        "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
        "something not correct. If you don't know the answer to a question, please don't share false information."
    )
    user = " {} [/INST] "


class FreeWilly2(TemplateStyle):
    system = "### System:\n{}\n\n"
    system_message = "This is a system prompt, please behave and help the user."
    user = "### User:\n{}\n\n### Assistant:\n"


class Platypus(TemplateStyle):
    user = "### Instruction:\n\n{}\n\n### Response:\n"


class StableCode(TemplateStyle):
    user = "###Instruction\n{}###Response\n"


class CodeLlama(TemplateStyle):
    head = "[INST] "
    system = "<<SYS>>\n{}\n<</SYS>>\n\n"
    user = "{} [/INST]"


class Phi1(TemplateStyle):
    user = "{}\n\nAnswer:"
    stops = (("Answer", ":"), (198, "Answer", ":"))  # 198: line break


class Phi2(TemplateStyle):
    user = "Instruct: {}\nOutput:"


class Phi3(TemplateStyle):
    system = "<|system|>\n{}<|end|>\n"
    system_message = "You are a helpful assistant."
    user = "<|user|>\n{}<|end|>\n<|assistant|>\n"


class Phi4(TemplateStyle):
    system = "<|im_start|>system<|im_sep|>{}<|im_end|>"
    user = "<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>"


class Phi4Reasoning(Phi4):
    system = "<|im_start>system<|im_sep|>{}<|im_end|>"  # the missing bar is the model's own
    system_message = (
        "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant involves "
        "thoroughly exploring questions through a systematic thinking process before providing the final precise and "
        "accurate solutions. This requires engaging in a comprehensive cycle of analysis, summarizing, exploration, "
        "reassessment, reflection, backtracing, and iteration to develop well-considered thinking process. Please "
        "structure your response into two main sections: Thought and Solution using the specified format: <think> "
        "{Thought section} </think> {Solution section}. In the Thought section, detail your reasoning process in "
        "steps. Each step should include detailed considerations such as analysing questions, summarizing relevant "
        "findings, brainstorming new ideas, verifying the accuracy of the current steps, refining any errors, and "
        "revisiting previous steps. In the Solution section, based on various attempts, explorations, and reflections"
        " from the Thought section, systematically present the final solution that you deem correct. The Solution "
        "section should be logical, accurate, and concise and detail necessary steps needed to reach the conclusion. "
        "Now, try to solve the following question through the above guidelines:"
    )


class Phi4Mini(TemplateStyle):
    system = "<|system|>{}<|end|>"
    user = "<|user|>{}<|end|><|assistant|>"


class Phi4MiniReasoning(Phi4Mini):
    system_message = "Your name is Phi, an AI math expert developed by Microsoft."


class TinyLlama(TemplateStyle):
    system = "<|system|>\n{}</s>\n"
    system_message = "You are a friendly chatbot who always gives helpful, detailed, and polite answers."
    user = "<|user|>\n{}</s>\n<|assistant|>\n"


class Gemma(TemplateStyle):
    user = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"


class OLMo(TemplateStyle):
    user = "<|endoftext|><|user|>\n{}\n<|assistant|>\n"


class ChatML(TemplateStyle):
    """The ChatML form, with a system prompt of your choice or none."""

    system = "<|im_start|>system\n{}<|im_end|>\n"
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

    def __init__(self, system_message: str | None = None) -> None:
        if system_message is not None:
            self.system_message = system_message


class Qwen2_5(ChatML):
    system_message = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Qwen2_5_Math(ChatML):
    system_message = "Please reason step by step, and put your final answer within \\boxed{}."


class QwQ(ChatML):
    system_message = (
        "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."
    )


class Qwen3(ChatML):
    pass


class SmolLM2(ChatML):
    system_message = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Salamandra(ChatML):
    system_message = (
        "I am Salamandra, an AI language model developed at the Barcelona Supercomputing Centre (BSC) by the Language "
        "Technologies Unit. My knowledge base was last updated on August 2023. Today Date: 2024-09-30\n"
        "Soy Salamandra, un modelo lingüístico de IA desarrollado en el Barcelona Supercomputing Centre (BSC) por la "
        "Language Technologies Unit. Mi base de conocimientos se actualizó por última vez en agosto de 2023.\n"
        "Soc Salamandra, un model de llenguatge d'IA desenvolupat al Barcelona Supercomputing Centre (BSC) per la "
        "Language Technologies Unit."
    )


def _messages(prompt: str | list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Role and content of each message of a conversation; a text is one message of the user."""
    if isinstance(prompt, str):
        yield "user", prompt
    elif isinstance(prompt, list):
        for message in prompt:
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise ValueError(f"A message needs 'role' and 'content', both texts; got {message!r}.")
            role = message.get("role")
            if role not in ("assistant", "user", "system"):
                raise ValueError(f"Unknown role: {role!r}. Supported roles are 'assistant', 'user', and 'system'.")
            yield role, message["content"].strip()
    else:
        raise ValueError(f"Unsupported prompt type: {type(prompt)}")


class Llama3(PromptStyle):
    """The form of Llama 3: a text, or a conversation as list of messages with `role` and `content`."""

    system_message = "You are a helpful assistant."
    stops = (("<|eot_id|>",),)

    def apply(self, prompt: str | list[dict[str, str]], *, sys_prompt: str | None = None, **kwargs: str) -> str:
        messages = list(_messages(prompt))
        if not messages or messages[0][0] != "system":
            messages.insert(0, ("system", sys_prompt or self.system_message))
        if any(role == "system" for role, _ in messages[1:]):
            raise ValueError("'system' role is only allowed at the beginning of the conversation list.")
        turns = [f"{self._header(role)}{content}<|eot_id|>" for role, content in messages]
        return "<|begin_of_text|>" + "".join(turns) + self._header("assistant")

    def _header(self, role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


class R1Base(PromptStyle):
    """The form of DeepSeek R1: a text, or a conversation as list of messages (`sys_prompt` then has no place)."""

    marks: ClassVar[dict[str, str]] = {"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"}
    stops = (("<｜end▁of▁sentence｜>",),)

    def apply(self, prompt: str | list[dict[str, str]], *, sys_prompt: str | None = None, **kwargs: str) -> str:
        start = (sys_prompt or "") if isinstance(prompt, str) else ""
        return start + "".join(self.marks[role] + content for role, content in _messages(prompt)) + "<｜Assistant｜>"


prompt_styles: dict[str, type[PromptStyle]] = {
    "alpaca": Alpaca,
    "flan": FLAN,
    "longform": Longform,
    "stablelm-alpha": StableLMAlpha,
    "stablelm-zephyr": StableLMZephyr,
    "falcon": Falcon,
    "llama2-function-calling": Llama2FunctionCalling,
    "llama2": Llama2,
    "freewilly2": FreeWilly2,
    "platypus": Platypus,
    "stablecode": StableCode,
    "codellama": CodeLlama,
    "phi-1": Phi1,
    "phi-2": Phi2,
    "phi-3": Phi3,
    "phi-4": Phi4,
    "phi-4-reasoning": Phi4Reasoning,
    "phi-4-mini": Phi4Mini,
    "phi-4-mini-reasoning": Phi4MiniReasoning,
    "tinyllama": TinyLlama,
    "gemma": Gemma,
    "llama3": Llama3,
    "olmo": OLMo,
    "qwen2.5": Qwen2_5,
    "qwen2.5-math": Qwen2_5_Math,
    "qwq": QwQ,
    "qwen3": Qwen3,
    "smollm2": SmolLM2,
    "salamandra": Salamandra,
    "default": Default,
    "falcon3": Falcon3,
    "r1-base": R1Base,
    "chatml": ChatML,
}
"""Names for flags and YAML. Add a style of your own here to give it one."""

_STYLE_OF_MODEL: tuple[tuple[str, type[PromptStyle]], ...] = (
    (r"stablelm-tuned-alpha", StableLMAlpha),
    (r"stablelm-zephyr-3b", StableLMZephyr),
    (r"stablecode-instruct", StableCode),
    (r"Falcon3.*-Instruct", Falcon3),
    (r"falcon.*-instruct", Falcon),
    (r"CodeLlama|Mi[sx]tral.*Instruct", CodeLlama),  # before Llama-3, which "CodeLlama-34b-Instruct" looks like
    (r"Llama-2-7b-chat-hf-function-calling-v2", Llama2FunctionCalling),
    (r"Llama-2.*-chat", Llama2),
    (r"Llama-3.*-Instruct", Llama3),
    (r"OLMo-2.*-(Instruct|SFT|DPO)", Llama3),
    (r"R1", R1Base),
    (r"FreeWilly2", FreeWilly2),
    (r"Platypus", Platypus),
    (r"phi-1", Phi1),
    (r"phi-2", Phi2),
    (r"Phi-3", Phi3),
    (r"Phi-4-reasoning", Phi4Reasoning),
    (r"Phi-4-mini-reasoning", Phi4MiniReasoning),
    (r"Phi-4-mini", Phi4Mini),
    (r"phi-4", Phi4),
    (r"tiny-llama.*chat", TinyLlama),
    (r"(Code)?Gemma.*-it", Gemma),
    (r"OLMo.*-hf", OLMo),
    (r"Qwen2\.5-Math-.*", Qwen2_5_Math),
    (r"Qwen2\.5-.*", Qwen2_5),
    (r"QwQ-.*", QwQ),
    (r"Qwen3-.*", Qwen3),
    (r"SmolLM2.*-Instruct", SmolLM2),
    (r"salamandra-.*-instruct", Salamandra),
)
"""Style by name of the config; the first pattern found in the name decides."""


def model_name_to_prompt_style(model_name: str) -> PromptStyle:
    """The style that the model called `model_name` was tuned on; `Default` if none is known."""
    for pattern, style in _STYLE_OF_MODEL:
        if re.search(pattern, model_name):
            return style()
    return Default()


def has_prompt_style(checkpoint_dir: Path | str) -> bool:
    """Whether the checkpoint folder says which style its model was tuned on."""
    return (Path(checkpoint_dir) / STYLE_FILE).is_file()


def save_prompt_style(style: str | PromptStyle, checkpoint_dir: Path | str) -> None:
    """Write prompt_style.yaml: the class of the style, and those of its arguments that are not the defaults.

    Args:
        style: a registered name, or a style. A style of your own keeps its arguments if it stores each under its name.
        checkpoint_dir: folder for the file.
    """
    style = PromptStyle.from_name(style) if isinstance(style, str) else style
    content: dict[str, Any] = {"class_path": class_path(type(style))}
    if arguments := init_args(style, STYLE_FILE):
        content["init_args"] = arguments
    with open(Path(checkpoint_dir) / STYLE_FILE, "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False, allow_unicode=True)


def load_prompt_style(checkpoint_dir: Path | str) -> PromptStyle:
    """The style that prompt_style.yaml of the checkpoint folder names.

    Raises:
        ValueError: if the file names no class that is a `PromptStyle`, or the class cannot be imported or made.
    """
    path = Path(checkpoint_dir) / STYLE_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    wanted = content.get("class_path") if isinstance(content, dict) else None
    arguments = (content.get("init_args") or {}) if isinstance(content, dict) else {}
    if not isinstance(wanted, str) or not isinstance(arguments, dict):
        raise ValueError(f"{str(path)!r} must hold a line such as `class_path: litgpt.prompts.Alpaca`.")
    style_class = find_subclass(wanted, PromptStyle, repr(str(path)))
    try:
        return style_class(**arguments)
    except TypeError as error:
        raise ValueError(f"{str(path)!r}: {wanted} cannot be made with init_args {arguments}: {error}") from error
