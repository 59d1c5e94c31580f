"""Cases for the targets: good files, files that are nearly good, and noise."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

RECIPE = {
    "model": {"name": "bundled:tiny", "dtype": "auto", "revision": None},
    "method": {"name": "lora", "rank": 8, "target_modules": "all-linear", "dropout": 0.1},
    "data": {"train": [{"path": "rows.jsonl", "weight": 2}], "eval": "5%", "max_length": 64},
    "training": {"learning_rate": 1e-4, "epochs": 3, "batch_size": 8, "warmup": "3%"},
    "evaluation": {"steps": 2, "gates": {"fail_under": {"exact_match": "80%"}}},
    "output": "run",
    "seed": 1,
}
ROWS = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n',
    b'[{"text": "a"}, {"text": "b"}]',
    b'{"data": [{"question": "a", "answer": "b"}]}',
    b'prompt,completion\na,"b\nc"\n',
    b"prompt\tcompletion\na\tb\n",
    b"one line\n\nanother\n",
)
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "x/y",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {},
    "auto_mapping": None,
    "megatron_core": "megatron.core",
    "init_lora_weights": True,
    "layers_pattern": None,
}
ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
        *("", " ", "a" * 300, "\0", "\ud83d\ude42", "../x", "/etc/passwd", "~", "$HOME", "5%"),
        *("%", "-5%", "1e400%", "nan", "(a+)+$", "(", "[", "lora", "bundled:tiny", "bundled:../x"),
        *([], {}, [[]], [{}], {"": ""}, {"name": []}, [None], [1, "a"]),
    ]
)
NESTED = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
VALUES = NESTED.map(copy.deepcopy)  # the odd lists and maps are shared, and cases change them


@st.composite
def changed(draw: st.DrawFn, good: dict[str, Any]) -> Any:
    """A good document with some of its values replaced, removed, renamed or added."""
    document = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 4))):
        place = document
        while True:
            if isinstance(place, dict) and place:
                key: Any = draw(st.sampled_from(sorted(place)))
            elif isinstance(place, list) and place:
                key = draw(st.integers(0, len(place) - 1))
            else:
                break
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            change = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
            if change == "replace" or isinstance(place, list):
                place[key] = draw(VALUES)
            elif change == "remove":
                del place[key]
            elif change == "rename":
                place[draw(st.text(max_size=12))] = place.pop(key)
            else:
                place[draw(st.text(max_size=12))] = draw(VALUES)
            break
    return document


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some replaced, put in, repeated or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.binary(max_size=4) | st.sampled_from([b"[" * 2000, b"\0", b"\xff\xfe"]))
        data[at : at + draw(st.integers(0, 3))] = piece
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def _yaml(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode()


def _lines(document: Any) -> bytes:
    if not isinstance(document, dict):
        return _yaml(document)
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    return "\n".join(parts).encode()


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    """A file of tensors whose header is changed after it was made to fit."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=6), unique=True, max_size=4)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = 1
        for side in shape:
            count *= side
        kind, width = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8)]))
        offsets = [position, position + count * width]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        position += count * width
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    size = position
    text = json.dumps(draw(changed(header) | st.just(header))).encode()
    text = draw(damaged(text) | st.just(text))
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1) | st.integers(0, len(text) + 9))
    return struct.pack("<Q", length) + text + b"\0" * draw(st.just(size) | st.integers(0, 64))


def _any_rows() -> st.SearchStrategy[bytes]:
    mended = st.sampled_from(ROWS).flatmap(damaged)
    objects = st.lists(VALUES, max_size=4).map(
        lambda items: b"\n".join(json.dumps(item).encode() for item in items)
    )
    parsed = changed({"messages": json.loads(ROWS[0])["messages"], "tools": []}).map(
        lambda row: json.dumps(row).encode()
    )
    content = mended | objects | parsed | st.binary(max_size=200)
    return st.tuples(st.integers(0, 5), content).map(lambda pair: bytes([pair[0]]) + pair[1])


CASES: dict[str, st.SearchStrategy[bytes]] = {
    "recipes": changed(RECIPE).map(_yaml)
    | changed(RECIPE).map(_lines)
    | changed(RECIPE).map(_lines).flatmap(damaged)
    | st.binary(max_size=200)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    "rows": _any_rows(),
    "headers": tensors() | tensors().flatmap(damaged) | st.binary(max_size=100),
    "adapters": changed(ADAPTER).map(_yaml)
    | changed(ADAPTER).map(_yaml).flatmap(damaged)
    | VALUES.map(_yaml)
    | st.binary(max_size=100),
}

HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
GOOD: dict[str, list[bytes]] = {
    "recipes": [_yaml(RECIPE), _lines(RECIPE)],
    "rows": [bytes([kind]) + content for kind in range(6) for content in ROWS],
    "headers": [struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 8],
    "adapters": [_yaml(ADAPTER)],
}
