"""Checks that need the model, the tokenizer or the data sets, and the one report of everything that is wrong."""

import dataclasses
import logging
import re
import subprocess
import sys

import pytest

from models import registry
from models.llama3.args import FLAVORS
from trainer.config.errors import ConfigError
from trainer.config.manager import load_config
from trainer.preflight import EXPERT_BACKEND_NAMES, OPTIMIZER_NAMES, check, check_registered


def problems_of(*argv, world_size=None):
    try:
        check(load_config(argv), world_size)
    except ConfigError as error:
        return error.problems
    return []


def test_defaults_are_in_order():
    assert problems_of(world_size=1) == []


def test_optimizer_names_are_those_of_the_table():
    from trainer.components.optimizer import get_optimizer_builder

    for name in OPTIMIZER_NAMES:
        get_optimizer_builder(name)
    with pytest.raises(ValueError, match="Known are") as caught:
        get_optimizer_builder("no such optimizer")
    listed = re.search(r"Known are ([\w, ]+),", str(caught.value))
    assert set(listed.group(1).split(", ")) == set(OPTIMIZER_NAMES)


def test_names_of_ways_to_experts_are_those_of_the_table():
    from trainer.distributed import expert_backends

    assert set(expert_backends._BACKENDS) == set(EXPERT_BACKEND_NAMES)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--model.name=lama3"], ["model.name = lama3", "llama3"]),
        (["--model.flavor=8b"], ["model.flavor = 8b", "8B"]),
        (
            ["--parallelism.expert_parallel_comm_backend=deep_ep"],
            ["unknown way to the experts", "Did you mean deepep?", "experimental.custom_import"],
        ),
        (["--optimizer.name=adamw"], ["optimizer.name = adamw", "Did you mean AdamW?", "Muon"]),
        (["--training.dataset=stdlb"], ["training.dataset = stdlb", "stdlib"]),
        (["--training.dataset=text"], ["training.dataset = text", "set training.dataset_path"]),
        (["--validation.enable", "--validation.dataset=text"], ["set validation.dataset_path"]),
        (["--data.sources", '[{dataset = "text"}]'], ["data.sources, item 1", "set path in this item"]),
        (["--training.dataset=text", "--training.dataset_path=/no/where"], ["/no/where"]),
        (["--validation.enable", "--validation.dataset=stdlb"], ["validation.dataset = stdlb"]),
        (["--data.sources", '[{dataset = "stdlib"}, {dataset = "stdlb"}]'], ["data.sources, item 2", "stdlb"]),
        (["--model.hf_assets_path=/no/where"], ["model.hf_assets_path = /no/where", "does not exist"]),
        (
            ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"],
            ["model.hf_assets_path = byte", "no such folder of Hugging Face files"],
        ),
        (["--experimental.custom_import=no.such.module"], ["no.such.module", "PYTHONPATH"]),
        (["--experimental.custom_import=.relative"], ["no such module"]),
        (
            ["--checkpoint.enable", "--checkpoint.remote_folder=s4://bucket/run"],
            ["checkpoint.remote_folder = s4://bucket/run", "Protocol not known: s4"],
        ),
    ],
)
def test_name_or_path_that_does_not_exist_is_refused(argv, expected):
    (problem,) = problems_of(*argv)
    for word in expected:
        assert word in problem
    assert problem.endswith("[command line]")


def test_validation_data_set_counts_only_when_validation_is_on():
    assert problems_of("--validation.dataset=stdlb") == []


@pytest.mark.parametrize("argument", ["--model.name=mine", "--optimizer.name=mine", "--training.dataset=mine"])
def test_names_are_left_to_a_module_that_may_register_them(argument, monkeypatch, tmp_path):
    (tmp_path / "my_module.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert problems_of(argument, "--experimental.custom_import=my_module") == []
    assert len(problems_of(argument)) == 1


def test_module_in_a_package_is_found_without_importing_the_package(monkeypatch, tmp_path):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "my_package" / "extras.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert problems_of("--experimental.custom_import=my_package.extras") == []
    (problem,) = problems_of("--experimental.custom_import=my_package.other")
    assert "no such module" in problem
    (problem,) = problems_of("--experimental.custom_import=my_package.extras.deeper")
    assert "no such module" in problem


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--compile.backend=inductr"], "compile.backend"),
        (["--compile.components=loss", "--compile.backend=inductr"], "compile.backend"),
        (["--compile.model_backend_override=inductr"], "compile.model_backend_override"),
        (["--compile.components=model", "--compile.model_backend_override=eager", "--compile.backend=inductr"], None),
        (["--compile.backend=eager_noexcept"], None),
    ],
)
def test_backend_that_torch_has_not_is_refused(argv, key):
    problems = problems_of("--compile.enable", *argv)
    assert len(problems) == bool(key)
    if key:
        for words in (f"{key} = inductr: torch has no such", "Did you mean inductor?", "cudagraphs", "custom_import"):
            assert words in problems[0]
    assert problems_of(*argv) == [], "nothing is compiled"
    user_module = ["--experimental.custom_import=tests.distributed.user_module"]
    assert problems_of("--compile.enable", *argv, *user_module) == [], "which may register it"
    if key:
        with pytest.raises(ConfigError, match=r"1 problem.*\n.*inductr: torch has no such"):
            check_registered(load_config(["--compile.enable", *argv, *user_module]))


def test_plan_of_a_users_own_model_needs_no_tokenizer_either():
    user_module = "--experimental.custom_import=tests.distributed.user_module"
    loaded = load_config([user_module, "--model.hf_assets_path=/nowhere"])
    check_registered(loaded, needs_files=False)
    with pytest.raises(ConfigError, match="/nowhere"):
        check_registered(loaded)


