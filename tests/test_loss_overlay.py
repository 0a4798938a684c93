"""The picture of two runs says how far apart they are."""

import json

import pytest

from docs import loss_overlay


@pytest.fixture
def folder(tmp_path):
    """Two pairs of ledgers; the reference run of each stopped a step earlier."""
    for name in loss_overlay.RUNS:
        for operators, losses in (("kernels", (6.0, 5.0, 4.0, 3.0)), ("reference", (6.0, 5.05, 4.0))):
            steps = [
                {"kind": "step", "step": i + 1, "loss": loss, "tokens_per_second": 100.0 * (i + 1)}
                for i, loss in enumerate(losses)
            ]
            ledger = "".join(json.dumps(record) + "\n" for record in [{"kind": "start", "step": 0}, *steps])
            (tmp_path / f"{name}_{operators}.jsonl").write_text(ledger)
    return tmp_path


def test_figures_are_those_of_the_steps_that_both_runs_took(folder, capsys):
    loss_overlay.main(folder)
    first, second, picture = capsys.readouterr().out.splitlines()
    assert first == (
        "tiny: 3 steps, loss with kernels 6.0000 to 4.0000 at 200 tokens/s and reference 6.0000 to 4.0000 at "
        "200 tokens/s; largest difference 0.99 %, at step 2"
    )
    assert second.startswith("dense7b_slice: 3 steps")
    assert (folder / "loss_overlay.png").stat().st_size > 10_000 and picture.endswith("loss_overlay.png")


def test_fp8_is_drawn_over_bf16(folder, capsys):
    for way, source in (("fp8", "tiny_kernels"), ("bf16", "tiny_reference")):
        (folder / f"moe80b_slice_{way}.jsonl").write_text((folder / f"{source}.jsonl").read_text())
    loss_overlay.main(folder, loss_overlay.FP8)
    line, picture = capsys.readouterr().out.splitlines()
    assert line.startswith("moe80b_slice: 3 steps, loss with fp8 6.0000 to 4.0000") and "and bf16" in line
    assert (folder / "fp8_overlay.png").stat().st_size > 10_000 and picture.endswith("fp8_overlay.png")


def test_each_panel_shows_both_curves_and_the_largest_difference(folder):
    pairs = {title: loss_overlay.pair_of(folder, name) for name, title in loss_overlay.RUNS.items()}
    figure = loss_overlay.draw(pairs)
    for title, axes in zip(pairs, figure.axes[:2], strict=True):
        assert axes.get_title(loc="left") == title
        assert [line.get_ydata()[1] for line in axes.lines] == [5.05, 5.0]
        assert axes.get_legend().get_title().get_text() == "largest difference 0.99 %, at step 2"


def test_a_run_without_a_step_is_named(folder):
    (folder / "tiny_reference.jsonl").write_text("")
    with pytest.raises(SystemExit, match="ledger of tiny"):
        loss_overlay.main(folder)
