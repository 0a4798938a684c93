"""The whole model in one file, straight from the paper's equations: explicit S x S masks, plain matmuls, nothing else.

It is slow, and it is the truth that the fast paths are tested against: all it shares with them is the configuration.
It runs in the dtype of its weights, the router included: FP32, or FP64 for finite differences.

Legend: B rows, S tokens (t the query's, i the key's), H query heads, K KV heads, G = H / K, D head dimension,
J key blocks, E experts, V vocabulary. Batch first everywhere.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hysparse.choices import Balance, Gate, RouterScore, Source
from hysparse.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig


class SharedKV(NamedTuple):
    """What a full layer hands to the sparse layers of its hybrid block."""

    k: Tensor  # [B, S, K, D] after RoPE
    v: Tensor  # [B, S, K, D]
    blocks: Tensor | None  # [B, K, S, selected] int32, best first, -1 padded; None where no layer reads a selection


class PlainModel(nn.Module):
    """Tokens in, logits out: pre-norm, untied embeddings, no biases."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig):
        super().__init__()
        self.embedding = nn.Embedding(model.vocabulary, model.hidden)
        dense = model.layers if model.moe is None else model.moe.first_dense_layers
        self.layers = nn.ModuleList(
            Layer(kind, index < dense, model, attention)
            for index, kind in enumerate(layer_kinds(model.layers, attention))
        )
        self.norm = RMSNorm(model.hidden, model.norm_epsilon)
        self.head = linear(model.hidden, model.vocabulary)

        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # norms start at 1 and sinks at 0, where they are made
                into_residual = name.endswith((".output.weight", ".down.weight"))
                nn.init.normal_(weight, std=model.init_std / (math.sqrt(2 * model.layers) if into_residual else 1))

    def forward(self, tokens: Tensor, document_start: Tensor, rope_base: float) -> Tensor:
        """tokens [B, S]; document_start [B, S]: where in the row each token's document begins. Returns [B, S, V]."""
        return self.forward_with_auxiliary(tokens, document_start, rope_base)[0]

    def forward_with_auxiliary(self, tokens: Tensor, document_start: Tensor, rope_base: float) -> tuple[Tensor, Tensor]:
        """The logits, and the routers' weighted losses summed over the layers (a scalar; 0 for a dense model)."""
        t = torch.arange(tokens.shape[1], device=tokens.device)
        visible = (document_start.unsqueeze(-1) <= t) & (t <= t.unsqueeze(-1))  # [B, S, S]: token t may see key i
        position = t - document_start  # [B, S], from 0 in every document

        x, source, auxiliary = self.embedding(tokens), None, 0.0
        for layer in self.layers:
            x, source, layer_auxiliary = layer(x, visible.unsqueeze(1), position, rope_base, source)
            auxiliary = auxiliary + layer_auxiliary
        return self.head(self.norm(x)), auxiliary


def layer_kinds(layers: int, attention: AttentionConfig) -> str:
    """One letter a layer: F is full and opens a hybrid block, S is sparse."""
    if attention.pattern is not None:
        if len(attention.pattern) != layers:
            raise ConfigError(f"attention.pattern={attention.pattern} does not name model.layers={layers} layers")
        return attention.pattern
    kinds = "".join("S" if i % (attention.ratio + 1) else "F" for i in range(layers))
    return kinds[:-1] + "F" if attention.last_full else kinds


class Layer(nn.Module):
    def __init__(self, kind: str, dense: bool, model: ModelConfig, attention: AttentionConfig):
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden, model.norm_epsilon)
        self.attention = FullAttention(model, attention) if kind == "F" else SparseAttention(model, attention)
        self.ffn_norm = RMSNorm(model.hidden, model.norm_epsilon)
        self.ffn = SwiGLU(model.hidden, model.ffn) if dense else MoE(model.hidden, model.moe)

    def forward(self, x: Tensor, visible: Tensor, position: Tensor, rope_base: float, source: SharedKV | None):
        """Returns the residual stream [B, S, hidden], what the next layer may read, and the router's losses."""
        attended, source = self.attention(self.attention_norm(x), visible, position, rope_base, source)
        x = x + attended
        y = self.ffn(self.ffn_norm(x))
        y, auxiliary = y if isinstance(self.ffn, MoE) else (y, x.new_zeros(()))
        return x + y, source, auxiliary


