"""The script that samples, on folders of both kinds."""

from pathlib import Path

import pytest
import torch

from scripts.convert_checkpoint import main as convert
from scripts.generate import main
from tests.distributed.harness import run_distributed
from tests.distributed.hf_ranks import generate
from tests.hf_models import write_hf_folder
from trainer.components.tokenizer import build_tokenizer

PROMPT = "def main("


def get_expected(theirs, folder: Path, new: int) -> str:
    ids = torch.tensor([[256, *PROMPT.encode()]])
    beyond = [[i] for i in range(259, 272)]  # no tokens
    out = theirs.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        bad_words_ids=beyond,
    )
    return PROMPT + build_tokenizer(folder).decode(out[0, ids.shape[1] :].tolist()) + "\n"


@pytest.mark.parametrize("case", ["llama", "deepseek_v3"])
def test_greedy_text_is_that_of_transformers(case, tmp_path, capsys):
    theirs = write_hf_folder(case, tmp_path / "hf")
    assert convert([str(tmp_path / "hf"), str(tmp_path / "native")]) == 0
    expected = get_expected(theirs, tmp_path / "hf", 30)
    capsys.readouterr()
    for folder in ("hf", "native"):
        assert (
            main([str(tmp_path / folder), "--prompt", PROMPT, "--max-new-tokens=30", "--temperature=0", "--ignore-eos"])
            == 0
        )
        out, err = capsys.readouterr()
        assert out == expected
        assert "30 tokens in" in err


@pytest.mark.parametrize(("case", "options"), [("llama", ["--tensor-parallel=2"]), ("deepseek_v3", [])])
def test_several_processes_say_what_one_says(case, options, tmp_path, capsys):
    write_hf_folder(case, tmp_path / "hf")
    argv = [str(tmp_path / "hf"), "--prompt", PROMPT, "--prompt", "", "--max-new-tokens=12", "--top-k=3", "--seed=5"]
    assert main(argv) == 0
    expected = capsys.readouterr().out
    assert expected.startswith(PROMPT)
    assert run_distributed(generate, 2, [*argv, *options]) == [(0, expected), (0, "")]


def test_mistakes_are_named(tmp_path, capsys):
    write_hf_folder("deepseek_v3", tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    hf = str(tmp_path / "hf")
    for argv, message in (
        ([hf], "give a --prompt"),
        ([hf, "--prompt=a", "--top-p=2"], "top_p = 2.0 must be above 0"),
        ([hf, "--prompt=a", "--max-new-tokens=500"], "more than the 128 that the model was made for"),
        ([hf, "--prompt=a", "--tensor-parallel=2"], "--tensor-parallel 2 must divide the number of processes, 1"),
        ([str(tmp_path / "empty"), "--prompt=a"], "there is no checkpoint here"),
        ([hf, "--prompt-file", str(tmp_path / "nowhere")], "No such file"),
    ):
        assert main(argv) == 1
        assert message in capsys.readouterr().err
    assert Path(hf).is_dir()
