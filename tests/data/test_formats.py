"""Rows of every format, as found in the wild, and the complaints about bad ones."""

import json

import pytest

from peftcli.data.detect import detect
from peftcli.data.formats import label_names, reader
from peftcli.data.messages import RowError


def canonical(row, columns=None, labels=None, name="auto"):
    found = detect(row, name, columns or {})
    return reader(found.name, found.columns, label_names(labels))(row)


def problem(row, **form):
    with pytest.raises(RowError) as caught:
        canonical(row, **form)
    return str(caught.value)


USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
CALL = {"name": "weather", "arguments": {"city": "Bern"}}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"messages": [USER, REPLY]}, "messages", {"messages": [USER, REPLY]}),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            "sharegpt",
            {"messages": [USER, REPLY]},
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "alpaca",
            {"prompt": "Add\n\n1 2", "completion": "3"},
        ),
        (
            {"instruction": "Add", "input": "<noinput>", "output": "3"},
            "alpaca",
            {"prompt": "Add", "completion": "3"},
        ),
        (
            {"instruction": "Add", "output": "3"},
            "alpaca",
            {"prompt": "Add", "completion": "3"},
        ),
        (
            {"prompt": "Say  ", "completion": "  yes"},
            "prompt_completion",
            {"prompt": "Say  ", "completion": "  yes"},
        ),
        (
            {"question": "1+1?", "answer": "2"},
            "question_answer",
            {"prompt": "1+1?", "completion": "2"},
        ),
        (
            {"text": "good film", "label": "positive"},
            "classification",
            {"prompt": "good film", "completion": "positive"},
        ),
        (
            {"sentence": "good film", "category": "positive"},
            "classification",
            {"prompt": "good film", "completion": "positive"},
        ),
        (
            {"text": "Once upon a time", "url": "http://x", "timestamp": "2019"},
            "text",
            {"text": "Once upon a time"},
        ),
    ],
)
def test_known_formats_are_detected_and_read(row, name, expected):
    found = detect(row)
    assert found.name == name
    assert found.why.startswith("found ")
    assert reader(found.name, found.columns, {})(row) == expected


def test_tool_calls_are_read_whatever_their_spelling():
    expected = [{"type": "function", "function": CALL}]
    twice = {"name": "weather", "arguments": json.dumps(json.dumps(CALL["arguments"]))}
    for message in (
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": twice}]},
        {"role": "assistant", "content": None, "function_call": twice},
    ):
        [_, call] = canonical({"messages": [USER, message]})["messages"]
        assert call == {"role": "assistant", "content": "", "tool_calls": expected}
    glaive = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Hello"},
        ],
        "tools": json.dumps([{"name": "weather", "parameters": {}}]),
    }
    row = canonical(glaive)
    assert row["messages"][1]["tool_calls"] == expected
    assert [message["role"] for message in row["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert row["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert "tools" not in canonical({**glaive, "tools": "[]"})


def test_call_ids_names_weights_and_thoughts_are_kept():
    answer = {"role": "assistant", "content": "Hello", "weight": 0, "reasoning_content": "hm"}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "weather"}
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": CALL}]}
    messages = canonical({"messages": [USER, call, result, answer]})["messages"]
    assert messages[1]["tool_calls"][0]["id"] == "1"
    assert messages[2] == result
    assert messages[3]["weight"] == 0
    assert messages[3]["reasoning_content"] == messages[3]["thinking"] == "hm"


def test_content_parts_are_joined_and_pictures_refused():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    row = {"messages": [{"role": "user", "content": parts}, REPLY]}
    assert canonical(row)["messages"][0]["content"] == "Hi there"
    parts.append({"type": "image_url", "image_url": {}})
    assert "'image_url'; only text can be trained" in problem(row)


def test_history_and_system_of_alpaca_become_messages():
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}
    contents = [message["content"] for message in canonical(row)["messages"]]
    assert contents == ["s", "a", "b", "c", "d"]


def test_prompts_made_of_messages_train_only_the_completion():
    row = {"prompt": [USER, REPLY, USER], "completion": [REPLY]}
    weights = [message.get("weight", 1) for message in canonical(row)["messages"]]
    assert weights == [1, 0, 1, 1]
    assert canonical({"prompt": [USER], "completion": "Yes"})["messages"][-1]["content"] == "Yes"


