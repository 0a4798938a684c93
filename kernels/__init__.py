"""The operators of HySparse, and the one place that chooses between their versions.

    operators = kernels.select("auto", kernels.Needs(head_dim=128, group=16, block=64, dtype=torch.bfloat16))
    output, shared = operators.oracle_attention(q, k, v, document_start, block=64, selected=16)

`reference.py` holds the plain PyTorch versions with the meaning of every argument, `operators.py` the Triton ones.
`python -m kernels` prints what runs here. This folder imports nothing of the project.
"""

import logging
from types import ModuleType

from kernels import reference
from kernels.capability import Needs, machine_lacks, unsuited
from kernels.errors import KernelError
from kernels.shared import Branch, SharedKV

__all__ = ["Branch", "KernelError", "Needs", "SharedKV", "reference", "select"]

log = logging.getLogger(__name__)


def select(choice: str, needs: Needs) -> ModuleType:
    """The module with the operators for `choice` = auto, triton or reference.

    Raises KernelError when Triton was asked for by name and cannot be had; `auto` then logs why it fell back. Triton's
    CPU interpreter is for tests: only `triton` by name takes it.
    """
    if choice not in ("auto", "triton", "reference"):
        raise KernelError(f"kernels={choice} does not exist; use auto, triton or reference")
    if choice == "reference":
        return reference
    lacks = machine_lacks()
    reasons = [lacks] if lacks else unsuited(needs)
    if choice == "auto" and not reasons:
        from kernels.arguments import INTERPRETED

        if INTERPRETED:
            reasons = ["TRITON_INTERPRET=1 is set, and its interpreter is only for tests"]
    if not reasons:
        from kernels import operators

        log.info("kernels=%s uses the Triton operators", choice)
        return operators
    if choice == "triton":
        raise KernelError(f"kernels=triton cannot run: {'; '.join(reasons)}. Or use kernels=auto or kernels=reference")
    log.info("kernels=auto uses the PyTorch reference, for the experts too, not Triton: %s", "; ".join(reasons))
    return reference
