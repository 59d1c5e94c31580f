"""What deployment needs beside the weights: config, tokenizer, template, generation, licence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peftcli.errors import ArtefactError
from peftcli.merge.base import Base
from peftcli.merge.plan import Plan
from peftcli.merge.source import AdapterSource
from peftcli.untrusted import read_object

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
TOKENIZER = (
    *VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
GENERATION = "generation_config.json"


def bring_files(base: Base, adapter: AdapterSource, staging: Path) -> None:
    """Copy everything but the weights and config.json into the merged folder."""
    for file in _brought(base, adapter):
        if file.name == GENERATION:
            read_object(file)  # here, where a damaged one still has its place
        _copy(file, staging)


def check_links(base: Base, adapter: AdapterSource, config: dict[str, Any]) -> None:
    """Refuse links that lead out of a model's folder: what they name would be passed on.

    Raises ArtefactError with the link and where it leads. The hub's cache consists of links, into
    the repository's own files.
    """
    code = base.folder.glob("*.py") if "auto_map" in config else ()
    for file in [*_brought(base, adapter), *code]:
        folder = (adapter if file.is_relative_to(adapter.folder) else base).folder.absolute()
        home = next((x.parent for x in folder.parents if x.name == "snapshots"), folder)
        for found in (file, *(file.rglob("*") if file.is_dir() else ())):
            target = Path(os.path.realpath(found))  # which follows a link to itself no further
            if not target.is_relative_to(os.path.realpath(home)):
                raise ArtefactError(
                    f"{found}: a link to {target}, outside of the model's folder, which the merged "
                    "model would carry along",
                    "put the file itself in its place, or remove the link",
                )


def _brought(base: Base, adapter: AdapterSource) -> list[Path]:
    """What is copied, in order: of two files of one name the later one stays."""
    own = has_tokenizer(adapter.folder)
    found = list(_chosen(TOKENIZER, adapter.folder if own else base.folder))
    found += list(_chosen(TEMPLATES, adapter.folder)) or list(_chosen(TEMPLATES, base.folder))
    found += _chosen(PROCESSORS, base.folder)
    for pattern in LEGAL:
        found += base.folder.glob(pattern)
    found += [f / GENERATION for f in (base.folder, adapter.folder) if (f / GENERATION).is_file()]
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a vocabulary in any of the usual forms."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def write_config(
    config: dict[str, Any], base: Base, plan: Plan, save_dtype: torch.dtype | None, staging: Path
) -> None:
    """The base's config.json with what the merge changed, and nothing else."""
    config = json.loads(json.dumps(config))
    parts = [config, *(value for value in (config.get("text_config"),) if isinstance(value, dict))]
    for part in parts:
        part.pop("quantization_config", None)
        if save_dtype is not None:
            key = "torch_dtype" if "torch_dtype" in part else "dtype"
            part[key] = str(save_dtype).removeprefix("torch.")
        if plan.vocabulary is not None and ("vocab_size" in part or part is parts[-1]):
            part["vocab_size"] = plan.vocabulary[1]
    if plan.untied:
        for part in parts:
            part["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (staging / "config.json").write_text(text, encoding="utf-8")
    if "auto_map" in config:
        for file in base.folder.glob("*.py"):
            _copy(file, staging)


def complete_stops(staging: Path, end_of_text: int | None) -> list[int]:
    """Add the tokenizer's end-of-text token to the stops of generation_config.json; all stops."""
    file = staging / GENERATION
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = values.get("eos_token_id")
    tokens = found if isinstance(found, list) else [found]
    stops = [token for token in tokens if isinstance(token, int)]
    if end_of_text is not None and end_of_text not in stops:
        stops.append(end_of_text)
    if stops:
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return stops


def _chosen(names: tuple[str, ...], folder: Path) -> Iterator[Path]:
    return (folder / name for name in names if (folder / name).exists())


def _copy(source: Path, folder: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, folder / source.name)
