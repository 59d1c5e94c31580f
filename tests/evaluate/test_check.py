"""What is refused before torch is imported, and with which words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from colours import write_rows

from peftcli.errors import (
    ArtefactError,
    DataError,
    PeftcliError,
    RecipeError,
    ResourceError,
    UsageError,
)
from peftcli.evaluate.check import asked_sources, check, load_function
from peftcli.evaluate.options import EvalOptions, Gates, completed
from peftcli.evaluate.target import find_target
from peftcli.recipe.schema import Data


def recipe(folder: Path, **data: object) -> Path:
    rows = write_rows(
        folder / "rows.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(9)]
    )
    values = {
        "model": "bundled:tiny",
        "method": "lora",
        "data": {"train": str(rows), "eval": 0.3, **data},
        "output": str(folder / "run"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (EvalOptions(metrics=("rougel",)), "did you mean rouge_l", "regex:PATTERN"),
        (EvalOptions(gates=Gates(fail_under={"acuracy": 1})), "did you mean accuracy", ""),
        (EvalOptions(metric_function="scores"), "not MODULE:FUNCTION", "scores:dates"),
        (EvalOptions(metric_function="no_such_module:f"), "No module named", "folder"),
        (EvalOptions(metric_function="math:no"), "has no function no", ""),
        (EvalOptions(against=Path("nowhere/eval.json")), "No such file", "earlier"),
        (EvalOptions(data=("nowhere.jsonl",)), "no such file", ""),
        (EvalOptions(retain=("nowhere.jsonl",)), "no such file", ""),
        (EvalOptions(gates=Gates(max_merge_drift=0.1)), "has no merged model", "peftcli merge"),
        (EvalOptions(gates=Gates(min_gain=0)), "nothing to compare", "adapter"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, options: EvalOptions, message: str, hint: str
) -> None:
    with pytest.raises(PeftcliError) as caught:
        check(recipe(tmp_path), options)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_recipe_that_holds_nothing_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds out no rows") as caught:
        check(recipe(tmp_path, eval=None), EvalOptions())
    assert "--data FILE" in caught.value.hint


def test_an_empty_file_and_rows_without_a_reference(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="file is empty"):
        check(recipe(tmp_path), EvalOptions(data=(str(empty),)))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, {"prompt": "a"}]
    half = write_rows(tmp_path / "half.jsonl", rows)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="2 of the first 3 rows are bad") as caught:
        check(recipe(tmp_path), EvalOptions(data=(str(half),)))
    assert "half.jsonl:2" in caught.value.message
    assert "half.jsonl:3" in caught.value.message


def test_rows_in_another_form_than_those_of_the_recipe(tmp_path: Path) -> None:
    data = Data(train="x", columns={"prompt": "mr", "completion": "ref"})  # type: ignore[arg-type]
    own = write_rows(tmp_path / "own.jsonl", [{"mr": "name[Eagle]", "ref": "The Eagle."}])
    other = write_rows(tmp_path / "other.jsonl", [{"question": "1+1", "answer": "2"}])
    first, second = asked_sources((str(own), str(other)), data)
    assert first.columns == {"prompt": "mr", "completion": "ref"}
    assert second.columns == {}


def test_an_adapter_or_model_needs_rows_and_a_base(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no rows of its own"):
        check(Path("bundled:tiny"), EvalOptions())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="which base"):
        find_target(adapter)
    assert find_target(adapter, base="some/model").base.name == "some/model"
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ArtefactError, match="not JSON"):
        find_target(adapter)


def test_a_run_without_a_result_and_folders_of_something_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UsageError, match="neither a run"):
        find_target(run)
    (run / "run.json").write_text('{"status": "interrupted"}')
    with pytest.raises(UsageError, match="interrupted and holds no result") as caught:
        find_target(run)
    assert "--resume" in caught.value.hint
    with pytest.raises(UsageError, match=r"did you mean .*run\?"):
        find_target(tmp_path / "rum")


def test_a_report_of_something_else(tmp_path: Path) -> None:
    for text, message in (("[]", "no report"), ("{", "no report"), ('{"table": {}}', "version")):
        file = tmp_path / "eval.json"
        file.write_text(text)
        with pytest.raises(ArtefactError, match=message):
            check(recipe(tmp_path), EvalOptions(against=tmp_path))


def test_tasks_without_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError, match="lm-evaluation-harness") as caught:
        check(recipe(tmp_path), EvalOptions(tasks=("gsm8k",)))
    assert "peftcli[lm-eval]" in caught.value.hint


def test_a_function_is_loaded_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scores_here.py").write_text("def half(prediction, reference):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("scores_here:half").measure("a", "b") == (0.5, 1.0)


def test_checking_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from peftcli.errors import PeftcliError\n"
        "from peftcli.evaluate.check import check\n"
        "from peftcli.evaluate.options import EvalOptions\n"
        "from peftcli.evaluate import gates, report_html, show, wording\n"
        f"target = check(Path({str(recipe(tmp_path))!r}), EvalOptions(metrics=('exact_match',)))\n"
        "try:\n    check(Path('nowhere'), EvalOptions())\nexcept PeftcliError:\n    pass\n"
        "names = ('torch', 'transformers', 'peft', 'numpy', 'datasets', 'rich')\n"
        "print(target.kind, [name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "recipe []"


def test_options_can_be_written_as_json() -> None:
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(EvalOptions(data=("a",))), default=str))["data"] == ["a"]


def test_the_recipe_completes_the_command_line(colour_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(colour_run, folder)
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    gates = {
        "fail_under": {"accuracy": "80%", "macro_f1": 0.5},
        "min_gain": 0,
        "max_merge_drift": 1,
    }
    values["evaluation"] = {"metrics": ["accuracy"], "retain": [], "gates": gates}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    given = EvalOptions(gates=Gates(fail_under={"accuracy": 0.9}))
    found = completed(given, find_target(folder))
    assert found.metrics == ("accuracy",)
    assert found.retain == ()
    assert found.gates == Gates(fail_under={"accuracy": 0.9, "macro_f1": 0.5}, min_gain=0)
    values["output"] = str(tmp_path / "untrained")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    assert completed(given, check(file, EvalOptions())).gates == given.gates
    values["evaluation"]["metrics"] = ["acuracy"]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match="did you mean accuracy"):
        check(file, EvalOptions())
