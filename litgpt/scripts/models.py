"""`litgpt models`: the models that are known by name. Nothing is built, and torch is not imported."""

import json
import sys
import warnings
from dataclasses import asdict, dataclass

from litgpt.config import Config, name_to_config, rope_kind
from litgpt.plan import count_parameters


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
    active_parameters: int | None
    """Weights that one token passes through: fewer where experts take turns."""
    features: list[str]
    """What its architecture has beside plain attention and one MLP."""


def setup(filter: str | None = None, *, json: bool = False) -> None:
    """List the models that `litgpt pretrain NAME` and `Config.from_name(NAME)` know, and those of loaded extensions.

    Args:
        filter: Show only models that have each of these words in their name, or as one of their features.
        json: Print a JSON list instead of a table.
    """
    words = (filter or "").lower().split()
    rows = [r for r in find_models() if all(w in f"{r.name} {r.hf}".lower() or w in r.features for w in words)]
    if not rows:
        raise ValueError(f"no model has {filter!r} in its name or as a feature; `litgpt models` shows all.")
    print(_as_json(rows) if json else _as_table(rows))


def find_models() -> list[ModelRow]:
    """A row for each model, in the order of the table in `config.py`."""
    with warnings.catch_warnings():  # advice about the use of a model is of no interest in a list
        warnings.simplefilter("ignore")
        rows = [_row(name, Config.from_name(name), is_ours=True) for name in name_to_config]
        # An extension can be loaded only through the registry. Importing it would import torch.
        if registry := sys.modules.get("litgpt.registry"):
            for name in registry.model_names()[len(rows) :]:
                spec, config = registry.resolve_model(name)
                rows.append(_row(name, config, is_ours=spec is registry.get_model_spec("gpt")))
    return rows


def features(config: Config) -> list[str]:
    """Short words for what is special about an architecture."""
    c, groups, rope = config, config.n_query_groups, rope_kind(config.rope_adjustments)
    found = {
        "mla": c.latent_attention,
        "mqa": groups == 1 < c.n_head,
        "gqa": 1 < groups < c.n_head,
        "moe": c.mlp_class_name == "LLaMAMoE",
        "window": c.sliding_window_size,
        "softcap": c.attention_logit_softcapping or c.final_logit_softcapping,
        "qk-norm": c.norm_qk,
        "post-norm": c.post_attention_norm or c.post_mlp_norm,
        "parallel": c.parallel_residual,
        "partial-rope": c.rotary_percentage < 1 and not c.latent_attention,
        "local-rope": c.rope_local_base_freq,
        "no-rope": c.nope_indices and any(c.nope_indices),
        {"yarn": "yarn", "longrope": "longrope"}.get(rope, f"{rope}-rope"): rope,
        "tied": c.tie_embeddings,
    }
    return [word for word, is_there in found.items() if is_there]


def _row(name: str, config: Config, is_ours: bool) -> ModelRow:
    hub = "/".join(config.hf_config[k] for k in ("org", "name") if config.hf_config.get(k))
    total, active = count_parameters(config) if is_ours else (None, None)
    return ModelRow(name, hub, config.block_size, total, active, features(config))


def _as_json(rows: list[ModelRow]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2)


def _as_table(rows: list[ModelRow]) -> str:
    table = [("NAME", "HUGGING FACE", "CONTEXT", "PARAMETERS", "ACTIVE", "FEATURES")]
    for row in rows:
        active = _short(row.active_parameters) if row.active_parameters != row.parameters else ""
        numbers = (f"{row.context:,}", _short(row.parameters), active)
        table.append((row.name, row.hf, *numbers, " ".join(row.features)))
    width, hub_width = (max(len(line[i]) for line in table) for i in range(2))
    return "\n".join(
        f"{a:<{width}}  {b:<{hub_width}}  {c:>10}  {d:>10}  {e:>6}  {f}".rstrip() for a, b, c, d, e, f in table
    )


def _short(n: int | None) -> str:
    if n is None:
        return ""
    scale, unit = (1e9, "B") if n >= 1e9 else (1e6, "M")
    return f"{n / scale:.3g}{unit}"
