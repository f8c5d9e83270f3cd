import json
import random
import shutil

import pytest
import torch

from litgpt.checkpoint.crc import check_crc, has_checksums
from litgpt.checkpoint.folders import find_resume_path
from litgpt.checkpoint.tensors import LazyTensor, write_safetensors, write_torch
from litgpt.checkpoint.torch_file import load_torch, save_torch

WEIGHTS = {"a": torch.randn(300, 100), "b": torch.arange(7), "c": torch.randn(3).bfloat16()}


def flip(path, place, bit):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ 1 << bit
        file.seek(place)
        file.write(bytes([byte]))


def write(kind, folder):
    tensors = {name: LazyTensor.of(tensor) for name, tensor in WEIGHTS.items()}
    if kind == "saved":
        save_torch({"model": WEIGHTS, "optimizer": {"lr": 0.1}, "iter_num": 3}, folder / "lit_model.pth")
    elif kind == "streamed":
        write_torch(folder / "lit_model.pth", tensors)
    elif kind == "safetensors":
        return write_safetensors(folder, tensors)[0]
    else:
        write_safetensors(folder, tensors, max_shard_bytes=1000)
        return folder / "model.safetensors.index.json"
    return folder / "lit_model.pth"


@pytest.mark.parametrize("kind", ["saved", "streamed", "safetensors", "shards"])
def test_one_flipped_bit_is_found_wherever_it_is(tmp_path, kind):
    path = write(kind, tmp_path)
    check_crc(path)
    assert has_checksums(path)
    rng = random.Random(7)
    files = [file for file in tmp_path.iterdir() if file.name != "checksums.json"]
    for _ in range(60):
        file = rng.choice(files)
        # every third one near the start or the end, where the bookkeeping of the format stands
        n, near = file.stat().st_size, rng.randrange(6)
        place = rng.randrange(min(n, 600)) if near == 0 else n - 1 - rng.randrange(min(n, 600)) if near == 1 else None
        place, bit = rng.randrange(n) if place is None else place, rng.randrange(8)
        flip(file, place, bit)
        with pytest.raises(ValueError, match=r"is cut off or damaged") as caught:
            check_crc(path)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value), (file, place, bit)
        flip(file, place, bit)
    check_crc(path)


def test_every_single_bit_of_a_small_torch_file_counts(tmp_path):
    path = tmp_path / "lit_model.pth"
    write_torch(path, {"x": LazyTensor.of(torch.ones(2))})
    for place in range(path.stat().st_size):
        flip(path, place, place % 8)
        with pytest.raises(ValueError, match=r"lit_model\.pth is cut off or damaged"):
            check_crc(path)
        flip(path, place, place % 8)
    check_crc(path)


def test_torch_files_of_others_are_checked_record_by_record(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(WEIGHTS, path)
    check_crc(path)
    flip(path, path.read_bytes().index(WEIGHTS["a"].numpy().tobytes()) + 999, 3)
    with pytest.raises(ValueError, match=r"checksum of its record `.*data/0`"):
        check_crc(path)


def test_resume_finds_the_flipped_bit_of_the_newest_checkpoint_and_names_the_older(tmp_path):
    for step in (1, 2):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        newest = write("saved", folder)
    rng = random.Random(3)
    for _ in range(50):
        place = rng.randrange(newest.stat().st_size)
        flip(newest, place, 5)
        with pytest.raises(ValueError, match=r"step-00000002.*damaged.*another checkpoint is .*step-00000001"):
            found = find_resume_path("auto", tmp_path)
            if "step-00000001" in str(found):  # the end of the file is no longer one, so it is passed over
                raise ValueError(f"{newest} is damaged; another checkpoint is {found}")
            check_crc(found)
        flip(newest, place, 5)


def test_sealed_file_cut_anywhere_is_not_complete(tmp_path):
    path = write("saved", tmp_path)
    content = path.read_bytes()
    for n_lacking in (1, 5, 21, 22, 23, 40, 1000):
        path.write_bytes(content[:-n_lacking])
        with pytest.raises(ValueError, match="cut off or damaged"):
            load_torch(path)


def test_safetensors_without_a_list_pass_and_with_another_list_do_not(tmp_path):
    path = write("safetensors", tmp_path)
    sums = tmp_path / "checksums.json"
    content = sums.read_text()
    sums.unlink()
    check_crc(path)
    assert not has_checksums(path)
    for text, match in (
        ("{", r"checksums\.json is cut off or damaged"),
        (json.dumps({"files": {"other.safetensors": {"bytes": 1, "crc32": "0"}}}), "lists only other"),
        (content.replace('"bytes": ', '"bytes": 9'), r"model\.safetensors .*differs from checksums\.json"),
    ):
        sums.write_text(text)
        with pytest.raises(ValueError, match=match):
            check_crc(path)


def test_lacking_or_replaced_shard_is_named(tmp_path):
    index = write("shards", tmp_path)
    one, two = sorted(tmp_path.glob("*.safetensors"))[:2]
    shutil.copy(one, two)
    with pytest.raises(ValueError, match=two.name):
        check_crc(index)
    two.unlink()
    with pytest.raises(FileNotFoundError, match=two.name):
        check_crc(index)
