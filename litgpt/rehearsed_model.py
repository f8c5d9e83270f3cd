"""The model of `model.py` on sizes: its parameters and its memory, stage by stage, without torch.

Each method mirrors the code of the same name, with the same local variables, because those decide how long memory is in
use. tests/test_rehearsed_model.py holds both next to each other.

Letters: B batch, T tokens, N = B x T, C `n_embd`, nh heads, G query groups, hs head size, S keys, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from litgpt.config import Config
from litgpt.rehearsal import FLOAT, Data, Rehearsal, Setting, Size, Stage

LOSS_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**27}  # as in model.py


class RehearsedModel(Rehearsal):
    """One stage of a GPT: `embed`, a `block`, or the end of it (`loss`, `logits`)."""

    def embed(self, x: None, c: Config) -> Size:
        """`GPT.embed`. The gradient of a tied weight is added to that of the head."""
        s, n = self.set, c.padded_vocab_size * c.n_embd
        self.shapes["transformer.wte.weight"] = (c.padded_vocab_size, c.n_embd), 1
        trained, scratch = (n,) * (s.trains_base and not c.tie_embeddings), n * s.param_bytes * c.tie_embeddings
        made = (None,) if s.trains_base and c.tie_embeddings else ()
        y = self.op(s.B * s.T * c.n_embd, s.param_bytes, [], weights=trained, scratch=scratch, made=made)
        y = self.like(y) if c.scale_embeddings or c.embedding_multiplier else y
        return self.dropout(y, c.dropout)

    def loss(self, x: Size, c: Config) -> Size:
        """`GPT.hidden_loss` with `ChunkedHeadLoss`, which makes the gradients on its way forward."""
        s, C, V = self.set, c.n_embd, c.padded_vocab_size
        x = self.final_norm(x, c)
        chunk, low = min(x.n // C, max(1, LOSS_CHUNK_BYTES[s.device] // (4 * V))), s.compute_bytes
        w = Data(self, V * C * low) if s.mixed else None
        grad_x = Data(self, x.n * x.width) if x.node else None
        xc = Data(self, chunk * C * low) if s.mixed else None
        logits = Data(self, chunk * V * low)
        rows = chunk if s.device == "cuda" else min(chunk, max(1, 2**20 // V))
        capped = c.final_logit_softcapping is not None
        n_kept = 1 + (low < FLOAT or capped)  # log-probabilities, and logits where they are not those in float32 above
        Data(self, rows * V * FLOAT * (4 if capped else n_kept + (chunk > rows)))  # with those of the rows before
        part = Data(self, rows * V * FLOAT * n_kept)
        Data(self, chunk * C * low if x.node else 0)
        grad_w = Data(self, V * C * s.param_bytes) if s.trains_base else None
        Data(self, min(V, 2**12) * C * low if s.trains_base else 0)
        del w, xc, logits, part
        if grad_w and c.tie_embeddings:  # it waits for that of the embedding
            self.gradients.append(grad_w)
            grad_w = None
        bias = Data(self, V * s.param_bytes) if s.trains_base and c.lm_head_bias else None
        return self.op(1, FLOAT, [x], made=(grad_x, *(g for g in (grad_w, bias) if g)))

    def logits(self, x: Size, c: Config) -> Size:
        """`GPT.unembed` of the last token of each row, and what sampling takes."""
        x = self.final_norm(self.view(x, self.set.B * c.n_embd), c)
        logits = self.linear("lm_head", x, c.n_embd, c.padded_vocab_size, c.lm_head_bias)
        if c.final_logit_softcapping is not None:
            logits = self.like(self.like(self.like(logits)))
        Data(self, 3 * logits.n * FLOAT)
        return logits

    def final_norm(self, x: Size, c: Config) -> Size:
        """`GPT.final_norm`."""
        self.shapes["lm_head.weight"] = (c.padded_vocab_size, c.n_embd), 1
        if c.lm_head_bias:
            self.shapes["lm_head.bias"] = (c.padded_vocab_size,), 1
        x = self.norm("transformer.ln_f", x, c.n_embd, c)
        return x if c.logits_scaling is None else self.like(x)

    def block(self, x: Size, config: Config, index: int) -> Size:
        """`Block.forward`."""
        c, C = config, config.n_embd
        normed = self.norm("norm_1", x, C, c) if c.norm_1 else x
        attn = self.attention(normed, c, index)
        attn = self.dropout(self.norm("post_attention_norm", attn, C, c) if c.post_attention_norm else attn, c.dropout)
        if c.parallel_residual:
            if c.norm_2 and not c.shared_attention_norm:
                normed = self.norm("norm_2", x, C, c)
            branch = self.mlp(normed, c, index)
        else:
            x = self.add(x, attn)
            branch = self.mlp(self.norm("norm_2", x, C, c) if c.norm_2 else x, c, index)
        branch = self.dropout(self.norm("post_mlp_norm", branch, C, c) if c.post_mlp_norm else branch, c.dropout)
        return self.add(x, self.add(attn, branch) if c.parallel_residual else branch)

    def attention(self, x: Size, c: Config, index: int) -> Size:
        """`CausalSelfAttention.forward`, also for latent attention."""
        s = self.set
        n_bytes = 0 if s.compute_bytes == FLOAT else s.T * c.rope_n_elem * s.compute_bytes
        tables = Data(self, n_bytes), Data(self, n_bytes)
        if c.latent_attention:
            y, n_in = self.latent_attention(x, c, index, tables), c.n_head * c.v_head_dim
            return self.linear("attn.proj", y, n_in, c.n_embd, c.attn_bias, lora={"projection": c.n_embd})
        q, k, v = self.project(x, c, index, tables)
        y, in_order = self.attend(q, k, v, c, index)
        y = y if in_order else self.copy(y)  # (B, T, nh * hs)
        return self.linear("attn.proj", y, c.n_head * c.head_size, c.n_embd, c.bias, lora={"projection": c.n_embd})

    def project(self, x: Size, c: Config, index: int, tables: tuple[Data, Data]) -> tuple[Size, Size, Size]:
        """`CausalSelfAttention.project`."""
        n_q, n_k, n_tokens = c.n_head * c.head_size, c.n_query_groups * c.head_size, x.n // c.n_embd
        parts = {"query": n_q, "key": n_k, "value": n_k}
        qkv = self.linear("attn.qkv", x, c.n_embd, n_q + 2 * n_k, c.bias or c.attn_bias, lora=parts)
        q, k, v = (self.view(qkv, n_tokens * n) for n in (n_q, n_k, n_k))
        if c.norm_qk:
            whole = c.norm_qk_type == "olmo2"
            q = self.norm("attn.norm_q", q, n_q if whole else c.head_size, c)
            k = self.norm("attn.norm_k", k, n_k if whole else c.head_size, c)
        if not (c.nope_indices and c.nope_indices[index]):
            q, k = (self.rotate(z, c.rope_n_elem, c.head_size, tables) for z in (q, k))
        return q, k, self.copy(v)

    def attend(self, q: Size, k: Size, v: Size, c: Config, index: int) -> tuple[Size, bool]:
        """`attend` and `attend_in_blocks`; also says whether the output lies in memory as `(B, T, nh, hs)`."""
        s, nh, G, T, softcap = self.set, c.n_head, c.n_query_groups, self.set.T, c.attention_logit_softcapping
        window = c.sliding_window_size if c.sliding_window_size and c.sliding_window_indices[index] else None
        fresh, S = s.n_cached <= T, max(T, s.n_cached)
        if s.n_cached and window and window < S:  # what the ring writes, and keeps beside the new tokens
            S = S if fresh else window + T
            ring = Data(self, 2 * s.B * window * G * c.head_size * s.compute_bytes)
            if fresh:
                del ring
        window = window if window and window < T else None
        if fresh and window is None and (softcap is None or T == 1):
            return self.kernel(q, k, v, c, T, T, masked=False)
        n_scores = (nh if c.latent_attention else nh // G) if softcap is None else 2 * s.B * nh
        size = max(8, 2**22 // (S * n_scores))
        if fresh and window:
            size = min(max(128, window // 4), max(8, 2**22 // (window * n_scores)))
        y, blocks = None if s.backward else Data(self, q.n * q.width), []
        for start in range(0, T, size):
            stop = min(start + size, T)
            first = max(0, start - window + 1) if fresh and window else 0
            last = min(S, stop + window - 1) if fresh and window else S
            last = min(last, stop) if fresh and c.causal else last
            parts = (self.view(z, z.n // S_z * n) for z, S_z, n in (
                (q, T, stop - start), (k, T, last - first), (v, T, last - first)))  # fmt: skip
            blocks.append(self.kernel(*parts, c, stop - start, last - first, masked=True))
            if y is not None:
                blocks.pop()
        if y is not None:
            return Size(q.n, q.width, y), True
        return blocks[0] if len(blocks) == 1 else (self.op(q.n, q.width, [b for b, _ in blocks]), True)

    def kernel(self, q: Size, k: Size, v: Size, c: Config, t: int, s: int, masked: bool) -> tuple[Size, bool]:
        """`scaled_dot_product_attention` of `t` queries over `s` keys: which kernel depends on device and dtype."""
        nh, G, softcap, run = c.n_head, c.n_query_groups, c.attention_logit_softcapping, self.set
        mask = Data(self, 2 * t * s) if masked else None  # as it is built: two booleans a pair
        slow = run.device == "cpu" and run.compute_bytes < FLOAT and q.node is not None and s <= 512
        latent = c.latent_attention is not None  # has keys and values for each head, and a kernel of its own
        if not latent and (softcap is not None or slow):
            return self.explicit_attention(q, k, v, c, t, s, masked or slow), False
        if c.dropout and run.backward and run.device == "cpu":  # no fused kernel: torch's maths, in float32
            y = self.explicit_attention(*(self.cast(z, FLOAT) for z in (q, k, v)), c, t, s, True)
            return self.cast(y, q.width), False
        if run.device == "cuda" and run.compute_bytes == FLOAT and nh != G and not masked:
            # flash takes 16 bits only, the memory-efficient kernel no groups: torch falls back to its maths
            k, v = (self.op(q.n // t * s, z.width, [z]) for z in (k, v))
            return self.explicit_attention(q, k, v, c, t, s, True), False
        if masked and nh != G:
            mask = Data(self, nh // G * t * s)
            q = self.copy(q)
            mask = Data(self, nh // G * t * s * run.compute_bytes)
            return self.copy(self.fused_attention(q, k, v, c, t, mask)), False
        if masked:
            mask = Data(self, t * s * run.compute_bytes)
        return self.fused_attention(q, k, v, c, t, mask), True

    def fused_attention(self, q: Size, k: Size, v: Size, c: Config, t: int, mask: Data | None) -> Size:
        """Flash or memory-efficient attention: keeps no scores, but one float32 a query for their sum."""
        sums = Data(self, self.set.B * c.n_head * t * FLOAT)
        y = self.op(q.n, q.width, [q, k, v], [q.data, k.data, v.data, sums, mask])
        if y.node:
            y.node.saved += (y.data,)
        return y

    def explicit_attention(self, q: Size, k: Size, v: Size, c: Config, t: int, s: int, masked: bool) -> Size:
        """Two matrix products with all scores between them."""
        B, nh, G, run = self.set.B, c.n_head, c.n_query_groups, self.set
        n = B * nh * t * s
        if nh != G or t < run.T:
            q = self.copy(q)  # (B, G, nh / G * t, hs)
        q = self.like(q)
        k = k if B == 1 or G == 1 else self.copy(k)  # lies as (B, S, G, hs)
        scores = self.op(n, q.width, [q, k], [q.data, k.data])
        if c.attention_logit_softcapping is not None:
            scores = self.like(self.keeping(self.like(scores)))
        if masked:
            mask = Data(self, t * s * (1 + q.width))
            scores = self.like(scores)
            del mask
        autocast_softmax = run.mixed and run.device == "cuda"  # it is among those that run in float32 there
        scores = self.keeping(self.cast(scores, FLOAT) if autocast_softmax else scores)
        scores = self.dropout(self.cast(scores, q.width), c.dropout)
        return self.op(q.n, q.width, [scores, v], [scores.data, v.data])

    def latent_attention(self, x: Size, c: Config, index: int, tables: tuple[Data, Data]) -> Size:
        """`MultiheadLatentAttention`: `project` and its kernel for fresh text."""
        C, nh, rank, rope, nope, d_v = (
            c.n_embd, c.n_head, c.kv_lora_rank, c.qk_rope_head_dim, c.qk_nope_head_dim, c.v_head_dim
        )  # fmt: skip
        n, n_q = x.n // C, nh * (nope + rope)
        if c.q_lora_rank:
            q = self.linear("attn.q_a_proj", x, C, c.q_lora_rank, c.attn_bias)
            q = self.norm("attn.q_a_norm", q, c.q_lora_rank, c, "RMSNorm")
            q = self.linear("attn.q_b_proj", q, c.q_lora_rank, n_q, c.bias, lora={"query": n_q})
        else:
            q = self.linear("attn.q_proj", x, C, n_q, c.bias, lora={"query": n_q})
        kv = self.linear("attn.kv_a_proj_with_mqa", x, C, rank + rope, c.attn_bias)
        latent, k_rope = self.view(kv, n * rank), self.view(kv, n * rope)
        del kv
        rotated = self.rotate(self.view(q, n * nh * rope), rope, rope, tables)
        q = self.op(n * n_q, q.width, [self.view(q, n * nh * nope), rotated], scratch=n * n_q * q.width)
        k_rope = self.rotate(k_rope, rope, rope, tables)
        latent = self.norm("attn.kv_a_norm", latent, rank, c, "RMSNorm")
        kv = self.linear("attn.kv_b_proj", latent, rank, nh * (nope + d_v), c.bias, lora={"value": nh * (nope + d_v)})
        v = self.view(kv, n * nh * d_v)
        k = self.op(n * n_q, kv.width, [self.view(kv, n * nh * nope), k_rope])
        width = max(nope + rope, d_v)
        q, k, v = (self.op(n * nh * width, z.width, [z]) for z in (q, k, v))  # F.pad makes a copy in any case
        y, in_order = self.attend(q, k, v, c, index)
        return y if in_order and width == d_v else self.op(n * nh * d_v, y.width, [y])

    def mlp(self, x: Size, c: Config, index: int) -> Size:
        """The MLP of a layer by the class that the config names; one of your own counts as LLaMAMLP."""
        name, dense = c.mlp_class_name, c.first_k_dense_replace is not None and index < c.first_k_dense_replace
        if name == "LLaMAMoE" and not dense:
            return self.experts(x, c)
        if name in ("GptNeoxMLP", "MLP"):
            first, last = ("mlp.fc", "mlp.proj") if name == "GptNeoxMLP" else ("mlp.fc_1", "mlp.fc_2")
            x = self.linear(first, x, c.n_embd, c.intermediate_size, c.bias, lora={"mlp": c.intermediate_size})
            x = self.like(x, x.data)
            return self.linear(last, x, c.intermediate_size, c.n_embd, c.bias, lora={"mlp": c.n_embd})
        return self.gated_mlp("mlp", x, c, c.intermediate_size)

    def gated_mlp(self, name: str, x: Size, c: Config, width: int, n_copies: int = 1) -> Size:
        """`LLaMAMLP.forward`; so many experts share the tokens."""
        x, lora = self.cast(x, self.set.compute_bytes), {"mlp": width}
        gate = self.linear(f"{name}.fc_1", x, c.n_embd, width, c.bias, n_copies, lora)
        up = self.linear(f"{name}.fc_2", x, c.n_embd, width, c.bias, n_copies, lora)
        n_bytes = gate.n * gate.width
        activated = Data(self, n_bytes)
        y = self.op(gate.n, gate.width, [gate, up], [gate.data, up.data], scratch=n_bytes)
        del activated
        return self.linear(f"{name}.proj", y, width, c.n_embd, c.bias, n_copies, {"mlp": c.n_embd})

    def experts(self, x: Size, c: Config) -> Size:
        """`LLaMAMoE.forward`, with tokens spread evenly over the experts, of which up to eight are told apart."""
        E, k, C, n_tokens = c.n_expert, c.n_expert_per_token, c.n_embd, x.n // c.n_embd
        width, n_groups = c.moe_intermediate_size or c.intermediate_size, min(E, 8)
        if c.n_expert_groups:
            wide = self.cast(x, FLOAT)
            scores = self.op(n_tokens * E, FLOAT, [wide], [wide.data], weights=(E * C,) * self.set.trains_base)
            scores = self.keeping(scores)
            del wide
            self.shapes["mlp.gate.weight"] = (E, C), 1
        else:
            scores = self.linear("mlp.gate", x, C, E)
        routes = Data(self, 3 * n_tokens * k * 8)  # experts, order, token
        weights = self.op(n_tokens * k, FLOAT, [scores], [routes])
        picked = self.op(n_tokens * k * C, x.width, [x], [routes], scratch=n_tokens * k * C * x.width)
        parts = []
        for i in range(n_groups):
            n_copies = E // n_groups + (i < E % n_groups)
            part = self.op(picked.n * n_copies // E, picked.width, [picked], view=picked.data)
            if part.node:
                part.node.inputs = [(picked.node, part.n, part.width)]
            parts.append(self.gated_mlp("mlp.experts.*", part, c, width, n_copies))
            del part
        self.shapes |= {key: (shape, E) for key, (shape, _) in self.shapes.items() if ".experts." in key}
        y = self.op(n_tokens * k * C, parts[0].width, parts, passes=True)
        parts = None
        y = self.mul(y, self.cast(weights, y.width))
        zeros = Data(self, n_tokens * C * y.width)
        y = self.op(n_tokens * C, y.width, [y], [y.data])
        del zeros
        return (
            self.add(y, self.gated_mlp("mlp.shared_experts", x, c, width * c.n_shared_expert))
            if c.n_shared_expert
            else y
        )


def rehearse_stage(
    config: Config, setting: Setting, part: str, index: int = 0, needs_grad: bool = True, checkpointing: bool = False
) -> Stage:
    """The stage `part` of a model, which is "embed", "block" or "end".

    Args:
        index: Which block.
        needs_grad: Whether its input needs a gradient; that of a frozen model's first block does not.
        checkpointing: A block keeps its input alone, and runs again in the backward pass.
    """

    def rehearse(setting: Setting) -> Stage:
        run = RehearsedModel(setting)
        if part == "embed":
            return run.stage(None, lambda x: run.embed(x, config))
        x = run.source(n_in, setting.param_bytes, needs_grad)
        if part == "block":
            return run.stage(x, lambda x: run.block(x, config, index))
        return run.stage(x, lambda x: run.loss(x, config) if setting.backward else run.logits(x, config))

    n_in = setting.B * setting.T * config.n_embd
    stage = rehearse(setting)
    if part != "block" or not (setting.backward and checkpointing):
        return stage
    n_bytes, first = n_in * setting.param_bytes, rehearse(replace(setting, backward=False))
    peak = max(stage.backward_peak, n_bytes + stage.forward_peak)
    return Stage(first.forward_peak, n_bytes, peak, stage.gradients, first.casts)


def layer_window(config: Config, index: int) -> int | None:
    """Sliding window of a layer, or None."""
    return config.sliding_window_size if config.sliding_window_size and config.sliding_window_indices[index] else None


def block_kinds(config: Config) -> list[int]:
    """For each layer the index of the first one that is built like it."""
    first: dict[tuple, int] = {}
    kinds = []
    for i in range(config.n_layer):
        dense = config.first_k_dense_replace is not None and i < config.first_k_dense_replace
        nope = bool(config.nope_indices and config.nope_indices[i])
        kinds.append(first.setdefault((dense, nope, layer_window(config, i)), i))
    return kinds


def model_weights(config: Config, setting: Setting = Setting()) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape, and how many there are: layers share a name such as `transformer.h.*.attn.qkv.weight`."""
    setting = replace(setting, B=1, T=1, backward=False, n_cached=0)
    ends = RehearsedModel(setting)
    ends.logits(ends.embed(None, config), config)
    for name, (shape, count) in ends.shapes.items():
        if not (config.tie_embeddings and name == "lm_head.weight"):
            yield name, shape, count
    for kind, n_layers in Counter(block_kinds(config)).items():
        run = RehearsedModel(setting)
        run.block(run.source(config.n_embd, FLOAT, False), config, kind)
        for name, (shape, count) in run.shapes.items():
            yield f"transformer.h.*.{name}", shape, count * n_layers


def kv_cache_bytes(config: Config, batch_size: int, n_tokens: int, width: int) -> int:
    """Keys and values of all layers; a windowed layer has a ring, latent attention keeps the latent."""
    latent = config.latent_attention
    numbers = config.kv_lora_rank + config.qk_rope_head_dim if latent else 2 * config.n_query_groups * config.head_size
    slots = sum(min(n_tokens, layer_window(config, i) or n_tokens) for i in range(config.n_layer))
    return batch_size * slots * numbers * width
