import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from litgpt.checkpoint.adapter import StateDictAdapter
from litgpt.checkpoint.atomic import remove_leftovers
from litgpt.checkpoint.crc import check_crc
from litgpt.checkpoint.hf_config import config_to_hf
from litgpt.checkpoint.loading import load_model_weights
from litgpt.checkpoint.tensors import LazyTensor, open_weights, write_safetensors
from litgpt.checkpoint.torch_file import load_torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.registry import load_checkpoint_config
from litgpt.scripts import convert_hf_checkpoint as convert_hf
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint, layer_template, load_param, qkv_reassemble

SIZES = dict(n_layer=2, n_embd=32, n_head=4, block_size=64, vocab_size=96, padded_vocab_size=96)
LLAMA = dict(
    SIZES, n_query_groups=2, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP", intermediate_size=48,
)  # fmt: skip
FAMILIES = {"llama": LLAMA, "gpt_neox": SIZES, "tied": dict(LLAMA, tie_embeddings=True)}


def write_hf(folder, family="llama", form="safetensors", **fields):
    """A Hugging Face folder of a random model, which is given back."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    model = GPT(Config(**FAMILIES[family] | fields))
    model_type = "llama" if family == "tied" else family
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, model_type)))
    ours = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    tensors = StateDictAdapter(model.config, model_type).to_hf(ours)
    if form == "bin":
        torch.save({name: tensor.read() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    else:
        write_safetensors(folder, tensors, max_shard_bytes=20_000 if form == "shards" else 10**9)
    return model


def assert_is_converted(folder, model):
    _, config = load_checkpoint_config(folder)
    assert (folder / "model_config.yaml").is_file()
    check_crc(folder / "lit_model.pth")
    loaded = GPT(config)
    load_model_weights(loaded, folder / "lit_model.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_folder_is_converted_beside_its_source(tmp_path, family, form, capsys):
    folder = tmp_path / "hf"
    model = write_hf(folder, family, form)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert_hf_checkpoint(folder)
    assert_is_converted(folder, model)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() - before.keys() == {"lit_model.pth", "model_config.yaml"}
    assert all(after[name] == content for name, content in before.items())
    assert "lit_model.pth" in capsys.readouterr().out
    if family == "tied":
        assert len(after["lit_model.pth"]) < sum(p.numel() * 4 for p in model.parameters()) + 20_000


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_source_is_removed_only_on_demand(tmp_path, form):
    folder = tmp_path / "hf"
    model = write_hf(folder, form=form)
    convert_hf_checkpoint(folder, delete_source=True)
    assert_is_converted(folder, model)
    assert {path.name for path in folder.iterdir()} == {"config.json", "lit_model.pth", "model_config.yaml"}


def test_deletion_that_was_cut_short_is_finished(tmp_path):
    folder = tmp_path / "hf"
    model = write_hf(folder, form="shards")
    convert_hf_checkpoint(folder)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the {len(shards)} files"):
        convert_hf_checkpoint(folder)
    convert_hf_checkpoint(folder, delete_source=True)
    assert_is_converted(folder, model)
    assert {path.name for path in folder.iterdir()} == {"config.json", "lit_model.pth", "model_config.yaml"}


def test_source_stays_if_the_new_file_is_damaged(tmp_path, monkeypatch):
    folder = tmp_path / "hf"
    write_hf(folder)

    def damage(path):
        raise ValueError(f"{path} is cut off or damaged (test)")

    monkeypatch.setattr("litgpt.scripts.convert_hf_checkpoint.check_crc", damage)
    with pytest.raises(ValueError, match="damaged"):
        convert_hf_checkpoint(folder, delete_source=True)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "torch.float64"])
def test_weights_are_cast(tmp_path, dtype):
    folder = tmp_path / "hf"
    model = write_hf(folder)
    convert_hf_checkpoint(folder, dtype=dtype)
    wanted = getattr(torch, dtype.removeprefix("torch."))
    for name, tensor in load_torch(folder / "lit_model.pth").items():
        assert torch.equal(tensor, model.state_dict()[name].to(wanted)), name
    with pytest.raises(ValueError, match=r"dtype 'int8' is not known: choose float32"):
        convert_hf_checkpoint(folder, dtype="int8")


def test_model_name_decides_where_there_is_no_config_json(tmp_path):
    write_hf(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="hf"):
        convert_hf_checkpoint(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"'pythia-14n' is not a supported config name.*pythia-14m"):
        convert_hf_checkpoint(tmp_path / "hf", model_name="pythia-14n")
    with pytest.raises(ValueError, match="do not fit"):
        convert_hf_checkpoint(tmp_path / "hf", model_name="pythia-14m")
    assert not (tmp_path / "hf" / "lit_model.pth").exists() and not (tmp_path / "hf" / "model_config.yaml").exists()


def test_folder_below_checkpoints_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "org").mkdir(parents=True)
    model = write_hf(tmp_path / "checkpoints" / "org" / "name")
    convert_hf_checkpoint(Path("org/name"))
    assert_is_converted(tmp_path / "checkpoints" / "org" / "name", model)


def test_debug_mode_prints_each_tensor(tmp_path, capsys):
    model = write_hf(tmp_path / "hf")
    convert_hf_checkpoint(tmp_path / "hf", debug_mode=True)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name}: ") for line in lines) for name in model.state_dict())


def test_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write_hf(tmp_path / "hf")
    before = sorted(path.name for path in (tmp_path / "hf").iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match=r"cannot write .*lit_model\.pth: No space left .* to write, 50,000 bytes free"):
        convert_hf_checkpoint(tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == before


def test_lit_model_that_is_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    for name in ("lit_model.pth", "model_config.yaml"):
        model = write_hf(tmp_path / "hf")
        (tmp_path / "hf" / name).unlink(missing_ok=True)
        (tmp_path / "hf" / name).symlink_to(tmp_path / "precious")
        if name == "model_config.yaml":
            with pytest.raises(ValueError, match="model_config"):  # what it points to is no config
                convert_hf_checkpoint(tmp_path / "hf")
        else:
            convert_hf_checkpoint(tmp_path / "hf")
            assert_is_converted(tmp_path / "hf", model)
        assert (tmp_path / "precious").read_text() == "x"


def kill_rounds(folder, model, n_rounds, seed, seconds):
    """A child converts over and over; it is killed at random moments, and then the folder has to be sound."""
    rng, n_seen, n_interrupted = random.Random(seed), 0, 0
    target = folder / "lit_model.pth"
    for _ in range(n_rounds):
        if rng.random() < 0.5:
            target.unlink(missing_ok=True)
        if (child := os.fork()) == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                while True:
                    convert_hf_checkpoint(folder)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        n_interrupted += any(path.name.startswith(".") for path in folder.iterdir())
        if target.exists():
            n_seen += 1
            assert_is_converted(folder, model)
        load_model_weights(GPT(model.config), folder / "model.safetensors")
    convert_hf_checkpoint(folder)
    assert_is_converted(folder, model)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return n_seen, n_interrupted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("n_rounds", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_no_half_conversion(tmp_path, n_rounds):
    model = write_hf(tmp_path / "hf", n_embd=256, intermediate_size=700, n_layer=4)
    convert_hf_checkpoint(tmp_path / "hf")
    start = time.perf_counter()
    convert_hf_checkpoint(tmp_path / "hf")
    seconds = 3 * (time.perf_counter() - start)
    n_seen, n_interrupted = kill_rounds(tmp_path / "hf", model, n_rounds, seed=n_rounds, seconds=seconds)
    assert n_seen >= n_rounds / 10 and n_interrupted >= n_rounds / 10, (n_seen, n_interrupted)


def slow_unlink(path, missing_ok=False):
    time.sleep(0.02)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_while_the_source_is_deleted_loses_nothing(tmp_path):
    rng, n_deleting = random.Random(5), 0
    for n in range(12):
        folder = tmp_path / str(n)
        model = write_hf(folder, form="shards")
        n_shards = len(list(folder.glob("*.safetensors")))
        if (child := os.fork()) == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                Path.unlink = slow_unlink
                convert_hf_checkpoint(folder, delete_source=True)
            finally:
                os._exit(0)
        while not (folder / "lit_model.pth").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.02 * (n_shards + 3)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = len(list(folder.glob("*.safetensors")))
        n_deleting += 0 < left < n_shards
        remove_leftovers(folder)
        assert_is_converted(folder, model)
        if (folder / "model.safetensors.index.json").exists():
            convert_hf_checkpoint(folder, delete_source=True)
        assert {path.name for path in folder.iterdir()} <= {
            "config.json", "lit_model.pth", "model_config.yaml", "checksums.json",
        }  # fmt: skip
        assert_is_converted(folder, model)
    assert n_deleting > 0


CONVERT = """
import re, sys
from pathlib import Path
from litgpt.scripts import convert_hf_checkpoint as convert_hf
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
convert_hf_checkpoint(Path(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")
before = Path("/proc/self/status").read_text()
convert_hf_checkpoint(Path(sys.argv[2]))
after = Path("/proc/self/status").read_text()
print((int(re.search(r"VmHWM:\\s+(\\d+)", after)[1]) - int(re.search(r"VmRSS:\\s+(\\d+)", before)[1])) / 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_conversion_is_far_below_the_weights(tmp_path):
    write_hf(tmp_path / "warm")
    folder = tmp_path / "hf"
    folder.mkdir()
    config = Config(
        **LLAMA | dict(n_embd=1024, intermediate_size=2816, n_layer=4, vocab_size=32000, padded_vocab_size=32000)
    )
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "llama")))
    shapes = StateDictAdapter(config, "llama").hf_shapes()
    write_safetensors(folder, {n: LazyTensor(s, torch.float32, lambda s=s: torch.ones(s)) for n, s in shapes.items()})
    weights_mb = (folder / "model.safetensors").stat().st_size / 2**20
    command = [sys.executable, "-c", CONVERT, tmp_path / "warm", folder]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak_mb = float(out.splitlines()[-1])
    assert weights_mb > 400 and peak_mb < 60, (weights_mb, peak_mb)
    assert all((tensor.view() == 1).all() for tensor in open_weights(folder / "lit_model.pth").values())


