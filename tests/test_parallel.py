from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from litgpt.checkpoint.io import load_torch, save_torch
from litgpt.config import Config
from litgpt.model import GPT, Block
from litgpt.parallel import build_strategy, full_state, is_sharded, load_full_optimizer_state


class OtherBlock(Block):
    pass


class OtherGPT(GPT):
    block_class = OtherBlock


def test_one_device_needs_no_strategy_and_processes_on_a_cpu_are_replicas(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build_strategy(1) == "auto"
    assert build_strategy(2) == build_strategy(1, num_nodes=2) == "ddp"


@pytest.mark.parametrize("num_nodes, sharding", [(1, "FULL_SHARD"), (2, "HYBRID_SHARD")])
@pytest.mark.parametrize(
    "model_class, block", [(GPT, Block), (OtherGPT, OtherBlock), (torch.nn.Linear, Block), (None, Block)]
)
def test_gpus_shard_by_the_blocks_of_the_model(monkeypatch, num_nodes, sharding, model_class, block):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    strategy = build_strategy(4, num_nodes, model_class)
    assert type(strategy).__name__ == "FSDPStrategy"
    assert strategy.sharding_strategy.name == sharding
    assert strategy._fsdp_kwargs["auto_wrap_policy"]._module_classes == {block}


SIZES = dict(n_layer=2, n_embd=32, n_head=4, block_size=16, vocab_size=60, padding_multiple=64)


@pytest.fixture
def process_group(monkeypatch):
    """A group of one process, which is enough for FSDP to cut weights flat."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(is_sharded):
    """A model and its optimizer after two steps, and the fabric that has them."""
    torch.manual_seed(0)
    model = GPT(Config(**SIZES))
    model.init_weights()
    if is_sharded:
        policy, cpu = ModuleWrapPolicy({Block}), torch.device("cpu")
        model = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    step(model, optimizer)
    strategy = type("FSDPStrategy" if is_sharded else "SingleDeviceStrategy", (), {})()
    return model, optimizer, SimpleNamespace(strategy=strategy)


def step(model, optimizer):
    idx = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))
    loss, n = model(idx[:, :-1], targets=idx[:, 1:])
    (loss / n).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("written", [False, True], ids=["from-one", "from-sharded"])
@pytest.mark.parametrize("read", [False, True], ids=["to-one", "to-sharded"])
def test_state_goes_from_one_device_to_a_sharded_run_and_back(process_group, tmp_path, written, read):
    model, optimizer, fabric = trained(written)
    weights, state = full_state(fabric, model, optimizer)
    assert "transformer.h.1.attn.qkv.weight" in weights
    save_torch({"model": weights, "optimizer": state}, tmp_path / "x.pth")
    payload = load_torch(tmp_path / "x.pth")

    other, other_optimizer, other_fabric = trained(read)
    other_optimizer.state.clear()
    load_full_optimizer_state(other_fabric, other, other_optimizer, payload["optimizer"])
    step(model, optimizer)
    step(other, other_optimizer)
    expected, found = full_state(fabric, model, optimizer)[0], full_state(other_fabric, other, other_optimizer)[0]
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)


def test_state_of_another_model_is_refused():
    _, optimizer, fabric = trained(False)
    state = optimizer.state_dict()
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="param"):
        load_full_optimizer_state(fabric, other, torch.optim.AdamW(other.parameters()), state)
    assert not is_sharded(fabric)
