import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from litgpt import GPT, Config, registry
from litgpt.checkpoint.io import load_weights, save_torch
from litgpt.checkpoint.weight_maps import WeightMap
from litgpt.config import LlamaConfig, PythiaConfig, save_config
from litgpt.scripts import convert_lit_checkpoint as script
from litgpt.scripts.convert_lit_checkpoint import (
    check_conversion_supported,
    convert_lit_checkpoint,
    parse_size,
    qkv_reassemble,
)

SIZES = dict(n_layer=1, n_embd=32, n_head=4, intermediate_size=48, block_size=64, vocab_size=300, padded_vocab_size=320)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[[GPT], Path]:
    """Makes a litgpt folder of a model, as pretraining writes it."""

    def make(model: torch.nn.Module) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_tokenizer_dir / name).read_bytes())
        save_config(model.config, folder)
        weights = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        save_torch({"model": weights, "step": 3}, folder / "lit_model.pth")
        return folder

    return make


@pytest.mark.parametrize(
    ("kwargs", "files"),
    [
        ({}, {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "checksums.json",
              "tokenizer_config.json", "model_config.yaml"}),
        (dict(format="pth"), {"model.pth"}),
        (dict(format="gguf"), {"tiny-F16.gguf"}),
        (dict(format="gguf", gguf_type="bf16"), {"tiny-BF16.gguf"}),
    ],
)  # fmt: skip
def test_each_format_writes_its_files_and_no_other(
    checkpoint: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, kwargs: dict, files: set
) -> None:
    if kwargs.get("format") == "gguf":
        pytest.importorskip("gguf")
    convert_lit_checkpoint(checkpoint(GPT(LlamaConfig(name="tiny", **SIZES))), tmp_path / "out", **kwargs)
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    assert capsys.readouterr().out.startswith(str(tmp_path / "out"))


def test_published_call_with_two_folders_works(checkpoint: Callable, tmp_path: Path) -> None:
    model = GPT(PythiaConfig(name="tiny", **SIZES))
    convert_lit_checkpoint(checkpoint_dir=checkpoint(model), output_dir=tmp_path / "out")
    assert torch.equal(load_weights(tmp_path / "out")["embed_out.weight"], model.lm_head.weight)


