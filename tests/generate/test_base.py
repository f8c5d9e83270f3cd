import inspect
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt import registry
from litgpt.checkpoint.io import save_torch
from litgpt.config import Config, save_config
from litgpt.generate import base
from litgpt.generate.base import (
    Decoder,
    batched_generate_fn,
    batched_next_token,
    batched_sample,
    generate,
    generate_fn,
    main,
    multinomial_num_samples_1,
    next_token,
    sample,
)
from litgpt.model import GPT
from litgpt.objective import Objective
from litgpt.prompts import save_prompt_style
from litgpt.tokenizer import Tokenizer


class Script(nn.Module):
    """Says the same tokens to everyone: after the prompt of length T comes `text[T:]`, whatever was sampled."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, idx):
        logits = torch.zeros(*idx.shape, 10)
        for t in range(idx.size(1)):
            for row in range(idx.size(0)):
                text = self.text[row] if isinstance(self.text[0], list) else self.text
                logits[row, t, text[t + 1]] = 100.0
        return logits


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def run(text, n_prompt, stops=(), include_prompt=False, include_eos=False, max_returned_tokens=None):
    stream = generate_fn(
        Script(text), torch.tensor(text[:n_prompt]), max_returned_tokens or len(text), temperature=0, stop_tokens=stops,
        include_prompt=include_prompt, include_eos=include_eos,
    )  # fmt: skip
    return [tokens.tolist() for tokens in stream]


# ---------------------------------------------------------------- published functions


def test_sample_reads_the_last_position_of_the_first_row():
    logits = torch.randn(2, 3, 7)
    assert sample(logits, temperature=0).tolist() == [logits[0, -1].argmax().item()]
    assert sample(logits, top_p=0).shape == (1,)
    assert sample(logits, temperature=1.0, top_k=1, top_p=0.5).dtype == torch.int64
    with pytest.raises(ValueError, match=r"top_p 1\.5 is outside \[0, 1\]"):
        sample(logits, top_p=1.5)


def test_multinomial_keeps_the_last_dimension():
    probs = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert multinomial_num_samples_1(probs).tolist() == [[1], [0]]
    assert multinomial_num_samples_1(probs[0]).tolist() == [1]


def test_next_token_and_batched_forms_agree():
    torch.manual_seed(0)
    config = Config(n_layer=1, n_embd=16, n_head=2, block_size=16, vocab_size=20, padded_vocab_size=20)
    model = GPT(config)
    model.set_kv_cache(batch_size=2)
    idx, input_pos = torch.randint(20, (2, 5)), torch.arange(5)
    both = batched_next_token(model, input_pos, idx, {"temperature": 0})
    expected = model(idx)[:, -1].argmax(-1, keepdim=True)
    assert torch.equal(both, expected)
    assert next_token(model, input_pos, idx[:1], input_pos_maxp1=5, temperature=0).tolist() == expected[0].tolist()
    logits = list(torch.randn(2, 1, 20).split(1))
    assert batched_sample(logits, [{"temperature": 0}, {"top_k": 1}]).shape == (2, 1)
    with pytest.raises(ValueError, match="2 rows of logits but 1"):
        batched_sample(logits, [{}])


TEXT = [7, 8, 1, 1, 2, 3, 1, 2, 9]


@pytest.mark.parametrize(
    ("stops", "without_eos", "with_eos"),
    [
        ((), [1, 1, 2, 3, 1, 2, 9], [1, 1, 2, 3, 1, 2, 9]),
        (([3],), [1, 1, 2], [1, 1, 2, 3]),
        (([1, 2],), [1], [1, 1, 2]),
        (([1, 2, 9],), [1, 1, 2, 3], [1, 1, 2, 3, 1, 2, 9]),
        (([1, 2, 4], [2, 3]), [1, 1], [1, 1, 2, 3]),
        (([8, 1],), [1, 1, 2, 3, 1, 2, 9], [1, 1, 2, 3, 1, 2, 9]),
        (([9, 9],), [1, 1, 2, 3, 1, 2, 9], [1, 1, 2, 3, 1, 2, 9]),
    ],
    ids=str,
)
def test_generation_ends_with_a_stop_sequence(stops, without_eos, with_eos):
    assert flat(run(TEXT, 2, stops)) == without_eos
    assert flat(run(TEXT, 2, stops, include_eos=True)) == with_eos
    assert flat(run(TEXT, 2, stops, include_prompt=True)) == TEXT[:2] + without_eos
    assert all(len(token) == 1 for token in run(TEXT, 2, stops))


def test_prompt_comes_first_and_whole():
    assert run(TEXT, 2, include_prompt=True)[0] == TEXT[:2]


def test_no_more_than_asked_for_is_generated():
    assert flat(run(TEXT, 2, max_returned_tokens=5, include_prompt=True)) == TEXT[:5]


def test_generate_returns_one_tensor_up_to_eos():
    prompt = torch.tensor(TEXT[:2])
    arguments = dict(temperature=0, eos_id=3)
    assert generate(Script(TEXT), prompt, 9, **arguments).tolist() == TEXT[:6]
    assert generate(Script(TEXT), prompt, 9, include_prompt=False, **arguments).tolist() == TEXT[2:6]
    assert generate(Script(TEXT), prompt, 9, include_eos=False, **arguments).tolist() == TEXT[:5]
    assert generate(Script(TEXT), prompt, 3, temperature=0).tolist() == TEXT[:3]
    empty = generate(Script([7, 3]), prompt[:1], 2, temperature=0, eos_id=3, include_prompt=False, include_eos=False)
    assert empty.shape == (0,) and empty.dtype == torch.int64


def test_same_seed_same_text_and_another_seed_another():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=1, n_embd=16, n_head=2, block_size=32, vocab_size=50, padded_vocab_size=50))
    model.set_kv_cache(batch_size=1)

    def text(seed):
        return generate(model, torch.tensor([1]), 30, rng=torch.Generator().manual_seed(seed)).tolist()

    assert text(1) == text(1) != text(2)


ROWS = [[7, 8, 1, 1, 2, 3, 3, 3], [6, 5, 4, 3, 1, 2, 9, 9], [6, 5, 1, 4, 1, 4, 1, 4]]


def run_batch(**kwargs):
    arguments = dict(sample_args={"temperature": 0}, stop_tokens=([1, 2],), include_prompt=False, include_eos=False)
    stream = batched_generate_fn(Script(ROWS), torch.tensor(ROWS)[:, :2], 8, **{**arguments, **kwargs})
    return [[None if entry is None else entry.tolist() for entry in step] for step in stream]


def joined(steps, row):
    return flat(step[row] or [] for step in steps)


def test_batch_rows_end_each_on_their_own():
    steps = run_batch()
    assert [joined(steps, row) for row in range(3)] == [[1], [4, 3], [1, 4, 1, 4, 1, 4]]
    steps = run_batch(include_eos=True)
    assert [joined(steps, row) for row in range(3)] == [[1, 1, 2], [4, 3, 1, 2], [1, 4, 1, 4, 1, 4]]
    assert all(len(step) == 3 for step in steps)
    assert steps[3:] and all(step[0] is None for step in steps[3:])


def test_batch_prompts_come_column_by_column_and_end_when_all_rows_have():
    steps = run_batch(include_prompt=True, stop_tokens=([1],))
    assert steps[:2] == [[[7], [6], [6]], [[8], [5], [5]]]
    assert steps[2:] == [[None, [4], None], [None, [3], None], [None, None, None]]


def test_batch_equals_single_rows_of_a_model():
    torch.manual_seed(0)
    model = GPT(Config(n_layer=2, n_embd=16, n_head=2, block_size=32, vocab_size=50, padded_vocab_size=50))
    model.set_kv_cache(batch_size=3)
    prompts = torch.randint(50, (3, 4))
    settings = dict(temperature=0.0)
    steps = list(
        batched_generate_fn(model, prompts, 12, sample_args=[settings] * 3, include_prompt=True, include_eos=True)
    )
    for row in range(3):
        assert (
            torch.cat([step[row] for step in steps]).tolist() == generate(model, prompts[row], 12, **settings).tolist()
        )
    with pytest.raises(ValueError, match="3 prompts but 1 sets"):
        next(batched_generate_fn(model, prompts, 12, sample_args=[{}], include_prompt=True, include_eos=True))


# ---------------------------------------------------------------- litgpt generate


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    """A tiny GPT as `litgpt pretrain` leaves it: compiled names, weights under `model`, a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "final"
    folder.mkdir()
    write_tokenizer(folder)
    torch.manual_seed(3)
    config = Config(name="tiny", n_layer=2, n_embd=32, n_head=4, block_size=64, vocab_size=257, padded_vocab_size=260)
    save_config(config, folder)
    weights = {f"_orig_mod.{name}": torch.randn_like(tensor) * 0.3 for name, tensor in GPT(config).state_dict().items()}
    save_torch({"model": weights, "optimizer": {"state": {}}, "iter_num": 7}, folder / "lit_model.pth")
    return folder


