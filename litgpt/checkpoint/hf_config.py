"""Hugging Face's `config.json` to our `Config` and back.

Keys that only have another name come from the table in `hf_families`, the rest from the pairs of functions in
`hf_parts`. A config.json is untrusted: a feature that our model lacks is refused by its name, values are checked, and
code that it points to (`auto_map`) is never run.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from litgpt.checkpoint.hf_families import (
    ALIASES,
    FAMILIES,
    FIELDS,
    KINDS,
    LIMITS,
    NEUTRAL_AT_ONE,
    NEVER,
    NULL,
    OF_ALL_PARTS,
    OTHER_NAMES,
    Family,
)
from litgpt.checkpoint.hf_parts import (
    Lacking,
    read_attention,
    read_block,
    read_experts,
    read_mlp,
    read_rope,
    read_windows,
    rounded,
    typed,
    write_attention,
    write_block,
    write_experts,
    write_mlp,
    write_rope,
    write_windows,
)
from litgpt.config import Config, nearest, rope_kind

_MAX_FILE_BYTES = 1 << 20  # the largest known ones have a tenth of it; parsed it may be twenty times as large
_NO_MATHS = {"name", "hf_config", "vocab_size", "padding_multiple", "dropout"}


class UnsupportedArchitecture(ValueError):
    """A config.json of an architecture that is not in the table."""


def read_hf_config(folder_or_file: str | Path, is_quiet: bool = False) -> dict[str, Any]:
    """The values of a `config.json`; of a model with several parts those of its text part, with a notice.

    Args:
        folder_or_file: The file, or the folder that it is in.
        is_quiet: Leave the notice out, where the file is read once more.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON object, or too large for a config.
    """
    path = Path(folder_or_file)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: a Hugging Face folder describes its model in config.json")
    if (size := path.stat().st_size) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; a config.json has at most {_MAX_FILE_BYTES:,}")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object; fetch it again")
    return _text_part(values, is_quiet)


def folder_name(folder: str | Path) -> str:
    """What a folder is called, also where the path is `.` or ends in `..`: prompt styles go by the name."""
    return name if (name := Path(folder).name) not in ("", "..") else Path(folder).resolve().name


def config_from_hf(values: Mapping[str, Any], name: str | None = None) -> Config:
    """The config of the model that a `config.json` describes.

    Args:
        values: From `read_hf_config`.
        name: What to call it. Of a named config the name, hub id and count of tokens are kept; the rest says `values`.

    Raises:
        UnsupportedArchitecture: The architecture is not in the table.
        ValueError: It asks for a feature that our model lacks, or a value makes no sense.
    """
    values = _text_part(values)
    model_type, family = _find_family(values)
    try:
        return Config(**_read_fields(values, family) | _identity(name))
    except Lacking as error:
        raise ValueError(f"config.json ({model_type}) asks for what litgpt does not have: {error}") from None
    except ValueError as error:
        raise ValueError(f"config.json ({model_type}): {error}") from None


def _read_fields(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """All fields of ours that a `config.json` decides."""
    _check_features(values, family)
    hf = _read_keys(values, family)
    own = {ours: hf[theirs] for theirs, ours in FIELDS.items() if theirs in hf}
    _check_sizes(own)
    own |= {key: None for key in NEUTRAL_AT_ONE if own.get(key) == 1.0}
    own["vocab_size"] = own["padded_vocab_size"]
    plain = {f.name: f.default for f in fields(Config)}
    shared = {f.name: f.default for f in fields(family.kind) if f.default != plain[f.name]}
    shared = {"norm_unit_offset": False, "norm_affine": True} | shared | family.fixed
    for read in (read_attention, read_block, read_mlp, read_experts, read_windows, read_rope):
        own |= read(hf, shared | own, values)
    return shared | own


def config_to_hf(
    config: Config,
    model_type: str,
    dtype: Any = None,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """What a `config.json` has to say so that transformers, 4 or 5, builds the same model.

    Args:
        config: Of a model that `model_type` can express.
        model_type: One of transformers', such as `llama`.
        dtype: Of the weights, torch's or its name.
        bos_token_id: Of the tokenizer; null where it is not given, as are the others: what transformers takes by
            default belongs to another tokenizer.
        eos_token_id: One or several.
        pad_token_id: Usually none.

    Raises:
        ValueError: The model type cannot say what the config says; the message names the fields.
    """
    model_type, family = _find_family({"model_type": model_type})
    own = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    own |= {key: own[key] or 1.0 for key in NEUTRAL_AT_ONE}
    for write in (write_attention, write_block, write_mlp, write_experts, write_windows):
        own |= write(config, family)
    values = {"architectures": [family.architecture], "model_type": model_type}
    values |= {key: own[key] for key in family.keys if key in own and (own[key] is not None or key in NULL)}
    values |= write_rope(config, family) | family.also
    values |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if dtype is not None:
        values["dtype"] = values["torch_dtype"] = str(dtype).removeprefix("torch.")
    try:
        again = _meaning(Config(**_read_fields(values, family)))
    except (Lacking, ValueError) as error:
        raise ValueError(f"the model cannot be written as {model_type}: {error}") from None
    if lost := [key for key, value in _meaning(config).items() if again.get(key) != value]:
        raise ValueError(f"the model cannot be written as {model_type}, which cannot say its {', '.join(lost)}")
    return values


def hf_dtype(values: Mapping[str, Any]) -> str | None:
    """Name of the dtype that a `config.json` states for its weights, such as `bfloat16`, in either spelling."""
    value = values.get("dtype") or values.get("torch_dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else None


# ---- what is read: the part, the row, the features, the types


def _text_part(values: Mapping[str, Any], is_quiet: bool = False) -> dict[str, Any]:
    text = values.get("text_config")
    if text is None:
        return dict(values)
    if not isinstance(text, dict):
        raise ValueError(f"config.json: text_config is {str(text)[:60]!r}; it must be a map of keys")
    others = [key.removesuffix("_config") for key in values if key.endswith("_config") and key not in OF_ALL_PARTS]
    others.remove("text")
    if not is_quiet:
        parts = f", {' and '.join(others)} left out" if others else ""
        model_type = str(values.get("model_type"))[:60]
        warnings.warn(f"of this {model_type} model only the text part is used{parts}", stacklevel=3)
    outer = {key: values[key] for key in ("model_type", *OF_ALL_PARTS) if key in values}
    return outer | {key: value for key, value in text.items() if key != "text_config"}


def _find_family(values: Mapping[str, Any]) -> tuple[str, Family]:
    model_type, classes = values.get("model_type"), values.get("architectures")
    classes = [c.casefold() for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    if model_type is None:
        by_class = {family.architecture.casefold(): name for name, family in FAMILIES.items()}
        model_type = next((by_class[c] for c in classes if c in by_class), classes[0] if classes else None)
    model_type = str(ALIASES.get(str(model_type), model_type))
    if (family := FAMILIES.get(model_type)) is None:
        close = nearest(model_type, FAMILIES)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        raise UnsupportedArchitecture(
            f"the architecture {model_type[:60]!r} is not supported{hint} Known are {', '.join(FAMILIES)}"
        )
    known = {family.architecture.casefold()}
    known |= {f"{whole}forconditionalgeneration" for whole, text in ALIASES.items() if text == model_type}
    if classes and known.isdisjoint(classes):
        raise UnsupportedArchitecture(
            f"{classes[0][:60]} is not supported for {model_type}, only {family.architecture}"
        )
    return model_type, family


def _check_features(values: Mapping[str, Any], family: Family) -> None:
    for key, allowed in (NEVER | family.only).items():
        if (value := values.get(key)) is not None and value not in allowed:
            raise Lacking(f"{key} {str(value)[:60]}")
    quantization = values.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise Lacking(f"weights quantized by {str(method)[:60]}; take the repository with the plain ones")
    if quantization.get("weight_block_size") != [128, 128]:
        raise Lacking(f"fp8 weights in blocks of {str(quantization.get('weight_block_size'))[:60]}, only of [128, 128]")


def _read_keys(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The keys of `family`, in their types, with the defaults of transformers where they are missing."""
    hf = {}
    for key, default in family.keys.items():
        spelling = key if key in values else OTHER_NAMES.get(key, key)
        value = values.get(spelling, default)
        value = default if value is None and key not in NULL else value
        hf[key] = None if value is None else typed(value, key, KINDS.get(key) or type(default))
    return hf


