"""What this package raises."""


class LaunchError(Exception):
    """Nothing was started or submitted; the message says why and what to do."""
