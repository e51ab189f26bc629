"""What is settled before a rank's step is run on fake tensors."""

from pathlib import Path

import pytest

from trainer.config.manager import load_config
from trainer.planner.hardware import GPUS
from trainer.planner.settings import settle_float8

DEBUG_CONFIG = Path(__file__).resolve().parents[3] / "train_configs" / "debug_llama3.toml"
FLOAT8 = "--quantize.linear.float8"


@pytest.mark.parametrize(("gpu", "table"), [("H200", "h200.csv"), ("H100", "h100_80gb_hbm3.csv")])
def test_layers_are_chosen_by_the_speeds_of_the_gpu_that_is_planned_for(gpu: str, table: str) -> None:
    """Wherever the planner runs."""

    def settle(*options: str) -> str | None:
        argv = ["--job.config_file", str(DEBUG_CONFIG), "--model.converters", "float8", *options]
        return settle_float8(load_config(argv).config.quantize, GPUS[gpu]).linear.float8.speed_table

    chosen = settle(f"{FLOAT8}.filter_fqns", "auto_filter_by_speed")
    assert chosen is not None
    assert chosen.endswith(table)
    assert settle(f"{FLOAT8}.filter_fqns", "auto_filter_by_speed", f"{FLOAT8}.speed_table", "own.csv") == "own.csv"
    assert settle() is None