def test_usual_backends_are_known_without_torch():
    code = """
import sys
from trainer.config.manager import load_config
from trainer.preflight import check
for backend in ("inductor", "aot_eager", "eager"):
    check(load_config(["--compile.enable", f"--compile.backend={backend}"]), 1)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "change", ["mtp_depth=1", "mtp_weight=0.1", "balance_loss_alpha=1e-4", "bias_update_speed=0.01"]
)
def test_change_of_the_flavor_is_refused_where_the_model_has_nothing_of_the_kind(change):
    (problem,) = problems_of(f"--model.{change}")
    name, _, value = change.partition("=")
    assert problem.startswith(f"model.{name} = {float(value):g}: ")
    assert "the models of model.name = llama3 have nothing of this kind" in problem
    assert problems_of(f"--model.{change}", "--model.name=deepseek_v3") == []


def test_vocabulary_smaller_than_the_tokenizers_is_refused(monkeypatch):
    small = {"tiny": dataclasses.replace(FLAVORS["debugmodel"], vocab_size=100)}
    spec = dataclasses.replace(registry.get_model_spec("llama3"), name="small", flavors=small)
    monkeypatch.setattr(registry, "_registered", {"small": spec})
    (problem,) = problems_of("--model.name=small", "--model.flavor=tiny")
    assert "vocab_size = 100" in problem
    assert re.search(r"the tokenizer has 2\d\d tokens", problem)


@dataclasses.dataclass(frozen=True)
class UncheckedArgs:
    dim: int = 64
    n_heads: int = 4
    n_kv_heads: int = 4
    vocab_size: int = 4096
    max_seq_len: int = 64
    attn_mask_type: str = "causal"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (UncheckedArgs(dim=66), "dim = 66 must be a multiple of n_heads = 4"),
        (UncheckedArgs(n_kv_heads=3), "n_heads = 4 must be a multiple of n_kv_heads = 3"),
    ],
)
def test_heads_that_do_not_divide_are_refused(monkeypatch, args, expected):
    spec = dataclasses.replace(registry.get_model_spec("llama3"), name="odd", flavors={"odd": args})
    monkeypatch.setattr(registry, "_registered", {"odd": spec})
    (problem,) = problems_of("--model.name=odd", "--model.flavor=odd")
    assert expected in problem


def test_everything_is_reported_at_once_with_origins(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nstep = 1\nseq_len = 0\nglobal_batch_size = 7\n[model]\nflavor = '8b'\n")
    problems = problems_of("--job.config_file", str(path), "--optimizer.name=adamw", "--debug.seed=x", world_size=2)
    expected = [
        f"{path}:2: unknown key training.step",
        "command line: --debug.seed",
        "training.seq_len = 0",
        "training.global_batch_size = 7",
        "optimizer.name = adamw",
        "model.flavor = 8b",
    ]
    assert len(problems) == len(expected)
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start)
    assert problems[2].endswith(f"[{path}:3]")
    assert problems[5].endswith(f"[{path}:6]")


def test_config_error_lists_each_problem_on_its_line():
    with pytest.raises(ConfigError) as caught:
        check(load_config(["--training.steps=0", "--training.seq_len=0"]), None)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 problems in the configuration:"
    assert [line[:4] for line in lines[1:]] == ["  - "] * 2


def test_warnings_are_logged_with_origins(caplog):
    with caplog.at_level(logging.WARNING, logger="trainer.preflight"):
        assert problems_of("--training.dataloader.persistent_workers", "--model.tokenizer_path=byte") == []
    assert len(caplog.records) == 2
    assert all("[command line]" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("flavor", "change", "expected"),
    [
        (
            "debugmodel",
            "mtp_weight=0.1",
            "model.mtp_weight = 0.1 has no effect: model.flavor = debugmodel has mtp_depth = 0",
        ),
        ("236B", "bias_update_speed=0.1", "has no effect: model.flavor = 236B has uses_expert_bias = False"),
        ("debugmodel", "bias_update_speed=0.1", None),
    ],
)
def test_change_of_a_flavor_that_nothing_heeds_is_told(caplog, flavor, change, expected):
    argv = ["--model.name=deepseek_v3", f"--model.flavor={flavor}", f"--model.{change}"]
    with caplog.at_level(logging.WARNING, logger="trainer.preflight"):
        check(load_config(argv), None)
    assert [expected in record.getMessage() for record in caplog.records] == ([True] if expected else [])


def test_warnings_are_not_logged_where_another_process_does(caplog):
    with caplog.at_level(logging.WARNING, logger="trainer.preflight"):
        check(load_config(["--training.dataloader.persistent_workers"]), None, log_warnings=False)
    assert caplog.records == []


_VALIDATION = ("--validation.enable", "--validation.dataset=c4_validation")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], ["training.dataset"]),
        (["--data.streaming"], []),
        (["--data.streaming", *_VALIDATION], ["validation.dataset"]),
        (["--data.streaming", *_VALIDATION, "--validation.steps=9"], []),
        ([*_VALIDATION, "--validation.steps=9"], ["training.dataset", "validation.dataset"]),
    ],
)
def test_download_of_a_whole_data_set_is_warned_about(caplog, argv, expected):
    with caplog.at_level(logging.WARNING, logger="trainer.preflight"):
        assert problems_of("--training.dataset=c4", *argv) == []
    told = [record.getMessage() for record in caplog.records if "downloaded" in record.getMessage()]
    assert [message.split(" = ")[0] for message in told] == expected
