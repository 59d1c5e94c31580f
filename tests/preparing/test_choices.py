"""Which rows are left out, held out, repeated or refused, and that it is counted."""

import json
import re

import pytest

from peftcli.dataset import samples
from peftcli.errors import DataError


def write(folder, name, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text("".join(line + "\n" for line in lines))


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def pairs(count, start=0):
    return [pair(f"Question {i}?", f"Answer {i}.") for i in range(start, start + count)]


def chat(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def trained(prepared, tok, row=0):
    """The pieces of a row that carry loss."""
    return [text for text, on in samples(prepared, tok, row + 1)[row] if on]


def prompts(dataset, tok):
    return {tok.decode(row["input_ids"]) for row in dataset}


def test_bad_rows_are_listed_with_their_number(make):
    rows = [*pairs(3), *["{"] * 12, pair("a", None)]
    with pytest.raises(DataError) as caught:
        make(rows)
    assert caught.value.message.startswith(
        "data.train: 13 of 16 rows are bad, the first 10 of them"
    )
    assert "a.jsonl:4: broken JSON" in caught.value.message
    assert len(caught.value.message.splitlines()) == 11
    report = make(rows, bad_rows="skip").report.train
    assert (report.read, report.bad, report.kept) == (16, 13, 3)
    assert len(report.bad_rows) == 10


def test_a_template_that_refuses_rows_makes_them_bad(make, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}",
    )
    with pytest.raises(DataError, match=r"a.jsonl:1: no system"):
        make(pairs(1), system="Be kind.")


def test_long_rows_are_cut_left_out_or_refused(make, tokenizer):
    rows = [pair("Hi", "yes"), pair("Hi", "yes" * 30), pair("Hi" * 50, "yes")]
    prepared = make(rows, max_length=40)
    report = prepared.report.train
    assert (report.kept, report.too_long, report.truncated, report.answer_cut) == (2, 2, 1, 1)
    assert [row["length"] for row in prepared.train] == [9, 40]
    assert prepared.report.warnings == (
        "data.train: 1 row was cut at max_length 40",
        "data.train: 1 row was left out, because no answer was left within max_length 40",
    )
    cut = make(rows[:2], max_length=40).report.warnings
    assert cut == ("data.train: 1 row was cut at max_length 40",)
    dropped = make(rows, max_length=40, too_long="drop").report.train
    assert (dropped.kept, dropped.too_long, dropped.truncated) == (1, 2, 0)
    with pytest.raises(DataError, match="2 rows are longer than max_length 40") as caught:
        make(rows, max_length=40, too_long="error")
    assert "a.jsonl:2: " in caught.value.message
    with pytest.raises(DataError, match="nothing is left to train on: 1 row read") as caught:
        make([rows[2]], max_length=40)
    assert "1 longer than max_length 40" in caught.value.message


def text_of(row, tokenizer):
    return tokenizer.decode(row["input_ids"], skip_special_tokens=True)


def test_long_plain_text_is_split_and_nothing_is_lost(make, base_tokenizer):
    long = " ".join(f"What is {i}?" for i in range(60))
    prepared = make([{"text": long}, {"text": "It is 12."}], tok=base_tokenizer, max_length=40)
    report = prepared.report.train
    pieces = list(prepared.train)[:-1]
    assert (report.read, report.too_long, report.split, report.truncated) == (2, 1, 1, 0)
    assert (report.kept, report.duplicates) == (len(pieces) + 1, 0)
    assert "".join(text_of(piece, base_tokenizer) for piece in pieces) == long
    assert [piece["length"] for piece in pieces[:-1]] == [40] * (len(pieces) - 1)
    assert all(piece["input_ids"][0] == base_tokenizer.bos_token_id for piece in pieces)
    ends = [base_tokenizer.eos_token_id in piece["input_ids"] for piece in pieces]
    assert ends == [False] * (len(pieces) - 1) + [True]
    assert all(piece["labels"][1:] == piece["input_ids"][1:] for piece in pieces)
    assert f"1 row was split into {len(pieces)} at max_length 40" in report_lines(prepared)


def report_lines(prepared):
    return "\n".join(prepared.report.warnings)


def test_equal_pieces_of_different_texts_are_duplicates(make, base_tokenizer):
    same = "It is 12. " * 20
    rows = [{"text": same + "The end."}, {"text": same + "Another end."}]
    kept = make(rows, tok=base_tokenizer, max_length=30).report.train
    assert kept.duplicates > 0
    left = make(rows, tok=base_tokenizer, max_length=30, duplicates="drop").report.train
    assert left.kept == kept.kept - kept.duplicates


def test_pieces_of_a_text_stay_on_one_side_of_a_split(make, base_tokenizer):
    rows = [{"text": f"What is {i}? " + "question " * 40 + str(i)} for i in range(20)]
    prepared = make(rows, tok=base_tokenizer, max_length=30, eval=0.2)
    for side in (prepared.train, prepared.eval):
        text = "".join(text_of(row, base_tokenizer) for row in side)
        begun, ended = re.findall(r"What is (\d+)", text), re.findall(r"question (\d+)", text)
        assert begun
        assert sorted(begun) == sorted(ended)


def test_splitting_is_for_plain_text(make, tokenizer, base_tokenizer):
    rows = [{"text": "What is the answer? " * 40}]
    cut = make(rows, tok=base_tokenizer, max_length=30, too_long="truncate").report.train
    assert (cut.kept, cut.truncated, cut.split) == (1, 1, 0)
    split = make(rows, tok=base_tokenizer, max_length=30, too_long="split").report.train
    assert split.kept > 3
    with pytest.raises(DataError, match=r"`split` is for plain text, and a.jsonl holds messages"):
        make([chat("Hi", "Hello")], too_long="split")


def test_rows_without_a_trained_answer_are_left_out(make):
    untrained = chat("Hi", "Hello")
    untrained["messages"][1]["weight"] = 0
    report = make([untrained, chat("Hi", "Hello")]).report.train
    assert (report.kept, report.untrained) == (1, 1)
    with pytest.raises(DataError, match="1 without an answer to train on"):
        make([untrained])


def test_held_out_rows_are_the_same_every_time_and_share_no_question(make, tokenizer):
    rows = [pair(f"Question {i % 40}?", f"Answer {i}.") for i in range(200)]
    first = make(rows, eval=0.1)
    assert (len(first.train), len(first.eval)) == (180, 20)
    asked = [
        {text.split("<|end|>")[0] for text in prompts(side, tokenizer)}
        for side in (first.train, first.eval)
    ]
    assert not asked[0] & asked[1]
    again = make([*rows[100:], *rows[:100]], eval=0.1)
    assert prompts(again.eval, tokenizer) == prompts(first.eval, tokenizer)
    other = make(rows, eval=0.1, seed=2)
    assert prompts(other.eval, tokenizer) != prompts(first.eval, tokenizer)
    assert first.report.train.read == 200
    assert first.report.eval.kept == 20


def test_one_question_with_many_answers_is_split_by_answer(make):
    rows = [pair("Write a line.", f"Line {i % 50}.") for i in range(100)]
    prepared = make(rows, eval=0.1)
    assert len(prepared.eval) == 10
    assert "too few different questions" in prepared.report.warnings[0]
    texts = [{tuple(row["input_ids"]) for row in side} for side in (prepared.train, prepared.eval)]
    assert not texts[0] & texts[1]
    with pytest.raises(DataError, match="too few to hold some out"):
        make(pairs(1), eval=0.5)


def test_evaluation_rows_that_are_trained_on_are_dropped_allowed_or_refused(make, tmp_path):
    write(tmp_path, "held.jsonl", pairs(6, start=7))
    options = {"eval": "held.jsonl"}
    prepared = make(pairs(10), **options)
    assert (len(prepared.train), len(prepared.eval), prepared.report.eval.overlap) == (10, 3, 3)
    assert len(make(pairs(10), overlap="allow", **options).eval) == 6
    with pytest.raises(DataError, match="3 of 6 evaluation rows are training rows too"):
        make(pairs(10), overlap="error", **options)
    write(tmp_path, "held.jsonl", pairs(3))
    with pytest.raises(DataError, match="every evaluation row is a training row"):
        make(pairs(10), **options)


def test_repeated_rows_are_counted_and_dropped_on_request(make):
    rows = [*pairs(5), *pairs(5), *pairs(2)]
    assert (len(make(rows).train), make(rows).report.train.duplicates) == (12, 7)
    dropped = make(rows, duplicates="drop")
    assert (len(dropped.train), dropped.report.train.duplicates) == (5, 7)


def test_sources_are_weighed_and_limited(make, tmp_path, tokenizer):
    write(tmp_path, "b.jsonl", pairs(10, start=100))
    sources = [{"path": "a.jsonl", "weight": 2.5}, {"path": "b.jsonl", "weight": 0.3}]
    weighed = make(pairs(10), train=sources)
    assert (weighed.report.train.weighed, weighed.report.train.limited) == (8, 0)  # 25 + 3 of 20
    texts = [tokenizer.decode(row["input_ids"]) for row in weighed.train]
    counts = [texts.count(text) for text in sorted(set(texts))]
    assert (len(texts), sorted(set(counts)), counts.count(3)) == (28, [1, 2, 3], 5)
    assert len(make(train=[{"path": "a.jsonl", "limit": 4}, "b.jsonl"]).train) == 14
    limited = make(train=["a.jsonl", "b.jsonl"], limit=6)
    assert (limited.report.train.weighed, limited.report.train.limited) == (0, 6)  # of 6 each
    texts = [tokenizer.decode(row["input_ids"]) for row in limited.train]
    assert len(texts) == 6
    assert 0 < sum("Answer 10" in text for text in texts) < 6


def test_each_source_has_its_own_form(make, tmp_path, tokenizer):
    (tmp_path / "b.tsv").write_text("sentence\tlabel\nfine\t1\n")
    sources = ["a.jsonl", {"path": "b.tsv", "labels": ["bad", "good"]}]
    prepared = make(pairs(1), train=sources)
    assert trained(prepared, tokenizer, 1) == ["good<|end|>"]
    assert [(file.path, file.format) for file in prepared.report.files] == [
        ("a.jsonl", "prompt_completion"),
        ("b.tsv", "classification"),
    ]
    assert len(prepared.report.files[0].sha256) == 64
    assert prepared.report.files[0].why == "found prompt, completion"
