"""What goes wrong before a kernel runs."""


class KernelError(Exception):
    """The kernels that were asked for do not run here, or an argument does not suit them; the message names it."""
