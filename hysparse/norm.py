"""RMSNorm with the signature and the marks that Megatron expects of a norm."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, built as Megatron builds norms.

    Under sequence parallelism each rank sees part of the tokens (or of the heads), so that the weight's gradient is a
    partial sum; the mark makes Megatron add it up over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
