import json

import pytest

from litgpt.data.conversations import (
    Conversation,
    as_conversation,
    as_preference,
    as_unpaired,
    check_rows,
    exchanges,
    kind_of,
)

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
TOOL = {"role": "tool", "content": "3", "tool_call_id": "a"}


def test_instruction_keeps_the_keys_that_a_style_may_use():
    row = {"instruction": "hi", "input": "x", "output": "hello", "mood": "good", "empty": None}
    found = as_conversation(row)
    assert found == Conversation([USER, ANSWER], fields={"input": "x", "mood": "good", "empty": ""})
    assert row["empty"] is None


def test_instruction_with_system_prompt():
    found = as_conversation({"instruction": "hi", "output": "hello", "system": "be kind"})
    assert found.messages == [{"role": "system", "content": "be kind"}, USER, ANSWER] and found.fields == {}


def test_messages_pass_tools_and_marks_through():
    tools = [{"type": "function", "function": {"name": "f"}}]
    marked = {**ANSWER, "train": False}
    found = as_conversation({"messages": [USER, CALL, TOOL, marked], "tools": tools})
    assert found.tools == tools and found.messages == [USER, CALL, TOOL, marked]


def test_messages_and_tools_as_json_text_of_a_table():
    row = {"messages": json.dumps([USER, ANSWER]), "tools": "[1]"}
    assert as_conversation(row) == Conversation([USER, ANSWER], [1])


def test_sharegpt_roles_and_system():
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "hello"},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "hello", "weight": 0},
        ],
        "system": "be kind",
        "id": 7,
    }
    roles = [message["role"] for message in as_conversation(row).messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert as_conversation(row).messages[-1] == {**ANSWER, "weight": 0}


@pytest.mark.parametrize("prompt", ["hi", [USER]])
@pytest.mark.parametrize("completion", ["hello", [ANSWER], ANSWER])
def test_prompt_and_completion_as_text_or_messages(prompt, completion):
    assert as_conversation({"prompt": prompt, "completion": completion}) == Conversation([USER, ANSWER])


def test_preference_as_text_messages_or_whole_conversations():
    worse = {"role": "assistant", "content": "no"}
    rows = [
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [worse]},
        {"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER, worse]},
        {"chosen": [USER, ANSWER], "rejected": [USER, worse]},
    ]
    for row in rows:
        pair = as_preference(row)
        assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [ANSWER], [worse])


@pytest.mark.parametrize(
    ("label", "expected"), [(True, True), (0, False), ("true", True), ("False", False), (1.0, True), ("0", False)]
)
def test_unpaired_labels(label, expected):
    found = as_unpaired({"prompt": "hi", "completion": "hello", "label": label})
    assert (found.prompt, found.completion, found.label) == ([USER], [ANSWER], expected)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"instruction": "", "output": "", "input": ""}, "instruction"),
        ({"messages": [], "prompt": "x", "completion": "y"}, "messages"),
        ({"prompt": "", "chosen": "", "rejected": "", "completion": ""}, "preference"),
        ({"prompt": "", "completion": "", "label": False}, "unpaired"),
        ({"prompt": "", "completion": "", "label": None}, "completion"),
        ({"instruction": "a", "output": None}, None),
        ({}, None),
    ],
)
def test_kind_is_known_by_the_keys(row, kind):
    assert kind_of(row) == kind


BAD = [
    ({"instruction": "a"}, r"the key 'output' is missing \(keys instruction\)"),
    ({"instruction": "a", "output": None}, "the key 'output' is null"),
    ({"output": "a"}, "the key 'instruction' is missing"),
    ({"prompt": "a"}, "the key 'completion' is missing"),
    ({"instruction": 3, "output": "a"}, "'instruction' is a int; expected a text"),
    ({"question": "a", "answer": "b"}, "has the keys question, answer; expected those of one known form"),
    ({}, "has the keys none"),
    ({"messages": []}, "'messages' is an empty list"),
    ({"messages": "hello"}, "'messages' is a str; expected a list of messages"),
    ({"messages": [USER]}, "no message of the assistant"),
    ({"messages": [ANSWER, USER]}, "the first message after 'system' must be of the user"),
    ({"messages": [USER, USER, ANSWER]}, "two messages of 'user' follow each other"),
    ({"messages": [USER, ANSWER, ANSWER]}, "two messages of 'assistant' follow each other"),
    ({"messages": [USER, ANSWER, {"role": "system", "content": "x"}]}, "'system' may only come first"),
    ({"messages": [USER, TOOL, ANSWER]}, "a 'tool' message must follow a call"),
    ({"messages": [USER, {"role": "assistant"}]}, "message 2 of 'messages' has no 'content'"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2 of 'messages' has a int as 'content'"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "has 'role': 'narrator'; expected one of system, user"),
    ({"messages": ["hi"]}, "message 1 of 'messages' is a str; expected an object"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "'conversations' has the roles assistant"),
    ({"conversations": [{"from": "who", "value": "x"}]}, "has 'from': 'who'; expected one of system, human"),
    ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "'tools' is a dict; expected a list"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference sample .* finetune_dpo"),
    ({"prompt": "a", "completion": "b", "label": True}, "is a unpaired sample .* finetune_dpo"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_sample_is_named_in_one_line(row, message):
    with pytest.raises(ValueError, match=rf"^f\.json, sample 5: .*{message}") as caught:
        as_conversation(row, "f.json, sample 5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (as_preference, {"prompt": "a", "chosen": "b"}, "needs the key 'rejected'"),
        (as_preference, {"chosen": "b", "rejected": "c"}, "'prompt' is missing"),
        (as_preference, {"prompt": [ANSWER], "chosen": "b", "rejected": "c"}, "must be of the user"),
        (as_unpaired, {"prompt": "a", "completion": "b"}, "needs the key 'label'"),
        (as_unpaired, {"prompt": "a", "completion": "b", "label": "maybe"}, "'label' is 'maybe'"),
    ],
)
def test_bad_preference_is_named_in_one_line(reader, row, message):
    with pytest.raises(ValueError, match=rf"^here: .*{message}"):
        reader(row, "here")


def test_all_rows_are_checked_with_their_places():
    rows = [{"instruction": "a", "output": "b"}] * 3 + [{"instruction": "a"}]
    check_rows(rows[:3], str)
    with pytest.raises(ValueError, match=r"^row 3: the key 'output'"):
        check_rows(rows, lambda n: f"row {n}")


def test_exchanges_are_questions_with_their_answers():
    messages = [{"role": "system", "content": "s"}, USER, CALL, TOOL, ANSWER, {**USER, "content": "2"}, ANSWER]
    assert list(exchanges(Conversation(messages)))[-1] == ("2", "hello")
