"""`python -m kernels`: which operators run on this machine, in which version, and if not, why."""

import platform
from typing import NamedTuple

import torch

from kernels.capability import BLOCKS, LARGEST_BLOCK_OF_WIDE, LARGEST_GROUP, LARGEST_HEAD, machine_lacks

GLUON = "Gluon"  # made for Hopper; elsewhere, and for other sizes, the version for all


class Operator(NamedTuple):
    """One line of the table: what runs it forward and backward, and what does where no Triton operator runs."""

    name: str
    forward: str
    backward: str
    for_all: str = "Triton"
    reference: tuple[str, str] = ("reference", "reference (autograd)")


OPERATORS = [
    Operator("full attention with block selection", GLUON, GLUON),
    Operator("full attention without selection", GLUON, "the same"),
    Operator("index of a selection", "Triton, torch.sort", "the same", reference=("needs none", "needs none")),
    Operator("sparse layer: blocks, window, sinks, gates", GLUON, GLUON),
    Operator("sliding window with sink", "Triton", "Triton"),
    Operator("query, key, value and gates from the projection", "Triton", "Triton"),
    Operator("decode, full and sparse layer", "Triton", "has none", reference=("reference", "has none")),
    Operator("router of a mixture of experts", "Triton; groups PyTorch", "the same"),
    Operator("tokens to experts and back, weighted SwiGLU", "Triton", "Triton"),
    Operator("experts' matrix products", GLUON, GLUON, for_all="torch grouped_mm"),
]


def cells(operator: Operator, lacks: str | None, capability: tuple[int, int] | None) -> tuple[str, str]:
    """What runs an operator forward and backward on a machine that `lacks` something, or nothing."""
    if lacks is not None:
        return operator.reference
    ways = operator.forward, operator.backward
    return ways if capability == (9, 0) else tuple(operator.for_all if way == GLUON else way for way in ways)


def _interpreted() -> bool:
    from kernels.arguments import INTERPRETED  # needs Triton

    return INTERPRETED


def main() -> None:
    """Print the capability table."""
    lacks = machine_lacks()
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else f"no GPU, {platform.machine()}"
    interpreted = lacks is None and _interpreted()
    capability = torch.cuda.get_device_capability() if has_gpu and not interpreted else None
    run = "run in Triton's CPU interpreter, for tests" if interpreted else "run here"
    print(f"{device}, torch {torch.__version__}")
    print(f"Triton operators: {run if lacks is None else f'do not run here, {lacks}'}\n")
    width = max(len(operator.name) for operator in OPERATORS)
    print(f"{'operator':<{width}}  {'forward':<24}  backward")
    for operator in OPERATORS:
        forward, backward = cells(operator, lacks, capability)
        print(f"{operator.name:<{width}}  {forward:<24}  {backward}")
    print(
        f"""
Triton takes bfloat16 and float16; heads / kv_heads a power of two up to {LARGEST_GROUP}; key blocks of
{", ".join(map(str, BLOCKS))} tokens; head dimensions that are multiples of 8 from 16 to {LARGEST_HEAD}, above 128 with
key blocks of {LARGEST_BLOCK_OF_WIDE} or less; any number of selected blocks. Gluon takes a part of it on GPUs of
compute capability 9.0: head dimension 128 and key blocks of 64, and experts of widths that are multiples of 256.
kernels=auto falls back to the PyTorch reference and logs the reason, kernels=triton refuses to start."""
    )


if __name__ == "__main__":
    main()
