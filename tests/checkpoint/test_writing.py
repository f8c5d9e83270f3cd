import errno
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from litgpt.checkpoint.crc import check_crc
from litgpt.checkpoint.tensors import LazyTensor, open_weights, write_safetensors, write_torch
from litgpt.checkpoint.torch_file import save_torch


@pytest.fixture
def weights():
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    return {
        "wte": shared,
        "half": torch.randn(5).half(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "f8": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "u16": torch.tensor([1, 65535]).to(torch.uint16),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(2).double(),
        "head": shared,
    }


def lazily(weights):
    wrapped = {id(tensor): LazyTensor.of(tensor) for tensor in weights.values()}
    return {name: wrapped[id(tensor)] for name, tensor in weights.items()}


def assert_same(one, other):
    assert list(one) == list(other)
    for name, tensor in other.items():
        assert (one[name].dtype, one[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(one[name].double(), tensor.double()), name


@pytest.mark.parametrize("way", ["mapped", "copied"])
def test_torch_file_is_read_by_torch_with_right_sums_alignment_and_ties(tmp_path, weights, way):
    path = tmp_path / "x.pth"
    write_torch(path, lazily(weights))
    loaded = torch.load(path, weights_only=True, mmap=way == "mapped")
    assert_same(loaded, weights)
    assert loaded["wte"].data_ptr() == loaded["head"].data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = [record.filename for record in archive.infolist()]
        assert sum("/data/" in name for name in names) == len(weights) - 1
        for record in archive.infolist():
            header = path.read_bytes()[record.header_offset : record.header_offset + 30]
            sizes = [int.from_bytes(header[i : i + 2], "little") for i in (26, 28)]
            assert (record.header_offset + 30 + sum(sizes)) % 64 == 0, record.filename
    check_crc(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_large_records_are_read_by_torch(tmp_path, weights, monkeypatch):
    monkeypatch.setattr("litgpt.checkpoint.writing._ZIP64_FROM_BYTES", 1)
    write_torch(tmp_path / "x.pth", lazily(weights))
    for mapped in (True, False):
        assert_same(torch.load(tmp_path / "x.pth", weights_only=True, mmap=mapped), weights)
    check_crc(tmp_path / "x.pth")


def test_torch_file_without_tensors_is_read(tmp_path):
    write_torch(tmp_path / "x.pth", {})
    assert torch.load(tmp_path / "x.pth", weights_only=True) == {}


def test_safetensors_are_read_by_their_library_and_carry_the_format(tmp_path, weights):
    files = write_safetensors(tmp_path, lazily(weights))
    assert [file.name for file in files] == ["model.safetensors"]
    loaded = load_file(files[0])
    assert_same({name: loaded[name] for name in weights}, weights)
    n_header = int.from_bytes(files[0].read_bytes()[:8], "little")
    header = json.loads(files[0].read_bytes()[8 : 8 + n_header])
    assert header["__metadata__"] == {"format": "pt"} and n_header % 8 == 0
    assert all(header[name]["data_offsets"][0] % weights[name].element_size() == 0 for name in weights)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "checksums.json"}
    check_crc(files[0])


def test_safetensors_are_sharded_with_an_index(tmp_path):
    weights = {f"w{i}": torch.full((10,), float(i)) for i in range(5)} | {"large": torch.ones(100)}
    files = write_safetensors(tmp_path, lazily(weights), max_shard_bytes=85)
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 600} and list(index["weight_map"]) == list(weights)
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert_same({name: tensor.read() for name, tensor in open_weights(tmp_path).items()}, weights)
    check_crc(tmp_path / "model.safetensors.index.json")


def test_transformers_style_reader_takes_shards(tmp_path, weights):
    from safetensors import safe_open

    write_safetensors(tmp_path, lazily(weights), max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert torch.equal(opened.get_tensor(name).double(), weights[name].double())


def test_dtype_that_safetensors_lack_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"no dtype for `z`, a tensor of torch\.complex128"):
        write_safetensors(tmp_path, {"z": LazyTensor.of(torch.ones(2, dtype=torch.complex128))})
    assert not list(tmp_path.iterdir())


def test_disk_is_checked_before_anything_is_read(tmp_path, weights, monkeypatch):
    def read():
        raise AssertionError("read before the disk was checked")

    tensors = {name: LazyTensor((1000, 1000), torch.float32, read) for name in weights}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    for write, target in ((write_torch, tmp_path / "x.pth"), (write_safetensors, tmp_path)):
        with pytest.raises(OSError, match=r"No space left on device \(36,00[\d,]+ bytes to write, 2,000,000 bytes"):
            write(target, tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_good", [0, 1, 4])
def test_failure_in_the_middle_leaves_nothing(tmp_path, n_good):
    def read():
        raise OSError(errno.EIO, "Input/output error")

    bad = LazyTensor((10,), torch.float32, read)
    tensors = {f"w{i}": LazyTensor.of(torch.ones(10)) for i in range(n_good)} | {"bad": bad}
    save_torch({"old": 1}, tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    with pytest.raises(OSError, match=r"cannot write .*x\.pth: Input/output error"):
        write_torch(tmp_path / "x.pth", tensors)
    with pytest.raises(OSError, match=r"cannot write .*model.*\.safetensors: Input/output error"):
        write_safetensors(tmp_path, tensors, max_shard_bytes=80)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"] and (tmp_path / "x.pth").read_bytes() == before


FULL = """
import resource, signal, sys
import torch
from litgpt.checkpoint.tensors import LazyTensor, write_safetensors, write_torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
tensors = {f"w{i}": LazyTensor.of(torch.ones(20_000)) for i in range(10)}
try:
    write_torch(sys.argv[1] + "/x.pth", tensors) if sys.argv[2] == "torch" else write_safetensors(sys.argv[1], tensors)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a limit of the file size")
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_file_system_that_takes_no_more_leaves_nothing(tmp_path, kind):
    out = subprocess.run([sys.executable, "-c", FULL, tmp_path, kind], check=True, capture_output=True, text=True)
    assert "cannot write" in out.stdout and "File too large" in out.stdout and out.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_maps_that_give_too_few_values_are_caught(tmp_path):
    short = replace(LazyTensor.of(torch.ones(10)), pieces=lambda: iter([torch.ones(4)]))
    with pytest.raises(AssertionError):
        write_torch(tmp_path / "x.pth", {"short": short})
    assert not list(tmp_path.iterdir())
