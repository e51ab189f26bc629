"""The whole network: construction, counts, gradient of the auxiliary loss, parts, compilation."""

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from models.common.attention import build_document_mask
from models.common.init import Init
from models.common.moe import MoE
from models.common.multi_token import IGNORE_INDEX
from models.deepseek_v3.args import DeepSeekV3Args
from models.deepseek_v3.model import Transformer

ARGS = DeepSeekV3Args(
    dim=32,
    n_layers=3,
    n_dense_layers=1,
    n_heads=2,
    vocab_size=97,
    hidden_dim=48,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_experts=8,
    top_k=2,
    moe_hidden_dim=16,
    n_expert_groups=4,
    n_limited_groups=2,
    max_seq_len=32,
)
DOCUMENTS = (9, 3, 20)


def build_model(**changes: object) -> Transformer:
    model = Transformer(dataclasses.replace(ARGS, **changes))
    fill(model)
    return model


def fill(model: Transformer, std: float | None = None) -> None:
    """Fill as a run begins, or with larger weights, so that routing and attention are far from uniform."""
    generator = torch.Generator().manual_seed(0)
    inits = model.param_inits()
    for name, parameter in model.named_parameters():
        inits[name].fill_(parameter, generator)
        if std is not None and parameter.dim() > 1:
            parameter.data.normal_(0.0, std, generator=generator)


def build_strong_model(**changes: object) -> Transformer:
    model = build_model(**changes)
    fill(model, std=0.3)
    return model


def make_tokens(batch: int = 2, seq: int = 32) -> torch.Tensor:
    return torch.randint(0, ARGS.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))


def make_labels(tokens: torch.Tensor) -> torch.Tensor:
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = IGNORE_INDEX
    return labels


def make_positions(batch: int = 2) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in DOCUMENTS]).repeat(batch, 1)


def sum_loss(h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(h, weight).flatten(0, 1), labels.flatten(), reduction="sum")


def get_gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-5 * expected[name].norm() + 1e-6, f"{name}: {error} of {expected[name].norm()}"


