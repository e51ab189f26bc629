"""Boxes of tensors, read from Hugging Face files without the rest."""

import dataclasses

import pytest
import torch

from models.deepseek_v3.args import DeepSeekV3Args
from models.deepseek_v3.state_dict_adapter import DeepSeekV3Adapter
from models.hf_layout import find_places, read_box
from models.llama3.args import FLAVORS, LlamaArgs, RopeScaling
from models.llama3.state_dict_adapter import Llama3Adapter
from models.registry import get_model_spec
from trainer.components.network import Network

LLAMA = LlamaArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=24, ffn_hidden_dim=40, max_seq_len=64)
DEEPSEEK = DeepSeekV3Args(
    dim=32, n_layers=2, n_dense_layers=1, n_heads=2, vocab_size=24, hidden_dim=40, q_lora_rank=8, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_experts=6, top_k=2, moe_hidden_dim=16, n_expert_groups=1,
    n_limited_groups=1, max_seq_len=64,
)  # fmt: skip


def random_box(shape, generator):
    """Any box, empty ones too."""
    ends = [torch.randint(0, size + 1, (2,), generator=generator).sort().values.tolist() for size in shape]
    return tuple(begin for begin, _ in ends), tuple(end - begin for begin, end in ends)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("args", [LLAMA, DEEPSEEK], ids=["llama3", "deepseek_v3"])
def test_read_box_is_that_box_of_the_tensor_and_reads_little_more(args, fused):
    name = "llama3" if args is LLAMA else "deepseek_v3"
    network = Network(get_model_spec(name), args)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in network.shapes.items()}
    tensors = network.adapter.hf_tensors(fused_experts=fused)
    files = {tensor.name: tensor.build(state.__getitem__) for tensor in tensors}
    places = find_places(tensors)
    assert places.keys() == state.keys()
    assert {name: x.shape for name, x in files.items()} == {t.name: t.get_shape(network.shapes) for t in tensors}
    read = 0

    def read_file(name, box):
        nonlocal read
        read += files[name][box].numel()
        return files[name][box]

    for name, x in state.items():
        head_rows = max(part.rotary_heads and x.shape[0] // part.rotary_heads for part in places[name][0].tensor.parts)
        for _ in range(8):
            offsets, sizes = random_box(x.shape, generator)
            read = 0
            box = read_box(places[name], tuple(x.shape), offsets, sizes, read_file)
            expected = x[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            assert torch.equal(box, expected), (name, offsets, sizes)
            columns = sizes[1] if x.ndim > 1 else 1
            assert read <= expected.numel() + 2 * head_rows * columns, (name, offsets, sizes)


def test_args_come_back_from_config_json():
    for args in (*FLAVORS.values(), dataclasses.replace(LLAMA, rope_scaling=RopeScaling(), tie_embeddings=True)):
        back = Llama3Adapter.args_from_hf(Llama3Adapter(args).hf_config())
        same = {"ffn_hidden_dim": args.hidden_dim, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}
        assert back == dataclasses.replace(args, **same)
    for args in (DEEPSEEK, dataclasses.replace(DEEPSEEK, mtp_depth=1, q_lora_rank=0, n_shared_experts=0)):
        adapter = DeepSeekV3Adapter(args)
        names = [tensor.name for tensor in adapter.hf_tensors()]
        back = DeepSeekV3Adapter.args_from_hf(adapter.hf_config(), names)
        assert back == dataclasses.replace(args, rope_scaling=None)  # such short sequences go without YaRN
