"""How DeepSeek-V3 is cut up for parallelism. Imports no torch."""

from models.deepseek_v3.args import DeepSeekV3Args
from models.plan import ParallelPlan


def build_plan(args: DeepSeekV3Args) -> ParallelPlan:
    """Return the plan of one size. The blocks of multi-token prediction are blocks like the others, after them.

    The final norm and the output matrix share a unit, since they are used together. Multi-token prediction uses the output and the
    embeddings: its blocks are in the last stage of a pipeline, with a copy of the latter.
    """
    predictions = tuple(f"layers.{args.n_layers + depth}" for depth in range(args.mtp_depth))
    shared = ("moe.shared_experts.forward",) if args.n_shared_experts else ()
    return ParallelPlan(
        fsdp_units=(("tok_embeddings",), ("layers.*",), ("norm", "output")),
        blocks="layers.*",
        tp=_build_tensor_parallel(args),
        attention="layers.*.attention.inner_attention",
        experts="layers.*.moe" if args.n_dense_layers < args.n_layers + args.mtp_depth else "",
        pieces=("attend", "moe.route", *shared, "moe.experts.multiply"),
        stages=_list_stage_costs(args),
        last_stage=(*predictions, "output") if predictions else (),
        last_stage_copies=("tok_embeddings",) if predictions else (),
    )


_FEED_FORWARD = {"": "gather_seq", ".w1": "colwise", ".w3": "colwise", ".w2": "rowwise"}


def _build_tensor_parallel(args: DeepSeekV3Args) -> dict[str, str]:
    """Return the style of each module. Latents, narrower than the residual stream, are made of each rank's tokens and then gathered."""
    styles = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "sequence",
        "layers.*.attention.wkv_a": "sequence_linear_gather",
        "layers.*.attention.kv_norm": "sequence",
        "layers.*.attention.wkv_b": "colwise",
        "layers.*.attention.wo": "rowwise",
        "layers.*.ffn_norm": "sequence",
        "norm": "sequence",
        "output": "output",
    }
    if args.q_lora_rank:
        styles |= {
            "layers.*.attention.wq_a": "sequence_linear_gather",
            "layers.*.attention.q_norm": "sequence",
            "layers.*.attention.wq_b": "colwise",
        }
    else:
        styles["layers.*.attention.wq"] = "gather_seq_colwise"
    if args.n_dense_layers:
        styles |= {f"layers.*.feed_forward{part}": style for part, style in _FEED_FORWARD.items()}
    if args.n_dense_layers < args.n_layers + args.mtp_depth:
        styles["layers.*.moe.router"] = "router"
        if args.n_shared_experts:
            styles |= {f"layers.*.moe.shared_experts{part}": style for part, style in _FEED_FORWARD.items()}
    if args.mtp_depth:
        styles |= {f"layers.*.{name}": "sequence" for name in ("enorm", "hnorm", "norm")}
        styles["layers.*.eh_proj"] = "sequence_linear"
    return styles


def _list_stage_costs(args: DeepSeekV3Args) -> tuple[tuple[str, float], ...]:
    """What a pipeline may cut between, with FLOPs a token. Dense blocks and those with experts differ; a lookup has none."""

    def list_blocks(begin: int, count: int) -> list[tuple[str, float]]:
        return [(f"layers.{i}", args.block_flops_per_token(i, args.max_seq_len)) for i in range(begin, begin + count)]

    output = 6.0 * args.dim * args.vocab_size
    blocks, predictions = list_blocks(0, args.n_layers), list_blocks(args.n_layers, args.mtp_depth)
    return (("tok_embeddings", 0.0), *blocks, ("norm", 0.0), *predictions, ("output", output))
