import os
import time

import pytest

from litgpt.data import documents
from litgpt.data.documents import TextRange, Texts, decode_text, hash_files, hash_texts, hold_out_end, split_range


def text_range(path):
    return TextRange(path, 0, path.stat().st_size)


@pytest.fixture(params=["lines", "no line ends", "long characters"])
def text(request):
    return {
        "lines": "".join(f"line {i} with é and 漢字\n" for i in range(300)),
        "no line ends": "x" * 5000,
        "long characters": "漢\N{GRINNING FACE}" * 700,
    }[request.param]


def test_pieces_of_a_large_file_are_the_whole_text(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "PIECE_BYTES", 500)
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(text_range(path).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 4 and max(len(piece.text.encode()) for piece in pieces) < 1100
    assert [piece.opens for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.closes for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_parts_of_a_large_file_are_one_document(tmp_path, monkeypatch, text):
    monkeypatch.setattr(documents, "PIECE_BYTES", 300)
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    parts = split_range(text_range(path), 1000)
    pieces = [piece for part in parts for piece in part.pieces()]
    assert len(parts) > 3 and "".join(part.text() for part in parts) == text
    assert sum(piece.opens for piece in pieces) == sum(piece.closes for piece in pieces) == 1
    assert pieces[0].opens and pieces[-1].closes


def test_a_file_is_cut_where_lines_begin(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i}\n" for i in range(1000)))
    assert all(part.text().endswith("\n") for part in split_range(text_range(path), 100))


def test_line_ends_and_byte_order_mark_are_made_plain(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert text_range(path).text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"fine\nab\0c", "NUL byte at offset 7"),
        (b"fine\n\xff\xfe", "byte 0xff at offset 5"),
        (b"a\xc3", "0xc3 at offset 1"),
    ],
)
def test_what_is_no_text_is_refused_with_file_and_offset(tmp_path, raw, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"bad\.txt .*{message}") as error:
        text_range(path).text()
    assert "\n" not in str(error.value)


def test_offset_of_a_bad_byte_counts_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    path = tmp_path / "bad.txt"
    path.write_bytes(b"0123456789\n" * 50 + b"\xff")
    with pytest.raises(ValueError, match="offset 550"):
        text_range(path).text()
    with pytest.raises(ValueError, match="offset 4"):
        decode_text(b"\xef\xbb\xbfa\xff", path, 0)


@pytest.mark.parametrize(
    ("text", "border"),
    [
        ("word word\n" * 20 + "\n", "\n"),
        ("one two\n\nthree four\n\n" * 60, "\n\n"),
        ("ab " * 400, " "),
        ("漢" * 500, "漢"),
    ],
)
def test_end_of_a_single_file_is_held_out_at_a_border(tmp_path, text, border):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    train, val = hold_out_end(path, 0.1)
    assert train.text() + val.text() == text and train.text().endswith(border)
    assert 0.09 <= val.n_bytes / path.stat().st_size <= 0.16


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot read .*gone\.txt"):
        TextRange(tmp_path / "gone.txt", 0, 10).text()


def test_hash_depends_on_content_order_and_borders():
    hashes = {hash_texts(texts) for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""])}
    assert len(hashes) == 5 and hash_texts(iter(["ab", "c"])) in hashes


def test_hash_of_files_follows_the_content_not_the_time(tmp_path, monkeypatch):
    path, record = tmp_path / "a.txt", tmp_path / "record.json"
    path.write_text("one")
    first = hash_files([path], record)
    os.utime(path)
    assert hash_files([path], record) == first
    path.write_text("two")  # the same size, within the same tick of a coarse clock
    assert hash_files([path], record) != first


def test_unchanged_old_files_are_not_read_again(tmp_path, monkeypatch):
    path, record = tmp_path / "a.txt", tmp_path / "record.json"
    path.write_text("one")
    os.utime(path, (time.time() - 60, time.time() - 60))
    first = hash_files([path], record)
    monkeypatch.setattr(documents, "hash_file", lambda path: pytest.fail("read again"))
    assert hash_files([path], record) == first


def test_documents_in_memory_are_pieces():
    assert [tuple(piece) for piece in Texts(("a", "bc")).pieces()] == [("a", True, True), ("bc", True, True)]
    assert Texts(("a", "bc")).n_bytes == 3
