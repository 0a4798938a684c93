"""Cross-entropy of logits whose vocabulary is split over ranks, in two passes over them and without a copy.

The usual way (Megatron's, fused or not, and Liger's) keeps the softmax in FP32 for the backward: twice the bytes of
BF16 logits, 20 GB for 32,768 tokens and 151,680 words. Here the forward only reads the logits (maximum, sum and the
label's logit of each token), the backward computes the gradient from them again and writes it where they were:

    loss = log sum_j exp(x_j) - x_label        d loss / d x_j = exp(x_j - log sum) - [j = label]

Two functions hold the arithmetic. On a GPU torch.compile makes one kernel of each; on a CPU they run as they stand.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.errors import KernelError, debugging


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Loss [...] in FP32 of logits [..., vocabulary / ranks] and labels [...], the same on all ranks of `group`.

    Its backward overwrites `logits`, which nothing else may need then, and so can run once only. With HYSPARSE_DEBUG=1
    a label outside of the vocabulary raises KernelError; otherwise it is the label of no rank.
    """
    if debugging() and not labels.is_meta:  # a dry run has no values
        words = group.size() * logits.shape[-1]
        if len(wrong := ((labels < 0) | (labels >= words)).nonzero()):
            place = tuple(wrong[0].tolist())
            raise KernelError(f"labels{list(place)} is {int(labels[place])}; the vocabulary has {words} words from 0")
    return _CrossEntropy.apply(logits, labels, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Tensor:
        labels = labels - group.rank() * logits.shape[-1]  # the column of this rank, if it lies within
        maximum, total, picked = _statistics(logits, labels)
        if group.size() > 1:
            here = maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
            sums = torch.stack([total * (here - maximum).exp(), picked])
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
            total, picked = sums
        log_total = maximum + total.log()
        ctx.save_for_backward(logits, labels, log_total)
        return log_total - picked

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, log_total = ctx.saved_tensors
        return _turn_into_gradient(logits.detach(), labels, log_total, grad), None, None


def _compiled_on_gpu(function: Callable) -> Callable:
    compiled = torch.compile(function)

    def run(logits: Tensor, *others: Tensor):
        return (compiled if logits.is_cuda else function)(logits, *others)

    return run


@_compiled_on_gpu
def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token the maximum, the sum of exponentials below it, and the label's logit, 0 if another rank has it."""
    logits = logits.float()
    maximum = logits.amax(-1)
    total = (logits - maximum.unsqueeze(-1)).exp().sum(-1)
    last = logits.shape[-1] - 1
    picked = logits.gather(-1, labels.clamp(0, last).unsqueeze(-1)).squeeze(-1)
    return maximum, total, picked.where((labels >= 0) & (labels <= last), 0)


@_compiled_on_gpu
def _turn_into_gradient(logits: Tensor, labels: Tensor, log_total: Tensor, grad: Tensor) -> Tensor:
    """Overwrites `logits` and returns it."""
    probability = (logits.float() - log_total.unsqueeze(-1)).exp()
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    return logits.copy_((probability - is_label.float()) * grad.unsqueeze(-1))
