"""Every pair of techniques, and chosen larger sets: the table of docs/parallelism.md, as data.

`test_table.py` runs each row: it equals one process, or the configuration is refused with the reason that stands here.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.deepseek_v3.args import DeepSeekV3Args
from models.llama3.args import LlamaArgs
from tests.distributed.cases import EXPERT_ARGS, GLOBAL_BATCH, Case
from trainer.config.validate import find_problems
from trainer.preflight_parallel import Model, find_parallel_model_problems

# Every rank has two heads, which share a key and value head: less than that Ulysses cannot deal out. The vocabulary and the
# feed-forward part do not divide.
ARGS = LlamaArgs(dim=24, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=67, ffn_hidden_dim=26, max_seq_len=16)

CSV = Path(__file__).parent / "schedule.csv"


@dataclass(frozen=True)
class Technique:
    """One thing that a user can switch on, as settings. Those of one kind exclude each other."""

    name: str
    kind: str
    label: str
    """What the printed table calls it."""
    settings: str
    """The keys that switch it on, as the printed table shows them."""
    ranks: int = 1
    parallelism: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    activation_checkpoint: dict[str, Any] = field(default_factory=dict)
    compile: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    tied: bool = False
    documents: bool = False
    experts: bool = False
    """Whether the model has experts."""


def _data(name: str, label: str, replicate: int, shard: int) -> Technique:
    degrees = {"data_parallel_replicate_degree": replicate, "data_parallel_shard_degree": shard}
    settings = f"data_parallel_replicate_degree = {replicate}, data_parallel_shard_degree = {shard}"
    return Technique(name, "data", label, settings, ranks=replicate * shard, parallelism=degrees)


def _context(method: str, label: str, **more: Any) -> Technique:
    degrees = {"context_parallel_degree": 2, "context_parallel_method": method, **more}
    settings = ", ".join(f"{key} = {value}" for key, value in degrees.items())
    name = f"cp_{method}" + ("_alltoall" if more else "")
    return Technique(name, "context", label, settings, ranks=2, parallelism=degrees)


def _pipeline(schedule: str) -> Technique:
    degrees = {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule}
    settings = f"pipeline_parallel_degree = 2, pipeline_parallel_schedule = {schedule}"
    return Technique(f"pp_{schedule.lower()}", "pipeline", f"PP {schedule}", settings, ranks=2, parallelism=degrees)


def _recompute(name: str, label: str, **section: Any) -> Technique:
    settings = ", ".join(f"activation_checkpoint.{key} = {value}" for key, value in section.items())
    return Technique(name, "recomputation", label, settings, activation_checkpoint=section)


_COMPILE = {"enable": True, "backend": "aot_eager", "components": ["model", "loss"]}

TECHNIQUES = (
    _data("fsdp", "FSDP", 1, 2),
    _data("hsdp", "HSDP", 2, 2),
    _data("ddp", "DDP", 2, 1),
    Technique("tp", "tensor", "TP", "tensor_parallel_degree = 2", ranks=2, parallelism={"tensor_parallel_degree": 2}),
    _context("allgather", "CP all-gather"),
    _context("ring", "CP ring"),
    _context("ring", "CP ring, all-to-all", context_parallel_rotate_method="alltoall"),
    _context("ulysses", "CP Ulysses"),
    *map(_pipeline, ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")),
    Technique(
        "pp_csv",
        "pipeline",
        "PP from CSV",
        "pipeline_parallel_degree = 2, pipeline_parallel_schedule_csv = FILE",
        ranks=2,
        parallelism={"pipeline_parallel_degree": 2, "pipeline_parallel_schedule_csv": str(CSV)},
    ),
    _recompute("ac_full", "AC full", mode="full"),
    _recompute("ac_every_second", "AC every 2nd", mode="selective", selective_ac_option="2"),
    _recompute("ac_op", "AC by operation", mode="selective", selective_ac_option="op"),
    Technique(
        "ac_budget",
        "recomputation",
        "AC by budget",
        "activation_checkpoint.mode = memory_budget, compile.enable = true, compile.components = model",
        activation_checkpoint={"mode": "memory_budget", "memory_budget": 0.3},
        compile={**_COMPILE, "components": ["model"]},
    ),
    Technique("compile", "compilation", "compile", "compile.enable = true", compile=_COMPILE),
    Technique("accumulation", "accumulation", "accumulation", "training.global_batch_size", accumulation=2),
    Technique("documents", "mask", "documents", "model.attn_mask_type = block_causal", documents=True),
    Technique("tied", "tied", "tied", "a flavor with tied embeddings", tied=True),
    # It borrows the ranks of sharding, CP or TP. Without any of these there is sharding, over 2.
    Technique(
        "ep", "experts", "EP", "expert_parallel_degree = 2", parallelism={"expert_parallel_degree": 2}, experts=True
    ),
    Technique(
        "bf16", "precision", "bf16", "mixed_precision_param = bfloat16", training={"mixed_precision_param": "bfloat16"}
    ),
)

# Not in pairs with all.
FURTHER_TECHNIQUES = (
    Technique("experts", "experts", "experts", "a flavor with experts", experts=True),
    Technique(
        "etp",
        "tensor",
        "ETP",
        "tensor_parallel_degree = 2, expert_tensor_parallel_degree = 2",
        ranks=2,
        parallelism={"tensor_parallel_degree": 2, "expert_tensor_parallel_degree": 2},
        experts=True,
    ),
    Technique(
        "simple",
        "implementation",
        "SimpleFSDP",
        "data_parallel_implementation = simple_fsdp",
        parallelism={"data_parallel_implementation": "simple_fsdp"},
    ),
    Technique(
        "whole",
        "compilation",
        "compile whole",
        "compile.enable = true, compile.scope = model, compile.graph_passes = transformer_block_bucketing",
        compile={**_COMPILE, "scope": "model", "graph_passes": "transformer_block_bucketing"},
    ),
)

BY_NAME = {technique.name: technique for technique in (*TECHNIQUES, *FURTHER_TECHNIQUES)}

# Kinds that no model has together: none with experts has tied embeddings.
_APART = {frozenset({"experts", "tied"})}

_LENDERS = {"fsdp", "hsdp", "ddp", "tp"}

LARGER_SETS = (
    # Where an asynchronous collective's result would enter a compiled block: gradients of the embedding vanish in silence.
    ("fsdp", "tp", "compile"),
    ("fsdp", "tp", "ac_full", "tied"),
    ("fsdp", "cp_allgather", "documents", "compile"),
    ("fsdp", "cp_ring_alltoall", "ac_full", "accumulation"),
    ("fsdp", "cp_ulysses", "documents", "ac_op"),
    ("tp", "pp_1f1b", "fsdp"),
    ("tp", "pp_zbvzerobubble", "fsdp"),
    ("fsdp", "pp_1f1b", "compile", "ac_op"),
    ("fsdp", "pp_1f1b", "accumulation", "documents"),
    ("fsdp", "pp_1f1b", "cp_ring", "documents"),
    ("ddp", "pp_zbvzerobubble", "accumulation"),
    ("experts", "tp", "fsdp"),
    ("ep", "fsdp", "compile", "ac_op"),
    ("ep", "etp", "fsdp", "ac_full"),
    ("ep", "tp", "cp_allgather", "documents"),
    ("ep", "cp_allgather", "documents", "compile", "ac_op"),
    ("ep", "cp_ulysses", "fsdp", "documents", "accumulation"),
    ("ep", "pp_dualpipev", "fsdp", "ac_op"),
    # What torchtitan lists for SimpleFSDP, in as few runs as show it.
    ("simple", "hsdp", "tied", "accumulation", "ac_op"),
    ("simple", "ddp", "cp_ring"),
    ("simple", "fsdp", "pp_1f1b", "ac_op"),
    ("simple", "fsdp", "ac_budget"),
    ("simple", "fsdp", "experts", "whole"),
    ("simple", "ep", "fsdp", "tp", "ac_op"),
    ("simple", "ep", "fsdp", "whole"),
)

# On eight ranks, or with a compiler on each of four, and each near to a row above: what takes longest and shows least.
EXHAUSTIVE_SETS = (
    ("simple", "fsdp", "tp", "whole", "ac_full"),
    ("fsdp", "cp_ring", "compile", "ac_op"),
    ("ep", "pp_dualpipev", "ac_full", "accumulation"),
    ("ep", "tp", "fsdp", "compile", "accumulation"),
    ("ddp", "cp_ring", "compile", "accumulation"),
    ("ddp", "tp", "compile", "ac_op"),
    ("fsdp", "tp", "compile", "bf16"),
    ("hsdp", "tp", "compile", "ac_op"),
    ("hsdp", "tp", "accumulation", "tied"),
    ("fsdp", "tp", "documents", "compile"),
    ("fsdp", "cp_allgather", "compile", "ac_op"),
    ("fsdp", "cp_ulysses", "compile", "bf16"),
    ("hsdp", "cp_allgather", "accumulation", "tied"),
    ("tp", "cp_allgather", "fsdp", "compile"),
    ("tp", "cp_allgather", "fsdp", "documents"),
    ("tp", "cp_ring", "fsdp", "ac_op"),
    ("tp", "cp_ring_alltoall", "ddp", "bf16"),
    ("tp", "pp_1f1b", "fsdp", "compile"),
    ("tp", "pp_1f1b", "ddp", "documents"),
    ("tp", "pp_interleaved1f1b", "fsdp", "ac_op"),
    ("tp", "pp_dualpipev", "fsdp", "bf16"),
    ("tp", "pp_gpipe", "cp_allgather", "documents"),
    ("tp", "pp_1f1b", "cp_ring", "compile"),
    ("fsdp", "pp_interleaved1f1b", "cp_allgather"),
    ("fsdp", "pp_zbvzerobubble", "cp_ulysses"),
    ("hsdp", "pp_1f1b", "accumulation", "ac_full"),
    ("hsdp", "pp_interleaved1f1b", "bf16"),
    ("ddp", "pp_interleavedzerobubble", "cp_allgather", "documents"),
    ("experts", "etp", "compile", "ac_op"),
    ("ep", "fsdp", "compile", "ac_full", "bf16"),
    ("ep", "etp", "fsdp", "compile", "ac_op"),
    ("ep", "tp", "hsdp", "ac_op"),
    ("ep", "pp_1f1b", "cp_ring", "compile"),
    ("ep", "pp_zbvzerobubble", "etp", "fsdp"),
    ("simple", "fsdp", "pp_zbvzerobubble", "cp_ulysses"),
    ("simple", "fsdp", "cp_allgather", "documents", "whole", "bf16"),
    ("simple", "ep", "pp_1f1b", "compile", "ac_full"),
)


@dataclass(frozen=True)
class Row:
    """Some techniques together."""

    techniques: tuple[Technique, ...]

    @property
    def name(self) -> str:
        """Its name as a test."""
        return "-".join(technique.name for technique in self.techniques)

    @property
    def is_exhaustive(self) -> bool:
        """Whether only `scripts/test.sh --all` runs it: a pair that is a part of a larger set, or one of `EXHAUSTIVE_SETS`."""
        names = tuple(technique.name for technique in self.techniques)
        return names in EXHAUSTIVE_SETS or (
            len(names) == 2 and any(set(names) <= set(larger) for larger in LARGER_SETS)
        )

    @property
    def case(self) -> Case:
        """The run that shows whether it is right."""
        merged: dict[str, dict[str, Any]] = {}
        for section in ("parallelism", "training", "activation_checkpoint", "compile"):
            merged[section] = {k: v for t in self.techniques for k, v in getattr(t, section).items()}
        ranks = accumulation = 1
        for technique in self.techniques:
            ranks *= technique.ranks
            accumulation *= technique.accumulation
        ranks *= self._count_ranks_lent_to_experts()
        if "pipeline_parallel_degree" in merged["parallelism"]:
            # Four microbatches, or as many as there are sequences.
            local_batch = GLOBAL_BATCH // accumulation // self._count_ranks_of_data()
            merged["parallelism"]["pipeline_parallel_microbatch_size"] = max(1, local_batch // 4)
        base: Any = EXPERT_ARGS if any(technique.experts for technique in self.techniques) else ARGS
        if "pipeline_parallel_degree" not in merged["parallelism"]:
            # Two blocks, of which one hands over to the next; no further kind of them to compile.
            dense = {"n_dense_layers": 0 if merged["compile"] else 1} if base is EXPERT_ARGS else {}
            base = dataclasses.replace(base, n_layers=2 + sum(dense.values()), **dense)
        low_precision = any(technique.name == "bf16" for technique in self.techniques)
        return Case(
            self.name,
            ranks,
            **merged,
            microbatches=accumulation,
            # A graph of one size is enough; one of all of a model has each chunk anew, and few compile faster.
            chunk_size=64 if merged["compile"].get("scope") == "model" else 8 if merged["compile"] else 7,
            tied=any(technique.tied for technique in self.techniques),
            documents=any(technique.documents for technique in self.techniques),
            base=base,
            tolerance=4e-2 if low_precision else 1e-5,
        )

    @property
    def reference(self) -> Case:
        """What the run equals: of fp32, one process in plain code. With experts rounding decides which some tokens meet, so that
        the reference rounds as well, and is a run on one process.
        """
        case = self.case
        rounds = (
            {"mixed_precision_param": "bfloat16"} if isinstance(case.base, DeepSeekV3Args) and case.training else {}
        )
        return Case("reference", 1, training=rounds, tied=case.tied, documents=case.documents, base=case.base)

    def _count_ranks_of_data(self) -> int:
        explicit = (technique.ranks for technique in self.techniques if technique.kind == "data")
        return next(explicit, self._count_ranks_lent_to_experts())

    def _count_ranks_lent_to_experts(self) -> int:
        """Return the ranks of sharding that are there for expert parallelism to borrow."""
        borrows = any("expert_parallel_degree" in technique.parallelism for technique in self.techniques)
        has_lender = any(t.name in _LENDERS or t.kind == "context" for t in self.techniques)
        return 2 if borrows and not has_lender else 1


def list_rows() -> list[Row]:
    """Return all rows: each technique alone, every pair, and the larger sets."""
    alone = [(technique,) for technique in TECHNIQUES]
    pairs = [
        (a, b)
        for a, b in itertools.combinations(TECHNIQUES, 2)
        if a.kind != b.kind and frozenset({a.kind, b.kind}) not in _APART
    ]
    larger = [tuple(BY_NAME[name] for name in names) for names in (*LARGER_SETS, *EXHAUSTIVE_SETS)]
    return [Row(techniques) for techniques in (*alone, *pairs, *larger)]


_NO_KV_HEAD = "the degree must divide the heads"
_SHARED = "tied embeddings"

REFUSED = {
    frozenset({"cp_ring", "documents"}): "cannot keep attention inside documents",
    frozenset({"cp_ring_alltoall", "documents"}): "cannot keep attention inside documents",
    frozenset({"tp", "cp_ulysses"}): _NO_KV_HEAD,
    frozenset({"ddp", "ep"}): "must divide the ranks that it borrows",
    frozenset({"ep", "whole"}): "can be in no graph",
    **{frozenset({technique.name, "tied"}): _SHARED for technique in TECHNIQUES if technique.kind == "pipeline"},
}
"""What cannot work, and a part of the reason given. Everything else must work."""


def find_refusal(row: Row) -> str | None:
    """Return why the program refuses to start such a run; None: it does not."""
    case = row.case
    config = case.config
    problems, _ = find_problems(config, world_size=case.world_size)
    model = Model(case.args, case.spec.build_plan(case.args), "the model of this table")
    problems += find_parallel_model_problems(model, config.parallelism, config.compile)
    return str(problems[0]) if problems else None
