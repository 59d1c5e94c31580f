"""`peftcli estimate` as a user meets it: real processes, what they print, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Done, server

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "numpy", "pyarrow", "matplotlib"}


def estimate(*arguments: str, cwd: Path | None = None, **environment: str) -> Done:
    return server().run("estimate", *arguments, cwd=cwd, environment=dict(environment))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_local_config_on_a_card(model: Path) -> None:
    done = estimate("--model", str(model), "--gpu", "4090", "--explain")
    assert done.returncode == 0, done.stderr
    assert "on RTX 4090: fits" in done.stdout
    assert "8,030,261,248 parameters" in done.stdout
    assert "nvidia-smi shows" in done.stdout
    assert "0.3 of it paged states that give way" in done.stdout
    assert "at most" in done.stdout
    assert "inputs of the norms 16,392" in done.stdout
    assert "GB" not in done.stdout.replace("GiB", "")


def test_a_row_alone_is_not_told_where_the_batch_must_go_at_once(tmp_path: Path) -> None:
    """One row after the other would need the gradients of those before."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: qwen2.5-14b\nmethod: full\ndata: {train: no-such-file.jsonl}\noutput: out\n"
        "training: {optimizer: adafactor, batch_size: 16}\n"
    )
    done = estimate(str(recipe), "--gpu", "h200")
    assert done.returncode == 0, done.stderr
    assert "at most 23 of these rows at a time, with checkpointing full" in done.stdout


def test_a_card_that_is_too_small_ends_with_3_and_lines_to_paste(model: Path) -> None:
    done = estimate("--model", str(model), "--method", "lora", "--gpu", "16GB")
    assert done.returncode == 3
    assert "fits with changes" in done.stdout
    assert "    method:\n      name: qlora\n" in done.stdout
    assert "cannot hold this run" in done.stderr


