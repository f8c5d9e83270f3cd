import pytest
import torch

from litgpt.checkpoint.io import save_torch
from litgpt.config import Config, save_config
from litgpt.generate.full import main
from litgpt.model import GPT

from .test_base import write_tokenizer


def test_only_the_weights_come_from_the_finetuned_file(tmp_path, capsys):
    write_tokenizer(tmp_path)
    config = Config(name="tiny", n_layer=1, n_embd=16, n_head=2, block_size=64, vocab_size=257, padded_vocab_size=260)
    save_config(config, tmp_path)
    letters = {}
    for name, letter in (("lit_model.pth", 5), ("mine.pth", 9)):
        weights = {key: torch.zeros_like(value) for key, value in GPT(config).state_dict().items()}
        weights["transformer.ln_f.bias"] = torch.ones(16)
        weights["lm_head.weight"][letter] = 1  # says the same token for ever
        save_torch({"model": weights}, tmp_path / name)
        main(tmp_path, "a", finetuned_path=tmp_path / name, temperature=0, max_new_tokens=4, precision="32-true")
        letters[name] = capsys.readouterr().out.strip()
    assert len(letters["mine.pth"]) == 4 and len({*letters["mine.pth"]}) == 1
    assert letters["mine.pth"] != letters["lit_model.pth"]


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    write_tokenizer(tmp_path)
    config = Config(name="tiny", n_layer=1, n_embd=16, n_head=2, block_size=64, vocab_size=257, padded_vocab_size=260)
    save_config(config, tmp_path)
    save_torch({"model": GPT(config).state_dict()}, tmp_path / "lit_model.pth")
    config.n_layer = 2
    save_torch({"model": GPT(config).state_dict()}, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=r"mine\.pth do not fit the model") as caught:
        main(tmp_path, "a", finetuned_path=tmp_path / "mine.pth", max_new_tokens=4)
    assert "\n" not in str(caught.value)
