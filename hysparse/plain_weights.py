"""From the Megatron model's weights to those of the single-file model in `plain.py`: renamed, and cut apart."""

from collections.abc import Iterator

from torch import Tensor

from hysparse.choices import Gate, Source
from hysparse.config import AttentionConfig, ModelConfig
from hysparse.plan import LayerKind, Plan


def to_plain(state: dict[str, Tensor], model: ModelConfig, attention: AttentionConfig) -> dict[str, Tensor]:
    """`state` maps parameter names of a whole `HySparseModel` (one rank, one stage) to tensors of their shapes.

    The tensors may as well be gradients: the mapping only renames and slices. Returns the names of `PlainModel`.
    """
    plain = {
        "embedding.weight": state["embedding.word_embeddings.weight"],
        "norm.weight": state["decoder.final_norm.weight"],
        "head.weight": state["output_layer.weight"],
    }
    for layer in Plan(model, attention).layers:
        prefix = f"decoder.layers.{layer.index}."
        local = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for name, tensor in _layer(local, layer.kind, model, attention):
            plain[f"layers.{layer.index}.{name}"] = tensor
    return plain


def _layer(
    state: dict[str, Tensor], kind: LayerKind, model: ModelConfig, attention: AttentionConfig
) -> Iterator[tuple[str, Tensor]]:
    yield "attention_norm.weight", state["input_layernorm.weight"]
    yield "ffn_norm.weight", state["pre_mlp_layernorm.weight"]
    yield "attention.output.weight", state["self_attention.linear_out.weight"]
    for name in ("query_norm.weight", "key_norm.weight", "sparse_sink", "window_sink"):
        if f"self_attention.{name}" in state:
            yield f"attention.{name}", state[f"self_attention.{name}"]
    names, rows = _fused_rows(kind, model, attention)
    fused = state["self_attention.linear_in.weight"].unflatten(0, (model.kv_heads, -1))  # [K, rows, hidden]
    for name, part in zip(names, fused.split(rows, dim=1), strict=True):
        yield f"attention.{name}.weight", part.flatten(0, 1)
    if "mlp.router.weight" not in state:  # dense
        yield from _ffn("ffn.", state["mlp.linear_fc1.weight"], state["mlp.linear_fc2.weight"])
        return
    yield "ffn.router.weight", state["mlp.router.weight"]
    if "mlp.router.expert_bias" in state:
        yield "ffn.expert_bias", state["mlp.router.expert_bias"]
    for expert in range(model.moe.experts):
        fc1, fc2 = (state[f"mlp.experts.fc{n}"][expert] for n in (1, 2))
        yield from _ffn(f"ffn.experts.{expert}.", fc1, fc2)
    if model.moe.shared_ffn:
        fc1, fc2 = (state[f"mlp.shared_experts.linear_fc{n}.weight"] for n in (1, 2))
        yield from _ffn("ffn.shared.", fc1, fc2)


def _fused_rows(kind: LayerKind, model: ModelConfig, attention: AttentionConfig) -> tuple[list[str], list[int]]:
    """Names and rows per KV head of the fused input projection; `attention.Attention` says the same of its layout."""
    names, rows = ["query"], [model.group * model.head_dim]
    branches = {"sparse_gate": attention.sparse_kv, "window_gate": attention.window_kv}
    if kind is LayerKind.full or Source.own in branches.values():
        names, rows = [*names, "key", "value"], [*rows, model.head_dim, model.head_dim]
    if kind is LayerKind.full:
        gates, gate = ["output_gate"], attention.output_gate
    else:
        gates, gate = [name for name, source in branches.items() if source is not Source.none], attention.gate
    if gate is not Gate.none:
        width = model.head_dim if gate is Gate.elementwise else 1
        names, rows = [*names, *gates], [*rows, *[model.group * width] * len(gates)]
    return names, rows


def _ffn(prefix: str, fc1: Tensor, fc2: Tensor) -> Iterator[tuple[str, Tensor]]:
    gate, up = fc1.chunk(2, dim=0)
    yield f"{prefix}gate.weight", gate
    yield f"{prefix}up.weight", up
    yield f"{prefix}down.weight", fc2
