"""The words that a key of the configuration may hold, where it is neither a number nor free text."""

from enum import StrEnum


class Source(StrEnum):
    """Whose K/V a branch of a sparse layer reads."""

    none = "none"  # the branch does not exist
    own = "own"  # this layer's own projection
    shared = "shared"  # the K/V of the full layer that opens the hybrid block


class Gate(StrEnum):
    none = "none"
    headwise = "headwise"  # one sigmoid per head and token
    elementwise = "elementwise"  # one sigmoid per output channel


class Recompute(StrEnum):
    none = "none"
    selective = "selective"  # attention operators only
    full = "full"  # whole layers; only their inputs are kept


class Dispatcher(StrEnum):
    """How tokens reach experts on other ranks."""

    alltoall = "alltoall"  # a row for each expert of a token, by NCCL
    deepep = "deepep"  # a row for each rank that has experts of a token, by the package deep_ep


class Kernels(StrEnum):
    auto = "auto"  # the fastest that runs here; what it fell back from is logged once
    triton = "triton"  # refuse to start without it
    reference = "reference"  # plain PyTorch, FP32 inside


class Precision(StrEnum):
    auto = "auto"  # bf16 on a GPU, fp32 on a CPU
    bf16 = "bf16"
    fp8 = "fp8"  # matrix products of the layers by Transformer Engine, see `linears.py`; everything else as bf16
    fp32 = "fp32"


class ExpertProducts(StrEnum):
    auto = "auto"  # grouped; te with precision=fp8
    grouped = "grouped"  # all experts in one product: kernels of this project on Hopper, PyTorch's elsewhere
    te = "te"  # Transformer Engine's GroupedLinear: slower with many small experts in BF16, and the only one in FP8


class EngineName(StrEnum):
    megatron = "megatron"  # all kinds of parallelism
    deepspeed = "deepspeed"  # data parallelism with ZeRO; needs the package deepspeed


class Offload(StrEnum):
    none = "none"  # stays on the GPU
    cpu = "cpu"
    nvme = "nvme"  # in files; the CPU's memory is a buffer


class RouterScore(StrEnum):
    sigmoid = "sigmoid"
    softmax = "softmax"


class Balance(StrEnum):
    sequence = "sequence"  # the load of every sequence
    batch = "batch"  # the load of a micro-batch over all data-parallel ranks: freer to specialise by topic


class DecayShape(StrEnum):
    linear = "linear"
    cosine = "cosine"
    sqrt = "sqrt"  # 1 - sqrt(progress): falls early (Hägele et al. 2024)
