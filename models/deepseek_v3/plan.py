"""How DeepSeek-V3 is cut up for parallelism. Imports no torch."""

from models.deepseek_v3.args import DeepSeekV3Args
from models.plan import ParallelPlan


def build_plan(args: DeepSeekV3Args) -> ParallelPlan:
    """Return the plan of one size. The blocks of multi-token prediction are blocks like the others, after them.

    The final norm and the output matrix share a unit, since they are used together. Multi-token prediction uses the output and the
    embeddings: its blocks are in the last stage of a pipeline, with a copy of the latter.
    """
    predictions = tuple(f"layers.{args.n_layers + depth}" for depth in range(args.mtp_depth))
    return ParallelPlan(
        fsdp_units=(("tok_embeddings",), ("layers.*",), ("norm", "output")),
        blocks="layers.*",
        attention="layers.*.attention.inner_attention",
        stages=_list_stage_costs(args),
        last_stage=(*predictions, "output") if predictions else (),
        last_stage_copies=("tok_embeddings",) if predictions else (),
    )


def _list_stage_costs(args: DeepSeekV3Args) -> tuple[tuple[str, float], ...]:
    """What a pipeline may cut between, with FLOPs a token. Dense blocks and those with experts differ; a lookup has none."""

    def list_blocks(begin: int, count: int) -> list[tuple[str, float]]:
        return [(f"layers.{i}", args.block_flops_per_token(i, args.max_seq_len)) for i in range(begin, begin + count)]

    output = 6.0 * args.dim * args.vocab_size
    blocks, predictions = list_blocks(0, args.n_layers), list_blocks(args.n_layers, args.mtp_depth)
    return (("tok_embeddings", 0.0), *blocks, ("norm", 0.0), *predictions, ("output", output))
