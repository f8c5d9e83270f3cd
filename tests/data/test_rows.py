import gzip
import json

import pytest

from litgpt.data.rows import SUFFIXES, Rows, find_splits, read_files, read_rows

ROWS = [{"instruction": 'a, "b"\nc', "output": "é 🦙"}, {"instruction": "d", "output": "e"}]
CSV = 'instruction,output\n"a, ""b""\nc",é 🦙\nd,e\n'


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_jsonl(rows):
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, ensure_ascii=False, indent=2)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.jsonl", as_jsonl(ROWS)),
        ("a.ndjson", "\n" + as_jsonl(ROWS) + "\r\n\n"),
        ("a.csv", CSV),
        ("a.CSV", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("a.tsv", 'instruction\toutput\n"a, ""b""\nc"\té 🦙\nd\te\n'),
    ],
)
def test_every_text_format_gives_the_same_rows(name, content, tmp_path):
    assert read_rows(written(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.json", json.dumps(ROWS), ["sample 1", "sample 2"]),
        ("a.jsonl", "\n" + as_jsonl(ROWS[:1]) + "\n\n" + as_jsonl(ROWS[1:]), ["line 2", "line 4"]),
        ("a.csv", "\n" + CSV, ["line 3", "line 5"]),
    ],
)
def test_rows_know_where_they_stood(name, content, places, tmp_path):
    path = written(tmp_path / name, content)
    rows = read_rows(path)
    assert [rows.place(n) for n in range(2)] == [f"{path}, {place}" for place in places]
    both = read_files([path, path])
    assert both == ROWS * 2 and both.place(3) == rows.place(1) and both.place(4) == "sample 1"


BAD = [
    ("a.json", "", "is empty"),
    ("a.json", "[]", "holds no sample"),
    ("a.jsonl", "\n \n", "holds no sample"),
    ("a.csv", "instruction,output\n", "holds no sample"),
    ("a.json", as_jsonl(ROWS), r"not valid JSON \(Extra data\).*rename it to a\.jsonl"),
    ("a.jsonl", json.dumps(ROWS), r"is not JSONL as its name says, but a JSON list: rename it to a\.json$"),
    ("a.json", json.dumps({"a": 1}), "holds one object with the keys a; expected a list"),
    ("a.json", "3", "holds a int"),
    ("a.json", '[{"a": 1}, 2]', r"sample 2: is a int; expected an object"),
    ("a.json", '[\n{"a": 1},\n{"a": }]', "line 3: not valid JSON"),
    ("a.json", "[" * 100_000, "not valid JSON|nested too deeply"),
    ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
    ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: is a list; expected an object"),
    ("a.json", b'[{"a": "\xff"}]', "not UTF-8 text: byte 0xff at offset 8"),
    ("a.json", gzip.compress(b"[]"), "is not JSON as its name says, but a gzip archive: unpack or convert it"),
    ("a.csv", b"PAR1....", r"is not CSV as its name says, but parquet: rename it to a\.parquet"),
    ("a.parquet", CSV, "is not PARQUET as its name says, but plain text"),
    ("a.parquet", json.dumps(ROWS), r"but a JSON list: rename it to a\.json"),
    ("a.json", "<!DOCTYPE html><html>404", "but an HTML or XML page"),
    ("a.csv", b"\x80\x04\x95", "but a Python pickle"),
    ("a.json", b"\0\1\2", "but binary data"),
    ("a.csv", "a,b\n1,2,3\n", "line 2: has 3 cells; the first line names 2 columns"),
    ("a.csv", 'a,b\n1,"2\n', "not valid CSV"),
    ("a.txt", "x", r"the ending '\.txt' is not known; expected \.json"),
    ("a", "x", r"the ending '\(none\)' is not known"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_file_is_named_in_one_line(name, content, message, tmp_path):
    path = written(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.json does not exist"):
        read_rows(tmp_path / "b.json")


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".parquet"])
@pytest.mark.parametrize("val", ["val", "validation", "test", None])
def test_folder_with_files_of_both_splits(suffix, val, tmp_path):
    for name in ("train", val):
        if name:
            written(tmp_path / f"{name}{suffix}", "x")
    written(tmp_path / "notes.json", "x")
    expected = {"train": [tmp_path / f"train{suffix}"]}
    assert find_splits(tmp_path) == expected | ({"val": [tmp_path / f"{val}{suffix}"]} if val else {})


def test_folder_of_a_hub_repo_has_its_files_in_order(tmp_path):
    names = [f"data/train_sft-0000{n}-of-00002.parquet" for n in range(2)] + ["data/test_sft-00000-of-00001.parquet"]
    for name in names:
        written(tmp_path / name, "x")
    paths = [tmp_path / name for name in names]
    assert find_splits(tmp_path) == {"train": paths[:2], "val": paths[2:]}


def test_folder_without_training_data_is_refused(tmp_path):
    written(tmp_path / "val.json", "x")
    with pytest.raises(FileNotFoundError, match=r"no training data in .*: expected train\.json"):
        find_splits(tmp_path)


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "gone.arrow"])
def test_state_of_a_saved_data_set_cannot_point_outside(name, tmp_path):
    written(tmp_path / "state.json", json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"outside of its folder|lacks gone"):
        find_splits(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"need pyarrow: run `pip install 'litgpt\[data\]'`"):
        read_rows(written(tmp_path / "a.parquet", b"PAR1"))


def test_parquet_with_nested_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": None}], "n": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_rows(tmp_path / "a.parquet")
    assert found == rows and found.place(0).endswith("a.parquet, row 1")
    written(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet is damaged"):
        read_rows(tmp_path / "b.parquet")


def test_saved_data_set_in_arrow_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    for split, rows in (("train", ROWS), ("validation", ROWS[:1])):
        folder = tmp_path / split
        written(folder / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        table = pa.Table.from_pylist(rows)
        path = str(folder / "data-00000-of-00001.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    splits = find_splits(tmp_path)
    assert read_files(splits["train"]) == ROWS and read_files(splits["val"]) == ROWS[:1]
    assert find_splits(tmp_path / "train") == {"train": splits["train"]}


def test_what_the_datasets_package_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")

    def dataset(rows):
        table = datasets.table.InMemoryTable(pa.Table.from_pylist(rows))
        return datasets.Dataset(table, fingerprint=f"rows{len(rows)}")  # or it pickles classes of pyarrow

    data = datasets.DatasetDict({"train": dataset(ROWS), "test": dataset(ROWS[:1])})
    data.save_to_disk(str(tmp_path / "both"))
    data["train"].save_to_disk(str(tmp_path / "one"))
    splits = find_splits(tmp_path / "both")
    assert read_files(splits["train"]) == ROWS and read_files(splits["val"]) == ROWS[:1]
    assert read_files(find_splits(tmp_path / "one")["train"]) == ROWS


def test_rows_without_spans_are_counted():
    assert Rows([{}]).place(0) == "sample 1"
