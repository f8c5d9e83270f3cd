"""The GPT of litgpt: every architecture of the named configs in one file, made to be read, copied and changed.

It needs torch and `config.py` beside it, nothing else. Data flows `embed -> decode -> unembed`; a variant overrides one
of the three, or `loss`, or names another part: `class MyBlock(Block): attention_class = MyAttention`.
Letters used for shapes: B batch, T query tokens, S key tokens, C `n_embd`, hs head size, nh heads, G query groups,
n `rope_n_elem`, E experts, V padded vocabulary.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if __package__:
    from .config import Config, register_mlp, register_norm, rope_kind
else:  # a copy in a fork takes the config.py beside it, never an installed one
    from config import Config, register_mlp, register_norm, rope_kind

IGNORE_INDEX = -100
LOSS_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**27}  # most bytes of float32 logits that training holds at a time


class ModelSize(NamedTuple):
    """Parameters (tied ones count once), those that one token passes through, and training FLOPs a token."""

    total: int
    active: int
    flops_per_token: int


@dataclass
class TokenMask:
    """What is known of the tokens of a batch besides their order; an absent part restricts nothing."""

    real: Tensor | None = None  # (B, T) boolean, False = padding, which nobody attends to
    segment_ids: Tensor | None = None  # (B, T): tokens of different packed documents do not see each other


@dataclass
class Context:
    """What all blocks of one forward pass share. A variant that needs more adds fields in a subclass."""

    positions: Tensor  # (T,) or (B, T): where RoPE puts each token
    cos: Tensor  # (T, n) or (B, T, n), with a last dimension of 2 (global, local) where layers differ in their base
    sin: Tensor
    mask: TokenMask | None = None
    input_pos: Tensor | None = None
    input_pos_maxp1: int | None = None


class GPT(nn.Module):
    """A decoder-only transformer (or an encoder, with `causal: false`) as its config describes it."""

    block_class: type["Block"]  # set below to Block; a variant names its own
    _kv_cache_length: int | None = None
    _max_seq_length: int | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.transformer.h = nn.ModuleList(self.block_class(config, block_idx) for block_idx in range(config.n_layer))
        self.transformer.ln_f = config.norm_class(config.n_embd, eps=config.norm_eps)
        self.tie_weights()

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> "GPT":
        """Builds the model of a named config; `kwargs` override its fields."""
        return cls(Config.from_name(name, **kwargs))

    def embed(self, idx: Tensor, ctx: Context) -> Tensor:
        """Token ids `(B, T)` to the residual stream `(B, T, C)`."""
        x = self.transformer.wte(idx)  # (B, T, C)
        if scale := self.config.n_embd**0.5 if self.config.scale_embeddings else self.config.embedding_multiplier:
            x = x * torch.full((), scale, dtype=x.dtype, device=x.device)  # rounded to this dtype, as published
        return F.dropout(x, self.config.dropout, self.training)

    def decode(self, x: Tensor, ctx: Context) -> Tensor:
        """Sends the residual stream `(B, T, C)` through the blocks."""
        for block in self.transformer.h:
            x = block(x, ctx.cos, ctx.sin, ctx.mask, ctx.input_pos, ctx.input_pos_maxp1)
        return x

    def unembed(self, x: Tensor, ctx: Context) -> Tensor:
        """Residual stream `(B, T, C)` to logits `(B, T, V)`: last norm, head, soft-capping (arXiv 2408.00118)."""
        return do_softcapping(self.lm_head(self.final_norm(x)), self.config.final_logit_softcapping)

    def final_norm(self, x: Tensor) -> Tensor:
        """What the head reads, `(B, T, C)`; `logits_scaling` is applied here, where the numbers are fewest."""
        x, scaling = self.transformer.ln_f(x), self.config.logits_scaling
        return x if scaling is None else x / scaling

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in float32; `targets` are already shifted; -100 is ignored; no target at all gives 0."""
        return summed_cross_entropy(logits, targets) / (targets != IGNORE_INDEX).sum().clamp(min=1)

    def forward(
        self, idx: Tensor, input_pos: Tensor | None = None, input_pos_maxp1: int | None = None,
        lm_head_chunk_size: int = 0, *, targets: Tensor | None = None, mask: Tensor | None = None,
        positions: Tensor | None = None, segment_ids: Tensor | None = None, logits_to_keep: int | Tensor = 0
    ) -> Tensor | list[Tensor] | tuple[Tensor, Tensor]:  # fmt: skip
        """Logits of each token of `idx` `(B, T)`, or the summed loss when `targets` are given.

        Args:
            input_pos: `(T,)`, or `(B, T)` where rows differ: consecutive positions of `idx` in the KV cache to use.
            input_pos_maxp1: Cache slots in use after this call; the rest is left out. T says that it was empty before.
            lm_head_chunk_size: When positive, logits come as a list of chunks of this many tokens.
            targets: `(B, T)` ids to predict, already shifted; -100 is ignored. Logits are then not built in full.
            mask: `(B, T)` boolean, True = real token. With a KV cache padding stands on the right.
            positions: `(T,)` or `(B, T)`, may be float: where RoPE puts the tokens, instead of their order.
            segment_ids: `(B, T)` document numbers of packed sequences, without a KV cache only.
            logits_to_keep: Logits of the last so many tokens; a `(B,)` tensor keeps one token of each row; 0 keeps all.

        Returns:
            Logits `(B, T, V)`, a list of such chunks, or with `targets` the pair (sum of the losses in float32, count).
            ValueError for a text above `max_seq_length` or an unfit `input_pos`, TypeError without a KV cache for it.
        """
        ctx = self.build_context(idx, input_pos, input_pos_maxp1, mask, positions, segment_ids)
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
        """Sum of the cross-entropies and count of targets; a variant with own `unembed` or `loss` gets those."""
        n = (targets != IGNORE_INDEX).sum()
        if type(self).unembed is not GPT.unembed or type(self).loss is not GPT.loss:
            return self.loss(self.unembed(x, ctx), targets).float() * n, n
        x, targets = self.final_norm(x).flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
        chunk = max(1, LOSS_CHUNK_BYTES.get(x.device.type, 2**27) // (4 * self.config.padded_vocab_size))
        head, softcap = self.lm_head, self.config.final_logit_softcapping
        if type(head) is nn.Linear:
            return ChunkedHeadLoss.apply(x, head.weight, head.bias, targets, softcap, chunk), n
        rest = zip(x.split(chunk), targets.split(chunk))
        run = partial(checkpoint, lambda x, t: summed_cross_entropy(do_softcapping(head(x), softcap), t))
        return torch.stack([run(*part, use_reentrant=False) for part in rest]).sum(), n

    @property
    def max_seq_length(self) -> int:
        """Longest sequence to be fed; at most `config.block_size`, where it starts."""
        return self._max_seq_length or self.config.block_size

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        if value > self.config.block_size:
            raise ValueError(f"Cannot attend to {value} tokens, block size is only {self.config.block_size}")
        self._max_seq_length = value

    def rope_cache(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions; a forward pass only works out those of its tokens, see `rope_tables`."""
        positions = torch.arange(self.max_seq_length, device=device or self.transformer.wte.weight.device)
        return rope_tables(self.config, positions, self.max_seq_length)

    cos = property(lambda self: self.rope_cache()[0], doc="The cosines of `rope_cache`.")
    sin = property(lambda self: self.rope_cache()[1], doc="The sines of `rope_cache`.")

    def rope_cache_length(self) -> int:
        return self.config.rope_n_elem

    def build_context(
        self, idx: Tensor, input_pos: Tensor | None = None, input_pos_maxp1: int | None = None,
        mask: Tensor | None = None, positions: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Context:  # fmt: skip
        """Works out, once a forward pass, what all blocks share: positions, their cosines and sines, masks."""
        length = T = idx.size(1)
        if self.max_seq_length < T and segment_ids is None:  # a row of packed texts may be longer than a text
            raise ValueError(f"Cannot forward sequence of length {T}, max seq length is only {self.max_seq_length}.")
        if input_pos is not None:
            if input_pos.shape not in ((T,), idx.shape):
                raise ValueError(f"input_pos {tuple(input_pos.shape)} does not fit idx {tuple(idx.shape)}")
            if self._kv_cache_length is None:
                raise TypeError("You need to call `gpt.set_kv_cache()` before passing `input_pos`")
            if segment_ids is not None:
                raise ValueError("segment_ids are for whole texts: packed documents cannot use the KV cache")
            length = self._kv_cache_length
            if input_pos_maxp1 is None and not torch.compiler.is_compiling() and (T > 1 or idx.device.type == "cpu"):
                input_pos_maxp1 = int(input_pos.max()) + 1
            if input_pos_maxp1 is not None and input_pos_maxp1 > length:
                raise ValueError(f"Position {input_pos_maxp1 - 1} is outside of the KV cache of {length} tokens")
        if positions is None:
            positions = token_positions(idx, mask, segment_ids) if input_pos is None else input_pos
        cos, sin = rope_tables(self.config, positions, min(length, self.max_seq_length))
        tokens = None if mask is None and segment_ids is None else TokenMask(mask, segment_ids)
        return Context(positions, cos, sin, tokens, input_pos, input_pos_maxp1)

    def set_kv_cache(
        self, batch_size: int, max_seq_length: int | None = None, rope_cache_length: int | None = None,
        device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:  # fmt: skip
        """Gives each attention an empty cache of `max_seq_length` tokens (default: the model's `max_seq_length`)."""
        self._kv_cache_length = max_seq_length = max_seq_length or self.max_seq_length
        self.max_seq_length = max(max_seq_length, self.max_seq_length)
        weight = self.transformer.wte.weight
        where = dict(device=device or weight.device, dtype=dtype or weight.dtype)
        for block in self.transformer.h:
            block.attn.kv_cache = block.attn.build_kv_cache(batch_size, max_seq_length, rope_cache_length, **where)

    def clear_kv_cache(self) -> None:
        """Frees the caches."""
        self._kv_cache_length = None
        for block in self.transformer.h:
            block.attn.kv_cache = None

    def init_weights(self) -> None:
        """Draws new weights, also after `to_empty`, as GPT-NeoX does (arXiv 2204.06745): linear layers and embeddings
        N(0, 2 / (5 C)), projections back into the residual stream N(0, 1 / (C L^2)), biases 0; others have theirs drawn
        by the module's `reset_parameters`."""
        std, std_proj = math.sqrt(2 / 5 / self.config.n_embd), 1 / math.sqrt(self.config.n_embd) / self.config.n_layer
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                GPT._init_weights(self, module, std_proj if name.endswith(".proj") else std)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if type(self)._init_weights is not GPT._init_weights:  # a variant has its own
            self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module: nn.Module, std: float = 0.02) -> None:
        """For `gpt.apply(gpt._init_weights)`: linear layers and embeddings from N(0, std^2), biases 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def get_nparams_and_flops(self, seq_len: int) -> ModelSize:
        """Parameters and FLOPs (arXiv 2204.02311): 6 for each active weight but the embedding, and 6 (d_qk + d_v)
        for each head, layer and position in reach at `seq_len`."""
        config = self.config
        total = active = sum(p.numel() for p in self.parameters())
        if routed := sum(p.numel() for n, p in self.named_parameters() if ".experts." in n):
            active += routed * config.n_expert_per_token // config.n_expert - routed
        weights = active - (0 if config.tie_embeddings else self.transformer.wte.weight.numel())
        width = config.qk_head_dim + config.v_head_dim if config.latent_attention else 2 * config.head_size
        reach = sum(min(seq_len, layer_window(config, i) or seq_len) for i in range(config.n_layer))
        return ModelSize(total, active, 6 * weights + 6 * config.n_head * width * reach)

    def tie_weights(self) -> None:
        """Makes head and embedding one parameter, if the config says so."""
        for module in self.lm_head.modules() if self.config.tie_embeddings else ():  # the head may be wrapped
            if isinstance(module, nn.Linear) and module.out_features == self.config.padded_vocab_size:
                module.weight = self.transformer.wte.weight

    def _apply(self, fn: Any, recurse: bool = True) -> "GPT":
        """Keeps tied weights tied when parameters are replaced, as on leaving the meta device."""
        super()._apply(fn, recurse).tie_weights()
        return self

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch. A tied checkpoint may lack the head; one whose head was trained apart is loaded untied."""
        if self.config.tie_embeddings and (wte := state_dict.get("transformer.wte.weight")) is not None:
            head = state_dict.get("lm_head.weight", wte)
            state_dict = {**state_dict, "lm_head.weight": head}
            if head is not wte and head.shape == wte.shape and not head.is_meta and not torch.equal(head, wte):
                warnings.warn("The checkpoint's head differs from its embedding: loaded untied", stacklevel=2)
                self.config.tie_embeddings = False
                self.lm_head.weight = nn.Parameter(torch.empty_like(self.lm_head.weight))
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.tie_weights()
        return result


class Block(nn.Module):
    """Attention and MLP around the residual stream, one after the other or, with `parallel_residual`, side by side."""

    attention_class: type[nn.Module]  # set below to CausalSelfAttention; a variant names its own
    mlp_class: type[nn.Module] | None = None  # None: the class that `config.mlp_class_name` names

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        super().__init__()
        if not config.parallel_residual and config.shared_attention_norm:
            raise NotImplementedError("No known model shares the attention norm without parallel residuals")
        self.config = config
        latent = config.latent_attention and self.attention_class is CausalSelfAttention
        attention_class = MultiheadLatentAttention if latent else self.attention_class
        mlp_class = LLaMAMLP if block_idx < (config.first_k_dense_replace or 0) else config.mlp_class
        norm = partial(config.norm_class, config.n_embd, eps=config.norm_eps)
        self.norm_1 = norm() if config.norm_1 else nn.Identity()
        self.attn = attention_class(config, block_idx)
        self.post_attention_norm = norm() if config.post_attention_norm else nn.Identity()
        self.norm_2 = None if config.shared_attention_norm else norm() if config.norm_2 else nn.Identity()
        self.mlp = (self.mlp_class or mlp_class)(config)
        self.post_mlp_norm = norm() if config.post_mlp_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.residual_multiplier = 1.0 if config.residual_multiplier is None else config.residual_multiplier

    def forward(
        self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, mask: TokenMask | Tensor | None = None,
        input_pos: Tensor | None = None, input_pos_maxp1: int | None = None
    ) -> Tensor:  # fmt: skip
        """`(B, T, C)` to `(B, T, C)`; what is not given follows from the config and the order of the tokens."""
        normed = self.norm_1(x)  # (B, T, C)
        attn = self.attn(normed, cos, sin, mask, input_pos, input_pos_maxp1)
        attn = self.dropout(self.post_attention_norm(attn))
        if not self.config.parallel_residual:
            x = torch.add(x, attn, alpha=self.residual_multiplier)
        mlp = self.dropout(self.post_mlp_norm(self.mlp(normed if self.norm_2 is None else self.norm_2(x))))
        return torch.add(x, attn + mlp if self.config.parallel_residual else mlp, alpha=self.residual_multiplier)


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query and multi-query attention, with RoPE, sliding window, QK-norm and soft-capping."""

    attn = property(lambda self: self.qkv, doc="The fused projection under its older name.")

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        super().__init__()
        self.config, self.block_idx = config, block_idx
        nh, G, hs = config.n_head, config.n_query_groups, config.head_size
        self.qkv = nn.Linear(config.n_embd, (nh + 2 * G) * hs, bias=config.bias or config.attn_bias)
        self.proj = nn.Linear(nh * hs, config.n_embd, bias=config.bias)
        self.norm_q = self.norm_k = None
        if config.norm_qk:
            whole = config.norm_qk_type == "olmo2"  # over all heads at once, else over each head
            self.norm_q = config.norm_class(nh * hs if whole else hs, eps=config.norm_eps)
            self.norm_k = config.norm_class(G * hs if whole else hs, eps=config.norm_eps)
        self.window = layer_window(config, block_idx)
        self.scale = 1.0 / math.sqrt(config.attention_scores_scalar or hs)
        self.cache_shape = (G, hs, hs)  # heads, width of the keys, width of the values
        self.kv_cache: KVCache | None = None

    def forward(
        self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, mask: TokenMask | Tensor | None = None,
        input_pos: Tensor | None = None, input_pos_maxp1: int | None = None
    ) -> Tensor:  # fmt: skip
        """Attention over `x` `(B, T, C)` and what the KV cache holds; see `GPT.forward` for the arguments.
        A `mask` tensor, `(T, S)` or `(B, 1, T, S)` with True = may attend, takes the place of causality and window."""
        if cos is None:
            length = x.size(1) if input_pos is None or self.kv_cache is None else self.kv_cache.length
            positions = torch.arange(x.size(1), device=x.device) if input_pos is None else input_pos
            cos, sin = rope_tables(self.config, positions, length)
        if self.config.rope_local_base_freq is not None:
            cos, sin = (z[..., self.config.rope_indices[self.block_idx]] for z in (cos, sin))
        dtype = compute_dtype(x)
        q, k, v = self.project(x, cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2))
        y = self.attend(q, k, v, mask, input_pos, input_pos_maxp1)  # (B, T, nh, hs)
        return self.proj(y.flatten(2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, nh, T, hs)`, keys and values `(B, G, T, hs)` of `x`; `cos` and `sin` are `(.., T, 1, n)`."""
        nh, G, hs = self.config.n_head, self.config.n_query_groups, self.config.head_size
        q, k, v = self.qkv(x).split((nh * hs, G * hs, G * hs), dim=-1)
        if self.norm_q is not None and self.config.norm_qk_type == "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = q.unflatten(-1, (nh, hs)), k.unflatten(-1, (G, hs)), v.unflatten(-1, (G, hs))  # (B, T, heads, hs)
        if self.norm_q is not None and self.config.norm_qk_type != "olmo2":
            q, k = self.norm_q(q), self.norm_k(k)
        if not (self.config.nope_indices and self.config.nope_indices[self.block_idx]):
            q, k = (rotate(z, cos, sin, self.config.rope_interleave) for z in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).contiguous()  # a view would keep all of qkv

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, input_pos: Tensor | None, input_pos_maxp1: int | None
    ) -> Tensor:
        """Stores what `project` made in the cache, if there is one, and attends with the cheapest right mask."""
        T, cache = q.size(2), self.kv_cache
        if input_pos is None:
            return self.attend_afresh(q, k, v, mask)
        if cache is None:
            raise TypeError("You need to call `gpt.set_kv_cache()` before passing `input_pos`")
        real = mask.real if isinstance(mask, TokenMask) else None
        if T > 1 and input_pos_maxp1 == T and not isinstance(mask, Tensor):  # prefill of an empty cache
            cache(input_pos, k, v, real)
            return self.attend_afresh(q, k, v, None)
        if cache.is_ring and T > 1:  # a ring forgets keys that the first queries of the chunk still see
            k_pos = torch.cat((cache.positions(input_pos[..., :1] - 1), input_pos), dim=-1)
            k_all = torch.cat((cache.k[: len(k)].to(k), k), dim=2)
            v_all = torch.cat((cache.v[: len(v)].to(v), v), dim=2)
            cache(input_pos, k, v, real)
        else:
            used = slice(0, input_pos_maxp1)
            k_all, v_all = (z[:, :, used] for z in cache(input_pos, k, v, real))
            if T == 1 and input_pos.dim() == 1 and input_pos_maxp1 is not None and mask is None:
                return self.scaled_dot_product_attention(q, k_all, v_all, is_causal=False)  # all slots in use are seen
            k_pos = cache.positions(input_pos[..., -1:])[..., used]
        if isinstance(mask, Tensor):
            return self.scaled_dot_product_attention(q, k_all, v_all, mask[..., : k_all.size(2)])
        order = TokenOrder(input_pos, k_pos, self.config.causal, self.window, TokenMask())
        return attend_in_blocks(self, q, k_all, v_all, order)

    def attend_afresh(self, q: Tensor, k: Tensor, v: Tensor, mask: TokenMask | Tensor | None) -> Tensor:
        """Attention among tokens that have no history: `(B, T, nh, hs)`."""
        T, causal, softcap = q.size(2), self.config.causal, self.config.attention_logit_softcapping
        window = None if self.window is None or self.window >= T else self.window
        if isinstance(mask, Tensor) or (mask is None and window is None and (softcap is None or T == 1)):
            return self.scaled_dot_product_attention(q, k, v, mask, mask is None and causal and T > 1)
        order = torch.arange(T, device=q.device)
        order = TokenOrder(order, order, causal, window, mask or TokenMask(), same_tokens=True)
        return attend_in_blocks(self, q, k, v, order)

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        """The kernel: `q` `(B, nh, T, hs)`, `k`, `v` `(B, G, S, hs)`, boolean `mask` `(.., T, S)`: `(B, T, nh, hs)`.
        Without a mask attention is causal unless told otherwise. K and V are never expanded to nh heads."""
        nh, G, T, softcap = q.size(1), k.size(1), q.size(2), self.config.attention_logit_softcapping
        is_causal = mask is None and T > 1 if is_causal is None else is_causal
        dropout = self.config.dropout if self.training else 0.0
        # with gradients to make, the CPU's fused kernel takes twice as long in low precision at T = 256
        slow = q.device.type == "cpu" and q.dtype != torch.float32 and q.requires_grad and k.size(2) <= 512
        if softcap is not None or slow:
            if is_causal:
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=q.device).tril()
            return explicit_attention(q, k, v, mask, self.scale, softcap, dropout).transpose(1, 2)
        if nh != G and not is_causal and (mask is None or mask.dim() < 3 or mask.size(1) == 1):
            return grouped_attention(q, k, v, mask, dropout, self.scale).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale, enable_gqa=nh != G)
        return y.transpose(1, 2)

    def build_kv_cache(
        self, batch_size: int, max_seq_length: int, rope_cache_length: int | None = None,
        device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "KVCache":  # fmt: skip
        """An empty cache for this layer: a ring where the window is shorter than `max_seq_length`."""
        heads, *widths = self.cache_shape
        shapes = [(batch_size, heads, max_seq_length, width) for width in widths]
        ring = self.window is not None and self.window < max_seq_length
        return KVCache(*shapes, device, dtype, is_sliding_window=ring, sliding_window_size=self.window)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Takes checkpoints of old, whose `attn.attn` stores [q..q k v] group by group."""
        for name in ("weight", "bias"):
            if (old := state_dict.pop(f"{prefix}attn.{name}", None)) is not None:
                old = old.unflatten(0, (self.config.n_query_groups, -1, self.config.head_size))
                parts = old[:, :-2].flatten(0, 2), old[:, -2].flatten(0, 1), old[:, -1].flatten(0, 1)
                state_dict[f"{prefix}qkv.{name}"] = torch.cat(parts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MultiheadLatentAttention(CausalSelfAttention):
    """Attention whose keys and values come from a small latent, which is all the cache keeps (arXiv 2405.04434)."""

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        nn.Module.__init__(self)
        self.config, self.block_idx = config, block_idx
        nh, C, rank, rope = config.n_head, config.n_embd, config.kv_lora_rank, config.qk_rope_head_dim
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=config.attn_bias)
            self.q_a_norm = RMSNorm(config.q_lora_rank, eps=1e-6)  # whatever norm_eps is
            self.q_b_proj = nn.Linear(config.q_lora_rank, nh * config.qk_head_dim, bias=config.bias)
        else:
            self.q_proj = nn.Linear(C, nh * config.qk_head_dim, bias=config.bias)
        self.kv_a_proj_with_mqa = nn.Linear(C, rank + rope, bias=config.attn_bias)
        self.kv_a_norm = RMSNorm(rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(rank, nh * (config.qk_nope_head_dim + config.v_head_dim), bias=config.bias)
        self.proj = nn.Linear(nh * config.v_head_dim, C, bias=config.attn_bias)
        self.scale = 1.0 / math.sqrt(config.attention_scores_scalar or config.qk_head_dim)
        if (yarn := config.rope_adjustments or {}).get("mscale_all_dim"):
            self.scale *= yarn_get_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
        self.window, self.kv_cache, self.cache_shape = layer_window(config, block_idx), None, (1, rank, rope)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, nh, T, nope + rope)`, latents `(B, 1, T, rank)`, rotary keys `(B, 1, T, rope)` of all heads."""
        config, rope = self.config, self.config.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if config.q_lora_rank else self.q_proj(x)
        q = q.unflatten(-1, (config.n_head, -1))  # (B, T, nh, nope + rope)
        q_nope, q_rope = q.split((config.qk_nope_head_dim, rope), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, rope), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin, config.rope_interleave)), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin, config.rope_interleave)  # (B, T, 1, rope)
        return q.transpose(1, 2), self.kv_a_norm(latent).unsqueeze(1), k_rope.transpose(1, 2)

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool | None = None
    ) -> Tensor:
        """The kernel over latents `k` `(B, 1, S, rank)` and rotary keys `v` `(B, 1, S, rope)`: `(B, T, nh, d_v)`.
        Queries that look back on a cache move into the latent space; fresh text gets keys and values for each head."""
        config, latent, k_rope = self.config, k, v
        nh, nope, d_v, rope = config.n_head, config.qk_nope_head_dim, config.v_head_dim, config.qk_rope_head_dim
        is_causal = mask is None and q.size(2) > 1 if is_causal is None else is_causal
        dropout = config.dropout if self.training else 0.0
        plain = type(self.kv_b_proj) is nn.Linear and self.kv_b_proj.bias is None
        if plain and not is_causal and (q.size(2) == 1 or q.size(2) < k.size(2)):
            w = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (nh, nope + d_v))
            q_nope, q_rope = q.split((nope, rope), dim=-1)
            q = torch.cat((torch.einsum("bhtd,hdr->bhtr", q_nope, w[:, :nope]), q_rope), dim=-1)  # (.., rank + rope)
            k = torch.cat((latent, k_rope), dim=-1).to(q.dtype)  # (B, 1, S, rank + rope), also the values
            y = grouped_attention(q, k, k, mask, dropout, self.scale)
            return torch.einsum("bhtr,hdr->bthd", y[..., : config.kv_lora_rank], w[:, nope:])
        kv = self.kv_b_proj(latent[:, 0]).unflatten(-1, (nh, nope + d_v)).transpose(1, 2)  # (B, nh, S, ..)
        k_nope, v = kv.to(q.dtype).split((nope, d_v), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, nh, -1, -1)), dim=-1)  # (B, nh, S, nope + rope)
        q, k, v = (F.pad(z, (0, max(nope + rope, d_v) - z.size(-1))) for z in (q, k, v))  # else no fused kernel
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)
        return y[..., :d_v].transpose(1, 2)


