"""Optimizers in one process: the table, groups by pattern, skipping, and the state."""

import copy

import pytest
import torch
from torch import nn

from trainer.components import optimizer as optimizer_module
from trainer.components.optimizer import (
    Optimizers,
    build_optimizer,
    get_optimizer_builder,
    group_parameters,
    register_optimizer,
)
from trainer.config.schema_training import MuonConfig, OptimizerConfig, ParamGroupConfig

IMPLEMENTATIONS = ("fused", "foreach", "for-loop")


class TinyModel(nn.Module):
    """Embedding, two blocks of a matrix and a norm, output."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, 6)
        self.layers = nn.ModuleDict({str(i): nn.ModuleDict({"w": nn.Linear(6, 6, bias=False), "norm": nn.LayerNorm(6)}) for i in range(2)})  # fmt: skip
        self.output = nn.Linear(6, 11, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = h + torch.tanh(layer["w"](layer["norm"](h)))
        return self.output(h)


def make_model(seed: int = 0) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel()


def backward(model: nn.Module, seed: int = 0) -> None:
    tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    model(tokens).logsumexp(-1).mean().backward()


def train(model: nn.Module, optimizers, steps: int, first_seed: int = 0) -> None:
    for step in range(steps):
        backward(model, first_seed + step)
        optimizers.step()
        optimizers.zero_grad()


def test_state_that_was_guessed_before_the_first_step_is_forgotten():
    ours, theirs = make_model(), make_model()
    names = {parameter: name for name, parameter in ours.named_parameters()}
    optimizers = Optimizers([torch.optim.NAdam(ours.parameters(), lr=0.1)], names)
    assert optimizers.state_dict()
    optimizers.forget_guesses()
    train(ours, optimizers, 2)
    reference = torch.optim.NAdam(theirs.parameters(), lr=0.1)
    train(theirs, reference, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    kept = optimizers.state_dict()
    optimizers.forget_guesses()
    assert optimizers.state_dict().keys() == kept.keys()


def test_muon_says_what_it_leaves_to_adamw_of_a_mixture(caplog):
    model = make_model()
    model.experts = nn.Parameter(torch.zeros(3, 6, 4))
    build_optimizer(model, section=OptimizerConfig(name="Muon", lr=3e-4))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        "72 parameters in stacks of matrices, such as experts, are trained by AdamW, with optimizer.lr = 0.0003"
        in warning
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_adam_takes_the_steps_of_torch(name, implementation):
    ours, theirs = make_model(), make_model()
    section = OptimizerConfig(name=name, lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, implementation=implementation)  # fmt: skip
    reference = getattr(torch.optim, name)(theirs.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    optimizers = build_optimizer(ours, section=section)
    for step in range(3):
        for model, optimizer in ((ours, optimizers), (theirs, reference)):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=key)
    assert not torch.equal(ours.output.weight, make_model().output.weight)


def test_unknown_name_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"optimizer\.name = 'adamw'.*Did you mean AdamW\?.*Adam, AdamW, .*Muon"):
        get_optimizer_builder("adamw")
    with pytest.raises(ValueError, match=r"'Zzz' is not known\. Known are"):
        build_optimizer(make_model(), section=OptimizerConfig(name="Zzz"))


def test_registered_optimizer_is_found_and_its_state_can_be_loaded_before_a_step(monkeypatch):
    monkeypatch.setattr(optimizer_module, "_BUILDERS", dict(optimizer_module._BUILDERS))
    register_optimizer(
        "SGD",
        lambda parameters, section: torch.optim.SGD(
            group_parameters(parameters, lr=section.lr, weight_decay=section.weight_decay), momentum=0.9
        ),
    )
    with pytest.raises(ValueError, match="already registered"):
        register_optimizer("SGD", lambda parameters, section: [])
    section = OptimizerConfig(name="SGD", lr=0.1, weight_decay=0.01)
    model = make_model()
    optimizers = build_optimizer(model, section=section)
    train(model, optimizers, 2)
    saved, weights = copy.deepcopy(optimizers.state_dict()), copy.deepcopy(model.state_dict())
    resumed_model = make_model(1)
    resumed = build_optimizer(resumed_model, section=section)
    before = copy.deepcopy(resumed_model.state_dict())
    assert resumed.state_dict().keys() == saved.keys()
    assert all(torch.equal(resumed_model.state_dict()[key], value) for key, value in before.items())
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(saved)
    train(model, optimizers, 2, first_seed=2)
    train(resumed_model, resumed, 2, first_seed=2)
    assert all(torch.equal(resumed_model.state_dict()[key], value) for key, value in model.state_dict().items())


def _settings_by_name(model, optimizers) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizers.param_groups
        for parameter in group["params"]
    }


def test_groups_by_pattern_first_match_counts_and_own_decay_beats_no_decay():
    section = OptimizerConfig(
        lr=0.1,
        weight_decay=0.5,
        no_decay=["*norm*", "tok_embeddings.*"],
        param_groups=[
            ParamGroupConfig(match="layers.1.*", lr_scale=2.0),
            ParamGroupConfig(match="layers.*", lr_scale=4.0),
            ParamGroupConfig(match="tok_embeddings.*", weight_decay=0.25),
        ],
    )
    model = make_model()
    settings = _settings_by_name(model, build_optimizer(model, section=section))
    assert settings == {
        "tok_embeddings.weight": (0.1, 0.25),
        "layers.0.w.weight": (0.4, 0.5),
        "layers.0.norm.weight": (0.4, 0.0),
        "layers.0.norm.bias": (0.4, 0.0),
        "layers.1.w.weight": (0.2, 0.5),
        "layers.1.norm.weight": (0.2, 0.0),
        "layers.1.norm.bias": (0.2, 0.0),
        "output.weight": (0.1, 0.5),
    }


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (OptimizerConfig(no_decay=["*norn*"]), "optimizer.no_decay"),
        (OptimizerConfig(param_groups=[ParamGroupConfig(match="layer.*")]), "optimizer.param_groups.match"),
        (OptimizerConfig(name="Muon", muon=MuonConfig(exclude=["router"])), "optimizer.muon.exclude"),
    ],
)
def test_pattern_that_matches_nothing_is_refused(section, key):
    with pytest.raises(ValueError, match=rf"{key}: the pattern .* matches no parameter"):
        build_optimizer(make_model(), section=section)


def test_pattern_is_checked_against_the_whole_model_when_only_a_part_is_here():
    model = make_model()
    section = OptimizerConfig(no_decay=["tok_embeddings.*"])
    names = [name for name, _ in model.named_parameters()]
    optimizers = build_optimizer([model.layers["0"]], section=section, all_names=names)
    assert [group["weight_decay"] for group in optimizers.param_groups] == [section.weight_decay]


def test_frozen_parameters_are_left_out():
    model = make_model()
    model.tok_embeddings.requires_grad_(False)
    assert "tok_embeddings.weight" not in _settings_by_name(model, build_optimizer(model, section=OptimizerConfig()))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizer(model, section=OptimizerConfig())


def test_names_are_clean_of_wrappers():
    model = make_model()
    model.layers["0"] = torch.compile(model.layers["0"], backend="eager")
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    optimizers = build_optimizer(model, section=OptimizerConfig(no_decay=["layers.0.norm.*"]))
    assert "state.layers.0.norm.weight.exp_avg" in optimizers.state_dict()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["AdamW", "Adam", "Muon"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_skip_with_nan_gradients_changes_nothing(name, implementation, steps_before):
    model = make_model()
    optimizers = build_optimizer(model, section=OptimizerConfig(name=name, lr=0.01, implementation=implementation))
    train(model, optimizers, steps_before)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizers.state_dict())
    backward(model)
    for parameter in model.parameters():
        parameter.grad.fill_(float("nan"))
    optimizers.step(skip=torch.tensor(1.0))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, state[key]) for key, value in optimizers.state_dict().items())
    optimizers.zero_grad()
    reference, reference_model = None, make_model()
    reference = build_optimizer(
        reference_model, section=OptimizerConfig(name=name, lr=0.01, implementation=implementation)
    )
    train(reference_model, reference, steps_before + 1)
    backward(model, steps_before)
    optimizers.step(skip=torch.tensor(0.0))
    for key, value in model.state_dict().items():
        assert torch.equal(value, reference_model.state_dict()[key]), key


def test_skip_is_brought_to_the_parameters_before_the_kernel_reads_it():
    """torch's fused kernel would copy it from a GPU to offloaded parameters without waiting."""

    class SkipElsewhere:
        def to(self, device):
            assert torch.device(device) == torch.device("cpu"), "where the parameters are"
            return torch.ones(())

    model = nn.Linear(3, 2)
    optimizers = build_optimizer(model, section=OptimizerConfig(lr=0.1, implementation="fused"))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    optimizers.step(SkipElsewhere())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Muon"])
