"""Beginning from a Hugging Face folder: what does not fit is named, what may differ is said."""

import dataclasses
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.hf_layout import find_places
from tests.hf_models import write_hf_folder
from trainer.components.checkpoint import CheckpointManager
from trainer.components.hf_checkpoint import build_hugging_face
from trainer.components.hf_files import HFFolder
from trainer.components.network import Network
from trainer.components.tokenizer import build_tokenizer
from trainer.config.schema import CheckpointConfig
from trainer.config.schema_training import ModelConfig


def begin(folder, network=None, **settings):
    """Load a folder into a model of `network`, by default its own, and return the model."""
    network = network or Network.from_hf(HFFolder(folder))
    model = network.spec.load_model_class()(network.args)
    section = CheckpointConfig(initial_load_in_hf=True, **settings)
    files = build_hugging_face(
        section,
        model=ModelConfig(name=network.spec.name, hf_assets_path=str(folder)),
        args=network.args,
        folder=folder / "run",
        tokenizer=build_tokenizer("byte"),
    )
    manager = CheckpointManager({"model": model}, section=section, folder=folder / "run", hugging_face=files)
    assert manager.load() == 0
    return model


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
        (lambda x: x.update({"extra": torch.ones(1)}), r"not of this model: extra"),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(63)}),
            r"model\.norm\.weight \(\(63,\) there, \(64,\) here\)",
        ),
        (
            lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"] + 1}),
            r"lm_head\.weight differs from model\.embed_tokens\.weight",
        ),
    ],
)
def test_tensor_that_does_not_fit_is_named(tmp_path, change, message):
    write_hf_folder("llama_tied", tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        begin(tmp_path)


def test_folder_stands_in_hf_assets_path_where_no_path_is_named(tmp_path):
    theirs = write_hf_folder("llama_tied", tmp_path / "assets")
    change_tensors(tmp_path / "assets", lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()}))
    for settings in ({}, {"initial_load_path": str(tmp_path / "assets")}):
        model = begin(tmp_path / "assets", **settings)
        assert torch.equal(model.output.weight, theirs.lm_head.weight)
        assert model.output.weight is model.tok_embeddings.weight


def test_other_network_is_refused_and_other_rotation_is_said(tmp_path, caplog):
    write_hf_folder("llama", tmp_path)
    network = Network.from_hf(HFFolder(tmp_path))
    fewer = dataclasses.replace(network.args, n_heads=2, n_kv_heads=1, max_seq_len=32)
    with pytest.raises(
        ValueError, match=r"another network: n_heads \(4 there, 2 here\), n_kv_heads \(2 there, 1 here\)"
    ):
        begin(tmp_path, Network(network.spec, fewer))
    with caplog.at_level(logging.WARNING):
        begin(tmp_path, Network(network.spec, dataclasses.replace(network.args, rope_theta=1e6)))
    (record,) = caplog.records
    assert "was trained with rope_theta = 500000.0; this run has 1000000.0" in record.getMessage()
    (tmp_path / "config.json").unlink()
    caplog.clear()
    begin(tmp_path, network)
    assert "no config.json: only names and shapes tell" in caplog.text


def test_dtypes_are_converted_and_rounding_is_said(tmp_path, caplog):
    theirs = write_hf_folder("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        model = begin(tmp_path)
    assert not caplog.records
    assert torch.equal(model.norm.weight, theirs.model.norm.weight.float())
    change_tensors(tmp_path, lambda x: x.update({"model.norm.weight": x["model.norm.weight"].double()}))
    begin(tmp_path)
    assert "weights are rounded from F64 to torch.float32 (such as norm.weight)" in caplog.text


def test_blocks_of_prediction_may_be_left_out_or_loaded(tmp_path, caplog):
    write_hf_folder("deepseek_v3", tmp_path)
    plain = Network.from_hf(HFFolder(tmp_path))
    deep = Network(plain.spec, dataclasses.replace(plain.args, mtp_depth=1))
    state = {name: torch.full(shape, 0.5) for name, shape in deep.shapes.items()}
    save_file(
        {tensor.name: tensor.build(state.__getitem__).contiguous() for tensor in deep.adapter.hf_tensors()},
        tmp_path / "model.safetensors",
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert Network.from_hf(HFFolder(tmp_path)).args.mtp_depth == 1
    assert (begin(tmp_path, deep).layers["3"].eh_proj.weight == 0.5).all()
    with caplog.at_level(logging.INFO):
        begin(tmp_path, plain)
    assert "since this model has no use for it: model.layers.3.eh_proj.weight" in caplog.text
    assert find_places(deep.adapter.hf_tensors()).keys() == deep.shapes.keys()
