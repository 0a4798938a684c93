"""The configuration: one dataclass for each group, validated on its own. Rules across groups live in `checks.py`.

Hydra merges `conf/*.yaml` and the command line into these types, so an unknown key or a wrong type never gets this far.
Lengths are in tokens, batches in sequences, unless a comment says otherwise.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from hysparse.choices import (
    Balance,
    DecayShape,
    Dispatcher,
    EngineName,
    ExpertProducts,
    Gate,
    Kernels,
    Offload,
    Precision,
    Recompute,
    RouterScore,
    Source,
)

AUTO = "auto"  # in place of a number: chosen before anything is checked or built


class ConfigError(Exception):
    """A mistake in the configuration. The message names the keys as typed, their values, and what would work."""


class RanksError(ConfigError):
    """The number of processes does not suit a configuration that is right otherwise.

    `problem` is the message without its end, `advice`, about numbers of processes that would do.
    """

    def __init__(self, problem: str, advice: str = ""):
        super().__init__(problem + advice)
        self.problem = problem


def seconds(duration: str) -> float | None:
    """Of hours ("1.5") or "H:MM:SS", possibly with days before it ("2-12:00:00"); None for 0 and for anything else."""
    if re.fullmatch(r"\d+(\.\d*)?", duration):
        return float(duration) * 3600 or None
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", duration):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + rest) or None
    return None


def multiples_near(number: int, unit: int) -> str:
    """Two multiples of `unit` around `number`, which is none, as the end of a sentence: "192 or 208"."""
    below = max(unit, number // unit * unit)
    return f"{below} or {below + unit}"


def positive(section: str, config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{section}.{name}={getattr(config, name)} must be greater than 0")


@dataclass(kw_only=True)
class MoEConfig:
    """Mixture of experts in the layers. The paper says 512 experts, 8 active; what it leaves open is marked (open)."""

    experts: int = 512
    active: int = 8  # experts per token
    ffn: int = 512  # SwiGLU width of one expert (open: 512 gives the 80B its 80 B parameters)
    score: RouterScore = RouterScore.sigmoid  # (open)
    bias_update_rate: float = (
        1e-3  # step of the auxiliary-loss-free expert bias (DeepSeek-V3); 0 switches it off (open)
    )
    aux_loss: float = 1e-4  # weight of the balance loss (open)
    balance: Balance = Balance.sequence  # what the balance loss evens out (open)
    z_loss: float = 0.0  # weight of the router's z-loss (open)
    groups: int = 1  # experts form so many groups, for example one a node (open)
    active_groups: int = 1  # a token's experts lie in so many of them
    capacity_factor: float = 0.0  # most rows of an expert in training, times the mean; 0: no limit, nothing is dropped
    shared_ffn: int = 0  # SwiGLU width of a shared expert that every token passes through; 0: none (open)
    first_dense_layers: int = 0  # so many layers at the start have a dense SwiGLU of width model.ffn instead (open)

    def __post_init__(self):
        positive("model.moe", self, "experts", "active", "ffn", "groups", "active_groups")
        if self.shared_ffn < 0:
            raise ConfigError(f"model.moe.shared_ffn={self.shared_ffn} is negative; use 0 for no shared expert")
        if self.capacity_factor < 0:
            raise ConfigError(
                f"model.moe.capacity_factor={self.capacity_factor} is negative; use 0 to drop nothing, or 1 or more"
            )
        if self.first_dense_layers < 0:
            raise ConfigError(f"model.moe.first_dense_layers={self.first_dense_layers} is negative; use 0 for none")
        if self.active > self.experts:
            raise ConfigError(
                f"model.moe.active={self.active} exceeds model.moe.experts={self.experts}; "
                f"use model.moe.active={self.experts} or less"
            )
        if self.bias_update_rate and self.score is RouterScore.softmax:
            raise ConfigError(
                f"model.moe.bias_update_rate={self.bias_update_rate} needs model.moe.score=sigmoid, not "
                f"{self.score}; use model.moe.bias_update_rate=0 and balance with model.moe.aux_loss"
            )
        if self.groups > 1:
            self._check_groups()

    def _check_groups(self) -> None:
        if self.experts % self.groups:
            raise ConfigError(
                f"model.moe.groups={self.groups} does not divide model.moe.experts={self.experts}; groups are equal"
            )
        if self.active_groups > self.groups:
            raise ConfigError(
                f"model.moe.active_groups={self.active_groups} exceeds model.moe.groups={self.groups}; "
                f"use model.moe.active_groups={self.groups} or less"
            )
        if self.active % self.active_groups or self.active // self.active_groups > self.experts // self.groups:
            raise ConfigError(
                f"model.moe.active={self.active} must be a multiple of model.moe.active_groups={self.active_groups}, "
                f"with at most {self.experts // self.groups} experts from each group"
            )


@dataclass(kw_only=True)
class ModelConfig:
    name: str
    layers: int
    hidden: int
    heads: int  # query heads H
    kv_heads: int  # K
    head_dim: int = 128  # D; RoPE turns all of it
    ffn: int = 0  # SwiGLU width of a dense layer; with model.moe only model.moe.first_dense_layers are dense
    vocabulary: int = 151_680
    hybrid_ratio: int = 3  # sparse layers after each full layer; attention.ratio follows it
    full_attention_gate: Gate = Gate.none  # output gate that the model's all-full baseline carries (80B: elementwise)
    moe: MoEConfig | None = None
    qk_norm: bool = False  # RMSNorm on each head's query and key, before RoPE
    norm_epsilon: float = 1e-6
    init_std: float = 0.02  # of every matrix; those that write to the residual stream: init_std / sqrt(2 layers) (open)

    def __post_init__(self):
        positive("model", self, "layers", "hidden", "heads", "kv_heads", "head_dim", "vocabulary")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.heads={self.heads} is no multiple of model.kv_heads={self.kv_heads}; "
                f"each KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} is odd; RoPE turns pairs, use {self.head_dim + 1}")
        if self.moe is None and self.ffn <= 0:
            raise ConfigError("model.ffn=0 and no model.moe: set model.ffn (dense) or model.moe.experts")
        if self.moe is not None and self.moe.first_dense_layers:
            self._check_dense_layers(self.moe.first_dense_layers)

    def _check_dense_layers(self, dense: int) -> None:
        if dense >= self.layers:
            raise ConfigError(
                f"model.moe.first_dense_layers={dense} leaves no experts in model.layers={self.layers}; "
                f"use model.moe.first_dense_layers={self.layers - 1} or less"
            )
        if self.ffn <= 0:
            raise ConfigError(
                f"model.moe.first_dense_layers={dense} needs the width of those layers, but model.ffn={self.ffn}; "
                f"set model.ffn, for example model.ffn={self.moe.active * self.moe.ffn}, as wide as the active experts"
            )

    def is_dense(self, layer: int) -> bool:
        """Whether layer number `layer`, from 0, has a dense feed-forward half."""
        return self.moe is None or layer < self.moe.first_dense_layers

    @property
    def group(self) -> int:
        """Query heads per KV head, G."""
        return self.heads // self.kv_heads


@dataclass(kw_only=True)
class AttentionConfig:
    """The variant: which layers are full, and what the sparse layers between them read (paper, section 3)."""

    name: str
    ratio: int  # sparse layers after each full layer; 0: every layer is full
    last_full: bool = True  # the last layer is always full in the paper
    pattern: str | None = None  # explicit layers, such as FSSSF; replaces ratio and last_full
    sparse_kv: Source = Source.shared  # K/V of the block-sparse branch
    window_kv: Source = Source.own  # K/V of the sliding-window branch
    block: int = 64  # tokens in a key block
    tokens: int = 1024  # tokens selected for each query; a multiple of block
    window: int = 128  # tokens the window branch sees, the current one included
    gate: Gate = Gate.headwise  # of each branch; the paper says "lightweight sigmoid gate" (granularity open)
    sinks: bool = True  # a learnable softmax sink for each head and branch (gpt-oss)
    output_gate: Gate = Gate.none  # of full layers (Qiu et al. 2025)

    def __post_init__(self):
        positive("attention", self, "block", "tokens", "window")
        if self.ratio < 0:
            raise ConfigError(f"attention.ratio={self.ratio} must be 0 (all layers full) or more")
        if self.tokens % self.block:
            raise ConfigError(
                f"attention.tokens={self.tokens} is no multiple of attention.block={self.block}; "
                f"use attention.tokens={multiples_near(self.tokens, self.block)}"
            )
        if self.pattern is not None and (set(self.pattern) - set("FS") or not self.pattern.startswith("F")):
            raise ConfigError(
                f"attention.pattern={self.pattern}: write F for a full and S for a sparse layer and begin with F, "
                f"since a sparse layer reads from the full layer before it; for example FSSSF"
            )

    @property
    def selected(self) -> int:
        """Key blocks selected for each query."""
        return self.tokens // self.block

    @property
    def selects(self) -> bool:
        """Whether full layers act as oracles."""
        return self.sparse_kv is not Source.none


@dataclass(kw_only=True)
class PhaseConfig:
    """One stretch of training; phases follow each other in the order of the file."""

    tokens: int  # budget of this phase
    sequence_length: int
    global_batch: int  # sequences per optimizer step, over all ranks
    micro_batch: int = 1  # sequences per forward pass and rank
    learning_rate: float  # peak, the stable part of WSD
    minimum_learning_rate: float = 0.0  # where the decay ends
    warmup_tokens: int = 0  # linear, from 0
    decay_tokens: int = 0  # at the end of the phase
    decay_shape: DecayShape = DecayShape.linear
    rope_base: float = 10_000.0

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may overshoot the budget by less than a batch."""
        return -(-self.tokens // self.tokens_per_step)


@dataclass(kw_only=True)
class DataConfig:
    path: str | None = None  # a folder written by `python -m data.prepare`
    blend: dict[str, float] = field(default_factory=dict)  # several of them with weights, instead of path
    mask_documents: bool = True  # attention, selection and positions stay inside the document
    validation_samples: int = 64  # held-out sequences of one evaluation
    allow_change: bool = False  # resume although the corpus, its blend or the seed is not that of the checkpoint

    def __post_init__(self):
        if self.path and self.blend:
            raise ConfigError(
                f"data.path={self.path} and data.blend={dict(self.blend)}: give one of the two, "
                "or data.path=null beside the blend"
            )


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the process groups. Data parallelism takes what is left: ranks / (tensor x pipeline x context)."""

    tensor: int = 1  # splits heads and FFN widths; sequence parallelism comes with it
    # Numbers or auto, the quickest by estimate that fits in memory. OmegaConf 2.3 cannot merge a field of int | str.
    pipeline: Any = 1  # stages, cut between hybrid blocks only
    virtual: Any = 1  # model chunks on each stage (interleaved schedule)
    layout: list[int] | None = None  # hybrid blocks of each stage, chunk after chunk; null: balanced by cost
    expert: int = 1  # splits the experts over data-parallel ranks
    dispatcher: Dispatcher = Dispatcher.alltoall
    context: int = 1  # splits every sequence; each rank has an early and a late chunk of it
    recompute: Recompute = Recompute.none
    # With recompute=full: so many layers of each stage (and chunk), the first ones, the others selectively; null: all
    recompute_layers: int | None = None
    overlap: bool = True  # data-parallel ranks exchange gradients and weights while others compute
    # Share of FP32 master weights and Adam's states that lies in host memory and is updated there; 0: all on the GPU
    offload_optimizer: float = 0.0
    memory: float = 80.0  # GiB of a GPU, for auto

    def __post_init__(self):
        numbers = [key for key in ("pipeline", "virtual") if getattr(self, key) != AUTO]
        for key in numbers:
            if type(getattr(self, key)) is not int:
                raise ConfigError(f"parallel.{key}={getattr(self, key)} must be a number of 1 or more, or {AUTO}")
        if self.layout is not None and len(numbers) < 2:
            raise ConfigError(f"parallel.layout={self.layout} fixes the stages; use numbers in place of {AUTO}")
        positive("parallel", self, "tensor", "expert", "context", "memory", *numbers)
        if self.recompute_layers is not None:
            positive("parallel", self, "recompute_layers")
        if not 0 <= self.offload_optimizer <= 1:
            raise ConfigError(
                f"parallel.offload_optimizer={self.offload_optimizer} is the share of the optimizer in host memory; "
                "use 0 for none, 1 for all of it, or a number between"
            )

    def recompute_of(self, place: int) -> Recompute:
        """How a layer is recomputed that has `place` layers before it in its stage (and chunk)."""
        if self.recompute_layers is None or place < self.recompute_layers or self.recompute is not Recompute.full:
            return self.recompute
        return Recompute.selective


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """ZeRO, for engine=deepspeed."""

    zero: int = 1  # what the ranks share out: 1 optimizer states, 2 gradients as well, 3 parameters as well
    offload_optimizer: Offload = Offload.none  # FP32 parameters and Adam's states; the update is computed on the CPU
    offload_parameters: Offload = Offload.none
    nvme: str | None = None  # a folder on a local disk, on every node and for this run alone

    def __post_init__(self):
        if self.zero not in (1, 2, 3):
            raise ConfigError(f"deepspeed.zero={self.zero} does not exist; use 1, 2 or 3")
        needs_all = {"offload_parameters": self.offload_parameters is not Offload.none}
        needs_all["offload_optimizer"] = self.offload_optimizer is Offload.nvme
        for key, needs in needs_all.items():
            if needs and self.zero != 3:
                raise ConfigError(
                    f"deepspeed.{key}={getattr(self, key)} needs deepspeed.zero=3, not {self.zero}; "
                    f"use deepspeed.zero=3, or deepspeed.{key}={'none' if key == 'offload_parameters' else 'cpu'}"
                )
            if getattr(self, key) is Offload.nvme and not self.nvme:
                raise ConfigError(f"deepspeed.{key}=nvme needs a folder on a local disk; add deepspeed.nvme=FOLDER")


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW (paper, section 4.1). No weight decay on norms, sinks and biases."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-10
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the whole gradient


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 1000  # steps; the last step of every phase is always saved
    keep: int = 3  # newest checkpoints to keep; 0 keeps all


@dataclass(kw_only=True)
class LoggingConfig:
    every: int = 1  # steps between ledger lines
    validate_every: int = 500  # steps; also at the end of every phase; 0 switches validation off
    experts_every: int = 200  # steps between records of how evenly experts are used; 0: never
    tensorboard: bool = True
    wandb: bool = False  # online with WANDB_API_KEY set, offline without; needs the package wandb
    wandb_project: str = "hysparse"


@dataclass(kw_only=True)
class RunConfig:
    name: str
    dir: str  # everything the run writes; the same on all ranks and after a restart
    seed: int = 1234
    # Hours, or "H:MM:SS" (in quotes in YAML): then the run saves and exits with code 75, for its command to go on
    time_limit: str | None = None
    timeout: float = 10.0  # minutes that a rank waits for others before it says which, and ends
    max_restarts: int = 3  # by Slurm or torchrun, without a newer checkpoint in between

    def __post_init__(self):
        if self.time_limit is not None and not seconds(self.time_limit):
            raise ConfigError(
                f"run.time_limit={self.time_limit} is no length of time; write hours, such as 1.5, or H:MM:SS"
            )
        positive("run", self, "timeout")
        if self.max_restarts < 0:
            raise ConfigError(f"run.max_restarts={self.max_restarts} is negative; use 0 for none")


@dataclass(kw_only=True)
class Config:
    model: ModelConfig
    attention: AttentionConfig
    phases: dict[str, PhaseConfig]
    data: DataConfig
    parallel: ParallelConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    run: RunConfig
    engine: EngineName = EngineName.megatron
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    kernels: Kernels = Kernels.auto
    precision: Precision = Precision.auto
    experts: ExpertProducts = ExpertProducts.auto
    resume: str = "auto"  # auto: newest checkpoint in run.dir if there is one; never; or a checkpoint's path
    max_steps: int | None = None  # stop after this step of the whole run, schedule unchanged
    plan: bool = False  # print the plan and stop
    dry_run: int | None = None  # check what each of so many ranks would hold, on this one process and without a GPU
