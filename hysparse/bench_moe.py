"""Measures the 80B's mixture-of-experts layer on one GPU: forward and backward, as training runs it.

    python -m hysparse.bench_moe [--profile] [--json FILE] [--markdown FILE]

Hidden 2,048, 512 experts of width 512, 8 active, BF16, medians on the device. Useful work is that of the experts'
products and nothing else; the yardstick is an 8192^3 product of the same run. Routing is the layer's own:
"uniform" from random inputs, "skewed" with an expert bias that sends half of the rows to a tenth of the experts.
Beside it runs Megatron-core's own layer on Transformer Engine's grouped products, in the best setting that was found,
where Transformer Engine is installed. --profile lists the kernels of one pass.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("NVTE_USE_CUTLASS_GROUPED_GEMM", "1")  # three times as fast as cuBLAS at these sizes

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.roofline import Row, Target, host_seconds, kernel_times, line, measure_ceilings, milliseconds, table

HIDDEN, EXPERTS, ACTIVE, FFN = 2048, 512, 8, 512
LONG, SHORT = 32_768, 4_096
POPULAR, THEIR_SHARE = EXPERTS // 10, 0.5
STD = 0.02
PRODUCTS = 3 * HIDDEN * FFN * 2  # FLOPs of one row forward: gate, up and down


def transformer_config(**more):
    """Megatron's TransformerConfig of one such layer, `more` of its fields replaced."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from hysparse.config import MoEConfig
    from hysparse.ffn import moe_settings

    settings = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 16,
        "ffn_hidden_size": FFN,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": True,
        "add_bias_linear": False,
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        **moe_settings(MoEConfig(experts=EXPERTS, active=ACTIVE, ffn=FFN), 1),
    }
    return TransformerConfig(**settings | more)


def our_layer() -> torch.nn.Module:
    from megatron.core.transformer.spec_utils import build_module

    from hysparse.config import ModelConfig, MoEConfig
    from hysparse.ffn import ffn_spec
    from kernels import operators

    moe = MoEConfig(experts=EXPERTS, active=ACTIVE, ffn=FFN)
    model = ModelConfig(name="80b", layers=1, hidden=HIDDEN, heads=16, kv_heads=4, moe=moe)
    return prepared(
        build_module(ffn_spec(model, 0, operators.moe), config=transformer_config(transformer_impl="local"))
    )


def stock_layer() -> torch.nn.Module:
    """Megatron-core's own. Raises ImportError without Transformer Engine."""
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
    from megatron.core.transformer.spec_utils import build_module

    config = transformer_config(
        transformer_impl="transformer_engine", moe_grouped_gemm=True, moe_permute_fusion=True, moe_router_fusion=True
    )
    spec = get_moe_module_spec_for_backend(TESpecProvider(), num_experts=EXPERTS, moe_grouped_gemm=True)
    return prepared(build_module(spec, config=config))


@torch.no_grad()
def prepared(layer: torch.nn.Module) -> torch.nn.Module:
    layer = layer.cuda().train()
    layer.set_layer_number(1)
    for weight in layer.parameters():
        weight.normal_(std=STD)
    return layer


