"""Prompt styles against the recorded renderings of litgpt 0.5.13."""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from litgpt import prompts
from litgpt.config import Config
from litgpt.prompts import (
    Alpaca,
    ChatML,
    Default,
    Llama3,
    PromptStyle,
    Qwen2_5,
    R1Base,
    has_prompt_style,
    load_prompt_style,
    model_name_to_prompt_style,
    prompt_styles,
    save_prompt_style,
)

FACTS = json.loads((Path(__file__).parent / "fixtures" / "prompt_styles.json").read_text(encoding="utf-8"))
PROBE = FACTS["probe"]
USER, SYSTEM, INPUT = PROBE["user"], PROBE["system"], PROBE["input"]
STYLES = list(FACTS["styles"].items())
NAMED = [(name, facts) for name, facts in STYLES if not name.startswith("(")]
CONVERSATIONS = [(name, facts) for name, facts in STYLES if "messages_with_system" in facts]

CORRECTED_STYLES = {
    "CodeLlama-34b-Instruct-hf": "CodeLlama"  # 0.5.13 found "Llama-3" in "CodeLlama-34b" and took Llama3's form
}


class FakeTokenizer:
    """The tokenizer with which the facts were recorded."""

    eos_id = 2

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    def token_to_id(self, token: str) -> int:
        self.asked[token] = 1000 + sum(token.encode())
        return self.asked[token]


def made(facts: dict) -> PromptStyle:
    return getattr(prompts, facts["class"])()


def cases(styles: list) -> dict:
    return {"argnames": "facts", "argvalues": [facts for _, facts in styles], "ids": [name for name, _ in styles]}


@pytest.mark.parametrize(**cases(STYLES))
def test_style_renders_as_published(facts):
    style = made(facts)
    assert style.apply(USER) == facts["prompt_only"]
    assert style.apply(USER, sys_prompt=SYSTEM) == facts["with_system"]
    assert style.apply(USER, input=INPUT) == facts.get("with_input", facts["prompt_only"])
    assert style.apply(USER, sys_prompt=SYSTEM, input=INPUT) == facts.get("with_system_and_input", facts["with_system"])
    assert style.apply(USER, input="") == facts.get("empty_input", facts["prompt_only"])
    assert (style.apply(USER, sys_prompt=SYSTEM) != style.apply(USER)) == facts["system_prompt_honoured"]


@pytest.mark.parametrize(**cases(STYLES))
def test_style_takes_the_whole_sample_as_published(facts):
    sample = {"instruction": USER, "output": "4", "input": ""}
    assert made(facts).apply(prompt=USER, **sample) == facts["prompt_only"]


@pytest.mark.parametrize(**cases(STYLES))
def test_style_stops_as_published(facts):
    tokenizer = FakeTokenizer()
    assert made(facts).stop_tokens(tokenizer) == tuple(facts["stop_tokens"])
    assert tokenizer.asked == facts["stop_token_ids_asked"]


@pytest.mark.parametrize(**cases(STYLES))
def test_style_classes_descend_as_published(facts):
    bases = [cls.__name__ for cls in type(made(facts)).__mro__]
    assert set(facts["bases"]) <= set(bases)


@pytest.mark.parametrize(**cases(STYLES))
def test_text_with_braces_and_percent_signs_stays_as_it_is(facts):
    text = "{} {prompt} {0} %s {{x}} \\1"
    rendered = made(facts).apply(text, sys_prompt=text)
    assert rendered == facts["with_system"].replace(USER, text).replace(SYSTEM, text)


@pytest.mark.parametrize(**cases(CONVERSATIONS))
def test_conversation_renders_as_published(facts):
    style = made(facts)
    messages = PROBE["messages_with_system"]
    assert style.apply(messages) == facts["messages_with_system"]
    assert style.apply(messages[1:]) == facts["messages_without_system"]
    assert style.apply(messages[1:], sys_prompt="KW") == facts["messages_without_system_sys_prompt_kw"]
    assert style.apply([]) == facts["messages_empty_list"]


