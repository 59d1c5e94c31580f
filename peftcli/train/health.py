"""Numbers that went wrong: steps that must not be taken, and runs that no longer learn."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

EXPLODED = 1000.0  # times the median of the last gradient norms
REMEMBERED = 50
FEWEST = 10  # norms before a median says something
EXPLOSIONS = 3  # in a row: one alone was scaled down and did no harm
STUCK_WARNING, STUCK = 10, 50  # steps in a row without any gradient
ZERO_WARNING = 3  # steps in a row with a loss of exactly zero


@dataclass
class Health:
    """Judges the loss and the gradient norm of each step, before the optimizer uses them.

    `failure` says why the run must end. A gradient that is not finite never reaches a parameter.
    """

    on_nonfinite: Literal["stop", "skip"]
    max_nonfinite: int
    max_norm: float
    scaled: bool = False
    """Whether a gradient scaler looks for overflow itself and lowers its scale (float16)."""
    failure: str | None = None
    skipped: int = 0
    warnings: list[str] = field(default_factory=list)
    _norms: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _bad: int = 0
    _exploded: int = 0
    _stuck: int = 0
    _zero: int = 0

    def admits(self, step: int, loss: float, norm: float) -> bool:
        """Whether the optimizer may use this step's gradient."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return self._not_finite(step, loss, norm)
        self._bad = 0
        fine = self._explosion(step, norm)
        self._nothing_learnt(step, loss, norm)
        return fine

    def told(self) -> list[str]:
        """Warnings since the last call."""
        new, self.warnings = self.warnings, []
        return new

    def _not_finite(self, step: int, loss: float, norm: float) -> bool:
        if self.scaled and math.isfinite(loss):
            return True  # the scaler leaves the step out
        self._bad += 1
        what = f"loss {loss} and gradient norm {norm} at step {step}"
        if self.on_nonfinite == "stop":
            self.failure = f"{what}: not finite; the gradient was not used"
        elif self._bad >= self.max_nonfinite:
            self.failure = f"{what}: not finite for {self._bad} steps in a row; none was taken"
        else:
            self._skip(f"{what}: not finite; the step is skipped")
        return False

    def _explosion(self, step: int, norm: float) -> bool:
        usual = statistics.median(self._norms) if len(self._norms) >= FEWEST else math.inf
        if norm <= EXPLODED * usual or norm <= 10 * self.max_norm:
            self._exploded = 0
            self._norms.append(norm)
            return True
        self._exploded += 1
        what = f"gradient norm {norm:.3g} at step {step}, {usual:.3g} is usual"
        if self._exploded >= EXPLOSIONS:
            self.failure = f"{what}: exploded for {self._exploded} steps in a row"
        elif self.on_nonfinite == "skip":
            self._skip(f"{what}: the step is skipped")
        else:
            self.warnings.append(f"{what}: scaled down to training.max_grad_norm")
        return self.failure is None and self.on_nonfinite == "stop"

    def _nothing_learnt(self, step: int, loss: float, norm: float) -> None:
        self._stuck = self._stuck + 1 if norm == 0.0 else 0
        self._zero = self._zero + 1 if loss == 0.0 else 0
        if self._zero == ZERO_WARNING:
            self.warnings.append(
                f"loss is exactly 0 since step {step - ZERO_WARNING + 1}: nothing is left to "
                "learn, or no token carries loss"
            )
        if self._stuck == STUCK_WARNING:
            self.warnings.append(
                f"no gradient at all since step {step - STUCK_WARNING + 1} (loss {loss:.4f}): "
                "nothing is learnt"
            )
        if self._stuck >= STUCK or self._zero >= STUCK:
            since = step - STUCK + 1
            self.failure = f"loss {loss:.4f} and gradient norm {norm} since step {since}: stuck"

    def _skip(self, text: str) -> None:
        self.skipped += 1
        self.warnings.append(text)
