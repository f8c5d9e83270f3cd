import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.checkpoint.gguf_tokenizer import SPACE, find_pre_tokenizer, tokenizer_metadata
from litgpt.tokenizer import Tokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT_4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern: str, **other: Any) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | other


def byte_level(*parts: dict, **model: Any) -> dict:
    """A tokenizer.json, as far as it matters."""
    pre_tokenizer = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": list(parts)}
    return {"pre_tokenizer": pre_tokenizer, "normalizer": {"type": "NFC"}, "model": {"type": "BPE", **model}}


@pytest.fixture
def spm_dir(tmp_path: Path) -> Path:
    """BPE over characters with byte fallback, as Llama 2 has it in tokenizer.json."""
    vocab = ["<unk>", "<s>", "</s>", "<0x0A>", SPACE, "a", "b", "c", "ab", SPACE + "a", "abc", "<extra>", "bc"]
    added = [
        {"id": i, "content": text, "special": i < 3, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, text in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (13, f"{SPACE}{SPACE}"))
    ]  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        ]},
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {text: i for i, text in enumerate(vocab)},
                  "merges": [["a", "b"], [SPACE, "a"], ["ab", "c"], ["a", "bc"]]},
    }  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": {"content": "<unk>"}, "pad_token": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def change(file: Path, edit: Callable[[dict], Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (byte_level({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}), "gpt-2"),
        (byte_level({"type": "ByteLevel", "add_prefix_space": False}), "gpt-2"),
        (byte_level({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}), "smollm"),
        (byte_level(split(LLAMA_3), BYTES, ignore_merges=True), "llama-bpe"),
        (byte_level(split(LLAMA_3), BYTES, ignore_merges=False), "dbrx"),
        (byte_level(split(LLAMA_3, behavior="Removed", invert=True), BYTES), "dbrx"),
        (byte_level(split(LLAMA_3.replace("{1,3}", "")), BYTES), "qwen2"),
        (byte_level(split(TEKKEN), BYTES), "tekken"),
        (byte_level(split(GPT_4O), BYTES), "gpt-4o"),
    ],
)
def test_pre_tokenizer_is_found_by_its_patterns(content: dict, name: str) -> None:
    assert find_pre_tokenizer(content) == name


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (byte_level(split(r"\w+"), BYTES), r"splits text by \\w\+, which is not among"),
        (byte_level(split(LLAMA_3, behavior="Removed"), BYTES), "not among"),
        (byte_level(split(LLAMA_3), {"type": "Digits", "individual_digits": False}, BYTES), "not among"),
        (byte_level(split(LLAMA_3), BYTES) | {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ],
)
def test_pre_tokenizer_that_llama_cpp_lacks_is_refused(content: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_pre_tokenizer(content)


def test_space_before_each_text_is_told() -> None:
    with pytest.warns(UserWarning, match="space before each text"):
        find_pre_tokenizer(byte_level({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}))


def test_byte_level_tokenizer_keeps_its_tokens_and_merges(tiny_tokenizer_dir: Path) -> None:
    values = tokenizer_metadata(tiny_tokenizer_dir, 320)
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    model = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 320 == len(set(tokens))
    assert all(tokens[i] == text for text, i in model["vocab"].items())
    assert values["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert "tokenizer.ggml.scores" not in values
    n = tokenizer.vocab_size
    assert kinds[tokenizer.eos_id] == 3 and set(kinds[1:n]) == {1} and set(kinds[n:]) == {5}
    assert tokens[n] == f"[PAD{n}]"
    assert values["tokenizer.ggml.bos_token_id"] == values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert values["tokenizer.ggml.add_bos_token"] is True and values["tokenizer.ggml.add_eos_token"] is False


def test_characters_with_scores_merge_in_the_order_of_the_merges(spm_dir: Path) -> None:
    values = tokenizer_metadata(spm_dir, 15)
    score = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]))
    kind = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]))
    assert values["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in values
    assert score["ab"] > score[SPACE + "a"] > score["abc"] > score["<extra>"]
    assert score["abc"] == -2  # of its first merge
    assert [kind[text] for text in ("<unk>", "<s>", "</s>", "<0x0A>", "a", "abc", "[PAD14]")] == [2, 3, 3, 6, 1, 1, 5]
    assert kind["  "] == 4 and SPACE * 2 not in kind  # llama.cpp looks for what was added in the raw text
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.unknown_token_id"] == 0 and "tokenizer.ggml.padding_token_id" not in values
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (1, 2)


@pytest.mark.parametrize(
    ("edit", "adds"),
    [
        (lambda c: c["normalizer"]["normalizers"].pop(0), False),
        (lambda c: c.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "prepend_scheme": "first"}), True),
        (lambda c: c.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "prepend_scheme": "never"}), False),
        (lambda c: c["normalizer"]["normalizers"].pop(0) and c.update(
            pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                           "invert": False}), False),
    ],
)  # fmt: skip
def test_space_in_front_is_found_in_each_spelling(spm_dir: Path, edit: Callable, adds: bool) -> None:
    change(spm_dir / "tokenizer.json", edit)
    change(
        spm_dir / "tokenizer.json",
        lambda c: (
            (c["pre_tokenizer"] or {}).update(replacement=SPACE, split=False)
            if (c["pre_tokenizer"] or {}).get("type") == "Metaspace"
            else None
        ),
    )
    assert tokenizer_metadata(spm_dir, 15)["tokenizer.ggml.add_space_prefix"] is adds


