"""A plan as text for the terminal, and as JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.planner.hardware import GIB
from trainer.planner.memory import PARTS
from trainer.planner.plan import Plan


def format_plan(plan: Plan) -> str:
    """Return the plan as lines of text."""
    sections = (_describe_memory(plan), _describe_speed(plan), _describe_transfers(plan), _describe_notes(plan))
    return "\n\n".join("\n".join(section) for section in map(list, sections) if section)


def format_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the rows with columns of even width, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _describe_memory(plan: Plan) -> Iterator[str]:
    worst = plan.worst
    verdict = "YES, it fits" if plan.fits else "NO, it does not fit"
    yield (
        f"{verdict}: {_gib(plan.needed_bytes)} GiB of the {_gib(plan.gpu_bytes)} GiB of a {plan.gpu}, on {plan.world_size} GPUs"
    )
    yield ""
    yield "GiB at the peak, by what it holds:"
    one = len(plan.ranks) == 1
    rows = [["", *("each GPU" if one else f"rank {rank.pipeline_rank} of pp" for rank in plan.ranks)]]
    rows += [[part, *(_gib(rank.memory.parts[part]) for rank in plan.ranks)] for part in PARTS]
    rows.append(["in use", *(_gib(rank.memory.allocated) for rank in plan.ranks)])
    rows.append(["reserved by the allocator", *(_gib(rank.memory.reserved) for rank in plan.ranks)])
    rows.append(["context and NCCL (assumed)", *(_gib(plan.other_bytes) for _ in plan.ranks)])
    rows.append(["the peak comes in", *(rank.memory.phase for rank in plan.ranks)])
    yield from format_table(rows)
    for rank in plan.ranks:
        if not one:
            more = f" (stands for ranks {rank.stands_for})" if rank.stands_for else ""
            yield f"rank {rank.pipeline_rank} of pp has {rank.layers}{more}"
    if not plan.fits:
        yield ""
        yield f"What to change, by what takes most on rank {worst.pipeline_rank}:"
        yield from (f"  - {advice}" for advice in list_advice(plan))


_ADVICE = {
    "activations": (
        "activations: --activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op (or mode full), a smaller "
        "training.local_batch_size, or a larger parallelism.context_parallel_degree or tensor_parallel_degree"
    ),
    "parameters": "parameters: more GPUs to shard over (data_parallel_shard_degree = -1), or a larger tensor or pipeline degree",
    "optimizer": "optimizer states: more GPUs to shard over, a larger tensor or pipeline degree, or training.dtype = bfloat16",
    "gradients": "gradients: more GPUs to shard over, or parallelism.fsdp_accumulation = sharded",
    "gathered weights": "gathered weights: parallelism.fsdp_reshard_after_forward = always, or a larger tensor parallel degree",
    "communication": "communication buffers: a larger tensor parallel degree makes the units smaller that FSDP gathers",
    "working memory": "working memory: a smaller training.local_batch_size or loss_chunk_size, or compile.enable",
}


def list_advice(plan: Plan) -> list[str]:
    """Return what to change where memory does not suffice: the two largest parts first, and the search."""
    parts = plan.worst.memory.parts
    largest = sorted(parts, key=lambda part: -parts[part])[:2]
    return [*(_ADVICE[part] for part in largest), "or let --job.plan_search look for layouts that fit"]


def _describe_speed(plan: Plan) -> Iterator[str]:
    yield (
        f"{plan.tokens_per_second:,.0f} tokens/s per GPU, {plan.step_seconds:.3f} s a step, MFU {100 * plan.mfu:.1f}% "
        f"({plan.flops_per_token / 1e9:.2f} GFLOP a token, {plan.parameters:,} parameters)"
    )
    total = sum(plan.busy_seconds.values())
    rows = [["ms of one rank's kernels in a step", "", ""]]
    for kind, seconds in sorted(plan.busy_seconds.items(), key=lambda entry: -entry[1]):
        rows.append([f"  {kind}", f"{1e3 * seconds:.1f}", f"{100 * seconds / total:.0f}%"])
    yield from format_table(rows)
    yield f"waiting for collectives that nothing hides: {1e3 * plan.exposed_seconds:.1f} ms"
    if plan.bubble:
        yield f"pipeline: {100 * plan.bubble:.0f}% of the time waiting"


def _describe_transfers(plan: Plan) -> Iterator[str]:
    if not plan.transfers:
        return
    rows = [["collectives of one rank", "over", "ranks", "count", "GiB", "ms", "network"]]
    for entry in plan.transfers:
        network = "hosts" if entry.crosses_hosts else "NVLink"
        cells = [f"{entry.degree}", f"{entry.count}", f"{entry.bytes / GIB:.3f}", f"{1e3 * entry.seconds:.1f}"]
        rows.append([f"  {entry.kind}", entry.axis, *cells, network])
    yield from format_table(rows)


def _describe_notes(plan: Plan) -> Iterator[str]:
    yield from (f"note: {note}" for note in plan.notes)


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data: bytes, seconds, FLOPs, tokens."""
    ranks = [
        # Before the copy, which would take longer than all else: a long curve has 100,000 points.
        dataclasses.replace(rank, memory=dataclasses.replace(rank.memory, curve=_thin_out(rank.memory.curve)))
        for rank in plan.ranks
    ]
    data = dataclasses.asdict(dataclasses.replace(plan, ranks=ranks))
    data |= {"fits": plan.fits, "needed_bytes": plan.needed_bytes}
    for rank in data["ranks"]:
        rank["memory"]["curve"] = [{"seconds": seconds, **parts} for seconds, parts in rank["memory"]["curve"]]
    return data


def _thin_out(curve: list[Any], most: int = 500) -> list[Any]:
    """Keep every nth point of a long curve."""
    return curve[:: max(1, len(curve) // most)]
