"""A run from start to end: model, resume, the loop over steps and phases, validation, checkpoints, the ledger."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from megatron.core import parallel_state
from tqdm import tqdm

import kernels
from data import DataError, micro_batches, prefetch
from hysparse.choices import Precision
from hysparse.config import Config, seconds
from hysparse.expert_load import measure, summary
from hysparse.initialise import initialise
from hysparse.layouts import overfull
from hysparse.ledger import Ledger, LedgerError, LoggingError, open_ledger
from hysparse.linears import select_linears
from hysparse.model import HySparseModel, build_chunk, group_sizes, transformer_config
from hysparse.plan import Plan, pipeline_stages
from hysparse.plot import plot_run_folder
from hysparse.report import count, plan_report
from hysparse.run_data import RunData
from hysparse.run_folder import RunFolder, leaves
from hysparse.schedule import Progress, learning_rate, steps
from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from parallel.engines import AdamW, Engine, MicroBatch, Zero, make_engine
from parallel.placement import megatron_layout
from parallel.ranks import rank, world_size
from parallel.start import StartError, start, stop
from parallel.stopping import GO_ON, Stopping
from parallel.watchdog import Watchdog, connect

POSITION_BUCKETS = 8


class TrainingError(Exception):
    """Training cannot go on; the message says at which step, why, and what to do."""


log = logging.getLogger(__name__)

# Each ends the run with a sentence instead of a traceback.
MISTAKES = (CheckpointError, DataError, LedgerError, kernels.KernelError, StartError, TrainingError)


def train(config: Config, sources: dict[str, dict]) -> int:
    """Run the whole schedule, or what is left of it. `sources` says where the settings came from.

    Returns the exit code: 0, or 75 where a signal or the time limit ended it before its time.
    """
    folder = RunFolder(config, sources)
    data = RunData(config)
    operators = select_operators(config)
    linears = select_linears(config)
    if moe := config.model.moe:
        ours = operators.moe.described(config.model.hidden, moe.ffn)
        chosen = "Transformer Engine's grouped products" if linears.experts_by_engine else ours
        log.info("experts=%s uses %s", config.experts, chosen)
    stopping = Stopping(seconds(config.run.time_limit) if config.run.time_limit else None)
    stopped, watchdog, minutes = False, None, config.run.timeout
    try:
        # Until the watchdog is there, which needs the groups, ranks wait a little longer than it would.
        device = start(group_sizes(config), minutes + 2, settings=leaves(folder.resolved))
        watchdog = connect(60 * minutes)
        if device.type == "cuda" and rank() == 0:
            memory = torch.cuda.get_device_properties(device).total_memory
            if words := overfull(config, world_size(), memory):
                log.warning(words)
        stopped = Trainer(config, folder, data, operators, device, stopping, watchdog).run()
    except RuntimeError:  # also what a collective raises when another rank has died
        if watchdog and (text := watchdog.report()):
            print(f"error: {text}", file=sys.stderr, flush=True)
        raise
    finally:
        if watchdog:
            watchdog.close()
        stop()
        stopping.close()
    return GO_ON if stopped else 0


def computes_in_bf16(config: Config) -> bool:
    on_gpu = torch.cuda.is_available()
    return config.precision in (Precision.bf16, Precision.fp8) or (config.precision is Precision.auto and on_gpu)


def select_operators(config: Config) -> ModuleType:
    """The attention operators that `kernels=` asks for, on this machine and for this model."""
    dtype = torch.bfloat16 if computes_in_bf16(config) else torch.float32
    model = config.model
    return kernels.select(config.kernels, kernels.Needs(model.head_dim, model.group, config.attention.block, dtype))


class NoLedger:
    """What ranks other than the first write to."""

    def write(self, kind: str, step: int, **values) -> None: ...

    def close(self) -> None: ...


def build_engine(config: Config, stages: Sequence[range], operators: ModuleType, device: torch.device) -> Engine:
    """The engine of this process, its model drawn. `stages` are those of `pipeline_stages`; process groups exist."""

    def build(transformer, pre_process: bool, post_process: bool, vp_stage: int | None) -> HySparseModel:
        chunk = build_chunk(config, transformer, stages, operators, pre_process, post_process, vp_stage)
        initialise(chunk.sharded_state_dict(), config.run.seed, config.model.init_std, config.model.layers)
        return chunk

    return make_engine(
        config.engine,
        Zero(**asdict(config.deepspeed)),
        transformer_config(config, megatron_layout(stages), computes_in_bf16(config)),
        build,
        forward,
        AdamW(**asdict(config.optim)),
        device,
        config.parallel.overlap,
        config.parallel.offload_optimizer,
    )


class Trainer:
    """The model under its layout, resumed where the run stands; `run()` takes it to the end."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        data: RunData,
        operators: ModuleType,
        device: torch.device,
        stopping: Stopping,
        watchdog: Watchdog | None = None,
    ):
        self.config, self.folder, self.data, self.device, self.stopping = config, folder, data, device, stopping
        self.phase_names, self.phases = list(config.phases), list(config.phases.values())
        self.plan = Plan(config.model, config.attention)
        self.stages = pipeline_stages(config, self.plan)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_ranks = parallel_state.get_data_parallel_world_size()
        self.validation_sizes = data.validation_sizes(world_size())
        self.engine = build_engine(config, self.stages, operators, device)
        self.enter = watchdog.enter if watchdog else lambda phase, step=None: None
        self.engine.enter = self.enter
        self.progress = Progress()
        self.newest = self.resumed_from = self._resume()

    def run(self) -> bool:
        """Train until the schedule, or max_steps, ends. Returns whether something else ended it before that."""
        if rank() == 0:
            self._introduce()
        remaining = list(steps(self.phases, self.progress, self.config.max_steps))
        with closing(self._open_ledger()) as self.ledger:
            stopped = self._train(remaining)
            self.ledger.write("end", self.progress.step, tokens=self.progress.tokens, stopped=stopped)
        if rank() == 0:
            self._conclude(stopped)
        if stopped:  # launchers end the others as soon as one rank has left with another code than 0
            self.stopping.close(ignore=True)
            torch.distributed.barrier()
        return stopped is not None

    def _train(self, remaining: list[Progress]) -> str | None:
        """Take the steps. Returns why the last ones were not taken, None if all were."""
        bar = tqdm(
            total=self.progress.step + len(remaining),
            initial=self.progress.step,
            unit="step",
            dynamic_ncols=True,
            disable=rank() != 0,
        )
        phase = None
        self.enter("data", self.progress.step + 1)
        self.since = time.perf_counter()
        with bar:
            for position, batches in prefetch((position, self._batches(position)) for position in remaining):
                if position.phase != phase:
                    phase = position.phase
                    self._announce(position)
                    bar.set_description(self.phase_names[phase])
                record = self._step(position, batches)
                bar.set_postfix_str(
                    f"loss {record['loss']:.3f}, lr {record['learning_rate']:.1e}, "
                    f"{count(record['tokens_per_second'])} tokens/s",
                    refresh=False,  # update() does, no more often than TQDM_MININTERVAL says
                )
                bar.update()
                last = position is remaining[-1]
                saved = self._after_step(position, record, last)
                if not last and (reason := self.stopping.agreed(self.device)):
                    if not saved:
                        self._save()
                    return reason
                self.enter("data", self.progress.step + 1)
                self.since = time.perf_counter()
        return None

    def _batches(self, position: Progress) -> list[MicroBatch]:
        phase = self.phases[position.phase]
        return micro_batches(
            self.data.train[position.phase],
            position.samples,
            phase.global_batch,
            self.data_rank,
            self.data_ranks,
            phase.micro_batch,
        )

    def _step(self, position: Progress, batches: list[MicroBatch]) -> dict:
        phase = self.phases[position.phase]
        rate = learning_rate(phase, position.samples)
        step = self.engine.step(batches, rate, rope_base=phase.rope_base)
        seconds = time.perf_counter() - self.since  # waiting for data included, validation and checkpoints not
        self.progress = position.after(phase)
        flops = self.plan.flops_per_token(phase.sequence_length).training
        return {
            "tokens": self.progress.tokens,
            "phase": self.phase_names[position.phase],
            "loss": step.loss,
            "learning_rate": rate,
            "gradient_norm": step.gradient_norm,
            "tokens_per_second": phase.tokens_per_step / seconds,
            "tflops_per_rank": flops * phase.tokens_per_step / seconds / world_size() / 1e12,
            "seconds": seconds,
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0,
        }

    def _after_step(self, position: Progress, record: dict, last: bool) -> bool:
        """What is due after this step. Returns whether that was a checkpoint."""
        step, config = self.progress.step, self.config
        finite = math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])
        if step % config.logging.every == 0 or last or not finite:
            self.ledger.write("step", step, **record)
        if not finite:
            advice = f"go on from {self.newest}" if self.newest else "start again"
            raise TrainingError(
                f"step {step}: loss {record['loss']}, gradient norm {record['gradient_norm']}; nothing of this step "
                f"was saved; {advice} with a lower learning rate"
            )
        every = config.logging.experts_every
        if (moe := config.model.moe) and every and (step % every == 0 or last):
            layers = range(moe.first_dense_layers, config.model.layers)
            load = measure(self.engine.modules, layers, moe.experts)
            self.ledger.write("experts", step, first_layer=layers.start, **summary(load))
        ends_phase = self.progress.phase != position.phase
        every = config.logging.validate_every
        if every and (step % every == 0 or ends_phase or last):
            self._validate(position)
        due = step % config.checkpoint.every == 0 or ends_phase or last
        if due:
            self._save()
        return due

    def _validate(self, position: Progress) -> None:
        phase, samples = self.phases[position.phase], self.data.validation[position.phase]
        number = self.validation_sizes[position.phase]
        batches = micro_batches(samples, 0, number, self.data_rank, self.data_ranks, phase.micro_batch)
        buckets = next(n for n in (POSITION_BUCKETS, 4, 2, 1) if phase.sequence_length % n == 0)
        totals = self.engine.evaluate(batches, buckets, rope_base=phase.rope_base)
        loss, tokens = totals.sum(0).tolist()
        self.ledger.write(
            "validation",
            self.progress.step,
            tokens=self.progress.tokens,
            loss=loss / tokens,
            sequences=number,
            by_position=(totals[:, 0] / totals[:, 1].clamp(min=1)).tolist(),
        )

    def _save(self) -> None:
        self.enter("checkpoint")
        about = {
            "progress": self.progress.as_dict(),
            "phases": {name: asdict(phase) for name, phase in self.config.phases.items()},
            "model": asdict(self.config.model),
            "attention": asdict(self.config.attention),
            "data": self.data.fingerprint,
        }
        self.newest = checkpoint.save(self.folder.checkpoints, self.progress.step, self.engine.state(), about)
        checkpoint.remove_old(self.newest, self.config.checkpoint.keep)
        if world_size() > 1:  # the first rank removes; no other phase than this one waits for that as long as it takes
            torch.distributed.barrier()

    def _resume(self) -> Path | None:
        path = self.folder.checkpoint_to_resume()
        if path is None:
            self.folder.count_restart(None)
            return None
        about = checkpoint.about(path)
        self.folder.check_same(path, about, self.data.fingerprint)
        self.folder.count_restart(path)
        self.engine.load_state(checkpoint.load(path, lambda: self.engine.state(is_loading=True)))
        self.progress = Progress(**about["progress"])
        return path

    def _open_ledger(self) -> Ledger | NoLedger:
        """On the first rank; if that fails, all ranks end with its reason."""
        ledger, problem = NoLedger(), [None]
        if rank() == 0:
            try:
                ledger = open_ledger(self.config.logging, self.folder.path, self.config.run.name, self.folder.resolved)
                ledger.write("start", self.progress.step, ranks=world_size(), device=self.device.type)
            except (OSError, LedgerError, LoggingError) as error:
                problem = [str(error)]
        torch.distributed.broadcast_object_list(problem)
        if problem[0]:
            raise TrainingError(f"the ledger in run.dir={self.config.run.dir} cannot be opened: {problem[0]}")
        return ledger

    def _announce(self, position: Progress) -> None:
        phase = self.phases[position.phase]
        self.ledger.write(
            "phase",
            position.step,
            name=self.phase_names[position.phase],
            tokens=position.tokens,
            sequence_length=phase.sequence_length,
            rope_base=phase.rope_base,
        )

    def _introduce(self) -> None:
        print(plan_report(self.config, self.plan, self.stages, world_size()))
        print("\nData", *self.data.described(), sep="\n")
        print("\nSettings that differ from the defaults", *self.folder.described(), sep="\n")
        if self.resumed_from:
            print(f"\nGoing on from {self.resumed_from}: step {self.progress.step}")
        print(flush=True)

    def _conclude(self, stopped: str | None) -> None:
        ledger = self.folder.path / "ledger.jsonl"
        pictures = plot_run_folder(self.folder.path)
        finished = self.progress.phase == len(self.phases)
        ended = "Finished" if finished else f"Stopped by {stopped}" if stopped else "Stopped"
        print(f"\n{ended} after {self.progress.step:,} steps, {count(self.progress.tokens)} tokens")
        print(f"  checkpoint  {self.newest}\n  ledger      {ledger}")
        for picture in pictures:
            print(f"  {picture.stem:12}{picture}")
        if stopped:
            print(f"  to go on, start the same command again; exit code {GO_ON} says so to scripts")
        elif not finished:
            print("  to go on, start the same command again with a larger max_steps or without it")


def forward(chunk: torch.nn.Module, batch: MicroBatch, rope_base: float) -> torch.Tensor:
    """Each token's loss [B, S] on the last pipeline stage, the hidden state before it."""
    return chunk(batch["tokens"], document_start=batch["document_start"], rope_base=rope_base, labels=batch["labels"])