class Attention(nn.Module):
    """What full and sparse layers have in common: the projections (eq. 1 and 4)."""

    def __init__(self, model: ModelConfig, owns_kv: bool):
        super().__init__()
        D = self.head_dim = model.head_dim
        self.query = linear(model.hidden, model.heads * D)
        self.key = linear(model.hidden, model.kv_heads * D) if owns_kv else None
        self.value = linear(model.hidden, model.kv_heads * D) if owns_kv else None
        self.query_norm = RMSNorm(D, model.norm_epsilon) if model.qk_norm else None
        self.key_norm = RMSNorm(D, model.norm_epsilon) if model.qk_norm and owns_kv else None
        self.output = linear(model.heads * D, model.hidden)

    def queries(self, x: Tensor, position: Tensor, rope_base: float) -> Tensor:
        q = self.query(x).unflatten(-1, (-1, self.head_dim))  # [B, S, H, D]
        return rotate(self.query_norm(q) if self.query_norm else q, position, rope_base)

    def keys_values(self, x: Tensor, position: Tensor, rope_base: float) -> tuple[Tensor, Tensor]:
        k = self.key(x).unflatten(-1, (-1, self.head_dim))  # [B, S, K, D]
        v = self.value(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.key_norm(k) if self.key_norm else k, position, rope_base), v