def step(layer: torch.nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """One forward and backward pass; every weight gets a fresh gradient."""

    def run() -> None:
        x.grad = None
        for weight in layer.parameters():
            weight.grad = None
        layer(x)[0].backward(grad)

    return run


@torch.no_grad()
def counts(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """Rows of each expert, by the layer's router."""
    routing = layer.router(x)[1]  # Megatron's own returns a mask
    return routing.sum(0) if torch.is_tensor(routing) else routing.counts


def skew(layer: torch.nn.Module, x: Tensor) -> None:
    """Set the expert bias so that the first `POPULAR` experts get `THEIR_SHARE` of the rows, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(12):
        layer.router.expert_bias[:POPULAR] = (low + high) / 2
        number = counts(layer, x)
        if number[:POPULAR].sum() < THEIR_SHARE * number.sum():
            low = (low + high) / 2
        else:
            high = (low + high) / 2


def products_alone(layer: torch.nn.Module, x: Tensor) -> float:
    """Milliseconds of the layer's matrix products, forward and backward, one after the other on the same groups."""
    from kernels import moe

    offsets = counts(layer, x).cumsum(0, dtype=torch.int32)
    fc1, fc2, router = layer.experts.fc1, layer.experts.fc2, layer.router.weight.detach()
    flat = x.detach().flatten(0, 1)
    rows, wide, narrow, grad = (
        torch.randn(flat.shape[0] * ACTIVE, width, device="cuda", dtype=torch.bfloat16)
        for width in (HIDDEN, 2 * FFN, FFN, HIDDEN)
    )
    rows.requires_grad_(), narrow.requires_grad_()
    logits = torch.randn(flat.shape[0], EXPERTS, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        torch.mm(flat, router.t(), out_dtype=torch.float32)
        torch.autograd.grad(moe.grouped_linear(rows, fc1, offsets), (rows, fc1), wide)
        torch.autograd.grad(moe.grouped_linear(narrow, fc2, offsets), (narrow, fc2), grad)
        torch.mm(logits, router)
        torch.mm(logits.t(), flat)

    return milliseconds(run)


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    x, grad = (torch.randn(tokens, 1, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return x.requires_grad_(), grad


def measured(operator: str, layer: torch.nn.Module, tokens: int, routing: str, gemm: float) -> Row:
    """A row with its fraction of the GEMM rate, printed by the caller once it has its targets."""
    x, grad = inputs(tokens)
    layer.router.expert_bias.zero_()
    if routing == "skewed":
        skew(layer, x)
    load = counts(layer, x).float()
    row = Row("moe", operator, "80b", tokens, routing, flops=3 * PRODUCTS * tokens * ACTIVE)
    row.ms = milliseconds(step(layer, x, grad))
    row.best_ms = row.flops / gemm * 1e3
    host = 1e3 * host_seconds(step(layer, x, grad))
    row.note = f"load max/mean {load.max() / load.mean():.1f}, queued by the host in {host:.1f} ms"
    return row


def rate(row: Row) -> float:
    return row.flops / row.ms


def waits(layer: torch.nn.Module) -> str:
    """Whether a pass waits for the device anywhere."""
    run = step(layer, *inputs(SHORT))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return f"waits for the device: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no host synchronisation"


def compare(gemm: float, show: Callable[[Row], None]) -> None:
    """Show every row: our layer with both routings and lengths, then Megatron-core's. `gemm` in FLOP/s."""
    ours = our_layer()
    layer = measured("layer forward + backward", ours, LONG, "uniform", gemm)
    layer.targets.append(Target("of the GEMM rate", 100 * rate(layer) / gemm * 1e3, 60, 70, "%"))
    alone = products_alone(ours, inputs(LONG)[0])
    layer.targets.append(Target("of it not in products", 100 * (1 - alone / layer.ms), 25, 15, "%"))
    layer.note += f", {waits(ours)}"
    show(layer)
    show(Row("moe", "its matrix products alone", "80b", LONG, "uniform", ms=alone, flops=layer.flops))

    skewed = measured("layer forward + backward", ours, LONG, "skewed", gemm)
    skewed.targets.append(Target("the time of uniform routing", skewed.ms / layer.ms, 1.15, 1.0))
    show(skewed)
    short = measured("layer forward + backward", ours, SHORT, "uniform", gemm)
    short.targets.append(Target("of the long rate", 100 * rate(short) / rate(layer), 45, 60, "%"))
    show(short)
    alone = products_alone(ours, inputs(SHORT)[0])
    show(Row("moe", "its matrix products alone", "80b", SHORT, "uniform", ms=alone, flops=short.flops))
    del ours
    torch.cuda.empty_cache()

    for tokens in (LONG, SHORT):
        name = "Megatron-core's layer, Transformer Engine"
        stock = Row("moe", name, "80b", tokens, "uniform")
        try:
            stock = measured(name, stock_layer(), tokens, "uniform", gemm)
        except ImportError as error:
            stock.note = f"left out: {error}"
        except Exception as error:
            stock.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        torch.cuda.empty_cache()
        show(stock)
        if stock.ms and tokens == LONG:
            layer.targets.append(Target("the speed of Megatron-core's layer", stock.ms / layer.ms, 5, 6.5))
            print(f"  ours: {layer.targets[-1]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hysparse.bench_moe", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", action="store_true", help="list the kernels of one pass at both sizes")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    options = parser.parse_args(arguments)
    from parallel.start import Sizes, start, stop
    from parallel.terminal import quiet_third_parties

    quiet_third_parties()
    start(Sizes())
    torch.manual_seed(0)
    gemm = measure_ceilings().flops
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; 8192^3 product: {gemm / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)

    try:
        compare(gemm, show)
        if options.profile:
            layer = our_layer()
            for tokens in (LONG, SHORT):
                print(f"\n{tokens:,} tokens\n{kernel_times(step(layer, *inputs(tokens)))}")
    finally:
        stop()
    print(f"\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({"gemm": gemm, "rows": [asdict(row) for row in rows]}, indent=1))
    if options.markdown:
        options.markdown.write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