def test_normalizer_that_llama_cpp_lacks_is_refused(spm_dir: Path) -> None:
    change(spm_dir / "tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(ValueError, match="Lowercase"):
        tokenizer_metadata(spm_dir, 15)


def test_sentencepiece_model_gives_its_own_scores(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("the cat sat on the mat and the dog sat on the cat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=290, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    added = {"290": {"content": "<turn>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    processor = Tokenizer(tmp_path).processor
    values = tokenizer_metadata(tmp_path, 320)
    n = processor.vocab_size()
    assert values["tokenizer.ggml.tokens"][:n] == [processor.id_to_piece(i) for i in range(n)]
    assert values["tokenizer.ggml.scores"][:n] == [processor.get_score(i) for i in range(n)]
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[n - 1] == 1
    assert (values["tokenizer.ggml.tokens"][290], kinds[290]) == ("<turn>", 3)
    assert values["tokenizer.ggml.add_space_prefix"] is True


def test_unigram_model_is_refused(tmp_path: Path, spm_dir: Path) -> None:
    change(spm_dir / "tokenizer.json", lambda c: c.update(
        model={"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]], "byte_fallback": False}
    ))  # fmt: skip
    with pytest.raises(ValueError, match="Unigram"):
        tokenizer_metadata(spm_dir, 15)
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "unigram"
    folder.mkdir()
    (folder / "text").write_text("the cat sat on the mat and the dog sat on the cat\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=40, model_type="unigram",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="unigram"):
        tokenizer_metadata(folder, 64)


def test_more_tokens_than_rows_are_refused(tiny_tokenizer_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"token id \d+, but the embedding has 256 rows"):
        tokenizer_metadata(tiny_tokenizer_dir, 256)


def test_added_tokens_that_the_model_lacks_are_left_out(spm_dir: Path) -> None:
    with pytest.warns(UserWarning, match="1 added tokens"):
        values = tokenizer_metadata(spm_dir, 13)
    assert len(values["tokenizer.ggml.tokens"]) == 13 and "  " not in values["tokenizer.ggml.tokens"]


def test_tokenizer_without_eos_is_refused(spm_dir: Path) -> None:
    change(spm_dir / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    with pytest.raises(ValueError, match="add eos_token"):
        tokenizer_metadata(spm_dir, 15)


def test_text_that_occurs_twice_becomes_padding(spm_dir: Path) -> None:
    change(spm_dir / "tokenizer.json", lambda c: c["added_tokens"].append(c["added_tokens"][3] | {"id": 14}))
    values = tokenizer_metadata(spm_dir, 15)
    assert values["tokenizer.ggml.tokens"][13:] == ["  ", "[PAD14]"]


def test_second_end_is_the_end_of_a_turn(spm_dir: Path) -> None:
    (spm_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    assert tokenizer_metadata(spm_dir, 15)["tokenizer.ggml.eot_token_id"] == 11


def test_chat_template_comes_from_its_file_first(spm_dir: Path) -> None:
    change(spm_dir / "tokenizer_config.json", lambda c: c.update(chat_template="old {{ messages }}"))
    assert tokenizer_metadata(spm_dir, 15)["tokenizer.chat_template"] == "old {{ messages }}"
    (spm_dir / "chat_template.jinja").write_text("new {{ messages }}")
    assert tokenizer_metadata(spm_dir, 15)["tokenizer.chat_template"] == "new {{ messages }}"


def test_named_chat_templates_keep_their_names(spm_dir: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    change(spm_dir / "tokenizer_config.json", lambda c: c.update(chat_template=named))
    values = tokenizer_metadata(spm_dir, 15)
    assert values["tokenizer.chat_template"] == "a" and values["tokenizer.chat_template.tool_use"] == "b"
    assert values["tokenizer.chat_templates"] == ["tool_use"]


def test_folder_without_a_template_has_none(spm_dir: Path) -> None:
    assert not any("chat" in key for key in tokenizer_metadata(spm_dir, 15))