def test_name_below_checkpoints_is_enough(
    checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(GPT(LlamaConfig(name="tiny", **SIZES)))
    (tmp_path / "checkpoints" / "org").mkdir(parents=True)
    folder.rename(tmp_path / "checkpoints" / "org" / "tiny")
    monkeypatch.chdir(tmp_path)
    convert_lit_checkpoint(Path("org/tiny"), Path("out"), dtype="bfloat16")
    assert load_weights("out")["lm_head.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (dict(format="onnx"), ValueError, "format 'onnx'"),
        (dict(gguf_type="q4"), ValueError, "gguf_type 'q4'"),
        (dict(dtype="int8"), ValueError, "dtype 'int8'"),
        (dict(dtype="float16", format="gguf"), ValueError, "takes `--gguf_type`"),
        (dict(max_shard_size="much"), ValueError, "max_shard_size 'much'"),
        (dict(checkpoint_dir=Path("nowhere")), FileNotFoundError, "nowhere is no folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    checkpoint: Callable, tmp_path: Path, kwargs: dict, error: type, match: str
) -> None:
    folder = checkpoint(GPT(LlamaConfig(name="tiny", **SIZES)))
    with pytest.raises(error, match=match):
        convert_lit_checkpoint(**{"checkpoint_dir": folder, "output_dir": tmp_path / "out", **kwargs})
    assert not (tmp_path / "out").exists()


def test_registered_model_with_own_parts_is_refused_in_one_line(checkpoint: Callable, tmp_path: Path) -> None:
    class Gated(GPT):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.gate = torch.nn.Parameter(torch.ones(3))

    class GatedConfig(LlamaConfig):
        pass

    spec = registry.register_model("gated", model=Gated, config=GatedConfig, sizes={})
    folder = checkpoint(Gated(spec.config(name="tiny", **SIZES)))
    with pytest.raises(ValueError, match=r"this gated model .*`gate`") as error, pytest.warns(UserWarning):
        convert_lit_checkpoint(folder, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_registered_model_without_own_parts_is_exported_with_a_warning(checkpoint: Callable, tmp_path: Path) -> None:
    class Other(GPT):
        pass

    class OtherConfig(LlamaConfig):
        pass

    spec = registry.register_model("other", model=Other, config=OtherConfig, sizes={})
    folder = checkpoint(Other(spec.config(name="tiny", **SIZES)))
    with pytest.warns(UserWarning, match="what Other computes in another way is lost"):
        convert_lit_checkpoint(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_weight_map_of_a_registered_model_names_its_state_dict(checkpoint: Callable, tmp_path: Path) -> None:
    class Mapped(GPT):
        pass

    class MappedConfig(LlamaConfig):
        pass

    block = {name: name.replace(".", "_") for name in ("norm_1", "norm_2", "attn.qkv", "attn.proj", "mlp.proj")}
    block |= {"mlp.fc_1": "mlp_gate", "mlp.fc_2": "mlp_up"}
    outer = {"transformer.wte": "tokens", "transformer.ln_f": "norm", "lm_head": "head"}
    table = WeightMap(outer=outer, block=block, layers="blocks.{}.")
    spec = registry.register_model("mapped", model=Mapped, config=MappedConfig, sizes={}, weight_map=table)
    model = Mapped(spec.config(name="tiny", **SIZES))
    folder = checkpoint(model)
    convert_lit_checkpoint(folder, tmp_path / "out", format="pth")
    weights = load_weights(tmp_path / "out" / "model.pth")
    assert torch.equal(weights["blocks.0.attn_qkv.weight"], model.transformer.h[0].attn.qkv.weight)
    assert torch.equal(weights["head.weight"], model.lm_head.weight)
    with pytest.raises(ValueError, match="--format pth"):
        convert_lit_checkpoint(folder, tmp_path / "hf")


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), (1000, 1000), ("7B", 7)]
)
def test_sizes_are_read_with_their_unit(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 XB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size above 0"):
        parse_size(text)


def test_published_check_tells_lora_from_adapters() -> None:
    check_conversion_supported({"lm_head.weight": 1})
    with pytest.raises(ValueError, match="merge"):
        check_conversion_supported({"transformer.h.0.attn.qkv.lora_A": 1})
    with pytest.raises(NotImplementedError, match="adapter"):
        check_conversion_supported({"transformer.h.2.attn.gating_factor": 1})


def test_qkv_reassemble_groups_the_rows() -> None:
    config = Config(n_layer=1, n_embd=8, n_head=4, n_query_groups=2, vocab_size=8, padded_vocab_size=8)  # hs = 2
    heads = {"q0": 0, "q1": 1, "q2": 2, "q3": 3, "k0": 4, "k1": 5, "v0": 6, "v1": 7}
    ours = torch.cat([torch.full((2, 8), float(i)) for i in heads.values()])
    theirs = qkv_reassemble(ours, config)
    order = ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]
    assert torch.equal(theirs, torch.cat([torch.full((2, 8), float(heads[name])) for name in order]))


@pytest.mark.parametrize(
    ("function", "config", "name"),
    [
        ("copy_weights_gpt_neox", PythiaConfig(**SIZES), "gpt_neox.layers.0.attention.query_key_value.weight"),
        ("copy_weights_llama", LlamaConfig(**SIZES), "model.layers.0.self_attn.v_proj.weight"),
    ],
)
def test_published_copy_functions_fill_a_state_dict(function: str, config: Config, name: str) -> None:
    weights, state_dict = GPT(config).state_dict(), {}
    getattr(script, function)(config, state_dict, weights)
    assert name in state_dict
    assert sum(t.numel() for t in state_dict.values()) == sum(t.numel() for t in weights.values())


def test_copy_without_the_head_and_through_a_saver() -> None:
    class Saver:
        def store_early(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + 1

    config = LlamaConfig(**SIZES)
    weights, state_dict = GPT(config).state_dict(), {}
    script.copy_weights_llama(config, state_dict, weights, untie_weights=True, saver=Saver())
    assert "lm_head.weight" not in state_dict
    assert torch.equal(state_dict["model.embed_tokens.weight"], weights["transformer.wte.weight"] + 1)


@pytest.mark.slow
def test_killed_export_leaves_nothing_that_looks_whole(checkpoint: Callable, tmp_path: Path) -> None:
    folder = checkpoint(GPT(LlamaConfig(name="tiny", **SIZES | dict(n_embd=256, n_layer=8))))
    code = (
        "import sys; from pathlib import Path;"
        "from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint;"
        "print('go', flush=True); convert_lit_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    out = tmp_path / "out"
    for milliseconds in (1, 5, 10, 20, 40, 80):
        process = subprocess.Popen([sys.executable, "-c", code, folder, out], stdout=subprocess.PIPE, env=os.environ)
        process.stdout.readline()
        try:
            process.wait(milliseconds / 1000)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        if out.exists():
            assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    convert_lit_checkpoint(folder, out)
    assert len(load_weights(out)) == 3 + 9 * 8
    assert not list(tmp_path.glob(".out*"))


def test_name_that_ends_in_gguf_is_the_file_itself(checkpoint: Callable, tmp_path: Path, capsys) -> None:
    pytest.importorskip("gguf")
    folder = checkpoint(GPT(LlamaConfig(name="tiny", **SIZES)))
    convert_lit_checkpoint(folder, tmp_path / "below" / "out.gguf", format="gguf")
    assert (tmp_path / "below" / "out.gguf").read_bytes()[:4] == b"GGUF"
    assert [file.name for file in (tmp_path / "below").iterdir()] == ["out.gguf"]
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'below' / 'out.gguf'}: a llama model")


@pytest.mark.parametrize("format", ["hf", "pth", "gguf"])
def test_file_in_the_place_of_the_folder_is_named(checkpoint: Callable, tmp_path: Path, format: str) -> None:
    pytest.importorskip("gguf")
    folder = checkpoint(GPT(LlamaConfig(name="tiny", **SIZES)))
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"file\.txt is a file: name a folder"):
        convert_lit_checkpoint(folder, tmp_path / "file.txt", format=format)
    assert (tmp_path / "file.txt").read_text() == "mine"


@pytest.mark.parametrize("format", ["pth", "gguf"])
def test_export_that_is_refused_leaves_no_folder(checkpoint: Callable, tmp_path: Path, format: str) -> None:
    pytest.importorskip("gguf")
    folder = checkpoint(GPT(PythiaConfig(name="tiny", **SIZES)))
    config = yaml.safe_load((folder / "model_config.yaml").read_text())
    if format == "pth":
        (folder / "model_config.yaml").write_text(yaml.safe_dump(config | {"n_layer": 3}))
    with pytest.raises(ValueError):
        convert_lit_checkpoint(folder, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
