"""Every file of a checkpoint may come from somebody who means harm: nothing runs, nothing is written elsewhere, and the
answer is one line within seconds, in little memory."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litgpt.config import Config, save_config
from litgpt.model import GPT

SIZES = dict(
    name="tiny", n_layer=1, n_embd=32, n_head=4, n_query_groups=2, block_size=64, vocab_size=300, padded_vocab_size=320,
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    intermediate_size=48,
)  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


class Hostile:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def header_file(path, header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def our_weights():
    return GPT(Config(**SIZES)).state_dict()


def hf_weights():
    from litgpt.checkpoint.adapter import StateDictAdapter

    return {name: torch.ones(shape) for name, shape in StateDictAdapter(Config(**SIZES), "llama").hf_shapes().items()}


def pickle_in_pth(folder, witness):
    torch.save({**our_weights(), "x": Hostile(witness)}, folder / "lit_model.pth")


def pickle_beside_the_model(folder, witness):
    torch.save({"model": our_weights(), "optimizer": Hostile(witness)}, folder / "lit_model.pth")


def pickle_in_bin(folder, witness):
    torch.save({**hf_weights(), "x": Hostile(witness)}, folder / "pytorch_model.bin")


def old_pickle_in_bin(folder, witness):
    torch.save({"x": Hostile(witness)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def plain_pickle_in_bin(folder, witness):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(witness)))


def pickle_called_safetensors(folder, witness):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Hostile(witness), protocol=2) + b" " * 100)


def pickle_in_a_shard(folder, witness):
    torch.save({"x": Hostile(witness)}, folder / "part.bin")
    index = {"weight_map": dict.fromkeys(hf_weights(), "part.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def bomb_of_lists_in_pth(folder, witness):
    with zipfile.ZipFile(folder / "lit_model.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02]" + b"](" * 5_000_000 + b"e" * 5_000_000 + b".")
        archive.writestr("x/version", b"3\n")


def bomb_of_lists_in_old_bin(folder, witness):
    content = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    (folder / "pytorch_model.bin").write_bytes(content + b"\x80\x02(" + b"]" * 30_000_000 + b"l.")


def allocation_in_pth(folder, witness):
    opcodes = b"\x80\x02}X\x01\x00\x00\x00aU\x00c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs."
    with zipfile.ZipFile(folder / "lit_model.pth", "w") as archive:
        archive.writestr("x/data.pkl", opcodes.replace(b"U\x00", b""))
        archive.writestr("x/version", b"3\n")


def compressed_record(folder, witness):
    with zipfile.ZipFile(folder / "lit_model.pth", "w") as archive:
        archive.writestr("x/data/0", b"\0" * 200_000_000, zipfile.ZIP_DEFLATED)
        archive.writestr("x/data.pkl", b"\x80\x02}.")


def overlapping_records(folder, witness):
    """One record of a megabyte that the table of contents lists a thousand times."""
    path = folder / "lit_model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data/0", bytes(1_000_000))
        for i in range(1000):
            clone = zipfile.ZipInfo(f"x/data/{i + 1}")
            first = archive.infolist()[0]
            clone.CRC, clone.file_size, clone.compress_size, clone.header_offset = (
                first.CRC, first.file_size, first.compress_size, first.header_offset
            )  # fmt: skip
            archive.filelist.append(clone)
            archive.NameToInfo[clone.filename] = clone


def endless_table_of_contents(folder, witness):
    with zipfile.ZipFile(folder / "lit_model.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        first = archive.infolist()[0]
        archive.filelist += [first] * 300_000


def stretched_tensor(folder, witness):
    """A tensor of four terabytes that stands on one number."""
    torch.save({**our_weights(), "lm_head.weight": torch.ones(1).expand(10**6, 10**6)}, folder / "lit_model.pth")


def giant_header_by_its_length(folder, witness):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}" + bytes(1000))


def giant_header_of_lists(folder, witness):
    header_file(folder / "model.safetensors", b'{"a":[' + b"[]," * 10_000_000 + b"[]]}")


def giant_header_of_names(folder, witness):
    entry = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header_file(folder / "model.safetensors", b"{" + b",".join(entry % i for i in range(500_000)) + b"}")


def deep_header(folder, witness):
    header_file(folder / "model.safetensors", b"[" * 900_000)


def overlapping_tensors(folder, witness):
    entry = {"dtype": "F32", "shape": [250], "data_offsets": [0, 1000]}
    header_file(folder / "model.safetensors", {str(i): entry for i in range(1000)}, bytes(1000))


def impossible_shape(folder, witness):
    header = {"model.norm.weight": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}
    header_file(folder / "model.safetensors", header)


def numbers_that_are_none(folder, witness):
    header = {"a": {"dtype": "F32", "shape": [1e400, -5], "data_offsets": ["x", None]}}
    header_file(folder / "model.safetensors", header)


def name_that_moves_the_cursor(folder, witness):
    save_file({"\x1b[2J\nevil\r": torch.ones(1)}, folder / "model.safetensors")


def index_to(target):
    def write(folder, witness):
        save_file(hf_weights(), folder.parent / "elsewhere.safetensors")
        index = {"weight_map": dict.fromkeys(hf_weights(), target.replace("OUTSIDE", str(folder.parent)))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    write.__name__ = f"index_to_{target}"
    return write


def giant_index(folder, witness):
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map":{"a":[' + b"[]," * 12_000_000 + b"[]]}}")


def index_of_lists(folder, witness):
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map":{"a":[' + b"[]," * 8_000_000 + b"[]]}}")


def link_to_a_secret(folder, witness):
    (folder.parent / "secret").write_text("root:very-secret:0:0\n" * 20)
    (folder / "model.safetensors").symlink_to(folder.parent / "secret")


def link_to_a_device(folder, witness):
    (folder / "model.safetensors").symlink_to("/dev/zero")


def link_to_itself(folder, witness):
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")


def pipe_instead_of_weights(folder, witness):
    os.mkfifo(folder / "model.safetensors")


def links_out_where_files_are_written(folder, witness):
    save_file(hf_weights() | {"unknown": torch.ones(1)}, folder / "model.safetensors")
    for name in ("lit_model.pth", "checksums.json"):
        (folder / name).symlink_to(witness)


def config_of_lists(folder, witness):
    save_file(hf_weights(), folder / "model.safetensors")
    (folder / "config.json").write_bytes(b'{"model_type":"llama","a":[' + b"[]," * 10_000_000 + b"[]]}")


def deep_config(folder, witness):
    save_file(hf_weights(), folder / "model.safetensors")
    (folder / "config.json").write_bytes(b'{"model_type":' + b"[" * 500_000)


def giant_sizes_in_config(folder, witness):
    save_file(hf_weights(), folder / "model.safetensors")
    values = LLAMA | {"num_hidden_layers": 10**9, "hidden_size": 2**40, "vocab_size": 2**60}
    (folder / "config.json").write_text(json.dumps(values))


def yaml_that_runs(folder, witness):
    save_file(hf_weights(), folder / "model.safetensors")
    (folder / "model_config.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {witness}']\n")


def yaml_bomb(folder, witness):
    save_file(hf_weights(), folder / "model.safetensors")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (folder / "model_config.yaml").write_text("\n".join(lines) + "\nname: *a11\nn_layer: *a11\n")


def checksums_of_files_elsewhere(folder, witness):
    save_file(hf_weights(), folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(hf_weights(), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    names = ("model.safetensors.index.json", "../../../../etc/x.safetensors")
    (folder / "checksums.json").write_text(json.dumps({"files": {name: {"bytes": 1, "crc32": "0"} for name in names}}))


CASES = [
    pickle_in_pth, pickle_beside_the_model, pickle_in_bin, old_pickle_in_bin, plain_pickle_in_bin,
    pickle_called_safetensors, pickle_in_a_shard, bomb_of_lists_in_pth, bomb_of_lists_in_old_bin, allocation_in_pth,
    compressed_record, overlapping_records, endless_table_of_contents, stretched_tensor, giant_header_by_its_length,
    giant_header_of_lists, giant_header_of_names, deep_header, overlapping_tensors, impossible_shape,
    numbers_that_are_none, name_that_moves_the_cursor, index_to("../elsewhere.safetensors"),
    index_to("OUTSIDE/elsewhere.safetensors"), index_to("sub/../../elsewhere.safetensors"),
    index_to("..\\elsewhere.safetensors"), index_to(".."), index_to(""), index_to("a\0b"), giant_index, index_of_lists,
    link_to_a_secret, link_to_a_device, link_to_itself, pipe_instead_of_weights, links_out_where_files_are_written,
    config_of_lists, deep_config, giant_sizes_in_config, yaml_that_runs, yaml_bomb, checksums_of_files_elsewhere,
]  # fmt: skip

PROBE = """
import contextlib, gc, io, json, re, sys, time
from pathlib import Path
from litgpt.checkpoint.loading import load_model_weights
from litgpt.checkpoint.meta import meta_device
from litgpt.command_help import error_text
from litgpt.registry import build_model, load_checkpoint_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.validate import validate_setup

