"""What is typed for a part that is switched off."""

import fnmatch

import pytest

from trainer.config.fields import get_leaves
from trainer.config.manager import COMMAND_LINE, load_config
from trainer.config.switches import SWITCHES, find_switched_off


def find(*argv: str) -> list[str]:
    loaded = load_config(argv)
    assert loaded.problems == []
    typed = [key for key, origin in loaded.origins.items() if origin == COMMAND_LINE]
    return [str(problem) for problem in find_switched_off(loaded.config, typed)]


@pytest.mark.parametrize("switch", SWITCHES)
def test_keys_are_those_of_the_schema(switch):
    assert switch.key in get_leaves()
    assert all(fnmatch.filter(get_leaves(), glob) for glob in switch.others)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--checkpoint.interval=7"], "checkpoint.interval = 7 has no effect: checkpoint.enable = false."),
        (["--validation.freq=7"], "validation.freq = 7 has no effect: validation.enable = false."),
        (["--compile.backend=eager"], "compile.backend = eager has no effect: compile.enable = false."),
        (
            ["--profiling.profile_freq=7"],
            "profiling.profile_freq = 7 has no effect: profiling.enable_profiling = false.",
        ),
        (["--optimizer.muon.lr=0.1"], "optimizer.muon.lr = 0.1 has no effect: optimizer.name = AdamW."),
        (
            ["--activation_checkpoint.mode=full", "--activation_checkpoint.selective_ac_option=op"],
            "activation_checkpoint.selective_ac_option = op has no effect: activation_checkpoint.mode = full.",
        ),
    ],
)
def test_setting_that_is_typed_in_vain_is_named(argv, expected):
    assert find(*argv) == [expected]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--checkpoint.enable", "--checkpoint.interval=7"],
        ["--checkpoint.enable=false", "--validation.enable=false"],
        ["--optimizer.name=Muon", "--optimizer.muon.lr=0.1"],
        ["--optimizer.name=mine", "--optimizer.muon.lr=0.1"],
        ["--profiling.enable_memory_snapshot", "--profiling.profile_freq=7"],
        ["--activation_checkpoint.mode=none", "--activation_checkpoint.selective_ac_option=2"],
    ],
)
def test_setting_that_counts_or_is_the_default_is_not(argv):
    assert find(*argv) == []
