"""Turn an accelerate configuration for float8 (YAML with `fp8_config`) into settings of this trainer, and name what has no counterpart.

    python scripts/convert_accelerate.py config.yaml --out float8.toml
    ./run_train.sh --job.config_file my_model.toml ...           # with `extends = "float8.toml"` in it

The back ends of accelerate become recipes here: TE (TransformerEngine) delayed scaling, or with `--keep-te` TransformerEngine itself;
AO (torchao) `tensorwise`; MSAMP its level. What the TOML does not say stays as accelerate's script or the model has it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # comes with datasets

SECTION = "quantize.linear.float8"
Settings = dict[str, Any]
"""By dotted key."""


class Conversion:
    """What became of the keys of one file."""

    def __init__(self) -> None:
        self.settings: Settings = {}
        self.missing: list[str] = []
        """Keys without a counterpart, with their values, and what that means."""

    def set_float8(self, **values: Any) -> None:
        """Set keys of the section of float8."""
        self.settings |= {f"{SECTION}.{name}": value for name, value in values.items()}

    def miss(self, key: str, value: Any, meaning: str) -> None:
        """Note a key without a counterpart."""
        self.missing.append(f"{key} = {value}: {meaning}")


def read_flag(value: Any) -> bool:
    """Return a boolean of YAML, or one that was written as a string."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def read_flags(value: Any) -> list[bool]:
    """Return the booleans of a YAML list, or of `(false, false, false)`, which YAML takes for a string."""
    return [read_flag(word) for word in (value.strip("()[] ").split(",") if isinstance(value, str) else value)]


def convert_te(fp8: Mapping[str, Any], to: Conversion, *, keeps_te: bool) -> None:
    """TransformerEngine's delayed scaling."""
    to.set_float8(
        recipe_name="delayed",
        amax_history_len=int(fp8.get("amax_history_len", 1024)),
        amax_compute_algo=str(fp8.get("amax_compute_algo", "most_recent")),
        margin=int(fp8.get("margin", 0)),
    )
    if keeps_te:
        to.set_float8(backend="te")
        to.settings["activation_checkpoint.mode"] = "none"
    else:
        to.settings["compile.enable"] = True  # without, float8 is slower than bfloat16
    if str(fp8.get("fp8_format", "HYBRID")).upper() != "HYBRID":
        to.miss("fp8_config.fp8_format", fp8["fp8_format"], "delayed scaling has e4m3, and e5m2 for gradients (HYBRID)")
    if int(fp8.get("interval", 1)) != 1:
        to.miss("fp8_config.interval", fp8["interval"], "scales are set anew after each step (1)")
    if any(read_flags(fp8.get("override_linear_precision", []))):
        to.miss(
            "fp8_config.override_linear_precision",
            fp8["override_linear_precision"],
            "all three products are in float8; recipe_name = rowwise_with_gw_hp has gradients of weights in high precision",
        )
    if not read_flag(fp8.get("use_autocast_during_eval", False)):
        to.miss("fp8_config.use_autocast_during_eval", False, "validation, too, multiplies in float8")
    if read_flag(fp8.get("use_mxfp8_block_scaling", False)):
        to.miss("fp8_config.use_mxfp8_block_scaling", True, "MX formats are not available")


def convert_ao(fp8: Mapping[str, Any], to: Conversion) -> None:
    """torchao's recipe by tensor. accelerate keeps the first and the last linear layer; the last is always kept here."""
    to.set_float8(recipe_name=str(fp8.get("recipe_name", "tensorwise")), filter_fqns=["layers.0.attention.wq"])
    to.settings["compile.enable"] = True
    for name in ("pad_inner_dim", "enable_fsdp_float8_all_gather"):
        if name in fp8:
            to.set_float8(**{name: read_flag(fp8[name])})
    if read_flag(fp8.get("enable_fsdp_float8_all_gather", False)):
        to.set_float8(precompute_float8_dynamic_scale_for_fsdp=True)


def convert_msamp(fp8: Mapping[str, Any], to: Conversion) -> None:
    """MS-AMP's levels."""
    level = str(fp8.get("opt_level", fp8.get("optimization_level", "O2"))).upper()
    to.set_float8(recipe_name="tensorwise", fp8_opt_level=level)
    to.settings["compile.enable"] = True


_KNOWN = {
    "TE": {"amax_history_len", "amax_compute_algo", "margin", "fp8_format", "interval", "override_linear_precision"}
    | {"use_autocast_during_eval", "use_mxfp8_block_scaling"},
    "AO": {"recipe_name", "pad_inner_dim", "enable_fsdp_float8_all_gather"},
    "MSAMP": {"opt_level", "optimization_level"},
}


