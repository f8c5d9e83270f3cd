"""GGUF files for llama.cpp and what is built on it: one file with weights, settings, tokenizer and chat template.

Letters in shapes: C `n_embd`, V rows of the embedding.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from litgpt.checkpoint.atomic import atomic_file, check_disk_space
from litgpt.checkpoint.gguf_tokenizer import tokenizer_metadata
from litgpt.checkpoint.layouts import join
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.config import Config, rope_kind
from litgpt.model import rope_frequencies

GGUFType = Literal["f16", "bf16", "q8_0"]

_FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32}
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
_BLOCK = 32
"""Numbers in a row that share a scale in q8_0."""
_ALIGNMENT = 32
_PIECE = 2**23
_PHI_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp builds the models of one kind, and what it therefore demands of a config."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config fields that differ from those of a Llama; `...` stands for any value that is set, a tuple for a choice."""
    pairs: bool = False
    """Rotates neighbouring pairs, so that rows of the query and key projection come in another order."""
    fused: bool = False
    """Keeps query, key and value in one tensor, and gate and up too."""
    ropes: tuple[str | None, ...] = (None, "linear", "yarn")
    """Kinds of `rope_adjustments` that it knows."""
    has_head_size: bool = True
    """Allows heads that do not add up to the width of the model."""
    window_period: int | None = None
    """Every such layer sees all, the others a window. None: has no windows."""
    large: int = 0
    """Number of layers of the size whose scores are divided by the root of C / heads instead of the head size."""


_LLAMA = {
    "norm_class_name": "RMSNorm", "norm_affine": True, "norm_unit_offset": False, "norm_1": True, "norm_2": True,
    "norm_qk": False, "post_attention_norm": False, "post_mlp_norm": False, "parallel_residual": False, "bias": False,
    "attn_bias": False, "lm_head_bias": False, "mlp_class_name": "LLaMAMLP", "latent_attention": None, "causal": True,
    "rope_interleave": False, "rotary_percentage": 1.0, "rope_local_base_freq": None, "scale_embeddings": False,
    "attention_logit_softcapping": None, "final_logit_softcapping": None, "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0), "logits_scaling": (None, 1.0), "nope_indices": None,
}  # fmt: skip
_GEMMA = {
    "norm_unit_offset": True, "mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True,
}  # fmt: skip
_POST_NORMS = {"post_attention_norm": True, "post_mlp_norm": True, "sliding_window_size": ...}
_ROPES = (None, "linear", "yarn", "llama3", "longrope")
_PLAIN_LLAMA = Architecture("llama", {"attn_bias": (False, True)}, pairs=True, ropes=_ROPES)
ARCHITECTURES = {
    "llama": _PLAIN_LLAMA,
    "mistral": _PLAIN_LLAMA,
    "qwen2": Architecture("qwen2", {"attn_bias": True}, has_head_size=False),
    "qwen3": Architecture("qwen3", {"norm_qk": True, "norm_qk_type": "default"}),
    "gemma": Architecture("gemma", _GEMMA | {"tie_embeddings": True}, ropes=(None, "linear")),
    "gemma2": Architecture(
        "gemma2",
        _GEMMA | _POST_NORMS
        | {"attention_logit_softcapping": ..., "final_logit_softcapping": ..., "tie_embeddings": True},
        ropes=(None, "linear"), window_period=2, large=46,
    ),
    "gemma3_text": Architecture(
        "gemma3",
        _GEMMA | _POST_NORMS | {
            "norm_qk": True, "norm_qk_type": "default", "rope_local_base_freq": ..., "rope_condense_ratio": 1,
            "final_logit_softcapping": (None, ...),
        },
        ropes=(None, "linear"), window_period=6, large=62,
    ),
    "phi3": Architecture(
        "phi3", {"rotary_percentage": ...}, fused=True, ropes=(None, "longrope"), has_head_size=False
    ),
}  # fmt: skip
"""HF model type -> what llama.cpp has for it."""