class FullAttention(Attention):
    """Causal attention, and the oracle that selects key blocks for the layers after it (section 3.2)."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig):
        super().__init__(model, owns_kv=True)
        self.block, self.selected = attention.block, attention.selected
        self.selects = attention.sparse_kv != Source.none
        self.output_gate = gate_projection(attention.output_gate, model)

    def forward(self, x, visible, position, rope_base, source):
        q = self.queries(x, position, rope_base)
        k, v = self.keys_values(x, position, rope_base)
        o, probability = attend(q, k, v, visible)
        blocks = None
        if self.selects:
            blocks = select_blocks(probability, visible, k.shape[2], self.block, self.selected)
        return self.output(gated(o, self.output_gate, x).flatten(2)), SharedKV(k, v, blocks)


class SparseAttention(Attention):
    """Two branches on one query, o = g~ * SA + g' * SWA (section 3.3, eq. 4-9). Either branch may be absent."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig):
        super().__init__(model, owns_kv=Source.own in (attention.sparse_kv, attention.window_kv))
        self.sparse_kv, self.window_kv = attention.sparse_kv, attention.window_kv
        self.block, self.window = attention.block, attention.window
        if self.sparse_kv == Source.none and self.window_kv == Source.none:
            raise ConfigError("attention.sparse_kv=none and attention.window_kv=none: a sparse layer needs a branch")

        self.sparse_gate = self.sparse_sink = self.window_gate = self.window_sink = None
        if self.sparse_kv != Source.none:
            self.sparse_gate = gate_projection(attention.gate, model)
            self.sparse_sink = nn.Parameter(torch.zeros(model.heads)) if attention.sinks else None
        if self.window_kv != Source.none:
            self.window_gate = gate_projection(attention.gate, model)
            self.window_sink = nn.Parameter(torch.zeros(model.heads)) if attention.sinks else None

    def forward(self, x, visible, position, rope_base, source):
        if source is None and (self.sparse_kv != Source.none or self.window_kv == Source.shared):
            raise ValueError("a sparse layer reads the full layer before it, and there is none")
        q = self.queries(x, position, rope_base)
        kv = {Source.own: self.keys_values(x, position, rope_base)} if self.key else {}
        kv |= {Source.shared: (source.k, source.v)} if source else {}

        o = torch.zeros_like(q)
        if self.sparse_kv != Source.none:
            in_blocks = visible & tokens_of_blocks(source.blocks, self.block, x.shape[1])
            sparse, _ = attend(q, *kv[self.sparse_kv], in_blocks, self.sparse_sink)
            o = o + gated(sparse, self.sparse_gate, x)
        if self.window_kv != Source.none:
            t = torch.arange(x.shape[1], device=x.device)
            in_window = visible & (t > t.unsqueeze(-1) - self.window)  # keys t - window + 1 to t
            window, _ = attend(q, *kv[self.window_kv], in_window, self.window_sink)
            o = o + gated(window, self.window_gate, x)
        return self.output(o.flatten(2)), source


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys (eq. 2, 5, 7). A sink is a logit in the denominator, without a value.

    q [B, S, H, D], k and v [B, S, K, D], visible [B, 1 or K, S, S] bool, sink [H]. Returns [B, S, H, D] and the
    probabilities [B, H, S, S].
    """
    H = q.shape[2]
    k, v = (y.repeat_interleave(H // y.shape[2], dim=2) for y in (k, v))  # query head h reads KV head h // G
    logits = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(~visible.repeat_interleave(H // visible.shape[1], dim=1), -math.inf)
    if sink is not None:
        logits = torch.cat([logits, sink.view(1, H, 1, 1).expand(*logits.shape[:-1], 1)], dim=-1)
    probability = logits.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhst,bthd->bshd", probability, v), probability


@torch.no_grad()
def select_blocks(probability: Tensor, visible: Tensor, kv_heads: int, block: int, selected: int) -> Tensor:
    """The key blocks with the largest attention probability (eq. 3; group maximum and top-k of section 3.2).

    probability [B, H, S, S], visible [B, 1, S, S]. Returns [B, K, S, selected] int32: best first, ties to the lower
    index, -1 where a token sees fewer blocks. Blocks are counted from the start of the row, not of the document.
    """

    def by_block(x: Tensor) -> Tensor:  # the last block may be short
        return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))

    score = by_block(probability).amax(-1)  # [B, H, S, J]
    score = score.unflatten(1, (kv_heads, -1)).amax(2)  # [B, K, S, J]
    score = score.masked_fill(~by_block(visible).any(-1), -1)  # below any probability: no candidate
    score, order = score.sort(dim=-1, descending=True, stable=True)
    blocks = order.masked_fill(score < 0, -1)
    return F.pad(blocks, (0, selected), value=-1)[..., :selected].int()


def tokens_of_blocks(blocks: Tensor, block: int, tokens: int) -> Tensor:
    """Which keys lie in the selected blocks: [B, K, S, selected] -> [B, K, S, tokens] bool (eq. 6, as a mask)."""
    block_of_key = torch.arange(tokens, device=blocks.device) // block
    return (blocks.unsqueeze(-1) == block_of_key).any(-2)  # -1 is no key's block


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """RoPE: turns the pair (i, i + D/2) by position * base^(-2i/D). x [B, S, heads, D], position [B, S]."""
    D = x.shape[-1]
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angle = (position.unsqueeze(-1) * frequency).unsqueeze(2)  # [B, S, 1, D/2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def gate_projection(gate: Gate, model: ModelConfig) -> nn.Linear | None:
    width = {Gate.none: 0, Gate.headwise: model.heads, Gate.elementwise: model.heads * model.head_dim}[gate]
    return linear(model.hidden, width) if width else None


def gated(o: Tensor, gate: nn.Linear | None, x: Tensor) -> Tensor:
    """sigmoid(W x) * o (eq. 8-9), a gate for each head or channel. o [B, S, H, D], x [B, S, hidden]."""
    return o if gate is None else o * gate(x).sigmoid().unflatten(-1, (o.shape[2], -1))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.gate = linear(hidden, ffn)
        self.up = linear(hidden, ffn)
        self.down = linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Each token's `active` best experts, weighted. Routing and losses follow megatron-core 0.16.1."""

    def __init__(self, hidden: int, moe: MoEConfig):
        super().__init__()
        self.moe = moe
        self.router = linear(hidden, moe.experts)
        self.register_buffer("expert_bias", torch.zeros(moe.experts))  # moves the choice only; unused by softmax
        self.experts = nn.ModuleList(SwiGLU(hidden, moe.ffn) for _ in range(moe.experts))
        self.shared = SwiGLU(hidden, moe.shared_ffn) if moe.shared_ffn else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, hidden]. Returns the same shape, and the weighted losses of this router (a scalar)."""
        logits = self.router(x)  # [B, S, E]
        if self.moe.score == RouterScore.sigmoid:
            scores = logits.sigmoid()
            chosen = self.best(scores + self.expert_bias)  # [B, S, active]
            weights = scores.gather(-1, chosen)
            if self.moe.active > 1:  # a lone score over itself is 1 and would teach the router nothing
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        else:
            chosen = self.best(logits)
            weights = logits.gather(-1, chosen).softmax(-1)
            scores = logits.softmax(-1)

        weight_of_expert = torch.zeros_like(logits).scatter(-1, chosen, weights)  # [B, S, E], 0 where not chosen
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):  # every expert sees every token: wasteful, and exactly the formula
            y = y + weight_of_expert[..., e : e + 1] * expert(x)
        if self.shared is not None:
            y = y + self.shared(x)

        if self.moe.balance == Balance.batch:
            scores = scores.flatten(0, 1).unsqueeze(0)  # one long sequence
        balance = sequence_balance_loss(scores, self.moe.active)
        z = logits.logsumexp(-1).square().mean()
        return y, self.moe.aux_loss * balance + self.moe.z_loss * z

    def best(self, key: Tensor) -> Tensor:
        """The `active` experts with the largest key [B, S, E], in the best groups only where there are groups."""
        if self.moe.groups > 1:
            key = key.unflatten(-1, (self.moe.groups, -1))  # [B, S, groups, experts of a group]
            value = key.topk(self.moe.active // self.moe.active_groups).values.sum(-1)
            groups = torch.zeros_like(value).scatter(-1, value.topk(self.moe.active_groups).indices, 1)
            key = key.masked_fill(groups.unsqueeze(-1) == 0, -math.inf).flatten(-2)
        return key.topk(self.moe.active).indices


def sequence_balance_loss(scores: Tensor, active: int) -> Tensor:
    """E * sum over e of f_e P_e, for each sequence, then the mean over sequences; 1 when balanced.

    scores [B, S, E] sum to 1 over E. P_e is an expert's mean score in the sequence, f_e its share of the top-`active`
    choices by score alone: as in Megatron, the expert bias has no part in it.
    """
    E = scores.shape[-1]
    choices = F.one_hot(scores.topk(active).indices, E).to(scores.dtype)  # [B, S, active, E]
    f, P = choices.mean((1, 2)), scores.mean(1)  # [B, E]
    return (E * (f * P).sum(-1)).mean()


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.weight


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
