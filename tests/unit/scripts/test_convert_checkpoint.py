"""Hugging Face folders to checkpoints and back, against transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.hf_config import find_family
from scripts.convert_checkpoint import main
from tests.hf_models import CASES, make_tokens, quantize_folder, write_hf_folder
from trainer.components.checkpoint_files import is_whole
from trainer.components.hf_files import HFFolder
from trainer.components.native_weights import NativeWeights
from trainer.components.network import Network


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    source = HFFolder(folder)
    return {name: source.read(name) for name in source.tensors}


def convert(source: Path, output: Path, *options: str) -> Path:
    assert main([str(source), str(output), *options]) == 0
    return output


def load(folder: Path) -> torch.nn.Module:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bitwise_and_transformers_computes_the_same(case, tmp_path, capsys):
    theirs = write_hf_folder(case, tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    native = convert(tmp_path / "hf", tmp_path / "native")
    assert is_whole(native)
    again = convert(native, tmp_path / "again", "--shard-size", "5e-5")
    capsys.readouterr()
    before, after = read_all(tmp_path / "hf"), read_all(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list(again.glob("*.safetensors"))) > 3
    reloaded = load(again)
    assert reloaded.dtype == torch.float32
    tokens = make_tokens()
    weights = NativeWeights(native)
    network = Network.from_native(weights)
    ours = network.spec.load_model_class()(network.args).eval()
    ours.load_state_dict({name: weights.read(name) for name in weights.shapes}, strict=not network.adapter.tied)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.2
        assert torch.equal(reloaded(tokens).logits, expected)
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)


def test_folder_has_tokenizer_ids_and_generation_settings(tmp_path):
    write_hf_folder("llama", tmp_path / "hf")
    again = convert(convert(tmp_path / "hf", tmp_path / "native"), tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(again)
    assert tokenizer("h\u00e9").input_ids == [256, *"h\u00e9".encode()]
    model = load(again)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (256, 257)
    assert model.config.max_position_embeddings == 128


@pytest.mark.parametrize("case", ["llama_tied", "deepseek_v3"])
def test_export_dtype_and_fused_experts(case, tmp_path):
    theirs = write_hf_folder(case, tmp_path / "hf")
    native = convert(tmp_path / "hf", tmp_path / "native")
    half = read_all(convert(native, tmp_path / "half", "--dtype", "bfloat16", "--fuse-experts"))
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    reloaded = load(tmp_path / "half")
    assert reloaded.dtype == torch.bfloat16
    state = reloaded.state_dict()
    for name, x in theirs.state_dict().items():
        # The router's bias has steps that bf16 does not resolve.
        expected = x if name.endswith("correction_bias") else x.bfloat16()
        assert torch.equal(state[name], expected), name
    assert any(name.endswith("experts.gate_up_proj") for name in half) == (case == "deepseek_v3")
    back = read_all(convert(convert(tmp_path / "half", tmp_path / "back"), tmp_path / "unfused"))
    assert back.keys() == read_all(tmp_path / "hf").keys()


def test_weights_in_fp8_blocks_become_bfloat16(tmp_path):
    write_hf_folder("deepseek_v3", tmp_path / "hf")
    worth = quantize_folder(tmp_path / "hf", (16, 24))  # blocks at the edges are smaller
    assert sum(x.dtype == torch.bfloat16 for x in worth.values()) > 60
    back = convert(convert(tmp_path / "hf", tmp_path / "native"), tmp_path / "back", "--dtype", "float32")
    found = read_all(back)
    assert found.keys() == worth.keys()
    assert all(torch.equal(found[name], worth[name].float()) for name in worth)
    assert "quantization_config" not in (tmp_path / "native/config.json").read_text()
    assert load(back).dtype == torch.float32


def break_folder(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up_proj.weight"),
        (lambda x: x.update({"model.extra": torch.ones(2)}), "not of this model: model.extra"),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(63)}),
            r"shapes differ: model.norm.weight ((63,) there, (64,) here)",
        ),
    ],
)
def test_tensor_that_does_not_fit_is_named(tmp_path, capsys, change, message):
    write_hf_folder("llama", tmp_path / "hf")
    break_folder(tmp_path / "hf", change)
    assert main([str(tmp_path / "hf"), str(tmp_path / "native")]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"], "a failed conversion leaves nothing"


def test_checkpoint_of_another_network_is_refused_by_name(tmp_path, capsys):
    write_hf_folder("llama", tmp_path / "hf")
    native = convert(tmp_path / "hf", tmp_path / "native")
    config = json.loads((native / "config.json").read_text())
    for changes, message in (
        ({"intermediate_size": 96}, "layers.0.feed_forward.w1.weight ((128, 64) there, (96, 64) in this model)"),
        ({"num_hidden_layers": 3}, "missing: layers.2.attention.wk.weight"),
        ({"num_hidden_layers": 1}, "not of this model: layers.1.attention.wk.weight"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but this program's networks have 'silu'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type = 'linear' of rope_scaling is not supported"),
        ({"model_type": "lama"}, "model_type = 'lama' is no family of this program. Did you mean llama?"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the weights are quantized (quant_method = 'fp8'"),
    ):
        (native / "config.json").write_text(json.dumps(config | changes))
        assert main([str(native), str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_existing_output_and_missing_source_are_refused(tmp_path, capsys):
    write_hf_folder("llama", tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path)]) == 1
    assert "exists: name a new folder" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 1
    assert "there is no checkpoint here" in capsys.readouterr().err


def test_every_case_is_a_family_here():
    assert {find_family({"model_type": name}).name for name in ("llama", "deepseek_v2", "deepseek_v3")} == {
        "llama3",
        "deepseek_v3",
    }
