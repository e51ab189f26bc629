"""DeepSeek-V3 and V2 against transformers, through the adapter, in both directions, in memory and on files."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from models.deepseek_v3.args import FLAVORS, DeepSeekV3Args, YarnScaling
from models.deepseek_v3.model import Transformer
from models.deepseek_v3.state_dict_adapter import DeepSeekV3Adapter

SEQ = 96
BASE = DeepSeekV3Args(
    dim=64,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    vocab_size=256,
    hidden_dim=128,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    rope_scaling=None,
    n_experts=8,
    top_k=2,
    n_shared_experts=1,
    moe_hidden_dim=32,
    n_expert_groups=4,
    n_limited_groups=2,
    max_seq_len=128,
)
# Pairs of this small head fall into all three bands: kept, between, slowed down.
YARN = YarnScaling(factor=8.0, beta_fast=4.0, beta_slow=0.5, mscale=0.707, original_max_seq_len=32)
V2 = {"score_func": "softmax", "normalizes_gates": False, "uses_expert_bias": False}
CASES = {
    "v3": BASE,
    "v3_yarn": dataclasses.replace(BASE, rope_scaling=YARN),
    "v3_plain_queries": dataclasses.replace(BASE, q_lora_rank=0, n_shared_experts=2),
    "v3_no_groups": dataclasses.replace(BASE, n_expert_groups=1, n_limited_groups=1, normalizes_gates=False, top_k=3),
    "v3_all_dense": dataclasses.replace(BASE, n_dense_layers=3),
    "v2": dataclasses.replace(BASE, n_shared_experts=2, n_expert_groups=1, n_limited_groups=1, **V2),
    "v2_groups_yarn": dataclasses.replace(BASE, rope_scaling=YARN, n_shared_experts=2, route_scale=4.0, **V2),
}
FEW = {name: CASES[name] for name in ("v3_yarn", "v2_groups_yarn")}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def args(request: pytest.FixtureRequest) -> DeepSeekV3Args:
    return request.param


def build_ours(args: DeepSeekV3Args, std: float = 0.2) -> Transformer:
    """Weights large enough that attention and routing are far from uniform, norms that are not ones, biases not zeros."""
    model = Transformer(args).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)
            if name == "output.weight" or name.startswith("tok_embeddings"):
                parameter.mul_(0.25)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(0.0, std, generator=generator)
    return model


CLASSES = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
}


def build_config(args: DeepSeekV3Args) -> Any:
    content = DeepSeekV3Adapter(args).hf_config()
    return CLASSES[content.pop("model_type")][0](**content, attn_implementation="sdpa")


def build_theirs(args: DeepSeekV3Args) -> Any:
    config = build_config(args)
    return CLASSES[config.model_type][1](config).eval()


def write_files(args: DeepSeekV3Args, model: Transformer, folder: Path) -> None:
    """Config and weights as they stand on the hub."""
    save_file(
        {name: x.contiguous() for name, x in DeepSeekV3Adapter(args).to_hf(model.state_dict()).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    build_config(args).save_pretrained(folder)


def read_files(args: DeepSeekV3Args, folder: Path) -> Any:
    model_class = CLASSES[build_config(args).model_type][1]
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def make_tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, SEQ), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(ours: Transformer, theirs: Any) -> None:
    logits = ours(make_tokens())
    assert logits.std() > 0.3
    torch.testing.assert_close(logits, theirs(make_tokens()).logits, rtol=0, atol=1e-5)


def test_files_of_ours_and_of_theirs_give_the_same_logits(args: DeepSeekV3Args, tmp_path: Path) -> None:
    ours = build_ours(args)
    write_files(args, ours, tmp_path)
    theirs = read_files(args, tmp_path)
    assert_same_logits(ours, theirs)
    theirs.save_pretrained(tmp_path / "again")
    files = load_file(tmp_path / "again" / "model.safetensors")
    again = Transformer(args).eval()
    again.load_state_dict(DeepSeekV3Adapter(args).from_hf(files), strict=True)
    assert_same_logits(again, theirs)


@pytest.mark.parametrize("args", FEW.values(), ids=FEW.keys())
def test_from_hf_takes_fused_experts(args: DeepSeekV3Args) -> None:
    ours, theirs = build_ours(args), build_theirs(args)
    expected = ours.state_dict()
    fused = DeepSeekV3Adapter(args).to_hf(expected)
    for layer in range(args.n_dense_layers, args.n_layers):
        mine, prefix = f"layers.{layer}.moe.experts", f"model.layers.{layer}.mlp.experts"
        fused = {name: x for name, x in fused.items() if not name.startswith(prefix)}
        fused[f"{prefix}.gate_up_proj"] = torch.cat((expected[f"{mine}.w1"], expected[f"{mine}.w3"]), dim=1)
        fused[f"{prefix}.down_proj"] = expected[f"{mine}.w2"]
    theirs.load_state_dict(fused, strict=True)
    back = DeepSeekV3Adapter(args).from_hf(theirs.state_dict())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], x) for name, x in expected.items())


@pytest.mark.parametrize("args", FEW.values(), ids=FEW.keys())
def test_gradients_equal_theirs(args: DeepSeekV3Args, tmp_path: Path) -> None:
    ours, tokens = build_ours(args), make_tokens()
    write_files(args, ours, tmp_path)
    theirs = read_files(args, tmp_path)
    for logits in (ours(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    buffers = {name: x for name, x in theirs.state_dict().items() if name.endswith("correction_bias")}
    expected = DeepSeekV3Adapter(args).from_hf({n: p.grad for n, p in theirs.named_parameters()} | buffers)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_ties_are_broken_as_theirs(tmp_path: Path) -> None:
    """Experts that score alike, in and across groups: what is chosen among them is up to the order of operations."""
    for args in (CASES["v3"], CASES["v3_no_groups"], CASES["v2_groups_yarn"]):
        ours = build_ours(args)
        with torch.no_grad():
            for name, x in ours.state_dict().items():
                if name.endswith("router.gate.weight"):
                    x[1:] = x[0]  # all alike, but for one
                    x[5] = -x[0]
                elif name.endswith("expert_bias"):
                    x.zero_()
        write_files(args, ours, tmp_path)
        theirs = read_files(args, tmp_path)
        assert_same_logits(ours, theirs)
        h = torch.randn(2, SEQ, args.dim, generator=torch.Generator().manual_seed(2))
        routing = ours.layers["1"].moe.router(h)
        _, gates, experts = theirs.model.layers[1].mlp.gate(h)
        assert torch.equal(routing.experts, experts)
        torch.testing.assert_close(routing.gates, gates, rtol=1e-6, atol=0)


def test_parity_notices_yarn_and_bias() -> None:
    for changed in (dataclasses.replace(BASE, rope_scaling=YARN), dataclasses.replace(BASE, route_scale=2.6)):
        ours, other = build_ours(BASE), Transformer(changed).eval()
        other.load_state_dict(ours.state_dict())
        assert (ours(make_tokens()) - other(make_tokens())).abs().max() > 1e-3
    biased = build_ours(BASE)
    before = biased(make_tokens())
    for name, buffer in biased.named_buffers():
        if name.endswith("expert_bias"):
            buffer.zero_()
    assert (biased(make_tokens()) - before).abs().max() > 1e-3


def test_multi_token_prediction_equals_theirs(tmp_path: Path) -> None:
    """Their module for it (speculative decoding), from the same files, drafts what ours is trained to predict."""
    args = dataclasses.replace(BASE, rope_scaling=YARN, mtp_depth=2)
    ours, tokens = build_ours(args).train(), make_tokens()
    write_files(args, ours, tmp_path)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34].*"]  # where 61 stands for the published model
    drafter = MtpModel.from_pretrained(theirs).eval()
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    with torch.no_grad():
        h = theirs.model(tokens).last_hidden_state
        cache, losses = MtpCache(config=drafter.config), []
        for k in (1, 2):
            positions = torch.arange(k, SEQ + k).expand_as(tokens)
            h = drafter.forward_layer(k - 1, h, positions, cache, input_ids=tokens.roll(-k, dims=1))
            logits = theirs.lm_head(h[:, : SEQ - 1 - k])
            losses.append(sum_loss(logits, tokens[:, 1 + k :]))
        main = sum_loss(theirs(tokens).logits, labels)
        total = ours(tokens, labels=labels, loss_fn=lambda h, w, y: sum_loss(h @ w.t(), y))
    torch.testing.assert_close(total, main + 0.3 * torch.stack(losses).mean(), rtol=1e-6, atol=0)
    own = torch.stack([ours.layers[str(layer)].depth_loss.total for layer in (3, 4)])
    torch.testing.assert_close(own, torch.stack(losses), rtol=1e-6, atol=0)


def sum_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("mtp_depth", [0, 2])
def test_round_trip_is_bitwise(args: DeepSeekV3Args, mtp_depth: int) -> None:
    args = dataclasses.replace(args, mtp_depth=mtp_depth)
    adapter, state_dict = DeepSeekV3Adapter(args), build_ours(args).state_dict()
    back = adapter.from_hf(adapter.to_hf(state_dict))
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[name], x) for name, x in state_dict.items())


@pytest.mark.parametrize("flavor", ["16B", "671B"])
def test_from_hf_fits_published_sizes(flavor: str) -> None:
    args = FLAVORS[flavor]
    adapter = DeepSeekV3Adapter(args)
    with torch.device("meta"):
        ours, theirs = Transformer(args), build_theirs(args)
    converted = adapter.from_hf(theirs.state_dict())
    assert {n: x.shape for n, x in converted.items()} == {n: x.shape for n, x in ours.state_dict().items()}
    assert sum(p.numel() for p in theirs.parameters()) == args.n_params()


def test_from_hf_leaves_out_predictions_that_are_not_wanted() -> None:
    deep = dataclasses.replace(BASE, mtp_depth=2)
    files = DeepSeekV3Adapter(deep).to_hf(build_ours(deep).state_dict())
    # The published files repeat embeddings and output matrix there.
    files["model.layers.3.embed_tokens.weight"] = files["model.embed_tokens.weight"]
    files["model.layers.3.shared_head.head.weight"] = files["lm_head.weight"]
    files["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for depth in (0, 1, 2):
        args = dataclasses.replace(BASE, mtp_depth=depth)
        Transformer(args).load_state_dict(DeepSeekV3Adapter(args).from_hf(files), strict=True)


def test_names_that_do_not_fit_are_named() -> None:
    adapter, state_dict = DeepSeekV3Adapter(BASE), build_ours(BASE).state_dict()
    files = adapter.to_hf(state_dict)
    state_dict["layers.7.moe.experts.w1"] = state_dict.pop("layers.1.moe.experts.w1")
    with pytest.raises(ValueError, match="does not fit") as caught:
        adapter.to_hf(state_dict)
    assert "missing: layers.1.moe.experts.w1" in str(caught.value)
    assert "not of this model: layers.7.moe.experts.w1" in str(caught.value)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight"):
        adapter.from_hf({n: x for n, x in files.items() if n != "model.layers.2.mlp.experts.7.up_proj.weight"})
    with pytest.raises(ValueError, match=r"not of this model: model\.layers\.3\.input_layernorm\.weight"):
        adapter.from_hf(files | {"model.layers.3.input_layernorm.weight": torch.ones(64)})


@pytest.mark.parametrize(
    "changes", [{"score_func": "softmax"}, {"uses_expert_bias": False}, V2 | {"normalizes_gates": True}]
)
def test_hf_config_refuses_what_transformers_cannot_route(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="transformers has no model with score_func"):
        DeepSeekV3Adapter(dataclasses.replace(BASE, **changes)).hf_config()


def test_hf_config_has_yarn_where_it_applies() -> None:
    for args, has_yarn in (
        (dataclasses.replace(FLAVORS["671B"], max_seq_len=4096), False),
        (dataclasses.replace(FLAVORS["671B"], max_seq_len=4096, rope_scaling=YarnScaling(always=True)), True),
        (FLAVORS["671B"], True),
    ):
        assert (DeepSeekV3Adapter(args).hf_config()["rope_scaling"] is not None) == has_yarn
