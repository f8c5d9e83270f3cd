"""The parts of a `config.json` that a single key does not say, read and written by a pair of functions each.

`read_..(hf, own, values)` gives fields of ours. `hf` holds the keys of the model type's row in their types, `own` the
fields known so far, `values` the untyped rest. `write_..(config, family)` gives keys; those that the row lacks are
dropped by the caller.
"""

from collections.abc import Mapping
from typing import Any

from litgpt.checkpoint.hf_families import GELUS, ROPE_KEYS, Family
from litgpt.config import Config, rope_kind

_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


class Lacking(Exception):
    """Names a feature that our model does not have."""


def typed(value: Any, key: str, kind: type) -> Any:
    """`value` as `kind`; null stands for a whole number in the table."""
    nouns = {bool: "true or false", str: "text", list: "a list", dict: "a map", float: "a number of sensible size"}
    if kind in (bool, str, list, dict) and type(value) is kind:
        return value
    if kind not in nouns and type(value) in (int, float) and 0 <= value < 2**40 and value == int(value):
        return int(value)
    if kind is float and type(value) in (int, float) and -1e15 < value < 1e15:
        return float(value)
    raise ValueError(f"{key} is {str(value)[:60]}; it must be {nouns.get(kind, 'a whole number of sensible size')}")


def rounded(value: Any) -> Any:
    """`value`, a float in it without the noise of a calculation."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def read_attention(hf: dict[str, Any], own: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    n_embd, n_head, found = own["n_embd"], own["n_head"], {}
    if "num_key_value_heads" in hf and hf["num_key_value_heads"] is None:
        found["n_query_groups"] = n_head
    if "kv_lora_rank" in hf:
        found["latent_attention"] = {key: hf[key] for key in _LATENT_KEYS}
        if sizes := [f"{key} {size}" for key, size in found["latent_attention"].items() if size == 0]:
            raise ValueError(f"{sizes[0]} makes no sense")
        found["head_size"] = (
            None if n_head and n_embd % n_head == 0 else hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
        )
    elif "head_dim" not in hf and values.get("head_dim") not in (None, n_embd // max(n_head, 1)):
        raise Lacking(f"head_dim {str(values['head_dim'])[:60]}, other than hidden_size / num_attention_heads")
    if "attention_multiplier" in hf:
        if not 1e-9 < hf["attention_multiplier"] < 1e9:
            raise ValueError(f"attention_multiplier is {hf['attention_multiplier']}; it must be between 1e-9 and 1e9")
        found["attention_scores_scalar"] = rounded(hf["attention_multiplier"] ** -2)
    if "no_rope_layers" in hf:
        found["nope_indices"] = _nope_flags(hf)
    qkv = hf.get("attention_bias")
    if qkv is None:
        return found
    rest = hf.get("attention_out_bias", qkv) if "mlp_bias" in hf else False
    if rest != hf.get("mlp_bias", False) or (rest and not qkv):
        raise Lacking("biases in some layers only: " + ", ".join(f"{k} {hf[k]}" for k in hf if k.endswith("_bias")))
    return found | {"bias": rest, "attn_bias": qkv and not rest}


def write_attention(config: Config, family: Family) -> dict[str, Any]:
    keys: dict[str, Any] = dict(config.latent_attention or {})
    if config.head_size * config.n_head != config.n_embd or family.keys.get("head_dim"):
        keys["head_dim"] = config.head_size
    else:
        keys["head_dim"] = None  # transformers works it out
    scalar = config.attention_scores_scalar or config.head_size
    return keys | {
        "attention_bias": config.bias or config.attn_bias,
        "attention_out_bias": config.bias,
        "mlp_bias": config.bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attention_multiplier": rounded(scalar**-0.5),
        "no_rope_layers": [1 - no_rope for no_rope in config.nope_indices or [0] * config.n_layer],
    }


def read_block(hf: dict[str, Any], own: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Which norms a block with parallel residuals has, and the sizes that Falcon derives."""
    if "use_qkv_bias" in hf:
        return {"shared_attention_norm": hf["use_parallel_residual"]}
    if "new_decoder_architecture" not in hf:
        return {}
    is_new, n_norms = hf["new_decoder_architecture"], hf["num_ln_in_parallel_attn"]
    if not is_new and n_norms == 2:
        raise Lacking("num_ln_in_parallel_attn 2 without new_decoder_architecture")
    groups = (hf["num_kv_heads"] or own["n_head"]) if is_new else 1 if hf["multi_query"] else own["n_head"]
    inner = hf["ffn_hidden_size"] or 4 * own["n_embd"]
    shared = not is_new or n_norms == 1
    return {"n_query_groups": groups, "shared_attention_norm": shared, "intermediate_size": inner}


