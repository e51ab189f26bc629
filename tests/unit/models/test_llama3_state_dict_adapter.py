"""Llama 3 against transformers, through the adapter, in both directions."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.llama3.args import FLAVORS, LlamaArgs, RopeScaling
from models.llama3.model import Transformer
from models.llama3.state_dict_adapter import Llama3Adapter

SEQ = 96
BASE = LlamaArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=256, ffn_hidden_dim=128, max_seq_len=128)
# Wavelengths of this small head fall into all three bands: kept, between, stretched.
SCALING = RopeScaling(factor=8.0, original_max_seq_len=32)
CASES = {
    "grouped": BASE,
    "grouped_scaled": dataclasses.replace(BASE, rope_scaling=SCALING),
    "grouped_scaled_tied": dataclasses.replace(BASE, rope_scaling=SCALING, tie_embeddings=True),
    "ungrouped": dataclasses.replace(BASE, n_kv_heads=4),
    "one_key_head": dataclasses.replace(BASE, n_kv_heads=1, rope_theta=10000.0),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def args(request: pytest.FixtureRequest) -> LlamaArgs:
    return request.param


def build_ours(args: LlamaArgs, std: float = 0.2) -> Transformer:
    """Weights large enough that attention is far from uniform, and norms that are not ones."""
    model = Transformer(args)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)
            if name == "output.weight" or name.startswith("tok_embeddings"):
                parameter.mul_(0.25)
    return model


def build_theirs(args: LlamaArgs) -> LlamaForCausalLM:
    config = LlamaConfig(**Llama3Adapter(args).hf_config(), attn_implementation="sdpa")
    return LlamaForCausalLM(config).eval()


def make_tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, SEQ), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(ours: Transformer, theirs: LlamaForCausalLM) -> None:
    logits = ours(make_tokens())
    assert logits.std() > 0.3
    torch.testing.assert_close(logits, theirs(make_tokens()).logits, rtol=0, atol=1e-5)


def test_to_hf_gives_the_same_logits(args: LlamaArgs) -> None:
    ours, theirs = build_ours(args), build_theirs(args)
    state_dict = Llama3Adapter(args).to_hf(ours.state_dict())
    result = theirs.load_state_dict(state_dict, strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == (["lm_head.weight"] if args.tie_embeddings else [])
    assert_same_logits(ours, theirs)


def test_from_hf_gives_the_same_logits(args: LlamaArgs) -> None:
    theirs = build_theirs(args)
    theirs.load_state_dict(Llama3Adapter(args).to_hf(build_ours(args).state_dict()), strict=False)
    ours = Transformer(args)
    ours.load_state_dict(Llama3Adapter(args).from_hf(theirs.state_dict()), strict=True)
    assert_same_logits(ours, theirs)


def test_from_hf_reads_a_fresh_model_of_theirs() -> None:
    torch.manual_seed(0)
    theirs = build_theirs(CASES["grouped_scaled"])
    ours = Transformer(CASES["grouped_scaled"])
    ours.load_state_dict(Llama3Adapter(ours.args).from_hf(theirs.state_dict()), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(make_tokens()), theirs(make_tokens()).logits, rtol=0, atol=1e-5)


def test_parity_notices_rope_scaling() -> None:
    ours = build_ours(BASE)
    theirs = build_theirs(CASES["grouped_scaled"])
    theirs.load_state_dict(Llama3Adapter(BASE).to_hf(ours.state_dict()))
    with torch.no_grad():
        assert (ours(make_tokens()) - theirs(make_tokens()).logits).abs().max() > 1e-3


def test_gradients_equal_theirs(args: LlamaArgs) -> None:
    ours, theirs, tokens = build_ours(args), build_theirs(args), make_tokens()
    adapter = Llama3Adapter(args)
    theirs.load_state_dict(adapter.to_hf(ours.state_dict()), strict=False)
    for logits in (ours(tokens), theirs(tokens).logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    gradients = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_round_trip_is_bitwise(args: LlamaArgs) -> None:
    adapter, state_dict = Llama3Adapter(args), build_ours(args).state_dict()
    back = adapter.from_hf(adapter.to_hf(state_dict))
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[name], x) for name, x in state_dict.items())


def test_save_pretrained_round_trip(tmp_path) -> None:
    args = CASES["grouped_scaled_tied"]
    ours, theirs = build_ours(args), build_theirs(args)
    theirs.load_state_dict(Llama3Adapter(args).to_hf(ours.state_dict()), strict=False)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(ours, LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())


@pytest.mark.parametrize("flavor", ["1B", "8B", "70B"])
def test_from_hf_fits_published_sizes(flavor: str) -> None:
    args = FLAVORS[flavor]
    with torch.device("meta"):
        ours = Transformer(args)
        theirs = LlamaForCausalLM(LlamaConfig(**Llama3Adapter(args).hf_config()))
    converted = Llama3Adapter(args).from_hf(dict(theirs.named_parameters()))
    assert {n: x.shape for n, x in converted.items()} == {n: x.shape for n, x in ours.state_dict().items()}
    exported = Llama3Adapter(args).to_hf(ours.state_dict())
    assert {n: x.shape for n, x in exported.items()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_names_that_do_not_fit_are_named() -> None:
    adapter, state_dict = Llama3Adapter(BASE), build_ours(BASE).state_dict()
    state_dict["layers.7.attention.wq.weight"] = state_dict.pop("layers.1.attention.wq.weight")
    with pytest.raises(ValueError, match="does not fit") as caught:
        adapter.to_hf(state_dict)
    assert "missing: layers.1.attention.wq.weight" in str(caught.value)
    assert "not of this model: layers.7.attention.wq.weight" in str(caught.value)
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight, model\.embed_tokens\.weight, .* and 13 more"):
        adapter.from_hf({})


def test_tied_head_that_differs_is_refused() -> None:
    args = CASES["grouped_scaled_tied"]
    adapter = Llama3Adapter(args)
    state_dict = adapter.to_hf(build_ours(args).state_dict())
    embeddings = state_dict["model.embed_tokens.weight"]
    assert "lm_head.weight" not in state_dict
    assert "output.weight" in adapter.from_hf(state_dict | {"lm_head.weight": embeddings.clone()})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        adapter.from_hf(state_dict | {"lm_head.weight": embeddings + 1})


def test_from_hf_ignores_the_old_rotary_buffer() -> None:
    adapter = Llama3Adapter(BASE)
    state_dict = adapter.to_hf(build_ours(BASE).state_dict())
    state_dict["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    assert len(adapter.from_hf(state_dict)) == len(state_dict) - 1
