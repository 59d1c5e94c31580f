"""Run PEFT's own tests on our bottleneck method: `python run.py PEFT_CHECKOUT [pytest options]`.

The checkout should be of the installed PEFT's version: `scripts/peft_suite` fetches it. Its tests
import what the extra `peft-suite` installs, which peftcli does not need otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]


def run(checkout: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the suite offline in a process of its own; the result holds pytest's report."""
    if not (checkout / "tests" / "test_custom_models.py").is_file():
        raise FileNotFoundError(f"{checkout} is no PEFT checkout: tests/test_custom_models.py")
    search_path = os.pathsep.join([str(checkout), str(PROJECT)])
    environment = {**os.environ, "PYTHONPATH": search_path, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "pytest", str(HERE / "cases.py")),
            *("-c", os.devnull, "--rootdir", folder, "--import-mode", "importlib"),
            *("-p", "no:cacheprovider", "-q", "-W", "ignore"),
            *("-k", "SizedConfig"),  # only the tests that have a row of ours
            *options,
        ]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )


if __name__ == "__main__":
    result = run(Path(sys.argv[1]), *sys.argv[2:])
    print(result.stdout, result.stderr)
    sys.exit(result.returncode)