def _check_sizes(own: Mapping[str, Any]) -> None:
    """Nothing may be built, not even a list of layers, before sizes are known to be sane."""
    for key, limit in LIMITS.items():
        if (own.get(key) or 0) > limit:
            raise ValueError(f"{key} would be {own[key]:,}; up to {limit:,} makes sense")
    if own["n_layer"] * (own.get("n_expert") or 0) > 2**20:
        raise ValueError(f"{own['n_layer']:,} layers of {own['n_expert']:,} experts make no sense")


def _identity(name: str | None) -> dict[str, Any]:
    """Fields that config.json does not decide, for the model `name`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            named = Config.from_name(name or "")
        except ValueError:
            org, _, short = (name or "").rpartition("/")
            return {"name": short, "hf_config": {"org": org, "name": short} if org else {}}
    return {key: getattr(named, key) for key in ("name", "hf_config", "vocab_size", "padding_multiple")}


def _meaning(config: Config) -> dict[str, Any]:
    """What decides the logits: configs that only differ in how they say it are equal in this form."""
    values = {f.name: getattr(config, f.name) for f in fields(Config) if f.name not in _NO_MATHS}
    every = [0] * config.n_layer
    flags = values.pop("sliding_window_indices") or every
    values["sliding_window_size"] = [config.sliding_window_size if flag else None for flag in flags]
    ratio, adjustments = values.pop("rope_condense_ratio"), values.pop("rope_adjustments") or {}
    if rope_kind(config.rope_adjustments) in (None, "linear") and ratio * adjustments.get("factor", 1) != 1:
        adjustments, ratio = {"factor": ratio * adjustments.get("factor", 1)}, 1
    rope = (config.rope_base, ratio, {k: rounded(float(v) if type(v) is int else v) for k, v in adjustments.items()})
    local, flags = values.pop("rope_local_base_freq"), values.pop("rope_indices") or every
    values["rope_base"] = [rope if local is None or not flag else (local, ratio, {}) for flag in flags]
    values["nope_indices"] = config.nope_indices or every
    values |= {key: values[key] or 1.0 for key in NEUTRAL_AT_ONE}
    width = config.qk_head_dim if config.latent_attention else config.head_size
    values["attention_scores_scalar"] = rounded(float(config.attention_scores_scalar or width))
    if config.latent_attention:
        values |= {"head_size": None, "rotary_percentage": None}
    else:
        values["attn_bias"] = config.attn_bias or config.bias
    if not config.norm_qk:
        del values["norm_qk_type"]
    if config.mlp_class_name not in ("GptNeoxMLP", "GemmaMLP"):
        del values["gelu_approximate"]
    values["norm_2"] = config.norm_2 or config.shared_attention_norm
    return values | _meaning_of_experts(config)


def _meaning_of_experts(config: Config) -> dict[str, Any]:
    """What `_meaning` makes of the fields about experts; null where they decide nothing."""
    groups, dense = config.n_expert_groups, config.first_k_dense_replace or 0
    has_experts = config.mlp_class_name == "LLaMAMoE"
    found = {
        "n_expert": config.n_expert,
        "n_shared_expert": config.n_shared_expert or 0,
        "n_expert_per_token": config.n_expert_per_token,
        "moe_intermediate_size": config.moe_intermediate_size or config.intermediate_size,
        "first_k_dense_replace": dense,
        "n_expert_groups": groups,
        "n_topk_groups": groups and config.n_topk_groups,
        "n_topk_scores_per_group": (config.n_topk_scores_per_group or 2) if (groups or 1) > 1 else None,
        "routed_scaling_factor": groups and config.routed_scaling_factor,
        "norm_topk_prob": not groups or config.norm_topk_prob,
        "router_scoring": groups and config.router_scoring,
    }
    inner = None if has_experts and not dense else config.intermediate_size
    return {"intermediate_size": inner} | {key: value if has_experts else None for key, value in found.items()}
