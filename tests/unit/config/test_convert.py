"""The converter from plain values to the types of the schema."""

import datetime
from typing import Literal

import pytest

from trainer.config.convert import ConversionError, convert
from trainer.config.schema_training import ParamGroupConfig, SourceConfig

Mode = Literal["async", "disabled"]


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, bool, True),
        ("text", str, "text"),
        (3, int, 3),
        (1e4, int, 10000),
        (-2.0, int, -2),
        (3, float, 3.0),
        (0.5, float, 0.5),
        ("async", Mode, "async"),
        ("none", str | None, None),
        ("None", int | None, None),
        (7, int | None, 7),
        ("none", Mode | None, None),
        (["a", "b"], list[str], ["a", "b"]),
        ([], list[Mode], []),
        ([["a"], ["b", "c"]], list[list[str]] | None, [["a"], ["b", "c"]]),
        ([{"dataset": "c4", "weight": 2}], list[SourceConfig], [SourceConfig(dataset="c4", weight=2.0)]),
        ([{"match": "*", "weight_decay": "none"}], list[ParamGroupConfig], [ParamGroupConfig(match="*")]),
    ],
)
def test_convert_gives_the_annotated_type(value, annotation, expected):
    converted = convert(value, annotation)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "expected_words"),
    [
        (1, bool, ["true or false", "the integer 1"]),
        ("true", bool, ["true or false", "without quotes"]),
        (True, int, ["an integer", "the boolean true"]),
        (True, float, ["a number", "the boolean true"]),
        ("3", int, ["an integer", 'the string "3"', "without quotes"]),
        ("three", int, ["an integer", 'the string "three"']),
        (1.5, int, ["an integer", "the number 1.5"]),
        (2.0**60, int, ["an integer"]),
        (float("inf"), int, ["an integer"]),
        (float("nan"), float, ["a finite number", "nan"]),
        (2, str, ["a string", 'in quotes: "2"']),
        ("asink", Mode, ["async or disabled", "Did you mean async?"]),
        ("asink", Mode | None, ["async or disabled, or none", "Did you mean async?"]),
        ("x", list[str], ["a list of strings", 'Write ["x"]']),
        (["a", 1], list[str], ["item 2", "a string"]),
        (["a"], list[list[str]], ["item 1", "a list of strings"]),
        ({"a": 1}, int, ["an integer", "a table"]),
        (datetime.date(2020, 1, 1), str, ["a string", "2020-01-01"]),
        ([{"wieght": 1}], list[SourceConfig], ["item 1", "wieght", "Did you mean weight?"]),
        ([{"weight": "1"}], list[SourceConfig], ["item 1", "weight", "a number"]),
        (["c4"], list[SourceConfig], ["item 1", "a table"]),
    ],
)
def test_convert_refuses_and_says_why(value, annotation, expected_words):
    with pytest.raises(ConversionError) as caught:
        convert(value, annotation)
    for word in expected_words:
        assert word in str(caught.value)


def test_conversion_error_leads_to_the_culprit():
    with pytest.raises(ConversionError) as caught:
        convert([{"weight": 1}, {"weight": "x"}], list[SourceConfig])
    assert caught.value.path == (1, "weight")
