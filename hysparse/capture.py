"""Which key blocks a trained full layer selects, saved for the kernels' benchmark.

    python -m hysparse.capture run=RUN_DIR length=32768 output=kernels/captured_blocks.npz

One forward pass of the run's newest checkpoint over the first `length` tokens of its held-out text, as one document,
in one process whatever layout the run had. The layer is the last full one that sparse layers read from.
"""

# ruff: noqa: E402
import json
import sys
from pathlib import Path

from parallel.terminal import quiet_third_parties, show_own_messages

quiet_third_parties()  # Megatron warns while it is imported

import numpy as np
import torch
from megatron.core.transformer.module import Float16Module, MegatronModule
from omegaconf import OmegaConf
from torch import Tensor

from data import PackedSamples
from hysparse.attention import FullAttention
from hysparse.choices import Kernels
from hysparse.config import Config, ConfigError, ParallelConfig
from hysparse.mistakes import mistakes_without_traceback
from hysparse.model import HySparseModel, layer_specs, transformer_config
from hysparse.trainer import MISTAKES, computes_in_bf16, forward, select_operators
from kernels import SharedKV
from parallel import checkpoint
from parallel.checkpoint import CheckpointError
from parallel.start import Sizes, start, stop


def capture(run: Path, length: int, output: Path, device: torch.device) -> str:
    """Write `blocks` [K, length, selected] int16 and `about`, JSON, to `output`; returns a sentence about them."""
    config = read_config(run)
    sources = list(config.data.blend.items()) or [(config.data.path, 1.0)]
    batch = PackedSamples(sources, "validation", length, seed=0, ordered=True, mask_documents=False)[0]
    path = checkpoint.newest_usable(run / "checkpoints")
    if path is None:
        raise CheckpointError(f"{run / 'checkpoints'} has no intact checkpoint; train first, with run.dir={run}")
    about = checkpoint.about(path)
    model = load_model(config, path, device)
    layer = oracle(model)
    batch = {name: x[None].to(device) for name, x in batch.items()}
    blocks, loss = selection(model, layer, batch, rope_base(about))
    found = {
        "run": config.run.name,
        "layer": layer.layer_number,
        "tokens_trained": about["progress"]["tokens"],
        "length": length,
        "loss": round(loss, 4),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        np.savez_compressed(file, blocks=compact(blocks), about=json.dumps(found))
    return (
        f"{output}: {output.stat().st_size / 1e6:.2f} MB, blocks {list(blocks.shape)} of layer {layer.layer_number} "
        f"after {found['tokens_trained']:,} tokens; loss {loss:.3f} here; a token has "
        f"{overlap(blocks):.1f} of its blocks in common with the token before"
    )


def read_config(run: Path) -> Config:
    """The configuration that the run saved, for one process and for the operators that this machine has."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run={run} is no folder of a run; it has no config.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(run / "config.yaml")))
    if not config.attention.selects:
        raise ConfigError(f"run={run} has attention.sparse_kv=none: none of its layers selects blocks")
    config.parallel, config.kernels = ParallelConfig(), Kernels.auto
    return config


def load_model(config: Config, path: Path, device: torch.device) -> MegatronModule:
    """The whole model with the weights of a checkpoint, without its optimizer."""
    bf16 = computes_in_bf16(config)
    transformer = transformer_config(config, [], bf16)
    specs = layer_specs(config, range(config.model.layers), select_operators(config))
    model = HySparseModel(transformer, config.model.vocabulary, specs, True, True).to(device)
    whole = Float16Module(transformer, model) if bf16 else model
    state = checkpoint.load(path, lambda: {"model0": model.sharded_state_dict()})
    model.load_state_dict(state["model0"], strict=False)  # extra states of norms are optional
    return whole.eval()


def oracle(model: MegatronModule) -> FullAttention:
    """The attention of the last full layer that others read from."""
    return [module for module in model.modules() if isinstance(module, FullAttention) and module.has_readers][-1]


@torch.no_grad()
def selection(
    model: MegatronModule, layer: FullAttention, batch: dict[str, Tensor], rope_base: float
) -> tuple[Tensor, float]:
    """What `layer` selects for a batch of one sequence, [K, S, selected] int32, and the model's mean loss."""
    mask, found = batch.pop("loss_mask"), []
    hook = layer.register_forward_hook(lambda _layer, _inputs, results: found.append(SharedKV(*results[1]).blocks))
    loss = forward(model, batch, rope_base)
    hook.remove()
    return found[0][0], ((loss * mask).sum() / mask.sum()).item()


def rope_base(about: dict) -> float:
    """Of the phase that the last step before the checkpoint belonged to."""
    progress = about["progress"]
    phase = progress["phase"] if progress["samples"] else progress["phase"] - 1
    return list(about["phases"].values())[phase]["rope_base"]


def compact(blocks: Tensor) -> np.ndarray:
    """As int16, each token's blocks in rising order: no kernel minds, and it compresses to half the size."""
    unused = torch.iinfo(torch.int16).max
    ordered = torch.where(blocks < 0, unused, blocks).sort(dim=-1).values
    return torch.where(ordered == unused, -1, ordered).to(torch.int16).cpu().numpy()


def overlap(blocks: Tensor) -> float:
    """How many blocks neighbouring tokens have in common, on average."""
    token, before = blocks[:, 1:, :, None], blocks[:, :-1, None, :]
    return ((token == before) & (token >= 0)).sum(dim=(2, 3)).float().mean().item()


def main(words: list[str]) -> None:
    given = dict(word.partition("=")[::2] for word in words)
    if given.keys() != {"run", "length", "output"} or not given["length"].isdecimal():
        sys.exit("usage: python -m hysparse.capture run=RUN_DIR length=TOKENS output=FILE.npz")
    show_own_messages()
    with mistakes_without_traceback(*MISTAKES):
        device = start(Sizes())
        try:
            print(capture(Path(given["run"]), int(given["length"]), Path(given["output"]), device))
        finally:
            stop()


if __name__ == "__main__":
    main(sys.argv[1:])
