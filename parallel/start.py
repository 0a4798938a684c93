"""What happens once in each process before a model is built: devices, process groups, and Megatron-core made ready."""

import os
import queue
from dataclasses import dataclass
from datetime import timedelta

import torch

from parallel.ranks import local_rank, rank, world_size


class StartError(Exception):
    """The processes of this run cannot come together."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model-parallel process groups; data parallelism takes what is left."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    context: int = 1
    replicas: int = 1  # neighbouring tensor-parallel ranks that hold the same KV head


def start(sizes: Sizes, timeout_minutes: float = 10, settings: dict[str, str] | None = None) -> torch.device:
    """Create the process groups and return this process's device.

    The CPU stand-in is installed only where there is no GPU; there the backend is gloo, else NCCL. `settings` must be
    the same on all ranks: with other sizes or batches on one of them the others would wait for it without end.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        from parallel import cpu  # never loaded where there is a GPU

        cpu.install()
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())  # Slurm may show each task its own only
        torch.cuda.set_device(device)
    prepare_megatron()

    backend = "gloo" if on_cpu else "nccl"
    timeout = timedelta(minutes=timeout_minutes)
    if world_size() == 1:  # no rendezvous: a port could be taken
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    else:
        os.environ.setdefault("RANK", str(rank()))
        os.environ.setdefault("WORLD_SIZE", str(world_size()))
        if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
            raise StartError(
                f"{world_size()} processes cannot find each other without {' and '.join(sorted(missing))}; set them "
                "to the first node's address and a free port, or start with torchrun"
            )
        torch.distributed.init_process_group(backend, timeout=timeout, device_id=None if on_cpu else device)
        _check_same(settings or {})
    make_groups(sizes, timeout_minutes)
    return device


def _check_same(settings: dict[str, str]) -> None:
    everyone: list = [None] * world_size()
    torch.distributed.all_gather_object(everyone, settings)
    for other, theirs in enumerate(everyone):
        for key in sorted(everyone[0].keys() | theirs.keys()):
            if everyone[0].get(key) != theirs.get(key):
                raise StartError(
                    f"{key} is {everyone[0].get(key)} on rank 0 and {theirs.get(key)} on rank {other}; start all ranks "
                    "with the same arguments and files"
                )


def make_groups(sizes: Sizes, timeout_minutes: float = 10) -> None:
    """Megatron's process groups out of those of torch, which exist."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from parallel import replicas  # imports Megatron, which the stand-in for a GPU must precede

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual if sizes.virtual > 1 else None,
        context_parallel_size=sizes.context,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    replicas.make_group(sizes.replicas)
    # Nothing draws from it: there is no dropout, and initialisation has its own seeds.
    model_parallel_cuda_manual_seed(0)


def stop() -> None:
    """Take the process groups down; safe to call twice."""
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        from parallel import replicas

        replicas.forget_group()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _copied_to_cpu(buckets: list[tuple], non_blocking: bool) -> list[tuple]:
    """What a rank writes to a checkpoint, in memory that is free again after that.

    Megatron's copies are pinned: PyTorch rounds each up to a power of two, and keeps the memory for the next one.
    """
    return [
        (file, key, (objects, [(item, tensor.to("cpu")) for item, tensor in tensors]))
        for file, key, (objects, tensors) in buckets
    ]


def prepare_megatron() -> None:
    """Repairs of Megatron-core 0.16.1, two of them for machines without Transformer Engine."""
    import megatron.core.optimizer as optimizer
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.moe import moe_utils

    # A blocking save needs no queue between processes; the one made by default starts a server that outlives a kill.
    filesystem_async._results_queue = queue.Queue()
    filesystem_async.FileSystemWriterAsync.preload_tensors = staticmethod(_copied_to_cpu)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # read on every routing, defined only with Transformer Engine
    from parallel.offload import HybridAdam  # Megatron is imported by now

    optimizer.HybridDeviceOptimizer = distrib_optimizer.HybridDeviceOptimizer = HybridAdam
    if optimizer.USING_PYTORCH_OPTIMIZER or not torch.cuda.is_available():  # Transformer Engine's Adam needs a GPU
        from parallel.adam import Adam

        optimizer.Adam = distrib_optimizer.Adam = Adam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
