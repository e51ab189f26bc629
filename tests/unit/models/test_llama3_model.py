"""The whole network: construction, tied weights, loss in the head, documents, compilation."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models.common.attention import build_document_mask
from models.common.init import Init
from models.llama3.args import LlamaArgs, RopeScaling
from models.llama3.model import Transformer

ARGS = LlamaArgs(
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=97,
    multiple_of=16,
    rope_scaling=RopeScaling(original_max_seq_len=16),
    max_seq_len=32,
)


def build_model(**changes: object) -> Transformer:
    model = Transformer(dataclasses.replace(ARGS, **changes))
    fill(model)
    return model


def fill(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(0)
    inits = model.param_inits()
    for name, parameter in model.named_parameters():
        inits[name].fill_(parameter, generator)


def make_tokens(batch: int = 2, seq: int = 32) -> torch.Tensor:
    return torch.randint(0, ARGS.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))


def sum_loss(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, weight).flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_param_inits_cover_every_parameter(tie_embeddings: bool) -> None:
    model = build_model(tie_embeddings=tie_embeddings)
    inits = model.param_inits()
    assert set(inits) == {name for name, _ in model.named_parameters()}
    output = Init("trunc_normal", std=64**-0.5)
    expected = {
        "tok_embeddings.weight": output if tie_embeddings else Init("normal", std=1.0),
        "layers.2.attention.wq.weight": Init("trunc_normal", std=0.02),
        "layers.2.feed_forward.w1.weight": Init("trunc_normal", std=0.02),
        "layers.2.attention.wo.weight": Init("trunc_normal", std=0.02 / 6**0.5),
        "layers.2.feed_forward.w2.weight": Init("trunc_normal", std=0.02 / 6**0.5),
        "layers.0.feed_forward.w3.weight": Init("trunc_normal", std=0.02 / 2**0.5),
        "layers.0.ffn_norm.weight": Init("ones"),
        "norm.weight": Init("ones"),
    }
    assert {name: inits[name] for name in expected} == expected
    assert tie_embeddings or inits["output.weight"] == output


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_fresh_model_begins_near_uniform(tie_embeddings: bool) -> None:
    logits = build_model(tie_embeddings=tie_embeddings)(make_tokens())
    assert logits.shape == (2, 32, 97)
    assert 0.5 < logits.std() < 2.0


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_meta_construction_equals_direct(tie_embeddings: bool) -> None:
    direct = build_model(tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = Transformer(direct.args)
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    fill(model)
    assert (model.output.weight is model.tok_embeddings.weight) == tie_embeddings
    assert torch.equal(model(make_tokens()), direct(make_tokens()))


def test_tied_weights_stay_tied_through_conversion_and_copy() -> None:
    model = build_model(tie_embeddings=True)
    for changed in (copy.deepcopy(model), model.to(torch.bfloat16)):
        assert changed.output.weight is changed.tok_embeddings.weight
    assert set(model.state_dict()) >= {"tok_embeddings.weight", "output.weight"}


@pytest.mark.usefixtures("_one_rank")
def test_tied_weights_stay_tied_through_fsdp_and_to_empty() -> None:
    direct = build_model(tie_embeddings=True)
    with torch.device("meta"):
        model = Transformer(direct.args)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    assert model.output.weight is model.tok_embeddings.weight
    source = dict(direct.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.to_local().copy_(source[name])
    tokens = make_tokens()
    losses = [m(tokens, labels=tokens, loss_fn=sum_loss) for m in (direct, model)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    assert model.output.weight is model.tok_embeddings.weight
    gradient = model.tok_embeddings.weight.grad.full_tensor()
    torch.testing.assert_close(gradient, direct.tok_embeddings.weight.grad, rtol=1e-5, atol=1e-5)


def test_rope_table_is_shared_and_in_no_state_dict() -> None:
    model = build_model()
    assert {id(block.attention.rope) for block in model.layers.values()} == {id(model.rope)}
    assert [name for name, _ in model.named_buffers()] == ["rope.table"]
    assert not any("rope" in name for name in model.state_dict())


@pytest.mark.usefixtures("_one_rank")
def test_rope_angles_stay_fp32_under_fsdp_casts() -> None:
    """FSDP casts what a block is called with. Angles at position 4000 in bf16 would be off by whole turns."""
    changes = {"max_seq_len": 4096, "attn_mask_type": "causal", "rope_scaling": None}
    direct, sharded = build_model(**changes), build_model(**changes)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*sharded.layers.values(), sharded):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    tokens = make_tokens()
    positions = torch.arange(4000, 4032).repeat(2, 1)
    with torch.no_grad():
        logits = sharded(tokens, positions=positions)
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits, direct.to(torch.bfloat16)(tokens, positions=positions))
    assert sharded.rope.table.dtype == direct.rope.table.dtype == torch.float32


def test_loss_in_the_head_equals_loss_of_logits_with_gradients() -> None:
    model, tokens = build_model(), make_tokens()
    labels = tokens.roll(-1, dims=1)
    inside = model(tokens, labels=labels, loss_fn=sum_loss)
    outside = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(inside, outside)
    gradients = torch.autograd.grad(inside, list(model.parameters()))
    expected = torch.autograd.grad(outside, list(model.parameters()))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("given", [{"labels": make_tokens()}, {"loss_fn": sum_loss}])
def test_forward_refuses_labels_or_loss_alone(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="labels and loss_fn go together"):
        build_model()(make_tokens(), **given)


def test_forward_refuses_a_sequence_beyond_the_table() -> None:
    with pytest.raises(ValueError, match="33 tokens is longer than max_seq_len = 32"):
        build_model()(make_tokens(seq=33))


def test_forward_is_causal() -> None:
    model, tokens = build_model(), make_tokens()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % ARGS.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


@pytest.mark.parametrize("mask_given", [False, True])
def test_block_causal_equals_separate_documents(mask_given: bool) -> None:
    model = build_model(attn_mask_type="block_causal")
    separate = Transformer(ARGS)
    separate.load_state_dict(model.state_dict())
    tokens, lengths = make_tokens(batch=1), (9, 3, 20)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    mask = build_document_mask(positions, device_type="cpu") if mask_given else None
    packed = model(tokens, positions=positions, mask=mask)
    parts = torch.cat([separate(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, parts, rtol=0, atol=1e-5)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((packed * weights).sum(), list(model.parameters()))
    expected = torch.autograd.grad((parts * weights).sum(), list(separate.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_block_causal_without_positions_raises() -> None:
    with pytest.raises(ValueError, match="needs positions"):
        build_model(attn_mask_type="block_causal")(make_tokens())


@pytest.mark.parametrize("documents", [False, True])
def test_blocks_compile_once_for_all_layers(documents: bool) -> None:
    torch._dynamo.reset()
    eager, compiled, tokens = build_model(), build_model(), make_tokens()
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.layers.values():
        block.compile(backend=counter, fullgraph=True)
    given = {}
    if documents:
        positions = torch.cat([torch.arange(n) for n in (9, 3, 20)]).repeat(2, 1)
        given = {"positions": positions, "mask": build_document_mask(positions, device_type="cpu")}
    for _ in range(2):
        losses = [model(tokens, labels=tokens, loss_fn=sum_loss, **given) for model in (eager, compiled)]
        torch.testing.assert_close(*losses)
        losses[1].backward()
        losses[0].backward()
    assert counter.frame_count == 1
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