def list_mixtures(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- construction ---


@pytest.mark.parametrize("mtp_depth", [0, 2])
@pytest.mark.parametrize("q_lora_rank", [0, 16])
def test_param_inits_cover_every_parameter(q_lora_rank: int, mtp_depth: int) -> None:
    model = build_model(q_lora_rank=q_lora_rank, mtp_depth=mtp_depth)
    inits = model.param_inits()
    assert set(inits) == {name for name, _ in model.named_parameters()}
    plain, deep = Init("trunc_normal", std=0.02), Init("trunc_normal", std=0.02 / 6**0.5)
    expected = {
        "tok_embeddings.weight": Init("normal", std=1.0),
        "layers.2.attention.wkv_a.weight": plain,
        "layers.2.attention.wkv_b.weight": plain,
        "layers.2.attention.kv_norm.weight": Init("ones"),
        "layers.2.attention.wo.weight": deep,
        "layers.2.moe.router.gate.weight": deep,
        "layers.2.moe.experts.w1": plain,
        "layers.2.moe.experts.w2": deep,
        "layers.2.moe.experts.w3": deep,
        "layers.2.moe.shared_experts.w1.weight": plain,
        "layers.2.moe.shared_experts.w2.weight": deep,
        "layers.0.feed_forward.w3.weight": Init("trunc_normal", std=0.02 / 2**0.5),
        "layers.0.ffn_norm.weight": Init("ones"),
        "norm.weight": Init("ones"),
        "output.weight": Init("trunc_normal", std=32**-0.5),
    }
    queries = ("wq_a", "wq_b") if q_lora_rank else ("wq",)
    expected |= {f"layers.1.attention.{name}.weight": plain for name in queries}
    if mtp_depth:
        expected |= {"layers.4.eh_proj.weight": plain, "layers.4.norm.weight": Init("ones")}
        expected["layers.4.moe.experts.w2"] = Init("trunc_normal", std=0.02 / 10**0.5)
    assert {name: inits[name] for name in expected} == expected


def test_fresh_model_begins_near_uniform() -> None:
    logits = build_model()(make_tokens())
    assert logits.shape == (2, 32, 97)
    assert 0.5 < logits.std() < 2.0


def test_meta_construction_equals_direct() -> None:
    direct = build_model(mtp_depth=1, max_seq_len=5000)  # with YaRN
    with torch.device("meta"):
        model = Transformer(direct.args)
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    model.init_buffers("cpu")
    fill(model)
    tokens = make_tokens()
    losses = [m(tokens, labels=make_labels(tokens), loss_fn=sum_loss) for m in (model, direct)]
    assert torch.equal(*losses)
    buffers, expected = dict(model.named_buffers()), dict(direct.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in buffers.items())


def test_state_dict_holds_biases_but_no_counts() -> None:
    model = build_model(mtp_depth=1)
    buffers = {name for name, _ in model.named_buffers()}
    saved = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
    assert saved == {f"layers.{i}.moe.router.expert_bias" for i in (1, 2, 3)}
    assert buffers - saved == {
        "rope.table",
        *(f"layers.3.depth_loss.{name}" for name in ("total", "n_labels")),
        *(f"layers.{i}.moe.tokens_per_expert" for i in (1, 2, 3)),
    }


def test_rope_is_shared() -> None:
    model = build_model(mtp_depth=1)
    assert {id(block.attention.rope) for block in model.layers.values()} == {id(model.rope)}


# --- forward ---


def test_loss_in_the_head_equals_loss_of_logits_with_gradients() -> None:
    model, tokens = build_strong_model(), make_tokens()
    labels = make_labels(tokens)
    inside = model(tokens, labels=labels, loss_fn=sum_loss)
    outside = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(inside, outside)
    assert_same_gradients(get_gradients(inside, model), get_gradients(outside, model))


@pytest.mark.parametrize("mtp_depth", [0, 1])
@pytest.mark.parametrize("given", [{"labels": make_tokens()}, {"loss_fn": sum_loss}])
def test_forward_refuses_labels_or_loss_alone(given: dict[str, object], mtp_depth: int) -> None:
    with pytest.raises(ValueError, match="labels and loss_fn go together"):
        build_model(mtp_depth=mtp_depth)(make_tokens(), **given)


def test_forward_refuses_a_sequence_beyond_the_table() -> None:
    with pytest.raises(ValueError, match="33 tokens is longer than max_seq_len = 32"):
        build_model()(make_tokens(seq=33))


def test_block_causal_without_positions_raises() -> None:
    with pytest.raises(ValueError, match="needs positions"):
        build_model(attn_mask_type="block_causal")(make_tokens())


def test_forward_is_causal() -> None:
    model, tokens = build_strong_model(), make_tokens()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % ARGS.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


@pytest.mark.parametrize("mask_given", [False, True])
def test_block_causal_equals_separate_documents(mask_given: bool) -> None:
    model = build_strong_model(attn_mask_type="block_causal")
    separate = Transformer(ARGS)
    separate.load_state_dict(model.state_dict())
    tokens, positions = make_tokens(batch=1), make_positions(batch=1)
    mask = build_document_mask(positions, device_type="cpu") if mask_given else None
    packed = model(tokens, positions=positions, mask=mask)
    parts = torch.cat([separate(part) for part in tokens.split(DOCUMENTS, dim=1)], dim=1)
    torch.testing.assert_close(packed, parts, rtol=0, atol=1e-4)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    expected = get_gradients((parts * weights).sum(), separate)
    assert_same_gradients(get_gradients((packed * weights).sum(), model), expected)


# --- what the trainer reads ---


def checkpoint_blocks(model: Transformer) -> None:
    for block in model.layers.values():
        block.forward = recompute(block.forward)


def recompute(forward: Callable) -> Callable:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("recomputes", [False, True])
def test_counts_add_up_in_training_only_and_once_under_recomputation(recomputes: bool) -> None:
    model, tokens = build_strong_model(mtp_depth=1), make_tokens()
    if recomputes:
        checkpoint_blocks(model)
    for _ in range(2):
        model(tokens, labels=make_labels(tokens), loss_fn=sum_loss).backward()
    counts = [moe.tokens_per_expert.clone() for moe in list_mixtures(model)]
    assert [count.sum().item() for count in counts] == [2 * 2 * 32 * ARGS.top_k] * 3
    assert len({tuple(count.tolist()) for count in counts}) == 3
    assert model.layers["3"].depth_loss.total > 0
    assert model.layers["3"].depth_loss.n_labels == 2 * 2 * 30
    with torch.no_grad():
        model.eval()(tokens, labels=make_labels(tokens), loss_fn=sum_loss)
    assert all(torch.equal(moe.tokens_per_expert, c) for moe, c in zip(list_mixtures(model), counts, strict=True))


def test_counts_are_those_of_the_routers() -> None:
    model, tokens = build_strong_model(), make_tokens()
    seen: list[torch.Tensor] = []
    for moe in list_mixtures(model):
        moe.router.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing.experts))
    model(tokens)
    for moe, experts in zip(list_mixtures(model), seen, strict=True):
        assert torch.equal(moe.tokens_per_expert, experts.flatten().bincount(minlength=ARGS.n_experts))


