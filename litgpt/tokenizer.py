"""Text to token ids and back, by the tokenizer files of a checkpoint folder."""

import codecs
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_BOS_ALWAYS_WANTED = ("<|begin_of_text|>", "<|im_start|>")
"""BOS tokens of Llama 3 and SmolLM2-Instruct: these models expect them although their config does not say so."""

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)


class MissingTokenizerError(FileNotFoundError, NotImplementedError):
    """A folder has no tokenizer file. (0.5 raised NotImplementedError, so handlers of that keep working.)"""


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        checkpoint_dir: folder with tokenizer.json or tokenizer.model. tokenizer_config.json and generation_config.json
            beside it name the BOS and EOS tokens.

    Attributes:
        backend: "huggingface" or "sentencepiece".
        processor: the `tokenizers.Tokenizer` or `sentencepiece.SentencePieceProcessor`.
        bos_id, eos_id: ids of the tokens that begin and end a text; None where there is none.
        eos_ids: all ids after which the model has ended: `eos_id`, then the others that generation_config.json lists.
        use_bos: whether `encode` adds BOS when it is not told.
        checkpoint_dir: the folder.
        model_name: name of the folder.
        apply_decoding_fix: whether a single token keeps the space in front of it when it is decoded (Llama style).
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        checkpoint_dir = Path(checkpoint_dir)
        if not checkpoint_dir.is_dir():
            raise NotADirectoryError(f"The tokenizer folder {str(checkpoint_dir)!r} does not exist.")
        self.checkpoint_dir = checkpoint_dir
        self.model_name = checkpoint_dir.resolve().name
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self._special_ids: set[int] = set()
        self._added_before: list[int] = []  # what the post-processor of tokenizer.json adds to a text, BOS included
        self._added_after: list[int] = []

        if (file := checkpoint_dir / "tokenizer.json").is_file():
            self.backend = "huggingface"
            self._open_huggingface(file)
        elif (file := checkpoint_dir / "tokenizer.model").is_file():
            self.backend = "sentencepiece"
            self._open_sentencepiece(file)
        else:
            raise MissingTokenizerError(
                f"No tokenizer in {str(checkpoint_dir)!r}: it has neither tokenizer.json nor tokenizer.model."
                " `litgpt download REPO_ID --tokenizer_only true` fetches one, `litgpt train_tokenizer` makes one."
            )
        config = _load_config(checkpoint_dir / "tokenizer_config.json")
        generation_config = _load_config(checkpoint_dir / "generation_config.json")
        if self.backend == "huggingface":
            self.bos_id = self._find_special("bos", config, generation_config)
            self.eos_id = self._find_special("eos", config, generation_config)
        ends = [self.eos_id, *_id_list(generation_config.get("eos_token_id"))]
        self.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        self.use_bos = self.check_if_bos_token_used(checkpoint_dir)
        self.apply_decoding_fix = "LlamaTokenizer" in str(config.get("tokenizer_class"))

    def _open_huggingface(self, file: Path) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self.processor = HFTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{str(file)!r} is no tokenizer file or is damaged ({error}); fetch it again.") from error
        self.processor.no_truncation()  # some files carry the limits of the run that made them
        self.processor.no_padding()
        self._special_ids = {i for i, token in self.processor.get_added_tokens_decoder().items() if token.special}
        probe = self.processor.encode("a")
        is_added = [bool(flag) for flag in probe.special_tokens_mask]
        n_before = is_added.index(False) if False in is_added else len(is_added)
        n_after = is_added[::-1].index(False) if False in is_added else 0
        self._added_before = probe.ids[:n_before]
        self._added_after = probe.ids[len(probe.ids) - n_after :]

    def _open_sentencepiece(self, file: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ModuleNotFoundError(
                f"{str(file)!r} needs the package sentencepiece: run `pip install 'litgpt[sentencepiece]'`."
            ) from error

        try:
            self.processor = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{str(file)!r} is not a sentencepiece model or is damaged; fetch it again.") from error
        self._special_ids = {i for i in range(self.vocab_size) if self.processor.is_control(i)}
        bos_id, eos_id = self.processor.bos_id(), self.processor.eos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = eos_id if eos_id >= 0 else None

    def _find_special(self, which: str, config: dict[str, Any], generation_config: dict[str, Any]) -> int | None:
        """Id of BOS or EOS: from the token in tokenizer_config.json, else from the id in generation_config.json."""
        token = config.get(f"{which}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            token_id = self.processor.token_to_id(str(token))
            if token_id is not None:
                return token_id
            warnings.warn(
                f"tokenizer_config.json names {token!r} as {which}_token, but the tokenizer lacks it.", stacklevel=3
            )
        return next(iter(_id_list(generation_config.get(f"{which}_token_id"))), None)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without those added after training."""
        if self.backend == "huggingface":
            return self.processor.get_vocab_size(with_added_tokens=False)
        return self.processor.vocab_size()

    def token_to_id(self, token: str) -> int:
        """Id of `token`; ValueError if the vocabulary lacks it."""
        if self.backend == "huggingface":
            token_id = self.processor.token_to_id(token)
        else:
            token_id = self.processor.piece_to_id(token)
            if token_id == self.processor.unk_id() and token != self.processor.id_to_piece(token_id):
                token_id = None
        if token_id is None:
            raise ValueError(f"The vocabulary of tokenizer {self.model_name!r} has no token {token!r}.")
        return token_id

    def check_if_bos_token_used(self, checkpoint_dir: Path) -> bool:
        """Whether texts start with BOS, from what the files say (the folder's name says nothing)."""
        config = _load_config(Path(checkpoint_dir) / "tokenizer_config.json")
        if isinstance(said := config.get("add_bos_token"), bool):
            return said
        if self.bos_id is None:
            return False
        if self.bos_id in self._added_before or config.get("tokenizer_class") == "LlamaTokenizer":
            return True
        return self.backend == "huggingface" and self.processor.id_to_token(self.bos_id) in _BOS_ALWAYS_WANTED

    def encode(
        self,
        string: str,
        device: torch.device | None = None,
        bos: bool | None = None,
        eos: bool = False,
        max_length: int = -1,
    ) -> torch.Tensor:
        """Ids of `string` as `(T,)` int32.

        Args:
            string: any text. Special tokens that it spells out become their ids.
            device: where the result lies.
            bos: begin with exactly one BOS, even if the text already spells one out; False adds none.
                Default: `use_bos`.
            eos: end with exactly one EOS; False adds none.
            max_length: cut to so many tokens at the end; -1 does not cut.
        """
        ids = self._frame(self._encode_content([string])[0], bos, eos)
        if max_length > 0:
            ids = ids[:max_length]
        return torch.tensor(ids, dtype=torch.int, device=device)

    def encode_batch(self, texts: Sequence[str], bos: bool | None = None, eos: bool = False) -> list[list[int]]:
        """Ids of many texts at once (in parallel), each as `encode` gives them."""
        return [self._frame(ids, bos, eos) for ids in self._encode_content(list(texts))]

    def _encode_content(self, texts: list[str]) -> list[list[int]]:
        try:
            if self.backend == "sentencepiece":
                return self.processor.encode(texts)
            if len(texts) == 1:
                return [self.processor.encode(texts[0], add_special_tokens=False).ids]
            return [encoding.ids for encoding in self.processor.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError:
            # Half a surrogate pair, as cut JSON texts have them, is no text for either library.
            repaired = [text.encode("utf-8", "replace").decode("utf-8") for text in texts if isinstance(text, str)]
            if len(repaired) != len(texts) or repaired == texts:
                raise
            return self._encode_content(repaired)

    def _frame(self, ids: list[int], bos: bool | None, eos: bool) -> list[int]:
        """Put around the ids of a text what belongs there."""
        bos = self.use_bos if bos is None else bos
        for wanted, token_id, which in ((bos, self.bos_id, "bos"), (eos, self.eos_id, "eos")):
            if wanted and token_id is None:
                raise NotImplementedError(
                    f"Tokenizer {self.model_name!r} defines no {which.upper()} token: pass {which}=False,"
                    f" or name one as {which}_token in its tokenizer_config.json."
                )
        start, end = 0, len(ids)
        if bos:
            while start < end and ids[start] == self.bos_id:
                start += 1
        if eos:
            while end > start and ids[end - 1] == self.eos_id:
                end -= 1
        before = [i for i in self._added_before if i != self.bos_id]
        after = [i for i in self._added_after if i != self.eos_id]
        return [self.bos_id] * bos + before + ids[start:end] + after + [self.eos_id] * eos

    def decode(self, tensor: torch.Tensor | Sequence[int] | int) -> str:
        """Text of token ids, in any shape; special tokens give nothing."""
        ids = _as_list(tensor)
        if len(ids) == 1 and self.apply_decoding_fix:
            return self._decode_inside(ids)
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        if self.backend == "sentencepiece":  # it refuses ids of a padded vocabulary; tokenizers passes over them
            ids = [i for i in ids if i < self.vocab_size]
        return self.processor.decode(ids)

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Ids and text of some visible word, to decode behind: many decoders drop a space at the very beginning."""
        for word in ("a", "e", "0", "A", "."):
            ids = self._encode_content([word])[0]
            if ids and self._decode(ids) == word:
                return ids, word
        return [], ""

    def _decode_inside(self, ids: list[int]) -> str:
        """Text of `ids` where other text stands in front of them."""
        anchor, word = self._anchor
        return self._decode(anchor + ids)[len(word) :]

    def decode_stream(
        self, token_stream: Iterable[torch.Tensor | Sequence[int] | int], device: torch.device | None = None
    ) -> Iterator[str]:
        """Text of a stream of tokens, piece by piece as soon as it is certain.

        No piece holds half a character, and the pieces joined are what `decode` gives for all tokens. (One exception:
        with the byte fallback of tokenizer.json, bytes that are no UTF-8 make `decode` drop the valid ones right before
        them as well, but those are out by then.)

        Args:
            token_stream: tensors of one or more ids, or plain ids.
            device: not needed; kept for scripts that pass it.
        """
        ids = (i for tokens in token_stream for i in _as_list(tokens))
        return self._stream_byte_level(ids) if self._is_byte_level else self._stream_pieces(ids)

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether each token stands for a sequence of bytes."""
        if self.backend == "sentencepiece" or self.processor.decoder is None:
            return False
        decoder = json.loads(self.processor.decoder.__getstate__())
        return all(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]))

    def _stream_byte_level(self, ids: Iterable[int]) -> Iterator[str]:
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        byte_of = _byte_of_character()
        for i in ids:
            token = self.processor.id_to_token(i)
            if token is None or i in self._special_ids:
                continue
            if all(character in byte_of for character in token):
                data = bytes(byte_of[character] for character in token)
            else:  # an added token is spelled as it is
                data = token.encode()
            if text := utf8.decode(data):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text

    def _stream_pieces(self, ids: Iterable[int]) -> Iterator[str]:
        pending: list[int] = []
        decode = self._decode  # until something is out, the pieces stand at the beginning
        for i in ids:
            is_special = i in self._special_ids
            if not is_special:
                pending.append(i)
            text = decode(pending)
            if not text.endswith(REPLACEMENT):
                n_ready = len(pending) if text else 0
            elif is_special:  # sentencepiece starts afresh behind it, tokenizers does not see it
                n_ready = len(pending) if self.backend == "sentencepiece" else 0
            else:
                n_ready = self._n_ready(pending, text, decode)
            if n_ready:
                if piece := decode(pending[:n_ready]):
                    yield piece
                pending = pending[n_ready:]
                decode = self._decode_inside
        if pending and (text := decode(pending)):
            yield text

    def _n_ready(self, pending: list[int], text: str, decode: Any) -> int:
        """How many of the `pending` tokens can go out although their `text` ends in a broken character.

        Characters have at most four bytes, so that in four byte tokens the first is not waiting for a later one.
        """
        if len(pending) < 4:
            return 0
        for n in range(1, len(pending)):
            if decode(pending[:n]) + self._decode_inside(pending[n:]) == text:
                return n
        return len(pending) if len(pending) > 16 else 0


def _as_list(tokens: torch.Tensor | Sequence[int] | int) -> list[int]:
    if isinstance(tokens, torch.Tensor):
        return tokens.reshape(-1).tolist()
    return [tokens] if isinstance(tokens, int) else [int(i) for i in tokens]


def _id_list(value: Any) -> list[int]:
    """The ids of an entry of generation_config.json, which is one id, several or null."""
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def fix_and_load_json(text: str) -> Any:
    """Parse JSON in which commas are missing between values or stand where no value follows.

    Raises:
        ValueError: if something else is wrong with it.
    """
    tokens = _JSON_TOKEN.findall(text)
    repaired: list[str] = []
    for token in tokens:
        last = repaired[-1] if repaired else "{"
        if last == "," and token in ("}", "]", ","):
            repaired.pop()
        elif last not in ("{", "[", ":", ",") and token not in ("}", "]", ":", ","):
            repaired.append(",")
        repaired.append(token)
    while repaired and repaired[-1] == ",":
        repaired.pop()
    try:
        return json.loads(" ".join(repaired))
    except json.JSONDecodeError as error:
        raise ValueError(f"Failed to parse JSON after fixing its commas: {error}") from error


def _load_config(file: Path) -> dict[str, Any]:
    """The content of a JSON file of a checkpoint folder, {} if there is none; wrong commas are put right."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8-sig")
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            config = fix_and_load_json(text)
            warnings.warn(
                f"{str(file)!r} is not valid JSON ({error}); wrong commas were put right in memory.", stacklevel=3
            )
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}. Repair it or fetch it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} holds a {type(config).__name__}, not a JSON object; fetch it again.")
    return config
