import pytest
import torch

from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.lora_merge import Update, merge_updates, read_updates
from litgpt.lora import LoRASettings
from litgpt.model import GPT


def counting(tensors, log):
    """Lazy tensors that note when they are read."""

    def lazy(name, tensor):
        def read():
            log.append(name)
            return tensor.clone()

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read)

    return {name: lazy(name, tensor) for name, tensor in tensors.items()}


def test_nothing_is_read_before_it_is_asked_for():
    log, weight = [], torch.randn(6, 4)
    base = counting({"a.weight": weight, "b.weight": weight + 1}, log)
    update = Update(torch.randn(2, 4), torch.randn(3, 2), ((1, 4),), 0.5)
    merged = merge_updates(base, {"a.weight": update}, torch.float64)
    assert log == []
    found = merged["a.weight"].read()
    assert log == ["a.weight"]
    wanted = weight.clone()
    wanted[1:4] += 0.5 * update.B @ update.A
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=1e-6)
    assert merged["b.weight"].read().dtype == torch.float64


def test_weight_that_is_merged_is_left_as_it_was():
    weight = torch.randn(6, 4)
    before = weight.clone()
    Update(torch.randn(2, 4), torch.randn(6, 2), ((0, 6),), 1.0, torch.ones(6)).apply(weight)
    assert torch.equal(weight, before)


def test_tied_weights_stay_one_unless_the_head_has_an_update():
    embedding = LazyTensor.of(torch.randn(6, 4))
    base = {"transformer.wte.weight": embedding, "lm_head.weight": embedding}
    merged = merge_updates(base, {}, torch.bfloat16)
    assert merged["transformer.wte.weight"] is merged["lm_head.weight"]
    update = Update(torch.ones(1, 4), torch.ones(6, 1), ((0, 6),), 1.0)
    merged = merge_updates({"transformer.wte.weight": embedding}, {"lm_head.weight": update})
    torch.testing.assert_close(merged["lm_head.weight"].read(), embedding.read() + 1)
    torch.testing.assert_close(merged["transformer.wte.weight"].read(), embedding.read())


@pytest.mark.parametrize(("change", "match"), [
    ({"drop": "transformer.h.0.attn.qkv.lora_B"}, r"h\.0\.attn\.qkv`: lora_A or lora_B is missing"),
    ({"add": "transformer.h.7.attn.qkv.lora_A"}, r"h\.7\.attn\.qkv`: the model has no such layer"),
    ({"add": "lm_head.weight"}, "more than LoRA's weights: lm_head.weight"), ({"empty": True}, "no weights of LoRA"),
])  # fmt: skip
def test_file_that_does_not_fit_is_explained(tiny_config, change, match):
    config = tiny_config()
    shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    tensors = {
        "transformer.h.0.attn.qkv.lora_A": LazyTensor.of(torch.zeros(4, 32)),
        "transformer.h.0.attn.qkv.lora_B": LazyTensor.of(torch.zeros(64, 2)),
    }
    settings = LoRASettings(r=2)
    assert list(read_updates(tensors, settings, config, shapes)) == ["transformer.h.0.attn.qkv.weight"]
    tensors.pop(change.get("drop"), None)
    tensors |= {change["add"]: LazyTensor.of(torch.zeros(2, 2))} if "add" in change else {}
    with pytest.raises(ValueError, match=match):
        read_updates({} if "empty" in change else tensors, settings, config, shapes)
