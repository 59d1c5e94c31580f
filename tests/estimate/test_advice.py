"""What to change in a recipe that does not fit; each saving is what comes out afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from peftcli.estimate.gpus import Gpu, find_gpu
from peftcli.estimate.result import Estimate
from peftcli.estimate.run import run
from peftcli.recipe.schema import Recipe

NAME = "llama-3.1-8b"


def recipe(method: Any, model: str = NAME, **sections: dict[str, Any]) -> dict[str, Any]:
    data = {"train": "rows.jsonl", **sections.pop("data", {})}
    return {"model": model, "method": method, "data": data, "output": "out", **sections}


def estimate(values: dict[str, Any], gpu: Gpu) -> Estimate:
    return run(Recipe.model_validate(values), gpu)


def pasted(values: dict[str, Any], text: str) -> dict[str, Any]:
    """The recipe with these lines of YAML over its own."""
    merged = dict(values)
    for section, keys in yaml.safe_load(text).items():
        own = merged.get(section, {})
        own = {"name": own} if isinstance(own, str) else own
        if section == "method" and keys.get("name") == "lora" and own.get("name") == "full":
            own = {}
        merged[section] = {**own, **keys}
    return merged


CASES = [
    (recipe("full"), "24GB"),
    (recipe("full"), "12GB"),
    (recipe("lora"), "16GB"),
    (recipe({"name": "lora", "use_dora": True, "rank": 64}), "16GB"),
    (recipe("adapter"), "12GB"),
    (recipe("full", training={"checkpointing": "none"}, data={"max_length": 32_768}), "V100"),
    (recipe("qlora", data={"max_length": 131_072}), "16GB"),
    (recipe("qlora", data={"max_length": 131_072}, training={"checkpointing": "full"}), "24GB"),
    (recipe("lora", training={"micro_batch_size": 16, "batch_size": 16}), "20GB"),
    (recipe("lora", training={"checkpointing": "none"}, data={"max_length": 4096}), "24GB"),
    (recipe("lora", training={"checkpointing": "none", "micro_batch_size": 16}), "20GB"),
]


@pytest.mark.parametrize(("values", "gpu"), CASES)
def test_the_lines_to_paste_make_it_fit(values: dict[str, Any], gpu: str) -> None:
    found = estimate(values, find_gpu(gpu))
    assert found.verdict in ("fits with changes", "tight")
    after = estimate(pasted(values, found.paste), find_gpu(gpu))
    assert after.verdict == "fits", found.paste


@pytest.mark.parametrize(("values", "gpu"), CASES)
def test_each_saving_is_real(values: dict[str, Any], gpu: str) -> None:
    card = find_gpu(gpu)
    found = estimate(values, card)
    assert 0 < len(found.changes) <= 3
    for change in found.changes:
        section, _, rest = change.line.partition(".")
        after = estimate(pasted(values, f"{section}: {{{rest}}}"), card)
        assert change.fits == (after.verdict == "fits")
        if not change.fits:  # then both are at their thriftiest
            saved = found.memory.likely_gib - after.memory.likely_gib
            assert saved == pytest.approx(change.saves_gib, abs=0.02)


def test_no_line_is_needless() -> None:
    values = recipe("full", training={"micro_batch_size": 4, "checkpointing": "none"})
    found = estimate(values, find_gpu("16GB"))
    assert found.verdict == "fits with changes"
    lines = yaml.safe_load(found.paste)
    pairs = [(section, key) for section, keys in lines.items() for key in keys]
    for section, key in pairs:
        fewer = {
            name: {k: v for k, v in keys.items() if (name, k) != (section, key)}
            for name, keys in lines.items()
        }
        text = yaml.safe_dump({name: keys for name, keys in fewer.items() if keys})
        if text.strip() != "{}":
            assert estimate(pasted(values, text), find_gpu("16GB")).verdict != "fits"


def test_cheap_changes_come_first() -> None:
    values = recipe("lora", training={"micro_batch_size": 16, "batch_size": 16})
    found = estimate(values, find_gpu("20GB"))
    assert found.changes[0].line == "training.micro_batch_size: 1"
    assert found.changes[0].fits
    assert found.paste == "training:\n  micro_batch_size: 1"


def test_rows_are_cut_to_the_longest_that_fits() -> None:
    found = estimate(recipe("qlora", data={"max_length": 131_072}), find_gpu("16GB"))
    line = next(x.line for x in found.changes if x.line.startswith("data.max_length"))
    length = int(line.split(": ")[1])
    assert 8192 < length < 131_072
    longer = recipe("qlora", data={"max_length": length + 512})
    assert estimate(longer, find_gpu("16GB")).verdict != "fits"


def test_nothing_helps_a_model_that_is_far_too_large() -> None:
    found = estimate(recipe("lora", model="llama-3.1-405b"), find_gpu("24GB"))
    assert found.verdict == "does not fit"
    assert found.paste == ""
    assert not any(change.fits for change in found.changes)


def test_nothing_is_advised_where_it_fits() -> None:
    found = estimate(recipe("qlora"), find_gpu("24GB"))
    assert found.verdict == "fits"
    assert (found.changes, found.paste, found.other_gpus) == ((), "", ())
    assert found.limits is not None
    assert found.limits.tokens_per_row > 2048
