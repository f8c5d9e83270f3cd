import json
import random
import shutil

import pytest
import torch
import yaml

from litgpt.checkpoint.adapter import StateDictAdapter
from litgpt.checkpoint.hf_config import config_to_hf
from litgpt.checkpoint.tensors import LazyTensor, open_weights, write_safetensors, write_torch
from litgpt.checkpoint.torch_file import save_torch
from litgpt.config import Config, save_config
from litgpt.model import GPT
from litgpt.scripts.validate import _SENTENCE as SENTENCE
from litgpt.scripts.validate import format_size, validate_setup
from litgpt.tokenizer import Tokenizer

SIZES = dict(
    name="tiny", n_layer=2, n_embd=32, n_head=4, n_query_groups=2, block_size=64, vocab_size=300, padded_vocab_size=320,
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    intermediate_size=48,
)  # fmt: skip
STEPS = ["files", "checksums", "config", "weights", "tokenizer", "memory"]


@pytest.fixture(params=["litgpt", "hf", "hf shards", "bin"])
def folder(request, tmp_path, tiny_tokenizer_dir):
    torch.manual_seed(0)
    folder = tmp_path / "checkpoints" / "org" / "name"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_dir / name, folder)
    model = GPT(Config(**SIZES))
    ours = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    if request.param == "litgpt":
        save_config(model.config, folder)
        write_torch(folder / "lit_model.pth", ours)
        return folder
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, "llama")))
    tensors = StateDictAdapter(model.config, "llama").to_hf(ours)
    if request.param == "bin":
        torch.save({name: tensor.read() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    else:
        write_safetensors(folder, tensors, max_shard_bytes=30_000 if "shards" in request.param else 10**9)
    return folder


def lines_of(capsys):
    return {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.parametrize("training", [False, True])
def test_sound_folder_passes_step_by_step(folder, capsys, training):
    validate_setup(folder, dtype="bfloat16", training=training)
    assert lines_of(capsys) == dict.fromkeys(STEPS, "ok")


def test_folder_is_found_below_checkpoints(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parents[2])
    validate_setup("org/name")
    assert set(lines_of(capsys).values()) == {"ok"}
    with pytest.raises(FileNotFoundError, match=r"org/nome is not there, and checkpoints/org/nome is no folder"):
        validate_setup("org/nome")


def test_no_values_are_read_without_checksums(folder, capsys, monkeypatch):
    def refuse(*args):
        raise AssertionError("values were read")

    for place in ("litgpt.checkpoint.lazy.OpenFile.fill", "litgpt.scripts.validate.check_crc"):
        monkeypatch.setattr(place, refuse)
    validate_setup(folder, checksums=False)
    assert list(lines_of(capsys)) == [step for step in STEPS if step != "checksums"]


def weights_of(folder):
    return sorted(path for path in folder.iterdir() if path.suffix in (".pth", ".bin", ".safetensors"))


def test_each_damage_is_named_with_its_file(folder, capsys):
    """What is taken away or spoilt -> the step that says so, and a piece of the message."""
    weights = weights_of(folder)[0]
    cases = {
        "no weights": ("files", "no weights|lacks 1 of", lambda: weights.unlink()),
        "cut": ("weights|checksums", weights.name, lambda: weights.write_bytes(weights.read_bytes()[:-100])),
        "no tokenizer": ("tokenizer", "No tokenizer in", lambda: (folder / "tokenizer.json").unlink()),
        "no config": (
            "config",
            "config",
            lambda: [p.unlink() for p in folder.glob("*config.*") if "token" not in p.name],
        ),
    }
    for what, (step, match, spoil) in cases.items():
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        spoil()
        with pytest.raises(ValueError, match=f"name is no valid checkpoint: .*({match})") as caught:
            validate_setup(folder)
        assert "\n" not in str(caught.value)
        failed = {name for name, state in lines_of(capsys).items() if state == "failed"}
        assert failed and failed <= {*step.split("|"), "weights"}, (what, failed)
        for name, old in content.items():
            (folder / name).write_bytes(old)
    validate_setup(folder)


def test_config_of_another_size_is_told_from_the_weights(folder, capsys):
    if (folder / "model_config.yaml").is_file():
        values = yaml.safe_load((folder / "model_config.yaml").read_text())
        (folder / "model_config.yaml").write_text(yaml.safe_dump(values | {"n_layer": 3}))
    else:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"do not fit the model") as caught:
        validate_setup(folder)
    assert "\n" not in str(caught.value)
    assert lines_of(capsys)["weights"] == "failed"


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_one_flipped_bit_in_fifty_places_is_named_with_its_file(tmp_path, kind, tiny_tokenizer_dir, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_tokenizer_dir, folder)
    config = Config(**SIZES)
    save_config(config, folder)
    ours = {name: LazyTensor.of(tensor) for name, tensor in GPT(config).state_dict().items()}
    if kind == "pth":
        write_torch(folder / "lit_model.pth", ours)
    else:
        write_safetensors(folder, ours)
    (path,) = weights_of(folder)
    content, rng = path.read_bytes(), random.Random(11)
    n_named = 0
    for _ in range(50):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            validate_setup(folder)
        except ValueError as error:
            n_named += str(path) in str(error)
    assert n_named == 50
    capsys.readouterr()


def test_named_weights_file_has_to_be_there(folder):
    with pytest.raises(ValueError, match=r"other\.pth is not there"):
        validate_setup(folder, model_filename="other.pth")
    tensors = open_weights(folder)
    save_torch({name: tensor.read() for name, tensor in tensors.items()}, folder / "other.pth")
    validate_setup(folder, model_filename="other.pth")


def test_dtype_that_is_not_known_is_refused(folder):
    with pytest.raises(ValueError, match=r"dtype 'int8' is not known: choose float32, float16, bfloat16"):
        validate_setup(folder, dtype="int8")


def test_tokenizer_that_loses_text_is_found(folder, monkeypatch, capsys):
    monkeypatch.setattr("litgpt.scripts.validate.Tokenizer.decode", lambda self, ids: "something else")
    with pytest.raises(ValueError, match=r"the tokenizer in .*name turns .* into 'something else'"):
        validate_setup(folder)
    assert lines_of(capsys)["tokenizer"] == "failed"


def test_command_ends_with_status_1_and_one_line(folder, capsys):
    from litgpt.__main__ import main

    main(["validate", str(folder)])
    capsys.readouterr()
    weights_of(folder)[0].unlink()
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(folder)])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("litgpt validate: error: ") and error.count("\n") == 1


