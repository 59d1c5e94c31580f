"""A base and rows whose numbers go wrong at one row."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

LETTER = "Z"


def poison(base_model: Path, rows: Path, folder: Path) -> Path:
    """A copy of the base to which one letter means nothing finite; one of the rows gets it."""
    shutil.copytree(base_model, folder)
    model = AutoModelForCausalLM.from_pretrained(base_model)
    tokens = json.loads((base_model / "tokenizer.json").read_text())["model"]["vocab"]
    model.model.embed_tokens.weight.data[tokens[LETTER]] = math.nan
    model.save_pretrained(folder)
    lines = rows.read_text().splitlines()
    lines[20] = lines[20].replace("twice", f"twi{LETTER}ce")
    rows.write_text("\n".join(lines) + "\n")
    return folder
