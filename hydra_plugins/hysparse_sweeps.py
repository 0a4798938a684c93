"""What `python train.py -m …` does instead of Hydra's own: only its plug-in classes; the work is in `launch/`.

Hydra finds plug-ins in packages of this name alone, and imports all of them whenever `train.py` starts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

if TYPE_CHECKING:
    from launch.sweep import Member


class MemberSweeper(Sweeper):
    """All combinations of the values given, those of the sweep's file included; the command line wins."""

    def __init__(self, params: dict[str, Any]):
        self.params = params

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from launch.sweep import run_sweep

        parser = OverridesParser.create(config_loader=self.loader)
        given = parser.parse_overrides([*(f"{key}={values}" for key, values in self.params.items()), *arguments])
        run_sweep(self.config, self.loader, given, self.launcher)


class SweepLauncher(Launcher):
    """One that `run_sweep` knows; `ranks` are the processes of each member."""

    ranks: int

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir)


class LocalLauncher(SweepLauncher):
    def __init__(self, ranks: int, side_by_side: int | str):
        self.ranks, self.side_by_side = ranks, side_by_side

    def launch(self, job_overrides: Sequence["Member"], initial_job_idx: int) -> int:
        from launch.local import run_members
        from launch.report import write_report

        code = run_members(job_overrides, self.folder, self.ranks, self.side_by_side)
        print("\n".join(write_report(self.folder)))
        return code


class SlurmLauncher(SweepLauncher):
    def __init__(self, **params: Any):
        self.params = params
        self.ranks = params["nodes"] * params["tasks_per_node"]

    def launch(self, job_overrides: Sequence["Member"], initial_job_idx: int) -> int:
        from launch.slurm_array import submit_members

        return submit_members(job_overrides, self.params)
