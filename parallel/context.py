"""Context parallelism: which tokens of a sequence a rank has, and how ranks lend each other what lies elsewhere.

A sequence is cut into 2c chunks for c ranks; rank r has chunks r and 2c - 1 - r, one behind the other. In causal
computations a late token has more to do than an early one, and so all ranks have equally much. Two exchanges are
enough: `gather` brings tensors of the whole sequence together, `with_halo` the few tokens before each chunk. Each has
its reverse for gradients. Nothing here knows what the tensors are.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Chunk(NamedTuple):
    """Neighbouring tokens of this rank."""

    rows: slice  # among the tokens of this rank
    start: int  # position in the sequence


class Context:
    """The part of a sequence that this rank of `group` has; all of it where the group is one rank."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def chunks(self, tokens: int) -> list[Chunk]:
        """The chunks of this rank's `tokens` tokens, in their order."""
        if self.size == 1:
            return [Chunk(slice(0, tokens), 0)]
        length = tokens // 2
        numbers = (self.rank, 2 * self.size - 1 - self.rank)
        return [
            Chunk(slice(index * length, (index + 1) * length), number * length) for index, number in enumerate(numbers)
        ]

    def places(self, tokens: int, device: torch.device) -> Tensor:
        """The position in the sequence of each of this rank's `tokens` tokens."""
        length = tokens // len(self.chunks(tokens))
        return torch.cat([torch.arange(c.start, c.start + length, device=device) for c in self.chunks(tokens)])

    def part(self, x: Tensor, dim: int) -> Tensor:
        """What this rank has of a tensor of the whole sequence, whose tokens lie along `dim`."""
        if self.size == 1:
            return x
        chunks = x.chunk(2 * self.size, dim)
        return torch.cat([chunks[self.rank], chunks[-1 - self.rank]], dim)

    def gather(self, *tensors: Tensor, known: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """Tensors [tokens, ...] of all ranks as [sequence, ...], in one collective; so is the sum of their gradients.

        They differ at most in their last dimension. `known` is what an earlier call with the same values returned: then
        nothing is sent, and only gradients will be.
        """
        return tensors if self.size == 1 else _Gather.apply(self, known, *tensors)

    def with_halo(self, *tensors: Tensor, halo: int) -> list[tuple[Tensor, ...]]:
        """For each chunk the tensors [halo + chunk, ...]: its rows of `tensors` after the `halo` tokens before it.

        They differ at most in their last dimension and travel together. A halo is no longer than a chunk. What would
        stand before the sequence is zero. One rank has everything already: there, nothing is put before.
        """
        if self.size == 1:
            return [tensors]
        chunks = _Halo.apply(self, halo, *tensors)
        return [chunks[: len(tensors)], chunks[len(tensors) :]]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context: Context, known: tuple[Tensor, ...] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.context, ctx.widths = context, [x.shape[-1] for x in tensors]
        if known is not None:
            return tuple(x.detach() for x in known)
        mine = torch.cat(tensors, -1)
        everyone = mine.new_empty(context.size * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(everyone, mine, group=context.group)
        early, late = everyone.unflatten(0, (context.size, 2, -1)).unbind(1)  # [c, chunk, ...]
        return tuple(torch.cat([early, late.flip(0)]).flatten(0, 1).split(ctx.widths, -1))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context = ctx.context
        early, late = torch.cat(grads, -1).unflatten(0, (2 * context.size, -1)).chunk(2)
        everyone = torch.cat([early, late.flip(0)], 1).flatten(0, 1)  # by rank
        mine = everyone.new_empty(len(everyone) // context.size, *everyone.shape[1:])
        dist.reduce_scatter_tensor(mine, everyone, group=context.group)
        return None, None, *mine.split(ctx.widths, -1)


class _Halo(torch.autograd.Function):
    """The chunk before this rank's first one is the first of rank r - 1; that before its second one, of rank r + 1, or
    on the last rank its own first one."""

    @staticmethod
    def forward(ctx, context: Context, halo: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.context, ctx.halo, ctx.widths = context, halo, [x.shape[-1] for x in tensors]
        early, late = torch.cat(tensors, -1).chunk(2)
        before_early, before_late = _exchange(context, _last(late, halo), _last(early, halo))
        chunks = torch.cat([before_early, early]), torch.cat([before_late, late])
        return tuple(part for chunk in chunks for part in chunk.split(ctx.widths, -1))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count, halo = len(ctx.widths), ctx.halo
        of_early, of_late = torch.cat(grads[:count], -1), torch.cat(grads[count:], -1)
        sent_late, sent_early = _exchange(ctx.context, of_early[:halo], of_late[:halo])
        early, late = of_early[halo:], of_late[halo:]  # of tensors made here
        _last(early, halo).add_(sent_early)
        _last(late, halo).add_(sent_late)
        return None, None, *torch.cat([early, late]).split(ctx.widths, -1)


def _last(x: Tensor, rows: int) -> Tensor:
    return x[len(x) - rows :]


def _exchange(context: Context, to_previous: Tensor, to_next: Tensor) -> tuple[Tensor, Tensor]:
    """What the previous and the next rank sent here; both tensors have the shape of those that are sent.

    The first rank gets zeros from its missing neighbour, the last one what it would have sent on.
    """
    first, last = context.rank == 0, context.rank == context.size - 1
    neighbours = {context.rank - 1: to_previous, context.rank + 1: to_next}
    sent = [x for rank, x in neighbours.items() if 0 <= rank < context.size]
    sizes = [len(to_next) if rank in neighbours else 0 for rank in range(context.size)]
    received = to_next.new_empty(sum(sizes), *to_next.shape[1:])
    dist.all_to_all_single(received, torch.cat(sent), sizes, sizes, group=context.group)
    parts = list(received.tensor_split(len(sent)))
    from_previous = torch.zeros_like(to_next) if first else parts.pop(0)
    return from_previous, to_next if last else parts.pop(0)
