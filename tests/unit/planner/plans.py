"""Plans that are made up, for tests of what is made of them."""

from trainer.planner.hardware import GIB
from trainer.planner.memory import PARTS, Memory
from trainer.planner.plan import Plan, RankPlan, TransferPlan


def make_made_up_plan(*, speed: float = 1000.0, needed: float = 10, world_size: int = 8) -> Plan:
    """Return a plan that needs so many GiB on a GPU of 140."""
    parts = {part: int(needed * GIB / len(PARTS)) for part in PARTS}
    curve = [(0.0, parts), (0.5, {**parts, "activations": 0})]
    memory = Memory(int(needed * GIB), int(needed * GIB), parts, "forward", curve)
    return Plan(
        world_size=world_size,
        gpu="H200",
        gpu_bytes=140 * GIB,
        ranks=[RankPlan(0, memory, "layers 0 to 3")],
        other_bytes=GIB,
        step_seconds=1.0,
        tokens_per_second=speed,
        mfu=0.5,
        flops_per_token=1e9,
        executed_flops=1e12,
        busy_seconds={"matmul": 0.8, "memory": 0.1},
        exposed_seconds=0.01,
        bubble=0.0,
        transfers=[TransferPlan("fsdp", "all-gather", 8, 2, GIB, 0.01, crosses_hosts=False)],
        parameters=1000,
    )