def write_block(config: Config, family: Family) -> dict[str, Any]:
    shared, groups = config.shared_attention_norm, config.n_query_groups
    is_new = not shared or groups not in (1, config.n_head)
    return {
        "new_decoder_architecture": is_new,
        "num_ln_in_parallel_attn": (1 if shared else 2) if is_new else None,
        "num_kv_heads": groups if is_new else config.n_head,
        "multi_query": is_new or groups == 1,
    }


def read_mlp(hf: dict[str, Any], own: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    key = next(key for key in ("hidden_act", "hidden_activation", "activation") if key in hf)
    kind, gelu = own.get("mlp_class_name", "GptNeoxMLP"), GELUS.get(hf[key])
    if hf[key] in ("silu", "swish") and kind != "GptNeoxMLP":
        return {"mlp_class_name": "LLaMAMLP" if kind == "GemmaMLP" else kind}
    if gelu and kind != "LLaMAMoE":
        return {"mlp_class_name": "GptNeoxMLP" if kind == "GptNeoxMLP" else "GemmaMLP", "gelu_approximate": gelu}
    raise Lacking(f"the activation {hf[key][:60]!r} in a {kind}")


def write_mlp(config: Config, family: Family) -> dict[str, Any]:
    name = "silu"
    if config.mlp_class_name in ("GptNeoxMLP", "GemmaMLP"):
        default = family.keys.get("hidden_act")  # "gelu_new" is another word for the same
        name = "gelu" if config.gelu_approximate == "none" else "gelu_pytorch_tanh"
        name = default if GELUS.get(default) == config.gelu_approximate else name
    return {"hidden_act": name, "hidden_activation": name, "activation": name}


def read_experts(hf: dict[str, Any], own: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    if "n_group" not in hf:
        if hf.get("norm_topk_prob", True):
            return {}  # the plain router, whose weights always sum to 1
        return {"n_expert_groups": 1, "n_topk_groups": 1, "n_topk_scores_per_group": 1, "router_scoring": "softmax"}
    method = hf.get("topk_method", "group_limited_greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise Lacking(f"topk_method {method[:60]}")
    limited = method != "greedy"
    return {
        "n_expert_per_token": hf["num_experts_per_tok"] or 0,
        "n_expert_groups": (limited and hf["n_group"]) or 1,
        "n_topk_groups": (limited and hf["topk_group"]) or 1,
        "norm_topk_prob": hf.get("norm_topk_prob", False),
    }


def write_experts(config: Config, family: Family) -> dict[str, Any]:
    width = config.moe_intermediate_size or config.intermediate_size
    has_own_width = "moe_intermediate_size" in family.keys
    is_plain = config.mlp_class_name != "LLaMAMoE" or has_own_width
    return {
        "intermediate_size": config.intermediate_size if is_plain else width,
        "moe_intermediate_size": width,
        "n_shared_experts": config.n_shared_expert or 0,
        "first_k_dense_replace": config.first_k_dense_replace or 0,
        "n_group": config.n_expert_groups,
        "topk_group": config.n_topk_groups,
        "topk_method": "greedy" if config.n_expert_groups == 1 else "group_limited_greedy",
        "norm_topk_prob": config.norm_topk_prob or not config.n_expert_groups,
    }


def _nope_flags(hf: Mapping[str, Any]) -> list[int]:
    """1 for each layer without rotary embedding; their list marks the layers that have it."""
    period = max(hf["no_rope_layer_interval"], 1)
    has_rope = hf["no_rope_layers"] or [(i + 1) % period for i in range(hf["num_hidden_layers"])]
    return [int(not rope) for rope in has_rope]


def _layer_flags(hf: Mapping[str, Any]) -> list[int]:
    """1 for each layer that the model type calls a sliding one."""
    n_layer = hf["num_hidden_layers"]
    if (types := hf.get("layer_types")) is not None:
        if other := [t for t in types if t not in ("sliding_attention", "full_attention")]:
            raise Lacking(f"layers of the type {str(other[0])[:60]}")
        return [int(t == "sliding_attention") for t in types]
    if "sliding_window_pattern" in hf:
        period = max(hf["sliding_window_pattern"], 1)
        return [int((i + 1) % period != 0) for i in range(n_layer)]
    if "no_rope_layers" in hf:
        return _nope_flags(hf)
    return [int(i >= hf.get("max_window_layers", 0)) for i in range(n_layer)]


def read_windows(hf: dict[str, Any], own: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    size = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    return {"sliding_window_size": size, "sliding_window_indices": _layer_flags(hf) if size else None}


def write_windows(config: Config, family: Family) -> dict[str, Any]:
    flags = config.sliding_window_indices if config.sliding_window_size else None
    flags = flags or (config.rope_indices if config.rope_local_base_freq else None) or [0] * config.n_layer
    size = config.sliding_window_size if any(flags) else None
    return {
        "sliding_window": size,
        "use_sliding_window": size is not None,
        "max_window_layers": flags.index(1) if 1 in flags else config.n_layer,
        "layer_types": ["sliding_attention" if flag else "full_attention" for flag in flags],
        "sliding_window_pattern": flags.index(0) + 1 if 0 in flags else config.n_layer + 1,
    }


def read_rope(hf: dict[str, Any], own: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_theta` beside `rope_scaling`, and all in `rope_parameters`."""
    theta, share = ("rotary_emb_base", "rotary_pct") if "rotary_pct" in hf else ("rope_theta", "partial_rotary_factor")
    scaling, params = (typed(values.get(key) or {}, key, dict) for key in ("rope_scaling", "rope_parameters"))
    by_layer = {"full_attention", "sliding_attention"} & params.keys()
    has_local = "rope_local_base_freq" in hf
    if params and has_local != bool(by_layer):
        raise Lacking(f"rope_parameters {'by' if by_layer else 'that are not by'} full_attention and sliding_attention")
    full, local = (
        typed(params.get(f"{kind}_attention") or {}, "rope_parameters", dict) for kind in ("full", "sliding")
    )
    params = full | scaling if has_local else scaling or params
    said = (params.get("partial_rotary_factor"), values.get(share), hf.get(share, 1.0))
    rotated = next(value for value in said if value is not None)
    if share not in hf and rotated != 1:
        raise Lacking(f"{share} {str(rotated)[:60]}")
    base = _base(params.get("rope_theta") or hf[theta])
    if base != int(base):
        raise Lacking(f"{theta} {base}, which is not whole")
    found = {"rope_base": int(base), "rope_adjustments": _read_scaling(params, hf, values)}
    found["rotary_percentage"] = typed(rotated, share, float)
    if has_local:
        local_base = _base(local.get("rope_theta") or hf["rope_local_base_freq"] or base)
        if _scaling_kind(local) != "default":
            raise Lacking(f"rope_type {_scaling_kind(local)[:60]} in windowed layers")
        if local_base != base or found["rope_adjustments"]:
            found |= {"rope_local_base_freq": local_base, "rope_indices": _layer_flags(hf)}
    return found


def _base(value: Any) -> float:
    if not typed(value, "rope_theta", float) > 1:
        raise ValueError(f"rope_theta is {value}; it must be above 1")
    return float(value)


def _scaling_kind(params: Mapping[str, Any]) -> str:
    return str(params.get("rope_type", params.get("type", "default")))


def _read_scaling(params: Mapping[str, Any], hf: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_adjustments` for what transformers calls `rope_scaling` or `rope_parameters`."""
    kind, is_phi = _scaling_kind(params), "original_max_position_embeddings" in hf
    if is_phi:  # its first files call it by other names
        kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
    if kind not in ROPE_KEYS or (is_phi and kind not in ("default", "longrope")):
        raise Lacking(f"rope_type {kind[:60]}; known are {', '.join(ROPE_KEYS)}")
    if odd := [key for key in ("mrope_section", "short_mscale", "long_mscale") if params.get(key)]:
        raise Lacking(f"{odd[0]} of the rotary embedding")
    if kind == "default":
        return None
    found = {key: params[key] for key in ROPE_KEYS[kind] if params.get(key) is not None}
    for key, value in found.items():
        numbers = typed(value, key, list) if key in ("short_factor", "long_factor") else [value]
        if key == "truncate":
            typed(value, key, bool)
        elif any(typed(number, key, float) <= 0 and "mscale" not in key for number in numbers):
            raise ValueError(f"{key} of the rotary embedding is {str(value)[:60]}; it must be above 0")
    length = hf["max_position_embeddings"]
    if kind != "linear":  # what stands beside the other keys wins over what stands among them
        original = hf.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        original = original or params.get("original_max_position_embeddings") or length
        found["original_max_seq_len"] = typed(original, "original_max_position_embeddings", int)
        if found["original_max_seq_len"] < 2:
            raise ValueError(f"original_max_position_embeddings is {original}; it must be above 1")
        found.setdefault("factor", length / found["original_max_seq_len"])
    if kind == "yarn":
        found = {"beta_fast": 32.0, "beta_slow": 1.0} | found
    return found


def write_rope(config: Config, family: Family) -> dict[str, Any]:
    adjustments = dict(config.rope_adjustments or {})
    kind = rope_kind(config.rope_adjustments) or "default"
    if config.rope_condense_ratio != 1 and kind in ("default", "linear"):
        kind, adjustments = "linear", {"factor": config.rope_condense_ratio * adjustments.get("factor", 1.0)}
    original = adjustments.pop("original_max_seq_len", None)
    params = {"rope_type": kind, **adjustments} | ({"original_max_position_embeddings": original} if original else {})
    keys: dict[str, Any] = {"rope_theta": float(config.rope_base), "rope_scaling": params if adjustments else None}
    if "original_max_position_embeddings" in family.keys and kind == "longrope":
        # transformers 4 wants these three and nothing else for Phi-3
        keys["original_max_position_embeddings"] = original
        keys["rope_scaling"] = {"type": kind} | {key: adjustments[key] for key in ("short_factor", "long_factor")}
        if rounded(float(adjustments["factor"])) != rounded(config.block_size / original):
            keys["rope_scaling"]["factor"] = adjustments["factor"]
        if "attention_factor" in adjustments:
            keys["rope_scaling"]["attention_factor"] = adjustments["attention_factor"]
    if "rotary_pct" in family.keys:
        keys = {"rotary_emb_base": keys["rope_theta"], "rotary_pct": config.rotary_percentage} | keys
    elif "partial_rotary_factor" in family.keys:
        keys["partial_rotary_factor"] = config.rotary_percentage
    if "rope_local_base_freq" in family.keys:  # transformers 5 would not find the second base by the older keys alone
        local = float(config.rope_local_base_freq or config.rope_base)
        full = params | {"rope_theta": keys["rope_theta"]}
        sliding = {"rope_type": "default", "rope_theta": local}
        keys |= {
            "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
            "rope_local_base_freq": local,
        }
    return keys
