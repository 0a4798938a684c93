"""The operators of HySparse, and the one place that chooses between their versions.

    operators = kernels.select("auto")
    output, blocks = operators.scored_attention(q, k, v, document_start, block=64, selected=16)

`reference.py` holds the plain PyTorch versions with the meaning of every argument. This folder imports nothing of the
project.
"""

import logging
from types import ModuleType

from kernels import reference
from kernels.errors import KernelError

log = logging.getLogger(__name__)

NO_TRITON = "no Triton version of the operators exists yet"


def select(choice: str) -> ModuleType:
    """The module with the operators for `choice` = auto, triton or reference.

    Raises KernelError when Triton was asked for by name and cannot be had; `auto` then logs why it fell back.
    """
    if choice == "triton":
        raise KernelError(f"kernels=triton cannot run: {NO_TRITON}; use kernels=auto or kernels=reference")
    if choice == "auto":
        log.info("kernels=auto uses the PyTorch reference: %s", NO_TRITON)
    return reference
