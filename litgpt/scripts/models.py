"""`litgpt models`: the models that are known by name."""

import json
import warnings
from dataclasses import asdict, dataclass

from litgpt.config import Config
from litgpt.registry import get_model_spec, model_names, resolve_model


@dataclass
class ModelRow:
    """What the list says about one model."""

    name: str
    hf: str
    """Where its weights are on the Hugging Face hub; empty for a model of your own."""
    context: int
    """Longest context in tokens."""
    parameters: int | None
    """Number of weights; unknown for a model that an extension builds."""


def setup(filter: str | None = None, *, json: bool = False) -> None:
    """List the models that `litgpt pretrain NAME` and `Config.from_name(NAME)` know, and those of loaded extensions.

    Args:
        filter: Show only models that have all these words in their names.
        json: Print a JSON list instead of a table.
    """
    words = (filter or "").lower().split()
    rows = [row for row in find_models() if all(w in f"{row.name} {row.hf}".lower() for w in words)]
    if not rows:
        raise ValueError(f"no model has {filter!r} in its name; `litgpt models` shows all.")
    print(_as_json(rows) if json else _as_table(rows))


def find_models() -> list[ModelRow]:
    """A row for each model, in the order of the table in `config.py`."""
    rows = []
    for name in model_names():
        with warnings.catch_warnings():  # advice about the use of a model is of no interest in a list
            warnings.simplefilter("ignore")
            spec, config = resolve_model(name)
        is_ours = spec is get_model_spec("gpt")
        hub = "/".join(config.hf_config[k] for k in ("org", "name") if config.hf_config.get(k))
        rows.append(ModelRow(name, hub, config.block_size, count_parameters(config) if is_ours else None))
    return rows


def count_parameters(config: Config) -> int:
    """Number of weights of the `GPT` that `config` describes, by arithmetic: nothing is built."""
    c, C = config, config.n_embd
    norm = 0 if not c.norm_affine else C if c.norm_class_name == "RMSNorm" else 2 * C
    head = C * c.padded_vocab_size * (not c.tie_embeddings) + c.padded_vocab_size * c.lm_head_bias
    n_norms = c.norm_1 + (c.norm_2 and not c.shared_attention_norm) + c.post_attention_norm + c.post_mlp_norm
    n_dense = c.n_layer if c.mlp_class_name != "LLaMAMoE" else min(c.first_k_dense_replace or 0, c.n_layer)
    gated = c.mlp_class_name not in ("GptNeoxMLP", "MLP")
    blocks = c.n_layer * (_attention(c, norm) + n_norms * norm)
    blocks += n_dense * _mlp(c, c.intermediate_size, gated) + (c.n_layer - n_dense) * _experts(c)
    return C * c.padded_vocab_size + head + blocks + norm


def _linear(n_in: int, n_out: int, bias: bool) -> int:
    return n_in * n_out + n_out * bias


def _attention(c: Config, norm: int) -> int:
    C, nh, hs, G = c.n_embd, c.n_head, c.head_size, c.n_query_groups
    if c.latent_attention:
        rank, keys, values = c.kv_lora_rank, nh * c.qk_head_dim, nh * c.v_head_dim
        queries = _linear(C, keys, c.bias)
        if c.q_lora_rank:
            queries = _linear(C, c.q_lora_rank, c.attn_bias) + c.q_lora_rank + _linear(c.q_lora_rank, keys, c.bias)
        latent = _linear(C, rank + c.qk_rope_head_dim, c.attn_bias) + rank
        return (
            queries + latent + _linear(rank, nh * c.qk_nope_head_dim + values, c.bias) + _linear(values, C, c.attn_bias)
        )
    count = _linear(C, (nh + 2 * G) * hs, c.bias or c.attn_bias) + _linear(nh * hs, C, c.bias)
    if c.norm_qk:
        count += (norm // C) * ((nh + G) * hs if c.norm_qk_type == "olmo2" else 2 * hs)
    return count


def _mlp(c: Config, width: int, gated: bool = True) -> int:
    return (1 + gated) * _linear(c.n_embd, width, c.bias) + _linear(width, c.n_embd, c.bias)


def _experts(c: Config) -> int:
    width = c.moe_intermediate_size or c.intermediate_size
    shared = _mlp(c, width * c.n_shared_expert) if c.n_shared_expert else 0
    return c.n_expert * (_mlp(c, width) + c.n_embd) + shared


def _as_json(rows: list[ModelRow]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2)


def _as_table(rows: list[ModelRow]) -> str:
    table = [("NAME", "HUGGING FACE", "CONTEXT", "PARAMETERS")]
    table += [(row.name, row.hf, f"{row.context:,}", _short(row.parameters)) for row in rows]
    width, hub_width = (max(len(line[i]) for line in table) for i in range(2))
    return "\n".join(f"{a:<{width}}  {b:<{hub_width}}  {c:>10}  {d:>10}".rstrip() for a, b, c, d in table)


def _short(n: int | None) -> str:
    if n is None:
        return ""
    scale, unit = (1e9, "B") if n >= 1e9 else (1e6, "M")
    return f"{n / scale:.3g}{unit}"
