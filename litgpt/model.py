"""The GPT of litgpt: every architecture of the named configs in one file, made to be read, copied and changed.

It needs torch and `config.py` beside it, nothing else. Data flows `embed -> decode -> unembed`; a variant overrides one of
the three, or `loss`, or names another part: `class MyBlock(Block): attention_class = MyAttention`.

Letters used for shapes: B batch, T query tokens, S key tokens, C `n_embd`, hs head size, nh heads, G query groups,
n `rope_n_elem`, E experts, V padded vocabulary.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if __package__:
    from .config import Config, register_mlp, register_norm
else:  # a copy in a fork takes the config.py beside it, never an installed one
    from config import Config, register_mlp, register_norm

IGNORE_INDEX = -100
LOSS_CHUNK_BYTES = 2**27
"""Most bytes of float32 logits that training holds at a time."""


class ModelSize(NamedTuple):
    """What a model weighs."""

    total: int
    """Parameters; tied ones count once."""
    active: int
    """Parameters that one token passes through: of routed experts only the chosen ones."""
    flops_per_token: int
    """Floating-point operations of one training token, forward and backward."""


@dataclass
class TokenMask:
    """What is known of the tokens of a batch besides their order; absent parts restrict nothing."""

    real: Tensor | None = None
    """`(B, T)` boolean, False = padding, which nobody attends to."""
    segment_ids: Tensor | None = None
    """`(B, T)` integers: tokens of different packed documents do not see each other."""


@dataclass
class Context:
    """What all blocks of one forward pass share. A variant that needs more adds fields in a subclass."""

    positions: Tensor
    """`(T,)` or `(B, T)`: where each token stands, for RoPE."""
    cos: Tensor
    """`(T, n)` or `(B, T, n)`, with a last dimension of 2 (global, local) where layers differ in their base."""
    sin: Tensor
    mask: TokenMask | None = None
    input_pos: Tensor | None = None
    input_pos_maxp1: int | None = None
    lm_head_chunk_size: int = 0


class GPT(nn.Module):
    """A decoder-only transformer (or an encoder, with `causal: false`) as its config describes it.

    Raises:
        ValueError: If the config lacks a vocabulary size.
    """

    block_class: type["Block"]  # set below to Block; a variant names its own
    transformer: nn.ModuleDict
    lm_head: nn.Linear

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.padded_vocab_size is None:
            raise ValueError(f"The config {config.name!r} has no padded_vocab_size; give vocab_size")
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList(self.block_class(config, block_idx) for block_idx in range(config.n_layer)),
                ln_f=config.norm_class(config.n_embd, eps=config.norm_eps),
            )
        )
        self.tie_weights()
        self.max_seq_length = config.block_size

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> "GPT":
        """Builds the model of a named config; `kwargs` override its fields."""
        return cls(Config.from_name(name, **kwargs))

    # ---- the four steps -------------------------------------------------------------------------------------------

    def embed(self, idx: Tensor, ctx: Context) -> Tensor:
        """Token ids `(B, T)` to the residual stream `(B, T, C)`."""
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.scale_embeddings:
            # the published Gemma rounds the factor to the dtype of the activations
            x = x * torch.full((), self.config.n_embd**0.5, dtype=x.dtype, device=x.device)
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def decode(self, x: Tensor, ctx: Context) -> Tensor:
        """Sends the residual stream `(B, T, C)` through the blocks."""
        for block in self.transformer.h:
            x = block(x, ctx.cos, ctx.sin, ctx.mask, ctx.input_pos, ctx.input_pos_maxp1)
        return x

    def unembed(self, x: Tensor, ctx: Context) -> Tensor:
        """Residual stream `(B, T, C)` to logits `(B, T, V)`: last norm, head, soft-capping."""
        return self.cap(self.lm_head(self.transformer.ln_f(x)))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in float32; `targets` are already shifted and -100 is ignored. Nothing to predict gives 0."""
        total = F.cross_entropy(
            logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
        lm_head_chunk_size: int = 0,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor | list[Tensor] | tuple[Tensor, Tensor]:
        """Logits of each token, or the summed loss when `targets` are given.

        Args:
            idx: `(B, T)` token ids.
            input_pos: `(T,)`, or `(B, T)` with rows at different places: positions of `idx` in the KV cache, which is then
                used. The positions of a row are consecutive.
            input_pos_maxp1: How many cache slots are in use after this call. Lets attention leave out the rest; equal to T,
                it says that the cache was empty.
            lm_head_chunk_size: When positive, logits come as a list of chunks of this many tokens.
            targets: `(B, T)` ids to predict, already shifted; -100 is ignored. The logits are then never built in full.
            mask: `(B, T)` boolean, True = real token. With a KV cache padding stands on the right.
            positions: `(T,)` or `(B, T)`, may be float: where RoPE puts the tokens, instead of their order.
            segment_ids: `(B, T)` document numbers of packed sequences, without a KV cache only.
            logits_to_keep: Logits of the last so many tokens only; a `(B,)` tensor keeps one given token of each row. 0 = all.

        Returns:
            Logits `(B, T, V)`, a list of such chunks, or with `targets` the pair (sum of the losses in float32, count).

        Raises:
            ValueError: If the sequence is longer than `max_seq_length`, or `input_pos` does not fit `idx`.
            TypeError: If `input_pos` is given and there is no KV cache.
        """
        ctx = self.build_context(idx, input_pos, input_pos_maxp1, lm_head_chunk_size, mask, positions, segment_ids)
        x = self.decode(self.embed(idx, ctx), ctx)  # (B, T, C)
        if targets is not None:
            return self.hidden_loss(x, targets, ctx)
        if isinstance(logits_to_keep, Tensor):
            x = x[torch.arange(x.size(0), device=x.device), logits_to_keep].unsqueeze(1)  # (B, 1, C)
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        if lm_head_chunk_size > 0:
            return [self.unembed(x_chunk, ctx) for x_chunk in x.split(lm_head_chunk_size, dim=1)]
        return self.unembed(x, ctx)

    def hidden_loss(self, x: Tensor, targets: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies and count of targets, from the residual stream `(B, T, C)`, in chunks of tokens.

        A variant with an own `unembed` or `loss` gets those instead.
        """
        n = (targets != IGNORE_INDEX).sum()
        if type(self).unembed is not GPT.unembed or type(self).loss is not GPT.loss:
            return self.loss(self.unembed(x, ctx), targets).float() * n, n
        x, targets = self.transformer.ln_f(x).flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        chunk = max(1, LOSS_CHUNK_BYTES // (4 * self.config.padded_vocab_size))
        if type(self.lm_head) is nn.Linear and not torch.compiler.is_compiling():
            head, cap = self.lm_head, self.config.final_logit_softcapping or 0.0
            return ChunkedHeadLoss.apply(x, head.weight, head.bias, targets, cap, chunk), n

        def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
            logits = self.cap(self.lm_head(x)).float()
            return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

        chunks = list(zip(x.split(chunk), targets.split(chunk)))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.stack([chunk_loss(*c) for c in chunks]).sum(), n
        return torch.stack([checkpoint(chunk_loss, *c, use_reentrant=False) for c in chunks]).sum(), n

    def cap(self, logits: Tensor) -> Tensor:
        """Soft-caps the final logits where the config says so (Gemma 2, arXiv 2408.00118)."""
        limit = self.config.final_logit_softcapping
        return logits if limit is None else do_softcapping(logits, limit)

    # ---- positions ------------------------------------------------------------------------------------------------

    @property
    def max_seq_length(self) -> int:
        """Longest sequence that the position tables hold; at most `config.block_size`."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if value > self.config.block_size:
            raise ValueError(
                f"Cannot attend to {value} tokens, block size is only {self.config.block_size}."
                " Shorten the sequence, or raise block_size in the model config"
            )
        self._max_seq_length = value
        if not hasattr(self, "cos") or self.cos.size(0) != value:
            device = self.cos.device if hasattr(self, "cos") else None
            cos, sin = self.rope_cache(device)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def rope_cache(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Tables of cosines and sines `(max_seq_length, n)`, or `(max_seq_length, n, 2)` with a local base."""
        positions = torch.arange(self.max_seq_length, device=device)
        return rope_tables(self.config, positions, self.max_seq_length)

    def rope_cache_length(self) -> int:
        """Number of rotated elements `n` of a head."""
        return self.cos.size(1)

    def reset_parameters(self) -> None:
        """Rebuilds the position tables, for example after `to_empty`."""
        self.cos, self.sin = self.rope_cache(self.cos.device)

    def build_context(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
        lm_head_chunk_size: int = 0,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Context:
        """Works out, once a forward pass, what all blocks share: positions, their cosines and sines, masks."""
        T = idx.size(1)
        if self.max_seq_length < T:
            raise ValueError(f"Cannot forward sequence of length {T}, max seq length is only {self.max_seq_length}.")
        length = T
        if input_pos is not None:
            if input_pos.dim() > 2 or input_pos.shape[-1] != T or (input_pos.dim() == 2 and len(input_pos) != len(idx)):
                raise ValueError(
                    f"input_pos must be (T,) or (B, T) for idx {tuple(idx.shape)}, not {tuple(input_pos.shape)}"
                )
            length = self.kv_cache_length()
            # a prefill must know where the cache ends; this waits for the device, once a prefill
            if input_pos_maxp1 is None and not torch.compiler.is_compiling() and (T > 1 or idx.device.type == "cpu"):
                input_pos_maxp1 = int(input_pos.max()) + 1
            if input_pos_maxp1 is not None and input_pos_maxp1 > length:
                raise ValueError(f"Position {input_pos_maxp1 - 1} is outside of the KV cache of {length} tokens")
        if positions is None:
            positions = input_pos if input_pos is not None else default_positions(idx, mask, segment_ids)
        if positions.is_floating_point() or is_longrope(self.config):
            cos, sin = rope_tables(self.config, positions, length)
        elif positions.dim() == 1 and input_pos is None:
            cos, sin = self.cos[:T], self.sin[:T]
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        token_mask = None if mask is None and segment_ids is None else TokenMask(mask, segment_ids)
        return Context(positions, cos, sin, token_mask, input_pos, input_pos_maxp1, lm_head_chunk_size)

    # ---- KV cache -------------------------------------------------------------------------------------------------

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Gives each attention an empty cache of `max_seq_length` tokens (default: what the position tables hold)."""
        if max_seq_length is None:
            max_seq_length = self.max_seq_length
        elif max_seq_length > self.max_seq_length:
            self.max_seq_length = max_seq_length
        self._kv_cache_length = max_seq_length
        weight = self.transformer.wte.weight
        for block in self.transformer.h:
            block.attn.kv_cache = block.attn.build_kv_cache(
                batch_size, max_seq_length, rope_cache_length, device or weight.device, dtype or weight.dtype
            )

    def clear_kv_cache(self) -> None:
        """Frees the caches."""
        self._kv_cache_length = None
        for block in self.transformer.h:
            block.attn.kv_cache = None

    def kv_cache_length(self) -> int:
        """Tokens that the cache holds.

        Raises:
            TypeError: If there is none.
        """
        if getattr(self, "_kv_cache_length", None) is None:
            raise TypeError("You need to call `gpt.set_kv_cache()` before passing `input_pos`")
        return self._kv_cache_length

    # ---- weights --------------------------------------------------------------------------------------------------

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter where the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def init_weights(self) -> None:
        """Draws new weights as GPT-NeoX does (arXiv 2204.06745); works on weights that `to_empty` left undefined.

        Linear layers and embeddings are N(0, 2 / (5 C)), the projections back into the residual stream
        N(0, 1 / (C L^2)), biases 0. A module of your own draws its weights in its `reset_parameters`.
        """
        std = math.sqrt(2.0 / 5 / self.config.n_embd)
        std_proj = 1 / math.sqrt(self.config.n_embd) / self.config.n_layer
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=std_proj if name.endswith(".proj") else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.tie_weights()
        self.reset_parameters()

    def _init_weights(self, module: nn.Module) -> None:
        """For `gpt.apply(gpt._init_weights)`: N(0, 0.02)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def get_nparams_and_flops(self, seq_len: int) -> ModelSize:
        """Parameters, and training FLOPs a token at `seq_len`: 6 for each active weight but the embedding, and attention's
        6 (d_qk + d_v) for each head, layer and visible position, where causality is not discounted (arXiv 2204.02311)."""
        config = self.config
        total = sum(p.numel() for p in self.parameters())
        experts = [p.numel() for n, p in self.named_parameters() if ".experts." in n]
        active = total - sum(experts)
        if experts:
            active += sum(experts) * config.n_expert_per_token // config.n_expert
        weights = active - (0 if config.tie_embeddings else self.transformer.wte.weight.numel())
        d_qk, d_v = config.head_size, config.head_size
        if config.latent_attention:
            d_qk, d_v = config.qk_head_dim, config.v_head_dim
        windows = (layer_window(config, i) for i in range(config.n_layer))
        visible = sum(min(seq_len, window or seq_len) for window in windows)
        return ModelSize(total, active, 6 * weights + 6 * config.n_head * (d_qk + d_v) * visible)

    def _apply(self, fn: Any, recurse: bool = True) -> "GPT":
        """Keeps tied weights tied, and the position tables filled, when parameters move or leave the meta device."""
        on_meta = "cos" in self._buffers and self.cos.is_meta
        super()._apply(fn, recurse)
        if "transformer" in self._modules and "lm_head" in self._modules:
            self.tie_weights()
        if on_meta and not self.cos.is_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """A tied checkpoint may lack the head; one whose head was trained apart is loaded untied, and says so."""
        head, wte = state_dict.get(f"{prefix}lm_head.weight"), state_dict.get(f"{prefix}transformer.wte.weight")
        if self.config.tie_embeddings and wte is not None:
            if head is None:
                state_dict[f"{prefix}lm_head.weight"] = wte
            elif head.shape == wte.shape and not (head.is_meta or wte.is_meta) and not torch.equal(head, wte):
                warnings.warn(
                    "The checkpoint holds a head that differs from its embedding: loaded untied", stacklevel=2
                )
                self.config.tie_embeddings = False
                self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; `assign=True` fills a model on the meta device and leaves it complete."""
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if assign:
            self.tie_weights()
            device = self.transformer.wte.weight.device
            if self.cos.is_meta and device.type != "meta":
                self.cos, self.sin = self.rope_cache(device)
        return result


class Block(nn.Module):
    """Attention and MLP around the residual stream, one after the other or side by side."""

    attention_class: type[nn.Module]  # set below to CausalSelfAttention; a variant names its own
    mlp_class: type[nn.Module] | None = None
    """None: what `config.mlp_class_name` says."""

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        super().__init__()
        if not config.parallel_residual and config.shared_attention_norm:
            raise NotImplementedError("No known model shares the attention norm without parallel residuals")
        self.config = config
        attention_class = self.attention_class
        if config.latent_attention and attention_class is CausalSelfAttention:
            attention_class = MultiheadLatentAttention
        dense = config.first_k_dense_replace is not None and block_idx < config.first_k_dense_replace
        mlp_class = self.mlp_class or (LLaMAMLP if dense else config.mlp_class)

        def norm(wanted: bool) -> nn.Module:
            return config.norm_class(config.n_embd, eps=config.norm_eps) if wanted else nn.Identity()

        self.norm_1 = norm(config.norm_1)
        self.attn = attention_class(config, block_idx)
        self.post_attention_norm = norm(config.post_attention_norm)
        self.norm_2 = None if config.shared_attention_norm else norm(config.norm_2)
        self.mlp = mlp_class(config)
        self.post_mlp_norm = norm(config.post_mlp_norm)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; what is not given follows from the config and the order of the tokens.

        ```
          x ------------.            x -----------------.
          |             |            |          |       |
        norm_1          |          norm_1     norm_2 (or norm_1 again)
          |             |            |          |       |
        attn            |          attn        mlp      |
          |             |            |          |       |
         (+) <----------'           (+) <-----------------
          | -----------.             |
        norm_2         |
          |            |          parallel_residual
         mlp           |
          |            |
         (+) <---------'
        ```
        """
        normed = self.norm_1(x)  # (B, T, C)
        attn = self.post_attention_norm(self.attn(normed, cos, sin, mask, input_pos, input_pos_maxp1))
        attn = self.drop(attn)
        if self.config.parallel_residual:
            normed = normed if self.norm_2 is None else self.norm_2(x)
            return attn + self.drop(self.post_mlp_norm(self.mlp(normed))) + x
        x = x + attn
        return x + self.drop(self.post_mlp_norm(self.mlp(self.norm_2(x))))

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on what is added to the residual stream."""
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query and multi-query attention, with RoPE, sliding window, QK-norm and soft-capping."""

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        super().__init__()
        nh, G, hs = config.n_head, config.n_query_groups, config.head_size
        self.qkv = nn.Linear(config.n_embd, (nh + 2 * G) * hs, bias=config.bias or config.attn_bias)
        self.proj = nn.Linear(nh * hs, config.n_embd, bias=config.bias)
        self.kv_cache: KVCache | None = None
        self.config = config
        self.block_idx = block_idx
        self.window = layer_window(config, block_idx)
        self.rope_index = config.rope_indices[block_idx] if config.rope_indices is not None else None
        self.scale = 1.0 / math.sqrt(config.attention_scores_scalar or hs)
        self.norm_q = self.norm_k = None
        if config.norm_qk:
            whole = config.norm_qk_type == "olmo2"  # over all heads at once, else over each head
            self.norm_q = config.norm_class(nh * hs if whole else hs, eps=config.norm_eps)
            self.norm_k = config.norm_class(G * hs if whole else hs, eps=config.norm_eps)

    @property
    def attn(self) -> nn.Module:
        """The fused projection under its older name."""
        return self.qkv

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        """Attention over `x` `(B, T, C)` and what the KV cache holds; see `GPT.forward` for the arguments.

        A `mask` tensor, `(T, S)` or `(B, 1, T, S)` with True = may attend, takes the place of causality.
        """
        B, T, _ = x.shape
        nh, G, hs = self.config.n_head, self.config.n_query_groups, self.config.head_size
        cos, sin = self.select_rope(x, cos, sin, input_pos)
        q, k, v = self.qkv(x).split((nh * hs, G * hs, G * hs), dim=-1)
        if self.norm_q is not None and self.config.norm_qk_type == "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = q.view(B, T, nh, hs), k.view(B, T, G, hs), v.view(B, T, G, hs)
        if self.norm_q is not None and self.config.norm_qk_type != "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        q = self.rotate(q, cos, sin).transpose(1, 2)  # (B, nh, T, hs)
        k = self.rotate(k, cos, sin).transpose(1, 2)  # (B, G, T, hs)
        v = v.transpose(1, 2)  # (B, G, T, hs)
        y = self.attend(q, k, v, mask, input_pos, input_pos_maxp1)  # (B, T, nh, hs)
        return self.proj(y.reshape(B, T, nh * hs))

    def select_rope(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, input_pos: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """This layer's cosines and sines, `(T, n)` or `(B, T, n)`, in the dtype that is rotated."""
        if cos is None:
            positions = torch.arange(x.size(1), device=x.device) if input_pos is None else input_pos
            cos, sin = rope_tables(self.config, positions, x.size(1))
        if self.rope_index is not None and self.config.rope_local_base_freq is not None:
            cos, sin = cos[..., self.rope_index], sin[..., self.rope_index]
        dtype = compute_dtype(x)
        return cos.to(dtype), sin.to(dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the first n elements of each head of `x` `(B, T, nh, hs)`."""
        n = self.config.rope_n_elem
        if n == 0:
            return x
        return rotate(x, cos.unsqueeze(-2), sin.unsqueeze(-2), self.config.rope_interleave, n)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: TokenMask | Tensor | None,
        input_pos: Tensor | None,
        input_pos_maxp1: int | None,
    ) -> Tensor:
        """Stores `k` and `v` in the cache, if positions are given, and picks the cheapest mask that is right.

        Args:
            q: `(B, nh, T, hs)`
            k: `(B, G, T, hs)`
            v: `(B, G, T, hs)`

        Returns:
            `(B, T, nh, hs)`
        """
        T = q.size(2)
        if input_pos is None:
            return self.attend_block(q, k, v, mask)
        if self.kv_cache is None:
            raise TypeError("You need to call `gpt.set_kv_cache()`")
        real = mask.real if isinstance(mask, TokenMask) else None
        if T > 1 and input_pos_maxp1 == T and not isinstance(mask, Tensor):  # prefill of an empty cache
            self.kv_cache(input_pos, k, v, real)
            return self.attend_block(q, k, v, None)
        # a ring forgets keys that the first queries of a longer chunk still see: join the old and the new ones
        old = (self.kv_cache.k, self.kv_cache.v) if self.kv_cache.is_ring and T > 1 else None
        if old is not None:
            k_pos = torch.cat((self.kv_cache.positions(input_pos[..., :1] - 1), input_pos), dim=-1)
            k_all, v_all = torch.cat((old[0].to(k), k), dim=2), torch.cat((old[1].to(v), v), dim=2)
            self.kv_cache(input_pos, k, v, real)
        else:
            k_all, v_all = self.kv_cache(input_pos, k, v, real)
            if input_pos_maxp1 is not None:
                k_all, v_all = k_all[:, :, :input_pos_maxp1], v_all[:, :, :input_pos_maxp1]
            if T == 1 and input_pos.dim() == 1 and input_pos_maxp1 is not None and not isinstance(mask, Tensor):
                if self.kv_cache.is_ring or self.window is None or self.window >= input_pos_maxp1:
                    return self.scaled_dot_product_attention(q, k_all, v_all, is_causal=False)
            k_pos = self.kv_cache.positions(input_pos[..., -1:])[..., : k_all.size(2)]
        if isinstance(mask, Tensor):
            mask = mask[..., : k_all.size(2)]
            return self.scaled_dot_product_attention(q, k_all, v_all, mask)
        order = TokenOrder(input_pos, k_pos, self.config.causal, self.window)
        return attend_in_blocks(self.scaled_dot_product_attention, q, k_all, v_all, order)

    def attend_block(self, q: Tensor, k: Tensor, v: Tensor, mask: TokenMask | Tensor | None) -> Tensor:
        """Attention among the tokens of one block of text, which starts with no history."""
        T = q.size(2)
        window = None if self.window is None or self.window >= T else self.window
        if isinstance(mask, Tensor):
            if window is not None:
                order = torch.arange(T, device=q.device)
                mask = mask & TokenOrder(order, order, self.config.causal, window).visible(slice(0, T), slice(0, T))
            return self.scaled_dot_product_attention(q, k, v, mask)
        if mask is None and window is None and (self.config.attention_logit_softcapping is None or T == 1):
            return self.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal and T > 1)
        order = torch.arange(T, device=q.device)
        mask = mask or TokenMask()
        order = TokenOrder(order, order, self.config.causal, window, mask.real, mask.segment_ids, same_tokens=True)
        return attend_in_blocks(self.scaled_dot_product_attention, q, k, v, order)

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        """The kernel: `q` `(B, nh, T, hs)`, `k` and `v` `(B, G, S, hs)`, boolean `mask` `(..., T, S)` to `(B, T, nh, hs)`.

        Without a mask attention is causal, unless `is_causal` says otherwise. K and V are never expanded to nh heads.
        """
        B, nh, T, _ = q.shape
        G = k.size(1)
        is_causal = mask is None and T > 1 if is_causal is None else is_causal
        dropout = self.config.dropout if self.training else 0.0
        softcap = self.config.attention_logit_softcapping
        if softcap is not None:
            y = softcapped_attention(q, k, v, mask, is_causal, self.scale, softcap, dropout)
        elif G != nh and T == 1 and (mask is None or mask.dim() < 3 or mask.size(1) == 1):
            # the heads of a group are queries of one key head: no kernel need know of groups
            q = q.view(B, G, nh // G, -1)  # (B, G, nh / G, hs)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
            y = y.reshape(B, nh, 1, -1)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale, enable_gqa=G != nh
            )
        return y.transpose(1, 2)  # (B, T, nh, hs)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "KVCache":
        """An empty cache for this layer: a ring where the window is shorter than `max_seq_length`."""
        shape = (batch_size, self.config.n_query_groups, max_seq_length, self.config.head_size)
        ring = self.window is not None and self.window < max_seq_length
        return KVCache(shape, shape, device, dtype, is_sliding_window=ring, sliding_window_size=self.window)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes checkpoints of old, whose `attn.attn` stores [q..q k v] group by group."""
        nh, G, hs = self.config.n_head, self.config.n_query_groups, self.config.head_size
        for name in ("weight", "bias"):
            old = state_dict.pop(f"{prefix}attn.{name}", None)
            if old is not None:
                groups = old.view(G, nh // G + 2, hs, *old.shape[1:])
                parts = groups.split((nh // G, 1, 1), dim=1)
                state_dict[f"{prefix}qkv.{name}"] = torch.cat([p.reshape(-1, *old.shape[1:]) for p in parts])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MultiheadLatentAttention(CausalSelfAttention):
    """Attention whose keys and values come from a small latent vector, which is all the cache keeps (arXiv 2405.04434)."""

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.block_idx = block_idx
        nh, C, bias = config.n_head, config.n_embd, config.attn_bias
        self.window = layer_window(config, block_idx)
        self.rope_index = None
        self.q_width = nh * config.qk_head_dim
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(config.q_lora_rank, eps=config.norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.q_width, bias=config.bias)
        else:
            self.q_proj = nn.Linear(C, self.q_width, bias=config.bias)
        self.kv_a_proj_with_mqa = nn.Linear(C, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, eps=config.norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, nh * (config.qk_nope_head_dim + config.v_head_dim), bias=config.bias
        )
        self.proj = nn.Linear(nh * config.v_head_dim, C, bias=bias)
        self.kv_cache: KVCache | None = None
        self.scale = 1.0 / math.sqrt(config.attention_scores_scalar or config.qk_head_dim)
        if (adjust := config.rope_adjustments or {}).get("mscale_all_dim"):
            self.scale *= yarn_get_mscale(adjust["factor"], adjust["mscale_all_dim"]) ** 2

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask: TokenMask | Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Tensor:
        """As `CausalSelfAttention.forward`."""
        B, T, _ = x.shape
        config, nh = self.config, self.config.n_head
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        cos, sin = self.select_rope(x, cos, sin, input_pos)
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if config.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = q.view(B, T, nh, config.qk_head_dim).split((nope, rope), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, rope), dim=-1)
        latent = self.kv_a_norm(latent).unsqueeze(1)  # (B, 1, T, kv_lora_rank)
        q_rope = self.rotate(q_rope, cos, sin)
        k_rope = self.rotate(k_rope.unsqueeze(2), cos, sin).transpose(1, 2)  # (B, 1, T, rope)
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # (B, nh, T, nope + rope)
        y = self.attend(q, latent, k_rope, mask, input_pos, input_pos_maxp1)  # (B, T, nh, v_head_dim)
        return self.proj(y.reshape(B, T, nh * config.v_head_dim))

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        """Kernel over the latent `k` `(B, 1, S, kv_lora_rank)` and the rotary key `v` `(B, 1, S, rope)`, shared by all heads.

        A single query is moved into the latent space, which reads S x (kv_lora_rank + rope) numbers in all; more queries are
        cheaper with keys and values built for each head.
        """
        config = self.config
        B, nh, T, _ = q.shape
        latent, k_rope, S = k, v, k.size(2)
        nope, d_v, rank = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
        is_causal = mask is None and T > 1 if is_causal is None else is_causal
        dropout = config.dropout if self.training else 0.0
        if T == 1 and type(self.kv_b_proj) is nn.Linear and self.kv_b_proj.bias is None:
            w_k, w_v = self.kv_b_proj.weight.to(q.dtype).view(nh, nope + d_v, rank).split((nope, d_v), dim=1)
            q_nope, q_rope = q[:, :, 0].split((nope, config.qk_rope_head_dim), dim=-1)  # (B, nh, nope), (B, nh, rope)
            q = torch.cat((torch.einsum("bhd,hdr->bhr", q_nope, w_k), q_rope), dim=-1).unsqueeze(
                1
            )  # (B, 1, nh, rank + rope)
            keys = torch.cat((latent, k_rope), dim=-1)  # (B, 1, S, rank + rope)
            y = F.scaled_dot_product_attention(q, keys, latent, attn_mask=mask, dropout_p=dropout, scale=self.scale)
            return torch.einsum("bhr,hdr->bhd", y[:, 0], w_v).unsqueeze(1)  # (B, 1, nh, d_v)
        kv = self.kv_b_proj(latent).view(B, S, nh, nope + d_v).transpose(1, 2)  # (B, nh, S, nope + d_v)
        k_nope, v = kv.split((nope, d_v), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, nh, -1, -1)), dim=-1)  # (B, nh, S, nope + rope)
        y = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale
        )
        return y.transpose(1, 2)

    def build_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "KVCache":
        """A cache of the latent and of the rotary key, which all heads share."""
        latent = (batch_size, 1, max_seq_length, self.config.kv_lora_rank)
        rope = (batch_size, 1, max_seq_length, self.config.qk_rope_head_dim)
        ring = self.window is not None and self.window < max_seq_length
        return KVCache(latent, rope, device, dtype, is_sliding_window=ring, sliding_window_size=self.window)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)


GPT.block_class = Block
Block.attention_class = CausalSelfAttention


# ---- attention over blocks of queries -----------------------------------------------------------------------------


@dataclass
class TokenOrder:
    """Who sees whom, as positions. Boolean masks are built from it for the block at hand, never T x T at once."""

    q_pos: Tensor
    """`(T,)` or `(B, T)`"""
    k_pos: Tensor
    """`(S,)` or `(B, S)`; a negative position is an empty slot"""
    causal: bool = True
    window: int | None = None
    real: Tensor | None = None
    segment_ids: Tensor | None = None
    same_tokens: bool = False
    """The keys are the queries' own tokens, in order: what lies ahead or behind the window need not be read."""

    def keys(self, rows: slice) -> slice:
        """The keys that the queries `rows` may need."""
        if not self.same_tokens:
            return slice(0, self.k_pos.size(-1))
        start = 0 if self.window is None else max(0, rows.start - self.window + 1)
        stop = rows.stop if self.causal else self.k_pos.size(-1)
        if not self.causal and self.window is not None:
            stop = min(stop, rows.stop + self.window - 1)
        return slice(start, stop)

    def visible(self, rows: slice, cols: slice) -> Tensor:
        """Boolean mask `(t, s)`, or `(B, 1, t, s)` where the rows of the batch differ."""
        q, k = self.q_pos[..., rows].unsqueeze(-1), self.k_pos[..., cols].unsqueeze(-2)
        seen = k >= 0
        seen = seen & (k <= q) if self.causal else seen.expand(*q.shape[:-1], k.size(-1))
        if self.window is not None:
            seen = seen & (k > q - self.window)
            if not self.causal:
                seen = seen & (k < q + self.window)
        if seen.dim() == 3:
            seen = seen.unsqueeze(1)  # (B, 1, t, s)
        if self.real is not None:
            # padding sees itself, so that no row of the softmax is empty
            seen = (seen & self.real[:, None, None, cols]) | (q == k)
        if self.segment_ids is not None:
            seen = seen & (self.segment_ids[:, None, rows, None] == self.segment_ids[:, None, None, cols])
        return seen


def attend_in_blocks(kernel: Any, q: Tensor, k: Tensor, v: Tensor, order: TokenOrder) -> Tensor:
    """Runs `kernel(q, k, v, mask)` over blocks of queries, so that masks stay small and far keys are not read.

    Args:
        kernel: Takes `(B, nh, t, hs)`, `(B, G, s, hs)`, `(B, G, s, hs)` and a boolean mask, gives `(B, t, nh, hs)`.
    """
    T, S = q.size(2), k.size(2)
    if order.same_tokens and order.window is not None:
        size = max(128, order.window // 4)
    else:
        size = max(16, 2**22 // S)
    blocks = []
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        cols = order.keys(rows)
        blocks.append(kernel(q[:, :, rows], k[:, :, cols], v[:, :, cols], order.visible(rows, cols)))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float, dropout: float
) -> Tensor:
    """Attention with `softcap * tanh(scores / softcap)` and the softmax in float32: `(B, nh, T, hs)` (arXiv 2408.00118)."""
    B, nh, T, hs = q.shape
    G, S = k.size(1), k.size(2)
    scores = (q.reshape(B, G, nh // G * T, hs) @ k.transpose(-2, -1)).view(B, nh, T, S)
    scores = do_softcapping(scores * scale, softcap)
    if is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32), dropout).to(q.dtype)
    return (weights.view(B, G, nh // G * T, S) @ v).view(B, nh, T, -1)


class KVCache(nn.Module):
    """Keys and values of the tokens so far, written in place; with a sliding window a ring of the last ones.

    A full cache keeps position p in slot p. A ring of W slots keeps it in slot p mod W, so that where a slot's token stands
    follows from the row's last position alone and needs no bookkeeping.
    """

    def __init__(
        self,
        k_shape: tuple[int, int, int, int],
        v_shape: tuple[int, int, int, int],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        is_sliding_window: bool = False,
        sliding_window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.is_ring = is_sliding_window
        if is_sliding_window:
            size = min(k_shape[2], sliding_window_size)
            k_shape, v_shape = (*k_shape[:2], size, k_shape[3]), (*v_shape[:2], size, v_shape[3])
        self.register_buffer("k", torch.zeros(k_shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(v_shape, device=device, dtype=dtype), persistent=False)

    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Writes `k` and `v` `(B, G, T, hs)` at `input_pos` `(T,)` or `(B, T)`; returns the whole buffers, `(B, G, S, hs)`.

        Args:
            real: `(B, T)` boolean; padding, which stands on the right of its row, is kept out of a ring.
        """
        if self.k.dtype != k.dtype:
            self.k, self.v = self.k.to(k.dtype), self.v.to(v.dtype)
        n, T = k.size(0), input_pos.size(-1)
        if self.is_ring and (T > 1 or real is not None):
            return self._write_ring(input_pos, k, v, real)
        slots = input_pos % self.k.size(2) if self.is_ring else input_pos
        if input_pos.dim() == 1:
            return self.k[:n].index_copy_(2, slots, k), self.v[:n].index_copy_(2, slots, v)
        return batched_index_copy_(self.k[:n], 2, slots, k), batched_index_copy_(self.v[:n], 2, slots, v)

    def _write_ring(self, input_pos: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """For each slot, the newest token that belongs there: of this chunk, else what it holds."""
        n = k.size(0)
        first, last = input_pos[..., :1], input_pos[..., -1:]
        if real is not None:
            last = first + real.sum(dim=-1, keepdim=True) - 1
        source = self.positions(last) - first  # (W,) or (B, W): place in the chunk
        source = source.expand(n, -1)[:, None, :, None]  # (B, 1, W, 1)
        for buffer, update in ((self.k, k), (self.v, v)):
            take = source.clamp(0, k.size(2) - 1).expand(-1, update.size(1), -1, update.size(3))
            fresh = update.gather(2, take)
            buffer[:n] = torch.where(source >= 0, fresh, buffer[:n])
        return self.k[:n], self.v[:n]

    def positions(self, last: Tensor) -> Tensor:
        """Position of the token in each slot, `(S,)` or `(B, S)`, when `last` `(1,)` or `(B, 1)` was written last.

        Empty slots of a ring are negative; those of a full cache lie ahead of every query.
        """
        slots = torch.arange(self.k.size(2), device=self.k.device)
        if not self.is_ring:
            return slots
        return last - (last - slots) % self.k.size(2)

    def reset_parameters(self) -> None:
        """Forgets everything."""
        self.k.zero_()
        self.v.zero_()


# ---- MLPs ---------------------------------------------------------------------------------------------------------


@register_mlp
class GptNeoxMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`."""
        return self.proj(F.gelu(self.fc(x), approximate=self.config.gelu_approximate))


@register_mlp
class LLaMAMLP(nn.Module):
    """SwiGLU: `proj(silu(fc_1(x)) * fc_2(x))` (arXiv 2002.05202)."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, width, bias=config.bias)
        self.fc_2 = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`."""
        x = x.to(compute_dtype(x))  # one cast for both layers
        return self.proj(self.act(self.fc_1(x)) * self.fc_2(x))

    def act(self, x: Tensor) -> Tensor:
        """The gate's nonlinearity."""
        return F.silu(x)


@register_mlp
class GemmaMLP(LLaMAMLP):
    """The gated MLP with a GELU."""

    def act(self, x: Tensor) -> Tensor:
        """The gate's nonlinearity."""
        return F.gelu(x, approximate=self.config.gelu_approximate)


@register_mlp
class MLP(nn.Module):
    """A gated MLP to start your own from: fields `fc_1`, `act`, `fc_2`; `fc_2(act(fc_1(x)))`."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, width, bias=config.bias)
        self.act = nn.GELU(approximate=config.gelu_approximate)
        self.fc_2 = nn.Linear(width, config.n_embd, bias=config.bias)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`."""
        return self.fc_2(self.act(self.fc_1(x)))


@register_mlp
class LLaMAMoE(nn.Module):
    """Mixture of experts: each token passes through `n_expert_per_token` of `n_expert` MLPs (arXiv 2401.04088).

    With `n_expert_groups` the router is DeepSeek-V3's grouped sigmoid router; shared experts see every token.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.moe_intermediate_size or config.intermediate_size
        if config.n_expert_groups:
            self.gate: nn.Module = GroupedTopkRouter(config)
        else:
            self.gate = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(LLaMAMLP(config, width) for _ in range(config.n_expert))
        if config.n_shared_expert:
            self.shared_experts = LLaMAMLP(config, width * config.n_shared_expert)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`. Tokens are sorted by expert, so each expert runs once, on a contiguous slice."""
        shape, k = x.shape, self.config.n_expert_per_token
        x = x.reshape(-1, shape[-1])  # (N, C), N = B * T
        weights, experts = self.route(x)  # (N, k), (N, k)
        order = experts.flatten().argsort(stable=True)  # (N * k,)
        token = order // k
        counts = experts.flatten().bincount(minlength=self.config.n_expert).tolist()  # the only wait for the device
        slices = x[token].split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, slices) if len(part)])  # (N * k, C)
        y = y * weights.flatten()[order].unsqueeze(-1).to(y.dtype)
        y = torch.zeros_like(x, dtype=y.dtype).index_add(0, token, y)  # (N, C)
        if self.config.n_shared_expert:
            y = y + self.shared_experts(x)
        return y.view(shape)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices `(N, k)` of the experts chosen for each of the N tokens."""
        if self.config.n_expert_groups:
            return self.gate(x)
        logits, experts = self.gate(x).topk(self.config.n_expert_per_token, dim=-1)
        return logits.softmax(dim=-1, dtype=torch.float32), experts


class GroupedTopkRouter(nn.Module):
    """Sigmoid router that first picks groups of experts, with a bias used for the choice alone (arXiv 2412.19437)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as the linear layers of the model; the correction starts at 0."""
        nn.init.normal_(self.weight, mean=0.0, std=math.sqrt(2.0 / 5 / self.config.n_embd))
        nn.init.zeros_(self.e_score_correction_bias)

    @torch.no_grad()
    def get_topk_indices(self, scores: Tensor) -> Tensor:
        """Indices `(N, k)` of the chosen experts from the scores `(N, E)`."""
        config = self.config
        N, groups = scores.size(0), config.n_expert_groups
        scores = scores + self.e_score_correction_bias
        grouped = scores.view(N, groups, -1)  # (N, groups, E / groups)
        group_scores = grouped.topk(config.n_topk_scores_per_group or 2, dim=-1)[0].sum(dim=-1)  # (N, groups)
        best = group_scores.topk(config.n_topk_groups, dim=-1, sorted=False)[1]
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True).unsqueeze(-1)
        return grouped.masked_fill(~kept, float("-inf")).flatten(1).topk(config.n_expert_per_token, dim=-1)[1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices `(N, k)` for tokens `(N, C)`; the scores are in float32."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()  # (N, E)
        experts = self.get_topk_indices(scores)
        weights = scores.gather(1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor, experts


# ---- norms --------------------------------------------------------------------------------------------------------


@register_norm
class RMSNorm(nn.Module):
    """Root mean square norm, in float32 inside (arXiv 1910.07467).

    Args:
        add_unit_offset: The weight is stored minus one (Gemma).
    """

    def __init__(self, size: int, dim: int = -1, eps: float = 1e-6, add_unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if add_unit_offset else torch.ones(size))
        self.eps = eps
        self.dim = dim
        self.add_unit_offset = add_unit_offset

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=self.dim, keepdim=True) + self.eps)
        weight = self.weight.float() + 1 if self.add_unit_offset else self.weight
        return (wide * weight).to(dtype=x.dtype)

    def reset_parameters(self) -> None:
        """Makes the norm leave the scale alone."""
        nn.init.constant_(self.weight, 0.0 if self.add_unit_offset else 1.0)


register_norm(nn.LayerNorm)


# ---- rotary positions ---------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False, n: int | None = None) -> Tensor:
    """Rotates the first `n` elements of the last dimension of `x`; `cos` and `sin` broadcast against it (arXiv 2104.09864).

    Args:
        interleave: Partners are neighbours in `x`, not half a head apart; they leave half a head apart.
    """
    n = cos.size(-1) if n is None else n
    half = n // 2
    if interleave:
        x1, x2 = x[..., 0:n:2], x[..., 1:n:2]
    else:
        x1, x2 = x[..., :half], x[..., half:n]
    c, s = cos[..., :half], sin[..., :half]
    parts = [x1 * c - x2 * s, x2 * c + x1 * s]
    return torch.cat([*parts, x[..., n:]] if n < x.size(-1) else parts, dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x` `(B, nh, T, n)` by `cos` and `sin` `(T, n)` or `(B, T, n)`, in the dtype of `x`."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, n)
    return rotate(x, cos, sin).to(x.dtype)


def apply_rope_interleave(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `apply_rope`, for partners that are neighbours in `x`; the result has them half a head apart (DeepSeek)."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotate(x, cos, sin, interleave=True).to(x.dtype)


def is_longrope(config: Config) -> bool:
    """Whether the rotary frequencies depend on the length of the text (LongRoPE)."""
    return bool(config.rope_adjustments) and "long_factor" in config.rope_adjustments


def rope_tables(config: Config, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(..., n)` of any positions, also fractional; `(..., n, 2)` with a local base."""
    return rope_at(
        positions,
        config.rope_n_elem,
        config.rope_base,
        config.rope_condense_ratio,
        config.rope_adjustments,
        config.rope_local_base_freq,
        length,
    )


def build_rope_cache(
    seq_len: int,
    n_elem: int,
    device: torch.device | None = None,
    base: int = 10000,
    condense_ratio: int = 1,
    extra_config: dict | None = None,
    rope_local_base_freq: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(seq_len, n_elem)` of positions 0..seq_len-1, or `(seq_len, n_elem, 2)` with a local base."""
    positions = torch.arange(seq_len, device=device)
    return rope_at(positions, n_elem, base, condense_ratio, extra_config, rope_local_base_freq, seq_len)


def rope_at(
    positions: Tensor,
    n_elem: int,
    base: float,
    condense_ratio: int,
    extra_config: dict | None,
    local_base: float | None,
    length: int,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `positions`; see `rope_frequencies` for `extra_config` and `length`."""
    freqs, factor = rope_frequencies(n_elem, base, extra_config, length, positions.device)
    angles = positions.float().unsqueeze(-1) / condense_ratio * freqs
    angles = torch.cat((angles, angles), dim=-1)  # (..., n)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if local_base is None:
        return cos, sin
    local = rope_at(positions, n_elem, local_base, condense_ratio, None, None, length)
    return torch.stack((cos, local[0]), dim=-1), torch.stack((sin, local[1]), dim=-1)  # (..., n, 2)


def rope_frequencies(
    n_elem: int, base: float, extra_config: dict | None, length: int, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Angle per position of each of the n / 2 pairs, in float32, and the factor on cosines and sines.

    `extra_config` picks the method by its keys: `factor` alone divides all frequencies (arXiv 2306.15595);
    `low_freq_factor, high_freq_factor` is Llama 3's; `beta_fast, beta_slow` is YaRN (arXiv 2309.00071);
    `short_factor, long_factor` is LongRoPE (arXiv 2402.13753), where `length` decides between the two.
    """
    freqs = 1.0 / base ** (torch.arange(0, n_elem - n_elem % 2, 2, device=device).float() / n_elem)  # (n / 2,)
    if not extra_config:
        return freqs, 1.0
    factor, original = extra_config.get("factor"), extra_config.get("original_max_seq_len")
    if "long_factor" in extra_config:
        kind = "long_factor" if length > original else "short_factor"
        scale = extra_config.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return freqs / torch.tensor(extra_config[kind], device=device, dtype=torch.float32), scale
    if "beta_fast" in extra_config:
        return yarn_frequencies(freqs, n_elem, base, extra_config)
    if "low_freq_factor" in extra_config:
        low, high = extra_config["low_freq_factor"], extra_config["high_freq_factor"]
        turns = original * freqs / (2 * math.pi)  # how often a pair turns in the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return freqs * (keep + (1 - keep) / factor), 1.0
    return freqs / factor, 1.0


def yarn_frequencies(freqs: Tensor, n_elem: int, base: float, extra_config: dict) -> tuple[Tensor, float]:
    """YaRN: pairs that turn often keep their frequency, slow ones are divided by `factor`, with a ramp between."""
    factor, original = extra_config["factor"], extra_config["original_max_seq_len"]

    def pair_that_turns(times: float) -> float:
        return n_elem * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(extra_config["beta_fast"]), pair_that_turns(extra_config["beta_slow"])
    if extra_config.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_elem - 1)
    ramp = (torch.arange(len(freqs), device=freqs.device).float() - low) / max(high - low, 0.001)
    divided = ramp.clamp(0, 1)  # 0: fast pair, 1: slow pair
    scale = extra_config.get("attention_factor")
    if scale is None:
        mscale, mscale_all_dim = extra_config.get("mscale"), extra_config.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            scale = yarn_get_mscale(factor, mscale) / yarn_get_mscale(factor, mscale_all_dim)
        else:
            scale = yarn_get_mscale(factor)
    return freqs / factor * divided + freqs * (1 - divided), scale


def yarn_get_mscale(scale: float = 1, mscale: float = 1) -> float:
    """YaRN's factor on attention for a context `scale` times as long: 0.1 mscale ln(scale) + 1."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def default_positions(idx: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """Position of each token of `idx` `(B, T)` in its text: `(T,)`, or `(B, T)` where padding or packing shifts it."""
    order = torch.arange(idx.size(1), device=idx.device)
    if segment_ids is not None:
        starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        return order - (order * starts).cummax(dim=1)[0]  # (B, T)
    if mask is not None:
        return (mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
    return order


# ---- small parts --------------------------------------------------------------------------------------------------


class ChunkedHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a linear head, in chunks of tokens, with the gradients worked out on the way.

    The logits of a chunk are at hand once, in the forward pass; making the gradients there (arXiv 2410.10989) saves both
    keeping the logits and building them again, a third of the head's work.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, chunk: int
    ) -> Tensor:
        """`x` `(N, C)`, `weight` `(V, C)`, `targets` `(N,)` to the summed loss in float32; `softcap` 0 = none."""
        dtype = compute_dtype(x)
        w = weight.to(dtype)
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), chunk):
                xc, tc = x[i : i + chunk].to(dtype), targets[i : i + chunk]
                logits = F.linear(xc, w, None if bias is None else bias.to(dtype)).float()  # (chunk, V)
                if softcap:
                    logits = do_softcapping(logits, softcap)
                real = (tc != IGNORE_INDEX).unsqueeze(1)
                picked = tc.clamp(min=0).unsqueeze(1)
                lse = logits.logsumexp(dim=1, keepdim=True)
                total += ((lse - logits.gather(1, picked)) * real).sum()
                if not (need_x or need_w or need_b):
                    continue
                slope = (1 - (logits / softcap).square()) if softcap else None
                grad = logits.sub_(lse).exp_()  # softmax, in place
                grad.scatter_add_(1, picked, torch.full_like(lse, -1.0))
                if slope is not None:
                    grad *= slope
                grad = (grad * real).to(dtype) if not bool(real.all()) else grad.to(dtype)
                if need_x:
                    grad_x[i : i + chunk] = grad @ w
                if need_w:
                    part = grad.t() @ xc
                    grad_w = part.to(weight.dtype) if grad_w is None else grad_w.add_(part)
                if need_b:
                    part = grad.sum(dim=0, dtype=torch.float32)
                    grad_b = part if grad_b is None else grad_b + part
        ctx.save_for_backward(grad_x, grad_w, grad_b if grad_b is None else grad_b.to(bias.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients that the forward pass left."""
        grads = [None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors]
        return (*grads, None, None, None)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: that of `x`, or the one that autocast puts in its place."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def layer_window(config: Config, block_idx: int) -> int | None:
    """Sliding window of one layer, or None where it sees everything."""
    if config.sliding_window_size is None or not config.sliding_window_indices[block_idx]:
        return None
    return config.sliding_window_size


def do_softcapping(x: Tensor, thresh: float) -> Tensor:
    """Squeezes `x` smoothly into (-thresh, thresh)."""
    return torch.tanh(x / thresh) * thresh


def batched_index_select(t: Tensor, dim: int, idx: Tensor) -> Tensor:
    """`index_select` along `dim` with other indices `idx` `(B, n)` for each row of `t`, whose first dimension is B."""
    if idx.dim() == 1:
        return t.index_select(dim, idx)
    if dim == 0:  # rows of a table that all share
        return t[idx]
    shape = [1] * t.dim()
    shape[0], shape[dim] = idx.shape
    return t.gather(dim, idx.view(shape).expand(*t.shape[:dim], idx.size(1), *t.shape[dim + 1 :]))


def batched_index_copy_(t: Tensor, dim: int, idx: Tensor, val: Tensor) -> Tensor:
    """`index_copy_` along `dim` with other indices `idx` `(B, n)` for each row of `t`, in place."""
    if idx.dim() == 1:
        return t.index_copy_(dim, idx, val)
    shape = [1] * t.dim()
    shape[0], shape[dim] = idx.shape
    return t.scatter_(dim, idx.view(shape).expand_as(val), val)


def build_mask_cache(max_seq_length: int, device: torch.device | None = None) -> Tensor:
    """Causal mask `(1, 1, max_seq_length, max_seq_length)`, True = may attend. The model itself never builds one."""
    return torch.ones(max_seq_length, max_seq_length, device=device, dtype=torch.bool).tril()[None, None]
