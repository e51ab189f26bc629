"""metrics.py, metric_writers.py and hardware.py."""

import json
import logging
import math
import sys
import types

import pytest
import torch

from trainer.components import logging_setup
from trainer.components import metrics as metrics_module
from trainer.components.hardware import MemoryMonitor, get_peak_flops
from trainer.components.metric_writers import JsonlWriter, read_metrics, to_json_values
from trainer.components.metrics import MetricsLogger, Workload, format_seconds
from trainer.config.schema import MetricsConfig

QUIET = {"enable_tensorboard": False, "progress_bar": False}


class Clock:
    """Stands in for the module `time`; it moves only when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def time(self):
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


def make_logger(folder, *, rank=0, steps=10, peak_flops=1e12, world_size=1, dp_degree=1, **section):
    return MetricsLogger(
        section=MetricsConfig(**{**QUIET, **section}),
        dump_folder=folder,
        rank=rank,
        device=torch.device("cpu"),
        total_steps=steps,
        workload=Workload(
            world_size=world_size,
            dp_degree=dp_degree,
            flops_per_token=2e9,
            flops_per_token_full=3e9,
            peak_flops=peak_flops,
        ),
    )


def run_steps(logger, first, last, loss=2.0, tokens=1000):
    for step in range(first, last + 1):
        logger.add_tokens(tokens)
        logger.log(step, loss=torch.tensor(loss / step), grad_norm=torch.tensor(0.5), lr=1e-3)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_log_writes_speed_mfu_and_wait_from_tokens_and_clock(tmp_path, clock):
    logger = make_logger(tmp_path, world_size=8, dp_degree=4, log_freq=2)
    logger.begin(step=0, tokens_seen=0)
    for step in (1, 2, 3, 4):
        clock.now += 2.0
        logger.add_tokens(1000)
        logger.add_data_wait(0.5)
        logger.log(step, loss=torch.tensor(3.0), grad_norm=1.5, lr=1e-4, extra={"data/web": torch.tensor(7)})
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    # 2 steps of 1000 tokens on each of 4 data-parallel ranks, by 8 devices, in 4 seconds.
    assert record["tokens_per_second"] == pytest.approx(2 * 1000 * 4 / 8 / 4.0)
    assert record["mfu"] == pytest.approx(100 * 250 * 2e9 / 1e12)
    assert record["mfu_full"] == pytest.approx(100 * 250 * 3e9 / 1e12)
    assert record["tflops"] == pytest.approx(0.5)
    assert record["step_seconds"] == pytest.approx(2.0)
    assert record["data_wait"] == pytest.approx(0.25)
    assert record["data_wait_seconds"] == pytest.approx(0.5)
    assert record["tokens_seen"] == 4 * 4 * 1000
    assert (record["step"], record["loss"], record["grad_norm"], record["lr"]) == (4, 3.0, 1.5, 1e-4)
    assert record["data/web"] == 7
    assert record["memory_gib"] > 0
    assert 0 < record["memory_percent"] < 100


def test_log_picks_first_each_freq_and_last_step(tmp_path):
    logger = make_logger(tmp_path, log_freq=3, steps=8)
    logger.begin(step=0, tokens_seen=0)
    run_steps(logger, 1, 8)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3, 6, 8]


def test_log_fetches_nothing_in_steps_that_are_not_logged(tmp_path):
    class Unready(float):
        def __format__(self, spec):
            raise AssertionError("read")

    logger = make_logger(tmp_path, log_freq=5)
    logger.begin(step=0, tokens_seen=0)
    run_steps(logger, 1, 1)
    logger.log(2, loss=torch.empty((), device="meta"), grad_norm=torch.empty((), device="meta"), lr=Unready(1.0))
    with pytest.raises((RuntimeError, NotImplementedError)):
        logger.log(5, loss=torch.empty((), device="meta"), grad_norm=0.0, lr=1.0)


def test_pause_leaves_the_time_out_of_speed(tmp_path, clock):
    logger = make_logger(tmp_path, log_freq=1)
    logger.begin(step=0, tokens_seen=0)
    with logger.pause():
        clock.now += 100.0
    clock.now += 1.0
    run_steps(logger, 1, 1)
    clock.now += 4.0
    run_steps(logger, 2, 2)
    speeds = [record["tokens_per_second"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert speeds == pytest.approx([1000.0, 250.0])


def test_log_without_known_peak_leaves_mfu_out(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        logger = make_logger(tmp_path, peak_flops=None)
        logger.begin(step=0, tokens_seen=0)
        run_steps(logger, 1, 1)
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert record["mfu"] is None
    assert record["mfu_full"] is None
    assert record["tflops"] > 0
    assert "mfu" not in caplog.records[-1].getMessage()


def test_log_line_says_what_one_watches(tmp_path, clock, caplog):
    logger = make_logger(tmp_path, log_freq=1, steps=100)
    logger.begin(step=0, tokens_seen=0)
    clock.now += 2.0
    run_steps(logger, 1, 1)
    clock.now += 1.0
    with caplog.at_level(logging.INFO):
        run_steps(logger, 2, 2)
    line = caplog.records[-1].getMessage()
    for part in ("step 2/100", "loss 1.0000", "grad 0.500", "lr 1.00e-03", "tok/s 1,000", "mfu 200.0%", "eta 1m38s"):
        assert part in line
    assert "\033" not in line


def test_nonfinite_loss_is_valid_json_and_keeps_its_name(tmp_path):
    logger = make_logger(tmp_path, log_freq=1)
    logger.begin(step=0, tokens_seen=0)
    logger.log(1, loss=torch.tensor(math.nan), grad_norm=math.inf, lr=1.0)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    record = json.loads(line, parse_constant=refuse)
    assert record["loss"] is None
    assert record["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1, 1),
        (True, True),
        (None, None),
        ("a", "a"),
        (-math.inf, None),
        ([1.0, math.nan], [1.0, "nan"]),
        ({1: 2}, {"1": 2}),
    ],
)
def test_to_json_values_survives_json(value, written):
    assert json.loads(json.dumps(to_json_values({"key": value}), allow_nan=False))["key"] == written


@pytest.mark.parametrize(("all_ranks", "written"), [(False, False), (True, True)])
def test_other_ranks_write_to_their_own_folder_only_on_request(tmp_path, all_ranks, written):
    logger = make_logger(tmp_path, rank=3, save_for_all_ranks=all_ranks, log_freq=1)
    logger.begin(step=0, tokens_seen=0)
    run_steps(logger, 1, 2)
    logger.close()
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "rank_3" / "metrics.jsonl").exists() is written


def test_resume_goes_on_in_the_file_and_reading_takes_each_step_once(tmp_path):
    first = make_logger(tmp_path, log_freq=1)
    first.begin(step=0, tokens_seen=0)
    run_steps(first, 1, 4, loss=2.0)
    # Killed while writing step 5, resumed from step 2.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    second = make_logger(tmp_path, log_freq=1)
    second.begin(step=2, tokens_seen=2000)
    run_steps(second, 3, 5, loss=30.0)
    second.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["loss"] for record in records] == pytest.approx([2.0, 1.0, 10.0, 7.5, 6.0])
    assert records[-1]["tokens_seen"] == 5000


def test_warnings_and_fallbacks_become_events(tmp_path):
    keeper = logging_setup._WarningKeeper()
    logging.getLogger().addHandler(keeper)
    try:
        logging.getLogger("early").warning("before %s", "training")
        logger = make_logger(tmp_path)
        logger.begin(step=0, tokens_seen=0)
        logging.getLogger("late").error("plan B", extra={"is_fallback": True})
        run_steps(logger, 1, 1)
    finally:
        logging.getLogger().removeHandler(keeper)
    told = [(line["event"], line["step"], line["message"]) for line in read_lines(tmp_path) if "message" in line]
    assert told == [("warning", 0, "before training"), ("fallback", 1, "plan B")]


def test_events_are_lines_of_their_own_and_are_told(tmp_path, caplog):
    logger = make_logger(tmp_path, log_freq=1)
    logger.begin(step=0, tokens_seen=0)
    run_steps(logger, 1, 1)
    with caplog.at_level(logging.INFO):
        logger.event("validation", 1, loss=torch.tensor(1.25))
    assert "validation at step 1: loss 1.2500" in caplog.text
    events = [line for line in read_lines(tmp_path) if "event" in line]
    assert [event["event"] for event in events] == ["start", "environment", "validation"]
    assert events[-1]["loss"] == 1.25
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_full_disk_ends_the_metrics_and_not_the_run(tmp_path, caplog):
    class FullDisk:
        closed = False

        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            self.closed = True

    writer = JsonlWriter(tmp_path)
    writer._file.close()
    writer._file = FullDisk()
    for step in (1, 2):
        writer.write_step({"step": step, "loss": 1.0})
    writer.close()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "No space left" in warnings[0].getMessage()


def test_summary_has_losses_median_speed_and_places(tmp_path, clock, caplog):
    logger = make_logger(tmp_path, log_freq=2, steps=7, enable_tensorboard=False)
    logger.begin(step=0, tokens_seen=0)
    for step, seconds in enumerate((50.0, 1.0, 1.0, 3.0, 2.0, 2.0), start=1):
        clock.now += seconds
        run_steps(logger, step, step, loss=6.0)
    summary = logger.summarize()
    assert (summary.steps, summary.tokens_seen, summary.seconds) == (6, 6000, 59.0)
    assert (summary.first_loss, summary.last_loss) == (6.0, 1.0)
    # Windows: step 1 (left out: it warms up), 2, 3-4, 5-6.
    assert summary.median_tokens_per_second == pytest.approx(500.0)
    with caplog.at_level(logging.INFO):
        logger.close(checkpoint="outputs/checkpoint/step-6")
        logger.close()
    for part in (
        "trained 6 steps in 59s",
        "6.0000 -> 1.0000",
        "6,000 seen",
        "outputs/checkpoint/step-6",
        "metrics.jsonl",
    ):
        assert caplog.text.count(part) == 1


def test_tensorboard_has_the_same_values_and_resume_hides_later_points(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = make_logger(tmp_path, log_freq=1, enable_tensorboard=True)
    first.begin(step=0, tokens_seen=0)
    run_steps(first, 1, 3, loss=6.0)
    first.event("validation", 2, quiet=True, loss=0.25)
    first.close()
    second = make_logger(tmp_path, log_freq=1, enable_tensorboard=True)
    second.begin(step=2, tokens_seen=0)
    run_steps(second, 3, 3, loss=60.0)
    second.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(1, 6.0), (2, 3.0), (3, 20.0)]
    assert [point.value for point in events.Scalars("validation/loss")] == [0.25]
    assert {"train/tokens_per_second", "train/mfu", "train/memory_gib", "train/lr"} <= set(events.Tags()["scalars"])


def test_wandb_enabled_and_missing_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    logger = make_logger(tmp_path, enable_wandb=True)
    with pytest.raises(ValueError, match=r"metrics\.enable_wandb = true.*pip install wandb"):
        logger.begin(step=0, tokens_seen=0)


def test_wandb_gets_the_variables_and_the_values(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**settings):
        calls.append(settings)
        return Run()

    fake = types.ModuleType("wandb")
    fake.init = init
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = make_logger(tmp_path, enable_wandb=True, log_freq=1)
    logger._wandb = ({"WANDB_PROJECT": "p", "WANDB_TEAM": "t", "WANDB_RUN_ID": "7", "WANDB_RUN_NAME": ""}, {"a": 1})
    logger.begin(step=0, tokens_seen=0)
    run_steps(logger, 1, 1)
    logger.close()
    settings = calls[0]
    assert {key: settings[key] for key in ("project", "entity", "id", "resume", "config")} == {
        "project": "p",
        "entity": "t",
        "id": "7",
        "resume": "allow",
        "config": {"a": 1},
    }
    assert "name" not in settings
    assert any(call[0] == 1 and call[1].get("loss") == 2.0 for call in calls if isinstance(call, tuple))
    assert calls[-1] == "finish"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A4000", None),
        ("cpu", None),
    ],
)
def test_get_peak_flops_by_name(name, peak):
    assert get_peak_flops(name) == peak


def test_memory_monitor_on_cpu_sees_what_the_process_holds():
    monitor = MemoryMonitor(torch.device("cpu"))
    before = monitor.read()
    held = torch.ones(2**26)
    after = monitor.read()
    assert after.gib - before.gib == pytest.approx(held.nbytes / 2**30, rel=0.2)
    assert after.percent > before.percent


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (725, "12m05s"), (11220, "3h07m"), (187200, "2d04h")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_log_refuses_a_tensor_that_needs_a_collective(tmp_path):
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise RuntimeError("would hang")

    logger = make_logger(tmp_path, log_freq=1)
    logger.begin(step=0, tokens_seen=0)
    with pytest.raises(AssertionError, match="full_tensor"):
        logger.log(1, loss=torch.zeros(()).as_subclass(Sharded), grad_norm=0.0, lr=0.0)


@pytest.mark.parametrize("freq", [0, -1])
def test_log_freq_below_one_is_refused(tmp_path, freq):
    with pytest.raises(ValueError, match=r"metrics\.log_freq"):
        make_logger(tmp_path, log_freq=freq)
