"""Sampling: what may be chosen, text as it comes, and the same tokens as transformers."""

import dataclasses

import pytest
import torch

from tests.hf_models import CASES, make_tokens, write_hf_folder
from trainer.components.checkpoint_state import ModelState
from trainer.components.generation import Generator, Sampling, choose_token, stream_text
from trainer.components.hf_files import HFFolder
from trainer.components.hf_load import load_hf_weights
from trainer.components.network import Network
from trainer.components.tokenizer import build_tokenizer

NEW = 24
GREEDY = Sampling(temperature=0)


def build_ours(folder):
    source = HFFolder(folder)
    network = Network.from_hf(source)
    model = network.spec.load_model_class()(network.args)
    load_hf_weights(source, ModelState(model).state_dict(), adapter=network.adapter, args=network.args)
    return model, network.spec.build_plan(network.args)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(case, tmp_path):
    theirs = write_hf_folder(case, tmp_path)
    model, plan = build_ours(tmp_path)
    assert plan.attention
    prompt = make_tokens(40)[:1]
    expected = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = expected[0, prompt.shape[1] :].tolist()
    assert len(set(expected)) > 3
    # Calls of several tokens, as tensor parallelism needs them, fill up with some that nobody sees.
    for multiple_of in (1, 3):
        generator = Generator(model, plan=plan, max_length=128, vocab_size=272, multiple_of=multiple_of)
        for _ in range(2):
            found = generator.generate(prompt[0].tolist(), max_new_tokens=NEW, sampling=GREEDY, seed=0, stop=None)
            assert list(found) == expected


def test_model_without_named_attention_computes_all_anew(tmp_path):
    write_hf_folder("llama", tmp_path)
    model, plan = build_ours(tmp_path)
    prompt = make_tokens(40)[0].tolist()
    options = {"max_new_tokens": NEW, "sampling": Sampling(top_k=5), "seed": 3, "stop": None}
    model_calls = []
    model.register_forward_hook(lambda module, args, out: model_calls.append(args[0].shape[1]))
    found = [
        list(Generator(model, plan=its_plan, max_length=128, vocab_size=259).generate(prompt, **options))
        for its_plan in (dataclasses.replace(plan, attention=""), plan)
    ]
    assert found[0] == found[1]
    assert model_calls == [*range(40, 40 + NEW), 40, *[1] * (NEW - 1)]
    assert max(found[0]) < 259, "rows beyond the tokenizer's vocabulary are never chosen"


def test_generation_ends_at_the_stop_token_and_refuses_what_does_not_fit(tmp_path):
    write_hf_folder("llama", tmp_path)
    model, plan = build_ours(tmp_path)
    generator = Generator(model, plan=plan, max_length=128, vocab_size=272)
    options = {"sampling": GREEDY, "seed": 0}
    tokens = list(generator.generate([1, 2], max_new_tokens=20, stop=None, **options))
    stop = tokens[5]
    assert list(generator.generate([1, 2], max_new_tokens=20, stop=stop, **options)) == tokens[: tokens.index(stop) + 1]
    with pytest.raises(ValueError, match="a prompt of 2 tokens and 127 new ones are more than the 128"):
        next(generator.generate([1, 2], max_new_tokens=127, stop=None, **options))
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(generator.generate([], max_new_tokens=1, stop=None, **options))


def test_choice_follows_probabilities_within_top_k_and_top_p():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def draw(**settings):
        counts = torch.zeros(4)
        for _ in range(4000):
            counts[choose_token(logits, Sampling(**settings), generator)] += 1
        return counts / counts.sum()

    torch.testing.assert_close(draw(), torch.tensor([0.5, 0.25, 0.15, 0.1]), atol=0.03, rtol=0)
    torch.testing.assert_close(draw(top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.03, rtol=0)
    # 0.5 + 0.25 < 0.8: the third is needed.
    torch.testing.assert_close(draw(top_p=0.8), torch.tensor([5, 2.5, 1.5, 0]) / 9, atol=0.03, rtol=0)
    torch.testing.assert_close(draw(temperature=0.5), torch.tensor([25, 6.25, 2.25, 1]) / 34.5, atol=0.03, rtol=0)
    assert draw(top_p=1e-6)[0] == 1
    assert choose_token(logits, GREEDY, generator) == 0


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_sampling_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} = .* must be"):
        Sampling(**settings)


def test_text_comes_in_whole_characters():
    tokenizer = build_tokenizer("byte")
    text = "na\u00efve \U0001f642 " * 40
    ids = tokenizer.encode(text, eos=True)
    pieces = list(stream_text(tokenizer, iter(ids), skip=tokenizer.eos_id))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > len(text) * 0.9, "each character as soon as it is there"
    broken = list(stream_text(tokenizer, iter([0xF0, 0x9F, 65, 0xFF])))
    assert "".join(broken) == bytes([0xF0, 0x9F, 65, 0xFF]).decode(errors="replace")
