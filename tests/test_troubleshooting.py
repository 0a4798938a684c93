"""The page on troubleshooting quotes what the program prints; these words of it must be in the program."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PROGRAM = "\n".join(
    path.read_text() for folder in ("hysparse", "parallel", "data", "launch") for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize(
    "words",
    [
        ", waits for others:",
        " is dead or stopped; last seen in ",
        " is still in ",
        "and no other rank is behind it",
        "a rank ended with code ",
        " processes cannot find each other without ",
        " starts from ",
        " failed, not queued again; to go on: ",
        "; nothing of this step ",
        " with a lower learning rate",
        "loss rose from ",
        ": bad, ",
        " GPUs answer",
        "left out from now on: ",
        " could not be written: ",
        "; older ones beside it are untouched",
        " is damaged and passed over: ",
        " differs from what was written",
        "Going on from ",
        " is of another architecture: ",
        " saw other data (corpus, blend or run.seed differ); ",
        " without a newer checkpoint, ",
        "; start all ranks ",
        "with the same arguments and files",
        "; copy it again",
        "Slurm refused the job: ",
        " is queued or running, and two would overwrite each other; ",
    ],
)
def test_what_the_page_quotes_is_what_the_program_prints(words):
    assert words in PAGE.replace("\n", " ")
    assert words in PROGRAM
