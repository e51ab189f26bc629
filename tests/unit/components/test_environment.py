import json

import torch

from trainer.components import environment


def test_environment_names_versions_hardware_and_commit():
    found = environment.describe_environment(torch.device("cpu"), 8)
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["device"] == "cpu"
    assert found["hardware"]["devices"] == 8
    assert found["hardware"]["host_memory_gib"] > 0
    assert json.loads(json.dumps(found)) == found


def test_commit_is_unknown_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert environment.describe_environment(torch.device("cpu"), 1)["program"] == {"commit": None}
