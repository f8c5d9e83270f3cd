import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import litgpt
from litgpt import GPT, Config, api, registry
from litgpt.api import LLM, Preprocessor, calculate_number_of_devices
from litgpt.checkpoint.io import load_weights, save_torch
from litgpt.config import save_config
from litgpt.prompts import Alpaca, ChatML, Default, save_prompt_style
from litgpt.tokenizer import Tokenizer


@pytest.fixture
def checkpoint_dir(tmp_path: Path, tiny_tokenizer_dir: Path, tiny_config) -> Path:
    """A litgpt folder with a random model that speaks its tokenizer's tokens."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_tokenizer_dir / name).read_bytes())
    config = tiny_config(block_size=128)
    save_config(config, folder)
    model = GPT(config)
    model.init_weights()
    save_torch(model.state_dict(), folder / "lit_model.pth")
    return folder


@pytest.fixture
def llm(checkpoint_dir: Path) -> LLM:
    llm = LLM.load(str(checkpoint_dir), distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    return llm


def greedy(model: GPT, idx: torch.Tensor, n: int) -> list[int]:
    """The likeliest tokens, each from the whole text without a cache."""
    ids = idx.tolist()
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(idx) :]


def with_end(llm: LLM, token: int) -> None:
    """From now on `token` ends the answer."""
    llm.tokenizer.eos_id, llm.tokenizer.eos_ids = token, (token,)


def test_generated_ids_are_the_likeliest_ones(llm: LLM) -> None:
    prompt = "The quick brown fox"
    ids = llm.generate(prompt, max_new_tokens=12, top_k=1, return_as_token_ids=True)
    wanted = greedy(llm.model, llm.tokenizer.encode(prompt).long(), 12)
    assert llm.tokenizer.eos_id not in wanted
    assert ids.tolist() == wanted


def test_generated_text_is_that_of_the_ids_without_the_prompt(llm: LLM) -> None:
    ids = llm.generate("The dog", max_new_tokens=9, temperature=0, return_as_token_ids=True)
    text = llm.generate("The dog", max_new_tokens=9, temperature=0)
    assert isinstance(text, str) and text == llm.tokenizer.decode(ids)


def test_streamed_pieces_joined_are_the_whole(llm: LLM) -> None:
    whole = llm.generate("A small", max_new_tokens=20, temperature=0)
    pieces = list(llm.generate("A small", max_new_tokens=20, temperature=0, stream=True))
    assert len(pieces) > 1 and "".join(pieces) == whole
    ids = list(llm.generate("A small", max_new_tokens=20, temperature=0, stream=True, return_as_token_ids=True))
    assert llm.tokenizer.decode(torch.cat(ids)) == whole


def test_generate_takes_ids_as_they_are(llm: LLM) -> None:
    llm.prompt_style = Alpaca()
    idx = torch.tensor([5, 6, 7])
    ids = llm.generate(idx, max_new_tokens=4, temperature=0, return_as_token_ids=True)
    assert ids.tolist() == greedy(llm.model, idx, 4)


def test_eos_ends_the_answer_and_is_not_in_it(llm: LLM) -> None:
    prompt = "The quick brown fox"
    expected = greedy(llm.model, llm.tokenizer.encode(prompt).long(), 12)
    end = next(i for i in range(2, 12) if expected[i] not in expected[:i])
    with_end(llm, expected[end])
    ids = llm.generate(prompt, max_new_tokens=12, temperature=0, return_as_token_ids=True)
    assert ids.tolist() == expected[:end]


def test_stop_sequence_of_the_prompt_style_ends_the_answer(llm: LLM) -> None:
    expected = greedy(llm.model, llm.tokenizer.encode("Ask").long(), 12)
    end = next(i for i in range(2, 11) if expected[i : i + 2] not in [expected[j : j + 2] for j in range(i)])

    class Ended(Default):
        stops = (tuple(expected[end : end + 2]),)

    llm.prompt_style = Ended()
    ids = llm.generate("Ask", max_new_tokens=12, temperature=0, return_as_token_ids=True)
    assert ids.tolist() == expected[:end]


def test_prompt_style_and_system_prompt_dress_the_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    llm.prompt_style = ChatML("Be brief.")
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **_: seen.append(text) or torch.tensor([1, 2]))
    llm.generate("Hello", max_new_tokens=1)
    llm.generate("Hello", sys_prompt="Be long.", max_new_tokens=1)
    assert "Be brief." in seen[0] and "Be long." in seen[1] and all("Hello" in text for text in seen)


def test_cache_grows_with_the_text_and_gives_what_no_cache_gives(llm: LLM) -> None:
    assert not llm.kv_cache_initialized
    for n_prompt, n_new in ((3, 4), (60, 50), (5, 6), (1, 128)):
        idx = torch.arange(n_prompt) % 250
        with_end(llm, 319)
        ids = llm.generate(idx, max_new_tokens=n_new, temperature=0, return_as_token_ids=True)
        expected = greedy(llm.model, idx, n_new)
        assert ids.tolist() == (expected[: expected.index(319)] if 319 in expected else expected)
        assert llm.kv_cache_initialized and llm.prev_generated_seq_length == n_prompt + n_new


def test_longrope_cache_is_as_long_as_its_frequencies_ask(tmp_path: Path, tiny_config) -> None:
    factors = dict(short_factor=[1.0] * 4, long_factor=[9.0] * 4, factor=4.0, original_max_seq_len=32)
    config = tiny_config(block_size=128, rotary_percentage=1.0, rope_adjustments=factors)
    save_config(config, tmp_path)
    model = GPT(config)
    model.init_weights()
    save_torch(model.state_dict(), tmp_path / "lit_model.pth")
    llm = LLM.load(tmp_path, distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    idx = torch.arange(10)
    short = llm.generate(idx, max_new_tokens=20, temperature=0, return_as_token_ids=True)
    llm.generate(idx, max_new_tokens=90, temperature=0, return_as_token_ids=True)
    again = llm.generate(idx, max_new_tokens=20, temperature=0, return_as_token_ids=True)
    assert short.tolist() == again.tolist() == greedy(model.eval(), idx, 20)


def test_fixed_cache_holds_so_many_tokens(llm: LLM) -> None:
    llm.distribute(accelerator="cpu", precision="32-true", fixed_kv_cache_size=16)
    assert llm.kv_cache_initialized and llm.fixed_kv_cache_size == 16
    assert len(llm.generate(torch.arange(10), max_new_tokens=7, temperature=0, return_as_token_ids=True)) == 7
    with pytest.raises(ValueError, match=r"KV cache .* holds 16"):
        llm.generate(torch.arange(10), max_new_tokens=8)
    llm.distribute(accelerator="cpu", precision="32-true", fixed_kv_cache_size="max_model_supported")
    assert len(llm.generate(torch.arange(10), max_new_tokens=119, temperature=0, return_as_token_ids=True)) == 119
    with pytest.raises(ValueError, match="1 to 128"):
        llm.distribute(accelerator="cpu", fixed_kv_cache_size=129)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(prompt=torch.arange(100), max_new_tokens=50), "context is 128"),
        (dict(prompt=torch.arange(3), max_new_tokens=0), "below 1"),
        (dict(prompt=torch.arange(3), temperature=-1.0), "temperature"),
        (dict(prompt=torch.arange(3), top_p=1.5), "top_p"),
        (dict(prompt=torch.tensor([], dtype=torch.long)), "empty"),
    ],
)
def test_generate_refuses_what_cannot_be(llm: LLM, kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        llm.generate(**kwargs)


def test_generation_leaves_a_model_in_training_in_training(llm: LLM) -> None:
    llm.train()
    llm.generate(torch.arange(4), max_new_tokens=2)
    assert llm.model.training
    llm(torch.randint(0, 300, (1, 8)), torch.randint(0, 300, (1, 8)))[1].backward()
    assert all(parameter.grad is not None for parameter in llm.model.parameters())


def test_forward_gives_logits_and_the_loss_of_the_next_token(llm: LLM) -> None:
    idx, targets = torch.randint(0, 300, (2, 8)), torch.randint(0, 300, (2, 8))
    targets[0, :5] = -100
    logits = llm(idx)
    again, loss = llm(idx, targets)
    torch.testing.assert_close(logits, llm.model(idx))
    torch.testing.assert_close(again, logits)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)
    _, own = llm(idx, targets, loss_fn=lambda logits, targets: (logits.sum() * 0, targets.shape))
    assert own[1] == (2, 7)


def test_mixed_precision_computes_in_bf16_on_float32_weights(llm: LLM) -> None:
    llm.distribute(accelerator="cpu", precision="bf16-mixed")
    assert llm.model.lm_head.weight.dtype is torch.float32
    assert llm(torch.arange(4)[None]).dtype is torch.bfloat16
    pieces = llm.generate(torch.arange(4), max_new_tokens=3, stream=True)
    next(pieces)
    assert not torch.is_autocast_enabled("cpu")


def test_distribute_again_moves_the_weights_that_are_there(llm: LLM) -> None:
    with torch.no_grad():
        llm.model.lm_head.weight.fill_(0.5)
    llm.distribute(accelerator="cpu", precision="bf16-true")
    assert llm.model.lm_head.weight.dtype is torch.bfloat16
    assert (llm.model.lm_head.weight == 0.5).all()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (dict(accelerator="tpu"), ValueError, "choose cpu"),
        (dict(accelerator="cpu", devices=2), NotImplementedError, "more than one device"),
        (dict(quantize="bnb.nf4"), NotImplementedError, "quantize"),
        (dict(generate_strategy="sequential"), NotImplementedError, "generate_strategy"),
        (dict(accelerator="cpu", devices=0), ValueError, "devices is 0"),
        (dict(accelerator="cpu", precision="fp3"), ValueError, "precision"),
    ],
)
def test_distribute_says_what_it_cannot_do(llm: LLM, kwargs: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        llm.distribute(**kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_distribute_refuses_a_device_that_is_not_there(llm: LLM) -> None:
    with pytest.raises(ValueError, match="has none"):
        llm.distribute(accelerator="cuda")


@pytest.mark.gpu
def test_generate_on_a_gpu_gives_the_tokens_of_the_cpu(llm: LLM) -> None:
    idx = torch.arange(12)
    wanted = llm.generate(idx, max_new_tokens=20, temperature=0, return_as_token_ids=True)
    llm.distribute(accelerator="cuda", precision="32-true")
    assert llm.device.type == "cuda"
    assert llm.generate(idx, max_new_tokens=20, temperature=0, return_as_token_ids=True).tolist() == wanted.tolist()
    assert "Total GPU memory allocated in GB" in llm.benchmark(prompt="The", max_new_tokens=3)[1]


def test_without_distribute_there_is_no_model_yet(checkpoint_dir: Path) -> None:
    llm = LLM.load(checkpoint_dir, distribute=None)
    assert llm.model is None
    for use in (lambda: llm.generate("x"), lambda: llm(torch.tensor([[1]])), llm.state_dict):
        with pytest.raises(AttributeError, match="distribute"):
            use()


def test_load_puts_the_model_on_the_best_device_in_bf16(checkpoint_dir: Path, capsys: pytest.CaptureFixture) -> None:
    llm = LLM.load(str(checkpoint_dir))
    assert llm.model.lm_head.weight.dtype is torch.bfloat16 and not llm.model.training
    assert llm.device.type == ("cuda" if torch.cuda.is_available() else llm.device.type)
    captured = capsys.readouterr()
    assert "bfloat16" in captured.err and not captured.out


def test_load_random_weights_of_a_named_config(tiny_tokenizer_dir: Path) -> None:
    llm = LLM.load("pythia-14m", init="random", tokenizer_dir=tiny_tokenizer_dir, distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    assert llm.config.name == "pythia-14m" and llm.checkpoint_dir is None
    assert 0.01 < llm.model.lm_head.weight.std() < 0.1
    assert len(llm.generate("The", max_new_tokens=3, temperature=0, return_as_token_ids=True)) <= 3


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(model="pythia-14m", init="random"), "needs tokenizer_dir"),
        (dict(model="pythia-15m", init="random", tokenizer_dir="x"), "pythia-14m"),
        (dict(model="pythia-14m", init="best"), "init is 'best'"),
        (dict(model="pythia-14m", distribute="all"), "distribute is 'all'"),
    ],
)
def test_load_raises_for_what_it_does_not_know(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LLM.load(**kwargs)


def test_load_of_a_missing_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        LLM.load("./no/such/folder")


def test_load_takes_a_registered_model(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    class Shifted(GPT):
        def unembed(self, x, ctx):
            return super().unembed(x, ctx).roll(1, dims=-1)

    class ShiftedConfig(Config):
        pass

    sizes = dict(n_layer=1, n_embd=32, n_head=2, block_size=64, vocab_size=300, padded_vocab_size=320)
    registry.register_model("shifted", model=Shifted, config=ShiftedConfig, sizes={"debug": sizes})
    llm = LLM.load("shifted/debug", init="random", tokenizer_dir=tiny_tokenizer_dir, distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    assert type(llm.model) is Shifted
    llm.save(tmp_path / "saved")
    again = LLM.load(tmp_path / "saved", distribute=None)
    again.distribute(accelerator="cpu", precision="32-true")
    assert type(again.model) is Shifted
    idx = torch.arange(6)
    with_end(llm, 319), with_end(again, 319)
    ids = again.generate(idx, max_new_tokens=5, temperature=0, return_as_token_ids=True)
    assert ids.tolist() == greedy(llm.model, idx, 5)[: len(ids)] and len(ids)


def test_load_reads_a_hugging_face_folder_in_place(llm: LLM, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
    hf_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    hf_model.save_pretrained(tmp_path / "hf")
    before = sorted(file.name for file in (tmp_path / "hf").iterdir())
    loaded = LLM.load(tmp_path / "hf", tokenizer_dir=llm.checkpoint_dir, distribute=None)
    loaded.distribute(accelerator="cpu", precision="32-true")
    idx = torch.randint(0, 300, (2, 12))
    wanted = hf_model(idx).logits
    assert (loaded(idx) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert loaded.generate("The", max_new_tokens=3, temperature=0) is not None
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == before


def test_folder_without_a_tokenizer_serves_ids_only(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "tokenizer.json").unlink()
    llm = LLM.load(checkpoint_dir)
    assert len(llm.generate(torch.arange(3), max_new_tokens=2, return_as_token_ids=True)) == 2
    for kwargs in (dict(prompt="x"), dict(prompt=torch.arange(3))):
        with pytest.raises(FileNotFoundError, match="tokenizer_dir"):
            llm.generate(**kwargs)


def test_saved_folder_has_what_was_in_use(llm: LLM, tmp_path: Path) -> None:
    llm.prompt_style = ChatML("Be brief.")
    with torch.no_grad():
        llm.model.lm_head.weight.add_(1.0)
    llm.save(tmp_path / "new" / "folder")
    again = LLM.load(tmp_path / "new" / "folder", distribute=None)
    again.distribute(accelerator="cpu", precision="32-true")
    assert type(again.prompt_style) is ChatML and again.prompt_style.system_message == "Be brief."
    for name, value in llm.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert (tmp_path / "new" / "folder" / "tokenizer.json").is_file()
    llm.save(tmp_path / "new" / "folder", prompt_style=Alpaca())
    style = yaml.safe_load((tmp_path / "new" / "folder" / "prompt_style.yaml").read_text())
    assert style == {"class_path": "litgpt.prompts.Alpaca"}
    with pytest.raises(ValueError, match="folder"):
        llm.save()


def test_saving_over_its_own_checkpoint_keeps_other_files(llm: LLM, checkpoint_dir: Path) -> None:
    (checkpoint_dir / "notes.txt").write_text("mine")
    with torch.no_grad():
        llm.model.lm_head.weight.fill_(2.0)
    llm.save(checkpoint_dir)
    assert (checkpoint_dir / "notes.txt").read_text() == "mine"
    assert (load_weights(checkpoint_dir)["lm_head.weight"] == 2).all()
    assert Tokenizer(checkpoint_dir).vocab_size


def test_prompt_style_of_the_folder_is_used(checkpoint_dir: Path) -> None:
    save_prompt_style(Alpaca(), checkpoint_dir)
    assert type(LLM.load(checkpoint_dir, distribute=None).prompt_style) is Alpaca


def test_state_dict_has_the_names_of_the_model(llm: LLM) -> None:
    assert llm.state_dict().keys() == llm.model.state_dict().keys()
    zeros = {name: torch.zeros_like(value) for name, value in llm.state_dict().items()}
    llm.load_state_dict(zeros)
    assert not llm.model.lm_head.weight.any()
    with pytest.raises(RuntimeError, match="lm_head"):
        llm.load_state_dict({name: value for name, value in zeros.items() if name != "lm_head.weight"})


def test_trainer_setup_takes_all_weights_or_none(checkpoint_dir: Path, tmp_path: Path) -> None:
    llm = LLM.load(checkpoint_dir, distribute=None)
    llm.trainer_setup()
    assert llm.model.training and llm.model.lm_head.weight.dtype is torch.float32
    assert torch.equal(llm.model.lm_head.weight, load_weights(checkpoint_dir)["lm_head.weight"])

    trained = {f"llm.model.{name}": value + 1 for name, value in llm.state_dict().items()}
    torch.save({"state_dict": trained, "epoch": 1}, tmp_path / "trainer.ckpt")
    llm.trainer_setup(tmp_path / "trainer.ckpt")
    assert torch.equal(llm.model.lm_head.weight, load_weights(checkpoint_dir)["lm_head.weight"] + 1)

    del trained["llm.model.transformer.wte.weight"]
    torch.save({"state_dict": trained}, tmp_path / "trainer.ckpt")
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        llm.trainer_setup(tmp_path / "trainer.ckpt")
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "trainer.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of a Trainer"):
        llm.trainer_setup(tmp_path / "trainer.ckpt")


def test_benchmark_generates_once_an_iteration(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, generate = [], llm.generate
    monkeypatch.setattr(llm, "generate", lambda **kwargs: calls.append(kwargs) or generate(**kwargs))
    text, figures = llm.benchmark(num_iterations=3, prompt="The dog", max_new_tokens=5, temperature=0)
    assert len(calls) == 3 and text == generate("The dog", max_new_tokens=5, temperature=0)
    assert figures["Tokens generated"] == [5, 5, 5] and "Seconds to first token" not in figures
    speeds = [n / s for n, s in zip(figures["Tokens generated"], figures["Seconds total"])]
    assert figures["Inference speed in tokens/sec"] == pytest.approx(speeds)
    _, figures = llm.benchmark(prompt="The dog", max_new_tokens=5, stream=True)
    assert 0 < figures["Seconds to first token"][0] <= figures["Seconds total"][0]


def test_pull_request_benchmark_prints_two_tables(checkpoint_dir: Path, capsys: pytest.CaptureFixture) -> None:
    api.pull_request_benchmark_util(str(checkpoint_dir), num_iterations=2)
    out = capsys.readouterr().out
    assert out.count("| Inference speed in tokens/sec |") == 2 and out.count("Seconds to first token") == 1


def test_preprocessor_gives_ids_on_its_device_and_text(tiny_tokenizer_dir: Path) -> None:
    preprocessor = Preprocessor(Tokenizer(tiny_tokenizer_dir), device="cpu")
    ids = preprocessor.encode("The dog")
    assert ids.device.type == "cpu" and preprocessor.decode(ids) == "The dog"


def test_number_of_devices_counts_lists() -> None:
    assert [calculate_number_of_devices(d) for d in (2, [0], [0, 3])] == [2, 1, 2]


def test_fabric_is_made_when_it_is_asked_for(llm: LLM) -> None:
    assert llm.fabric.device.type == "cpu"
    assert llm.fabric is llm.fabric


def test_llm_is_found_without_heavy_imports() -> None:
    assert litgpt.LLM is LLM and "LLM" in litgpt.__all__
    code = "import sys, json, litgpt.api; print(json.dumps([m.partition('.')[0] for m in sys.modules]))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"lightning", "transformers", "huggingface_hub", "safetensors", "tokenizers", "gguf"} & set(loaded)


def test_config_json_beside_a_tokenizer_is_not_saved_with_another_model(
    tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 0}')
    llm = LLM.load("pythia-14m", init="random", tokenizer_dir=tmp_path / "tokenizer")
    llm.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    assert (tmp_path / "saved" / "generation_config.json").is_file()
