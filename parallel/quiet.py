"""Keeps import-time warnings of third parties off the terminal; called before the first of them is imported."""

import logging
import warnings

NOISE = (
    r".*(Apex|apex|Transformer Engine|TransformerEngine).*",  # optional packages that Megatron looks for
    r".*full scope is deprecated.*",  # a default of Megatron's own
    r".*\.grad attribute of a Tensor that is not a leaf.*",  # read while the distributed optimizer is set up
    r".*deprecating ShardedTensor.*",  # in Megatron's checkpoints
    r".*torch\.distributed\.\w+` is deprecated.*",
    r".*torch\.jit\.script.*deprecated.*",
)


def quiet_third_parties() -> None:
    """Errors still show; the warnings of this project too."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("megatron", "torch.distributed", "transformer_engine"):
        logging.getLogger(name).setLevel(logging.ERROR)
