"""The `model` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peftcli.methods.base import Section


class Model(Section):
    """The base model."""

    name: str = Field(min_length=1)
    """A hub id, a local folder, or `bundled:tiny`."""
    revision: str | None = None
    """A branch, tag or commit on the hub; the newest when absent."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Load and compute dtype; `auto` is bfloat16 where the device has it, else float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation; `auto` is the fastest that the model and device have."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you have read."""