def test_state_of_an_optimizer_that_never_stepped_counts_no_step(name):
    """Saving before the first step must not count one: Adam's bias correction would be off from then on."""
    section = OptimizerConfig(name=name, lr=0.01)
    plain_model, saved_model = make_model(), make_model()
    plain, saved = (build_optimizer(model, section=section) for model in (plain_model, saved_model))
    state = saved.state_dict()
    assert state
    assert all(not value.any() for value in state.values())
    train(plain_model, plain, 3)
    train(saved_model, saved, 3)
    assert all(torch.equal(value, saved_model.state_dict()[key]) for key, value in plain_model.state_dict().items())


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_state_round_trip_goes_on_exactly_and_takes_settings_from_the_configuration(name):
    groups = [ParamGroupConfig(match="layers.0.*", lr_scale=0.5, weight_decay=0.0)]
    model = make_model()
    optimizers = build_optimizer(model, section=OptimizerConfig(name=name, lr=0.01, param_groups=groups))
    train(model, optimizers, 3)
    resumed_model = make_model(1)
    resumed_model.load_state_dict(model.state_dict())
    resumed = build_optimizer(resumed_model, section=OptimizerConfig(name=name, lr=0.01, param_groups=groups))
    resumed.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    train(model, optimizers, 2, first_seed=3)
    train(resumed_model, resumed, 2, first_seed=3)
    assert all(torch.equal(value, resumed_model.state_dict()[key]) for key, value in model.state_dict().items())
    changed = build_optimizer(make_model(), section=OptimizerConfig(name=name, lr=0.04, param_groups=groups))
    changed.load_state_dict(optimizers.state_dict())
    assert 0.04 in {group["lr"] for group in changed.param_groups}


