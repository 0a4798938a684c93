"""Train a model: compose the configuration, check it, run it. `python train.py --help` lists what there is."""

import sys

import hydra
from omegaconf import DictConfig

from hysparse.compose import provenance, register, resolve
from hysparse.mistakes import mistakes_without_traceback
from hysparse.plan import Plan, pipeline_stages
from hysparse.report import plan_report
from parallel.terminal import quiet_third_parties, show_own_messages

register()


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(composed: DictConfig) -> None:
    with mistakes_without_traceback():
        config = resolve(composed)
    if config.plan:
        plan = Plan(config.model, config.attention)
        print(plan_report(config, plan, pipeline_stages(config, plan)))
        return
    quiet_third_parties()
    show_own_messages()
    if config.dry_run is not None:
        from hysparse.dry_run import MISTAKES, dry_run

        with mistakes_without_traceback(*MISTAKES):
            print(dry_run(config))
        return
    from hysparse.trainer import MISTAKES, train  # torch and Megatron, which a plan does not need

    with mistakes_without_traceback(*MISTAKES):
        sys.exit(train(config, provenance(config)))


if __name__ == "__main__":
    with mistakes_without_traceback():
        main()
