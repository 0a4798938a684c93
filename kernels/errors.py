"""What goes wrong before a kernel runs, and how closely that is looked at."""

import os


class KernelError(Exception):
    """The kernels that were asked for do not run here, or an argument does not suit them; the message names it."""


def debugging() -> bool:
    """Whether values are checked as well as shapes, which waits for the device: HYSPARSE_DEBUG=1 in the environment."""
    return os.environ.get("HYSPARSE_DEBUG") == "1"
