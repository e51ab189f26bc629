"""How Llama 3 is cut up for parallelism. Imports no torch."""

from models.llama3.args import LlamaArgs
from models.plan import ParallelPlan


def build_plan(args: LlamaArgs) -> ParallelPlan:
    """Return the plan of one size.

    The final norm and the output matrix share a unit, since they are used together. A tied output matrix is used at both
    ends of the forward pass, so it belongs to the root unit, which stays gathered throughout.
    """
    if args.tie_embeddings:
        return ParallelPlan(fsdp_units=(("layers.*",),), blocks="layers.*")
    return ParallelPlan(
        fsdp_units=(("tok_embeddings",), ("layers.*",), ("norm", "output")),
        blocks="layers.*",
    )
