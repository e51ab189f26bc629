"""Which network a checkpoint is of: by its own settings, by those of its run, or by a file that is named."""

import dataclasses

import pytest
import torch
import torch.distributed.checkpoint as dcp

from models.registry import get_model_spec
from trainer.components.checkpoint import CheckpointManager
from trainer.components.native_weights import NativeWeights
from trainer.components.network import Network
from trainer.config.changes import describe_settings
from trainer.config.manager import load_config
from trainer.config.render import write_config
from trainer.config.schema import CheckpointConfig

ARGV = ["--model.name=deepseek_v3", "--model.flavor=debugmodel", "--training.seq_len=96", "--model.mtp_depth=1"]


def save(folder, *, with_settings: bool):
    """Save the run's model as a run does, and return the checkpoint's folder and the network."""
    config = load_config(ARGV).config
    spec = get_model_spec(config.model.name)
    args = dataclasses.replace(spec.get_args("debugmodel"), max_seq_len=96, mtp_depth=1)
    model = spec.load_model_class()(args)
    settings = describe_settings(config, args, global_batch_size=8) if with_settings else {}
    section = CheckpointConfig(enable=True, last_save_model_only=True)
    manager = CheckpointManager({"model": model}, section=section, folder=folder / "checkpoint", settings=settings)
    assert manager.save(1, last=True)
    manager.close()
    write_config(config, folder / "config.toml")
    return folder / "checkpoint" / "step-1", args


@pytest.mark.parametrize("with_settings", [True, False])
def test_network_is_that_of_the_run(tmp_path, with_settings):
    path, args = save(tmp_path, with_settings=with_settings)
    weights = NativeWeights(path)
    weights.verify()
    assert Network.from_native(weights).args == args
    (tmp_path / "config.toml").rename(tmp_path / "elsewhere.toml")
    assert Network.from_native(weights, str(tmp_path / "elsewhere.toml")).args == args
    if with_settings:
        assert Network.from_native(weights).args == args
    else:
        with pytest.raises(ValueError, match=r"nothing here tells the network. Name the settings of its run"):
            Network.from_native(weights)


def test_flavor_that_has_changed_since_is_told(tmp_path, monkeypatch):
    path, args = save(tmp_path, with_settings=True)
    spec = get_model_spec("deepseek_v3")
    changed = {"debugmodel": dataclasses.replace(spec.flavors["debugmodel"], route_scale=9.0)}
    monkeypatch.setattr("models.deepseek_v3.SPEC", dataclasses.replace(spec, flavors=changed))
    with pytest.raises(ValueError, match=r"has route_scale = 9\.0 now, but the checkpoint was made with 2\.5"):
        Network.from_native(NativeWeights(path))
    assert args.route_scale == 2.5


def test_damaged_and_foreign_checkpoints(tmp_path):
    path, _ = save(tmp_path, with_settings=True)
    with pytest.raises(ValueError, match="it holds the checkpoints step-1: name one"):
        NativeWeights(path.parent)
    shard = next(path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged: {shard.name}"):
        NativeWeights(path).verify()
    assert torch.is_tensor(NativeWeights(path).read("norm.weight"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_without_a_prefix_are_read_and_other_states_are_not(tmp_path):
    """As torchtitan writes them."""
    state = {"norm.weight": torch.arange(6.0), "optimizer.state.norm.weight.exp_avg": torch.ones(6)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    weights = NativeWeights(tmp_path)
    weights.verify()
    assert weights.shapes == {"norm.weight": (6,)}
    assert torch.equal(weights.read("norm.weight"), state["norm.weight"])