def write_gguf(
    path: Path | str,
    weights: Mapping[str, LazyTensor],
    config: Config,
    model_type: str,
    tokenizer_dir: Path | str,
    gguf_type: GGUFType = "f16",
) -> Path:
    """Write one GGUF file, one tensor in memory at a time; `path` is at no moment half written.

    Args:
        path: The file.
        weights: In our names and layout.
        model_type: As Hugging Face calls the kind of model.
        tokenizer_dir: Folder with the tokenizer and its chat template.
        gguf_type: What the matrices are stored as; vectors are always float32.

    Raises:
        ValueError: llama.cpp has no such model, feature or tokenizer.
        ModuleNotFoundError: The package gguf is not installed.
    """
    gguf = _import_gguf()
    architecture = find_architecture(config, model_type)
    tensors = gguf_tensors(weights, config, architecture)
    metadata = gguf_metadata(config, architecture) | {"general.file_type": _FILE_TYPES[gguf_type]}
    metadata |= tokenizer_metadata(tokenizer_dir, tensors["token_embd.weight"].shape[0])
    if not _PHI_TOKENS.issubset(metadata["tokenizer.ggml.tokens"]):  # llama.cpp goes by the name and then asks for them
        metadata["general.name"] = re.sub(r"(?i)phi-?3", "Phi 3", metadata["general.name"])
    if gguf_type == "q8_0":
        metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # not earlier: a refusal leaves nothing behind
    kinds = {name: _kind(name, tensor.shape, gguf_type) for name, tensor in tensors.items()}
    sizes = {name: _n_bytes(tensor.shape, kinds[name]) for name, tensor in tensors.items()}
    check_disk_space(path, sum(sizes.values()))
    with atomic_file(path, sum(sizes.values())) as file:
        writer = gguf.GGUFWriter(file.name, architecture.name)
        for key, value in metadata.items():
            writer.add_key_value(key, value, _value_type(gguf, value))
        for name, tensor in tensors.items():
            raw = getattr(gguf.GGMLQuantizationType, kinds[name].upper())
            writer.add_tensor_info(name, tensor.shape, "<f4", sizes[name], raw)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        file.seek(0, 2)  # the package would take each tensor whole
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for data in _encoded(name, tensor, kinds[name]):
                file.write(data)
        file.write(bytes(-file.tell() % _ALIGNMENT))
    return path


def find_architecture(config: Config, model_type: str) -> Architecture:
    """What llama.cpp has for this model; ValueError names the first setting that it lacks."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"there is no GGUF export for a {model_type} model, only for {', '.join(ARCHITECTURES)}; `--format hf` "
            "writes a folder that transformers and vLLM load"
        )
    architecture = ARCHITECTURES[model_type]
    for key, wanted in {**_LLAMA, **architecture.settings}.items():
        value, choice = getattr(config, key, None), wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in choice and (value is None or ... not in choice):
            _refuse(
                architecture, f"{key} {value!r}, only {' or '.join('a value' if w is ... else repr(w) for w in choice)}"
            )
    if (kind := rope_kind(config.rope_adjustments)) not in architecture.ropes:
        _refuse(architecture, f"{kind} rope_adjustments")
    if kind == "yarn" and not config.rope_adjustments.get("truncate", True):
        _refuse(architecture, "YaRN without truncate")
    if not architecture.has_head_size and config.n_head * config.head_size != config.n_embd:
        _refuse(architecture, f"head_size {config.head_size} other than n_embd / n_head")
    is_large = config.n_layer == architecture.large
    scalar = config.n_embd // config.n_head if is_large else config.head_size
    if (config.attention_scores_scalar or config.head_size) != scalar:
        _refuse(architecture, f"attention_scores_scalar {config.attention_scores_scalar}, only {scalar}")
    if architecture.window_period:
        flags = [int((i + 1) % architecture.window_period != 0) for i in range(config.n_layer)]
        local = config.rope_indices if config.rope_local_base_freq else flags
        if config.sliding_window_indices != flags or local != flags:
            _refuse(architecture, f"windows in other layers than all but every {architecture.window_period}th")
    elif any(config.sliding_window_indices or ()) and config.sliding_window_size < config.block_size:
        warnings.warn(
            f"llama.cpp has no sliding window for {architecture.name} models: beyond {config.sliding_window_size} "
            "tokens its answers differ",
            stacklevel=3,
        )
    return architecture


def _refuse(architecture: Architecture, what: str) -> None:
    raise ValueError(
        f"GGUF export: {architecture.name} models of llama.cpp have no {what}; `--format hf` writes any model"
    )


def gguf_metadata(config: Config, architecture: Architecture) -> dict[str, Any]:
    """Key -> value of what describes the model."""
    values: dict[str, Any] = {
        "vocab_size": config.padded_vocab_size,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_query_groups,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.rope_n_elem,
        "rope.freq_base": float(config.rope_base),
    }
    if config.sliding_window_size is not None:
        values["attention.sliding_window"] = config.sliding_window_size
    for key in ("attention_logit_softcapping", "final_logit_softcapping"):
        if (value := getattr(config, key)) is not None:
            values[key.replace("attention", "attn")] = float(value)
    if config.rope_local_base_freq is not None:
        values["rope.freq_base_swa"] = float(config.rope_local_base_freq)
    values |= {f"rope.scaling.{key}": value for key, value in _rope_scaling(config).items()}
    values = {f"{architecture.name}.{key}": value for key, value in values.items()}
    return {"general.type": "model", "general.name": config.name or architecture.name} | values


def _rope_scaling(config: Config) -> dict[str, Any]:
    adjustments, condense = config.rope_adjustments or {}, float(config.rope_condense_ratio)
    kind = rope_kind(config.rope_adjustments)
    if kind in (None, "llama3") and condense == 1:  # Llama 3's are a tensor, see `_rope_factors`
        return {}
    if kind in (None, "linear"):
        return {"type": "linear", "factor": condense * adjustments.get("factor", 1.0)}
    if condense != 1:
        raise ValueError(f"GGUF export: rope_condense_ratio {condense} together with {kind} rope_adjustments")
    _, scale = rope_frequencies(config.rope_n_elem, config.rope_base, adjustments, config.block_size)
    values = {"type": kind, "original_context_length": int(adjustments["original_max_seq_len"])}
    if kind == "longrope":
        return values | {"attn_factor": float(scale)}
    plain = rope_frequencies(
        config.rope_n_elem,
        config.rope_base,
        {k: v for k, v in adjustments.items() if k in _YARN_KEYS},
        config.block_size,
    )[1]
    values |= {"factor": float(adjustments["factor"]), "attn_factor": float(scale / plain)}
    return values | {f"yarn_{key}": float(adjustments[key]) for key in ("beta_fast", "beta_slow")}


_YARN_KEYS = ("factor", "beta_fast", "beta_slow", "original_max_seq_len")


def _rope_factors(config: Config) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies `(n / 2,)` where they are stored as tensors."""
    kind, adjustments = rope_kind(config.rope_adjustments), config.rope_adjustments
    if kind == "llama3":
        plain, _ = rope_frequencies(config.rope_n_elem, config.rope_base, None, config.block_size)
        changed, _ = rope_frequencies(config.rope_n_elem, config.rope_base, adjustments, config.block_size)
        return {"rope_freqs.weight": plain / changed}
    if kind == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(adjustments[f"{which}_factor"]) for which in ("long", "short")
        }
    return {}


