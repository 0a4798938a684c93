"""What the Triton operators can do, and why they cannot here: asked before a run takes anything."""

import importlib.metadata
from dataclasses import dataclass

import torch

BLOCKS = (16, 32, 64, 128)
LARGEST_GROUP = 64
LARGEST_HEAD = 256
LARGEST_BLOCK_OF_WIDE = 64  # tokens in a key block where a head dimension is above 128: more does not fit beside them
OLDEST = (9, 0)  # compute capability: that of Hopper, on which alone the kernels are tested
SHARED_MEMORY = 227 * 1024  # bytes of a program: what tile sizes are made for; newer GPUs for desktops have less


@dataclass(frozen=True)
class Needs:
    """What a model asks of the operators."""

    head_dim: int
    group: int  # query heads per KV head
    block: int  # tokens in a key block
    dtype: torch.dtype


def machine_lacks() -> str | None:
    """Why no Triton operator runs on this machine; None if they do. Triton's CPU interpreter counts as a machine."""
    try:
        importlib.metadata.version("triton")
        from kernels.arguments import INTERPRETED
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return "the package triton is not installed; pip install triton, on a GPU machine it comes with torch"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need 9.0 (H100) or newer"
    if (shared := torch.cuda.get_device_properties().shared_memory_per_block_optin) < SHARED_MEMORY:
        name = torch.cuda.get_device_name()
        return f"{name} gives a program {shared >> 10} KiB of shared memory; the kernels need the 227 KiB of an H100"
    return None


def unsuited(needs: Needs) -> list[str]:
    """What of a model the Triton operators do not take, each with what they would take."""
    from kernels.arguments import DTYPES, power_of_two

    reasons = []
    if needs.dtype not in DTYPES:
        reasons.append(f"they compute in bfloat16 or float16, not {str(needs.dtype).removeprefix('torch.')}")
    if not power_of_two(needs.group) or needs.group > LARGEST_GROUP:
        reasons.append(f"heads / kv_heads = {needs.group} must be a power of two up to {LARGEST_GROUP} for them")
    if needs.block not in BLOCKS:
        reasons.append(f"attention.block={needs.block} must be one of {', '.join(map(str, BLOCKS))} for them")
    if needs.head_dim > 128 and needs.block > LARGEST_BLOCK_OF_WIDE:
        reasons.append(
            f"attention.block={needs.block} must be {LARGEST_BLOCK_OF_WIDE} or less "
            f"with model.head_dim={needs.head_dim} for them"
        )
    if needs.head_dim % 8 or not 16 <= needs.head_dim <= LARGEST_HEAD:
        reasons.append(f"model.head_dim={needs.head_dim} must be a multiple of 8 from 16 to {LARGEST_HEAD} for them")
    return reasons
