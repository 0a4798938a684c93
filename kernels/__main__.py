"""`python -m kernels`: which operators run on this machine, and if not, why."""

import platform

import torch

from kernels.capability import BLOCKS, LARGEST_GROUP, LARGEST_HEAD, machine_lacks

# operator, forward, backward
OPERATORS = [
    ("full attention with block selection", "Triton", "Triton"),
    ("full attention without selection", "Triton", "the same"),
    ("index of a selection", "Triton and torch.sort", "needs none"),
    ("sparse layer: blocks, window, sinks, gates", "Triton", "Triton"),
    ("sliding window with sink", "Triton", "Triton"),
    ("query, key, value and gates from the projection", "Triton", "Triton"),
    ("decode, full and sparse layer", "Triton", "needs none"),
    ("router of a mixture of experts", "Triton; groups PyTorch", "the same"),
    ("tokens to experts and back, weighted SwiGLU", "Triton", "Triton"),
    ("experts' matrix products", "torch grouped_mm", "torch grouped_mm"),
]


def main() -> None:
    """Print the capability table."""
    lacks = machine_lacks()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {platform.machine()}"
    print(f"{device}, torch {torch.__version__}")
    print(f"Triton operators: {'run here' if lacks is None else f'do not run here, {lacks}'}\n")
    width = max(len(name) for name, *_ in OPERATORS)
    print(f"{'operator':<{width}}  {'forward':<24}  backward")
    for name, forward, backward in OPERATORS:
        if lacks is not None:
            forward, backward = "reference", "reference (autograd)" if backward != "needs none" else backward
        print(f"{name:<{width}}  {forward:<24}  {backward}")
    print(
        f"""
Triton takes bfloat16 and float16; heads / kv_heads a power of two up to {LARGEST_GROUP}; key blocks of
{", ".join(map(str, BLOCKS))} tokens; head dimensions that are multiples of 8 from 16 to {LARGEST_HEAD}; any number
of selected blocks. kernels=auto falls back to the PyTorch reference and logs the reason, kernels=triton refuses to
start instead."""
    )


if __name__ == "__main__":
    main()
