"""What the terminal shows: our own messages, from one process, and none of the import-time noise of third parties."""

import logging
import warnings

from parallel.ranks import rank

OURS = ("hysparse", "kernels", "parallel", "data")

NOISE = (
    r".*(Apex|apex|Transformer Engine|TransformerEngine).*",  # optional packages that Megatron looks for
    r".*full scope is deprecated.*",  # a default of Megatron's own
    r".*\.grad attribute of a Tensor that is not a leaf.*",  # read while the distributed optimizer is set up
    r".*deprecating ShardedTensor.*",  # in Megatron's checkpoints
    r".*`sequence_parallel` is set to `True`, but tensor model parallel size is 1.*",  # the experts, as intended
    r".*`load_state_dict` is deprecated.*",  # in Megatron's checkpoints
    r".*torch\.distributed\.\w+` is deprecated.*",
    r".*torch\.jit\.script.*deprecated.*",
)


def show_own_messages() -> None:
    """Send this project's log to stderr, on the first rank only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO if rank() == 0 else logging.ERROR)


def quiet_third_parties() -> None:
    """Before the first of them is imported. Their errors still show."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("megatron", "torch.distributed", "transformer_engine"):
        logging.getLogger(name).setLevel(logging.ERROR)
