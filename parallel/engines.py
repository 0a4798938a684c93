"""What a training engine promises, whichever framework it is built on.

An engine owns the model on this process's device, gradients over micro-batches and ranks, and the optimizer. It knows
models only as modules that turn a micro-batch into each token's loss. All engines write and read the same checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

MicroBatch = dict[str, Tensor]  # tokens, labels, document_start [B, S]; loss_mask [B, S] FP32; of whole sequences


@dataclass(frozen=True)
class Step:
    """One optimizer step over all ranks."""

    loss: float  # mean over the tokens that count, natural log
    tokens: int  # tokens that count
    gradient_norm: float  # before clipping


@dataclass(frozen=True)
class AdamW:
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed shares out over ranks, and where each rank keeps its part: none (the GPU), cpu or nvme."""

    zero: int = 1  # stage
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    nvme: str | None = None  # a folder


class Engine(ABC):
    """`build(config, pre_process, post_process, vp_stage)` makes a model chunk, `forward(chunk, batch, **settings)`
    runs it and returns each token's loss [B, S] on the last stage, the hidden state before it. Under context
    parallelism it gets this rank's part of the sequences.
    """

    modules: list[MegatronModule]  # the model chunks of this rank
    enter: Callable[[str], None] = staticmethod(lambda phase: None)  # told of each micro-batch and each update

    @abstractmethod
    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, **settings) -> Step:
        """One update from this rank's micro-batches; `settings` go to `forward`."""

    @abstractmethod
    def evaluate(self, micro_batches: Sequence[MicroBatch], buckets: int, **settings) -> Tensor:
        """Summed loss and number of tokens by position in the sequence, over all ranks: [buckets, 2] FP64."""

    @abstractmethod
    def state(self, is_loading: bool = False) -> dict:
        """Model and optimizer as a sharded state dict, for `parallel.checkpoint`. Called by all ranks."""

    @abstractmethod
    def load_state(self, state: dict) -> None:
        """Take over what `parallel.checkpoint.load` read into `state(is_loading=True)`. Called by all ranks."""


def make_engine(
    name: str,
    zero: Zero,
    config: TransformerConfig,
    build: Callable[[TransformerConfig, bool, bool, int | None], MegatronModule],
    forward: Callable[..., Tensor],
    adamw: AdamW,
    device: torch.device,
    overlap: bool = True,
    offload: float = 0.0,
) -> Engine:
    """megatron, which alone takes `overlap` and `offload`, or deepspeed, which alone takes `zero`.

    A framework is imported only where it is wanted.
    """
    if name == "deepspeed":
        from parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, build, forward, adamw, device, zero)
    from parallel.megatron_engine import MegatronEngine

    return MegatronEngine(config, build, forward, adamw, device, overlap, offload)


def state_dicts(optimizer: dict | list) -> list[dict]:
    """The states of Megatron's optimizers: one, or with experts two under their numbers."""
    if "optimizer" in optimizer:
        return [optimizer]
    return [optimizer[index] for index in range(len(optimizer))]
