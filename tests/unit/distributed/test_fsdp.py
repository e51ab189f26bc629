from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from models.plan import ParallelPlan
from trainer.config.schema_parallel import ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.fsdp import apply_data_parallel, choose_accumulation, set_gradient_sync
from trainer.distributed.parallel_dims import ParallelDims

PLAN = ParallelPlan(fsdp_units=(("*",),), blocks="*")
FP32 = TrainingConfig(mixed_precision_param="float32")


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))


def test_without_process_group_fp32_model_stays_as_it_is() -> None:
    model = _model()
    apply_data_parallel(
        model, plan=PLAN, dims=ParallelDims(world_size=1), parallelism=ParallelismConfig(), training=FP32
    )
    assert type(model) is nn.Sequential
    set_gradient_sync(model, is_last_microbatch=False)  # nothing to say to a plain module


def test_without_process_group_mixed_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training.mixed_precision_param = 'bfloat16'.*torchrun"):
        apply_data_parallel(
            _model(),
            plan=PLAN,
            dims=ParallelDims(world_size=1),
            parallelism=ParallelismConfig(),
            training=TrainingConfig(),
        )


@pytest.mark.parametrize(
    ("setting", "reduce_dtype", "device_type", "device_bytes", "expected"),
    [
        ("auto", "float32", "cpu", 0, "unsharded"),
        ("auto", "bfloat16", "cpu", 0, "sharded"),
        # 220 parameters: 880 bytes of whole gradients.
        ("auto", "float32", "cuda", 8800, "unsharded"),
        ("auto", "float32", "cuda", 8799, "sharded"),
        ("sharded", "float32", "cpu", 0, "sharded"),
        ("unsharded", "bfloat16", "cuda", 1, "unsharded"),
    ],
)
def test_accumulation_fits_the_memory(
    setting: str,
    reduce_dtype: str,
    device_type: str,
    device_bytes: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=device_bytes))
    chosen = choose_accumulation(
        _model(),
        parallelism=ParallelismConfig(fsdp_accumulation=setting),  # type: ignore[arg-type]
        training=TrainingConfig(mixed_precision_reduce=reduce_dtype),  # type: ignore[arg-type]
        device=torch.device(device_type),
    )
    assert chosen == expected
