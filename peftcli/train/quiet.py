"""Only our own events reach the user."""

from __future__ import annotations

import warnings

import transformers
from datasets import disable_progress_bars


def quiet_libraries() -> None:
    """What users should know reaches them as events; the rest of the chatter is cut."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    libraries = r"(transformers|trl|peft|torch|accelerate|datasets|bitsandbytes)"
    warnings.filterwarnings("ignore", module=libraries)
