"""config.json from a hub: a real server on this machine stands for it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from peftcli.architecture.catalog import find_config
from peftcli.errors import UsageError
from peftcli.estimate.command import of_model
from peftcli.estimate.find import find_architecture


class Hub(BaseHTTPRequestHandler):
    """Serves one public and one gated model, and remembers what was asked."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        owner = self.path.split("/")[1]
        if owner == "gated" and self.headers.get("Authorization") != "Bearer secret":
            self.send_error(401)
        elif owner in ("open", "gated", "packed"):
            config = find_config("llama-3.1-8b")
            if owner == "packed":
                config |= {"quantization_config": {"quant_method": "gptq", "bits": 4}}
            content = json.dumps(config).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)
        elif owner == "huge":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b" " * (17 << 20))
        elif owner == "broken":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")
        else:
            self.send_error(503 if owner == "busy" else 404)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_only_the_config_is_fetched_and_once(hub: type[Hub]) -> None:
    first = find_architecture("open/model", network=True)
    assert first.parameters() == 8_030_261_248
    assert find_architecture("open/model", network=True) == first
    assert hub.asked == [("/open/model/resolve/main/config.json", None)]
    find_architecture("open/model", "v2/beta", network=True)
    assert hub.asked[1][0] == "/open/model/resolve/v2%2Fbeta/config.json"


def test_a_method_that_goes_with_how_the_checkpoint_is_stored(hub: type[Hub]) -> None:
    chosen = [
        of_model(name, None, (), network=True).recipe.method.name
        for name in ("open/model", "packed/model")
    ]
    assert chosen == ["qlora", "lora"]
    assert len(hub.asked) == 2


def test_a_model_of_the_catalog_is_not_asked_for(hub: type[Hub]) -> None:
    find_architecture("Qwen/Qwen3-8B", network=True)
    assert hub.asked == []


def test_a_token_opens_a_gated_model(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="gated, private or not there"):
        find_architecture("gated/model", network=True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert find_architecture("gated/model", network=True).layers == 32


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent/qwen3-8", "no such model"),
        ("busy/model", "the hub answered 503"),
        ("huge/model", "larger than 16 MiB"),
        ("broken/model", "not JSON"),
    ],
)
def test_other_answers_are_told(hub: type[Hub], name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        find_architecture(name, network=True)
    assert "config.json" in caught.value.hint
    assert not list(Path(os.environ["PEFTCLI_CACHE"]).rglob("config.json"))


def test_without_a_network(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match="cannot be reached"):
        find_architecture("open/model", network=True)
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(UsageError, match="no web address"):
        find_architecture("open/model", network=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        find_architecture("open/model", network=True)


def test_nobody_is_asked_without_leave(hub: type[Hub]) -> None:
    with pytest.raises(UsageError, match="not in the catalog"):
        find_architecture("open/model")
    for path in ("./open/model", "../open", "/open/model", "a/b/c"):
        with pytest.raises(UsageError):
            find_architecture(path, network=True)
    assert hub.asked == []
