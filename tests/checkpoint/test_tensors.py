import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from litgpt.checkpoint import lazy
from litgpt.checkpoint.tensors import files_of, open_weights, write_safetensors, write_torch
from litgpt.checkpoint.torch_file import save_torch


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {
        "a": torch.randn(30, 4),
        "b": torch.randn(5).bfloat16(),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
    }


def write(kind, weights, folder):
    names = list(weights)
    parts = [{name: weights[name] for name in names[:2]}, {name: weights[name] for name in names[2:]}]
    if kind == "pth":
        save_torch(weights, folder / "lit_model.pth")
    elif kind == "pth under model":
        save_torch({"model": {f"_orig_mod.{n}": t for n, t in weights.items()}, "step": 1}, folder / "lit_model.pth")
    elif kind == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "old bin":
        weights.pop("f8")  # that format has no such dtype
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        suffix = "bin" if "bin" in kind else "safetensors"
        stem = "pytorch_model" if suffix == "bin" else "model"
        files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        for file, part in zip(files, parts):
            (torch.save if suffix == "bin" else save_file)(part, folder / file)
        if "index" in kind:
            weight_map = {name: file for file, part in zip(files, parts) for name in part}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


KINDS = ["pth", "pth under model", "safetensors", "old bin", "index", "shards", "bin index", "bin shards"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read_whole_in_views_in_pieces_and_cast(tmp_path, weights, kind, monkeypatch):
    monkeypatch.setattr(lazy, "PIECE_BYTES", 64)
    write(kind, weights, tmp_path)
    tensors = open_weights(tmp_path)
    assert sorted(tensors) == sorted(weights)
    for name, tensor in weights.items():
        lazy_tensor = tensors[name]
        assert (lazy_tensor.shape, lazy_tensor.dtype) == (tuple(tensor.shape), tensor.dtype)
        as_float = tensor.double()
        for values in (lazy_tensor.read(), lazy_tensor.view(), lazy_tensor.to(torch.float64).read()):
            assert torch.equal(values.double(), as_float)
        pieces = [piece.clone() for piece in lazy_tensor.iter_pieces()]
        assert torch.equal(torch.cat([as_float.new_zeros(0), *(p.double() for p in pieces)]), as_float.reshape(-1))
    assert len(tensors["a"].read().double()) == 30


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_what_was_read_and_what_was_changed_in_a_view_never_reaches_the_file(tmp_path, weights, kind):
    write(kind, weights, tmp_path)
    tensors = open_weights(tmp_path)
    tensors["a"].view().zero_()
    tensors["a"].read().zero_()
    assert torch.equal(tensors["a"].read(), weights["a"])  # reading does not see the view either
    assert not tensors["a"].view().any() or kind == "safetensors"
    assert torch.equal(open_weights(tmp_path)["a"].view(), weights["a"])


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_changes_in_a_view_outlive_reading(tmp_path, weights, kind):
    write(kind, weights, tmp_path)
    tensor = open_weights(tmp_path)["a"]
    view = tensor.view()
    view.fill_(7)
    tensor.read()
    list(tensor.iter_pieces())
    assert (view == 7).all()


def test_names_of_one_tensor_share_one_object(tmp_path):
    embedding = torch.randn(4, 2)
    save_torch({"wte": embedding, "head": embedding, "other": embedding.clone()}, tmp_path / "lit_model.pth")
    tensors = open_weights(tmp_path)
    assert tensors["wte"] is tensors["head"] and tensors["wte"] is not tensors["other"]


def test_tensor_that_is_not_contiguous_is_read_by_its_values(tmp_path):
    save_torch({"t": torch.arange(6.0).view(2, 3).t()}, tmp_path / "lit_model.pth")
    tensor = open_weights(tmp_path)["t"]
    assert tensor.read().tolist() == [[0, 3], [1, 4], [2, 5]] and tensor.read().is_contiguous()
    write_torch(tmp_path / "again.pth", {"t": tensor})
    assert open_weights(tmp_path / "again.pth")["t"].read().tolist() == [[0, 3], [1, 4], [2, 5]]


def test_unaligned_safetensors_are_read_though_not_viewed(tmp_path):
    header = json.dumps({
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }).encode()  # fmt: skip
    values = torch.tensor([1.5, -2.0])
    content = len(header).to_bytes(8, "little") + header + b"\7" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    tensors = open_weights(tmp_path)
    assert tensors["x"].view is None or (8 + len(header) + 1) % 4 == 0
    assert torch.equal(tensors["x"].read(), values) and tensors["byte"].view().tolist() == [7]


def test_lacking_shards_are_counted_and_named(tmp_path, weights):
    for kind in ("index", "shards"):
        folder = tmp_path / kind
        folder.mkdir()
        write(kind, weights, folder)
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks 1 of .*2 .*model-00002-of-00002\.safetensors") as caught:
            open_weights(folder)
        assert "\n" not in str(caught.value)


def test_folder_without_weights_says_what_was_expected(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: expected lit_model\.pth, \*\.safetensors or"):
        open_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.* is not there"):
        open_weights(tmp_path / "none")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_lists_what_is_read(tmp_path, weights, kind):
    from litgpt.checkpoint.folders import find_weights_file

    write(kind, weights, tmp_path)
    assert sorted(files_of(find_weights_file(tmp_path))) == sorted(tmp_path.iterdir())


READ_ALL = """
import re, sys
import torch
from litgpt.checkpoint.tensors import open_weights

def resident(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

tensors = open_weights(sys.argv[1])
next(iter(tensors.values())).read()
before = resident("VmRSS")
for tensor in tensors.values():
    assert tensor.read().sum() != 0
    for piece in tensor.to(torch.float64).iter_pieces():
        assert piece.dtype == torch.float64
print(resident("VmRSS") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_reading_a_large_file_leaves_little_in_memory(tmp_path, kind):
    weights = {f"w{i}": torch.ones(1 << 20) for i in range(40)}  # 160 MB
    write(kind, weights, tmp_path)
    out = subprocess.run([sys.executable, "-c", READ_ALL, tmp_path], check=True, capture_output=True, text=True)
    assert float(out.stdout) < 80  # half of the file; what a heap keeps differs from run to run


def test_written_safetensors_are_opened_like_any_other(tmp_path, weights):
    write("pth", weights, tmp_path)
    (tmp_path / "st").mkdir()
    write_safetensors(tmp_path / "st", open_weights(tmp_path))
    tensors = open_weights(tmp_path / "st")
    assert all(torch.equal(tensors[name].view().double(), weights[name].double()) for name in weights)
