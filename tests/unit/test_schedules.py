"""Pipeline schedules as data: what torch's classes say of them, their order with transfers, and those from a file."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from trainer.config.pipeline_layout import PipelineLayout
from trainer.config.schedule_actions import (
    Action,
    Order,
    build_1f1b_order,
    build_forward_order,
    build_gpipe_order,
    build_timetable,
    join_backward,
    parse_actions,
)
from trainer.config.schedules import get_schedule_spec, list_schedules, place_stages, read_schedule
from trainer.distributed.pipeline_orders import build_order, find_overlapping


def parse(text: str) -> Order:
    """An order, one line for each rank, with blanks between the actions."""
    return [[action for cell in line.split() for action in parse_actions(cell)] for line in text.strip().splitlines()]


def show(order: Order) -> list[str]:
    return [" ".join(map(str, actions)) for actions in order]


def make_layout(name: str, n_ranks: int, stages_per_rank: int) -> PipelineLayout:
    spec = get_schedule_spec(name)
    n_stages = n_ranks * stages_per_rank
    return PipelineLayout(spec, ((),) * n_stages, place_stages(spec.style, n_stages, n_ranks))


def list_layouts() -> list[PipelineLayout]:
    layouts = []
    for name, n_ranks in itertools.product(list_schedules(), (2, 3, 4)):
        per_rank = {"single": (1,), "loop": (2, 3), "v": (2,)}[get_schedule_spec(name).style]
        layouts += [make_layout(name, n_ranks, stages) for stages in per_rank]
    return layouts


LAYOUTS = pytest.mark.parametrize(
    "layout", list_layouts(), ids=lambda layout: f"{layout.schedule.name}-{layout.n_ranks}-{len(layout.stages)}"
)

# --- names ---


@pytest.mark.parametrize("name", list_schedules())
def test_schedules_are_those_of_torch(name: str) -> None:
    schedule_class = get_schedule_class(name)
    assert get_schedule_spec(name.upper()).name == name
    assert issubclass(schedule_class, PipelineScheduleSingle) == (get_schedule_spec(name).style == "single")


def test_alias() -> None:
    assert get_schedule_spec("zbv").name == "ZBVZeroBubble"


def test_unknown_schedule_suggests_a_known_one() -> None:
    with pytest.raises(
        ValueError, match=r"pipeline_parallel_schedule = Interleaved.*Did you mean Interleaved1F1B\? Known: GPipe"
    ):
        get_schedule_spec("Interleaved1F1")


def test_config_needs_no_torch() -> None:
    code = "import sys, trainer.config.pipeline_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize("style", ["loop", "v"])
@pytest.mark.parametrize(("n_ranks", "n_stages"), [(2, 4), (3, 6), (4, 8), (2, 8)])
def test_stages_lie_where_torch_places_them(style: str, n_ranks: int, n_stages: int) -> None:
    expected = generate_stage_to_rank_mapping(n_ranks, n_stages, style=style)
    assert dict(enumerate(place_stages(style, n_stages, n_ranks))) == expected


# --- orders ---


@LAYOUTS
def test_schedule_takes_the_numbers_of_microbatches_that_it_says_and_runs_to_the_end(layout: PipelineLayout) -> None:
    taken = []
    for n_microbatches in range(1, 13):
        try:
            order = build_order(layout, n_microbatches)
        except ValueError:
            continue
        taken.append(n_microbatches)
        _check_whole(order, layout, n_microbatches)
        _check_transfers(build_timetable(order).actions, layout.ranks)
        whole = join_backward(order)
        assert {action.kind for actions in whole for action in actions} == {"F", "B"}
        _check_whole(whole, layout, n_microbatches)
        _check_transfers(build_timetable(whole).actions, layout.ranks)
    rule = layout.schedule.microbatches
    expected = {
        "any": range(1, 13),
        "one a stage": range(len(layout.stages), 13),
        "whole rounds": [n for n in range(1, 13) if n % max(1, n // layout.n_ranks) == 0],
    }
    assert taken == list(expected[rule])


def _check_whole(order: Order, layout: PipelineLayout, n_microbatches: int) -> None:
    for rank, actions in enumerate(order):
        assert len(set(actions)) == len(actions)
        for stage, microbatch in itertools.product(layout.stages_of(rank), range(n_microbatches)):
            kinds = [action.kind for action in actions if (action.stage, action.microbatch) == (stage, microbatch)]
            assert kinds in (["F", "B"], ["F", "I", "W"])
        assert {action.stage for action in actions} == set(layout.stages_of(rank))


def _check_transfers(actions: Order, ranks: tuple[int, ...]) -> None:
    """Run with transfers that both sides must have come to, one by one: the strictest that a backend can be."""
    pending = [list(of_rank) for of_rank in actions]
    done = set()
    while any(pending):
        progressed = False
        for queue in pending:
            while queue and not queue[0].kind.startswith(("SEND", "RECV")):
                action = queue.pop(0)
                for needed in _list_inputs(action, ranks):
                    assert needed in done, f"{action} before {needed}"
                done.add(action)
                progressed = True
        for sender in pending:
            if sender and sender[0].kind.startswith("SEND"):
                stage, kind, microbatch = sender[0]
                neighbour = stage + (1 if kind == "SEND_F" else -1)
                receiver = pending[ranks[neighbour]]
                received = Action(neighbour, kind.replace("SEND", "RECV"), microbatch)
                if receiver and receiver[0] == received:
                    sender.pop(0)
                    done.add(receiver.pop(0))
                    progressed = True
        assert progressed, f"stuck at {[queue[:1] for queue in pending]}"


def _list_inputs(action: Action, ranks: tuple[int, ...]) -> list[Action]:
    stage, kind, microbatch = action
    if kind == "F":
        if stage == 0:
            return []
        return [
            Action(stage - 1, "F", microbatch)
            if ranks[stage - 1] == ranks[stage]
            else Action(stage, "RECV_F", microbatch)
        ]
    if kind == "W" or stage == len(ranks) - 1 or ranks[stage + 1] == ranks[stage]:
        return [] if kind != "W" else [Action(stage, "I", microbatch)]
    return [Action(stage, "RECV_B", microbatch)]


def test_1f1b_holds_few_microbatches() -> None:
    assert show(build_1f1b_order(3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]
    assert show(build_1f1b_order(3, 1)) == ["0F0 0B0", "1F0 1B0", "2F0 2B0"]


def test_gpipe_goes_forward_first() -> None:
    assert show(build_gpipe_order(2, 2)) == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]


def test_transfers_stand_where_they_become_possible() -> None:
    actions = build_timetable(build_1f1b_order(2, 2)).actions
    assert show(actions) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    ]


def test_neighbours_on_one_rank_need_no_transfer() -> None:
    actions = build_timetable(build_order(make_layout("ZBV", 2, 2), 1)).actions
    assert show(actions)[1] == "1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2I0 2W0 1I0 1SEND_B0 1W0"


@pytest.mark.parametrize(("n_ranks", "n_microbatches"), [(2, 4), (4, 8), (4, 16)])
def test_bubble_of_the_simple_schedules(n_ranks: int, n_microbatches: int) -> None:
    expected = (n_ranks - 1) / (n_microbatches + n_ranks - 1)
    for build in (build_gpipe_order, build_1f1b_order):
        assert build_timetable(build(n_ranks, n_microbatches)).bubble == pytest.approx(expected)


def test_zero_bubble_has_less_of_it() -> None:
    order = build_order(make_layout("ZBV", 4, 2), 16)
    apart, at_once = build_timetable(order).bubble, build_timetable(join_backward(order)).bubble
    assert apart < 0.05
    assert 2 * apart < at_once < build_timetable(build_1f1b_order(4, 16)).bubble


@pytest.mark.parametrize(("n_ranks", "n_microbatches"), [(2, 4), (2, 8), (4, 8), (4, 12)])
@pytest.mark.parametrize("joined", [False, True])
def test_overlapping_passes_begin_together_and_send_afterwards(n_ranks: int, n_microbatches: int, joined: bool) -> None:
    layout = make_layout("DualPipeV", n_ranks, 2)
    pairs = find_overlapping(layout, n_microbatches)
    assert pairs
    order = build_order(layout, n_microbatches)
    timetable = build_timetable(join_backward(order) if joined else order, pairs)
    assert timetable.pairs == pairs
    _check_transfers(timetable.actions, layout.ranks)
    for actions in timetable.actions:
        for action, following in itertools.pairwise(actions):
            if action in pairs:
                assert following.kind == "B"
                assert following.stage != action.stage


def test_other_schedules_overlap_nothing() -> None:
    for name, degree, stages in (("ZBV", 2, 2), ("Interleaved1F1B", 2, 2), ("1F1B", 2, 1)):
        assert not find_overlapping(make_layout(name, degree, stages), 4)


@LAYOUTS
def test_forward_passes_alone_fit_any_placement(layout: PipelineLayout) -> None:
    for n_microbatches in (1, 3):
        order = build_forward_order(layout.ranks, n_microbatches)
        assert sum(len(actions) for actions in order) == len(layout.stages) * n_microbatches
        _check_transfers(build_timetable(order).actions, layout.ranks)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    with pytest.raises(ValueError, match="forever: rank 0 with 0B0, rank 1 with 1B1"):
        build_timetable(parse("0F0 0B0 0F1 0B1\n1F0 1B1 1F1 1B0"))


# --- files ---


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "schedule.csv"
    path.write_text(text)
    return path


def test_file_of_torch_is_read(tmp_path: Path) -> None:
    layout = make_layout("DualPipeV", 2, 2)
    placeholders = [
        type("S", (), {"num_stages": 4, "group_size": 2, "group_rank": 0, "submod": None})() for _ in range(2)
    ]
    path = tmp_path / "schedule.csv"
    get_schedule_class("DualPipeV")(placeholders, 4)._dump_csv(path, format="compute_only")
    assert "OVERLAP_F_B" in path.read_text()
    file = read_schedule(path, 2)
    assert show(file.order) == show(build_order(layout, 4))
    assert file.pairs == find_overlapping(layout, 4)
    assert (file.spec.style, file.spec.splits_backward, file.spec.microbatches, file.n_stages) == ("v", True, 4, 4)


def test_file_with_one_stage_a_rank_is_read_with_empty_cells_and_lines(tmp_path: Path) -> None:
    file = read_schedule(write(tmp_path, "0F0,0F1,,0B0,0B1\n\n,1F0,1B0, 1F1 ,1B1\n"), 2)
    assert show(file.order) == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]
    assert (file.spec.style, file.spec.splits_backward, file.spec.microbatches, file.n_stages) == (
        "single",
        False,
        2,
        2,
    )
    with pytest.raises(ValueError, match=r"pipeline_parallel_schedule_csv = .*schedule.csv needs exactly 2"):
        file.spec.check_microbatches(4, n_ranks=2, n_stages=2)


GOOD = "0F0,0B0\n1F0,1B0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n", "pipeline_parallel_degree = 2 needs 2 lines, but it has 1"),
        (GOOD + "2F0,2B0\n", "needs 2 lines, but it has 3"),
        ("0F0,0X0\n1F0,1B0\n", "schedule.csv, line 1, cell 2: '0X0' is no action. Write"),
        ("0F0,0SEND_F0,0B0\n1F0,1B0\n", "line 1, cell 2: '0SEND_F0' is no action.*Transfers are added by the program"),
        ("0F0,0B0\n\n1F0,(1B0;1Z0)OVERLAP_F_B\n", "line 3, cell 2: '1Z0' is no action"),
        ("0F0,0B0,0F0\n1F0,1B0\n", "line 1, cell 3: 0F0 comes after 0F0: each pass is made once"),
        ("0F0,0B0\n1F0,1I0,1W0,1B0\n", "line 2, cell 4: 1B0 comes after 1[IW]0"),
        ("0F0,0B0\n1B0,1F0\n", "line 2, cell 1: 1B0 comes without 1F0 before it"),
        ("0F0,0B0\n1F0,1W0,1I0\n", "line 2, cell 2: 1W0 comes without 1I0 before it"),
        ("0F0,0B0,0F1,0B1\n1F0,1B0\n", "line 2: 1F1 is missing.*2 microbatches"),
        ("0F0,0I0\n1F0,1B0\n", "line 1: 0B0 or 0W0 is missing"),
        ("0F0,0B0,1F0\n1F0,1B0\n", "line 2: stage 1 is in another line already .*line 1"),
        ("0F0,0B0\n2F0,2B0\n", "stage 1 has no action. Stages are numbered from 0 on"),
        (",\n,\n", "stage 0 has no action"),
        ("0F0,1F0,1B0,0B0\n2F0,3F0,3B0,2B0\n", "of ranks 0, 0, 1, 1. They must go through the ranks in a loop"),
        ("1F0,1B0\n0F0,0B0\n", "of ranks 1, 0. They must"),
        ("0F0,0B0,0F1,0B1\n1F0,1B1,1F1,1B0\n", "line 2, cell 2: 1B1 comes without 1F1"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "schedule.csv: the ranks wait for each other forever"),
    ],
)
def test_file_that_is_no_schedule_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_schedule(write(tmp_path, text), 2)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pipeline_parallel_schedule_csv = .*none.csv: cannot be read: "):
        read_schedule(tmp_path / "none.csv", 2)


def test_backward_passes_of_one_stage_are_joined_and_the_others_stay_split() -> None:
    order = parse("0F0 1F0 1I0 0I0 1W0 0W0")
    assert show(join_backward(order, [1])) == ["0F0 1F0 1B0 0I0 0W0"]
    assert show(join_backward(order)) == ["0F0 1F0 1B0 0B0"]