def test_load_state_dict_names_what_does_not_fit():
    adam = build_optimizer(make_model(), section=OptimizerConfig())
    muon = build_optimizer(make_model(), section=OptimizerConfig(name="Muon"))
    with pytest.raises(ValueError, match=r"missing \['state\.layers\.0\.w\.weight\.momentum_buffer'"):
        muon.load_state_dict(adam.state_dict())
    other = {
        key: torch.zeros(3) if key.endswith("w.weight.exp_avg") else value for key, value in adam.state_dict().items()
    }
    with pytest.raises(ValueError, match="has shape"):
        build_optimizer(make_model(), section=OptimizerConfig()).load_state_dict(other)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_muon_trains_hidden_matrices_and_adamw_the_rest_as_torch_does(adjust_lr):
    section = OptimizerConfig(
        name="Muon",
        lr=0.01,
        weight_decay=0.2,
        muon=MuonConfig(lr=0.03, weight_decay=0.1, exclude=["layers.1.w.*"], adjust_lr=adjust_lr),
    )
    model, reference = make_model(), make_model()
    optimizers = build_optimizer(model, section=section)
    muon, adamw = optimizers
    assert [p is model.layers["0"]["w"].weight for p in muon.param_groups[0]["params"]] == [True]
    by_torch = torch.optim.Muon(
        [reference.layers["0"]["w"].weight], lr=0.03, weight_decay=0.1, momentum=0.95, adjust_lr_fn=adjust_lr
    )
    rest = [p for name, p in reference.named_parameters() if name != "layers.0.w.weight"]
    by_torch_rest = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.2, fused=True)
    for step in range(3):
        for m in (model, reference):
            m.zero_grad()
            backward(m, step)
        optimizers.step()
        by_torch.step()
        by_torch_rest.step()
    assert isinstance(adamw, torch.optim.AdamW)
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in model.state_dict().items())


def test_muon_without_nesterov_leaves_a_bf16_momentum_alone():
    """torch's own scales its bf16 argument in place, which then is the momentum itself."""
    weight = nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))
    model = nn.Module()
    model.hidden = nn.Module()
    model.hidden.weight = weight
    optimizers = build_optimizer(
        model, section=OptimizerConfig(name="Muon", muon=MuonConfig(nesterov=False, momentum=0.5))
    )
    weight.grad = torch.full_like(weight, 64.0)
    optimizers.step()
    assert torch.equal(optimizers.state_dict()["state.hidden.weight.momentum_buffer"], torch.full_like(weight, 32.0))


@pytest.mark.parametrize("shape", [(6, 6), (24, 5), (5, 24)])
def test_muon_of_torch_takes_the_same_steps_bit_for_bit(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    model = nn.Module()
    model.hidden = nn.Linear(*shape[::-1], bias=False)
    model.hidden.weight.data.copy_(start)
    theirs = nn.Parameter(start.clone())
    optimizers = build_optimizer(model, section=OptimizerConfig(name="Muon"))
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(shape)
        model.hidden.weight.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizers.step()
        reference.step()
    assert torch.equal(model.hidden.weight, theirs)


def test_learning_rates_are_told_for_each_optimizer():
    muon = build_optimizer(make_model(), section=OptimizerConfig(name="Muon", lr=0.003, muon=MuonConfig(lr=0.03)))
    assert muon.get_learning_rates() == {"ShardedMuon": 0.03, "AdamW": 0.003}
    assert build_optimizer(make_model(), section=OptimizerConfig(lr=0.004)).get_learning_rates() == {"AdamW": 0.004}
