"""Weights there and back: layout, laziness, what is skipped, what is refused."""

import warnings

import pytest
import torch
from tiny_hf import FAMILIES, config_of, save_hf_model

from litgpt.checkpoint.adapter import StateDictAdapter, lit_shapes
from litgpt.checkpoint.tensors import LazyTensor, open_weights, write_safetensors, write_torch
from litgpt.model import GPT

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def adapter_of(family, **overrides):
    return StateDictAdapter(config_of(family, **overrides), family.split(",")[0])


def lazy(tensors):
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


def read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def random_file(adapter):
    """A file of that family with random values."""
    return {name: torch.randn(shape) for name, shape in adapter.hf_shapes().items()}


def random_ours(adapter):
    tied = adapter.config.tie_embeddings
    return {n: torch.randn(s) for n, s in lit_shapes(adapter.config).items() if n != HEAD or not tied}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_byte_equal(family):
    adapter = adapter_of(family)
    ours = random_ours(adapter)
    there = adapter.to_hf(lazy(ours))
    assert {n: tensor.shape for n, tensor in there.items()} == adapter.hf_shapes()
    assert_same(read(adapter.from_hf(there)), ours)
    assert_same(read(adapter.from_hf(lazy(read(there)))), ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_transformers_goes_through_a_model_and_back_byte_equal(family, tmp_path):
    adapter = adapter_of(family)
    written = open_weights(save_hf_model(family.split(",")[0], adapter.config, tmp_path))
    model = GPT(adapter.config)
    model.load_state_dict(read(adapter.from_hf(written)))
    assert_same(read(adapter.to_hf(lazy(model.state_dict()))), read(written))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "falcon", "deepseek_v3", "glm4"])
def test_weights_come_back_byte_equal_through_files_of_both_kinds(family, tmp_path):
    adapter = adapter_of(family)
    ours = random_ours(adapter)
    (tmp_path / "hf").mkdir()
    write_torch(tmp_path / "lit_model.pth", lazy(ours))
    write_safetensors(tmp_path / "hf", adapter.to_hf(open_weights(tmp_path / "lit_model.pth")))
    back = adapter.from_hf(open_weights(tmp_path / "hf"))
    assert_same(read(back), ours)
    whole = {n: torch.cat([piece.clone() for piece in t.iter_pieces()]).view(t.shape) for n, t in back.items()}
    assert_same(whole, ours)
    assert_same({n: t.view() for n, t in back.items() if t.view}, {n: ours[n] for n in ours if back[n].view})


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_before_a_weight_is_asked_for(family):
    def unread():
        raise AssertionError("read")

    adapter = adapter_of(family)
    there = {n: LazyTensor(s, torch.float32, unread, view=unread) for n, s in adapter.hf_shapes().items()}
    back = adapter.to_hf(adapter.from_hf(there))
    assert {n: t.shape for n, t in back.items()} == adapter.hf_shapes()


