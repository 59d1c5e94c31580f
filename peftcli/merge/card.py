"""README.md of the merged model: what it is made of, how, and how well that was checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftcli import __version__
from peftcli.merge.base import Base
from peftcli.merge.result import MergeResult
from peftcli.merge.source import AdapterSource

KEPT = ("license", "license_name", "license_link", "language")


def model_card(result: MergeResult, base: Base, adapter: AdapterSource) -> str:
    """A model card in the hub's format; the licence is that of the base."""
    head: dict[str, Any] = {}
    if base.folder.parent.name == "snapshots":  # from the hub, where others find it too
        head |= {"base_model": base.name, "base_model_relation": "finetune"}
    head |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front = front_matter(base.folder / "README.md")
    head |= {key: front[key] for key in KEPT if key in front}
    head["tags"] = ["peftcli", result.method]
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {result.method} on {base.name}, merged\n\n"
        f"Made with peftcli {__version__} from {_adapters(result)} and the {result.base.kind} "
        f"weights of `{base.name}`{_commit(base)}: {result.base.why}.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n\n'
        f"## Checks\n\n{_checks(result)}{_recipe(adapter)}"
    )


def front_matter(file: Path) -> dict[str, Any]:
    """The metadata of a model card; empty when there is none."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        values = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _adapters(result: MergeResult) -> str:
    if len(result.adapters) == 1 and result.adapters[0][1] == 1:
        return f"the adapter `{result.adapters[0][0]}`"
    named = [f"`{name}` at weight {weight:g}" for name, weight in result.adapters]
    kept = f", keeping {result.density:g} of each" if result.density else ""
    how = f" ({result.combine}{kept})" if result.combine else ""
    return f"the adapters {', '.join(named)}{how}"


def _commit(base: Base) -> str:
    return f" at commit {base.commit}" if base.commit else ""


def _checks(result: MergeResult) -> str:
    precision = result.precision
    lines = [
        f"- {result.tensors_changed} of {result.tensors} tensors were changed; "
        f"{precision.lost_share:.1%} of the weights with an update kept their value after "
        f"rounding, and rounding is {precision.relative_error:.1%} of the update.",
    ]
    checked = result.verification
    if checked is None:
        lines.append(f"- Logits were not compared: {result.not_verified}.")
    else:
        lines.append(
            f"- Reloaded and compared with base + adapter on {checked.tokens} tokens "
            f"({checked.prompts_from}): logits differ by at most {checked.merged.maximum:.2e}, "
            f"{checked.merged.mean:.2e} on average; the same token is preferred at "
            f"{checked.merged.top1_agreement:.1%} of the positions."
        )
    return "\n".join(lines) + "\n"


def _recipe(adapter: AdapterSource) -> str:
    if adapter.run is None or not adapter.run.recipe.is_file():
        return ""
    text = adapter.run.recipe.read_text(encoding="utf-8")
    return f"\n## Recipe of the training run\n\n```yaml\n{text}```\n"