# ---------------------------------------------------------------- published functions


def test_grouped_projection_comes_apart_into_queries_keys_and_values():
    config = Config(**SIZES, n_query_groups=2)
    q, k, v = torch.randn(4, 8, 32), torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    grouped = torch.cat([torch.cat([q[2 * g : 2 * g + 2].flatten(0, 1), k[g], v[g]]) for g in range(2)])
    for form in (grouped, LazyTensor.of(grouped)):
        parts = qkv_reassemble(form, config)
        assert all(torch.equal(part, whole.flatten(0, 1)) for part, whole in zip(parts, (q, k, v)))
    assert [part.shape for part in qkv_reassemble(grouped[:, 0], config)] == [(32,), (16,), (16,)]


@pytest.mark.parametrize(
    ("name", "n", "wanted"),
    [
        ("model.layers.3.mlp.up_proj.weight", 1, ("model.layers.{}.mlp.up_proj.weight", 3)),
        ("model.layers.12.mlp.experts.7.w1.weight", 2, ("model.layers.{}.mlp.experts.{}.w1.weight", 12, 7)),
        ("model.layers.12.mlp.experts.7.w1.weight", 1, ("model.layers.{}.mlp.experts.7.w1.weight", 12)),
        ("lm_head.weight", 1, ("lm_head.weight", -1)),
    ],
)
def test_numbers_in_names_become_templates(name, n, wanted):
    assert layer_template(name, n) == wanted


