"""Small models for tests: every variant, dense and MoE, and the engine that trains them."""

import torch

from hysparse.choices import Gate, Source
from hysparse.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
)

VARIANTS = {
    "full": {"ratio": 0, "output_gate": Gate.elementwise},
    "hybrid_swa": {"sparse_kv": Source.none, "gate": Gate.none},
    "hysparse": {},
    "hysparse_no_swa": {"sparse_kv": Source.own, "window_kv": Source.none},
    "hysparse_own_kv": {"sparse_kv": Source.own},
    "hysparse_shared_swa": {"window_kv": Source.shared},
}
SIZES = {"block": 8, "tokens": 24, "window": 11}
ROPE_BASE = 10_000.0


def small_config(variant: str = "hysparse", moe: bool = True, layers: int = 5, ratio: int = 3, **parallel) -> Config:
    """FSSSF unless told otherwise, with groups, blocks and windows that do not divide each other neatly."""
    return Config(
        model=ModelConfig(
            name="small",
            layers=layers,
            hidden=48,
            heads=4,
            kv_heads=2,
            head_dim=16,
            ffn=80,
            vocabulary=128,
            init_std=0.1,  # large enough that attention is far from uniform
            moe=MoEConfig(experts=4, active=2, ffn=32, aux_loss=0.05, z_loss=0.01) if moe else None,
        ),
        attention=AttentionConfig(name=variant, **{"ratio": ratio} | SIZES | VARIANTS[variant]),
        phases={"only": PhaseConfig(tokens=1024, sequence_length=64, global_batch=4, learning_rate=1e-3)},
        data=DataConfig(),
        parallel=ParallelConfig(**parallel),
        optim=OptimConfig(),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        run=RunConfig(name="test", dir="unused"),
    )


def packed_batch(config: Config, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens in documents of random lengths: tokens, labels, document_start [B, S], loss_mask [B, S]."""
    S = config.phases["only"].sequence_length
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocabulary, (rows, S + 1), generator=generator)
    first = torch.rand(rows, S, generator=generator) < 0.06
    first[:, 0] = True
    start = torch.where(first, torch.arange(S), 0).cummax(1).values.int()
    mask = torch.cat([~first[:, 1:], torch.ones(rows, 1, dtype=torch.bool)], dim=1).float()
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "document_start": start, "loss_mask": mask}


def build_model(
    config: Config, layers: range | None = None, pre=True, post=True, transformer=None, vp_stage: int | None = None
):
    """A `HySparseModel` of this process, initialised from seed 1."""
    from hysparse.initialise import initialise
    from hysparse.model import HySparseModel, layer_specs, transformer_config
    from hysparse.trainer import select_operators

    layers = range(config.model.layers) if layers is None else layers
    transformer = transformer or transformer_config(config, [], bf16=False)
    specs = layer_specs(config, layers, select_operators(config))
    model = HySparseModel(transformer, config.model.vocabulary, specs, pre, post, vp_stage)
    initialise(model.sharded_state_dict(), 1, config.model.init_std, config.model.layers)
    return model
