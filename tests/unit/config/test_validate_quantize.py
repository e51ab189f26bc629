"""Settings of float8 that do not go with each other or with the rest."""

import pytest

from trainer.config.manager import load_config
from trainer.config.validate import find_problems

FLOAT8 = "quantize.linear.float8"
ON = {"model.converters": FLOAT8, "compile.enable": True}


def find(settings):
    loaded = load_config([f"--{key}={value}" for key, value in settings.items()])
    assert [str(p) for p in loaded.problems] == []
    problems, warnings = find_problems(loaded.config, world_size=None)
    return [str(p) for p in problems], [str(w) for w in warnings]


@pytest.mark.parametrize("name", [FLOAT8, "float8", f"{FLOAT8},float8"])
@pytest.mark.parametrize("recipe", ["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_either_name_and_every_recipe_is_accepted(name, recipe):
    assert find(ON | {"model.converters": name, f"{FLOAT8}.recipe_name": recipe}) == ([], [])


@pytest.mark.parametrize("name", ["quantize.linear.mx", "fp8", "quantize.grouped_mm.mx,float8"])
def test_other_conversion_is_refused(name):
    (problem,), _ = find({"model.converters": name})
    assert "there are quantize.linear.float8 (or float8, for short) and quantize.grouped_mm.float8" in problem


def test_experts_are_converted_by_a_name_of_their_own():
    experts = {"quantize.grouped_mm.float8.fqns": "experts", "quantize.grouped_mm.float8.emulate": True}
    assert find({"model.converters": "quantize.grouped_mm.float8"} | experts) == ([], [])
    problems, warnings = find(ON | experts)
    assert not problems
    assert len(warnings) == 2
    assert all("does not name quantize.grouped_mm.float8" in warning for warning in warnings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({f"{FLOAT8}.recipe_name": "rowwise", f"{FLOAT8}.enable_fsdp_float8_all_gather": True}, "Use tensorwise, or"),
        (
            {f"{FLOAT8}.recipe_name": "rowwise_with_gw_hp", f"{FLOAT8}.enable_fsdp_float8_all_gather": True},
            "needs one scale for each weight",
        ),
        (
            {f"{FLOAT8}.enable_fsdp_float8_all_gather": True, "training.enable_cpu_offload": True},
            "cast on the host. Set one of them to false",
        ),
        ({"training.seq_len": 1023, "training.local_batch_size": 1}, "1023 tokens must be a multiple of 16"),
        ({f"{FLOAT8}.recipe_name": "rowwise", f"{FLOAT8}.scaling_type_weight": "delayed"}, "has one for each row. Use"),
        (
            {f"{FLOAT8}.scaling_type_weight": "static"},
            "no scale is given. Set quantize.linear.float8.static_scale_weight",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, expected):
    (problem,), _ = find(ON | settings)
    assert expected in problem


def test_transformer_engine_does_little_else():
    te = ON | {"compile.enable": False, f"{FLOAT8}.backend": "te", "activation_checkpoint.mode": "none"}
    assert find(te) == find(te | {f"{FLOAT8}.recipe_name": "delayed", f"{FLOAT8}.margin": 1}) == ([], [])
    wrong = {"compile.enable": True, "activation_checkpoint.mode": "full", "parallelism.tensor_parallel_degree": 2}
    wrong |= {f"{FLOAT8}.recipe_name": "rowwise", f"{FLOAT8}.measure_freq": 5, f"{FLOAT8}.emulate": True}
    problems, _ = find(te | wrong)
    assert len(problems) == len(wrong)
    assert all(f"{FLOAT8}.backend" in problem and "native" in problem for problem in problems)


@pytest.mark.parametrize("way_out", [{f"{FLOAT8}.pad_inner_dim": True}, {f"{FLOAT8}.emulate": True}])
def test_odd_number_of_tokens_has_a_way_out(way_out):
    assert find(ON | {"training.seq_len": 1023, "training.local_batch_size": 1} | way_out) == ([], [])


def test_float8_that_is_slower_than_bf16_is_warned_about():
    _, (warning,) = find({"model.converters": FLOAT8})
    assert "slower than bfloat16. Set compile.enable = true" in warning
    _, (warning,) = find(ON | {"compile.components": "loss"})
    assert "slower" in warning
    assert find({"model.converters": FLOAT8, f"{FLOAT8}.emulate": True}) == ([], [])


def test_settings_without_effect_are_warned_about():
    _, (warning,) = find({f"{FLOAT8}.emulate": True})
    assert f"model.converters does not name {FLOAT8}" in warning
    _, (warning,) = find(ON | {f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp": True})
    assert "no effect without" in warning
    _, warnings = find(ON | {f"{FLOAT8}.margin": 1, f"{FLOAT8}.static_scale_input": 2.0})
    assert len(warnings) == 2
    delayed = {f"{FLOAT8}.recipe_name": "delayed", f"{FLOAT8}.margin": 1, f"{FLOAT8}.amax_compute_algo": "most_recent"}
    assert find(ON | delayed | {f"{FLOAT8}.enable_fsdp_float8_all_gather": True}) == ([], [])
    mixed = {f"{FLOAT8}.scaling_type_input": "static", f"{FLOAT8}.static_scale_input": 2.0}
    assert find(ON | mixed) == ([], [])


@pytest.mark.parametrize(("level", "state_dtype"), [("O1", None), ("O2", "float8")])
def test_opt_level_stands_for_settings_of_other_sections(level, state_dtype):
    settings = ON | {f"{FLOAT8}.fp8_opt_level": level}
    loaded = load_config([f"--{key}={value}" for key, value in settings.items()])
    assert loaded.config.training.gradient_wire_dtype == "float8"
    assert loaded.config.optimizer.state_dtype == state_dtype
    assert loaded.origins["training.gradient_wire_dtype"] == "command line"
    assert find(settings) == ([], [])


def test_opt_level_with_another_value_of_what_it_means_is_a_problem():
    settings = ON | {f"{FLOAT8}.fp8_opt_level": "O2", "optimizer.state_dtype": "bfloat16"}
    (problem,) = load_config([f"--{key}={value}" for key, value in settings.items()]).problems
    assert "fp8_opt_level = O2: means optimizer.state_dtype = float8, and bfloat16 is given" in str(problem)


def test_opt_level_without_the_converter_has_no_effect():
    loaded = load_config([f"--{FLOAT8}.fp8_opt_level=O2"])
    assert loaded.config.training.gradient_wire_dtype is None
    _, (warning,) = find({f"{FLOAT8}.fp8_opt_level": "O2"})
    assert "fp8_opt_level = O2 has no effect" in warning
