"""What the user wants evaluated: a run, a recipe, an adapter or a model; found without torch."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from peftcli.bundled import PREFIX, bundled
from peftcli.errors import UsageError
from peftcli.fingerprint import check_same_base
from peftcli.paths import expanded
from peftcli.recipe.load import LoadedRecipe, load_recipe
from peftcli.recipe.schema import Model
from peftcli.run_dir import RunDir
from peftcli.untrusted import read_object

RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Target:
    """The models to compare, and where their rows and their report are."""

    kind: Literal["run", "recipe", "adapter", "model"]
    source: str
    output: Path
    base: Model
    loaded: LoadedRecipe | None = None
    adapter: Path | None = None
    tuned: Path | None = None
    """The model folder of full fine-tuning."""
    merged: Path | None = None
    manifest: dict[str, Any] | None = None

    @property
    def tuned_arm(self) -> str:
        """The arm that is compared with the base; the only one where nothing is tuned."""
        if self.adapter is not None:
            return "adapter"
        return "tuned" if self.tuned is not None else "base" if self.loaded else "model"


def find_target(source: Path, *, output: Path | None = None, base: str | None = None) -> Target:
    """What `source` names; raises UsageError with the ways out, ArtefactError for damaged files."""
    text = str(source)
    if source.suffix in RECIPE_SUFFIXES and not source.is_dir():
        return _recipe(source, output)
    if (source / "run.json").is_file():
        return _run(source, source, output)
    if (source / "adapter_config.json").is_file():
        if source.name == "adapter" and (source.parent / "run.json").is_file():
            return _run(source.parent, source, output)
        return _adapter(source, output, base)
    if text.startswith(PREFIX) or not source.exists():
        return _named_model(source, output)
    if (source / "config.json").is_file():
        return Target("model", text, output or Path(f"eval-{source.name}"), Model(name=text))
    raise UsageError(
        f"{source}: neither a run, a recipe, an adapter nor a model",
        "a run holds run.json, an adapter adapter_config.json, a model config.json",
    )


def check_base(target: Target, base: Path | None) -> None:
    """Raise ArtefactError when the adapter was trained on other weights than those in `base`."""
    if target.adapter is not None and base is not None:
        check_same_base(target.adapter, base)


def local_base(target: Target) -> Path | None:
    """The folder of a local or bundled base; None for one on the hub."""
    path = bundled(target.base.name) or expanded(target.base.name)
    return path if path.is_dir() else None


def _run(folder: Path, shown: Path, output: Path | None) -> Target:
    run = RunDir(folder)
    manifest = run.read_manifest() or {}
    adapter = run.adapter if (run.adapter / "adapter_config.json").is_file() else None
    tuned = run.model if (run.model / "config.json").is_file() else None
    if adapter is None and tuned is None:
        raise UsageError(
            f"{folder}: the run is {manifest.get('status', 'not finished')} and holds no result",
            "finish it with `peftcli train --resume`",
        )
    loaded = load_recipe(run.recipe)
    merged = folder / "merged"
    return Target(
        kind="run",
        source=str(shown),
        output=output or folder,
        base=loaded.recipe.model,
        loaded=loaded,
        adapter=adapter,
        tuned=tuned if adapter is None else None,
        merged=merged if (merged / "config.json").is_file() else None,
        manifest=manifest,
    )


def _recipe(path: Path, output: Path | None) -> Target:
    loaded = load_recipe(path)
    folder = Path(loaded.recipe.output)
    if (folder / "run.json").is_file():
        return _run(folder, path, output)
    return Target("recipe", str(path), output or folder, loaded.recipe.model, loaded)


def _adapter(folder: Path, output: Path | None, base: str | None) -> Target:
    values = read_object(folder / "adapter_config.json", "restore it from where it came from")
    name: Any = values.get("base_model_name_or_path")
    revision = values.get("revision")
    if base is None and not (isinstance(name, str) and name):
        raise UsageError(
            f"{folder}: does not say which base it was trained on", "name --base-model"
        )
    if base is not None:
        model = Model(name=base)
    else:
        model = Model(name=name, revision=revision if isinstance(revision, str) else None)
    return Target(
        "adapter", str(folder), output or Path(f"eval-{folder.name}"), model, adapter=folder
    )


def _named_model(source: Path, output: Path | None) -> Target:
    text = str(source)
    try:
        folder = bundled(text)
    except FileNotFoundError as error:
        raise UsageError(str(error), "write one of those") from None
    name = text.removeprefix(PREFIX).rpartition("/")[2]
    if folder is None and (text.count("/") != 1 or text.startswith((".", "/", "~"))):
        beside = source.parent.iterdir() if source.parent.is_dir() else ()
        near = get_close_matches(source.name, [item.name for item in beside], n=1)
        guess = f"; did you mean {source.parent / near[0]}?" if near else ""
        raise UsageError(
            f"{source}: no such file or folder{guess}",
            "name a run, a recipe, an adapter folder or a model",
        )
    return Target("model", text, output or Path(f"eval-{name}"), Model(name=text))