# --- the auxiliary loss ---


def collect_balance_losses(model: Transformer) -> list[torch.Tensor]:
    """A list that each forward pass appends its mixtures' auxiliary losses to."""
    losses: list[torch.Tensor] = []
    for moe in list_mixtures(model):
        moe.register_forward_hook(lambda _module, _inputs, outputs: losses.append(outputs[1].balance_loss))
    return losses


@pytest.mark.parametrize(("mtp_depth", "recomputes"), [(0, False), (1, True)])
def test_balance_loss_adds_its_gradient_and_no_value(mtp_depth: int, recomputes: bool) -> None:
    model, tokens = build_strong_model(balance_loss_alpha=0.5, mtp_depth=mtp_depth), make_tokens()
    reference, plain = copy.deepcopy(model), build_strong_model(mtp_depth=mtp_depth)
    if recomputes:
        checkpoint_blocks(model)
    balance_losses = collect_balance_losses(reference)
    labels = make_labels(tokens)
    loss, _, without = (m(tokens, labels=labels, loss_fn=sum_loss) for m in (model, reference, plain))
    assert torch.equal(loss, without)
    # As a trainer does: divided by the number of labels. The auxiliary part must shrink with it.
    n_labels = (labels != IGNORE_INDEX).sum()
    main = get_gradients(without / n_labels, plain)
    extra = get_gradients(sum(balance_losses) / n_labels, reference)
    router = "layers.1.moe.router.gate.weight"
    assert extra[router].norm() > 1e-3 * main[router].norm()
    assert_same_gradients(get_gradients(loss / n_labels, model), {name: main[name] + extra[name] for name in main})


def test_balance_loss_of_microbatches_equals_that_of_the_batch() -> None:
    model, tokens = build_strong_model(balance_loss_alpha=0.5), make_tokens(batch=4)
    labels = make_labels(tokens)
    whole = get_gradients(model(tokens, labels=labels, loss_fn=sum_loss), model)
    parts = [
        get_gradients(model(t, labels=y, loss_fn=sum_loss), model)
        for t, y in zip(tokens.split((1, 3)), labels.split((1, 3)), strict=True)
    ]
    assert_same_gradients({name: parts[0][name] + parts[1][name] for name in whole}, whole)


# --- parts of the network ---