@dataclass
class TokenOrder:
    """Who sees whom, as positions. Boolean masks are built from it for the block at hand, never T x T at once."""

    q_pos: Tensor  # (T,) or (B, T)
    k_pos: Tensor  # (S,) or (B, S); a negative position is an empty slot
    causal: bool
    window: int | None
    tokens: TokenMask
    same_tokens: bool = False  # the keys are the queries' own: what is ahead or behind the window need not be read

    def keys(self, rows: slice) -> slice:
        """The keys that the queries `rows` may need."""
        start, stop, segments = 0, self.k_pos.size(-1), self.tokens.segment_ids
        if self.same_tokens and self.window is not None:
            start, stop = max(0, rows.start - self.window + 1), min(stop, rows.stop + self.window - 1)
        if self.same_tokens and self.causal:
            stop = min(stop, rows.stop)
            if segments is not None and segments.device.type == "cpu" and not torch.compiler.is_compiling():
                before = (segments[:, : rows.start] == segments[:, rows.start, None]).sum(dim=1).max()
                start = max(start, rows.start - int(before))  # the first document that reaches into `rows`
        return slice(start, stop)

    def visible(self, rows: slice, cols: slice) -> Tensor:
        """Boolean mask `(t, s)`, or `(B, 1, t, s)` where the rows of the batch differ."""
        q, k = self.q_pos[..., rows].unsqueeze(-1), self.k_pos[..., cols].unsqueeze(-2)
        seen = (k >= 0) & (k <= q if self.causal else k == k)
        if self.window is not None:
            seen = seen & (k > q - self.window) & (k < q + self.window)
        seen = seen.unsqueeze(1) if seen.dim() == 3 else seen  # (B, 1, t, s)
        if (real := self.tokens.real) is not None:
            seen = (seen & real[:, None, None, cols]) | (q == k)  # padding sees itself: no softmax is empty
        if (segments := self.tokens.segment_ids) is not None:
            seen = seen & (segments[:, None, rows, None] == segments[:, None, None, cols])
        return seen


