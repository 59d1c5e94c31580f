"""Uploads, up to the border of the network: a local server stands where the hub would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from forked import server

TOKEN = "hf_canaryCanaryCanaryCanaryCanaryCanary"


class Refusing(BaseHTTPRequestHandler):
    """Answers every request with 403 and remembers what was asked."""

    asked: list[tuple[str, str | None]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    handler = type("Handler", (Refusing,), {"asked": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()


def write_recipe(base: Path, rows: Path, folder: Path) -> Path:
    file = folder / "r.yaml"
    file.write_text(
        f"model: {base}\nmethod: {{name: lora, rank: 4}}\ndata: {{train: {rows}, eval: null}}\n"
        f"training: {{max_steps: 1, batch_size: 8}}\noutput: {folder / 'run'}\n"
    )
    return file


def test_without_a_token_nothing_starts(base_model: Path, rows: Path, tmp_path: Path) -> None:
    file = write_recipe(base_model, rows, tmp_path)
    without = dict.fromkeys(
        ["HF_HUB_OFFLINE", *(name for name in os.environ if name.startswith("HF_"))]
    )
    done = server().run("train", file, "--push-to-hub", "me/mine", environment=without)
    assert done.returncode == 2
    assert "no token for the hub" in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_upload_reaches_the_hub_with_the_token_and_a_refusal_keeps_the_run(
    base_model: Path, rows: Path, tmp_path: Path, hub: tuple[str, list[tuple[str, str | None]]]
) -> None:
    address, asked = hub
    file = write_recipe(base_model, rows, tmp_path)
    # A fresh process, because the hub's library reads its address when it is imported.
    command = [sys.executable, "-m", "peftcli", "train", file, "--push-to-hub", "me/mine"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address, "HF_TOKEN": TOKEN}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 3, done.stderr
    assert ("/api/repos/create", f"Bearer {TOKEN}") in asked
    assert "the run is finished and safe" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr
