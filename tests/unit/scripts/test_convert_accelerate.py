"""accelerate's settings of float8: those of its documentation become a run's that is valid, and nothing is lost in silence."""

from pathlib import Path

import pytest

from scripts.convert_accelerate import SECTION, convert, main
from trainer.config.fields import get_leaves
from trainer.config.manager import load_config
from trainer.config.validate import find_problems

TE = """
mixed_precision: fp8
fp8_config:
    amax_compute_algo: max
    amax_history_len: 1024
    backend: TE
    fp8_format: HYBRID
    interval: 1
    margin: 0
    override_linear_precision: (false, false, false)
    use_autocast_during_eval: false
"""
AO = """
mixed_precision: fp8
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
  fsdp_version: 2
  fsdp_reshard_after_forward: true
fp8_config:
  backend: AO
  pad_inner_dim: true
  enable_fsdp_float8_all_gather: true
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_use_regional_compilation: true
num_processes: 8
"""


def run(tmp_path: Path, text: str, *options: str) -> dict[str, object]:
    """Convert, check the result as a run would, and return the settings."""
    source, out = tmp_path / "accelerate.yaml", tmp_path / "float8.toml"
    source.write_text(text)
    assert main([str(source), "--out", str(out), *options]) == 0
    loaded = load_config(["--job.config_file", str(out)])
    assert [str(problem) for problem in loaded.problems] == []
    problems, warnings = find_problems(loaded.config, world_size=None)
    assert [*map(str, problems), *map(str, warnings)] == []
    import tomllib

    flat: dict[str, object] = {}

    def flatten(prefix: str, table: dict) -> None:
        for name, value in table.items():
            flatten(f"{prefix}{name}.", value) if isinstance(value, dict) else flat.update({prefix + name: value})

    flatten("", tomllib.loads(out.read_text()))
    return flat


def test_transformer_engine_becomes_delayed_scaling(tmp_path, capsys):
    settings = run(tmp_path, TE)
    assert settings == {
        "model.converters": [SECTION],
        "training.mixed_precision_param": "bfloat16",
        "compile.enable": True,
        f"{SECTION}.recipe_name": "delayed",
        f"{SECTION}.amax_history_len": 1024,
        f"{SECTION}.amax_compute_algo": "max",
        f"{SECTION}.margin": 0,
    }
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("without counterpart: fp8_config.use_autocast_during_eval = False")


def test_transformer_engine_can_be_kept(tmp_path):
    settings = run(tmp_path, TE, "--keep-te")
    assert settings[f"{SECTION}.backend"] == "te"
    assert "compile.enable" not in settings


def test_torchao_becomes_tensorwise_with_its_fsdp_and_compiler(tmp_path, capsys):
    settings = run(tmp_path, AO)
    assert settings[f"{SECTION}.recipe_name"] == "tensorwise"
    for name in ("pad_inner_dim", "enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp"):
        assert settings[f"{SECTION}.{name}"] is True
    assert (settings["compile.enable"], settings["compile.backend"]) == (True, "inductor")
    assert settings["parallelism.fsdp_reshard_after_forward"] == "always"
    missing = [line.split(" = ")[0].split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    names = ("auto_wrap_policy", "cpu_ram_efficient_loading", "version")
    assert missing == [*(f"fsdp_config.fsdp_{name}" for name in names), "num_processes"]


def test_what_has_no_counterpart_is_named():
    fp8 = {"backend": "te", "fp8_format": "E4M3", "interval": 2, "override_linear_precision": "(false, false, true)"}
    fp8 |= {"use_mxfp8_block_scaling": True, "use_autocast_during_eval": True, "novel": 1}
    dynamo = {"dynamo_backend": "NO", "dynamo_mode": "default", "dynamo_use_regional_compilation": False}
    conversion = convert({"fp8_config": fp8, "dynamo_config": dynamo})
    keys = {line.split(" = ")[0].rpartition(".")[2] for line in conversion.missing}
    assert keys == (fp8.keys() | dynamo.keys()) - {"backend", "dynamo_backend", "use_autocast_during_eval"}
    assert conversion.settings["compile.enable"] is False
    unquoted = convert({"fp8_config": {}, "dynamo_config": {"dynamo_backend": False}})
    assert unquoted.settings["compile.enable"] is False


def test_flags_may_be_strings_and_float8_that_was_off_is_told():
    fp8 = {"backend": "AO", "enable_fsdp_float8_all_gather": "false", "pad_inner_dim": "True"}
    fsdp = {"fsdp_activation_checkpointing": "true", "fsdp_reshard_after_forward": "SHARD_GRAD_OP"}
    conversion = convert({"mixed_precision": "bf16", "fp8_config": fp8, "fsdp_config": fsdp})
    assert conversion.settings[f"{SECTION}.enable_fsdp_float8_all_gather"] is False
    assert f"{SECTION}.precompute_float8_dynamic_scale_for_fsdp" not in conversion.settings
    assert conversion.settings[f"{SECTION}.pad_inner_dim"] is True
    assert conversion.settings["activation_checkpoint.mode"] == "full"
    keys = [line.split(" = ")[0] for line in conversion.missing]
    assert keys == ["fsdp_config.fsdp_reshard_after_forward", "mixed_precision"]


def test_ms_amps_level_is_kept():
    conversion = convert({"fp8_config": {"backend": "MSAMP", "opt_level": "O1"}})
    assert conversion.settings[f"{SECTION}.fp8_opt_level"] == "O1"
    assert conversion.settings.keys() - {f"{SECTION}.fp8_opt_level"} <= get_leaves().keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: 1", "no fp8_config"), ("fp8_config: {backend: XLA}", "XLA: is none of TE"), ("a: [", "while parsing")],
)
def test_file_that_cannot_be_converted_is_refused(tmp_path, capsys, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    assert main([str(tmp_path / "bad.yaml")]) == 2
    assert expected in capsys.readouterr().err
