"""One rank of verl's Megatron engine on a CPU: ``megatron_case.py RANK WORLD FOLDER``.

Megatron's own model, parallel state, layers and pipeline schedule, and verl's own engine, preprocessing and batches.
What they have for GPUs alone is replaced here, and nothing else: the device, the kernel of the fused head, and
TransformerEngine's norm and attention, the only ones that take sequence parallelism, packed sequences and context
parallelism.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Layout(NamedTuple):
    """How a case spreads its micro-batches."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence: bool = True  # sequence parallelism of the tensor parallel ranks
    packed: bool = True
    fused: bool = False
    interleaved: int | None = None
    bucket: int | None = None
    mtp: bool = False  # multi-token prediction
    stages: str | None = None  # what the pipeline stages have, in Megatron's letters


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU stay where they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if func is Tensor.cuda:
            return args[0]
        if options.get("device") == "cuda":
            options["device"] = "cpu"
        return func(*args, **options)


def on_cpu(replace: Callable[[Any, str, Any], None]) -> None:
    """Replace what else Megatron and verl ask of a GPU."""
    from megatron.core.tensor_parallel import random
    from verl.models.mcore import model_forward_fused
    from verl.workers.engine.megatron import transformer_impl

    replace(torch.cuda, "current_device", lambda: torch.device("cpu"))
    replace(torch.cuda, "synchronize", lambda *_: None)
    replace(transformer_impl, "get_device_id", lambda: "cpu")
    replace(model_forward_fused, "linear_cross_entropy", head_of_cpu)
    replace(random.CudaRNGStatesTracker, "fork", nullcontext)  # without dropout nothing is drawn