def test_tokenizer_with_more_tokens_than_the_embedding_fails(folder, capsys):
    largest = max(Tokenizer(folder).encode(SENTENCE, bos=False, eos=False).tolist())
    small = GPT(Config(**SIZES | dict(vocab_size=largest, padded_vocab_size=largest)))
    for path in (*weights_of(folder), *folder.glob("config.json"), *folder.glob("*.index.json")):
        path.unlink()
    save_config(small.config, folder)
    save_torch(small.state_dict(), folder / "lit_model.pth")
    with pytest.raises(ValueError, match=f"gives the token {largest}, but the model knows only {largest}"):
        validate_setup(folder, checksums=False)
    assert lines_of(capsys) | {"checksums": "ok"} == dict.fromkeys(STEPS, "ok") | {"tokenizer": "failed"}


def test_index_is_not_counted_as_a_shard(folder, capsys):
    shards = weights_of(folder)
    validate_setup(folder)
    assert f", {len(shards)} file" in capsys.readouterr().out
    if len(shards) > 1:
        shards[0].unlink()
        with pytest.raises(ValueError, match=rf"lacks 1 of {len(shards)} shards"):
            validate_setup(folder)


@pytest.mark.parametrize(("n_bytes", "text"), [(123_456, "0.1 MB"), (999e6, "999.0 MB"), (1234e9, "1,234.00 GB")])
def test_sizes_say_something_for_small_models_too(n_bytes, text):
    assert format_size(n_bytes) == text