def attend_in_blocks(attn: CausalSelfAttention, q: Tensor, k: Tensor, v: Tensor, order: TokenOrder) -> Tensor:
    """Runs `attn`'s kernel over blocks of queries, so that masks stay small and far keys are not read."""
    T, S, softcap = q.size(2), k.size(2), attn.config.attention_logit_softcapping
    n_scores = q.size(1) // k.size(1) if softcap is None else 2 * q.size(0) * q.size(1)
    near = order.window if order.same_tokens else None  # keys that a query needs, where that is few
    size = max(8, 2**22 // ((near or S) * n_scores))
    size = min(size, max(128, (near or 0) // 4)) if near or order.tokens.segment_ids is not None else size
    blocks, y = [], None
    for start in range(0, T, size):
        rows = slice(start, min(start + size, T))
        cols = order.keys(rows)
        parts = q[:, :, rows], k[:, :, cols], v[:, :, cols]
        blocks.append(attn.scaled_dot_product_attention(*parts, order.visible(rows, cols)))  # (B, t, nh, hs)
        if not torch.is_grad_enabled():  # many small live blocks keep the allocator from using memory again
            y = blocks[0].new_empty(len(q), T, *blocks[0].shape[2:]) if y is None else y
            y[:, rows] = blocks.pop()
    return torch.cat(blocks, dim=1) if y is None else y  # (B, T, nh, hs)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float) -> Tensor:
    """Attention, not causal, with the heads of a group as more queries of its key head, which is not expanded so."""
    B, nh, T, _ = q.shape
    if mask is not None:
        mask = mask.repeat(*[1] * (mask.dim() - 2), nh // k.size(1), 1)
    y = F.scaled_dot_product_attention(q.reshape(B, k.size(1), -1, q.size(-1)), k, v, mask, dropout, scale=scale)
    return y.reshape(B, nh, T, -1)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, dropout: float
) -> Tensor:
    """Attention as two matrix products and a softmax, with soft-capping: `(B, nh, T, hs)`."""
    (B, nh, T, _), (G, S) = q.shape, k.shape[1:3]
    scores = (q.reshape(B, G, nh // G * T, -1) * scale) @ k.transpose(-2, -1)  # (B, G, nh / G * T, S)
    scores = do_softcapping(scores.view(B, nh, T, S), softcap)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)
    return (weights.view(B, G, nh // G * T, S) @ v).view(B, nh, T, -1)


class KVCache(nn.Module):
    """Keys and values of the tokens so far, written in place; with a sliding window a ring of the last ones. Position p
    is kept in slot p, in a ring of W slots in slot p mod W, so where the token of a slot stands follows from the row's
    last position alone. A ring cannot go back: what it has overwritten is gone."""

    def __init__(
        self, k_shape: tuple[int, int, int, int], v_shape: tuple[int, int, int, int],
        device: torch.device | None = None, dtype: torch.dtype | None = None, is_sliding_window: bool = False,
        sliding_window_size: int | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.is_ring, self.length = is_sliding_window, k_shape[2]
        for name, (B, heads, S, width) in dict(k=k_shape, v=v_shape).items():
            slots = min(S, sliding_window_size) if is_sliding_window else S
            empty = torch.zeros(B, heads, slots, width, device=device, dtype=dtype)
            self.register_buffer(name, empty, persistent=False)

    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Writes `k` and `v` `(B, G, T, hs)` at `input_pos` `(T,)` or `(B, T)`; returns all slots, `(B, G, S, hs)`.
        Padding, where `real` `(B, T)` is False, stands on the right of its row and is kept out of a ring."""
        if self.k.dtype != k.dtype:
            self.k, self.v = self.k.to(k.dtype), self.v.to(v.dtype)
        k_slots, v_slots = self.k[: len(k)], self.v[: len(v)]
        if not self.is_ring or (k.size(2) == 1 and real is None):
            slots = input_pos % self.k.size(2) if self.is_ring else input_pos
            return batched_index_copy_(k_slots, 2, slots, k), batched_index_copy_(v_slots, 2, slots, v)
        # each slot takes the newest token of the chunk that belongs there, or keeps what it holds
        last = input_pos[..., -1:] if real is None else input_pos[..., :1] + real.sum(dim=-1, keepdim=True) - 1
        source = self.positions(last) - input_pos[..., :1]  # (W,) or (B, W): place in the chunk
        source = source.expand(len(k), -1)[:, None, :, None]  # (B, 1, W, 1)
        for slots, new in ((k_slots, k), (v_slots, v)):
            take = source.clamp(0, new.size(2) - 1).expand(-1, new.size(1), -1, new.size(3))
            slots.copy_(torch.where(source >= 0, new.gather(2, take), slots))
        return k_slots, v_slots

    def positions(self, last: Tensor) -> Tensor:
        """Position of the token in each slot, `(S,)` or `(B, S)`, after `last` `(1,)` or `(B, 1)`; below 0 = empty."""
        slots = torch.arange(self.k.size(2), device=self.k.device)
        return last - (last - slots) % self.k.size(2) if self.is_ring else slots

    def reset_parameters(self) -> None:
        torch._foreach_zero_([self.k, self.v])


@register_mlp
class GptNeoxMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.config, width = config, intermediate_size or config.intermediate_size
        self.fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate=self.config.gelu_approximate))


@register_mlp
class LLaMAMLP(nn.Module):
    """SwiGLU: `proj(silu(fc_1(x)) * fc_2(x))` (arXiv 2002.05202)."""

    act = staticmethod(F.silu)

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.config, width = config, intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, width, bias=config.bias)
        self.fc_2 = nn.Linear(config.n_embd, width, bias=config.bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))  # one cast for both layers
        gate, up = self.fc_1(x), self.fc_2(x)
        keep = torch.compiler.is_compiling() or not torch.is_grad_enabled()  # a compiler decides for itself
        return self.proj(self.act(gate) * up if keep else GatedActivation.apply(gate, up, self.act))


@register_mlp
class GemmaMLP(LLaMAMLP):
    """The gated MLP with a GELU."""

    def act(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate=self.config.gelu_approximate)


class GatedActivation(torch.autograd.Function):
    """`act(gate) * up`, of which only the two inputs are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            activated = ctx.act(gate := gate.detach().requires_grad_())
        return *torch.autograd.grad(activated, gate, grad * up), grad * activated.detach(), None


@register_mlp
class MLP(nn.Module):
    """Two linear layers with an activation between them, to start your own from."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.config, width = config, intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, width, bias=config.bias)
        self.act = nn.GELU(approximate=config.gelu_approximate)
        self.fc_2 = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_2(self.act(self.fc_1(x)))


@register_mlp
class LLaMAMoE(nn.Module):
    """Mixture of experts: each token passes through `n_expert_per_token` of `n_expert` MLPs (arXiv 2401.04088), and
    through the shared ones; with `n_expert_groups` DeepSeek-V3's grouped sigmoid router picks them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, C, E = config.moe_intermediate_size or config.intermediate_size, config.n_embd, config.n_expert
        self.gate = GroupedTopkRouter(config) if config.n_expert_groups else nn.Linear(C, E, bias=False)
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
    """Router that picks groups first: that of DeepSeek-V3, with a bias for the choice (arXiv 2412.19437), or of V2."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        has_bias = config.router_scoring == "sigmoid"
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert) if has_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, mean=0.0, std=math.sqrt(2.0 / 5 / self.config.n_embd))
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    @torch.no_grad()
    def get_topk_indices(self, scores: Tensor) -> Tensor:
        """Indices `(N, k)` of the chosen experts from the scores `(N, E)`."""
        config, N, groups = self.config, scores.size(0), self.config.n_expert_groups
        scores = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        grouped = scores.view(N, groups, -1)  # (N, groups, E / groups)
        group_scores = grouped.topk(config.n_topk_scores_per_group or 2, dim=-1)[0].sum(dim=-1)  # (N, groups)
        best = group_scores.topk(config.n_topk_groups, dim=-1, sorted=False)[1]
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True).unsqueeze(-1)
        return grouped.masked_fill(~kept, float("-inf")).flatten(1).topk(config.n_expert_per_token, dim=-1)[1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices `(N, k)` for tokens `(N, C)`; the scores are in float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (N, E)
        scores = logits.sigmoid() if self.config.router_scoring == "sigmoid" else logits.softmax(dim=-1)
        experts = self.get_topk_indices(scores)
        weights = scores.gather(1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor, experts


@register_norm
class RMSNorm(nn.Module):
    """Root mean square norm, in float32 inside (arXiv 1910.07467); a unit offset stores the weight minus one."""

    def __init__(self, size: int, dim: int = -1, eps: float = 1e-6, add_unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if add_unit_offset else torch.ones(size))
        self.eps, self.dim, self.add_unit_offset = eps, dim, add_unit_offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + 1 if self.add_unit_offset else self.weight
        if torch.compiler.is_compiling():  # it decides what to keep, and fuses the plain formula with its neighbours
            return (x.float() * torch.rsqrt(x.float().pow(2).mean(self.dim, True) + self.eps) * weight).to(x.dtype)
        return RootMeanSquare.apply(x, weight, self.dim, self.eps)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.add_unit_offset else 1.0)


class RootMeanSquare(torch.autograd.Function):
    """The arithmetic of `RMSNorm`, which keeps its input and one number a token for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dim: int, eps: float) -> Tensor:
        ctx.dim, wide = dim, x.float()
        scale = torch.rsqrt(wide.pow(2).mean(dim=dim, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = ((grad := grad * weight) - normed * (grad * normed).mean(dim=ctx.dim, keepdim=True)) * scale
        return grad.to(x.dtype), grad_weight, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """Rotates the first n elements of the last dimension; `cos` and `sin` `(.., n)` broadcast (arXiv 2104.09864).
    Partners are half of n apart; with `interleave` they come as neighbours and leave half of n apart (DeepSeek)."""
    half = cos.size(-1) // 2
    x1, x2, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    x1, x2 = torch.cat((x1, x2), dim=-1).unflatten(-1, (half, 2)).unbind(-1) if interleave else (x1, x2)
    c, s = cos[..., :half], sin[..., :half]
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s, rest), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """Rotates `x` `(B, nh, T, n)` by `cos` and `sin` `(T, n)` or `(B, T, n)`, in the dtype of `x`."""
    cos, sin = (z.unsqueeze(1) if z.dim() == 3 else z for z in (cos, sin))  # (T, n) or (B, 1, T, n)
    return rotate(x, cos, sin, interleave).to(x.dtype)


def rope_tables(config: Config, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(.., n)` of any positions, also fractional; LongRoPE asks for the length of the text."""
    rope = config.rope_base, config.rope_condense_ratio, config.rope_adjustments, config.rope_local_base_freq
    return build_rope_cache(length, config.rope_n_elem, positions.device, *rope, positions=positions)


def build_rope_cache(
    seq_len: int, n_elem: int, device: torch.device | None = None, base: float = 10000, condense_ratio: int = 1,
    extra_config: dict | None = None, rope_local_base_freq: float | None = None, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosines and sines `(.., n_elem)` of `positions` (default: 0..seq_len-1), in float32; with a local base they are
    `(.., n_elem, 2)`: global, local. See `rope_frequencies` for `extra_config`."""
    positions = torch.arange(seq_len, device=device) if positions is None else positions
    freqs, factor = rope_frequencies(n_elem, base, extra_config, seq_len, positions.device)
    angles = (positions.float() / condense_ratio).unsqueeze(-1) * freqs
    angles = torch.cat((angles, angles), dim=-1)  # (.., n)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if rope_local_base_freq is None:
        return cos, sin
    local = build_rope_cache(seq_len, n_elem, device, rope_local_base_freq, condense_ratio, positions=positions)
    return torch.stack((cos, local[0]), dim=-1), torch.stack((sin, local[1]), dim=-1)


def rope_frequencies(
    n_elem: int, base: float, extra_config: dict | None, length: int, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Angle per position of each of the n / 2 pairs, in float32, and the factor on cosines and sines. The keys of
    `extra_config` pick the method: `factor` alone divides all frequencies (arXiv 2306.15595); `low_freq_factor,
    high_freq_factor` is Llama 3's; `beta_fast, beta_slow` is YaRN (arXiv 2309.00071); `short_factor, long_factor` is
    LongRoPE (arXiv 2402.13753), where `length` decides between the two."""
    freqs = 1.0 / base ** (torch.arange(0, n_elem - n_elem % 2, 2, device=device).float() / n_elem)  # (n / 2,)
    if (kind := rope_kind(extra_config)) is None:
        return freqs, 1.0
    factor, original, scale = (extra_config.get(k) for k in ("factor", "original_max_seq_len", "attention_factor"))
    if kind == "longrope":
        divisors = extra_config["long_factor" if length > original else "short_factor"]
        scale = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original)) if scale is None else scale
        return freqs / torch.tensor(divisors, device=device, dtype=torch.float32), scale
    if kind == "yarn":
        slow, yarn_scale = yarn_ramp(n_elem, base, extra_config, freqs)
        return freqs * (1 - slow) + freqs / factor * slow, yarn_scale if scale is None else scale
    if kind == "llama3":
        low, high = extra_config["low_freq_factor"], extra_config["high_freq_factor"]
        turns = original * freqs / (2 * math.pi)  # how often a pair turns in the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return freqs * (keep + (1 - keep) / factor), 1.0
    return freqs / factor, 1.0


def yarn_ramp(n_elem: int, base: float, extra_config: dict, freqs: Tensor) -> tuple[Tensor, float]:
    """How much of each pair YaRN interpolates, from 0 for those that turn often to 1 for slow ones; and its scale."""
    wavelengths = [extra_config["original_max_seq_len"] / extra_config[key] for key in ("beta_fast", "beta_slow")]
    low, high = (n_elem * math.log(w / (2 * math.pi)) / (2 * math.log(base)) for w in wavelengths)  # pairs of those
    if extra_config.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_elem - 1)
    slow = ((torch.arange(len(freqs), device=freqs.device) - low) / max(high - low, 0.001)).clamp(0, 1)
    factor, mscale, all_dim = (extra_config.get(key) for key in ("factor", "mscale", "mscale_all_dim"))
    over = yarn_get_mscale(factor, all_dim) if mscale and all_dim else 1.0
    return slow, yarn_get_mscale(factor, mscale if mscale and all_dim else 1) / over


def yarn_get_mscale(scale: float = 1, mscale: float = 1) -> float:
    """YaRN's factor on attention for a context `scale` times as long: 0.1 mscale ln(scale) + 1."""
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def token_positions(idx: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """Position of each token of `idx` `(B, T)` in its text: `(T,)`, or `(B, T)` where padding or packing shifts it."""
    order = torch.arange(idx.size(1), device=idx.device)
    if segment_ids is not None:
        starts = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
        return order - (order * starts).cummax(dim=1)[0]  # (B, T)
    return order if mask is None else (mask.cumsum(dim=1) - 1).clamp(min=0)


class ChunkedHeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a linear head in chunks of tokens, whose gradients are made while the logits are at hand
    (arXiv 2410.10989): keeping the logits costs memory, and building them again a third of the head's work."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        """`x` `(N, C)`, `weight` `(V, C)`, `targets` `(N,)` to the summed loss in float32."""
        dtype = compute_dtype(x)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        need_x, need_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = grad_b = None
        eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        rows = max(1, 2**20 // len(w)) if eager_cpu else chunk  # what a CPU's cache holds; a compiler fuses
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(x), chunk):
                xc, tc = x[i : i + chunk].to(dtype), targets[i : i + chunk].unsqueeze(1)
                logits = F.linear(xc, w, b)  # (chunk, V), turned into their gradient in place
                for row, t in zip(logits.split(rows), tc.split(rows)):
                    real, picked = t != IGNORE_INDEX, t.clamp(min=0)  # (rows, 1)
                    part = do_softcapping(row.float(), softcap)
                    log_p = F.log_softmax(part, dim=1)
                    total -= (log_p.gather(1, picked) * real).sum()
                    if need_x or need_w:
                        grad = log_p.exp_().scatter_add_(1, picked, -real.float()).mul_(real)
                        row.copy_(grad if softcap is None else grad.mul_(1 - (part / softcap).square_()))
                if need_x:
                    grad_x[i : i + chunk] = logits @ w
                if need_w:
                    grad_w = torch.empty_like(weight) if grad_w is None else grad_w
                    for g, part in zip(grad_w.split(2**12), logits.split(2**12, dim=1)):  # a whole one is slow to copy
                        (g.add_ if i else g.copy_)(part.t() @ xc)
                    if bias is not None:
                        grad_b = logits.sum(dim=0, dtype=torch.float32) + (0 if grad_b is None else grad_b)
                logits = row = part = log_p = grad = None  # else the next chunk comes on top of this one
        ctx.grads = [grad_x, grad_w, None if grad_b is None else grad_b.to(bias.dtype)]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Scales, in place, the gradients that the forward pass left."""
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("The loss of a chunked head can be sent backward once only")
        return (*(None if g is None else g.mul_(grad_output) for g in grads), None, None, None)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of `logits` `(.., V)` in float32, where `targets` `(..)` are not -100."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: that of `x`, or the one that autocast puts in its place."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def layer_window(config: Config, block_idx: int) -> int | None:
    """Sliding window of one layer, or None where it sees everything."""
    windowed = config.sliding_window_size is not None and config.sliding_window_indices[block_idx]
    return config.sliding_window_size if windowed else None


def do_softcapping(x: Tensor, thresh: float | None) -> Tensor:
    """Squeezes `x` smoothly into (-thresh, thresh); None leaves it."""
    return x if thresh is None else torch.tanh(x / thresh) * thresh


def batched_index_select(t: Tensor, dim: int, idx: Tensor) -> Tensor:
    """`index_select` along `dim` with `idx` `(n,)`, or `(B, n)` for other indices in each of the B rows of `t`."""
    if idx.dim() == 1 or dim == 0:
        return t.index_select(dim, idx) if idx.dim() == 1 else t[idx]
    return t.gather(dim, spread(idx, dim, (*t.shape[:dim], idx.size(1), *t.shape[dim + 1 :])))


def batched_index_copy_(t: Tensor, dim: int, idx: Tensor, val: Tensor) -> Tensor:
    """`index_copy_` along `dim` with `idx` `(n,)`, or `(B, n)` for other indices in each of the B rows of `t`."""
    return t.index_copy_(dim, idx, val) if idx.dim() == 1 else t.scatter_(dim, spread(idx, dim, val.shape), val)


def spread(idx: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    """`idx` `(B, n)` as a view of `shape`, with its rows along dimension 0 and its columns along `dim`."""
    return idx.view(len(idx), *([1] * (dim - 1)), -1, *([1] * (len(shape) - dim - 1))).expand(shape)


def build_mask_cache(max_seq_length: int, device: torch.device | None = None) -> Tensor:
    """Causal mask `(1, 1, max_seq_length, max_seq_length)`, True = may attend. The model itself never builds one."""
    return torch.ones(max_seq_length, max_seq_length, device=device, dtype=torch.bool).tril()[None, None]


apply_rope_interleave = partial(apply_rope, interleave=True)
register_norm(nn.LayerNorm)
GPT.block_class, Block.attention_class = Block, CausalSelfAttention