def write_tokenizer(folder):
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HFTokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def spoken(capsys, *args, **kwargs):
    capsys.readouterr()
    main(*args, **kwargs)
    return capsys.readouterr()


def reference_text(folder, prompt, n):
    """Greedy continuation in float32 by the plain model."""
    model = GPT(Config.from_checkpoint(folder))
    weights = torch.load(folder / "lit_model.pth", weights_only=True)["model"]
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()})
    tokenizer = Tokenizer(folder)
    idx = tokenizer.encode(prompt).long()[None]
    for _ in range(n):
        token = model(idx)[:, -1].argmax(-1, keepdim=True)
        if token.item() == tokenizer.eos_id:
            break
        idx = torch.cat((idx, token), dim=1)
    return tokenizer.decode(idx)


@pytest.mark.parametrize("stream", [True, False])
def test_main_prints_the_text_to_stdout_and_the_rest_to_stderr(checkpoint_dir, capsys, stream):
    out = spoken(capsys, checkpoint_dir, "Once", temperature=0, precision="32-true", max_new_tokens=30, stream=stream)
    expected = reference_text(checkpoint_dir, "Once", 30)
    assert out.out == expected + "\n" and expected.startswith("Once") and len(expected) > 10
    lines = out.err.splitlines()
    assert lines[0].startswith("Time to load the model: ")
    assert lines[1].startswith("Time for inference 1: ") and lines[1].endswith(" tokens/s")


