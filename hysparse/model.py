"""The language model of one pipeline stage: embedding, hybrid stack, output layer and loss, on Megatron-core.

The readable single-file version of the same model is `plain.py`; the two must agree.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.parallel_state import get_pipeline_model_parallel_rank
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from hysparse.attention import FullAttention, SparseAttention, rotary_positions
from hysparse.choices import Precision, Recompute
from hysparse.config import Config
from hysparse.ffn import ffn_spec, moe_settings
from hysparse.linears import FP8, MEGATRON, Linears, select_linears
from hysparse.norm import RMSNorm
from hysparse.plan import LayerKind, Plan
from hysparse.stack import HybridLayer, HybridStack
from kernels.cross_entropy import vocab_parallel_cross_entropy
from parallel.context import Context
from parallel.start import Sizes


class HySparseModel(LanguageModule):
    """`pre_process` stages embed tokens, `post_process` stages compute logits and loss; others do neither."""

    def __init__(
        self,
        config: TransformerConfig,
        vocabulary: int,
        specs: list[ModuleSpec],
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ):
        super().__init__(config, ProcessGroupCollection.use_mpu_process_groups())
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder  # the pipeline schedules ask
        self.stage_input, self.context = None, Context(self.pg_collection.cp)
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, vocabulary, max_sequence_length=0, position_embedding_type="rope", tp_group=self.tp_group
            )
        self.decoder = HybridStack(config, specs, self.pg_collection, post_process, vp_stage)
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocabulary,
                config=config,
                init_method=config.init_method,
                bias=False,
                tp_group=self.tp_group,
            )
        self.setup_embeddings_and_output_layer()
        for name, parameter in self.named_parameters():
            if ".experts." in name:
                # Each rank of a tensor-parallel group feeds its own tokens to its experts, so that their gradients are
                # summed over the expert-data-parallel group. Megatron marks them so only when expert > 1, and would
                # leave them unsummed with tensor > 1 and expert = 1.
                parameter.allreduce = False

    def set_input_tensor(self, stage_input: Tensor | list[Tensor]) -> None:
        """Called by the pipeline schedule with what the previous stage sent."""
        self.stage_input = stage_input[0] if isinstance(stage_input, list) else stage_input

    def forward(self, tokens: Tensor, document_start: Tensor, rope_base: float, labels: Tensor | None = None) -> Tensor:
        """tokens, document_start and labels [B, S] integers, of this rank's part of the sequence.

        Returns each token's loss [B, S], or without labels its logits [B, S, vocabulary / tensor]; before the last
        stage the hidden state [S, B, hidden].
        """
        hidden = self.embedding(tokens, position_ids=None) if self.pre_process else self.stage_input
        positions = rotary_positions(document_start, self.config.kv_channels, rope_base, self.context)
        hidden = self.decoder(hidden, positions)
        if not self.post_process:
            return hidden
        logits = self.output_layer(hidden)[0]  # [S, B, vocabulary / tensor]
        if labels is None:
            return logits.transpose(0, 1)
        return vocab_parallel_cross_entropy(logits, labels.t(), self.tp_group).t().contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As Megatron's, which would fill or cut a vocabulary of another size: here it is never padded."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.config.fp8:  # Transformer Engine's, empty with our recipe
            state = {name: tensor for name, tensor in state.items() if "_extra_state" not in name}
        for name in (f"{prefix}embedding.word_embeddings.weight", f"{prefix}output_layer.weight"):
            if name in state:
                state[name].allow_shape_mismatch = False
        return state


def build_chunk(
    config: Config,
    transformer: TransformerConfig,
    stages: Sequence[range],
    operators: ModuleType,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> HySparseModel:
    """What this process holds of the model, or chunk `vp_stage` of that; the weights are still to be drawn."""
    layers = stages[(vp_stage or 0) * config.parallel.pipeline + get_pipeline_model_parallel_rank()]
    specs = layer_specs(config, layers, operators, select_linears(config))
    return HySparseModel(transformer, config.model.vocabulary, specs, pre_process, post_process, vp_stage)


def group_sizes(config: Config) -> Sizes:
    """The process groups that the layout needs."""
    parallel = config.parallel
    replicas = max(1, parallel.tensor // config.model.kv_heads)
    return Sizes(
        parallel.tensor, parallel.pipeline, parallel.virtual, parallel.expert, parallel.context, replicas=replicas
    )


def transformer_config(config: Config, layout: list[list[str]], bf16: bool) -> TransformerConfig:
    """Megatron's view of the configuration. `layout` is the pipeline layout of `parallel.placement`."""
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn or model.moe.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=torch.cuda.is_available(),  # SwiGLU in one compiled kernel, forward and backward
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        init_method=_left_to_initialise,
        output_layer_init_method=_left_to_initialise,
        embedding_init_method=_left_to_initialise,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        pipeline_model_parallel_layout=layout if parallel.pipeline > 1 else None,
        # Unordered pairs of sends and receives get mixed up where the previous and the next stage are one rank.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=parallel.virtual == 1,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        context_parallel_size=parallel.context,
        transformer_impl="local",
        gradient_accumulation_fusion=False,  # needs Apex
        **(FP8 if config.precision is Precision.fp8 else {}),
        **moe_settings(model.moe, parallel.tensor * parallel.context, parallel.dispatcher),
    )


def _left_to_initialise(weight: Tensor) -> Tensor:
    """Weights are drawn by `initialise.py`, the same under every layout.

    Megatron must still "initialise" them: only then does it mark which parameters are split over ranks.
    """
    return weight


def layer_specs(config: Config, layers: range, operators: ModuleType, linears: Linears = MEGATRON) -> list[ModuleSpec]:
    """One spec for each of `layers`, those of a stage (or chunk)."""
    plan, model = Plan(config.model, config.attention), config.model
    last_of_block = {block[-1] for block in plan.blocks}
    specs = []
    for place, index in enumerate(layers):
        recompute = config.parallel.recompute_of(place)
        parameters = {
            "attention": config.attention,
            "operators": operators,
            "qk_norm": model.qk_norm,
            "recompute": recompute is Recompute.selective,
            "linears": linears,
        }
        if plan.layers[index].kind is LayerKind.full:
            parameters["has_readers"] = index not in last_of_block
            self_attention = ModuleSpec(FullAttention, params=parameters)
        else:
            self_attention = ModuleSpec(SparseAttention, params=parameters)
        specs.append(
            ModuleSpec(
                HybridLayer,
                params={"recompute": recompute is Recompute.full},
                submodules=TransformerLayerSubmodules(
                    input_layernorm=RMSNorm,
                    self_attention=self_attention,
                    pre_mlp_layernorm=RMSNorm,
                    mlp=ffn_spec(model, index, operators.moe, linears),
                    mlp_bda=get_bias_dropout_add,
                ),
            )
        )
    return specs