@pytest.mark.parametrize("labels", [["bad", "good"], {"0": "bad", "1": "good"}])
@pytest.mark.parametrize("value", [1, "1", "1 "])
def test_numbered_labels_need_names(labels, value):
    row = {"text": "fine", "label": value}
    assert canonical(row, labels=labels) == {"prompt": "fine", "completion": "good"}
    assert "write `labels: [first name, second name]`" in problem(row)
    assert "'7', which `labels` does not name" in problem({**row, "label": 7}, labels=labels)


def test_columns_name_what_cannot_be_known():
    row = {"text": "Write f", "code": "def f(): pass", "task_id": 3, "test_list": []}
    assert "`columns: {prompt: text, completion: code}`" in problem(row)
    assert canonical(row, columns={"prompt": "text", "completion": "code"}) == {
        "prompt": "Write f",
        "completion": "def f(): pass",
    }
    assert canonical(row, name="text") == {"text": "Write f"}
    assert "names kode, not in the file" in problem(
        row, columns={"prompt": "text", "completion": "kode"}
    )
    assert "which no format has together" in problem(
        row, columns={"prompt": "text", "label": "code"}
    )
    assert "but alpaca has instruction, output" in problem(
        row, columns={"text": "x"}, name="alpaca"
    )


def test_unknown_rows_are_answered_with_what_to_write():
    text = problem({"mr": "name[X]", "ref": "X is a pub"})
    assert "columns found: mr, ref" in text
    assert "`columns: {prompt: mr, completion: ref}`" in text
    assert "alpaca: instruction, output" in text
    turns = problem({"id": 1, "turns": [{"speaker": "USER", "utterance": "hi"}]})
    assert "'turns' is a list of maps with speaker, utterance" in turns


def test_preference_data_is_refused_unless_the_chosen_answer_is_named():
    turns = [{"from": "human", "value": "Hi"}]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "Hello"}, "rejected": {}}
    assert "preference data" in problem(row)
    columns = {"conversations": "conversations", "answer": "chosen"}
    assert canonical(row, columns=columns) == {"messages": [USER, REPLY]}
    assert "'label' is false" in problem({"messages": [USER, REPLY], "label": False})
    assert canonical({"messages": [USER, REPLY], "label": True})["messages"] == [USER, REPLY]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "'messages[1]' has the role 'bot'"),
        ({"messages": [USER, {"content": "x"}]}, "'messages[1]' has no role"),
        ({"messages": [{"role": "user", "content": None}, REPLY]}, "(user) has no content"),
        ({"messages": [USER, {"role": "assistant"}]}, "(assistant) has no content"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "without content or tool"),
        ({"messages": [USER, {"role": "user", "content": 3}, REPLY]}, "is a number (3)"),
        ({"messages": [USER, "x"]}, "'messages[1]' is the text 'x'"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "output": None}, "'output' is null, expected text"),
        ({"instruction": "a", "input": 5, "output": "b"}, "'input' is a number (5)"),
        ({"prompt": "a", "completion": 5}, "'completion' is a number (5), expected text"),
        ({"prompt": "a", "completion": "\n"}, "'completion' is empty"),
        ({"question": "a", "answer": ["b"]}, "'answer' is a list, expected text"),
        ({"text": ""}, "'text' is empty"),
        ({"text": "a", "label": None}, "'label' is null"),
    ],
)
def test_bad_rows_name_the_field_and_what_was_found(row, expected):
    assert expected in problem(row)


def test_broken_tool_calls_are_named():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a}"}}]}
    assert "'messages[1].tool_calls[0].arguments' is not JSON" in problem(
        {"messages": [USER, call]}
    )
    call["tool_calls"] = [{"function": {"arguments": "{}"}}]
    assert "expected a tool call with name and arguments" in problem({"messages": [USER, call]})
    row = {"messages": [USER, REPLY], "tools": "[{"}
    assert "'tools' is not JSON" in problem(row)


def test_a_row_that_lacks_a_mapped_column_says_so():
    read = reader("prompt_completion", {"prompt": "q", "completion": "a"}, {})
    with pytest.raises(RowError, match="'a' is missing"):
        read({"q": "x"})


@pytest.mark.parametrize(
    ("name", "field"), [("messages", "messages"), ("sharegpt", "conversations")]
)
def test_a_missing_field_is_not_called_null(name, field):
    with pytest.raises(RowError, match=f"'{field}' is missing"):
        reader(name, {}, {})({"other": 1})
