"""A tokenizer with a chat template, one without, and data sections prepared in a line."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftcli.dataset import prepare
from peftcli.recipe.schema import Data


@pytest.fixture
def tokenizer(base_model):
    return AutoTokenizer.from_pretrained(base_model)


@pytest.fixture
def base_tokenizer():
    """Like that of a base model: merges, a begin token of its own, no chat template."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["What is the answer to the question?\n\nIt is 12."] * 9, trainer)
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture
def make(tmp_path, tokenizer):
    """Prepare a data section in a folder of its own."""

    def call(rows=None, *, tok=None, seed=1, workers=1, name="a.jsonl", **section):
        if rows is not None:
            write(tmp_path, name, rows)
        section = {"train": name, "eval": None, **section}
        return prepare(
            Data(**section),
            tok or tokenizer,
            base_dir=tmp_path,
            cache_dir=tmp_path / "cache",
            seed=seed,
            workers=workers,
        )

    return call


def write(folder, name, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text("".join(line + "\n" for line in lines))