@pytest.mark.parametrize("stream", [True, False])
def test_main_prints_while_it_generates(checkpoint_dir, monkeypatch, stream):
    events = []

    class Watched(Decoder):
        def step(self, token):
            events.append("step")
            return super().step(token)

    monkeypatch.setattr(base, "Decoder", Watched)
    monkeypatch.setattr("builtins.print", lambda *args, file=None, **kwargs: file or events.append("print"))
    main(checkpoint_dir, "a", temperature=0, precision="32-true", max_new_tokens=10, stream=stream)
    n_before_the_last_step = events[: len(events) - events[::-1].index("step")].count("print")
    assert events.count("step") == 9
    assert n_before_the_last_step > 3 if stream else n_before_the_last_step == 0


def test_main_draws_by_seed(checkpoint_dir, capsys):
    texts = {seed: spoken(capsys, checkpoint_dir, "a", seed=seed, top_k=None).out for seed in (1, 2)}
    assert texts[1] == spoken(capsys, checkpoint_dir, "a", seed=1, top_k=None).out != texts[2]
    default = spoken(capsys, checkpoint_dir, "a")
    assert default.out == spoken(capsys, checkpoint_dir, "a", seed=1234).out


def test_main_gives_several_samples(checkpoint_dir, capsys):
    out = spoken(capsys, checkpoint_dir, "a", num_samples=3, max_new_tokens=12, top_k=None)
    assert out.err.count("Time for inference") == 3
    alone = spoken(capsys, checkpoint_dir, "a", num_samples=1, max_new_tokens=12, top_k=None).out
    assert out.out.startswith(alone) and len(out.out) > 2 * len(alone)


def test_main_stops_at_a_string_of_the_answer_without_printing_it(checkpoint_dir, capsys):
    whole = reference_text(checkpoint_dir, "Once", 30)
    answer = whole.removeprefix("Once")
    stop = answer[8:11]
    arguments = dict(temperature=0, precision="32-true", max_new_tokens=30)
    out = spoken(capsys, checkpoint_dir, "Once", stop=["Once", stop, "not there"], **arguments).out
    assert out == "Once" + answer[: answer.index(stop)] + "\n"


@pytest.mark.parametrize("precision", [None, "bf16-true", "bf16-mixed", "64-true"])
def test_main_runs_in_other_precisions(checkpoint_dir, capsys, precision):
    assert spoken(capsys, checkpoint_dir, "a", precision=precision, max_new_tokens=5).out.startswith("a")


def test_main_uses_the_prompt_style_of_the_folder(checkpoint_dir, capsys, tmp_path):
    for file in checkpoint_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    save_prompt_style("flan", tmp_path)
    seen = []
    encode = Tokenizer.encode

    class Spy(Tokenizer):
        def encode(self, text, *args, **kwargs):
            seen.append(text)
            return encode(self, text, *args, **kwargs)[-20:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "Tokenizer", Spy)
        spoken(capsys, tmp_path, "Where?", max_new_tokens=2)
    assert len(seen) == 1 and "Where?" in seen[0] and len(seen[0]) > len("Where?") + 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(top_p=1.5), r"top_p 1\.5 is outside \[0, 1\]"),
        (dict(max_new_tokens=0), "max_new_tokens 0 is below 1"),
        (dict(num_samples=0), "num_samples 0 is below 1"),
        (dict(quantize="bnb.nf4", precision="bf16-mixed"), "quantize bnb.nf4 does not go with precision bf16-mixed"),
        (dict(quantize="bnb.int8-training"), "quantize 'bnb.int8-training' is not known here: choose bnb.nf4"),
        (dict(precision="fp8"), "precision 'fp8' is not known: choose 32-true"),
        (dict(precision="32-mixed"), "precision '32-mixed' is not known"),
        (dict(prompt=""), "the prompt is empty: its text gives no tokens"),
        (dict(prompt="x" * 70), r"a prompt of 70 tokens and 50 .*context \(block_size\) is 64: shorten the prompt$"),
        (dict(prompt="x" * 30), r"need 79, but .* is 64: shorten the prompt or ask for at most 35 new tokens"),
    ],
)
def test_main_refuses_bad_input_in_one_line_before_loading(checkpoint_dir, monkeypatch, arguments, message):
    monkeypatch.setattr(base, "load_model", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message) as caught:
        main(checkpoint_dir, **arguments)
    assert "\n" not in str(caught.value)


