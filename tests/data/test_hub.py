"""Sets on the hub, read by `datasets`; a folder stands in for the hub."""

import json

import datasets
import huggingface_hub
import pytest

from peftcli.data.hub import HubSet, hub_rows, hub_state
from peftcli.errors import DataError

ROWS = [{"prompt": f"Question {i}", "completion": f"Answer {i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def test_hub_sets_are_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "train.jsonl"
    file.write_text(LINES)
    hub = HubSet(str(tmp_path / "set"), None, "train", None)
    found = list(hub_rows(hub))
    assert [row.value for row in found] == ROWS
    assert found[1].place == f"{hub.name}/train:2"
    size, before = hub_state(hub)
    assert size > 0
    file.write_text(LINES * 2)
    assert hub_state(hub)[1] != before
    with pytest.raises(DataError, match="cannot be loaded from the hub"):
        next(hub_rows(HubSet(hub.name, None, "test", None)))
    with pytest.raises(DataError, match="nobody/nothing: cannot be loaded from the hub"):
        next(hub_rows(HubSet("nobody/nothing", None, "train", None)))