@pytest.mark.parametrize(**cases(CONVERSATIONS))
@pytest.mark.parametrize(
    ("probe", "prompt"),
    [
        ("messages_bad_role", [{"role": "tool", "content": "x"}]),
        ("messages_late_system", [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]),
        ("wrong_type", 3),
    ],
)
def test_conversation_that_does_not_fit_gives_the_published_answer(facts, probe, prompt):
    expected = facts[probe]
    if isinstance(expected, str):
        assert made(facts).apply(prompt) == expected
    else:
        kind, _, text = expected["error"].partition(": ")
        with pytest.raises(ValueError) as caught:
            made(facts).apply(prompt)
        assert (type(caught.value).__name__, str(caught.value)) == (kind, text)


@pytest.mark.parametrize("message", ["hello", {"role": "user"}, {"role": "user", "content": None}])
def test_message_without_text_is_refused(message):
    with pytest.raises(ValueError, match="needs 'role' and 'content'"):
        Llama3().apply([message])


def test_list_of_messages_is_refused_by_a_style_for_texts():
    with pytest.raises(ValueError, match="Alpaca takes a text"):
        Alpaca().apply([{"role": "user", "content": "Hi"}])


def test_empty_system_prompt_counts_as_none():
    assert Qwen2_5().apply("x", sys_prompt="") == Qwen2_5().apply("x")


@pytest.mark.parametrize(("name", "facts"), NAMED, ids=[name for name, _ in NAMED])
def test_published_name_gives_the_published_class(name, facts):
    assert type(PromptStyle.from_name(name)).__name__ == facts["class"]


def test_every_style_has_a_name():
    assert {cls.__name__ for cls in prompt_styles.values()} == {facts["class"] for _, facts in STYLES}
    for name, cls in [("default", Default), ("falcon3", prompts.Falcon3), ("r1-base", R1Base), ("chatml", ChatML)]:
        assert type(PromptStyle.from_name(name)) is cls


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no prompt style 'lama3'.*llama3"):
        PromptStyle.from_name("lama3")


@pytest.mark.parametrize(
    ("style", "name"), [(style, name) for style, names in FACTS["style_by_config_name"].items() for name in names]
)
def test_model_gets_the_published_style(style, name):
    assert type(model_name_to_prompt_style(name)).__name__ == CORRECTED_STYLES.get(name, style)


def test_no_more_styles_are_corrected_than_differ():
    published = {name: style for style, names in FACTS["style_by_config_name"].items() for name in names}
    assert all(published[name] != style for name, style in CORRECTED_STYLES.items())


def test_style_is_found_by_the_name_of_the_config():
    assert isinstance(PromptStyle.from_config(Config(name="Llama-3.2-1B-Instruct")), Llama3)
    assert isinstance(PromptStyle.from_config(SimpleNamespace(name="")), Default)


def test_stop_tokens_name_every_eos_of_the_checkpoint_once():
    tokenizer = FakeTokenizer()
    tokenizer.eos_ids = (2, 7, 1998)
    assert Llama3().stop_tokens(tokenizer) == ([2], [7], [1998])


def test_stop_tokens_without_eos_hold_the_style_s_own():
    tokenizer = FakeTokenizer()
    tokenizer.eos_id = None
    assert Default().stop_tokens(tokenizer) == ()
    assert Llama3().stop_tokens(tokenizer) == ([1998],)


class Shouting(PromptStyle):
    """A style as users write it: only `apply`."""

    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return prompt.upper()


class Greeting(PromptStyle):
    def __init__(self, greeting: str, n_times: int = 1, ending: str = "!"):
        self.greeting = greeting
        self.n_times = n_times
        self.ending = ending

    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return self.greeting * self.n_times + self.ending + prompt


class Forgetful(PromptStyle):
    def __init__(self, words: str):
        self.text = words.upper()

    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return self.text + prompt


def test_style_of_a_user_needs_only_apply(tmp_path):
    assert Shouting().stop_tokens(FakeTokenizer()) == ([2],)
    save_prompt_style(Shouting(), tmp_path)
    assert load_prompt_style(tmp_path).apply("hi") == "HI"


def test_prompt_style_cannot_be_made_without_apply():
    with pytest.raises(TypeError, match="abstract"):
        PromptStyle()