def test_query_key_and_value_follow_each_other():
    adapter = adapter_of("llama")
    file = random_file(adapter)
    qkv = adapter.from_hf(lazy(file))["transformer.h.1.attn.qkv.weight"].read()
    q, k, v = (file[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(qkv[:32], q) and torch.equal(qkv[32:48], k) and torch.equal(qkv[48:], v)


@pytest.mark.parametrize(
    "family, prefix", [("gpt_neox", "gpt_neox.layers.0.attention"), ("falcon", "transformer.h.0.self_attention")]
)
def test_interleaved_heads_are_sorted_into_queries_keys_and_values(family, prefix):
    adapter = adapter_of(family)
    heads, groups, size = 4, adapter.config.n_query_groups, adapter.config.head_size
    file = random_file(adapter)
    ours = adapter.from_hf(lazy(file))
    for leaf in ("weight", "bias") if family == "gpt_neox" else ("weight",):
        fused = file[f"{prefix}.query_key_value.{leaf}"].split(size)
        queries, keys, values = [], [], []
        for group in range(groups):
            block = fused[group * (heads // groups + 2) :][: heads // groups + 2]
            queries += block[:-2]
            keys.append(block[-2])
            values.append(block[-1])
        assert torch.equal(ours[f"transformer.h.0.attn.qkv.{leaf}"].read(), torch.cat(queries + keys + values))


def test_gate_and_up_projection_are_the_halves_of_a_fused_one_and_are_cut_without_copying():
    adapter = adapter_of("phi3")
    file = random_file(adapter)
    ours, fused = adapter.from_hf(lazy(file)), file["model.layers.0.mlp.gate_up_proj.weight"]
    assert torch.equal(ours["transformer.h.0.mlp.fc_1.weight"].read(), fused[:48])
    assert torch.equal(ours["transformer.h.0.mlp.fc_2.weight"].read(), fused[48:])
    view = ours["transformer.h.0.mlp.fc_2.weight"].view()
    assert view.data_ptr() == fused[48:].data_ptr()


def test_one_half_of_a_fused_projection_is_read_from_disk_without_the_other(tmp_path, monkeypatch):
    adapter = adapter_of("phi3")
    write_safetensors(tmp_path, lazy(random_file(adapter)))
    ours = adapter.from_hf(open_weights(tmp_path))["transformer.h.0.mlp.fc_2.weight"]
    asked = []
    monkeypatch.setattr(torch, "empty", lambda shape, **kw: asked.append(tuple(shape)) or torch.zeros(shape, **kw))
    ours.read()
    assert asked == [(48, 32)]


def test_a_renamed_weight_is_the_same_object_so_that_tied_ones_stay_one():
    adapter = adapter_of("llama")
    file = lazy(random_file(adapter))
    assert adapter.from_hf(file)["transformer.h.0.attn.proj.weight"] is file["model.layers.0.self_attn.o_proj.weight"]


def test_parts_of_unlike_dtype_take_the_wider_one():
    adapter = adapter_of("llama")
    file = {n: t.bfloat16() if "q_proj" in n else t for n, t in random_file(adapter).items()}
    qkv = adapter.from_hf(lazy(file))["transformer.h.0.attn.qkv.weight"]
    assert qkv.dtype == qkv.read().dtype == torch.float32
    assert torch.equal(qkv.read()[:32], file["model.layers.0.self_attn.q_proj.weight"].float())


def test_weights_in_the_old_layout_of_0_5_are_exported_too():
    config = config_of("llama")
    adapter, model = StateDictAdapter(config, "llama"), GPT(config_of("llama"))
    old = {n.replace(".attn.qkv.", ".attn.attn."): torch.randn_like(t) for n, t in model.state_dict().items()}
    model.load_state_dict(old)
    assert_same(read(adapter.to_hf(lazy(old))), read(adapter.to_hf(lazy(model.state_dict()))))


# --- tied heads


def test_a_tied_head_is_not_written_and_may_be_missing_or_there():
    adapter = adapter_of("gemma")
    ours = random_ours(adapter)
    assert "lm_head.weight" not in adapter.to_hf(lazy(ours))
    file = read(adapter.to_hf(lazy(ours)))
    assert HEAD not in adapter.from_hf(lazy(file))
    with_head = file | {"lm_head.weight": ours[EMBEDDING]}
    assert torch.equal(adapter.from_hf(lazy(with_head))[HEAD].read(), ours[EMBEDDING])


def test_a_tied_head_that_was_trained_apart_is_not_dropped_silently():
    adapter = adapter_of("gemma")
    ours = random_ours(adapter)
    same = adapter.to_hf(lazy(ours | {HEAD: ours[EMBEDDING].clone()}))
    assert torch.equal(same["model.embed_tokens.weight"].read(), ours[EMBEDDING])
    apart = adapter.to_hf(lazy(ours | {HEAD: ours[EMBEDDING] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight and transformer.wte.weight differ.*tie_embeddings: false"):
        apart["model.embed_tokens.weight"].read()


def test_a_missing_head_of_an_untied_config_is_explained():
    adapter = adapter_of("llama")
    file = random_file(adapter)
    del file["lm_head.weight"]
    with pytest.raises(
        ValueError, match=r"missing: lm_head.weight; if the head is the embedding.*tie_embeddings: true"
    ):
        adapter.from_hf(lazy(file))


# --- other spellings, and what is left out


@pytest.mark.parametrize("old, new", [("model.", "language_model.model."), ("model.", "model.language_model.")])
def test_the_text_part_of_a_multimodal_file_is_taken_and_the_rest_named(old, new):
    adapter = adapter_of("gemma3_text", tie_embeddings=False)
    file = random_file(adapter)
    nested = {n.replace(old, new, 1) if n.startswith(old) else n: t for n, t in file.items()}
    if new == "language_model.model.":
        nested["language_model.lm_head.weight"] = nested.pop("lm_head.weight")
    prefix = "model." if new.startswith("model.") else ""
    nested |= {f"{prefix}vision_tower.embeddings.patch_embedding.weight": torch.zeros(2, dtype=torch.int8)}
    nested |= {f"{prefix}multi_modal_projector.mm_input_projection_weight": torch.zeros(2)}
    with pytest.warns(UserWarning, match="2 tensors of the weights are left out: the vision part"):
        ours = adapter.from_hf(lazy(nested))
    assert_same(read(ours), read(adapter.from_hf(lazy(file))))


@pytest.mark.parametrize("family, base", [("llama", "model."), ("gpt_neox", "gpt_neox."), ("falcon", "transformer.")])
def test_the_base_model_saved_without_its_head_class_is_read(family, base):
    adapter = adapter_of(family, tie_embeddings=True)
    file = random_file(adapter)
    bare = {n.removeprefix(base): t for n, t in file.items()}
    assert bare.keys() != file.keys()
    assert_same(read(adapter.from_hf(lazy(bare))), read(adapter.from_hf(lazy(file))))


def test_buffers_that_old_files_carry_are_skipped_without_a_word():
    neox, llama = adapter_of("gpt_neox"), adapter_of("llama")
    layer = "gpt_neox.layers.0.attention."
    extra = {f"{layer}bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), f"{layer}masked_bias": torch.ones(())}
    extra |= {f"{layer}rotary_emb.inv_freq": torch.ones(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neox.from_hf(lazy(random_file(neox) | extra))
        llama.from_hf(lazy(random_file(llama) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))


def test_the_head_of_gpt_neox_is_read_under_both_of_its_names():
    adapter = adapter_of("gpt_neox")
    file = random_file(adapter)
    other = {n.replace("embed_out", "lm_head"): t for n, t in file.items()}
    assert_same(read(adapter.from_hf(lazy(other))), read(adapter.from_hf(lazy(file))))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_stacked_experts_are_read_as_single_ones(family, tmp_path):
    from safetensors.torch import save_file
    from tiny_hf import build_hf_model

    adapter = adapter_of(family)
    model = build_hf_model(family, adapter.config)
    model.save_pretrained(tmp_path)
    live = model.state_dict()
    assert any(name.endswith("experts.gate_up_proj") for name in live)
    save_file(live, tmp_path / "live.safetensors")
    single = adapter.from_hf(open_weights(tmp_path / "model.safetensors"))
    assert_same(read(adapter.from_hf(open_weights(tmp_path / "live.safetensors"))), read(single))


def test_layers_that_predict_several_tokens_are_left_out_with_a_notice():
    adapter = adapter_of("deepseek_v3")
    file = random_file(adapter)
    layer = {n.replace("layers.2.", "layers.3."): t for n, t in file.items() if ".layers.2." in n}
    layer |= {f"model.layers.3.{n}.weight": torch.zeros(2) for n in ("eh_proj", "enorm", "hnorm", "embed_tokens")}
    with pytest.warns(UserWarning, match=f"{len(layer)} tensors of the weights are left out: layers that predict"):
        ours = adapter.from_hf(lazy(file | layer))
    assert ours.keys() == lit_shapes(adapter.config).keys()


# --- FP8 in blocks


def test_fp8_weights_are_dequantised_inside_fused_projections_and_of_all_experts(tmp_path):
    adapter = adapter_of("deepseek_v3")
    file = {}
    for name, tensor in random_file(adapter).items():
        if "_proj" in name:
            file |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 0.5)}
        else:
            file[name] = tensor
    write_safetensors(tmp_path, lazy(file))
    ours = read(adapter.from_hf(open_weights(tmp_path)))
    expert = file["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert torch.equal(ours["transformer.h.1.mlp.experts.3.proj.weight"], (expert.float() / 2).bfloat16())
    llama = adapter_of("llama")
    file = random_file(llama)
    for x in "qkv":
        name = f"model.layers.0.self_attn.{x}_proj.weight"
        file |= {name: file[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 2.0)}
    qkv = llama.from_hf(lazy(file))["transformer.h.0.attn.qkv.weight"].read()
    parts = [file[f"model.layers.0.self_attn.{x}_proj.weight"].float() * 2 for x in "qkv"]
    assert torch.equal(qkv, torch.cat(parts).bfloat16())


# --- what is refused


def refusal(adapter, file):
    with pytest.raises(ValueError) as caught:
        adapter.from_hf(lazy(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_tensor_is_named_with_the_nearest_rule():
    adapter = adapter_of("llama")
    message = refusal(adapter, random_file(adapter) | {"model.layers.0.self_attn.q_porj.weight": torch.ones(1)})
    assert "`model.layers.0.self_attn.q_porj.weight` is unknown" in message
    assert "nearest: `model.layers.{}.self_attn.q_proj.weight`" in message


def test_many_unknown_tensors_are_counted_and_missing_ones_named():
    adapter = adapter_of("llama")
    file = random_file(adapter)
    for i in range(5):
        file[f"strange.{i}.thing"] = torch.ones(1)
    del file["model.layers.1.mlp.up_proj.weight"], file["model.norm.weight"]
    message = refusal(adapter, file)
    assert "2 more are" in message and "missing: model.norm.weight, model.layers.1.mlp.up_proj.weight" in message


def test_more_layers_than_the_config_has_are_refused():
    bigger = adapter_of("llama", n_layer=3)
    assert "`model.layers.2.input_layernorm.weight` is unknown (beyond the 2 layers" in refusal(
        adapter_of("llama"), random_file(bigger)
    )
    fewer = {n: t for n, t in random_file(adapter_of("deepseek_v3", n_layer=4)).items() if "lm_head" not in n}
    assert "beyond the 3 layers" in refusal(adapter_of("deepseek_v3"), fewer)


@pytest.mark.parametrize(
    "config, file, said",
    [
        ("llama", "gpt_neox", "the names are those of gpt_neox"),
        ("gpt_neox", "falcon", "the names are those of falcon"),
        ("llama", "mixtral", "the names are those of mixtral"),
        ("phi3", "llama", "the names are those of llama"),
        ("llama", "phi3", "the names are those of phi3"),
        ("qwen3", "gemma2", "the names are those of gemma2"),
        ("qwen3_moe", "deepseek_v3", "the names are those of deepseek_v2"),
    ],
)
def test_names_of_another_family_are_recognised(config, file, said):
    message = refusal(adapter_of(config), random_file(adapter_of(file)))
    assert f"not those of the {config} model" in message and said in message


def test_a_bias_that_the_config_lacks_is_unknown():
    assert "`model.layers.0.self_attn.q_proj.bias` is unknown (nearest: `model.layers.{}.self_attn.q_proj.weight`)" in (
        refusal(adapter_of("llama"), random_file(adapter_of("qwen2")))
    )


def test_an_unexpected_shape_is_named_with_the_expected_one():
    adapter = adapter_of("llama")
    file = random_file(adapter)
    file["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    assert "`model.layers.1.self_attn.k_proj.weight` (32, 32) not (16, 32)" in refusal(adapter, file)
    assert "(80, 32) not (64, 32)" in refusal(adapter, random_file(adapter_of("llama", padded_vocab_size=80)))


def test_quantised_and_integer_weights_are_refused():
    adapter = adapter_of("llama")
    file = random_file(adapter)
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"`{name}` is torch.uint8" in refusal(adapter, file | {name: torch.zeros(48, 32, dtype=torch.uint8)})


def test_a_weight_that_is_there_under_two_names_is_refused():
    adapter = adapter_of("gpt_neox")
    file = random_file(adapter)
    message = refusal(adapter, file | {"lm_head.weight": file["embed_out.weight"]})
    assert "`embed_out.weight` is there twice, also as `lm_head.weight`" in message


def test_our_weights_are_checked_on_the_way_out():
    adapter = adapter_of("llama")
    ours = random_ours(adapter)
    lacking = {n: t for n, t in ours.items() if n != "transformer.h.1.norm_2.weight"}
    with pytest.raises(ValueError, match=r"missing: transformer.h.1.norm_2.weight"):
        adapter.to_hf(lazy(lacking))
    with pytest.raises(
        ValueError, match=r"`transformer.h.0.attn.qvk.weight` is unknown \(nearest: `.*attn.qkv.weight`"
    ):
        adapter.to_hf(lazy(ours | {"transformer.h.0.attn.qvk.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"`transformer.ln_f.weight` \(3,\) not \(32,\)"):
        adapter.to_hf(lazy(ours | {"transformer.ln_f.weight": torch.zeros(3)}))
