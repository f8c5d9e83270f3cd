"""The tokenizer of a checkpoint folder as GGUF metadata, in the two forms that llama.cpp has for these models.

Byte-level BPE (`gpt2`) keeps its merges, and names how text is split before merging. BPE over characters, as
sentencepiece makes it (`llama`), keeps a score for each token: llama.cpp merges the pair whose result scores highest.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from litgpt.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the GGUF format
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""

_NEVER_MERGED = -1e9
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CAMEL_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BY_THREE_DIGITS = rf"{_CASELESS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_PRE_TOKENIZERS = {
    (_GPT2,): "gpt-2",
    (r"\p{N}", _GPT2): "smollm",
    (_BY_THREE_DIGITS,): "dbrx",
    (_CL100K,): "dbrx",
    (rf"{_CASELESS}|{_WORDS}|\p{{N}}|{_REST}",): "qwen2",
    (rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_CAMEL_REST}",): "tekken",
    (rf"{_CAMEL[0]}{_CASELESS}?|{_CAMEL[1]}{_CASELESS}?|\p{{N}}{{1,3}}|{_CAMEL_REST}",): "gpt-4o",
}
"""Patterns that split a text, one after the other -> what llama.cpp calls them."""


def tokenizer_metadata(checkpoint_dir: Path | str, n_rows: int) -> dict[str, Any]:
    """Key -> value of everything under `tokenizer.`; the list of tokens is filled up to `n_rows` of the embedding.

    Raises:
        ValueError: llama.cpp has no such tokenizer, or it has more tokens than the embedding has rows.
    """
    folder = Path(checkpoint_dir)
    tokenizer = Tokenizer(folder)
    if tokenizer.eos_id is None:
        raise ValueError(
            f"the tokenizer in {folder} names no EOS token, which GGUF needs: add eos_token to "
            "its tokenizer_config.json"
        )
    if tokenizer.backend == "huggingface":
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        values, tokens = _from_json(content, file)
    else:
        values, tokens = _from_sentencepiece(tokenizer.processor, folder)
    values |= _token_lists(tokens, n_rows, folder, with_scores=values["tokenizer.ggml.model"] == "llama")
    values |= {
        # without a value llama.cpp takes token 11 or 1 for BOS
        "tokenizer.ggml.bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": tokenizer.use_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    if len(tokenizer.eos_ids) == 2:
        values["tokenizer.ggml.eot_token_id"] = tokenizer.eos_ids[1]
    config = _read_json(folder / "tokenizer_config.json")
    ids = {text: i for i, (text, _, _) in tokens.items()}
    for name, key in (("unk", "unknown"), ("pad", "padding")):
        text = config.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text in ids:
            values[f"tokenizer.ggml.{key}_token_id"] = ids[text]
    return values | _chat_templates(folder, config)


Token = tuple[str, float, int]
"""Text, score, type."""


def _from_json(content: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[int, Token]]:
    model = content["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"{file} holds a {model.get('type')} tokenizer; GGUF export knows BPE only")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    is_byte_level = any(part["type"] == "ByteLevel" for part in _parts(content, "pre_tokenizer", "pretokenizers"))
    if is_byte_level:
        values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": find_pre_tokenizer(content, file)}
        values["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
        tokens = {i: (text, 0.0, NORMAL) for text, i in model["vocab"].items()}
    else:
        values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        values["tokenizer.ggml.add_space_prefix"] = _adds_space(content, file)
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        tokens = {}
        for text, i in model["vocab"].items():
            score = -float(ranks[text]) if text in ranks else 0.0 if len(text) == 1 else _NEVER_MERGED
            tokens[i] = (text, score, BYTE if _is_byte(text) else UNKNOWN if text == model.get("unk_token") else NORMAL)
    for i, token in added.items():
        text, score, kind = token["content"], 0.0, CONTROL if token["special"] else USER_DEFINED
        if tokens.get(i, ("", 0, NORMAL))[2] == UNKNOWN:
            continue
        if kind == USER_DEFINED and not is_byte_level:
            text = text.replace(SPACE, " ")  # llama.cpp looks for them in the raw text
        tokens[i] = (text, score, kind)
    return values, tokens


def _from_sentencepiece(processor: Any, folder: Path) -> tuple[dict[str, Any], dict[int, Token]]:
    """The same from a sentencepiece model, with the tokens that were added to it later."""
    tokens: dict[int, Token] = {}
    for i in range(processor.vocab_size()):
        kinds = (
            (processor.is_unknown, UNKNOWN), (processor.is_control, CONTROL), (processor.is_unused, UNUSED),
            (processor.is_byte, BYTE),
        )  # fmt: skip
        kind = next((kind for is_kind, kind in kinds if is_kind(i)), NORMAL)
        tokens[i] = (processor.id_to_piece(i), processor.get_score(i), kind)
    if any(kind == NORMAL and not float(score).is_integer() for _, score, kind in tokens.values()):
        raise ValueError(f"{folder / 'tokenizer.model'} is a unigram model; GGUF export knows BPE only")
    added = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    for i, token in added.items():
        if int(i) not in tokens:
            kind = CONTROL if token.get("special") else USER_DEFINED
            tokens[int(i)] = (token["content"].replace(SPACE, " "), 0.0, kind)
    adds_space = processor.encode("a", out_type=str)[:1] != ["a"]
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
    return values | {"tokenizer.ggml.add_space_prefix": adds_space}, tokens


def _token_lists(tokens: Mapping[int, Token], n_rows: int, folder: Path, with_scores: bool) -> dict[str, Any]:
    if beyond := [i for i in tokens if i >= n_rows]:
        if any(tokens[i][2] not in (CONTROL, USER_DEFINED) for i in beyond):
            raise ValueError(
                f"the tokenizer in {folder} has the token id {max(beyond)}, but the embedding has {n_rows} rows: "
                "they do not belong together"
            )
        # Gemma 3 has a token for images, which the embedding of its text part lacks
        warnings.warn(f"{len(beyond)} added tokens that the model does not have are left out", stacklevel=3)
    rows = [tokens.get(i, (f"[PAD{i}]", _NEVER_MERGED, UNUSED)) for i in range(n_rows)]
    texts, scores, kinds = (list(column) for column in zip(*rows))
    taken: set[str] = set()
    for i, text in enumerate(texts):  # llama.cpp refuses a text that occurs twice
        if not text or text in taken:
            texts[i], kinds[i] = f"[PAD{i}]", UNUSED
        taken.add(texts[i])
    lists = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds}
    return lists | ({"tokenizer.ggml.scores": scores} if with_scores else {})


def find_pre_tokenizer(content: Mapping[str, Any], file: Path | str = "tokenizer.json") -> str:
    """What llama.cpp calls the way in which the tokenizer `content` splits text before it merges."""
    patterns: list[str] = []
    for part in _parts(content, "pre_tokenizer", "pretokenizers"):
        kind = part["type"]
        if kind == "Split" and "Regex" in part.get("pattern", {}) and _keeps_all(part):
            patterns.append(part["pattern"]["Regex"])
        elif kind == "Digits" and part.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel":
            patterns += [_GPT2] if part.get("use_regex", True) else []
            if part.get("add_prefix_space"):
                warnings.warn(f"{file} puts a space before each text, which llama.cpp does not", stacklevel=2)
        else:
            patterns.append(json.dumps(part, ensure_ascii=False))
    for part in _parts(content, "normalizer", "normalizers"):
        if part["type"] != "NFC":  # llama.cpp leaves NFC out too, and nearly all texts are in that form
            raise ValueError(f"{file} changes the text first ({part['type']}), which llama.cpp does not")
    name = _PRE_TOKENIZERS.get(tuple(patterns))
    if name is None:
        raise ValueError(
            f"{file} splits text by {' and then '.join(patterns) or 'nothing'}, which is not among the ways that GGUF "
            f"export knows: {', '.join(dict.fromkeys(_PRE_TOKENIZERS.values()))}"
        )
    if tuple(patterns) == (_BY_THREE_DIGITS,) and content["model"].get("ignore_merges"):
        return "llama-bpe"
    return name


def _keeps_all(split: Mapping[str, Any]) -> bool:
    """Whether a Split only cuts: what matches stands alone, or what does not match (there is none) is dropped."""
    return (split.get("behavior"), split.get("invert", False)) in (("Isolated", False), ("Removed", True))


def _adds_space(content: Mapping[str, Any], file: Path) -> bool:
    """Whether a text gets a space in front; anything but that and spaces as `SPACE` is refused."""
    adds = False
    for part in _parts(content, "normalizer", "normalizers"):
        if part["type"] == "Prepend" and part["prepend"] == SPACE:
            adds = True
        elif (part["type"], part.get("pattern"), part.get("content")) != ("Replace", {"String": " "}, SPACE):
            raise ValueError(f"{file} changes the text first ({part['type']}) in a way that llama.cpp does not")
    for part in _parts(content, "pre_tokenizer", "pretokenizers"):
        if part["type"] == "Metaspace":
            adds |= part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
        elif not (part["type"] == "Split" and part.get("pattern") == {"String": " "}):
            raise ValueError(f"{file} splits text by {part['type']}, which llama.cpp does not for this kind")
    return adds


def _parts(content: Mapping[str, Any], key: str, inner: str) -> Iterator[dict[str, Any]]:
    part = content.get(key)
    pending = [part] if part else []
    while pending:
        part = pending.pop(0)
        if part["type"] == "Sequence":
            pending[:0] = part[inner]
        else:
            yield part


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template: a file of its own wins over the one in tokenizer_config.json, as in transformers."""
    template = config.get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {t["name"]: t["template"] for t in template or () if isinstance(t, dict)}
    values: dict[str, Any] = {f"tokenizer.chat_template.{n}": t for n, t in named.items() if n != "default"}
    if values:
        values["tokenizer.chat_templates"] = [name for name in named if name != "default"]
    return values | ({"tokenizer.chat_template": named["default"]} if "default" in named else {})


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
