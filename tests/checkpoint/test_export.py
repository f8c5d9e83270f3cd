import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt import GPT
from litgpt.checkpoint.crc import check_crc
from litgpt.checkpoint.export import find_token_ids, open_export, write_gguf_file, write_hf_folder, write_hf_state_dict
from litgpt.checkpoint.io import load_weights, save_torch
from litgpt.config import Config, LlamaConfig, QwenConfig, save_config
from litgpt.prompts import Alpaca, save_prompt_style
from litgpt.registry import load_checkpoint_config

SIZES = dict(n_layer=2, n_embd=32, n_head=4, n_query_groups=2, intermediate_size=48, block_size=64, name="tiny")
SIZES |= dict(vocab_size=300, padded_vocab_size=320)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[..., tuple[Path, GPT]]:
    """Makes a litgpt folder of a random model."""

    def make(config: Config, change: Callable[[dict], None] | None = None) -> tuple[Path, GPT]:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_tokenizer_dir / name).read_bytes())
        save_config(config, folder)
        model = GPT(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        weights = dict(model.state_dict())
        if change is not None:
            change(weights)
        save_torch(weights, folder / "lit_model.pth")
        return folder, model

    return make


def hf_logits(folder: Path, idx: torch.Tensor, **kwargs) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    with torch.inference_mode():
        return model(idx).logits


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_same_from_the_folder(checkpoint: Callable, tmp_path: Path, tied: bool) -> None:
    folder, model = checkpoint(QwenConfig(**SIZES, tie_embeddings=tied))
    files = write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 10**9)
    assert files == [tmp_path / "hf" / "model.safetensors"]
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["tie_word_embeddings"] is tied and values["model_type"] == "qwen2"
    assert ("lm_head.weight" in load_weights(tmp_path / "hf")) is not tied
    idx = torch.randint(0, 300, (2, 20))
    wanted = model(idx)
    assert (hf_logits(tmp_path / "hf", idx) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_tokenizer_template_and_token_ids_are_in_the_folder(checkpoint: Callable, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, _ = checkpoint(LlamaConfig(**SIZES))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    save_prompt_style(Alpaca(), folder)
    write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 10**9)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>Hi"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == tokenizer.eos_token_id == 0
    assert (tmp_path / "hf" / "prompt_style.yaml").is_file()


def test_exported_folder_is_read_back_by_litgpt(checkpoint: Callable, tmp_path: Path) -> None:
    folder, model = checkpoint(LlamaConfig(**SIZES))
    write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 10**9)
    again = open_export(tmp_path / "hf", load_checkpoint_config(tmp_path / "hf")[1])
    assert again.weights.keys() == model.state_dict().keys()
    assert all(torch.equal(again.weights[name].read(), value) for name, value in model.state_dict().items())


def test_shards_have_an_index_and_checksums(checkpoint: Callable, tmp_path: Path) -> None:
    folder, model = checkpoint(LlamaConfig(**SIZES))
    files = write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 40_000)
    assert len([file for file in files if file.suffix == ".safetensors"]) > 2
    assert all(file.stat().st_size < 45_000 for file in files)
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    for file in files:
        check_crc(file)
    idx = torch.randint(0, 300, (1, 9))
    torch.testing.assert_close(hf_logits(tmp_path / "hf", idx), model(idx), atol=1e-4, rtol=1e-4)


def test_head_that_was_trained_apart_is_kept(checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = checkpoint(QwenConfig(**SIZES, tie_embeddings=True), lambda w: w.update(
        {"lm_head.weight": torch.ones(320, 32)}
    ))  # fmt: skip
    export = open_export(folder, load_checkpoint_config(folder)[1])
    assert export.config.tie_embeddings is False
    write_hf_folder(export, tmp_path / "hf", 10**9)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (load_weights(tmp_path / "hf")["lm_head.weight"] == 1).all()
    assert load_checkpoint_config(tmp_path / "hf")[1].tie_embeddings is False


def test_equal_head_of_a_tied_model_is_left_out(checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = checkpoint(QwenConfig(**SIZES, tie_embeddings=True), lambda w: w.update(
        {"lm_head.weight": w["transformer.wte.weight"].clone()}
    ))  # fmt: skip
    export = open_export(folder, load_checkpoint_config(folder)[1])
    assert export.config.tie_embeddings and "lm_head.weight" not in export.weights


def test_untied_model_without_a_head_is_refused(checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = checkpoint(QwenConfig(**SIZES), lambda w: w.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head"):
        write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 10**9)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_and_the_config_says_so(checkpoint: Callable, tmp_path: Path, dtype: torch.dtype) -> None:
    folder, model = checkpoint(LlamaConfig(**SIZES))
    write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1], dtype), tmp_path / "hf", 10**9)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    weights = load_weights(tmp_path / "hf")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight.to(dtype))