def head_of_cpu(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str, group: Any
) -> tuple[Tensor, Tensor]:
    """What verl's Triton kernel computes: log-probabilities and entropies over a split vocabulary."""
    logits = hidden.flatten(0, -2) @ weight.T / temperature
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    logp = torch.cat(parts, -1).log_softmax(-1)
    return logp.gather(-1, labels.flatten()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class Norm(nn.RMSNorm):
    """Like Megatron's own, which refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)


class CausalAttention(nn.Module):
    """Attention to what precedes in the same sequence, packed or padded, with the keys of the other context ranks."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any
    ) -> Tensor:
        from megatron.core import parallel_state

        shape = query.shape[:-2]
        ranks = parallel_state.get_context_parallel_world_size()
        if packed_seq_params is None:
            starts = [0, query.shape[0] * ranks]
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))  # [B, s, heads, D]
        else:
            starts = packed_seq_params.cu_seqlens_q_padded.tolist()
            query, key, value = (part[None] for part in (query, key, value))
        places = self.places(starts, parallel_state.get_context_parallel_rank(), ranks)
        if ranks > 1:
            group = parallel_state.get_context_parallel_group()
            parts = [[torch.empty_like(part) for _ in range(ranks)] for part in (key, value)]
            dist.all_gather(parts[0], key.contiguous(), group=group)
            dist.all_gather(parts[1], value.contiguous(), group=group)
            key, value = (torch.cat(part, 1) for part in parts)
        others = torch.cat([self.places(starts, rank, ranks) for rank in range(ranks)])
        visible = (places[:, None, 0] == others[None, :, 0]) & (places[:, None, 1] >= others[None, :, 1])
        repeats = query.shape[2] // key.shape[2]
        key, value = (part.repeat_interleave(repeats, 2) for part in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * self.scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        found = torch.einsum("bhqk,bkhd->bqhd", weights, value)
        found = found.transpose(0, 1) if packed_seq_params is None else found[0]
        return found.reshape(*shape, -1)

    @staticmethod
    def places(starts: list[int], rank: int, ranks: int) -> Tensor:
        """Sequence and place in it of a rank's rows: one half from the front of each sequence, one from its end."""
        rows = []
        for number, (first, end) in enumerate(pairwise(starts)):
            half = (end - first) // (2 * ranks)
            if ranks == 1:
                found = torch.arange(end - first)
            else:
                found = torch.cat(
                    [torch.arange(half) + half * rank, torch.arange(half) + half * (2 * ranks - 1 - rank)]
                )
            rows.append(torch.stack([torch.full_like(found, number), found], -1))
        return torch.cat(rows)


def transformer_config(config: Any, layout: Layout) -> Any:
    """Megatron's configuration of a Qwen2."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        batch_p2p_comm=False,
        moe_token_dispatcher_type="alltoall",  # another refuses lengths that vary, with or without experts
        overlap_p2p_comm=layout.interleaved is not None,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.interleaved,
        context_parallel_size=layout.context,
        mtp_num_layers=1 if layout.mtp else None,
        pipeline_model_parallel_layout=layout.stages,
    )


def chunk_of(model: Any, layout: Layout, chunk: int | None) -> Any:
    """Megatron's model with this rank's share of the layers and weights of a Qwen2 of transformers."""
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec_for_backend,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = transformer_config(model.config, layout)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    spec = TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, chunk), Norm)
    modules = LocalSpecProvider()
    modules.layer_norm = lambda **_: Norm
    share = GPTModel(
        config,
        spec,
        mtp_block_spec=get_gpt_mtp_block_spec_for_backend(config, layer, modules, chunk) if layout.mtp else None,
        vocab_size=model.config.vocab_size,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        position_embedding_type="rope",
        rotary_base=model.config.rope_parameters["rope_theta"],
        vp_stage=chunk,
    )
    rank = parallel_state.get_tensor_model_parallel_rank()
    first = get_transformer_layer_offset(config, chunk)
    weights = share_of(model, range(first, first + len(share.decoder.layers)), layout.tensor, rank)
    # Layers that predict further tokens, which transformers' model does not have, keep the weights they are drawn with.
    missing = share.load_state_dict(weights, strict=False).missing_keys
    assert not [name for name in missing if not name.endswith("_extra_state") and not name.startswith("mtp.")], missing
    return share.eval()


def share_of(model: Any, layers: range, ranks: int, rank: int) -> dict[str, Tensor]:
    """The weights of a Qwen2 by Megatron's names: some layers of them, and one rank's part of each."""
    found = model.state_dict()

    def part(name: str, dim: int = 0) -> Tensor:
        return found[name].chunk(ranks, dim)[rank]

    weights = {
        "embedding.word_embeddings.weight": part("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": found["model.norm.weight"],
        "output_layer.weight": part("lm_head.weight"),
    }
    groups = model.config.num_key_value_heads
    for place, number in enumerate(layers):
        theirs, ours = f"model.layers.{number}", f"decoder.layers.{place}"
        for kind in ("weight", "bias"):
            # Of each group of heads: its queries, its key, its value.
            rows = [found[f"{theirs}.self_attn.{name}_proj.{kind}"].chunk(groups) for name in "qkv"]
            of_groups = [torch.cat(group) for group in zip(*rows, strict=True)]
            weights[f"{ours}.self_attention.linear_qkv.{kind}"] = torch.cat(of_groups).chunk(ranks)[rank]
        weights |= {
            f"{ours}.input_layernorm.weight": found[f"{theirs}.input_layernorm.weight"],
            f"{ours}.pre_mlp_layernorm.weight": found[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.self_attention.linear_proj.weight": part(f"{theirs}.self_attn.o_proj.weight", 1),
            f"{ours}.mlp.linear_fc1.weight": torch.cat(
                [part(f"{theirs}.mlp.gate_proj.weight"), part(f"{theirs}.mlp.up_proj.weight")]
            ),
            f"{ours}.mlp.linear_fc2.weight": part(f"{theirs}.mlp.down_proj.weight", 1),
        }
    return weights


def qwen() -> Any:
    """A small Qwen2 whose configuration names an image token."""
    from integrations.rollout_case import IMAGE
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    config.image_token_id, config.architectures = IMAGE, ["Qwen2ForCausalLM"]
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for value in model.parameters():  # norms and biases too, so that one left out shows
            value.add_(torch.randn_like(value) / 10)
    return model


def ask(engine: Any, data: Any, *flags: str) -> dict[str, list[Tensor]] | None:
    """What verl's engine returns for a batch, in micro-batches of its own order; None where the rank has no output."""
    from verl.utils import tensordict_utils

    data = data.clone()
    tensordict_utils.assign_non_tensor(
        data,
        temperature=1.0,
        calculate_entropy=True,
        max_token_len_per_gpu=64 // engine.engine_config.context_parallel_size,
        **dict.fromkeys(flags, True),
    )
    found = engine.infer_batch(data).get("model_output")
    return found and {name: list(value.unbind()) for name, value in found.items()}


@contextmanager
def engine_of(model: Any, layout: Layout) -> Iterator[Any]:
    """verl's own engine around Megatron's model, without the checkpoints and the optimizer that its set-up wants."""
    from megatron.core import parallel_state
    from verl.utils.megatron_utils import patch_engine_mtp
    from verl.workers.config import McoreEngineConfig
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    engine = object.__new__(MegatronEngineWithLMHead)
    engine.engine_config = McoreEngineConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.interleaved,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence,
        use_remove_padding=layout.packed,
        use_fused_kernels=layout.fused,
        pad_to_length=layout.bucket is not None,
        pad_to_length_bucket=layout.bucket or 512,
    )
    engine._init_device_mesh()
    engine.model_config = SimpleNamespace(
        hf_config=model.config,
        tokenizer=SimpleNamespace(pad_token_id=0),
        mtp=SimpleNamespace(enable=layout.mtp, enable_train=layout.mtp, detach_encoder=False),
    )
    engine.enable_routing_replay = engine.is_value_model = False
    chunks = [None] if layout.interleaved is None else range(layout.interleaved)
    engine.module = [chunk_of(model, layout, chunk) for chunk in chunks]
    engine.tf_config = engine.module[0].config
    engine._maybe_enable_fused_kernels()
    if layout.mtp:
        patch_engine_mtp(engine.module, engine.model_config)
    try:
        yield engine
    finally:
        parallel_state.destroy_model_parallel()


@contextmanager
def rank_of(rank: int, world: int, folder: Path, replace: Callable[[Any, str, Any], None] = setattr) -> Iterator[None]:
    """A process group of one CPU a rank, in which Megatron and verl run and verl's engine can score the focus."""
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    on_cpu(replace)

    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    from vgpo_kernels.integrations.verl.megatron import score_focus

    score_focus(MegatronEngineWithLMHead)
    try:
        with OnCpu():
            yield
    finally:
        dist.destroy_process_group()


def main(rank: int, world: int, folder: Path) -> None:
    case = torch.load(folder / "case.pt", weights_only=False)
    model, results = qwen(), {}
    with rank_of(rank, world, folder):
        for name, layout in case["layouts"].items():
            with engine_of(model, layout) as engine:
                results[name] = ask(engine, case["data"], *case["flags"])
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
