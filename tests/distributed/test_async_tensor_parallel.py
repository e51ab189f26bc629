"""Async tensor parallelism: the compiler finds the collectives of a block and fuses them with matrix products.

The fused kernels are CUDA's; here their plain forms, which torch has for its own tests, stand in for them on the CPU.
"""

import collections
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.distributed.tensor import DTensor

from models.llama3.args import LlamaArgs
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from tests.distributed.harness import run_distributed
from trainer.components.loss import LinearCrossEntropy
from trainer.distributed import tensor_parallel
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights

ARGS = LlamaArgs(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=32, ffn_hidden_dim=24, max_seq_len=8)


def _fuse(graphs: list[dict[str, int]]) -> Any:
    """A compiler that fuses as inductor does and runs the graph op by op. `graphs` gets what each communicates by."""

    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        view_to_reshape(graph)
        micro_pipeline_tp_pass(graph.graph)
        graph.recompile()
        names = [str(node.target).removesuffix(".default") for node in graph.graph.nodes if node.op == "call_function"]
        counts = collections.Counter(name.partition(".")[2] for name in names if "c10d" in name or "symm_mem" in name)
        graphs.append({name: n for name, n in counts.items() if name != "wait_tensor"})
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compile_graph, bw_compiler=compile_graph, decompositions=select_decomp_table())


def _run(batch: int, tp: int) -> tuple[list[dict[str, int]], dict[str, torch.Tensor]]:
    """Gradients of one step, and the collectives of a block, forward and backward."""
    with torch.device("meta"):
        model = Transformer(ARGS)
    graphs: list[dict[str, int]] = []
    group = None
    if tp > 1:
        dims = ParallelDims(world_size=tp, tp=tp)
        dims.build_mesh("cpu")
        group = dims.mesh("tp").get_group()
        kernels = torch.library.Library("symm_mem", "IMPL")
        kernels.impl("fused_all_gather_matmul", symmetric_memory._fused_all_gather_matmul_fallback, "CPU")
        kernels.impl("fused_matmul_reduce_scatter", symmetric_memory._fused_matmul_reduce_scatter_fallback, "CPU")
        dist.is_nccl_available = lambda: True
        tensor_parallel._enable_async_tensor_parallel = lambda mesh, compiles_blocks: None
        tensor_parallel.apply_tensor_parallel(
            model, plan=build_plan(ARGS), mesh=dims.mesh("tp"), compiles_blocks=True, async_tp=True
        )
        block = model.layers["0"]
        block.forward = torch.compile(block.forward, backend=_fuse(graphs), fullgraph=True, dynamic=False)
    init_weights(model, seed=0, device="cpu")
    tokens = torch.arange(batch * 8).view(batch, 8) % ARGS.vocab_size
    with symmetric_memory._test_mode():
        model(tokens, labels=tokens, loss_fn=LinearCrossEntropy(tp_group=group)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return graphs, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_collectives_of_a_block_are_fused_and_gradients_stay(batch: int) -> None:
    _, expected = _run(batch, tp=1)
    (forward, backward), actual = run_distributed(_run, 2, batch, 2, timeout=240)[0]
    assert forward == {"fused_all_gather_matmul": 2, "fused_matmul_reduce_scatter": 2}
    # What is scattered backward is a sum of several products, with which no kernel fuses.
    assert backward == {"fused_all_gather_matmul": 2, "reduce_scatter_tensor": 2, "all_reduce": 2}
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
