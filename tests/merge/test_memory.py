"""Memory follows the largest tensor and the adapter, whatever the size of the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from forked import script, server

ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
# Each job is a process of its own, forked after the imports. Sizes are in MiB: the weights, the
# largest tensor, and what writing took beyond the plan.
PROGRAM = """
import json, os, resource, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from peftcli.merge.options import MergeOptions, WeightedAdapter
from peftcli.merge.prepare import locate, prepare
from peftcli.merge.stream import write_weights

torch.set_num_threads(1)

def make(folder, layers):
    shape = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=1024)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="40MB")
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(str(folder / "adapter"))

def write(folder, form):
    options = MergeOptions(base_model=str(folder / "base"), base=form)
    named = (WeightedAdapter(folder / "adapter"),)
    prepared = prepare(locate(named, options), options, lambda text: None)
    output = folder / f"output-{form}"
    output.mkdir()
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before = peak()
    write_weights(prepared.plan, output, prepared.arithmetic, lambda done, total: None)
    sizes = [item.bytes / 2**20 for item in prepared.plan.items]
    print(json.dumps([form, sum(sizes), max(sizes), peak() - before]), flush=True)

def apart(job, *arguments):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job(*arguments)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0

for layers in (24, 48):
    folder = Path(sys.argv[1]) / str(layers)
    apart(make, folder, layers)
    for form in ("original", "dequantized"):
        apart(write, folder, form)
"""


def python(program: str, *words: object) -> str:
    done = server().run(*words, program=program, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_peak_does_not_grow_with_depth(tmp_path: Path) -> None:
    """194 and 386 MiB of weights in tensors of 2 MiB; few are not enough to fill every worker."""
    lines = python(PROGRAM, tmp_path).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("[")]
    assert [form for form, *_ in found] == ["original", "dequantized"] * 2
    for shallow, deep in zip(found[:2], found[2:], strict=True):
        assert deep[1] - shallow[1] > 60 * deep[2]
        assert deep[3] - shallow[3] < 16 * deep[2], found
    for original, rounded in (found[:2], found[2:]):  # of 5 to 8 workers, 4 bits a value each
        assert rounded[3] - original[3] < 16 * rounded[2], found


@pytest.mark.slow
def test_plan_of_70_billion_parameters(tmp_path: Path) -> None:
    """From headers alone: the files are holes of 141 GB."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_70B))
    benchmark = script(ROOT / "scripts" / "benchmark_merge")
    said = python(benchmark, file, tmp_path / "x", "--plan", "--rank", "1")
    found: Any = re.search(
        r"plan: (\d+) tensors, ([\d.]+) GB .* ([\d.]+) GiB with the adapter .* (\S+), ([\d.]+) GiB",
        said,
    )
    assert found, said
    tensors, size, took, name, largest = found.groups()
    assert (int(tensors), float(size)) == (3 + 80 * 9, 141.1)
    assert (name, float(largest)) == ("model.embed_tokens.weight", 1.96)
    assert float(took) < float(largest)
    assert not (tmp_path / "x").exists()