def test_methods_side_by_side_at_one_micro_batch(model: Path) -> None:
    done = estimate("--compare", "--model", str(model), "--gpu", "h100", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == [
        *("lora", "dora", "lora, fp8", "qlora", "adapter", "adapter, 4-bit", "full")
    ]
    assert found["lora, fp8"]["memory"]["base_gib"] < 0.6 * found["lora"]["memory"]["base_gib"]
    shapes = {
        (x["settings"]["micro_batch_size"], x["settings"]["checkpointing"]) for x in found.values()
    }
    assert shapes == {(1, "full")}
    assert found["qlora"]["cheapest_gpu"] == "RTX 3090"
    assert found["full"]["cheapest_gpu"] == "B200"
    assert found["lora"]["adapter_file_gib"] == pytest.approx(4 * 41_943_040 / 2**30)
    shown = estimate("--compare", "--model", str(model)).stdout
    assert "micro_batch_size 1, checkpointing full" in shown
    assert "41,943,040  160.0 MiB" in shown


def test_comparing_keeps_the_keys_that_methods_share(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\nmethod: {{name: lora, rank: 64, use_rslora: true}}\n"
        "data: {train: no-such-file.jsonl}\ntraining: {micro_batch_size: 2}\noutput: out\n"
    )
    done = estimate(str(recipe), "--compare", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["qlora"]["trainable"] == found["lora"]["trainable"] == 4 * 41_943_040
    assert {x["settings"]["micro_batch_size"] for x in found.values()} == {2}


def test_comparing_leaves_out_what_does_not_go_together(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\nmethod: {{name: lora, dropout: 0.1}}\n"
        "data: {train: no-such-file.jsonl}\noutput: out\n"
    )
    found = json.loads(estimate(str(recipe), "--compare", "--json").stdout)
    assert "lora, fp8" not in found
    assert found["dora"]["verdict"]


def test_comparing_tells_what_is_wrong_in_the_recipe(model: Path, tmp_path: Path) -> None:
    """That some methods have no such key does not make it right."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\nmethod: {{name: lora, target_modules: [no_proj]}}\n"
        "data: {train: no-such-file.jsonl}\noutput: out\n"
    )
    done = estimate(str(recipe), "--compare")
    assert done.returncode == 2
    assert "method.target_modules: matches nothing in this model" in done.stderr


@pytest.mark.parametrize(
    ("mode", "cheapest"),
    [("full", "V100 32GB"), (7, "RTX 3090"), ("offload", "RTX 3090")],
)
def test_the_cheapest_card_has_the_way_of_checkpointing(
    model: Path, tmp_path: Path, mode: object, cheapest: str
) -> None:
    """A card without bfloat16 has no fused layers, which a number or offload asks for."""
    table, recipe = tmp_path / "prices.csv", tmp_path / "r.yaml"
    table.write_text("gpu,low,high,read,source\nV100 32GB,0.05,0.06,2026-12,a neighbour\n")
    recipe.write_text(
        f"model: {model}\nmethod: lora\ndata: {{train: no-such-file.jsonl}}\n"
        f"training: {{checkpointing: {mode}}}\noutput: out\n"
    )
    done = estimate(str(recipe), "--compare", "--json", PEFTCLI_PRICES=str(table))
    found = json.loads(done.stdout)
    assert found["lora"]["settings"]["checkpointing"] == mode
    assert found["lora"]["cheapest_gpu"] == cheapest
    assert found["dora"]["cheapest_gpu"] == "V100 32GB"  # on plain layers, and shown with `full`


def test_a_checkpoint_that_is_quantised_already(tmp_path: Path) -> None:
    """train cannot quantise it again, nor train its weights; LoRA is what is left."""
    stored = CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    model = ("--model", str(tmp_path), "--gpu", "h100")
    for method, named in (("qlora", "nf4 is for 16-bit"), ("full", "trains every weight")):
        done = estimate(*model, "--method", method)
        assert done.returncode == 2
        assert named in done.stderr
    assert json.loads(estimate(*model, "--json").stdout)["method"] == "lora"
    compared = estimate(*model, "--compare", "--json")
    assert list(json.loads(compared.stdout)) == ["lora", "dora", "adapter"]


def test_experts_that_stay_in_16_bits_are_offered_no_4_bits() -> None:
    done = estimate("--model", "gpt-oss-20b", "--gpu", "t4")
    assert done.returncode == 3
    assert "qlora" not in done.stdout


def test_comparing_tells_whether_the_method_itself_fits(model: Path) -> None:
    shown = estimate("--compare", "--model", str(model), "--gpu", "rtx-4090", "--json")
    assert json.loads(shown.stdout)["full"]["verdict"] == "does not fit"


def test_what_no_card_holds_is_not_told_to_change(tmp_path: Path) -> None:
    done = estimate("--model", "deepseek-v3", "--gpu", "h200")
    assert done.returncode == 3
    assert "changes above" not in done.stderr
    assert "take a smaller model" in done.stderr


def test_a_card_that_train_refuses_does_not_run_it(model: Path) -> None:
    fp8 = ("--model", str(model), "--method", "lora", "--set", "method.quantization=fp8")
    fp8 += ("--set", "training.micro_batch_size=4")  # 35 GiB
    done = estimate(*fp8, "--gpu", "a100")
    assert done.returncode == 3
    assert "on A100 80GB: does not run" in done.stdout
    assert "does not multiply in fp8" in done.stderr
    verdicts = {
        name: x["verdict"] for name, x in json.loads(estimate(*fp8, "--json").stdout).items()
    }
    assert verdicts["L40S"] == "fits"
    assert verdicts["A40"] == verdicts["T4"] == "does not run"
    assert "fits A40" not in done.stdout
    assert "fits L40S" in done.stdout
    offload = ("--model", str(model), "--set", "training.checkpointing=offload")
    done = estimate(*offload, "--gpu", "v100")
    assert done.returncode == 3
    assert "fits RTX 3090" in done.stdout
    assert "fits T4" not in done.stdout


def test_cards_that_are_named_multiply_what_the_checkpoint_is_stored_in(tmp_path: Path) -> None:
    stored = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [9, 9]}}
    big = stored | {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 24}
    (tmp_path / "config.json").write_text(json.dumps(big))
    done = estimate("--model", str(tmp_path), "--gpu", "l4", "--json")
    others = {other["name"] for other in json.loads(done.stdout)["other_gpus"]}
    assert done.returncode == 3
    assert others
    assert not others & {"A40", "RTX A6000", "A100 40GB", "A100 80GB"}


def test_the_longest_row_is_one_that_the_model_has_positions_for(model: Path) -> None:
    config = CONFIG | {"max_position_embeddings": 8192}
    (model / "config.json").write_text(json.dumps(config))
    done = estimate("--model", str(model), "--gpu", "h100", "--json")
    limits = json.loads(done.stdout)["limits"]
    assert limits["tokens_per_row"] == 8192
    assert limits["micro_batch_size"] > 100
    assert limits["host_gib"] > 50  # of so many rows, not of the one


def test_a_price_is_told_of_tokens_where_nobody_knows_the_rows(model: Path) -> None:
    arguments = ("--model", str(model), "--gpu", "h100", "--price", "3.6")
    time = json.loads(estimate(*arguments, "--json").stdout)["time"]
    least, likely, most = (time[f"{x}step_seconds"] for x in ("low_", "", "high_"))
    assert least < likely < most
    low, high = (1000 / time["tokens_per_second"] * x / likely for x in (least, most))
    assert time["low_usd_per_million_tokens"] == pytest.approx(low)
    shown = estimate(*arguments).stdout
    assert f"{low:.2g} to {high:.2g} USD a million tokens" in shown
    assert f"{likely:.2f} s a step, {least:.2f} to {most:.2f}" in shown
    assert "training.max_steps" in shown
    assert "max_steps" not in estimate(*arguments, "--set", "training.max_steps=9").stdout


@pytest.mark.parametrize("arguments", [(), ("--compare",)])
def test_tables_tell_that_a_model_is_not_known(model: Path, arguments: tuple[str, ...]) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | {"model_type": "brand_new"}))
    shown = estimate("--model", str(model), *arguments).stdout
    assert "note: brand_new is not known: sizes are those of a plain decoder" in shown


def test_a_method_beside_a_recipe_is_refused(tmp_path: Path) -> None:
    done = estimate(str(tmp_path / "r.yaml"), "--method", "lora")
    assert done.returncode == 2
    assert "--set method=lora" in done.stderr


def test_every_card_without_a_name(model: Path) -> None:
    done = estimate("--model", str(model))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["GPU", "verdict", "micro"]
    assert any(line.startswith("H200") for line in lines)


def test_rows_are_counted_and_the_way_is_told(model: Path, tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "x" * 400},
            {"role": "assistant", "content": "y" * 400},
        ]
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 500)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {model}\nmethod: qlora\ndata: {{train: rows.jsonl, eval: null}}\noutput: out\n"
    )
    done = estimate(str(recipe), "--gpu", "h100", "--price", "1.99", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["time"]["steps"] == 3 * 32
    assert any("no tokenizer was run" in note for note in found["notes"])
    high = found["time"]["high_seconds"] / 3600 * 1.99
    assert found["time"]["high_cost_usd"] == pytest.approx(high)
    shown = estimate(str(recipe), "--gpu", "h100", cwd=tmp_path).stdout
    assert "USD an hour, read 2026-08 to 2026-11, no promise" in shown


def test_prices_of_ones_own(model: Path, tmp_path: Path) -> None:
    table = tmp_path / "prices.csv"
    table.write_text("gpu,low,high,read,source\nRTX 3060,0.05,0.06,2026-12,a neighbour\n")
    arguments = ("--model", str(model), "--compare", "--json")
    done = estimate(*arguments, PEFTCLI_PRICES=str(table))
    assert json.loads(done.stdout)["qlora"]["cheapest_gpu"] == "RTX 3060"
    table.write_text("RTX 3060,free\n")
    wrong = estimate(*arguments, PEFTCLI_PRICES=str(table))
    assert wrong.returncode == 2
    assert f"{table}:1: not a price" in wrong.stderr


BAD = [
    ({"hidden_size": None}, "hidden_size or n_embd or d_model or n_embed is missing"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"vocab_size": 10**30}, "vocab_size is 1000000000"),
    ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
    ({"intermediate_size": 1e30}, "intermediate_size is 1e+30"),
    ({"model_type": None}, "model_type is missing"),
    ({"model_type": None, "peft_type": "LORA"}, "the configuration of an adapter"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_a_wrong_config_is_named_and_ends_with_2(
    change: dict[str, Any], named: str, model: Path
) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, **change}))
    done = estimate("--model", str(model), "--gpu", "24GB")
    assert done.returncode == 2, done.stdout
    assert named in done.stderr
    assert str(model / "config.json") in done.stderr
    assert "Traceback" not in done.stderr


WRONG_ARGUMENTS = [
    (("--model", "no-such-model"), "not in the catalog"),
    (("--model", "no/such-model", "--offline"), "not in the catalog"),
    (("--model", "x" * 5000), "not in the catalog"),
    (("--model", "llama-3.1-8b", "--gpu", "toaster"), "'toaster' is not in the table"),
    (("--model", "llama-3.1-8b", "--price", "nan"), "--price nan: not a price"),
    (("--model", "llama-3.1-8b", "--price", "-1"), "--price -1: not a price"),
    (("--model", "llama-3.1-8b", "--price", "1e30"), "not a price"),
    (("--model", "llama-3.1-8b", "--method", "lorra"), "lorra"),
    ((), "no recipe"),
    (("r.yaml", "--model", "llama-3.1-8b"), "r.yaml and --model llama-3.1-8b: one of the two"),
    (("no-such-recipe.yaml",), "no such recipe"),
    (("--model", "llama-3.1-8b", "--set", "training.batch_size=-1"), "training.batch_size"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG_ARGUMENTS)
def test_wrong_arguments_end_with_2(arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = estimate(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"\x89PNG")
    done = estimate("--model", str(tmp_path / "pictures"), "--gpu", "24GB")
    assert done.returncode == 2
    assert "pictures/config.json: no such file" in done.stderr
    assert "configuration" not in done.stderr
    (tmp_path / "pictures" / "adapter_config.json").write_text("{}")
    done = estimate("--model", str(tmp_path / "pictures"))
    assert done.returncode == 2
    assert "of an adapter, not a model" in done.stderr


def test_a_card_of_which_only_the_memory_is_known(model: Path) -> None:
    note = "of this card only the memory is known"
    assert note in estimate("--model", str(model), "--gpu", "24GB").stdout
    assert note not in estimate("--model", str(model), "--gpu", "rtx-4090").stdout


def test_absurd_sizes_that_are_numbers_do_not_crash(model: Path) -> None:
    (model / "config.json").write_text(
        json.dumps({**CONFIG, "hidden_size": 2**20, "intermediate_size": 10**9})
    )
    done = estimate("--model", str(model), "--gpu", "24GB")
    assert done.returncode == 3
    assert "does not fit" in done.stdout


def test_measuring_needs_a_gpu(model: Path) -> None:
    done = estimate("--model", str(model), "--measure", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3
    assert "--measure: PyTorch sees no GPU here" in done.stderr
    named = estimate("--model", str(model), "--measure", "--gpu", "h100")
    assert named.returncode == 3
    assert "not on --gpu h100" in named.stderr


def loaded(*arguments: str) -> set[str]:
    """Every module that a command has imported when it ends, in a process of its own."""
    code = (
        "import sys\nfrom peftcli.__main__ import main\n"
        f"sys.argv = {['peftcli', *arguments]!r}\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "specs = [getattr(module, '__spec__', None) for module in list(sys.modules.values())]\n"
        "print(*{spec.name for spec in specs if spec})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


# Seconds differ between machines and moments (`scripts/benchmark_startup --commands` measures
# them); what is imported does not. Each of these takes some thousandths of a second.
NEEDLESS = {
    *("rich", "ssl", "http", "urllib.request"),
    *("logging", "asyncio", "multiprocessing", "unicodedata", "sqlite3", "statistics"),
    *("peftcli.report", "peftcli.metrics", "peftcli.architecture.catalog", "peftcli.models"),
}


def test_only_what_reads_a_command_and_a_recipe_is_loaded(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        f"model: {model}\nmethod: lora\ndata: {{train: bundled:quickstart.train}}\noutput: o\n"
    )
    found = loaded("estimate", str(file), "--gpu", "h100")
    assert {"peftcli.estimate.show", "typer", "pydantic", "yaml"} <= found
    assert not (HEAVY | NEEDLESS) & found


def test_a_wrong_recipe_needs_no_estimate(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: bundled:tiny\nmethod: {name: lora, ranc: 8}\noutput: o\n")
    found = loaded("train", str(file))
    assert {"peftcli.recipe.load", "typer", "pydantic", "yaml"} <= found
    assert not (HEAVY | NEEDLESS | {"peftcli.estimate", "peftcli.train", "peftcli.data"}) & found


def test_a_data_file_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {model}\nmethod: lora\ndata: {{train: none.jsonl}}\noutput: out\n")
    done = estimate(str(recipe), "--gpu", "h100")
    assert "the rows were not read (" in done.stdout
    assert "none.jsonl" in done.stdout


def test_no_lines_are_offered_where_the_card_refuses_the_recipe(model: Path) -> None:
    done = estimate("--model", str(model), "--gpu", "t4", "--set", "training.checkpointing=7")
    assert done.returncode == 3
    assert "does not run" in done.stdout
    assert "it fits with these lines" not in done.stdout