def gguf_tensors(
    weights: Mapping[str, LazyTensor], config: Config, architecture: Architecture
) -> dict[str, LazyTensor]:
    """The tensors by their GGUF names, in the layout of llama.cpp; nothing is read yet.

    Raises:
        ValueError: A tensor is missing, is left over, or has another shape than the config says.
    """
    c, left, out = config, dict(weights), {}
    nh, G, hs, C = c.n_head, c.n_query_groups, c.head_size, c.n_embd
    n_q, n_kv = nh * hs, G * hs

    def take(name: str, *shape: int) -> LazyTensor:
        if name not in left:
            raise ValueError(f"GGUF export: the weights lack {name}")
        if (tensor := left.pop(name)).shape != shape:
            raise ValueError(f"GGUF export: {name} is {tuple(tensor.shape)}, but the config says {shape}")
        return tensor

    def norm(name: str, size: int = C) -> LazyTensor:
        tensor = take(f"{name}.weight", size)
        return _changed(tensor, lambda t: t.float() + 1, torch.float32) if c.norm_unit_offset else tensor

    V = c.padded_vocab_size
    out["token_embd.weight"] = take("transformer.wte.weight", V, C)
    out["output_norm.weight"] = norm("transformer.ln_f")
    if c.tie_embeddings:
        left.pop("lm_head.weight", None)
    else:
        out["output.weight"] = take("lm_head.weight", V, C)
    out |= {name: LazyTensor.of(tensor) for name, tensor in _rope_factors(c).items()}
    for i in range(c.n_layer):
        ours, theirs = f"transformer.h.{i}", f"blk.{i}"
        out[f"{theirs}.attn_norm.weight"] = norm(f"{ours}.norm_1")
        for kind in ("weight", "bias") if c.attn_bias else ("weight",):
            width = (C,) if kind == "weight" else ()
            qkv = take(f"{ours}.attn.qkv.{kind}", n_q + 2 * n_kv, *width)
            if architecture.fused:
                out[f"{theirs}.attn_qkv.{kind}"] = qkv
                continue
            q, k, v = (qkv.span(i * prod(width), (n, *width)) for i, n in ((0, n_q), (n_q, n_kv), (n_q + n_kv, n_kv)))
            if architecture.pairs:
                q, k = (_changed(rows, partial(_pair_rows, n_head=n)) for rows, n in ((q, nh), (k, G)))
            out |= {f"{theirs}.attn_{name}.{kind}": rows for name, rows in (("q", q), ("k", k), ("v", v))}
        if c.norm_qk:
            out[f"{theirs}.attn_q_norm.weight"] = norm(f"{ours}.attn.norm_q", hs)
            out[f"{theirs}.attn_k_norm.weight"] = norm(f"{ours}.attn.norm_k", hs)
        out[f"{theirs}.attn_output.weight"] = take(f"{ours}.attn.proj.weight", C, n_q)
        if c.post_attention_norm:
            out[f"{theirs}.post_attention_norm.weight"] = norm(f"{ours}.post_attention_norm")
        out[f"{theirs}.ffn_norm.weight"] = norm(f"{ours}.norm_2")
        gate, up = (take(f"{ours}.mlp.{fc}.weight", c.intermediate_size, C) for fc in ("fc_1", "fc_2"))
        if architecture.fused:
            out[f"{theirs}.ffn_up.weight"] = join([gate, up])
        else:
            out[f"{theirs}.ffn_gate.weight"], out[f"{theirs}.ffn_up.weight"] = gate, up
        out[f"{theirs}.ffn_down.weight"] = take(f"{ours}.mlp.proj.weight", C, c.intermediate_size)
        if c.post_mlp_norm:
            out[f"{theirs}.post_ffw_norm.weight"] = norm(f"{ours}.post_mlp_norm")
    if left:
        raise ValueError(f"GGUF export: {next(iter(left))} has no place in {architecture.name} models of llama.cpp")
    return out