def test_main_names_what_is_wrong_with_a_folder(checkpoint_dir, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(tmp_path / "none")
    assert "no such folder" in capsys.readouterr().err
    for name in ("lit_model.pth", "model_config.yaml"):
        (tmp_path / name).write_bytes((checkpoint_dir / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        main(tmp_path)
    write_tokenizer(tmp_path)
    save_config(Config(n_layer=2, n_embd=32, n_head=4, block_size=128, vocab_size=60, padded_vocab_size=60), tmp_path)
    with pytest.raises(ValueError, match="the model knows only 60: they do not belong together"):
        main(tmp_path, "zebra")
    save_config(Config(n_layer=3, n_embd=32, n_head=4, block_size=128, vocab_size=260, padded_vocab_size=260), tmp_path)
    with pytest.raises(ValueError, match=r"config does not fit its weights") as caught:
        main(tmp_path)
    assert "transformer.h.2.norm_1.weight" in str(caught.value) and "\n" not in str(caught.value)


class Echo(Objective):
    """A family that answers with the prompt read backwards."""

    def predict(self, model, prompt, max_new_tokens, rng=None):
        answer = prompt.flip(1)[:, :max_new_tokens]
        ids = torch.cat((prompt, answer, prompt), dim=1)
        return {"ids": ids, "lengths": torch.tensor([prompt.size(1) + answer.size(1)]), "steps": 1}


class BareConfig(Config):
    pass


class BareModel(nn.Module):
    """No GPT: no cache, and a buffer that no checkpoint holds."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head = nn.Embedding(config.padded_vocab_size, config.padded_vocab_size)
        self.register_buffer("shift", torch.arange(config.padded_vocab_size).float(), persistent=False)
        self.scale = 1.0 if config.n_layer == 1 else torch.ones(1).item()

    def forward(self, idx):
        return self.scale * self.head(idx) + self.shift.to(self.head.weight.dtype)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A checkpoint of a registered model of one's own, which continues each byte with the byte before it."""
    monkeypatch.setattr(registry, "_models", dict(registry._models))
    monkeypatch.setattr(registry, "_objectives", dict(registry._objectives))
    monkeypatch.setattr(registry, "_sources", dict(registry._sources))

    def write(objective, n_layer=1):
        if not isinstance(objective, str):
            registry.register_objective("own", objective)
            objective = "own"
        registry.register_model("bare", model=BareModel, config=BareConfig, sizes={}, objective=objective)
        config = BareConfig(n_layer=n_layer, n_embd=8, n_head=1, block_size=64, vocab_size=257, padded_vocab_size=257)
        save_config(config, tmp_path)
        weight = torch.zeros(257, 257)
        weight[torch.arange(1, 257), torch.arange(256)] = 1000.0
        save_torch({"head.weight": weight}, tmp_path / "lit_model.pth")
        write_tokenizer(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("n_layer", [1, 2], ids=["builds on meta", "reads tensors while it is built"])
def test_main_decodes_a_model_that_is_no_gpt(own_folder, capsys, n_layer):
    out = spoken(capsys, own_folder("next-token", n_layer), "z", temperature=0, max_new_tokens=5).out
    assert out == "zyxwvu\n"


def test_main_lets_an_objective_generate_by_its_own_rule(own_folder, capsys):
    out = spoken(capsys, own_folder(Echo), "abcd", max_new_tokens=3)
    assert out.out == "abcddcb\n" and "Time for inference 1" in out.err


def test_main_says_when_an_objective_cannot_generate(own_folder):
    with pytest.raises(ValueError, match=r"'own' .* does not say how to generate"):
        main(own_folder(Objective))


def test_published_arguments_of_main_keep_order_and_defaults():
    parameters = inspect.signature(main).parameters
    published = dict(
        checkpoint_dir=inspect.Parameter.empty, prompt="What food do llamas eat?", sys_prompt=None, num_samples=1,
        max_new_tokens=50, top_k=50, top_p=1.0, temperature=0.8, quantize=None, precision=None, compile=False,
    )  # fmt: skip
    assert {name: parameters[name].default for name in list(parameters)[: len(published)]} == published
    assert parameters["checkpoint_dir"].annotation is Path
