"""One run that is killed again and again until it is finished, and what must hold after it."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

from faults.lab import Fault, Lab, Outcome, Send
from faults.scene import Scene, check_no_half_result, check_same_result, forget

MOST = 12  # kills of one run: then it may finish


def kill_and_resume(lab: Lab, scene: Scene, chance: random.Random) -> list[str]:
    """Kill a run and its resumes at random moments until one finishes; where each kill fell.

    Half of the kills fall at a random second, half at a random I/O operation, so that writing
    checkpoints, metrics and the result, which takes no time, is met as well.
    """
    output, phases = scene.output(), []
    recipe = scene.recipe(output)
    while True:
        resume = ["--resume"] if (output / "run.json").exists() else []
        fault, send = None, None
        if len(phases) < MOST:
            if lab.counts and chance.random() < 0.5:
                number = chance.randint(1, scene.operations)
                fault = Fault(chance.choice(["kill", "tear"]), number)
            else:
                send = Send(signal.SIGKILL, after=scene.seconds * 1.2 * chance.random())
        outcome = lab.run(
            "train",
            recipe,
            "--json",
            *resume,
            cwd=scene.folder,
            fault=fault,
            send=send,
            below=output,
        )
        if outcome.signal is None:
            assert outcome.code == 0, f"after {phases}: {outcome.errors}"
            break
        assert outcome.signal == signal.SIGKILL
        phases.append(phase(output, outcome))
        check_no_half_result(output)
    check_same_result(scene, output)
    forget(output)
    return phases


def phase(output: Path, outcome: Outcome) -> str:
    """What the killed process was doing, by what it left and said."""
    left = {path.name for path in output.rglob(".staging*")} if output.exists() else set()
    if any("checkpoint" in name for name in left):
        return "checkpoint"
    if {".staging-adapter", ".staging-loss.png"} & left or (output / "adapter").exists():
        return "result"
    events = [json.loads(line) for line in outcome.output.splitlines() if line.endswith("}")]
    names = [event["event"] for event in events]
    if "step" not in names:
        return "before the first step"
    return "evaluation" if names[-1] == "step" else "steps"
