"""What the tests ask of Triton kernels that are not interpreted; run as a script, in a process of its own.

Whether kernels are interpreted is settled when Triton is imported, and the tests' own process interprets them. Prints
a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
# Other packages install a top-level `scripts`, so ours is searched as a folder.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops"), str(ROOT / "scripts")]

from cases import Batch, Response, make_batch  # noqa: E402
from triton_resources import TARGETS, recording  # noqa: E402

import vgpo_kernels  # noqa: E402
from vgpo_kernels import ShapingConfig, VGPOConfig, backends  # noqa: E402
from vgpo_kernels.triton_kernels.common import is_finite  # noqa: E402

# (responses, visual tokens, response tokens) of ten rollouts, with the sizes that Triton likes to specialise on.
ROLLOUTS = (
    *((1, 1, 1), (2, 5, 16), (3, 64, 33), (4, 16, 160), (5, 3, 1), (7, 48, 80)),
    *((8, 17, 1025), (16, 1, 31), (1, 160, 2048), (6, 33, 4096)),
)
FEATURES = 128


def rollout(responses: int, visual: int, length: int, packed: bool) -> Batch:
    looks = tuple(Response(visual=visual, length=length, group=index // 2) for index in range(responses))
    return make_batch(looks, features=FEATURES, packed=packed)


def loss_of(batch: Batch, logp: Tensor, **options: Any) -> Tensor:
    return vgpo_kernels.vgpo_loss(
        *(batch.hidden, logp, batch.old_logp, batch.advantages, batch.visual_mask, batch.response_mask),
        *(batch.group_ids, VGPOConfig.released()),
        cu_seqlens=batch.cu_seqlens,
        **options,
    ).loss


def call_every_operator(batch: Batch) -> None:
    mask, packed = batch.response_mask, {"cu_seqlens": batch.cu_seqlens}
    cos = vgpo_kernels.visual_focus(batch.hidden, batch.visual_mask, mask, **packed)
    weights = vgpo_kernels.visual_weights(cos, mask, batch.group_ids, VGPOConfig.released(), **packed)
    vgpo_kernels.group_weights(weights.score, batch.group_ids, VGPOConfig.paper())
    vgpo_kernels.policy_loss(batch.logp, batch.old_logp, batch.token_advantages, mask, **packed)
    signals, cgpo = {"visual": cos, "entropy": batch.entropy}, ShapingConfig.cgpo()
    score = vgpo_kernels.shape_tokens(signals, mask, batch.group_ids, cgpo, **packed).score
    vgpo_kernels.response_factors(score, batch.group_ids, cgpo)


def call_with_late_images(batch: Batch) -> None:
    given = (batch.hidden, batch.visual_mask)
    vgpo_kernels.visual_prototype(*given, cu_seqlens=batch.cu_seqlens, visibility="causal")
    vgpo_kernels.visual_focus(*given, batch.response_mask, cu_seqlens=batch.cu_seqlens, visibility="causal")


def call_with_unit_vectors(batch: Batch) -> None:
    given = (batch.hidden, batch.visual_mask, batch.response_mask)
    vgpo_kernels.visual_focus(*given, cu_seqlens=batch.cu_seqlens, pooling="unit_mean")


def compilations() -> dict[str, int]:
    """Return how often each kernel would be compiled over ten rollouts, in the layout where it is most often."""
    most: dict[str, int] = defaultdict(int)
    for packed in (False, True):
        for call in (
            call_every_operator,
            call_with_late_images,
            call_with_unit_vectors,
            lambda batch: loss_of(batch, batch.logp, loss_type="gspo"),
        ):
            keys: dict[str, set[Any]] = defaultdict(set)
            for sizes in ROLLOUTS:
                with recording(TARGETS["sm_90"]) as launches:
                    call(rollout(*sizes, packed))
                for launch in launches:
                    keys[launch.kernel.__name__].add(launch.key)
            for name, seen in keys.items():
                most[name] = max(most[name], len(seen))
    return most


def traced_launches() -> dict[str, list[str]]:
    """Return the kernels in the one graph that torch.compile makes of vgpo_loss, for each way to give prototypes."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., list[Any]]:
        graphs.append(graph)
        outputs = [node and node.meta["val"] for node in graph.graph.find_nodes(op="output")[0].args[0]]
        # Nothing can run here, so what a graph would have computed is all zeros.
        return make_boxed_func(
            lambda *_: [None if out is None else torch.zeros(out.shape, dtype=out.dtype) for out in outputs]
        )

    batch = rollout(4, 16, 64, packed=False)
    batch.logp.requires_grad_()
    found = {}
    calls: dict[str, dict[str, Any]] = {
        "own": {},
        "causal": {"visibility": "causal"},
        "given": {"prototype": torch.ones(4, FEATURES)},
    }
    for name, options in calls.items():
        torch._dynamo.reset()
        graphs.clear()
        compiled = torch.compile(loss_of, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        with recording(TARGETS["sm_90"]):
            compiled(batch, batch.logp, **options).backward()
        found[name] = [name for graph in graphs for name in kernels_of(graph)]
    return found


def kernels_of(graph: torch.fx.GraphModule) -> list[str]:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    calls = graph.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional)
    # torch wraps a kernel whose launch names its warps; both wrapper and kernel know the function as `fn`.
    return [kernel_side_table.get_kernel(call.kwargs["kernel_idx"]).fn.__name__ for call in calls]


@triton.jit
def finite_product_kernel(given, found):
    tl.store(found, is_finite(tl.load(given) * 1.4426950408889634))


def finite_product() -> str:
    """Return the instructions that say whether a product is finite."""
    source = ASTSource(finite_product_kernel, signature={"given": "*fp32", "found": "*i1"})
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])


def main() -> None:
    # There is no GPU here, and kernels are compiled and traced, not run: CPU tensors stand for a GPU's.
    backends.select = lambda *_: "triton"  # type: ignore[assignment]
    torch.set_num_threads(1)
    found = {"compilations": compilations(), "traced": traced_launches(), "finite_product": finite_product()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