def convert_fsdp(section: Mapping[str, Any], to: Conversion) -> None:
    """What of `fsdp_config` says how to compute, and not how to start."""
    counterparts: dict[str, Callable[[Any], Settings]] = {
        "fsdp_activation_checkpointing": lambda on: {"activation_checkpoint.mode": "full" if on else "none"},
        "fsdp_offload_params": lambda on: {"training.enable_cpu_offload": bool(on)},
        "fsdp_reshard_after_forward": lambda on: {
            "parallelism.fsdp_reshard_after_forward": "always" if on else "never"
        },
    }
    same = {"fsdp_version": "FSDP2 is all there is", "fsdp_auto_wrap_policy": "each block is a unit"}
    same |= {"fsdp_cpu_ram_efficient_loading": "weights are made on the meta device"}
    for name, value in section.items():
        if name in counterparts and str(value).lower() in ("true", "false"):
            to.settings |= counterparts[name](read_flag(value))
        else:
            to.miss(f"fsdp_config.{name}", value, same.get(name, "nothing of this kind"))


def convert_dynamo(section: Mapping[str, Any], to: Conversion) -> None:
    """What of `dynamo_config` has a counterpart: compilation, which is always by blocks."""
    # YAML takes NO for false.
    backend = str(section.get("dynamo_backend") or "no").lower()
    to.settings["compile.enable"] = backend != "no"
    if backend != "no":
        to.settings["compile.backend"] = backend
    for name, value in section.items():
        if name == "dynamo_use_regional_compilation" and not read_flag(value):
            to.miss(f"dynamo_config.{name}", value, "compilation is always by blocks")
        elif name not in ("dynamo_backend", "dynamo_use_regional_compilation"):
            to.miss(f"dynamo_config.{name}", value, "nothing of this kind")


def convert(config: Mapping[str, Any], *, keeps_te: bool = False) -> Conversion:
    """Return the settings of a whole file.

    Raises:
        ValueError: it says nothing of float8, or names an unknown back end.
    """
    fp8 = config.get("fp8_config")
    if not isinstance(fp8, dict):
        raise ValueError("there is no fp8_config in it")
    backend = str(fp8.get("backend", "TE")).upper()
    if backend not in _KNOWN:
        raise ValueError(f"fp8_config.backend = {fp8['backend']}: is none of {', '.join(_KNOWN)}")
    to = Conversion()
    to.settings["model.converters"] = [SECTION]
    to.settings["training.mixed_precision_param"] = "bfloat16"
    if backend == "TE":
        convert_te(fp8, to, keeps_te=keeps_te)
    elif backend == "AO":
        convert_ao(fp8, to)
    else:
        convert_msamp(fp8, to)
    for name in fp8.keys() - _KNOWN[backend] - {"backend"}:
        to.miss(f"fp8_config.{name}", fp8[name], f"nothing of this kind for {backend}")
    convert_fsdp(config.get("fsdp_config") or {}, to)
    if config.get("dynamo_config"):
        convert_dynamo(config["dynamo_config"], to)
    if config.get("mixed_precision", "fp8") != "fp8":
        to.miss(
            "mixed_precision",
            config["mixed_precision"],
            "accelerate reads fp8_config with fp8 alone. Float8 is on here",
        )
    for name, value in config.items():
        if name not in ("fp8_config", "fsdp_config", "dynamo_config", "mixed_precision"):
            to.miss(name, value, "how a run is started is said to run_train.sh (see the README)")
    return to


def format_toml(conversion: Conversion, source: str) -> str:
    """Return the settings as TOML, and what has no counterpart as comments."""
    lines = [f"# Made from {source} by scripts/convert_accelerate.py."]
    lines += [f"# Without counterpart: {line}" for line in sorted(conversion.missing)]
    sections: dict[str, list[str]] = {}
    for key, value in conversion.settings.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {json.dumps(value)}")  # JSON's scalars and lists are TOML's
    for section, entries in sorted(sections.items()):
        lines += ["", f"[{section}]", *entries]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for a file that cannot be converted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="accelerate's YAML")
    parser.add_argument("--out", type=Path, help="file for the TOML; default: standard output")
    parser.add_argument("--keep-te", action="store_true", help="keep TransformerEngine, where the file has it")
    args = parser.parse_args(argv)
    try:
        config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
        conversion = convert(config if isinstance(config, dict) else {}, keeps_te=args.keep_te)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"{args.config}: {error}", file=sys.stderr)
        return 2
    for line in sorted(conversion.missing):
        print(f"without counterpart: {line}", file=sys.stderr)
    text = format_toml(conversion, args.config.name)
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
