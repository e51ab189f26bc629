"""What is said of a plan."""

import json

import pytest

from tests.unit.planner.plans import make_made_up_plan
from trainer.planner.chart import draw_memory
from trainer.planner.report import format_plan, to_json


def test_plan_that_fits_says_yes_and_carries_all_parts():
    text = format_plan(make_made_up_plan())
    assert text.startswith("YES, it fits: 11.00 GiB of the 140.00 GiB of a H200, on 8 GPUs")
    assert "What to change" not in text
    for words in ("activations", "reserved by the allocator", "all-gather", "fsdp", "MFU 50.0%"):
        assert words in text


def test_plan_that_does_not_fit_says_what_to_change():
    plan = make_made_up_plan(needed=150)
    plan.ranks[0].memory.parts["activations"] *= 5
    text = format_plan(plan)
    assert text.startswith("NO, it does not fit")
    assert "--activation_checkpoint.mode selective" in text
    assert "--job.plan_search" in text


def test_json_says_the_same():
    data = json.loads(json.dumps(to_json(make_made_up_plan())))
    assert data["fits"] is True
    assert data["ranks"][0]["memory"]["curve"][1]["activations"] == 0
    assert data["transfers"][0]["axis"] == "fsdp"


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw_memory(make_made_up_plan(), tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