def _changed(tensor: LazyTensor, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> LazyTensor:
    return LazyTensor(tensor.shape, dtype or tensor.dtype, lambda: change(tensor.read()))


def _pair_rows(rows: Tensor, n_head: int) -> Tensor:
    """Rows `(n_head * hs, ...)` so that those which are rotated together, half a head apart, become neighbours."""
    halves = rows.unflatten(0, (n_head, 2, -1))  # (n_head, 2, hs / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


def _kind(name: str, shape: tuple[int, ...], gguf_type: GGUFType) -> str:
    if len(shape) == 1:
        return "f32"
    return "f16" if gguf_type == "q8_0" and shape[-1] % _BLOCK else gguf_type


def _n_bytes(shape: tuple[int, ...], kind: str) -> int:
    n = prod(shape)
    return n // _BLOCK * (_BLOCK + 2) if kind == "q8_0" else n * (4 if kind == "f32" else 2)


def _encoded(name: str, tensor: LazyTensor, kind: str) -> Iterator[memoryview]:
    """The bytes of `tensor`; its float32 form exists only for a piece at a time."""
    pieces = (part for piece in tensor.iter_pieces() for part in piece.split(_PIECE))
    for piece in pieces:
        if kind == "f32":
            yield piece.float().numpy().data
        elif kind == "q8_0":
            yield _quantized(piece).numpy().data
        else:
            small = piece.to(_DTYPES[kind])
            if kind == "f16" and small.isinf().any() and not piece.isinf().any():
                raise ValueError(f"{name} holds numbers beyond the range of f16; choose `--gguf_type bf16`")
            yield small.view(torch.int16).numpy().data


def _quantized(piece: Tensor) -> Tensor:
    """The blocks `(n, 34)` of q8_0: a scale in f16 and 32 int8. The gguf package does the same, ten times slower."""
    blocks = piece.float().view(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    steps = blocks * torch.where(scales > 0, 1 / scales, 0)
    steps = (steps + steps.sign() / 2).trunc().to(torch.int8)  # halves are rounded away from 0
    return torch.cat((scales.half().view(torch.uint8), steps.view(torch.uint8)), dim=1)


def _value_type(gguf: Any, value: Any) -> Any:
    names = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return gguf.GGUFValueType[names[type(value)]]


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModuleNotFoundError("GGUF export needs the package gguf: run `pip install 'litgpt[gguf]'`") from error
    return gguf
