"""What SimpleFSDP does not go with, and torchtitan's spellings of it."""

import pytest

from tests.unit.config.test_validate_parallel import PP, TP, find
from trainer.config.manager import load_config
from trainer.config.validate import find_problems

SIMPLE = {"parallelism.data_parallel_implementation": "simple_fsdp"}
COMPILE = {"compile.enable": "true"}
WHOLE = {**COMPILE, "compile.scope": "model"}
FLOAT8 = {"model.converters": '["float8"]'}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({**SIMPLE, "training.enable_cpu_offload": "true"}, "training.enable_cpu_offload"),
        ({**SIMPLE, "parallelism.fsdp_collectives": "copy_engine"}, "parallelism.fsdp_collectives"),
        ({**SIMPLE, "parallelism.fsdp_accumulation": "unsharded"}, "parallelism.fsdp_accumulation"),
        ({**SIMPLE, "training.gradient_wire_dtype": "float8"}, "training.gradient_wire_dtype"),
        (
            {**SIMPLE, **COMPILE, TP: 2, "parallelism.enable_async_tensor_parallel": "true"},
            "parallelism.enable_async_tensor_parallel",
        ),
        ({**COMPILE, "compile.backend": "aot_eager_autobucketing"}, "compile.backend"),
        ({**COMPILE, "compile.graph_passes": "transformer_block_bucketing"}, "compile.graph_passes"),
        ({**COMPILE, "compile.scope": "model"}, "compile.scope"),
        ({**SIMPLE, **COMPILE, "compile.scope": "model", "parallelism.expert_parallel_degree": 2}, "compile.scope"),
        (
            {**SIMPLE, **COMPILE, "compile.backend": "eager", "compile.graph_passes": "auto_bucketing"},
            "compile.graph_passes",
        ),
        (
            {
                **SIMPLE,
                **COMPILE,
                "compile.backend": "inductor_autobucketing",
                "compile.graph_passes": "transformer_block_bucketing",
            },
            "compile.backend",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(settings, key):
    (problem,), _ = find(settings)
    assert problem.startswith(key)


@pytest.mark.parametrize(
    "settings",
    [
        {**SIMPLE, **WHOLE, "compile.backend": "inductor_autobucketing"},
        {**SIMPLE, **WHOLE, "compile.graph_passes": "transformer_block_bucketing"},
        {**SIMPLE, **COMPILE, "parallelism.expert_parallel_degree": 2},
        {**SIMPLE, "parallelism.fsdp_reshard_after_forward": "never"},
        {**SIMPLE, PP: 2},
        {**SIMPLE, **WHOLE, **FLOAT8, "parallelism.fsdp_collectives": "auto"},
    ],
)
def test_what_goes_together_is_accepted_in_silence(settings):
    assert find(settings) == ([], [])


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        (SIMPLE, "without compile.enable keeps all gathered weights"),
        ({**SIMPLE, **WHOLE, "parallelism.fsdp_prefetch": 1}, "parallelism.fsdp_prefetch = 1 has no effect"),
        ({**SIMPLE, **COMPILE}, "nothing hides that"),
    ],
)
def test_what_does_less_than_it_looks_is_warned_of(settings, warning):
    problems, (found,) = find(settings)
    assert problems == []
    assert warning in found


def test_commands_of_torchtitan_are_understood():
    argv = [
        "--model.name=simple_fsdp.deepseek_v3",
        "--compile.enable",
        "--job.custom_config_module=torchtitan.experiments.simple_fsdp.job_config",
        "--compile.model_backend_override=aot_eager_autobucketing",
    ]
    loaded = load_config(argv)
    problems, _ = find_problems(loaded.config, world_size=None)
    assert [*loaded.problems, *problems] == []
    assert loaded.config.compile.get_backend() == ("aot_eager", "auto_bucketing")
    assert loaded.config.compile.backend == "inductor", "the loss keeps its own"


def test_prefix_of_the_models_name_chooses_the_implementation():
    loaded = load_config(["--model.name", "simple_fsdp.llama3"])
    assert loaded.problems == []
    assert loaded.config.model.name == "llama3"
    assert loaded.config.parallelism.data_parallel_implementation == "simple_fsdp"
    assert loaded.origins["parallelism.data_parallel_implementation"] == "command line"


@pytest.mark.parametrize(
    ("backend", "passes", "expected"),
    [
        ("inductor", "none", ("inductor", "none")),
        ("aot_eager", "transformer_block_bucketing", ("aot_eager", "transformer_block_bucketing")),
        ("aot_eager_autobucketing", "none", ("aot_eager", "auto_bucketing")),
        ("inductor_autobucketing", "auto_bucketing", ("inductor", "auto_bucketing")),
    ],
)
def test_backends_with_passes_have_names(backend, passes, expected):
    config = load_config([f"--compile.backend={backend}", f"--compile.graph_passes={passes}"]).config
    assert config.compile.get_backend() == expected
