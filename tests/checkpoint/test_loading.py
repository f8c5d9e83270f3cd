import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litgpt.checkpoint.adapter import StateDictAdapter
from litgpt.checkpoint.hf_config import config_to_hf
from litgpt.checkpoint.lazy import OpenFile
from litgpt.checkpoint.loading import check_fit, load_model_weights, open_model_weights, validate_checkpoint
from litgpt.checkpoint.tensors import LazyTensor, open_weights, write_safetensors
from litgpt.checkpoint.torch_file import save_torch
from litgpt.checkpoint.weight_maps import WeightMap
from litgpt.config import Config
from litgpt.model import GPT

LLAMA = dict(
    name="tiny", n_layer=3, n_embd=32, n_head=4, n_query_groups=2, block_size=64, vocab_size=96, padded_vocab_size=96,
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    intermediate_size=48,
)  # fmt: skip


def write_hf(folder, model, model_type="llama", **options):
    """A Hugging Face folder with the weights of `model`."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, model_type)))
    ours = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    write_safetensors(folder, StateDictAdapter(model.config, model_type).to_hf(ours), **options)
    return folder


def build(config, device="cpu"):
    with torch.device(device):
        return GPT(config)


@pytest.fixture
def source():
    torch.manual_seed(0)
    return GPT(Config(**LLAMA))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("form", ["one file", "shards"])
def test_hf_folder_goes_straight_into_a_model(tmp_path, source, device, form):
    folder = write_hf(tmp_path / "hf", source, max_shard_bytes=20_000 if form == "shards" else 10**9)
    model = build(source.config, device)
    load_model_weights(model, folder)
    for name, parameter in source.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx), source(idx))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_only_computed_tensors_of_a_hf_folder_are_copied(tmp_path, source):
    folder = write_hf(tmp_path / "hf", source)
    tensors = open_model_weights(folder, source.config)
    computed = {name for name, tensor in tensors.items() if tensor.view is None}
    assert computed == {f"transformer.h.{i}.attn.qkv.weight" for i in range(3)}
    model = build(source.config, "meta")
    load_model_weights(model, folder)
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split()[0].split("-") for line in lines if str(folder) in line]
    for name, parameter in model.named_parameters():
        is_mapped = any(int(a, 16) <= parameter.data_ptr() < int(b, 16) for a, b in maps)
        assert is_mapped == (name not in computed), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", ["ours", "hf"])
def test_weights_are_cast_while_they_are_read(tmp_path, source, device, kind):
    if kind == "hf":
        folder = write_hf(tmp_path / "hf", source)
    else:
        folder = tmp_path
        save_torch(source.state_dict(), folder / "lit_model.pth")
    model = build(source.config, device)
    load_model_weights(model, folder, dtype=torch.bfloat16)
    for name, parameter in source.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(torch.bfloat16)), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("head", ["left out", "written"])
def test_tied_head_stays_tied_from_a_hf_folder(tmp_path, device, head):
    torch.manual_seed(0)
    source = GPT(Config(**LLAMA, tie_embeddings=True))
    folder = write_hf(tmp_path / "hf", source)
    if head == "written":
        tensors = open_weights(folder)
        write_safetensors(
            folder, {**tensors, "lm_head.weight": LazyTensor.of(tensors["model.embed_tokens.weight"].read())}
        )
    model = build(source.config, device)
    load_model_weights(model, folder)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_tied_head_is_cast_once(tmp_path, monkeypatch):
    source = GPT(Config(**LLAMA, tie_embeddings=True))
    save_torch(source.state_dict(), tmp_path / "lit_model.pth")
    shapes, fill = [], OpenFile.fill
    monkeypatch.setattr(OpenFile, "fill", lambda self, t, begin: shapes.append(t.numel()) or fill(self, t, begin))
    model = build(source.config, "meta")
    load_model_weights(model, tmp_path, dtype=torch.float16)
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.dtype == torch.float16
    assert shapes.count(96 * 32) == 1


def test_model_with_memory_of_its_own_reads_one_block_at_a_time(tmp_path, source, monkeypatch):
    save_torch(source.state_dict(), tmp_path / "lit_model.pth")
    groups = []
    load = GPT.load_state_dict

    def watch(self, state_dict, **options):
        groups.append(list(state_dict))
        return load(self, state_dict, **options)

    monkeypatch.setattr(GPT, "load_state_dict", watch)
    load_model_weights(build(source.config), tmp_path)
    assert sorted(name for group in groups for name in group) == sorted(source.state_dict())
    assert [{name.split(".")[2] for name in group if ".h." in name} for group in groups] == [set(), {"0"}, {"1"}, {"2"}]


def test_weights_in_mixed_dtypes_are_cast_to_one(tmp_path, source):
    weights = source.state_dict()
    odd = "transformer.h.1.mlp.fc_1.weight"
    weights[odd] = weights[odd].to(torch.float16)
    save_torch(weights, tmp_path / "lit_model.pth")
    model = build(source.config, "meta")
    load_model_weights(model, tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.get_parameter(odd), weights[odd].float())


def test_fused_weights_in_mixed_dtypes_lose_nothing(tmp_path, source):
    folder = write_hf(tmp_path / "hf", source)
    tensors = open_weights(folder)
    name = "model.layers.0.self_attn.k_proj.weight"
    write_safetensors(folder, {**tensors, name: tensors[name].to(torch.bfloat16)})
    model = build(source.config, "meta")
    load_model_weights(model, folder)
    qkv = model.transformer.h[0].attn.qkv.weight
    assert qkv.dtype == torch.float32 and torch.equal(qkv[:32], source.transformer.h[0].attn.qkv.weight[:32])


def test_names_of_another_family_are_explained_in_one_line(tmp_path, source):
    folder = write_hf(tmp_path / "hf", source)
    (folder / "config.json").unlink()
    tensors = open_weights(folder)
    names = {name: name.replace("mlp.gate_proj", "mlp.wrong_proj") for name in tensors}
    write_safetensors(folder, {names[name]: tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=r"hf do not fit the model: .*mlp\.wrong_proj") as caught:
        load_model_weights(build(source.config, "meta"), folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_size_are_explained_before_they_are_read(tmp_path, source):
    folder = write_hf(tmp_path / "hf", source)
    for other in (dict(n_layer=2), dict(n_layer=4), dict(n_embd=64), dict(intermediate_size=50)):
        with pytest.raises(ValueError, match=r"do not fit the model") as caught:
            load_model_weights(build(Config(**{**LLAMA, **other}), "meta"), folder)
        assert "\n" not in str(caught.value)


def test_half_of_the_shards_is_an_error_that_names_the_rest(tmp_path, source):
    folder = write_hf(tmp_path / "hf", source, max_shard_bytes=20_000)
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards[::2]:
        shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {len(shards[::2])} of the {len(shards)} files .*00001-of-"):
        load_model_weights(build(source.config, "meta"), folder)


def test_own_model_with_names_of_hugging_face_is_left_alone(tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config(**LLAMA)
            self.model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(4, 2)})

    source, target = Own(), Own()
    save_torch(source.state_dict(), tmp_path / "lit_model.pth")
    load_model_weights(target, tmp_path)
    assert torch.equal(target.model["embed_tokens"].weight, source.model["embed_tokens"].weight)


def test_validation_reads_a_hf_folder_and_no_values(tmp_path, source, monkeypatch):
    folder = write_hf(tmp_path / "hf", source)

    def refuse(*args):
        raise AssertionError("values were read")

    monkeypatch.setattr("litgpt.checkpoint.lazy.OpenFile.fill", refuse)
    assert validate_checkpoint(folder, build(source.config, "meta"), verbose=False).is_valid
    smaller = build(Config(**{**LLAMA, "n_layer": 2}), "meta")
    result = validate_checkpoint(folder, smaller, verbose=False)
    assert not result.is_valid and "layers.2." in result.errors[0]


def test_fit_of_lazy_tensors_is_checked_by_name_and_shape(source):
    tensors = {name: LazyTensor.of(tensor) for name, tensor in source.state_dict().items()}
    check_fit(source, tensors, "x")
    tensors["lm_head.weight"] = replace(tensors["lm_head.weight"], shape=(95, 32))
    with pytest.raises(ValueError, match=r"lm_head\.weight \(95, 32\) in the file, \(96, 32\) in the model"):
        check_fit(source, tensors, "x")


def test_litgpt_weights_come_before_those_of_hugging_face_in_one_folder(tmp_path, source):
    folder = write_hf(tmp_path / "hf", source)
    other = GPT(source.config)
    save_torch(other.state_dict(), folder / "lit_model.pth")
    model = build(source.config, "meta")
    load_model_weights(model, folder)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    load_model_weights(model := build(source.config, "meta"), folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    shutil.rmtree(folder)  # the model keeps its pages
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


class Gated(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.gate = torch.nn.Linear(config.n_embd, 1)


GATED_MAP = WeightMap(
    outer={"transformer.wte": "tokens", "transformer.ln_f": "norm", "lm_head": "head", "gate": "gate"},
    block={"norm_1": "n1", "norm_2": "n2", "attn.qkv": "qkv", "attn.proj": "out", "mlp.fc_1": "up", "mlp.fc_2": "down",
           "mlp.proj": "last"},
    layers="blocks.{}.",
)  # fmt: skip


@pytest.mark.parametrize("names", ["its own", "ours"])
def test_weight_map_of_a_registered_model_is_read(tmp_path, names):
    model = Gated(Config(**LLAMA))
    ours = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    theirs = StateDictAdapter(model.config, GATED_MAP, shapes).to_hf(ours)
    assert "blocks.0.qkv.weight" in theirs and "gate.bias" in theirs
    write_safetensors(tmp_path, theirs if names == "its own" else ours)
    for other in (Gated(Config(**LLAMA)), Gated(Config(**LLAMA)).to("meta")):
        load_model_weights(other, tmp_path, weight_map=GATED_MAP)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))
    opened = open_model_weights(tmp_path, model.config, weight_map=GATED_MAP, shapes=shapes)
    assert opened.keys() == ours.keys()
