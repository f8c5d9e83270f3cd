"""Tokenizers of both kinds, made here from a few hundred sentences."""

import builtins
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from litgpt.tokenizer import Tokenizer, fix_and_load_json

TRICKY = [
    "",
    "x",
    "Hello, reader of this test!",
    " a space in front",
    "   three\n\n\tand the end  ",
    "é€😀",
    "family 👨‍👩‍👧‍👦 and 🏳️‍🌈 flag",
    "日本語のテキスト、中文 한국어",
    "שלום עולם مرحبا بالعالم",
    "e\u0301 a\u0308\u0323 नमस्ते",
    "\ufffd a real mark \ufffd",
    "\u0000\u0001 control \u007f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀𒁀",
]


def sentences() -> list[str]:
    rng = random.Random(0)
    text = "the cat a dog sees runs and sleeps under old tree house with bright yellow sun café naïve 日本語 мир"
    words = text.split()
    return [" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(400)]


def write(folder: Path, config: dict | None = None, generation_config: dict | None = None) -> Path:
    for name, content in [("tokenizer_config.json", config), ("generation_config.json", generation_config)]:
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def byte_level_processor(specials=("<|begin|>", "<|end|>")) -> HFTokenizer:
    processor = HFTokenizer(models.BPE())
    processor.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    processor.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    processor.train_from_iterator(sentences(), trainer)
    return processor


def template(processor: HFTokenizer, single: str, *specials: str) -> HFTokenizer:
    ids = [(token, processor.token_to_id(token)) for token in specials]
    processor.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return processor


def llama_processor() -> HFTokenizer:
    """BPE with byte fallback and a space mark, as the Hugging Face form of Llama 2 has it."""
    alphabet = sorted(set("".join(sentences())) - set("日本語") | {"▁"})
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + alphabet + ["▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    processor = HFTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    processor.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    processor.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    processor.add_special_tokens(["<unk>", "<s>", "</s>"])
    return template(processor, "<s> $A", "<s>")


BYTE_LEVEL_CONFIG = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}


@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    byte_level_processor().save(str(folder / "tokenizer.json"))
    return write(folder, BYTE_LEVEL_CONFIG)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama_processor().save(str(folder / "tokenizer.json"))
    return write(folder, {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"})


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return write(folder, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(params=["byte_level_dir", "llama_dir", "sentencepiece_dir"])
def tokenizer(request):
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def tokenizers(byte_level_dir, llama_dir, sentencepiece_dir):
    return [Tokenizer(folder) for folder in (byte_level_dir, llama_dir, sentencepiece_dir)]


def folder_of(processor: HFTokenizer, folder: Path, config: dict | None = None, generation: dict | None = None) -> Path:
    processor.save(str(folder / "tokenizer.json"))
    return write(folder, config, generation)


# Files


def test_missing_folder_is_no_directory(tmp_path):
    with pytest.raises(NotADirectoryError, match="no-such-place"):
        Tokenizer(tmp_path / "no-such-place")


@pytest.mark.parametrize("error", [NotImplementedError, FileNotFoundError])
def test_folder_without_tokenizer_is_told_with_the_way_out(tmp_path, error):
    with pytest.raises(error, match=r"neither tokenizer.json nor tokenizer.model.*litgpt download") as caught:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_tokenizer_json_comes_before_tokenizer_model(byte_level_dir, sentencepiece_dir, tmp_path):
    shutil.copy(byte_level_dir / "tokenizer.json", tmp_path)
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    assert Tokenizer(tmp_path).backend == "huggingface"
    assert Tokenizer(str(sentencepiece_dir)).backend == "sentencepiece"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_tokenizer_file_is_one_clear_line(tmp_path, name):
    (tmp_path / name).write_text('{"version": "1.0", "model": ')
    with pytest.raises(ValueError, match=f"{name}.*damaged") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_sentencepiece_is_told_with_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").touch()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'litgpt\[sentencepiece\]'"):
        Tokenizer(tmp_path)


def test_tokenizer_json_needs_no_sentencepiece(byte_level_dir, monkeypatch):
    imported = []
    original = builtins.__import__

    def spy(name, *args, **kwargs):
        imported.append(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", spy)
    Tokenizer(byte_level_dir).encode("x")
    assert "tokenizers" in imported and "sentencepiece" not in imported


def test_config_files_may_be_absent(byte_level_dir, tmp_path):
    shutil.copy(byte_level_dir / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.use_bos) == (None, None, (), False)
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


def test_config_with_wrong_commas_is_repaired_with_a_warning(byte_level_dir, tmp_path):
    shutil.copy(byte_level_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>"\n "chat_template": "{[1,]}",}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5,],}')
    with pytest.warns(UserWarning, match="commas were put right") as caught:
        tokenizer = Tokenizer(tmp_path)
    assert {Path(str(w.message).split("'")[1]).name for w in caught} == {
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@pytest.mark.parametrize("text", ['{"bos_token": ', "[1, 2]", "", "{'a': 1}"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_config_beyond_repair_is_one_clear_line(byte_level_dir, tmp_path, name, text):
    shutil.copy(byte_level_dir / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES, st.booleans())
def test_repair_leaves_valid_json_alone(value, indented):
    assert fix_and_load_json(json.dumps(value, indent=1 if indented else None)) == value


@given(st.dictionaries(st.text(), JSON_VALUES, min_size=1, max_size=4))
def test_repair_puts_in_commas_at_line_ends_and_takes_out_trailing_ones(value):
    lines = json.dumps(value, indent=1).splitlines()
    without = "\n".join(line.removesuffix(",") for line in lines)
    assert fix_and_load_json(without) == value
    assert fix_and_load_json("\n".join(lines[:-1]) + ",\n}") == value


# Special tokens


def test_special_tokens_come_from_texts_or_dictionaries(byte_level_dir):
    tokenizer = Tokenizer(byte_level_dir)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, (1,))
    assert tokenizer.vocab_size == 330
    assert tokenizer.model_name == byte_level_dir.name


def test_special_tokens_come_from_generation_config_where_the_config_has_none(tmp_path):
    folder = folder_of(
        byte_level_processor(), tmp_path, {"tokenizer_class": "X"}, {"bos_token_id": 0, "eos_token_id": [1, 7]}
    )
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, (1, 7))


def test_further_eos_ids_of_generation_config_are_kept_behind_the_token_s(tmp_path):
    tokenizer = Tokenizer(folder_of(byte_level_processor(), tmp_path, BYTE_LEVEL_CONFIG, {"eos_token_id": [9, 1]}))
    assert tokenizer.eos_id == 1
    assert tokenizer.eos_ids == (1, 9)


def test_special_token_that_the_vocabulary_lacks_is_warned_about(tmp_path):
    folder = folder_of(byte_level_processor(), tmp_path, {"eos_token": "</s>"}, {"eos_token_id": 1})
    with pytest.warns(UserWarning, match="names '</s>' as eos_token"):
        assert Tokenizer(folder).eos_id == 1


def test_added_tokens_do_not_count_in_vocab_size(tmp_path):
    processor = byte_level_processor()
    processor.add_tokens(["wholly new"])
    tokenizer = Tokenizer(folder_of(processor, tmp_path))
    assert tokenizer.vocab_size == 330
    assert tokenizer.token_to_id("wholly new") == 330
    assert tokenizer.decode(tokenizer.encode("a wholly new x")) == "a wholly new x"


def test_token_to_id_knows_the_vocabulary_and_nothing_else(tokenizer):
    token = {"huggingface": "a", "sentencepiece": "▁the"}[tokenizer.backend]
    token_id = tokenizer.token_to_id(token)
    assert tokenizer.decode(torch.tensor([token_id])).strip() == token.strip("▁")
    with pytest.raises(ValueError, match="no token 'no such token'"):
        tokenizer.token_to_id("no such token")


@pytest.mark.parametrize(
    ("config", "adds_bos", "expected"),
    [
        ({"add_bos_token": True}, False, True),
        ({"add_bos_token": False}, True, False),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, False, False),
        ({"add_bos_token": None}, True, True),
        ({}, True, True),
        ({}, False, False),
        ({"tokenizer_class": "LlamaTokenizer"}, False, True),
        ({"tokenizer_class": "GPT2Tokenizer"}, False, False),
    ],
)
@pytest.mark.parametrize("name", ["checkpoint", "Llama-3-8B", "SmolLM2-135M-Instruct"])
def test_use_bos_follows_the_files_and_not_the_folder(tmp_path, config, adds_bos, expected, name):
    processor = byte_level_processor()
    if adds_bos:
        template(processor, "<|begin|> $A", "<|begin|>")
    (tmp_path / name).mkdir()
    tokenizer = Tokenizer(folder_of(processor, tmp_path / name, BYTE_LEVEL_CONFIG | config))
    assert tokenizer.use_bos is expected
    assert (tokenizer.encode("the cat").tolist()[0] == tokenizer.bos_id) is expected


@pytest.mark.parametrize("bos_token", ["<|begin_of_text|>", "<|im_start|>"])
def test_models_that_want_bos_without_saying_so_are_known_by_their_token(tmp_path, bos_token):
    processor = byte_level_processor(specials=(bos_token, "<|end|>"))
    assert Tokenizer(folder_of(processor, tmp_path, {"bos_token": bos_token})).use_bos


def test_use_bos_is_false_where_only_the_class_asks_for_a_bos_that_is_not_there(tmp_path):
    tokenizer = Tokenizer(folder_of(byte_level_processor(), tmp_path, {"tokenizer_class": "LlamaTokenizer"}))
    assert not tokenizer.use_bos
    assert tokenizer.encode("the cat").numel() > 0


# Encoding


def test_ids_are_a_row_of_int32(tokenizer):
    ids = tokenizer.encode("the cat", device=torch.device("cpu"))
    assert ids.dtype == torch.int32
    assert ids.ndim == 1


def test_meta_device_is_honoured(byte_level_dir):
    assert Tokenizer(byte_level_dir).encode("x", device=torch.device("meta")).device.type == "meta"


TEMPLATES = ["$A", "<|begin|> $A", "$A <|end|>", "<|begin|> $A <|end|>", "<|begin|> <|begin|> $A <|end|> <|end|>"]


@pytest.mark.parametrize("single", TEMPLATES)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos_stand_there_exactly_as_wanted(tmp_path, single, bos, eos):
    tokenizer = Tokenizer(
        folder_of(template(byte_level_processor(), single, "<|begin|>", "<|end|>"), tmp_path, BYTE_LEVEL_CONFIG)
    )
    content = tokenizer.processor.encode("the cat", add_special_tokens=False).ids
    for text, middle in [("the cat", content), ("", [])]:
        expected = [0] * bos + middle + [1] * eos
        assert tokenizer.encode(text, bos=bos, eos=eos).tolist() == expected
        assert tokenizer.encode_batch([text, "a dog"], bos=bos, eos=eos)[0] == expected


def test_bos_and_eos_spelled_out_in_the_text_are_not_doubled(byte_level_dir):
    tokenizer = Tokenizer(byte_level_dir)
    content = tokenizer.encode("the cat", bos=False).tolist()
    text = "<|begin|>the cat<|end|>"
    assert tokenizer.encode(text, bos=True, eos=True).tolist() == [0, *content, 1]
    assert tokenizer.encode(text, bos=False).tolist() == [0, *content, 1]  # what the text says is not taken away


def test_other_tokens_of_the_post_processor_stay(tmp_path):
    processor = template(byte_level_processor(("<|begin|>", "<|end|>", "[X]")), "[X] $A [X]", "[X]")
    tokenizer = Tokenizer(folder_of(processor, tmp_path, BYTE_LEVEL_CONFIG))
    content = processor.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("the", bos=True, eos=True).tolist() == [0, 2, *content, 2, 1]


@pytest.mark.parametrize("which", ["bos", "eos"])
def test_wanted_token_that_is_not_defined_is_an_error(tmp_path, which):
    tokenizer = Tokenizer(folder_of(byte_level_processor(), tmp_path))
    with pytest.raises(NotImplementedError, match=f"no {which.upper()} token: pass {which}=False"):
        tokenizer.encode("x", **{which: True})


def test_max_length_cuts_at_the_end(tokenizer):
    ids = tokenizer.encode("the cat sees a dog", bos=True, eos=True)
    assert tokenizer.encode("the cat sees a dog", bos=True, eos=True, max_length=3).tolist() == ids[:3].tolist()
    assert tokenizer.encode("the cat sees a dog", bos=True, eos=True, max_length=10_000).tolist() == ids.tolist()
    assert tokenizer.encode("the cat sees a dog", bos=True, eos=True, max_length=-1).tolist() == ids.tolist()


def test_truncation_and_padding_stored_in_the_file_are_ignored(tmp_path):
    processor = byte_level_processor()
    processor.enable_truncation(2)
    processor.enable_padding(length=64)
    tokenizer = Tokenizer(folder_of(processor, tmp_path))
    assert tokenizer.decode(tokenizer.encode("the cat sees a dog")) == "the cat sees a dog"
    assert len(tokenizer.encode_batch(["the cat", "a"])[1]) == 1


def test_batch_gives_the_ids_of_each_text(tokenizer):
    for bos, eos in [(None, False), (True, True), (False, False)]:
        expected = [tokenizer.encode(text, bos=bos, eos=eos).tolist() for text in TRICKY]
        assert tokenizer.encode_batch(TRICKY, bos=bos, eos=eos) == expected
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(["x"]) == [tokenizer.encode("x").tolist()]


def test_half_a_surrogate_pair_becomes_a_question_mark(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a \ud83d b", bos=True)) == "a ? b"
    assert tokenizer.encode_batch(["a \ud83d", "b"])[0] == tokenizer.encode("a ?").tolist()


# Decoding


@pytest.mark.parametrize("text", TRICKY)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_decode_takes_tensors_of_any_shape_lists_and_numbers(byte_level_dir):
    tokenizer = Tokenizer(byte_level_dir)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(ids.view(1, -1)) == tokenizer.decode(ids.tolist()) == "the cat"
    assert tokenizer.decode(ids[0]) == tokenizer.decode(ids[:1]) == tokenizer.decode(int(ids[0]))
    assert tokenizer.decode([]) == ""


def test_ids_of_a_padded_vocabulary_give_nothing(tokenizer):
    ids = tokenizer.encode("the cat", bos=True).tolist()
    assert tokenizer.decode([*ids, 100_000]) == "the cat"
    assert "".join(tokenizer.decode_stream([*ids, 100_000])) == "the cat"


@pytest.mark.parametrize("kind", ["llama_dir", "sentencepiece_dir"])
def test_single_llama_token_keeps_its_space(request, kind):
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    assert tokenizer.apply_decoding_fix
    ids = tokenizer.encode("the cat sees", bos=False)
    assert "".join(tokenizer.decode(i) for i in ids) == " the cat sees"


def test_other_tokens_are_decoded_plainly(byte_level_dir):
    assert not Tokenizer(byte_level_dir).apply_decoding_fix


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return list(tokenizer.decode_stream(iter(ids)))


@pytest.mark.parametrize("text", TRICKY)
def test_streamed_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    pieces = list(tokenizer.decode_stream((i for i in ids), device=torch.device("cpu")))
    assert "".join(pieces) == text
    assert all(pieces)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_stream_gives_each_character_as_soon_as_it_is_whole(tokenizer):
    seen = []
    ids = tokenizer.encode("日本", bos=False).tolist()

    def watched():
        for i in ids:
            yield i
            seen.append(len(got))

    got = []
    for piece in tokenizer.decode_stream(watched()):
        got.append(piece)
    assert "".join(got) == "日本"
    assert seen[-2:] != [0, 0]  # the first character did not wait for the last


def test_stream_takes_tensors_with_several_ids(tokenizer):
    ids = tokenizer.encode("the cat é 😀", bos=True)
    assert "".join(tokenizer.decode_stream(ids.split(3))) == "the cat é 😀"


def test_stream_flushes_broken_bytes_at_its_end(tokenizer):
    ids = tokenizer.encode("a 😀", bos=True).tolist()
    for n_missing in (1, 2, 3):
        expected = tokenizer.decode(ids[:-n_missing])
        assert expected.startswith("a \ufffd")
        assert "".join(pieces_of(tokenizer, ids[:-n_missing])) == expected


def test_special_tokens_inside_a_stream_give_nothing(tokenizer):
    ids = tokenizer.encode("the cat", bos=False).tolist()
    special = [tokenizer.bos_id] * 50
    assert pieces_of(tokenizer, special + ids[:1] + special + ids[1:] + [tokenizer.eos_id]) == pieces_of(tokenizer, ids)


def test_stream_decodes_only_a_bounded_window(tokenizer, monkeypatch):
    longest = 0
    original = tokenizer._decode

    def watched(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return original(ids)

    monkeypatch.setattr(tokenizer, "_decode", watched)
    rng = random.Random(0)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(3000)] + [5] * 300
    assert len("".join(pieces_of(tokenizer, ids))) > 1000
    assert longest <= 20


def test_token_that_ends_inside_one_character_and_begins_inside_another_streams(tmp_path):
    """Byte-level BPE may merge across characters: then no token boundary is a character boundary."""
    letter_of = {byte: letter for byte, letter in zip("€".encode(), byte_level_letters("€"))}
    head, tail, link = letter_of[0xE2], letter_of[0x82] + letter_of[0xAC], None
    link = tail + head
    vocab = {head: 0, tail: 1, link: 2}
    processor = HFTokenizer(models.WordLevel(vocab, unk_token=head))
    processor.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(folder_of(processor, tmp_path))
    ids = [0] + [2] * 40 + [1]
    assert tokenizer.decode(ids) == "€" * 41
    assert pieces_of(tokenizer, ids) == ["€"] * 41


def byte_level_letters(text: str) -> str:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(text=ANY_TEXT)
@example("▁")
@example("\u2581 \u2581")
def test_any_text_comes_back_from_byte_level_bpe(byte_level_dir, tokenizers, text):
    tokenizer = tokenizers[0]
    ids = tokenizer.encode(text, bos=True, eos=True)
    if not any(token in text for token in ("<|begin|>", "<|end|>")):
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode_stream(ids)) == text


@FUZZ
@given(text=ANY_TEXT)
def test_any_text_streams_as_it_is_decoded(tokenizers, text):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text, bos=True).tolist()
        assert "".join(pieces_of(tokenizer, ids)) == (tokenizer.decode(ids) if len(ids) > 1 else "")


@FUZZ
@given(ids=st.lists(st.integers(0, 329), max_size=30))
@example([197, 1, 131])  # BOS between the bytes of one character
@example([230, 1, 1, 134, 176, 1])
def test_any_ids_stream_as_they_are_decoded(tokenizers, ids):
    """Random ids are mostly broken UTF-8. The byte fallback of `tokenizers` is left out, see `decode_stream`."""
    byte_level, _, sentencepiece = tokenizers
    assert "".join(pieces_of(byte_level, ids)) == byte_level.decode(ids)
    if len(ids) != 1:
        assert "".join(pieces_of(sentencepiece, ids)) == sentencepiece.decode(ids)


def test_word_pieces_stream_with_their_spaces(tmp_path):
    vocab = {word: i for i, word in enumerate(["[UNK]", "a", "the", "cat", "##s", "run"])}
    processor = HFTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    processor.pre_tokenizer = pre_tokenizers.Whitespace()
    processor.decoder = decoders.WordPiece(prefix="##")
    tokenizer = Tokenizer(folder_of(processor, tmp_path))
    ids = tokenizer.encode("the cats run")
    assert list(tokenizer.decode_stream(ids)) == ["the", " cat", "s", " run"]


def test_no_warning_is_given_for_sound_files(byte_level_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer(byte_level_dir)
