"""What must be the same for a run to go on where it stopped."""

from __future__ import annotations

from typing import Any

from peftcli.errors import ArtefactError, UsageError
from peftcli.events import Listener, Warned
from peftcli.recipe.document import dotted
from peftcli.recipe.load import leaves
from peftcli.recipe.schema import Gates
from peftcli.run_dir import RunDir

OTHER_BASE = "base:"
# They decide what happens when something goes wrong, or what is kept.
FREE_TRAINING = (
    *("report_to", "keep_checkpoints"),
    *("on_nonfinite", "max_nonfinite_steps", "on_oom"),
)
# Where the result lies and how it is judged does not change it.
FREE_KEYS = {
    ("output",),
    *(("training", key) for key in FREE_TRAINING),
    *(("evaluation", key) for key in ("metrics", "retain", "max_new_tokens", "gates")),
    *(("evaluation", "gates", key) for key in Gates.model_fields),
}


def check_unchanged(
    folder: RunDir, manifest: dict[str, Any], *, force: bool, tell: Listener
) -> None:
    """Raise UsageError listing every difference to the run in the folder.

    Another base raises ArtefactError.
    With `force` the differences become warnings and are recorded in the manifest.
    """
    found = differences(folder.read_manifest() or {}, manifest)
    if found and not force:
        other_base = any(line.startswith(OTHER_BASE) for line in found)
        raise (ArtefactError if other_base else UsageError)(
            f"--resume: {folder.path} was started differently:\n"
            + "\n".join(f"  {line}" for line in found),
            "restore what changed; --force goes on and records it; --overwrite starts again",
        )
    if found:
        manifest["resumed_with_changes"] = found
    for line in found:
        tell(Warned(f"--force: {line}"))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each thing that decides the result and is not what it was."""
    found = []
    old = dict(leaves(before.get("recipe", {})))
    for path, value in leaves(now["recipe"]):
        if path not in FREE_KEYS and old.get(path) != value:
            found.append(f"recipe: {dotted(path)} was {old.get(path)}, is {value}")
    if _files(before) != _files(now):
        found.append("data: the content of the data files changed")
    if before.get("base", {}).get("fingerprint") != now["base"]["fingerprint"]:
        found.append(f"{OTHER_BASE} other weights than those it was started with")
    for key in ("sha256", "chat_template_sha256"):
        if before.get("tokenizer", {}).get(key) != now["tokenizer"][key]:
            found.append(
                f"tokenizer: its {key.removesuffix('sha256').strip('_') or 'file'} changed"
            )
    versions = before.get("versions", {})
    for name, value in now["versions"].items():
        if versions.get(name) != value:
            found.append(f"versions: {name} was {versions.get(name)}, is {value}")
    for key in ("micro_batch_size", "accumulation", "steps", "packing"):
        if before.get("plan", {}).get(key) != now["plan"][key]:
            found.append(
                f"plan: {key} was {before.get('plan', {}).get(key)}, is {now['plan'][key]}"
            )
    return found


def _files(manifest: dict[str, Any]) -> list[str]:
    return sorted(str(file["sha256"]) for file in manifest.get("data", {}).get("files", []))
