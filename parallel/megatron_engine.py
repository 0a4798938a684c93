"""Training steps on Megatron-core: gradients over micro-batches and stages, the distributed optimizer, evaluation."""

from collections.abc import Callable, Iterable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from parallel import replicas, shares
from parallel.context import Context
from parallel.engines import AdamW, Engine, MicroBatch, Step, state_dicts
from parallel.offload import with_offload


class MegatronEngine(Engine):
    """Data, tensor, pipeline, expert and context parallelism, with Megatron's distributed optimizer.

    With `overlap` gradients are reduced over data-parallel ranks while the last backward pass runs, and new weights
    gathered while the next forward pass does. `offload` is the share of the optimizer that lies in host memory.
    """

    def __init__(
        self,
        config: TransformerConfig,
        build: Callable[[TransformerConfig, bool, bool, int | None], MegatronModule],
        forward: Callable[..., Tensor],
        adamw: AdamW,
        device: torch.device,
        overlap: bool = True,
        offload: float = 0.0,
    ):
        self.config, self.forward, self.device = config, forward, device
        self.context = Context(parallel_state.get_context_parallel_group())
        chunks = [build(config, *where).to(device) for where in chunks_of_this_stage(config)]
        self.modules = chunks
        if config.bf16:
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        self.chunks = [
            DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        self.optimizer = _optimizer(config, self.chunks, adamw, overlap, offload)
        self.adamw, self.overlap = adamw, overlap
        if overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        config.finalize_model_grads_func = _finalize_gradients
        config.grad_scale_func = self.optimizer.scale_loss

    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float, **settings) -> Step:
        for group in self.optimizer.param_groups:
            # All of them, since a checkpoint brings the settings of the run that wrote it.
            group["lr"], group["eps"] = learning_rate, self.adamw.epsilon
            group["betas"] = (self.adamw.beta1, self.adamw.beta2)
            group["weight_decay"] = self.adamw.weight_decay * group.get("wd_mult", 1.0)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(micro_batches, _sum_and_count, forward_only=False, **settings)
        self.enter("optimizer")
        _, gradient_norm, _ = self.optimizer.step()
        total, count = self._over_ranks(losses).tolist()
        return Step(total / max(count, 1), int(count), float(gradient_norm))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], buckets: int, **settings) -> Tensor:
        def by_position(loss: Tensor, mask: Tensor) -> Tensor:
            both = torch.stack([loss * mask, mask], dim=-1).sum(0).double()  # [S, 2] of this rank
            whole = both.new_zeros(len(both) * self.context.size, 2)
            whole[self.context.places(len(both), both.device)] = both
            return whole.unflatten(0, (buckets, -1)).sum(1)

        for chunk in self.chunks:
            chunk.eval()
        return self._over_ranks(self._run(micro_batches, by_position, forward_only=True, **settings))

    def state(self, is_loading: bool = False) -> dict:
        if self.overlap:  # the next forward pass would gather the weights
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        model = {
            f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(self.modules)
        }
        parts = self.optimizer.chained_optimizers
        states = [part.state_dict() | {"param_state": shares.described(part, model, is_loading)} for part in parts]
        return model | {"optimizer": dict(enumerate(states)) if len(states) > 1 else states[0]}

    def load_state(self, state: dict) -> None:
        for index, chunk in enumerate(self.modules):
            chunk.load_state_dict(state[f"model{index}"], strict=False)  # extra states of norms are optional
        every = state_dicts(state["optimizer"])
        # Of the groups only the step counts: the rest is this run's, and another engine does not write it. The second
        # optimizer may have none: Transformer Engine's Adam has no step where the first rank has no experts.
        step = every[0]["optimizer"]["param_groups"][0]["step"]
        for part, loaded in zip(self.optimizer.chained_optimizers, every, strict=True):
            own = part.state_dict()
            for group in own["optimizer"]["param_groups"]:
                group["step"] = step
            part.load_state_dict(own)
            shares.take(part, loaded["param_state"])

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        measure: Callable[[Tensor, Tensor], Tensor],
        forward_only: bool,
        **settings,
    ) -> Tensor:
        """Drive Megatron's schedule; returns the sum of `measure(loss, mask)` over this rank's micro-batches."""

        def forward_step(batches: Iterable[MicroBatch], chunk: torch.nn.Module):
            self.enter("evaluation" if forward_only else "forward-backward")
            batch = {
                name: self.context.part(tensor.to(self.device, non_blocking=True), dim=1)
                for name, tensor in next(batches).items()
            }
            mask = batch.pop("loss_mask")

            def reduce(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                measured.append(measure(loss.detach().float(), mask))
                return (loss.float() * mask).sum(), mask.sum().int(), measured[-1]

            return self.forward(chunk, batch, **settings), reduce

        measured: list[Tensor] = []
        batch_size, sequence_length = micro_batches[0]["tokens"].shape
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=sequence_length,
            micro_batch_size=batch_size,
            forward_only=forward_only,
        )
        if measured:
            return torch.stack(measured).double().sum(0)
        zero = torch.zeros(batch_size, sequence_length // self.context.size, device=self.device)  # not the last stage
        return measure(zero, zero).double()

    def _over_ranks(self, measured: Tensor) -> Tensor:
        """Add up over ranks with other tokens, and from the last pipeline stage to all others, where it is zero."""
        torch.distributed.all_reduce(measured, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.config.pipeline_model_parallel_size > 1:
            torch.distributed.all_reduce(measured, group=parallel_state.get_pipeline_model_parallel_group())
        return measured


def _optimizer(
    config: TransformerConfig, chunks: list[DistributedDataParallel], adamw: AdamW, overlap: bool, offload: float
) -> MegatronOptimizer:
    """With zero states, so that checkpoints find them before the first step."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set before every step
        weight_decay=adamw.weight_decay,
        adam_beta1=adamw.beta1,
        adam_beta2=adamw.beta2,
        adam_eps=adamw.epsilon,
        clip_grad=adamw.clip,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
    )
    if offload:
        settings = with_offload(settings, offload, pinned=torch.cuda.is_available())
    with torch.no_grad():  # else parts of FP32 weights are no leaves, which offloading refuses
        optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    if not offload:  # else it has them by itself
        for part in optimizer.chained_optimizers:
            part.init_state_fn(part.optimizer)
    return optimizer


def _finalize_gradients(chunks: list[torch.nn.Module], *arguments, **keywords) -> None:
    finalize_model_grads(chunks, *arguments, **keywords)
    replicas.sum_gradients(chunks)


def _sum_and_count(loss: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([(loss * mask).sum(), mask.sum()])


def chunks_of_this_stage(config: TransformerConfig) -> list[tuple[bool, bool, int | None]]:
    """(pre_process, post_process, vp_stage) of each model chunk on this pipeline rank."""
    rank, size = parallel_state.get_pipeline_model_parallel_rank(), config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual is None:
        return [(rank == 0, rank == size - 1, None)]
    return [(rank == 0 and chunk == 0, rank == size - 1 and chunk == virtual - 1, chunk) for chunk in range(virtual)]
