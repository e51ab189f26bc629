"""TOML files: line numbers, inheritance, and what is said about mistakes."""

import textwrap

import pytest
import tomli

from trainer.config.toml_file import read_toml
from trainer.config.toml_lines import locate_keys


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def messages(settings):
    return [str(problem) for problem in settings.problems]


DOCUMENT = '''\
extends = "base.toml"  # [not.a.table]
a.b = 1

[ "quoted \\u0041" . 'lit"eral' ]
text = """
[fake]
x = 1 \\""" ""\\
y = 2""""
raw = \'\'\'
[also.fake] = "\'\'\'
after = {
  p = [1,  # ]
       2], q = "}" }
[[list.of]]
x = 1
[list.of.sub]
y = 2

[[list.of]]
x = "a # b"
z = [[1, 2], [
  3]]
when = 2020-01-01 10:00:00
'''.replace("{\n  p", "{ p")


def test_locate_keys_survives_strings_arrays_and_tables():
    tomli.loads(DOCUMENT)
    lines = locate_keys(DOCUMENT)
    expected = {
        ("extends",): "extends =",
        ("a", "b"): "a.b = 1",
        ("quoted A", 'lit"eral'): '[ "quoted',
        ("quoted A", 'lit"eral', "text"): "text =",
        ("quoted A", 'lit"eral', "raw"): "raw =",
        ("quoted A", 'lit"eral', "after", "p", 1): "2], q",
        ("quoted A", 'lit"eral', "after", "q"): "2], q",
        ("list", "of", 0, "sub", "y"): "y = 2\n\n",
        ("list", "of", 1, "x"): 'x = "a # b"',
        ("list", "of", 1, "z", 1, 0): "3]]",
        ("list", "of", 1, "when"): "when =",
    }
    for path, needle in expected.items():
        assert lines[path] == DOCUMENT[: DOCUMENT.index(needle)].count("\n") + 1, path
    assert not any("fake" in str(path) for path in lines)


def test_locate_keys_finds_every_value_of_the_document():
    def paths(value, path=()):
        if isinstance(value, dict):
            for name, item in value.items():
                yield from paths(item, (*path, name))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from paths(item, (*path, index))
        else:
            yield path

    lines = locate_keys(DOCUMENT)
    assert set(paths(tomli.loads(DOCUMENT))) <= lines.keys()


def test_locate_keys_counts_lines_of_windows_files():
    assert locate_keys('[a]\r\nb = """\r\n"""\r\nc = 1\r\n')[("a", "c")] == 4


def test_read_toml_gives_values_with_their_lines(tmp_path):
    path = write(
        tmp_path / "run.toml",
        """\
        # a comment
        [training]
        steps = 1e3

        [quantize.linear.float8]
        filter_fqns = ["output"]

        [[data.sources]]
        dataset = "c4"
        """,
    )
    settings = read_toml(path)
    assert messages(settings) == []
    assert settings.values["training.steps"].value == 1000
    assert settings.values["training.steps"].origin == f"{path}:3"
    assert settings.values["quantize.linear.float8.filter_fqns"].origin == f"{path}:6"
    assert settings.values["data.sources"].value[0].dataset == "c4"
    assert settings.values["data.sources"].origin == f"{path}:8"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("[training]\nstep = 1", 2, "unknown key training.step. Did you mean training.steps?"),
        ("[trainig]\nsteps = 1", 1, "unknown section [trainig]. Did you mean training?"),
        ("[training]\nbatch_size = 1", 2, "It is called training.local_batch_size now."),
        ("[float8]\nemulate = true", 1, "It is called quantize.linear.float8 now."),
        ("[checkpoint]\nenable_checkpoint = true", 2, "It is called checkpoint.enable now."),
        ("seq_len = 3", 1, "unknown key seq_len. Did you mean training.seq_len or validation.seq_len?"),
        ("training = 3", 1, "training is a section: expected the table [training]"),
        ("[quantize]\nlinear = 1", 2, "quantize.linear is a section"),
        ("[training]\nextends = 'x'", 2, "extends must stand at the top"),
        ("extends = 3", 1, "extends expects the path"),
        ('[training]\nsteps = "3"', 2, 'training.steps: expected an integer, got the string "3"'),
        ("[training]\n\nseq_len = true", 3, "training.seq_len: expected an integer, got the boolean true"),
        ("[training.steps]\nx = 1", 1, "training.steps: expected an integer, got a table"),
        ('[compile]\ncomponents = ["model",\n"los"]', 3, "Did you mean loss?"),
        ("[[data.sources]]\n[[data.sources]]\nweight = 'x'", 3, "data.sources: item 2: weight: expected a number"),
        ("[job]\nconfig_file = 'x'", 2, "job.config_file only works on the command line"),
        ("[training]\nsteps = = 3", 2, "not valid TOML"),
        ("[training]\nsteps = 3\nsteps = 4", 3, "not valid TOML"),
    ],
)
def test_read_toml_names_file_line_and_remedy(tmp_path, text, line, expected):
    path = write(tmp_path / "run.toml", text)
    (message,) = messages(read_toml(path))
    assert message.startswith(f"{path}:{line}: ")
    assert expected in message


def test_read_toml_collects_all_problems(tmp_path):
    write(tmp_path / "base.toml", "[optimizer]\nlr = 'x'\n")
    path = write(tmp_path / "run.toml", "extends = 'base.toml'\n[training]\nstep = 1\nseq_len = 'x'\n")
    settings = read_toml(path)
    assert len(settings.problems) == 3
    assert {key for problem in settings.problems for key in problem.keys} == {"optimizer.lr", "training.seq_len"}


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[training]\nx = '\xff'"])
def test_read_toml_reports_a_file_that_is_not_text(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    (message,) = messages(read_toml(path))
    assert "not UTF-8" in message


def test_read_toml_reports_a_missing_file(tmp_path):
    (message,) = messages(read_toml(tmp_path / "none.toml"))
    assert str(tmp_path / "none.toml") in message
    assert "No such file" in message


def test_extends_inherits_over_several_files_and_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "root.toml", "[training]\nsteps = 1\nseq_len = 1\nlocal_batch_size = 1\n")
    write(tmp_path / "middle.toml", "extends = 'deep/root.toml'\n[training]\nseq_len = 2\nlocal_batch_size = 2\n")
    path = write(tmp_path / "run.toml", "extends = 'middle.toml'\n[training]\nlocal_batch_size = 3\n")
    settings = read_toml(path)
    assert messages(settings) == []
    found = {key: (setting.value, setting.origin) for key, setting in settings.values.items()}
    assert found == {
        "training.steps": (1, f"{tmp_path / 'deep' / 'root.toml'}:2"),
        "training.seq_len": (2, f"{tmp_path / 'middle.toml'}:3"),
        "training.local_batch_size": (3, f"{path}:3"),
    }


def test_extends_in_a_circle_is_reported(tmp_path):
    write(tmp_path / "a.toml", "extends = 'b.toml'\n[training]\nsteps = 1\n")
    write(tmp_path / "b.toml", "extends = './a.toml'\n")
    (message,) = messages(read_toml(tmp_path / "a.toml"))
    assert "circle" in message
    assert "b.toml:1" in message


def test_extends_a_missing_file_names_the_line(tmp_path):
    path = write(tmp_path / "a.toml", "# first\nextends = 'b.toml'\n")
    (message,) = messages(read_toml(path))
    assert f"{path}:2" in message
    assert "b.toml" in message
