"""The picture of a run: every shape of ledger gives one, and it shows the records that count."""

import math
import subprocess
import sys
from contextlib import closing

import matplotlib.image
import numpy as np
import pytest

from hysparse import plot
from hysparse.ledger import Ledger
from hysparse.plot import plot_run

TOKENS = 4096  # per step


def write_steps(ledger: Ledger, steps: range, phase: str = "short", loss: float | None = None) -> None:
    for step in steps:
        value = 2 + 8 / step if loss is None else loss
        ledger.write("step", step, tokens=step * TOKENS, phase=phase, loss=value, learning_rate=1e-3)


def write_phase(ledger: Ledger, step: int, name: str, sequence_length: int) -> None:
    rope = 10_000.0 * sequence_length / 512
    ledger.write("phase", step, tokens=step * TOKENS, name=name, sequence_length=sequence_length, rope_base=rope)


def write_validation(ledger: Ledger, step: int, **values) -> None:
    ledger.write("validation", step, tokens=step * TOKENS, loss=3.0, **values)


def empty(ledger: Ledger) -> None:
    ledger.write("start", 0)


def one_step(ledger: Ledger) -> None:
    write_phase(ledger, 0, "short", 512)
    write_steps(ledger, range(1, 2))


def without_validation(ledger: Ledger) -> None:
    write_phase(ledger, 0, "short", 512)
    write_steps(ledger, range(1, 300))


def two_phases(ledger: Ledger) -> None:
    write_phase(ledger, 0, "short", 512)
    write_steps(ledger, range(1, 100))
    write_validation(ledger, 99, by_position=[3.0, 2.5, 2.0, None])
    write_phase(ledger, 99, "long", 2048)
    write_steps(ledger, range(100, 150), "long")


def nulls(ledger: Ledger) -> None:
    write_steps(ledger, range(1, 4), loss=math.nan)
    ledger.write("validation", 3, tokens=3 * TOKENS, loss=math.nan, by_position=[])


def resumed(ledger: Ledger) -> None:
    write_phase(ledger, 0, "short", 512)
    write_steps(ledger, range(1, 20), loss=9.0)
    ledger.write("start", 10)
    write_phase(ledger, 10, "short", 512)
    write_steps(ledger, range(11, 15), loss=5.0)


SHAPES = [empty, one_step, without_validation, two_phases, nulls, resumed]


def draw(tmp_path, shape, monkeypatch):
    """The figure that plot_run saved for a ledger of this shape."""
    figures = []
    monkeypatch.setattr(plot, "Figure", lambda **options: figures.append(FIGURE(**options)) or figures[0])
    ledger = Ledger(tmp_path / "ledger.jsonl")
    shape(ledger)
    ledger.close()
    plot_run(ledger.path, tmp_path / "curves.png")
    return figures[0]


FIGURE = plot.Figure


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_run_gives_a_picture(tmp_path, shape, monkeypatch, recwarn):
    draw(tmp_path, shape, monkeypatch)
    pixels = matplotlib.image.imread(tmp_path / "curves.png")
    assert pixels.shape[:2] == (800, 1200) and pixels.std() > 0.02  # not blank
    assert not recwarn.list


def test_a_resume_replaces_the_lost_steps_and_draws_no_second_phase(tmp_path, monkeypatch):
    loss = draw(tmp_path, resumed, monkeypatch).axes[0]
    drawn = loss.lines[0]
    assert list(drawn.get_xdata()) == [step * TOKENS for step in range(1, 15)]
    assert list(drawn.get_ydata()) == [9.0] * 10 + [5.0] * 4
    assert len(loss.texts) == 1


def test_each_phase_has_its_line_and_label(tmp_path, monkeypatch):
    loss, rate, positions = draw(tmp_path, two_phases, monkeypatch).axes
    assert [text.get_text() for text in loss.texts] == ["short\n512 tokens, RoPE 10 K", "long\n2,048 tokens, RoPE 40 K"]
    for axes in (loss, rate):
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [
            [0, 0],
            [99 * TOKENS] * 2,
        ]
    (by_position,) = positions.lines
    assert list(by_position.get_xdata()) == [64, 192, 320, 448]  # the record belongs to the phase that ended, 512 long


def test_the_running_mean_skips_what_is_not_finite_and_shrinks_at_the_ends():
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0, np.nan, np.nan, np.nan])
    expected = [1.5, 1.5, 3.0, 5.0, 5.0, 6.0, np.nan, np.nan]  # by hand, one neighbour on each side
    np.testing.assert_allclose(plot.smooth(values, 1), expected)


def test_the_command_redraws_the_picture_of_a_run_folder(tmp_path):
    with closing(Ledger(tmp_path / "ledger.jsonl")) as ledger:
        one_step(ledger)
    command = [sys.executable, "-m", "hysparse.plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == str(tmp_path / "curves.png") and (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    )


def test_the_command_says_what_it_wants_when_there_is_no_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path)])
    with pytest.raises(SystemExit, match="RUN_DIR.*ledger.jsonl"):
        plot.main()