def test_parameter_is_read_and_cast(capsys):
    tensor = torch.randn(3)
    assert load_param(tensor, "x", None) is tensor
    assert torch.equal(load_param(LazyTensor.of(tensor), "x", torch.float16, verbose=True), tensor.half())
    assert "x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "family", "order"),
    [
        ("copy_weights_gpt_neox", "gpt_neox", ("config", "out", "hf")),
        ("copy_weights_hf_llama", "llama", ("config", "qkv", "out", "hf")),
        ("copy_weights_qwen_2_5", "llama", ("config", "qkv", "out", "hf")),
        ("copy_weights_gemma_2", "llama", ("qkv", "out", "hf")),
    ],
)
def test_published_copy_functions_fill_a_state_dict(tmp_path, function, family, order):
    fields = {}
    if "gemma" in function:
        fields = dict(post_attention_norm=True, post_mlp_norm=True, tie_embeddings=True, mlp_class_name="GemmaMLP")
    if "qwen" in function:
        fields = dict(attn_bias=True)
    torch.manual_seed(0)
    model = GPT(Config(**FAMILIES[family] | fields))
    model_type = {"copy_weights_gemma_2": "gemma2", "copy_weights_qwen_2_5": "qwen2"}.get(function, family)
    ours = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    hf = {name: tensor.read() for name, tensor in StateDictAdapter(model.config, model_type).to_hf(ours).items()}
    out: dict = {}
    given = {"config": model.config, "qkv": {}, "out": out, "hf": hf}
    options = {} if "config" in order else {"config": model.config}
    getattr(convert_hf, function)(*(given[name] for name in order), dtype=torch.float64, **options)
    wanted = {name for name in model.state_dict() if name != "lm_head.weight" or not model.config.tie_embeddings}
    assert set(out) == wanted
    assert all(torch.equal(out[name], model.state_dict()[name].double()) for name in wanted)
