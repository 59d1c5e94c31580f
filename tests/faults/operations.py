"""A fault at one I/O operation of a run, and what must hold after it."""

from __future__ import annotations

import signal

from faults.lab import Fault, Lab
from faults.scene import (
    Scene,
    again,
    check_no_half_result,
    check_same_result,
    finished,
    forget,
)


def check_operation(lab: Lab, scene: Scene, fault: Fault) -> None:
    """After a fault at one operation: one clear error, nothing half-written, and a resume that
    ends with the same bytes."""
    output = scene.output()
    recipe = scene.recipe(output)
    broken = lab.run("train", recipe, "--json", cwd=scene.folder, fault=fault, below=output)
    where = f"{fault}: exit {broken.code}, signal {broken.signal}\n{broken.errors}"
    assert "Traceback" not in broken.errors, where
    if fault.action == "terminate":
        assert broken.code in (0, 75), where
    elif fault.action in ("kill", "tear"):
        assert broken.signal == signal.SIGKILL or broken.code == 0, where
    else:
        assert broken.code in (0, 3), where
        if broken.code == 3:
            assert broken.errors.count("error: ") == 1, where
            assert "\nhint: " in broken.errors, where
    check_no_half_result(output)
    # The last operation syncs a folder whose manifest says already that the run is finished.
    if broken.code != 0 and not finished(output):
        resumed = again(lab, scene, output)
        assert resumed.code == 0, f"{where}\nresume: {resumed.errors}"
    check_same_result(scene, output)
    forget(output)
