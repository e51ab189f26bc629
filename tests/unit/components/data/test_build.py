import json
from dataclasses import replace

import pytest
import torch

from trainer.components.data.build import build_dataloader, build_validation_loader
from trainer.components.data.loader import DataLoader
from trainer.components.data.streaming import StreamingLoader
from trainer.components.tokenizer import build_tokenizer
from trainer.config.schema_training import DataConfig, SourceConfig, TrainingConfig, ValidationConfig

IGNORE = -100


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("byte")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two JSONL files of different content, and a cache."""
    root = tmp_path_factory.mktemp("corpus")
    for name, unit, rows in (("a", "abc ", 60), ("b", "xyz ", 25)):
        lines = [json.dumps({"text": unit * (1 + i % 40)}) for i in range(rows)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


class Build:
    def __init__(self, corpus, tokenizer):
        self.corpus, self.tokenizer, self.made = corpus, tokenizer, []

    def __call__(self, *, mask="causal", rank=0, degree=1, seed=0, training=None, **data):
        training = {"dataset": "jsonl", "dataset_path": str(self.corpus / "a.jsonl"), **(training or {})}
        section = TrainingConfig(**{"local_batch_size": 2, "seq_len": 32, "steps": 100, **training})
        loader = build_dataloader(
            training=section,
            data=self.data(**data),
            attn_mask_type=mask,
            tokenizer=self.tokenizer,
            dp_rank=rank,
            dp_degree=degree,
            seed=seed,
            device_type="cpu",
        )
        self.made.append(loader)
        return loader

    def validation(self, *, rank=0, degree=1, data=None, mask="causal", **validation):
        section = ValidationConfig(
            **{
                "dataset": "jsonl",
                "dataset_path": str(self.corpus / "b.jsonl"),
                "local_batch_size": 3,
                "seq_len": 32,
                **validation,
            }
        )
        loader = build_validation_loader(
            validation=section,
            data=self.data(**(data or {})),
            attn_mask_type=mask,
            tokenizer=self.tokenizer,
            dp_rank=rank,
            dp_degree=degree,
            device_type="cpu",
        )
        self.made.append(loader)
        return loader

    def data(self, **data):
        return replace(DataConfig(cache_dir=str(self.corpus / "cache"), prepare_workers=1), **data)

    def sources(self, *weights):
        return [
            SourceConfig("jsonl", str(self.corpus / f"{name}.jsonl"), weight, name)
            for name, weight in zip("ab", weights, strict=True)
        ]


@pytest.fixture
def build(corpus, tokenizer):
    build = Build(corpus, tokenizer)
    yield build
    for loader in build.made:
        loader.close()


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("mask", ["causal", "block_causal"])
def test_batches_hold_the_text(build, packing, mask, tokenizer):
    batch = build(packing=packing, mask=mask).next_batch()
    assert batch["tokens"].shape == (2, 32)
    assert ("positions" in batch) == (mask == "block_causal")
    text = tokenizer.decode([token for token in batch["tokens"][0].tolist() if token < 256])
    assert set(text) <= set("abc \0")
    assert "abc abc" in text


def test_global_batch_defaults_to_one_microbatch_per_rank(build):
    assert build(degree=4).shape.global_batch_size == 8
    loader = build(degree=2, training={"global_batch_size": 12})
    assert loader.microbatches_per_step == 3


def test_impossible_global_batch_is_refused(build):
    with pytest.raises(ValueError, match=r"training.global_batch_size 6"):
        build(degree=2, training={"global_batch_size": 6})


def test_mixture_takes_the_place_of_the_data_set(build, caplog, tokenizer):
    caplog.set_level("INFO")
    loader = build(sources=build.sources(0.5, 0.5), training={"dataset": "", "local_batch_size": 64})
    texts = [tokenizer.decode(row[:-1]) for row in loader.next_batch()["tokens"].tolist()]
    from_a = sum("abc" in text for text in texts)
    assert 20 < from_a < 44
    assert sum("xyz" in text for text in texts) == 64 - from_a
    for name in "ab":
        assert f"data {name}: " in caplog.text
    assert "of its tokens" in caplog.text


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_one_line_a_source_on_one_rank(build, caplog, packing):
    caplog.set_level("INFO")
    loader = build(packing=packing)
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("data jsonl: "))
    assert line.startswith("data jsonl: 60 documents, ")
    assert f"{loader.n_sequences} sequences of 32" in line
    assert f"the whole run is {200 / loader.n_sequences:.2f} epochs" in line
    assert f"packing {packing} leaves out" in line
    caplog.clear()
    build(packing=packing, rank=1, degree=2)
    assert "data jsonl: " not in caplog.text


def test_fewer_sequences_than_a_global_batch_wrap(build):
    loader = build(training={"seq_len": 1024, "local_batch_size": 16})
    assert 0 < loader.n_sequences < 16
    tokens = loader.next_batch()["tokens"]
    assert len(torch.unique(tokens, dim=0)) == loader.n_sequences


def test_data_without_one_sequence_are_refused(build):
    with pytest.raises(ValueError, match=r"'jsonl' is too small.*training.seq_len"):
        build(training={"seq_len": 1_000_000})


def test_source_without_a_data_set_is_refused(build):
    with pytest.raises(ValueError, match=r"data.sources: a source has no `dataset`"):
        build(sources=[SourceConfig()])


def test_two_unnamed_sources_of_one_kind_are_refused(build):
    with pytest.raises(ValueError, match=r"named 'jsonl'"):
        build(sources=[replace(source, name="") for source in build.sources(0.5, 0.5)])


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_validation_counts_every_label_inside_documents_once(build, degree, packing):
    labels = []
    for rank in range(degree):
        loader = build.validation(rank=rank, degree=degree, mask="block_causal", data={"packing": packing})
        labels += torch.cat([batch["labels"] for batch in loader.epoch_batches()]).flatten().tolist()
    # Bytes, and the tokens around each document, of which the first is no label.
    framed = 1 + (build.tokenizer.bos_id is not None)
    expected = sum(4 * (1 + i % 40) + framed - 1 for i in range(25))
    assert sum(label != IGNORE for label in labels) == expected


def test_validation_of_less_than_one_sequence_is_padded(build):
    (batch,) = build.validation(seq_len=4096, local_batch_size=1).epoch_batches()
    assert 0 < (batch["labels"] != IGNORE).sum() < 4096


def test_validation_stops_after_its_steps(build):
    assert len(list(build.validation(steps=2).epoch_batches())) == 2


def test_streaming_gives_the_same_tokens_as_prepared_data_in_order(build):
    streamed, prepared = build(streaming=True, shuffle=False), build(shuffle=False)
    assert isinstance(streamed, StreamingLoader)
    for _ in range(10):
        assert torch.equal(streamed.next_batch()["tokens"], prepared.next_batch()["tokens"])


def test_streaming_state_is_refused_for_other_settings(build):
    state = build(streaming=True).state_dict()
    with pytest.raises(ValueError, match=r"what changed: debug.seed"):
        build(streaming=True, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.streaming"):
        build().load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.streaming"):
        build(streaming=True).load_state_dict(build().state_dict())


def test_streaming_resumes_after_the_data_moved(build, tmp_path):
    state = build(streaming=True).state_dict()
    moved = tmp_path / "a.jsonl"
    moved.write_bytes((build.corpus / "a.jsonl").read_bytes())
    build(streaming=True, training={"dataset_path": str(moved)}).load_state_dict(state)


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({"packing": "best_fit"}, {}, "data.packing 'best_fit'"),
        ({}, {"dataset": "prepared"}, "cannot read token files"),
    ],
)
def test_streaming_refuses_what_it_cannot_do(build, data, training, message):
    with pytest.raises(ValueError, match=message):
        build(streaming=True, **data, training=training)


def test_streaming_refuses_a_mixture(build):
    with pytest.raises(ValueError, match=r"data.streaming reads one source"):
        build(streaming=True, sources=build.sources(0.5, 0.5))


@pytest.mark.parametrize(("steps", "kind"), [(3, StreamingLoader), (-1, DataLoader)])
def test_validation_streams_only_with_a_limit(build, steps, kind):
    loader = build.validation(steps=steps, data={"streaming": True})
    assert isinstance(loader, kind)
    assert len(list(loader.epoch_batches())) >= 3
