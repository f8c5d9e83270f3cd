import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt.adapter import adapter_filter, add_adapter
from litgpt.adapter_v2 import adapter_filter as adapter_v2_filter
from litgpt.adapter_v2 import add_adapter_v2
from litgpt.checkpoint.io import save_torch
from litgpt.config import Config, save_config
from litgpt.finetune import adapter as finetune_adapter
from litgpt.finetune import adapter_v2 as finetune_adapter_v2
from litgpt.finetune import full as finetune_full
from litgpt.generate import adapter, adapter_v2, full
from litgpt.generate.adapter import load_adapter
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.tokenizer import Tokenizer

from .test_base import write_tokenizer

METHODS = {
    "full": (full, lambda model: model, lambda key, value: True, "lit_model.pth"),
    "adapter": (adapter, add_adapter, adapter_filter, "lit_model.pth.adapter"),
    "adapter_v2": (adapter_v2, add_adapter_v2, adapter_v2_filter, "lit_model.pth.adapter_v2"),
}
GREEDY = dict(temperature=0, precision="32-true", max_new_tokens=12)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder)
    torch.manual_seed(3)
    config = Config(name="tiny", n_layer=3, n_embd=32, n_head=4, block_size=400, vocab_size=257, padded_vocab_size=260)
    save_config(config, folder)
    weights = {name: torch.randn_like(tensor) * 0.3 for name, tensor in GPT(config).state_dict().items()}
    save_torch({"model": weights}, folder / "lit_model.pth")
    return folder


@pytest.fixture(params=METHODS)
def tuned(request, base_dir, tmp_path):
    """A method, its command, the model that it tuned, and the folder `final` with what finetuning writes there."""
    module, add, is_part, name = METHODS[request.param]
    model = GPT(Config.from_checkpoint(base_dir))
    model.load_state_dict(torch.load(base_dir / "lit_model.pth", weights_only=True)["model"])
    model = add(model).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if is_part(key, None):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    final = tmp_path / "final"
    final.mkdir()
    save_torch({"model": {k: v for k, v in model.state_dict().items() if is_part(k, None)}}, final / name)
    return request.param, module.main, model, final


def answer_of(model, folder, text, n):
    """Greedy answer to a prompt as it is, by the model without a cache."""
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.encode(text).long()[None]
    idx = prompt
    for _ in range(n):
        token = model(idx)[:, -1].argmax(-1, keepdim=True)
        if token.item() == tokenizer.eos_id:
            break
        idx = torch.cat((idx, token), dim=1)
    return tokenizer.decode(idx[0, prompt.size(1) :])


@pytest.mark.parametrize("style", [None, "alpaca", "codellama"])
def test_the_answer_of_the_tuned_model_is_printed_alone_for_any_style(base_dir, tuned, capsys, style):
    method, main, model, final = tuned
    text = "Where?"
    if style == "alpaca":
        save_prompt_style("alpaca", final)
        text = PromptStyle.from_name("alpaca").apply("Where?", input="Here.")
    elif style is not None:
        save_prompt_style(style, final)
        text = PromptStyle.from_name(style).apply("Where?")
    path = {"full": "finetuned_path"}.get(method, "adapter_path")
    main(base_dir, "Where?", "Here." if style else "", **{path: final}, **GREEDY)
    out = capsys.readouterr()
    expected = answer_of(model, base_dir, text, 12)
    assert out.out == expected + "\n" and len(expected) > 5
    assert "tokens/s" in out.err


def test_file_and_folder_are_both_taken_and_quantised_models_answer(base_dir, tuned, capsys):
    method, main, _, final = tuned
    path = {"full": "finetuned_path"}.get(method, "adapter_path")
    main(base_dir, "Where?", **{path: final / METHODS[method][3]}, **GREEDY, stream=False)
    from_file = capsys.readouterr().out
    main(base_dir, "Where?", **{path: final}, **GREEDY)
    assert capsys.readouterr().out == from_file
    pytest.importorskip("bitsandbytes")
    main(base_dir, "Where?", **{path: final}, **GREEDY, quantize="bnb.int8")
    assert len(capsys.readouterr().out) > 5


@pytest.mark.parametrize("method", METHODS)
def test_missing_weights_are_named_with_the_command_that_writes_them(base_dir, tmp_path, method):
    path = {"full": "finetuned_path"}.get(method, "adapter_path")
    with pytest.raises(FileNotFoundError, match=rf"none is not there: name the file that finetune_{method} wrote"):
        METHODS[method][0].main(base_dir, **{path: tmp_path / "none"})


@pytest.mark.parametrize(
    ("command", "tuning", "path"),
    [(full, finetune_full, "finetuned_path"), (adapter, finetune_adapter, "adapter_path"),
     (adapter_v2, finetune_adapter_v2, "adapter_path")],
)  # fmt: skip
def test_default_path_is_where_finetuning_writes_by_default(command, tuning, path):
    out_dir = inspect.signature(tuning.setup).parameters["out_dir"].default
    kinds = [kind for kind in vars(tuning).values() if getattr(kind, "__module__", "") == tuning.__name__]
    (name,) = {kind.weights_name for kind in kinds if hasattr(kind, "weights_name")} or {"lit_model.pth"}
    assert inspect.signature(command.main).parameters[path].default == Path(out_dir) / "final" / name


def test_size_and_first_layer_come_from_the_file(tmp_path):
    config = Config(n_layer=4, n_embd=16, n_head=2, vocab_size=20, padded_vocab_size=20, block_size=16)
    model = add_adapter(GPT(config), prompt_length=3, start_layer=1).eval()
    for name, parameter in model.named_parameters():
        if "gating" in name:
            nn.init.normal_(parameter)
    weights = model.state_dict()
    save_torch({"model": {n: v for n, v in weights.items() if adapter_filter(n, None)}}, tmp_path / "a")
    other = GPT(config).eval()
    other.load_state_dict({n: v for n, v in weights.items() if not adapter_filter(n, None)})
    load_adapter(other, tmp_path / "a", add_adapter, adapter_filter)
    idx = torch.arange(8)[None]
    assert torch.equal(other(idx), model(idx))


@pytest.mark.parametrize("wrong", ["width", "layers", "method"])
def test_an_adapter_of_another_model_or_method_is_refused_in_one_line(tmp_path, wrong):
    sizes = dict(n_layer=4, n_embd=16, n_head=2, vocab_size=20, padded_vocab_size=20, block_size=16)
    add = add_adapter_v2 if wrong == "method" else add_adapter
    theirs = add(GPT(Config(**sizes | {"width": {"n_embd": 32}, "layers": {"n_layer": 6}}.get(wrong, {}))))
    weights = {name: value for name, value in theirs.state_dict().items() if adapter_v2_filter(name, None)}
    if wrong != "method":
        weights = {name: value for name, value in weights.items() if adapter_filter(name, None)}
    save_torch({"model": weights}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not fit the model .* belongs to another model or") as caught:
        load_adapter(GPT(Config(**sizes)), tmp_path / "a", add_adapter, adapter_filter)
    assert "\n" not in str(caught.value)
