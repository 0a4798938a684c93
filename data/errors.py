"""The one exception a user of this folder can cause."""


class DataError(Exception):
    """A mistake in the data or in how it was asked for: one sentence with the values involved and what to do.

    Shown without a traceback; every other exception out of this folder is a bug and keeps its traceback.
    """