def test_state_dict_loads_as_in_0_5(checkpoint: Callable, tmp_path: Path) -> None:
    folder, model = checkpoint(LlamaConfig(**SIZES))
    export = open_export(folder, load_checkpoint_config(folder)[1])
    path = write_hf_state_dict(export, tmp_path / "pth" / "model.pth")
    assert [file.name for file in path.parent.iterdir()] == ["model.pth"]
    state_dict = torch.load(path, weights_only=True, mmap=True)
    assert "model.layers.1.self_attn.k_proj.weight" in state_dict
    transformers = pytest.importorskip("transformers")
    write_hf_folder(export, tmp_path / "hf", 10**9)
    hf_config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    hf_model = transformers.LlamaForCausalLM.from_pretrained(None, config=hf_config, state_dict=state_dict).eval()
    idx = torch.randint(0, 300, (1, 9))
    torch.testing.assert_close(hf_model(idx).logits, model(idx), atol=1e-4, rtol=1e-4)


def test_gguf_file_is_called_after_model_and_type(checkpoint: Callable, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder, _ = checkpoint(LlamaConfig(**SIZES | dict(name="org/tiny")))
    export = open_export(folder, load_checkpoint_config(folder)[1])
    assert write_gguf_file(export, tmp_path / "out", "q8_0") == tmp_path / "out" / "org-tiny-Q8_0.gguf"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["org-tiny-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("transformer.h.0.attn.qkv.lora_A", ValueError, "merge_lora"),
        ("transformer.h.0.attn.adapter_wte.weight", NotImplementedError, "adapter"),
        ("transformer.h.0.attn.gating_factor", NotImplementedError, "adapter"),
        ("lm_head.adapter_scale", NotImplementedError, "adapter"),
    ],
)
def test_parts_of_finetuning_are_refused(checkpoint: Callable, name: str, error: type, match: str) -> None:
    folder, _ = checkpoint(LlamaConfig(**SIZES), lambda w: w.update({name: torch.ones(2, 2)}))
    with pytest.raises(error, match=match) as caught:
        open_export(folder, load_checkpoint_config(folder)[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "error"), [(".lora", ValueError), (".adapter_v2", NotImplementedError)])
def test_folder_with_nothing_but_finetuned_parts_is_explained(checkpoint: Callable, suffix: str, error: type) -> None:
    folder, _ = checkpoint(LlamaConfig(**SIZES))
    (folder / "lit_model.pth").rename(folder / f"lit_model.pth{suffix}")
    with pytest.raises(error, match="only"):
        open_export(folder, load_checkpoint_config(folder)[1])


def test_earlier_export_is_replaced_and_other_files_are_never(checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = checkpoint(LlamaConfig(**SIZES))
    export = open_export(folder, load_checkpoint_config(folder)[1])
    write_hf_folder(export, tmp_path / "hf", 40_000)
    write_hf_folder(export, tmp_path / "hf", 10**9)
    assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 1

    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        write_hf_folder(export, tmp_path / "hf", 10**9)
    (tmp_path / "hf" / "notes.txt").unlink()
    (tmp_path / "hf" / "checksums.json").unlink()  # as in a folder of the hub
    with pytest.raises(ValueError, match="no export wrote"):
        write_hf_folder(export, tmp_path / "hf", 10**9)
    with pytest.raises(ValueError, match="is a file"):
        write_hf_folder(export, folder / "lit_model.pth", 10**9)


def test_checkpoint_itself_is_never_replaced(checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = checkpoint(LlamaConfig(**SIZES))
    write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 10**9)
    export = open_export(tmp_path / "hf", load_checkpoint_config(tmp_path / "hf")[1])
    with pytest.raises(ValueError, match="checkpoint itself"):
        write_hf_folder(export, tmp_path / "hf", 10**9)


def test_token_ids_come_from_the_files(checkpoint: Callable) -> None:
    folder, _ = checkpoint(LlamaConfig(**SIZES))
    assert find_token_ids(folder) == {"bos_token_id": 0, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7], "pad_token_id": 3, "top_k": 5}))
    assert find_token_ids(folder) == {"bos_token_id": 0, "eos_token_id": [0, 7], "pad_token_id": 3}
    (folder / "tokenizer.json").unlink()
    assert find_token_ids(folder) == {"eos_token_id": [0, 7], "pad_token_id": 3}


def test_config_json_of_another_model_is_not_believed(checkpoint: Callable, tmp_path: Path) -> None:
    """Runs copy the one that lies beside their tokenizer."""
    folder, _ = checkpoint(QwenConfig(**SIZES))
    for values in ({"model_type": "gpt_neox"}, {"model_type": "llama"}, {"model_type": "mamba"}):
        (folder / "config.json").write_text(json.dumps(values))
        assert open_export(folder, load_checkpoint_config(folder)[1]).model_type == "qwen2", values


def test_wrong_commas_of_the_generation_settings_are_put_right(checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = checkpoint(LlamaConfig(**SIZES))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_k": 5,}')
    write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 10**9)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {"eos_token_id": [2, 7], "top_k": 5}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [2, 7]
    (folder / "generation_config.json").write_text("{nonsense")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        find_token_ids(folder)


def test_export_without_a_tokenizer_says_so(checkpoint: Callable, tmp_path: Path) -> None:
    folder, _ = checkpoint(LlamaConfig(**SIZES))
    (folder / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        write_hf_folder(open_export(folder, load_checkpoint_config(folder)[1]), tmp_path / "hf", 10**9)
