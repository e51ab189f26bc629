"""Moments in low precision, and what they do not go with."""

import pytest

from tests.unit.config.test_validate_quantize import find


@pytest.mark.parametrize("settings", [{"optimizer.state_dtype": "bfloat16"}, {"optimizer.state_dtype": "float8", "optimizer.name": "Adam"}, {"optimizer.name": "AdamW4bit"}])  # fmt: skip
def test_moments_in_low_precision_are_accepted(settings):
    assert find(settings) == ([], [])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optimizer.state_dtype": "bfloat16", "optimizer.name": "Muon"}, "Muon has states of its own. Leave it out"),
        ({"optimizer.state_dtype": "float8", "optimizer.name": "AdamW8bit"}, "is for the moments of AdamW and Adam"),
        ({"optimizer.name": "AdamWFp8", "optimizer.implementation": "foreach"}, "AdamWFp8: has one implementation"),
        ({"optimizer.state_dtype": "bfloat16", "training.enable_cpu_offload": True}, "no fast kernel on the host"),
        (
            {"optimizer.state_dtype": "float32", "training.dtype": "bfloat16", "optimizer.implementation": "for-loop"},
            "state_dtype = float32: has one implementation",
        ),
    ],
)
def test_what_moments_in_low_precision_do_not_go_with_is_refused(settings, expected):
    (problem,), _ = find(settings)
    assert expected in problem


def test_moments_in_the_dtype_of_the_parameters_go_with_everything():
    settings = {"optimizer.implementation": "foreach", "training.enable_cpu_offload": True}
    assert find(settings | {"optimizer.state_dtype": "float32"}) == ([], [])
