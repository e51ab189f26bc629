"""How Llama 3 is cut up for parallelism. Imports no torch."""

from models.llama3.args import LlamaArgs
from models.plan import ParallelPlan

_TENSOR_PARALLEL = {
    "tok_embeddings": "embedding",
    "layers.*.attention_norm": "sequence",
    "layers.*.attention": "gather_seq",
    "layers.*.attention.wq": "colwise",
    "layers.*.attention.wk": "colwise_kv",
    "layers.*.attention.wv": "colwise_kv",
    "layers.*.attention.wo": "rowwise",
    "layers.*.ffn_norm": "sequence",
    "layers.*.feed_forward": "gather_seq",
    "layers.*.feed_forward.w1": "colwise",
    "layers.*.feed_forward.w3": "colwise",
    "layers.*.feed_forward.w2": "rowwise",
    "norm": "sequence",
    "output": "output",
}


def build_plan(args: LlamaArgs) -> ParallelPlan:
    """Return the plan of one size.

    The final norm and the output matrix share a unit, since they are used together. A tied output matrix is used at both
    ends of the forward pass, so it belongs to the root unit, which stays gathered throughout.
    """
    units = (("tok_embeddings",), ("layers.*",), ("norm", "output"))
    return ParallelPlan(
        fsdp_units=units[1:2] if args.tie_embeddings else units,
        blocks="layers.*",
        tp=_TENSOR_PARALLEL,
        attention="layers.*.attention.inner_attention",
        stages=_list_stage_costs(args),
    )


def _list_stage_costs(args: LlamaArgs) -> tuple[tuple[str, float], ...]:
    """What a pipeline may cut between, with FLOPs a token. A lookup has none."""
    output = 6.0 * args.dim * args.vocab_size
    block = (args.flops_per_token(args.max_seq_len) - output) / args.n_layers
    return (("tok_embeddings", 0.0), ("layers.*", block), ("norm", 0.0), ("output", output))
