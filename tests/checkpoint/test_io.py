import errno
import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt.checkpoint.io import (
    atomic_folder,
    check_crc,
    load_model_weights,
    load_torch,
    load_weights,
    save_torch,
    validate_checkpoint,
)
from litgpt.config import Config
from litgpt.model import GPT


class Hostile:
    """Runs a command when it is unpickled freely."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


class Tiny(nn.Module):
    def __init__(self, tied=False, width=4):
        super().__init__()
        self.wte = nn.Embedding(6, width)
        self.h = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.lm_head = nn.Linear(width, 6, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


@pytest.fixture
def payload():
    torch.manual_seed(0)
    return {
        "model": {"a": torch.randn(300, 100), "b": torch.arange(7)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]},
        "iter_num": 12,
        "name": "x",
    }


def assert_same(one, other):
    assert one["iter_num"] == other["iter_num"] and one["optimizer"] == other["optimizer"]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in other["model"])


# ---------------------------------------------------------------- torch files


def test_saved_payload_is_read_back_memory_mapped(tmp_path, payload):
    save_torch(payload, tmp_path / "x.pth")
    loaded = load_torch(tmp_path / "x.pth")
    assert_same(loaded, payload)
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path / "x.pth") in maps.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_old_torch_format_is_read_too(tmp_path, payload):
    torch.save(payload, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same(load_torch(tmp_path / "x.pth"), payload)
    check_crc(tmp_path / "x.pth")


@pytest.mark.parametrize("form", ["zip", "old torch", "plain pickle"])
def test_hostile_pickle_is_refused_and_never_run(tmp_path, form):
    path, witness = tmp_path / "x.pth", tmp_path / "witness"
    content = {"model": {"a": torch.ones(2), "b": Hostile(witness)}}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"b": Hostile(witness)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for load in (load_torch, load_weights):
        with pytest.raises(ValueError, match=r"x\.pth is refused: it asks for `\w+\.system`") as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert not witness.exists()


def test_compressed_record_is_refused(tmp_path, payload):
    torch.save(payload, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        load_torch(tmp_path / "bomb.pth")


def test_truncated_file_is_named_in_one_line(tmp_path, payload):
    save_torch(payload, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    for size in (0, 1, 4, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        (tmp_path / "cut.pth").write_bytes(content[:size])
        for read in (load_torch, load_weights, check_crc):
            with pytest.raises(ValueError, match=r"cut\.pth is cut off or damaged") as caught:
                read(tmp_path / "cut.pth")
            assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth is not there"):
        load_torch(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_torch(tmp_path)


def test_flipped_bits_are_found_or_harmless(tmp_path, payload):
    path = tmp_path / "x.pth"
    save_torch(payload, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: record for record in archive.infolist()}
    rng, found, places = random.Random(1), 0, 150
    for _ in range(places):
        place = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            check_crc(path)
        except ValueError:
            found += 1
        else:  # alignment bytes and the like, which nobody reads
            assert_same(load_torch(path), payload)
    assert found > 0.9 * places
    name, record = next((name, record) for name, record in records.items() if name.endswith("/data/0"))
    flipped = bytearray(content)
    flipped[record.header_offset + 5000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=rf"x\.pth is cut off or damaged .*`{name}`"):
        check_crc(path)


def test_damage_message_offers_another_checkpoint(tmp_path, payload):
    for step in (9, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
        save_torch(payload, tmp_path / f"step-{step:08d}" / "lit_model.pth")
    newest = tmp_path / "step-00000010" / "lit_model.pth"
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"another checkpoint is .*step-00000009"):
        load_torch(newest)


# ---------------------------------------------------------------- writing


class FullDisk(io.BufferedWriter):
    def __init__(self, file, free):
        super().__init__(file)
        self.free = free

    def write(self, data):
        self.free -= memoryview(data).nbytes
        if self.free < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("free", [0, 200, 60_000, 120_500])
def test_full_disk_names_path_and_bytes_and_keeps_the_previous_file(tmp_path, payload, monkeypatch, free):
    path = tmp_path / "x.pth"
    save_torch({"iter_num": 1}, path)

    def open_on_full_disk(name, mode="r", *args, **kwargs):
        file = open(name, mode, *args, **kwargs)  # noqa: SIM115
        return FullDisk(file.detach(), free) if mode == "wb" else file

    monkeypatch.setattr("litgpt.checkpoint.atomic.open", open_on_full_disk, raising=False)
    with pytest.raises(
        OSError, match=r"cannot write .*x\.pth: No space left on device \([\d,]+ bytes to write"
    ) as caught:
        save_torch(payload, path)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert "120,0" in str(caught.value)  # 300 * 100 floats
    with (
        pytest.raises(OSError, match=r"cannot write .*/final/lit_model\.pth: No space"),
        atomic_folder(tmp_path / "final") as folder,
    ):
        save_torch(payload, folder / "lit_model.pth")
    assert load_torch(path) == {"iter_num": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_folder_that_is_not_there_is_named(tmp_path, payload):
    with pytest.raises(OSError, match=r"cannot write .*none/x\.pth: No such file"):
        save_torch(payload, tmp_path / "none" / "x.pth")


def test_payload_that_could_not_be_read_back_is_refused_before_it_replaces_anything(tmp_path):
    path = tmp_path / "x.pth"
    save_torch({"iter_num": 1}, path)
    with pytest.raises(ValueError, match=r"x\.pth was not written: .*`random\.Random`"):
        save_torch({"rng": random.Random(1)}, path)
    assert load_torch(path) == {"iter_num": 1}


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("key", [None, "model"])
@pytest.mark.parametrize("at", ["file", "folder"])
def test_weights_are_found_flat_or_under_model_without_compile_prefix(tmp_path, key, at):
    weights = {"_orig_mod.lm_head.weight": torch.ones(2), "transformer.h.0._orig_mod.x": torch.zeros(1)}
    save_torch({key: weights, "optimizer": {}, "iter_num": 1} if key else weights, tmp_path / "lit_model.pth")
    loaded = load_weights(tmp_path / "lit_model.pth" if at == "file" else tmp_path)
    assert sorted(loaded) == ["lm_head.weight", "transformer.h.0.x"]


def test_file_without_tensors_holds_no_weights(tmp_path):
    save_torch({"model": {}, "iter_num": 3}, tmp_path / "lit_model.pth")
    with pytest.raises(ValueError, match="holds no model weights"):
        load_weights(tmp_path)


def write_shards(folder, weight_map):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_safetensors_are_read_alone_and_by_index(tmp_path):
    write_shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    loaded = load_weights(tmp_path)
    assert torch.equal(loaded["a"], torch.ones(2)) and torch.equal(loaded["b"], torch.zeros(3))
    assert list(load_weights(tmp_path / "model-1.safetensors")) == ["a"]


@pytest.mark.parametrize("target", ["../model-1.safetensors", "/etc/passwd", "sub/x.safetensors", "..", 3])
def test_index_that_points_elsewhere_is_refused(tmp_path, target):
    folder = tmp_path / "inner"
    folder.mkdir()
    write_shards(tmp_path, {})
    write_shards(folder, {"a": target})
    with pytest.raises(ValueError, match="points to"):
        load_weights(folder)


def test_index_with_missing_tensors_or_broken_json_is_refused(tmp_path):
    write_shards(tmp_path, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
    with pytest.raises(ValueError, match=r"shards lack \(c\)"):
        load_weights(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": ["a"]}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="weight_map"):
            load_weights(tmp_path)


def test_damaged_safetensors_are_named_in_one_line(tmp_path):
    for content in (b"", b"\xff" * 50, (2**40).to_bytes(8, "little") + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is cut off or damaged") as caught:
            load_weights(tmp_path)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- weights into a model


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("drop_head", [False, True])
def test_weights_load_on_cpu_and_meta_and_tied_ones_stay_tied(tmp_path, device, tied, drop_head):
    source = Tiny(tied)
    weights = source.state_dict()
    if drop_head:
        del weights["lm_head.weight"]
    save_torch(weights, tmp_path / "lit_model.pth")
    with torch.device(device):
        model = Tiny(tied)
    if drop_head and not tied:
        with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
            load_model_weights(model, tmp_path)
        return
    load_model_weights(model, tmp_path)
    assert (model.lm_head.weight is model.wte.weight) == tied
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name)) and parameter.requires_grad


def test_tied_model_never_takes_one_of_two_different_tensors_silently(tmp_path):
    save_torch(Tiny(tied=False).state_dict(), tmp_path / "lit_model.pth")
    with pytest.raises(
        ValueError, match=r"wte\.weight and lm_head\.weight differ in the file but are one in the model"
    ):
        load_model_weights(Tiny(tied=True), tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("form", ["tied", "without head", "untied", "old fused layout"])
def test_gpt_takes_tied_untied_and_old_checkpoints(tmp_path, device, form):
    torch.manual_seed(0)
    config = dict(n_layer=1, n_embd=8, n_head=2, block_size=8, vocab_size=16, padded_vocab_size=16)
    source = GPT(Config(**config, tie_embeddings=form in ("tied", "without head")))
    weights = source.state_dict()
    if form == "without head":
        del weights["lm_head.weight"]
    if form == "old fused layout":
        for kind in ("weight", "bias"):  # q, k and v of each head beside each other
            fused = weights.pop(f"transformer.h.0.attn.qkv.{kind}")
            heads = fused.view(3, 2, 4, *fused.shape[1:]).transpose(0, 1)
            weights[f"transformer.h.0.attn.attn.{kind}"] = heads.reshape(fused.shape).clone()
    save_torch({"model": weights}, tmp_path / "lit_model.pth")
    with torch.device(device):
        model = GPT(Config(**config, tie_embeddings=form != "old fused layout"))
    if form == "untied":
        with pytest.warns(UserWarning, match="untied"):
            load_model_weights(model, tmp_path)
    else:
        load_model_weights(model, tmp_path)
    assert (model.lm_head.weight is model.transformer.wte.weight) == (form in ("tied", "without head"))
    idx = torch.arange(6)[None]
    assert torch.equal(model(idx), source(idx))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_config_that_does_not_fit_its_weights_is_explained(tmp_path, device):
    save_torch(Tiny(width=4).state_dict(), tmp_path / "lit_model.pth")
    with torch.device(device):
        model = Tiny(width=5)
    with pytest.raises(ValueError, match=r"config does not fit its weights") as caught:
        load_model_weights(model, tmp_path)
    message = str(caught.value)
    assert "wte.weight (6, 4) in the file, (6, 5) in the model" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="wrong shape"):
        load_model_weights(model, tmp_path, strict=False)


def test_missing_and_unexpected_names_are_listed_shortly(tmp_path):
    save_torch({f"extra.{i}": torch.ones(1) for i in range(9)}, tmp_path / "lit_model.pth")
    with pytest.raises(ValueError, match=r"missing: wte\.weight, .*unexpected: extra\.0, .*extra\.5 and 3 more"):
        load_model_weights(Tiny(), tmp_path)
    load_model_weights(Tiny(), tmp_path, strict=False)


def test_validation_lists_what_does_not_fit_and_changes_nothing(tmp_path, capsys):
    weights = Tiny().state_dict()
    save_torch(weights, tmp_path / "lit_model.pth")
    with torch.device("meta"):
        model = Tiny()
    good = validate_checkpoint(tmp_path / "lit_model.pth", model)
    assert good.is_valid and "fits" in good.summary() and model.wte.weight.is_meta
    assert "fits" in capsys.readouterr().out
    weights["new"] = weights.pop("h.0.bias")
    weights["wte.weight"] = torch.ones(6, 3)
    save_torch(weights, tmp_path / "lit_model.pth")
    bad = validate_checkpoint(tmp_path / "lit_model.pth", model, verbose=False)
    assert (bad.is_valid, bad.missing_keys, bad.unexpected_keys) == (False, ["h.0.bias"], ["new"])
    assert len(bad.shape_mismatches) == 1 and "wte.weight" in bad.summary()
    (tmp_path / "lit_model.pth").write_bytes(b"")
    broken = validate_checkpoint(tmp_path / "lit_model.pth", model, verbose=False)
    assert not broken.is_valid and "damaged" in broken.errors[0]
