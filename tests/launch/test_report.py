"""The report of a sweep against runs made up here, whose losses are known."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from omegaconf import OmegaConf

from hysparse.ledger import Ledger
from launch import report
from launch.report import ReportError, Run
from tests.launch.test_sweep import members

STEPS, TOKENS = 60, 2048  # of tiny_short


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two variants with three seeds: one finished, one cut short, one diverged; and one that has not begun."""
    folder = tmp_path_factory.mktemp("runs") / "demo-tiny"
    found = members("+experiment=tiny_short", "attention=full,hysparse", "run.seed=1,2,3", f"hydra.sweep.dir={folder}")
    folder.mkdir()
    (folder / "members.json").write_text(json.dumps({member.name: member.values for member in found}))
    for member in found[:-1]:
        member.folder.mkdir()
        saved = OmegaConf.to_container(OmegaConf.structured(member.config), enum_to_str=True)
        (member.folder / "config.yaml").write_text(yaml.safe_dump(saved))
    write(found[0].folder, [5 - step / 100 for step in range(STEPS)])
    write(found[1].folder, [5.2 - step / 100 for step in range(STEPS)])
    write(found[2].folder, [5 - step / 100 for step in range(20)], stopped="SIGUSR1")
    write(found[3].folder, [5 - step / 100 for step in range(30)] + [6.0] * 30)
    write(found[4].folder, [5 - step / 100 for step in range(7)] + [math.nan], ends=False)
    return folder


def write(folder: Path, losses: list[float], stopped: str | None = None, ends: bool = True) -> None:
    ledger = Ledger(folder / "ledger.jsonl")
    common = {"phase": "pretrain", "learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 100.0}
    for step, loss in enumerate(losses, 1):
        ledger.write("step", step, tokens=step * TOKENS, loss=loss, **common)
    if ends:
        ledger.write("validation", len(losses), tokens=len(losses) * TOKENS, loss=losses[-1] + 0.1)
        ledger.write("end", len(losses), tokens=len(losses) * TOKENS, stopped=stopped)
    ledger.close()


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "report.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_the_table_says_of_every_run_how_far_it_is(sweep):
    report.write_report(sweep)
    found = rows(sweep)
    states = {name: row["state"] for name, row in found.items()}
    assert states == {
        "full-seed1": "finished",
        "full-seed2": "finished",
        "full-seed3": "unfinished",
        "hysparse-seed1": "diverged",
        "hysparse-seed2": "diverged",
        "hysparse-seed3": "not started",
    }
    first = found["full-seed1"]
    assert (first["attention"], first["run.seed"], first["step"], first["steps"]) == ("full", "1", "60", "60")
    assert float(first["loss"]) == pytest.approx(np.mean([5 - step / 100 for step in range(55, 60)]))
    assert float(first["validation_loss"]) == pytest.approx(5 - 0.59 + 0.1)
    assert int(first["tokens"]) == STEPS * TOKENS
    assert found["full-seed3"]["step"] == "20" and found["hysparse-seed3"]["loss"] == ""


def test_runs_that_diverged_are_flagged_with_the_reason(sweep):
    told = "\n".join(report.write_report(sweep))
    assert "hysparse-seed1: loss rose from 4.730 to 6.000" in told
    assert "hysparse-seed2: loss or gradient is no number at step 8" in told
    assert "demo-tiny: 2 finished, 1 unfinished, 2 diverged, 1 not started" in told


def test_a_variant_is_the_mean_over_its_finished_seeds(sweep):
    report.write_report(sweep)
    text = (sweep / "report.md").read_text()
    losses = [np.mean([start - step / 100 for step in range(55, 60)]) for start in (5, 5.2)]
    spread = np.std(losses, ddof=1)
    assert f"| full | 2 of 3 | {np.mean(losses):.4f} ± {spread:.4f} |" in text
    assert "| hysparse | 0 of 3 | – | – | – | – |" in text


def test_flops_are_six_for_each_active_weight_and_token_and_those_of_attention(sweep):
    """Counted by hand for the tiny model with all layers full: the output gate is off there."""
    report.write_report(sweep)
    hidden, width, kv, layers, length = 128, 4 * 32, 2 * 32, 7, 256
    projections = 2 * hidden * (2 * width + 2 * kv)  # q, output, k, v
    experts = 2 * (2 * 3 * hidden * 128 + 8 * hidden)  # two of eight SwiGLU experts, and the router
    attention = 2 * 2 * width * (length + 1) / 2  # scores and values of the keys up to the token's own
    forward = layers * (projections + experts + attention) + 2 * hidden * 512
    found = float(rows(sweep)["full-seed1"]["training_flops"])
    assert found == pytest.approx(3 * forward * STEPS * TOKENS, rel=1e-6)


def test_the_pictures_show_the_variants(sweep):
    report.write_report(sweep)
    for name in ("loss_tokens.png", "loss_flops.png"):
        picture = imread(sweep / name)
        assert picture.shape[:2] == (600, 1000)
        blue, orange = (
            np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for code in ("#0072B2", "#D55E00")
        )
        for colour in (blue, orange):
            assert (np.abs(picture[..., :3] - colour).max(-1) < 0.02).sum() > 100


def test_a_sweep_is_found_by_its_name_and_a_folder_of_single_runs_by_its_path(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RUNS", sweep.parent)
    assert report.folder_of("demo") == report.folder_of("demo-tiny") == sweep
    with pytest.raises(ReportError, match="sweep=other is no sweep and no folder; there are .*demo-tiny"):
        report.folder_of("other")
    single = shutil.copytree(sweep, tmp_path / "single", ignore=shutil.ignore_patterns("members.json"))
    assert [run.variant for run in report.runs_of(report.folder_of(str(single)))][:2] == ["full-seed1", "full-seed2"]


def test_without_any_run_the_report_says_so(tmp_path):
    with pytest.raises(ReportError, match="holds neither a sweep .* nor folders of runs"):
        report.main([f"sweep={tmp_path}"])
    with pytest.raises(ReportError, match="usage: python -m launch.report sweep=NAME"):
        report.main([])
    assert Run(tmp_path / "none", {"run.seed": "1"}).state == "not started"
