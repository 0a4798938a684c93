"""Random inputs with packed documents for the operators' tests, and the error measure of all of them."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels import Branch


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in FP64; a norm below 1 counts as 1, since some gradients are zero."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp(min=1)).item()


def starts(lengths: list[list[int]], device: str = "cpu") -> Tensor:
    """document_start [B, S] of sequences packed from documents of these lengths."""
    rows = []
    for row in lengths:
        ends = torch.tensor(row).cumsum(0)
        rows.append(torch.repeat_interleave(ends - torch.tensor(row), torch.tensor(row)))
    return torch.stack(rows).int().to(device)


@dataclass
class Layers:
    """Inputs of a full layer (q, k, v) and of a sparse layer that reads it."""

    q: Tensor
    k: Tensor
    v: Tensor
    sparse_q: Tensor
    own_k: Tensor
    own_v: Tensor
    sinks: Tensor  # [2, H]
    gates: Tensor  # [2, B, S, H, 1 or D], before the sigmoid
    document_start: Tensor

    @classmethod
    def random(
        cls, document_start: Tensor, H: int, K: int, D: int, dtype=torch.float32, gate_width=1, seed=0, values=None
    ):
        """`values`: the head dimension of the values, that of queries and keys unless it is given."""
        B, S = document_start.shape
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(document_start.device, dtype).requires_grad_()

        Dv = values or D
        q, k, v = draw(B, S, H, D), draw(B, S, K, D), draw(B, S, K, Dv)
        sparse_q, own_k, own_v = draw(B, S, H, D), draw(B, S, K, D), draw(B, S, K, Dv)
        gates = draw(2, B, S, H, gate_width)
        return cls(q, k, v, sparse_q, own_k, own_v, draw(2, H), gates, document_start)

    def to(self, dtype: torch.dtype) -> "Layers":
        """A copy with leaves of its own."""
        values = (getattr(self, field.name) for field in fields(self))
        return Layers(*(x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in values))

    def run(self, operators, variant: str, block: int, selected: int, window: int) -> tuple[Tensor, Tensor]:
        """Outputs of the full and of the sparse layer."""
        output, shared = operators.oracle_attention(self.q, self.k, self.v, self.document_start, block, selected)
        own, lent = (self.own_k, self.own_v, None, None), shared[:4]
        of_sparse, of_window = {
            "hysparse": (lent, own),
            "hysparse_no_swa": (own, None),
            "hysparse_own_kv": (own, own),
            "hysparse_shared_swa": (lent, lent),
            "hybrid_swa": (None, own),
        }[variant]
        branches = [
            None if kv is None else Branch(*kv, sink, gate.sigmoid())
            for kv, sink, gate in zip((of_sparse, of_window), self.sinks, self.gates, strict=True)
        ]
        return output, operators.hybrid_attention(self.sparse_q, *branches, shared, self.document_start, block, window)

    def gradients(self, outputs: tuple[Tensor, ...], seed: int = 1) -> dict[str, Tensor]:
        """Of every input, for random output gradients; those that nothing depends on are left out."""
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        torch.autograd.backward(outputs, grads)
        gradients = {field.name: getattr(self, field.name).grad for field in fields(self)}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}
