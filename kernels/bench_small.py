"""The small operators around attention, timed side by side: which library, or which kernel of ours, is worth using.

    python -m kernels.bench_small

Each row is one forward and backward pass in BF16 on random inputs of the sizes of the two models. GB/s counts the bytes
that have to move, each input read once and each output written once, whatever an implementation really moves; the rows
with the vocabulary, which are matrix products for the most part, show TFLOP/s instead, and the memory they need on top
of their inputs. A library that is missing or fails leaves a row that says so.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import vocab_parallel_cross_entropy
from kernels.roofline import milliseconds
from kernels.rotary import rotary_split_backward, rotary_split_forward

EPSILON = 1e-6
VOCABULARY = 151_680

Step = Callable[[], object]  # one forward and backward pass


class Case(NamedTuple):
    """One operator at one size. The implementations build their steps when called, and only then import a library."""

    operator: str
    shape: str
    bytes: int
    flops: int  # 0 where bytes bound the time
    implementations: dict[str, Callable[[], Step]]


def rows() -> list[dict]:
    """Operator, shape, implementation, milliseconds, gigabytes_per_second and note of everything."""
    return list(_measured())


def _measured() -> Iterator[dict]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # vocabulary-parallel losses want it
    try:
        for build in (
            lambda: _rms_norm(32_768, 4096),
            lambda: _rms_norm(32_768, 2048),
            lambda: _swiglu(32_768, 11_008),
            lambda: _rotary("80B", S=32_768, K=4, G=16),
            lambda: _rotary("7B", S=32_768, K=8, G=4),
            lambda: _linear_cross_entropy(8192, 4096),
        ):
            case = build()
            for name in case.implementations:
                yield _measure(case, name)
                torch.cuda.empty_cache()
    finally:
        dist.destroy_process_group()


def _measure(case: Case, name: str) -> dict:
    row = {"operator": case.operator, "shape": case.shape, "implementation": name}
    row |= {"milliseconds": None, "gigabytes_per_second": None}
    try:
        step = case.implementations[name]()
        step()  # compiles
    except Exception as error:  # whatever a library throws, the others are still to be measured
        reason = str(error).splitlines() or [""]
        return {**row, "note": f"skipped, {type(error).__name__}: {reason[0]}"}
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - held
    row["milliseconds"] = took = milliseconds(step)
    if case.flops:
        return {**row, "note": f"{case.flops / took / 1e9:.0f} TFLOP/s, {peak / 1e9:.1f} GB on top"}
    return {**row, "gigabytes_per_second": case.bytes / took / 1e6, "note": ""}


def _random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)


def _step(forward: Callable, inputs: list[Tensor], grads: list[Tensor] | None = None) -> Step:
    """`forward(*inputs)` and the gradients of the inputs, from `grads` of the outputs or else from the outputs."""

    def step():
        outputs = forward(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, inputs, grads or [x.detach() for x in outputs])

    return step


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _rms_norm(tokens: int, hidden: int) -> Case:
    x, weight, grad = _random(tokens, hidden, grad=True), _random(hidden, grad=True), _random(tokens, hidden)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPSILON)

    def liger() -> Step:
        from liger_kernel.ops import LigerRMSNormFunction

        return _step(lambda *inputs: LigerRMSNormFunction.apply(*inputs, EPSILON, 0.0, "llama", True), *arguments)

    def transformer_engine() -> Step:
        from transformer_engine.pytorch import RMSNorm

        norm = RMSNorm(hidden, eps=EPSILON, params_dtype=torch.bfloat16, device="cuda")
        return _step(lambda x, _: norm(x), [x, norm.weight], [grad])

    def quack() -> Step:
        from quack import rmsnorm

        return _step(lambda *inputs: rmsnorm(*inputs, eps=EPSILON), *arguments)

    arguments = ([x, weight], [grad])
    implementations = {
        "torch": lambda: _step(plain, *arguments),
        "torch.compile": lambda: _step(_compiled(plain), *arguments),
        "Liger": liger,
        "Transformer Engine": transformer_engine,
        "quack": quack,
    }
    # x in and the result out; x and the gradient in, the gradient of x out
    return Case("RMSNorm", f"{tokens} x {hidden}", (2 + 3) * 2 * tokens * hidden, 0, implementations)


def _swiglu(tokens: int, width: int) -> Case:
    y, grad = _random(tokens, 2 * width, grad=True), _random(tokens, width)

    def plain(y: Tensor) -> Tensor:
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up

    def megatron() -> Step:
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        return _step(lambda y: bias_swiglu_impl(y, None), [y], [grad])

    def liger() -> Step:
        from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

        return _step(LigerFusedGateUpSiLUMulFunction.apply, [y], [grad])

    implementations = {
        "torch": lambda: _step(plain, [y], [grad]),
        "torch.compile": lambda: _step(_compiled(plain), [y], [grad]),
        "Megatron, fused": megatron,
        "Liger": liger,
    }
    # y (two wide) in and the result out; y and the gradient in, the gradient of y out
    return Case("SwiGLU", f"{tokens} x {width}", (3 + 5) * 2 * tokens * width, 0, implementations)


def _rotary(model: str, S: int, K: int, G: int, D: int = 128, gates: int = 2) -> Case:
    angle = torch.rand(S, 1, 1, D // 2, device="cuda").repeat(1, 1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    sizes = [G * D, D, D, *[G] * gates]
    y = _random(S, 1, K, sum(sizes), grad=True)

    def plain(y: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *gates = y.split(sizes, dim=-1)
        turned = []
        for x in (query.reshape(S, 1, K * G, D), key):
            first, second = x.chunk(2, dim=-1)
            turned.append((x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype))
        return (*turned, value.contiguous(), *(gate.reshape(S, 1, K * G).sigmoid() for gate in gates))

    grads = [torch.randn_like(x) for x in plain(y)]

    def ours() -> object:
        *_, opened = rotary_split_forward(y.detach(), cos, sin, G, True, gates)
        return rotary_split_backward(*grads[:3], tuple(grads[3:]), opened, cos, sin, G)

    implementations = {
        "torch": lambda: _step(plain, [y], grads),
        "torch.compile": lambda: _step(_compiled(plain), [y], grads),
        "ours": lambda: ours,
    }
    return Case("split, RoPE, gates", f"{model}, {S} tokens", (2 + 2) * 2 * y.numel(), 0, implementations)


def _linear_cross_entropy(tokens: int, hidden: int) -> Case:
    x, weight = _random(tokens, hidden, grad=True), (_random(VOCABULARY, hidden) / hidden**0.5).requires_grad_()
    labels = torch.randint(VOCABULARY, (tokens,), device="cuda")
    arguments = ([x, weight], [torch.full((tokens,), 1 / tokens, device="cuda")])

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.t()).float(), labels, reduction="none")

    def of_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        """`loss(logits, labels)` as Megatron shapes them: [S, B, vocabulary] and [S, B]."""
        return _step(lambda x, weight: loss((x @ weight.t()).unsqueeze(1), labels.unsqueeze(1)).flatten(), *arguments)

    def megatron() -> Step:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import cross_entropy

        parallel_state.initialize_model_parallel()
        return of_logits(cross_entropy.vocab_parallel_cross_entropy)

    def megatron_fused() -> Step:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        return of_logits(lambda *inputs: fused_vocab_parallel_cross_entropy(*inputs, dist.group.WORLD))

    def transformer_engine() -> Step:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        return of_logits(lambda *inputs: parallel_cross_entropy(*inputs, 0.0, False, dist.group.WORLD))

    def liger() -> Step:
        from liger_kernel.ops import LigerVocabParallelCEFunction

        options = (dist.group.WORLD, -100, 0.0, "megatron", "partition")
        return of_logits(lambda *inputs: LigerVocabParallelCEFunction.apply(*inputs, *options))

    def liger_chunked() -> Step:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        # Sums in FP32, and 2,048 tokens at a time: with fewer, reading the weight and its gradient takes the time.
        options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32, False, False, False, None, None, 9)
        loss = LigerFusedLinearCrossEntropyFunction.apply
        return _step(lambda x, weight: loss(x, weight, labels, *options)[0], [x, weight])

    def quack_chunked() -> Step:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        options = {"chunk_size": 2048, "reduction": "sum"}
        return _step(lambda x, weight: chunked_linear_cross_entropy(x, weight, labels, **options), [x, weight])

    implementations = {
        "matrix products alone": lambda: _step(lambda x, weight: x @ weight.t(), [x, weight]),
        "torch": lambda: _step(plain, *arguments),
        "torch.compile": lambda: _step(_compiled(plain), *arguments),
        "Megatron": megatron,
        "Megatron, fused": megatron_fused,
        "Transformer Engine": transformer_engine,
        "Liger": liger,
        "ours": lambda: of_logits(lambda *inputs: vocab_parallel_cross_entropy(*inputs, dist.group.WORLD)),
        "Liger, chunked, one rank": liger_chunked,
        "quack, chunked, one rank": quack_chunked,
    }
    flops = 3 * 2 * tokens * hidden * VOCABULARY
    return Case("linear + cross-entropy", f"{tokens} x {hidden} x {VOCABULARY}", 0, flops, implementations)


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, BF16, forward + backward, medians")
    for row in _measured():
        time = "" if row["milliseconds"] is None else f"{row['milliseconds']:.3f} ms"
        speed = "" if row["gigabytes_per_second"] is None else f"{row['gigabytes_per_second']:,.0f} GB/s"
        name = f"{row['operator']:24}{row['shape']:24}{row['implementation']:26}"
        print(f"{name}{time:>12}{speed:>12}  {row['note']}", flush=True)


if __name__ == "__main__":
    main()