def cut(model: Transformer) -> list[Transformer]:
    """Two parts that share the modules of `model`, as stages of a pipeline do."""
    first, last = copy.copy(model), copy.copy(model)
    for part in (first, last):
        part._modules = dict(model._modules)
        part.layers = nn.ModuleDict(dict(model.layers.items()))
    first.norm = first.output = last.tok_embeddings = None
    del first.layers["2"], last.layers["0"], last.layers["1"]
    return [first, last]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_parts_equal_the_whole_with_gradients(alpha: float) -> None:
    model, tokens = build_strong_model(balance_loss_alpha=alpha), make_tokens()
    labels = make_labels(tokens)
    n_labels = (labels != IGNORE_INDEX).sum()
    expected = get_gradients(model(tokens, labels=labels, loss_fn=sum_loss) / n_labels, model)
    first, last = cut(model)
    first.loss_gradient = 1 / n_labels.float()
    hidden = first(tokens)
    loss = last(hidden, labels=labels, loss_fn=sum_loss) / n_labels
    assert_same_gradients(get_gradients(loss, model), expected)
    inits = [set(part.param_inits()) for part in (first, last)]
    assert inits[0] | inits[1] == set(model.param_inits())
    assert not inits[0] & inits[1]


def test_part_without_output_needs_the_gradient_of_the_loss() -> None:
    first, _ = cut(build_model(balance_loss_alpha=0.5))
    with pytest.raises(ValueError, match="set `loss_gradient`"):
        first(make_tokens())
    first.eval()
    assert first(make_tokens()).shape == (2, 32, 32)


def test_part_that_predicts_needs_embeddings_and_output() -> None:
    model = build_model(mtp_depth=1)
    model.tok_embeddings = None
    with pytest.raises(ValueError, match=r"multi-token prediction \(mtp_depth = 1\) needs embeddings and output"):
        model(torch.zeros(2, 32, 32), labels=make_tokens(), loss_fn=sum_loss)


# --- compilation and sharding ---


@pytest.mark.parametrize(("documents", "recomputes"), [(False, False), (True, True)])
def test_blocks_compile_once_for_each_kind(documents: bool, recomputes: bool) -> None:
    torch._dynamo.reset()
    changes = {"mtp_depth": 1, "balance_loss_alpha": 0.1}
    eager, compiled, tokens = build_strong_model(**changes), build_strong_model(**changes), make_tokens()
    if recomputes:
        checkpoint_blocks(compiled)
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.layers.values():
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    given = {}
    if documents:
        positions = make_positions()
        given = {"positions": positions, "mask": build_document_mask(positions, device_type="cpu")}
    for _ in range(2):
        losses = [m(tokens, labels=make_labels(tokens), loss_fn=sum_loss, **given) for m in (eager, compiled)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    assert counter.frame_count == 3  # dense, mixture, prediction
    gradients = ({name: p.grad for name, p in m.named_parameters()} for m in (compiled, eager))
    assert_same_gradients(*gradients)
    for ours, theirs in zip(list_mixtures(compiled), list_mixtures(eager), strict=True):
        assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)


@pytest.mark.usefixtures("_one_rank")
def test_multi_token_prediction_under_fsdp_equals_plain() -> None:
    """Norm and output are one unit, whose hooks must run once a step, though the prediction blocks come between the two."""
    changes = {"mtp_depth": 2, "balance_loss_alpha": 0.1}
    direct, model, tokens = build_strong_model(**changes), build_strong_model(**changes), make_tokens()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for unit in (model.tok_embeddings, *model.layers.values(), [model.norm, model.output], model):
        fully_shard(unit, mesh=mesh)
    for _ in range(2):
        losses = [m(tokens, labels=make_labels(tokens), loss_fn=sum_loss) for m in (direct, model)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_same_gradients(found, {name: p.grad for name, p in direct.named_parameters()})


@pytest.mark.usefixtures("_one_rank")
def test_bias_and_angles_stay_fp32_under_mixed_precision() -> None:
    model, tokens = build_strong_model(), make_tokens()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    for unit in (*model.layers.values(), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    scores: list[torch.Tensor] = []
    moe = list_mixtures(model)[0]
    moe.router.register_forward_hook(lambda _module, _inputs, routing: scores.append(routing.gates))
    assert model(tokens).dtype == torch.bfloat16
    assert scores[0].dtype == torch.float32
    assert moe.router.expert_bias.dtype == model.rope.table.dtype == torch.float32