@pytest.mark.parametrize("name", list(prompt_styles))
def test_named_style_survives_its_file(name, tmp_path):
    assert not has_prompt_style(tmp_path)
    save_prompt_style(name, tmp_path)
    assert has_prompt_style(tmp_path)
    content = yaml.safe_load((tmp_path / "prompt_style.yaml").read_text())
    assert content == {"class_path": f"litgpt.prompts.{prompt_styles[name].__name__}"}
    assert type(load_prompt_style(tmp_path)) is prompt_styles[name]


@pytest.mark.parametrize(
    "style",
    [ChatML(system_message="Sé breve.\nYes: {}"), Qwen2_5("Be brief."), Greeting("Hi", n_times=2), Greeting("Yo")],
)
def test_style_with_arguments_survives_its_file(style, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_prompt_style(style, tmp_path)
    loaded = load_prompt_style(tmp_path)
    assert type(loaded) is type(style)
    assert loaded.apply("x") == style.apply("x")


def test_arguments_at_their_defaults_are_not_written(tmp_path):
    save_prompt_style(Greeting("Yo"), tmp_path)
    assert yaml.safe_load((tmp_path / "prompt_style.yaml").read_text())["init_args"] == {"greeting": "Yo"}


@pytest.mark.parametrize("style", [Forgetful("a"), Greeting(greeting=object())], ids=["not stored", "not for YAML"])
def test_argument_that_cannot_be_saved_is_told_when_saving(style, tmp_path):
    with pytest.warns(UserWarning, match="will lack the argument '(words|greeting)'"):
        save_prompt_style(style, tmp_path)
    with pytest.raises(ValueError, match=r"cannot be made with init_args \{\}"):
        load_prompt_style(tmp_path)


def write_style(folder: Path, text: str) -> Path:
    (folder / "prompt_style.yaml").write_text(text)
    return folder


def test_style_file_of_litgpt_05_loads(tmp_path):
    assert type(load_prompt_style(write_style(tmp_path, "class_path: litgpt.prompts.Alpaca\n"))) is Alpaca


def test_style_of_a_user_is_imported_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "some_styles.py").write_text(
        "from litgpt.prompts import PromptStyle\n"
        "class Echo(PromptStyle):\n"
        "    def apply(self, prompt, *, sys_prompt=None, **kwargs):\n"
        "        return prompt * 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert load_prompt_style(write_style(tmp_path, "class_path: some_styles.Echo")).apply("ab") == "abab"
    finally:
        sys.modules.pop("some_styles", None)


@pytest.mark.parametrize("class_path", ["os.system", "builtins.eval", "litgpt.config.Config", "subprocess.Popen"])
def test_class_that_is_no_prompt_style_is_refused(class_path, tmp_path):
    write_style(tmp_path, f"class_path: {class_path}\ninit_args: {{command: 'exit 1'}}\n")
    with pytest.raises(ValueError, match="is not a subclass"):
        load_prompt_style(tmp_path)


def test_python_tag_in_a_style_file_is_not_executed(tmp_path):
    target = tmp_path / "made"
    write_style(tmp_path, f"class_path: !!python/object/apply:pathlib.Path.touch ['{target}']\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_prompt_style(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("class_path: no_such_module.Style", "cannot be imported .*no_such_module.* --extend"),
        ("class_path: litgpt.prompts.NoSuchStyle", "cannot be imported .*NoSuchStyle"),
        ("class_path: Alpaca", "cannot be imported"),
        ("class_path: litgpt.prompts.PromptStyle", "cannot be made"),
        (
            "class_path: litgpt.prompts.Alpaca\ninit_args: {volume: 11}",
            r"cannot be made with init_args \{'volume': 11\}",
        ),
        ("class_path: [1]", "must hold a line"),
        ("just a text", "must hold a line"),
        ("", "must hold a line"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_style_file_that_cannot_be_used_is_one_clear_line(text, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        load_prompt_style(write_style(tmp_path, text))
    assert "prompt_style.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_module_that_fails_while_it_is_imported_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "broken_styles.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"broken_styles.Style' cannot be imported \(division by zero\)"):
        load_prompt_style(write_style(tmp_path, "class_path: broken_styles.Style"))
