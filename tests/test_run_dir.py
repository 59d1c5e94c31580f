"""The run folder: what is refused, what is never touched, and writing in one step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from peftcli.errors import ArtefactError, ResourceError, UsageError
from peftcli.lock import alive, holder
from peftcli.run_dir import RunDir, locked, publish_folder, write_atomic
from peftcli.train.opening import clear, open_run, sweep


def finished(folder: Path) -> RunDir:
    run = open_run(folder, resume=False, overwrite=False)
    run.write_manifest({"status": "finished"})
    return run


def test_a_new_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    run = open_run(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert list(run.path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "hint"),
    [("finished", "--overwrite replaces it"), ("interrupted", "--resume goes on with it")],
)
def test_a_second_run_is_refused_with_the_ways_out(tmp_path: Path, status: str, hint: str) -> None:
    run = finished(tmp_path / "run")
    run.write_manifest({"status": status})
    with pytest.raises(UsageError, match=status) as caught:
        open_run(run.path, resume=False, overwrite=False)
    assert hint in caught.value.hint


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        open_run(tmp_path / "new", resume=True, overwrite=False)


def test_a_run_cannot_be_gone_on_with_and_replaced(tmp_path: Path) -> None:
    """The run was removed first, and then there was nothing to go on with."""
    run = finished(tmp_path / "run")
    with pytest.raises(UsageError, match="--resume and --overwrite") as caught:
        open_run(run.path, resume=True, overwrite=True)
    assert "leave --overwrite away" in caught.value.hint
    assert run.manifest.is_file()


def test_a_file_or_a_read_only_place_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        open_run(tmp_path / "file", resume=False, overwrite=False)
    with pytest.raises(ResourceError, match="cannot be written"):
        open_run(Path("/proc/peftcli"), resume=False, overwrite=False)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run.manifest.write_text('{"status": ')
    with pytest.raises(ArtefactError, match=r"run\.json: damaged"):
        open_run(run.path, resume=True, overwrite=False)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}")
    (run.path / "notes.txt").write_text("mine")
    clear(open_run(run.path, resume=False, overwrite=True))
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


def test_a_link_in_the_run_folder_is_removed_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").write_text("x")
    run = finished(tmp_path / "run")
    run.checkpoints.symlink_to(elsewhere)
    clear(run)
    assert not run.checkpoints.exists()
    assert (elsewhere / "keep").exists()


HOLD = """
import sys, time
from pathlib import Path
from peftcli.run_dir import RunDir, locked
with locked(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match=f"in use by process {other.pid}"), locked(run):
            pass
        other.kill()
    with locked(run):  # the lock of a dead process holds nobody back
        assert str(run.lock.read_text()).startswith("process ")


def test_the_lock_of_a_process_that_is_gone(tmp_path: Path) -> None:
    """Whatever the file says: the process is gone, or its number belongs to another one now."""
    run, own, host = finished(tmp_path / "run"), os.getpid(), socket.gethostname()
    for owner in (
        f"process {own} on {host}, started 1",  # this very number, of an earlier process
        f"process 999999999 on {host}, started 5",
        "process 1 on elsewhere, started 5",
        "half a li",
        "",
    ):
        assert not alive(owner)
        run.lock.write_text(owner)
        assert holder(run.lock) is None
        with locked(run):
            owner = run.lock.read_text().strip()
            assert owner.startswith(f"process {own} on {host}, started ")
            assert alive(owner)


def test_a_folder_in_use_is_said_to_be_so_before_anything_else(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    with locked(run), pytest.raises(ResourceError, match="in use by process"):
        open_run(run.path, resume=False, overwrite=True)


def test_what_a_killed_process_had_begun_is_swept(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    run.checkpoints.mkdir()
    for name in (".staging-adapter", ".staging-old-adapter", "checkpoints/.staging-checkpoint"):
        (run.path / name).mkdir()
        (run.path / name / "half").write_text("x")
    for name in (".staging-run.json", ".staging-metrics.jsonl", ".staging-probe"):
        (run.path / name).write_text("half")
    (run.path / ".staging-merged").mkdir()  # somebody else's
    sweep(run)
    left = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    assert left == {"run.json", "checkpoints", ".staging-merged"}


def test_publishing_replaces_a_folder_and_leaves_no_rest(tmp_path: Path) -> None:
    for content in ("old", "new"):
        staging = tmp_path / ".staging-adapter"
        staging.mkdir()
        (staging / "file").write_text(content)
        publish_folder(staging, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(sys.platform != "linux", reason="swaps two names on Linux only")
def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path: Path) -> None:
    watch = """
import os, sys
print("ready", flush=True)
seen = set()
while not os.path.exists(sys.argv[2]):
    seen.add(os.stat(sys.argv[1]).st_ino)
print(len(seen))
"""
    target, end = tmp_path / "merged", tmp_path / "end"
    target.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", watch, str(target), str(end)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for _ in range(200):
        staging = tmp_path / ".staging-merged"
        staging.mkdir()
        publish_folder(staging, target)
    end.touch()
    assert child.wait(20) == 0  # a moment without the folder would have been an error
    assert int(child.stdout.read()) > 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["end", "merged"]


def test_an_atomic_write_leaves_only_the_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f.json", json.dumps([1]))
    write_atomic(tmp_path / "f.json", json.dumps([2]))
    assert json.loads((tmp_path / "f.json").read_text()) == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