def memory(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def use(folder):
    spec, config = load_checkpoint_config(folder)
    with meta_device():
        model = build_model(spec, config)
    load_model_weights(model, folder)

for folder in map(Path, sys.argv[1:]):
    for action in (validate_setup, use, convert_hf_checkpoint):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, start, error = memory("VmRSS"), time.perf_counter(), ""
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                action(folder)
            except (ValueError, OSError, NotImplementedError) as caught:
                error = error_text(caught)
            except BaseException as caught:
                error = f"NOT FORESEEN: {type(caught).__name__}: {caught}"
        result = {"folder": folder.name, "action": action.__name__, "error": error,
                  "seconds": time.perf_counter() - start, "bytes": memory("VmHWM") - before}
        print(json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_tokenizer_dir):
    """What each of three commands answers to each hostile folder: one process for all of them."""
    root = tmp_path_factory.mktemp("hostile")
    for case in CASES:
        folder = root / case.__name__.replace("/", "_").replace("\0", "_") / "checkpoint"
        folder.mkdir(parents=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_tokenizer_dir / name, folder)
        (folder / "config.json").write_text(json.dumps(LLAMA))
        case(folder, folder.parent / "witness")
        if case.__name__.endswith("_pth") or (folder / "lit_model.pth").is_file():
            save_config(Config(**SIZES), folder)
    folders = sorted(root.glob("*/checkpoint"))
    before = {p: p.lstat().st_mtime_ns for folder in folders for p in (*folder.parent.iterdir(), *folder.iterdir())}
    # all of them are called `checkpoint`; links tell them apart in what the process prints
    links = []
    for folder in folders:
        (folder.parent / folder.parent.name).symlink_to(folder)
        links.append(folder.parent / folder.parent.name)
    command = [sys.executable, "-W", "ignore", "-c", PROBE, *links]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    results: dict[str, list] = {}
    for line in out.splitlines():
        result = json.loads(line)
        results.setdefault(result["folder"], []).append(result)
    return root, results, before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_hostile_folder_gets_one_clean_line_and_does_nothing(outcomes, case):
    root, results, before = outcomes
    name = case.__name__.replace("/", "_").replace("\0", "_")
    folder = root / name / "checkpoint"
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and "/dev" not in str(path.resolve()))
    assert len(results[name]) == 3
    for result in results[name]:
        error = result["error"]
        if case is checksums_of_files_elsewhere and result["action"] != "validate_setup":
            assert not error  # nothing else reads them
            continue
        assert error and not error.startswith("NOT FORESEEN") and "\n" not in error and error.isprintable(), result
        assert len(error) < 1500 and "very-secret" not in error
        assert result["seconds"] < 5, result
        assert result["bytes"] < max(2 * size, 64_000_000), (result, size)
    assert not (root / name / "witness").exists()
    for path in (root / name).iterdir():
        assert path.name == name or before[path] == path.lstat().st_mtime_ns or path == folder, path
    assert not any(path.name.startswith(".") for path in folder.iterdir())
    written = case is checksums_of_files_elsewhere or "lit_model.pth" in {
        path.name for path in before if path.parent == folder
    }
    assert written or not (folder / "lit_model.pth").exists()


def test_code_beside_the_weights_is_never_imported(tmp_path, tiny_tokenizer_dir, capsys):
    """`auto_map` and the like are ignored: the model is ours, or it is refused."""
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from litgpt.scripts.validate import validate_setup

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_tokenizer_dir, folder)
    code = f"open({str(tmp_path / 'witness')!r}, 'w')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "sitecustomize.py", "litgpt.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(LLAMA | {"auto_map": auto_map, "trust_remote_code": True}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "evil.Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file(hf_weights(), folder / "model.safetensors")
    validate_setup(folder)
    convert_hf_checkpoint(folder)
    (folder / "config.json").write_text(
        json.dumps(LLAMA | {"model_type": "evil", "architectures": ["EvilForCausalLM"]})
    )
    (folder / "model_config.yaml").unlink()
    with pytest.raises(ValueError, match="evil"):
        validate_setup(folder)
    assert not (tmp_path / "witness").exists()


def test_folder_of_links_as_the_hub_cache_makes_them_is_read(tmp_path):
    """There each file is a link to a blob two folders up; a link by itself is no attack."""
    from litgpt.checkpoint.tensors import open_weights

    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(hf_weights(), blobs / "deadbeef")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/deadbeef"))
    assert sorted(open_weights(snapshot)) == sorted(hf_weights())
