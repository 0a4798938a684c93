"""What a launch writes before it is accepted, taken back where it is not: the corrected command finds all as before."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.errors import LaunchError


@contextmanager
def written(path: Path, text: str, setting: str) -> Iterator[None]:
    """Write `path` and the folders above it; a LaunchError inside undoes that. `setting` names what chose the place."""
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    before = path.read_text() if path.exists() else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise LaunchError(f"{setting} cannot be written ({error.strerror}); give another folder") from error
    try:
        yield
    except LaunchError:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
        for folder in missing:
            with suppress(OSError):  # others have written there since
                folder.rmdir()
        raise
