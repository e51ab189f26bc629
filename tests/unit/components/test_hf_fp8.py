"""Weights in fp8 with a scale for each block: what they are worth, in any part, and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hf_models import quantize_folder, write_hf_folder
from tests.unit.components.test_hf_load import begin
from trainer.components.hf_files import HFFolder


def change(folder, tensors=lambda x: None, config=lambda x: None):
    found, settings = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tensors(found)
    config(settings)
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))


def test_any_box_of_a_weight_is_that_of_the_whole(tmp_path):
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    matrix[130:140] *= 1e3
    save_file({"matrix": matrix, "norm": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    worth = quantize_folder(tmp_path, (128, 128))["matrix"]
    folder = HFFolder(tmp_path)
    assert {name: (x.shape, x.dtype) for name, x in folder.tensors.items()} == {
        "matrix": ((300, 200), "BF16"),
        "norm": ((3,), "F32"),
    }
    assert torch.equal(folder.read("matrix"), worth)
    torch.testing.assert_close(worth.float(), matrix, rtol=0.07, atol=1e-2)
    for box in ((slice(0, 1), slice(0, 200)), (slice(120, 257), slice(127, 129)), (slice(256, 300), slice(128, 200))):
        assert torch.equal(folder.read("matrix", box), worth[box]), box


def test_run_begins_from_such_weights(tmp_path):
    write_hf_folder("llama", tmp_path)
    worth = quantize_folder(tmp_path, (128, 128))
    model = begin(tmp_path)
    assert torch.equal(model.layers["0"].attention.wo.weight, worth["model.layers.0.self_attn.o_proj.weight"].float())
    assert torch.equal(model.output.weight, worth["lm_head.weight"])


NAME = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tensors": lambda x: x.pop(f"{NAME}_scale_inv")},
            f"{NAME} is F8_E4M3. Such weights are read as F8_E4M3 with",
        ),
        (
            {"tensors": lambda x: x.update({f"{NAME}_scale_inv": torch.ones(1)})},
            f"{NAME}_scale_inv has the shape (1,), but {NAME}, (64, 64) in blocks of (16, 24), needs (4, 3)",
        ),
        (
            {"tensors": lambda x: x.update({NAME: x[NAME].float().to(torch.float8_e5m2)})},
            f"{NAME} is F8_E5M2. Such weights",
        ),
        ({"config": lambda x: x.pop("quantization_config")}, "is F8_E4M3. Such weights"),
        (
            {"config": lambda x: x["quantization_config"].pop("weight_block_size")},
            "the weights are quantized (quant_method = 'fp8', fmt = 'e4m3', weight_block_size = None), which is not supported",
        ),
        ({"config": lambda x: x.update(quantization_config={"quant_method": "awq"})}, "quant_method = 'awq'"),
    ],
)
def test_other_quantizations_are_refused(tmp_path, changes, message):
    write_hf_folder("llama", tmp_path)
    quantize_folder(tmp_path, (16, 24))
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        HFFolder(tmp_path)
