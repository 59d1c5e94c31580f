"""From rows to token ids: what carries loss, for chat models, base models and plain text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftcli.dataset import prepare, samples
from peftcli.errors import ArtefactError, DataError
from peftcli.recipe.schema import Data

MASKED = -100
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn"]), min_size=1, max_size=20
).filter(str.strip)


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


def test_answers_and_their_end_are_trained(make, tokenizer):
    prepared = make([chat("Hi", "Hello 🙂", "Bye", "Ciao")])
    assert samples(prepared, tokenizer, 9) == [
        [
            ("<|user|>Hi<|end|><|assistant|>", False),
            ("Hello 🙂<|end|>", True),
            ("<|user|>Bye<|end|><|assistant|>", False),
            ("Ciao<|end|>", True),
        ]
    ]
    [row] = prepared.train
    assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    on = [(i, label) for i, label in enumerate(row["labels"]) if label != MASKED]
    assert all(row["input_ids"][i] == label for i, label in on)
    assert prepared.train.features["input_ids"].feature.dtype == "int32"
    assert prepared.train.features["labels"].feature.dtype == "int32"
    assert prepared.report.end_of_turn == (tokenizer.convert_tokens_to_ids("<|end|>"),)
    assert prepared.report.template == "the tokenizer's own"


def test_tokens_are_those_of_the_prompt_at_inference(make, tokenizer):
    messages = chat("Hi", "Hello.", "Bye", "Ciao")["messages"]
    [row] = make([{"messages": messages}]).train
    expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert row["input_ids"] == expected


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.booleans())
def test_whatever_is_said_the_answers_are_trained_whole(
    make, tokenizer, base_tokenizer, said, base
):
    tok = base_tokenizer if base else tokenizer
    end = "</s>" if base else "<|end|>"
    prepared = make([chat(*(text for turn in said for text in turn))], tok=tok)
    assert trained(prepared, tok) == [answer + end for _, answer in said]


def test_a_base_model_gets_the_plain_template(make, base_tokenizer):
    prepared = make([pair("What is it?", "It is 12.")], tok=base_tokenizer)
    assert samples(prepared, base_tokenizer, 1) == [
        [("<s>What is it?\n", False), ("It is 12.</s>", True)]
    ]
    assert prepared.report.template == "plain, because the tokenizer has none"
    assert base_tokenizer.chat_template
    question = [{"role": "user", "content": "What is it?"}]
    ids = base_tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prepared.train[0]["input_ids"][: len(ids)] == ids


def test_a_padding_token_that_ends_texts_is_trained_all_the_same(make, base_tokenizer):
    [row] = make([pair("a", "b")], tok=base_tokenizer).train
    assert base_tokenizer.pad_token_id == base_tokenizer.eos_token_id == row["labels"][-1]


@pytest.mark.parametrize("text", ["It is", "<s>It is", "It is</s>", "<s>It is</s>"])
def test_texts_begin_and_end_once(make, base_tokenizer, text):
    prepared = make([{"text": text}], tok=base_tokenizer)
    assert samples(prepared, base_tokenizer, 1) == [[("<s>", False), ("It is</s>", True)]]
    assert prepared.report.end_of_turn == (base_tokenizer.eos_token_id,)


def test_a_token_on_the_border_of_an_answer_is_trained(make, base_tokenizer):
    base_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prepared = make([pair("What", "is the answer")], tok=base_tokenizer)
    assert trained(prepared, base_tokenizer) == [" is the answer</s>"]


def test_system_messages_are_added_where_none_is(make, tokenizer):
    own = {"messages": [{"role": "system", "content": "Mine."}, *chat("Hi", "Hello")["messages"]]}
    prepared = make([chat("Hi", "Hello"), own], system="Be kind.")
    texts = [tokenizer.decode(row["input_ids"]) for row in prepared.train]
    assert texts[0].startswith("<|system|>Be kind.<|end|>")
    assert texts[1].startswith("<|system|>Mine.<|end|>")


def test_the_last_answer_or_everything_can_be_trained(make, tokenizer):
    row = chat("Hi", "Hello", "Bye", "Ciao")
    assert trained(make([row], train_on="last"), tokenizer) == ["Ciao<|end|>"]
    [whole] = trained(make([row], train_on="all"), tokenizer)
    assert whole.startswith("<|user|>Hi")


def test_control_tokens_in_messages_and_unknown_tokens_are_told(make):
    prepared = make([pair("What is <|end|>?", "A token."), *pairs(3)])
    assert "1 row holds control tokens" in prepared.report.warnings[0]


def test_tokens_that_the_tokenizer_does_not_know_are_told(make):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "yes": 2, "is": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    prepared = make([{"text": "yes is no"}], tok=tok)
    assert "25.0% of the tokens are unknown" in prepared.report.warnings[0]
    assert prepared.report.largest_id == 3


def test_tokenizers_that_cannot_be_used_are_refused(make, tokenizer, base_tokenizer):
    base_tokenizer.eos_token = None
    with pytest.raises(ArtefactError, match="no end-of-text token"):
        make(pairs(1), tok=base_tokenizer)
    with pytest.raises(ArtefactError, match="would never learn to stop"):
        make(pairs(1), tok=tokenizer, chat_template="chatml")
    with pytest.raises(DataError, match=r"no\.jinja cannot be read"):
        make(pairs(1), tok=tokenizer, chat_template="no.jinja")


def test_a_template_can_be_named_or_come_from_a_file(make, tmp_path, tokenizer):
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>!{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prepared = make([pair("a", "b")], chat_template="mine.jinja")
    assert (
        tokenizer.decode(prepared.train[0]["input_ids"])
        == "<|user|>a<|end|>!<|assistant|>b<|end|>!"
    )
    assert trained(prepared, tokenizer) == ["b<|end|>"]
    prepared = make([pair("a", "b")], chat_template="plain")
    assert samples(prepared, tokenizer, 1) == [[("a\n", False), ("b</s>", True)]]
    assert tokenizer.chat_template.startswith("{#- For base models")


def test_real_questions_on_a_real_tokenizer(tmp_path, shared):
    tok = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    data = Data(train="gsm8k/train.jsonl", limit=300, eval=0.1)
    prepared = prepare(data, tok, base_dir=shared / "data", cache_dir=tmp_path, seed=0, workers=1)
    assert len(prepared.train) + len(prepared.eval) == 300
    pieces = samples(prepared, tok, 1)[0]
    assert [on for _, on in pieces] == [False, True]
    assert pieces[0][0].startswith("<s> Natalia sold clips")
    assert pieces[1][0].endswith("#### 72</s>")
