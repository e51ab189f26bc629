"""Hugging Face folders at both ends of a run, on several meshes."""

import torch
from transformers import AutoModelForCausalLM

from scripts.convert_checkpoint import main as convert
from tests.distributed.harness import run_distributed
from tests.distributed.hf_ranks import MESHES, load_and_save_all
from tests.distributed.training import Run, assert_succeeded
from tests.hf_models import make_tokens, write_hf_folder
from trainer.components.hf_files import HFFolder
from trainer.components.native_weights import NativeWeights
from trainer.components.network import Network


def test_any_mesh_begins_from_a_folder_and_saves_the_same(tmp_path):
    theirs = {case: write_hf_folder(case, tmp_path / case, max_shard_size="100KB") for case in MESHES}
    by_rank = run_distributed(load_and_save_all, 2, str(tmp_path))
    for (case, axis), read in by_rank[0].items():
        source, saved = HFFolder(tmp_path / case), HFFolder(tmp_path / f"{case}-{axis}" / "step-3")
        assert source.tensors.keys() == saved.tensors.keys()
        for name in source.tensors:
            assert torch.equal(source.read(name), saved.read(name)), (case, axis, name)
        total = sum(torch.Size(stored.shape).numel() for stored in source.tensors.values())
        most = max(read, by_rank[1][case, axis])
        assert most < 0.75 * total, f"{case} over {axis}: a rank has read {most} of {total} numbers"
        model = AutoModelForCausalLM.from_pretrained(saved.path).eval()
        with torch.no_grad():
            assert torch.equal(model(make_tokens()).logits, theirs[case](make_tokens()).logits)
        assert sorted(path.name for path in saved.path.parent.iterdir()) == ["step-3"], "no leftovers"


def test_run_saves_what_transformers_loads_and_another_begins_from_it(tmp_path):
    model = ["--model.name=llama3", "--model.flavor=debugmodel", "--checkpoint.enable", "--training.steps=2"]
    model += ["--lr_scheduler.total_steps=2", "--training.global_batch_size=4"]
    first = Run(tmp_path)
    options = [
        "--checkpoint.last_save_in_hf",
        "--checkpoint.last_save_model_only",
        "--checkpoint.export_dtype=bfloat16",
    ]
    trained = assert_succeeded(first(2, *model, *options, keep=(2,)))[0].states[2]
    saved = tmp_path / "run/checkpoint/step-2"
    theirs, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    assert theirs.dtype == torch.bfloat16
    embeddings = next(x for name, x in trained.items() if name.endswith("tok_embeddings.weight"))
    assert torch.equal(theirs.model.embed_tokens.weight, embeddings.bfloat16())
    second = first.clone("second")
    options = ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={saved}", "--optimizer.lr=1e-9"]
    begun = assert_succeeded(second(1, *model, *options, keep=(2,)))[0].states[2]
    after = next(x for name, x in begun.items() if name.endswith("tok_embeddings.weight"))
    torch.testing.assert_close(after, embeddings.bfloat16().float(), rtol=0, atol=1e-6)


def test_checkpoint_of_a_run_with_experts_and_stages_apart_is_converted(tmp_path):
    options = ["--model.name=deepseek_v3", "--model.flavor=debugmodel", "--model.attn_mask_type=causal"]
    options += ["--checkpoint.enable", "--training.steps=1", "--lr_scheduler.total_steps=1"]
    options += ["--parallelism.expert_parallel_degree=2", "--parallelism.pipeline_parallel_degree=2"]
    assert_succeeded(Run(tmp_path)(4, *options))
    native = tmp_path / "run/checkpoint/step-1"
    assert convert([str(native), str(tmp_path / "hf")]) == 0
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    weights = NativeWeights(native)
    network = Network.from_native(weights)
    ours = network.spec.load_model_class()(network.args).eval()
    ours.load_state_dict({name: weights.read(name) for name in weights.shapes})
    with torch.no_grad():
        expected = ours(make_tokens(64))
        assert expected.std() > 0.05
        torch.testing.assert_close(theirs.eval()(make_tokens(64)).logits, expected, rtol=0, atol=1e-5)
