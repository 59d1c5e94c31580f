"""Whether rows, tokenizer, config.json and weights belong together, before the weights load."""

from __future__ import annotations

from pathlib import Path

from peftcli.errors import ArtefactError
from peftcli.recipe.schema import Model
from peftcli.train.setting import Setting
from peftcli.weightfiles import read_header

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def check_belongs(model: Model, setting: Setting, files: Path | None) -> None:
    """Raise ArtefactError where a token has no row, or the weights are of another vocabulary."""
    size, largest = setting.architecture.vocab_size, setting.prepared.report.largest_id
    if largest >= size:
        raise ArtefactError(
            f"model: the rows use token {largest}, and {model.name} knows {size} tokens",
            "use the tokenizer that came with the model, without tokens added to it",
        )
    rows = _embedding_rows(files) if files else []
    if rows and size not in rows:
        raise ArtefactError(
            f"model: config.json of {model.name} says {size} tokens, its weights hold {rows[0]}",
            "restore the config.json that came with the weights",
        )


def _embedding_rows(folder: Path) -> list[int]:
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            _, header = read_header(stream, file)
        shapes = [x["shape"] for name, x in header.items() if name.endswith(EMBEDDINGS)]
        found += [int(shape[0]) for shape in shapes if len(shape) == 2]
    return found
