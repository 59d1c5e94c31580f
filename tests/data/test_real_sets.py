"""Real sets in the schemas that their authors gave them; skipped where they are not."""

import pytest

from peftcli.data.detect import detect
from peftcli.data.formats import label_names, reader
from peftcli.data.messages import RowError
from peftcli.data.sources import Source, read_rows

# Real sets: file, columns, labels, format, rows, bad rows.
REAL = [
    ("alpaca/alpaca_5000.json", None, None, "alpaca", 5000, 2),
    ("alpaca/alpaca_gpt4_en_999.json", None, None, "alpaca", 999, 0),
    ("alpaca/identity_template.json", None, None, "alpaca", 91, 0),
    ("arc-easy/train.json", None, None, "alpaca", 2251, 0),
    ("banking77/train.csv", None, None, "classification", 10003, 0),
    ("chat-messages/deita_sample.parquet", None, None, "messages", 5, 0),
    ("chat-messages/kto_messages_train.json", None, None, "messages", 240, 119),
    ("chat-messages/sgd_train.messages.jsonl", None, None, "messages", 2000, 0),
    ("chat-openai/toy_chat_fine_tuning.jsonl", None, None, "messages", 5, 0),
    ("chat-openai/drone_training_head3.jsonl", None, None, "messages", 3, 0),
    ("chat-sharegpt/dummy_conversation.json", None, None, "sharegpt", 500, 0),
    ("chat-toolcall/glaive_toolcall_train.json", None, None, "sharegpt", 240, 0),
    ("e2e/devset.csv", {"prompt": "mr", "completion": "ref"}, None, "prompt_completion", 4672, 0),
    ("e2e/microsoft_lora_valid.txt", None, None, "text", 4672, 0),
    ("gsm8k/train.jsonl", None, None, "question_answer", 7473, 0),
    (
        "humaneval/HumanEval.jsonl",
        {"prompt": "prompt", "completion": "canonical_solution"},
        None,
        "prompt_completion",
        164,
        0,
    ),
    (
        "mbpp/mbpp.jsonl",
        {"prompt": "text", "completion": "code"},
        None,
        "prompt_completion",
        974,
        0,
    ),
    (
        "multilingual/dpo_zh_emoji.json",
        {"conversations": "conversations", "answer": "chosen"},
        None,
        "sharegpt",
        300,
        0,
    ),
    ("multilingual/oasst_sft_zh.json", None, None, "alpaca", 766, 0),
    ("multilingual/alpaca_fr.jsonl", None, None, "alpaca", 8740, 0),
    ("prompt-completion/valid.jsonl", None, None, "prompt_completion", 144, 0),
    ("sst2/dev.tsv", None, ["negative", "positive"], "classification", 6735, 0),
    ("tiny-shakespeare/input.txt", None, None, "text", 7222, 0),
    ("tinystories/tinystories_train_head.jsonl", None, None, "text", 2000, 0),
    ("webtext/c4_300.jsonl", None, None, "text", 300, 0),
    ("webtext/wiki_demo.txt", None, None, "text", 30, 0),
    ("wikisql-text/valid.jsonl", None, None, "text", 100, 0),
    ("wikitext2/valid.txt", None, None, "text", 1160, 0),
]


@pytest.mark.parametrize(
    ("file", "columns", "labels", "name", "rows", "bad"), REAL, ids=[row[0] for row in REAL]
)
def test_real_sets_load(file, columns, labels, name, rows, bad, shared):
    found = list(read_rows(Source(file), shared / "data"))
    form = detect(found[0].value, "auto", columns)
    read = reader(form.name, form.columns, label_names(labels))
    refused = 0
    for row in found:
        try:
            read(row.value)
        except RowError:
            refused += 1
    assert (form.name, len(found), refused) == (name, rows, bad)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("chat-sgd-original/dialogues_001.json", "'turns' is a list of maps with frames, speaker"),
        ("chat-sharegpt/mt_bench_question.jsonl", "columns found: question_id, category, turns"),
        ("multilingual/dpo_zh_emoji.json", "preference data"),
    ],
)
def test_real_sets_that_are_no_training_rows_are_refused(file, expected, shared):
    row = next(read_rows(Source(file), shared / "data"))
    with pytest.raises(RowError) as caught:
        detect(row.value)
    assert expected in str(caught.value)
