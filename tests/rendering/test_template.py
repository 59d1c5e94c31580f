"""Templates in their sandbox: the same text as transformers makes, and nothing but text."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from peftcli.errors import ArtefactError
from peftcli.rendering.template import ChatTemplate, RenderError, TemplateSource
from peftcli.rendering.time_limit import time_limit

TRL = Path(find_spec("trl").origin).parent / "chat_templates"
MESSAGES = [
    {"role": "user", "content": "Say <b>'hi'</b> & bye 好"},
    {"role": "assistant", "content": " <think>\nhm\n</think>\n\nHi. "},
    {"role": "user", "content": "Call it"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "f", "arguments": {"é": 1}},
            }
        ],
    },
    {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer(base_model):
    return PreTrainedTokenizerFast.from_pretrained(base_model)


@pytest.mark.parametrize("path", sorted(TRL.glob("*.jinja")), ids=lambda path: path.stem)
@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(path, count, prompt, tokenizer):
    text = path.read_text()
    if "strftime_now" in text:
        pytest.skip("dates are fixed here and run on there")
    tools = TOOLS if count == 6 else None
    try:
        expected = tokenizer.apply_chat_template(
            MESSAGES[:count],
            tools=tools,
            chat_template=text,
            add_generation_prompt=prompt,
            tokenize=False,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        expected = error
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    template = ChatTemplate(TemplateSource(text, path.name, special))
    if isinstance(expected, Exception):
        with pytest.raises(RenderError):
            template.render(MESSAGES[:count], tools, prompt=prompt)
        return
    found = template.render(MESSAGES[:count], tools, prompt=prompt)
    assert found.replace("\ufdd0", "").replace("\ufdd1", "") == expected


@pytest.mark.parametrize(
    "payload",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('x') }}",
        "{{ lipsum.__globals__['os'].popen('x').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages.clear() }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 10 ** 1000000 }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_cannot_reach_out_or_run_away(payload):
    template = ChatTemplate(TemplateSource(payload, "hostile", {}))
    with pytest.raises((ArtefactError, RenderError)):
        template.render(MESSAGES)


def test_formats_show_no_attributes():
    text = "{{ '{0.__class__}'.format(messages) }}{{ '%s %d' % ('a', 7) }}{{ 'x' | center(3) }}"
    assert ChatTemplate(TemplateSource(text, "t", {})).render(MESSAGES) == "a 7 x "


def test_a_template_that_loops_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr("peftcli.rendering.time_limit.CPU_SECONDS", 0.2)
    slow = (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    )
    template = ChatTemplate(TemplateSource(slow, "slow", {}))
    with time_limit(), pytest.raises(ArtefactError, match="ran for more than"):
        template.render(MESSAGES)


def test_long_texts_are_stopped(monkeypatch):
    monkeypatch.setattr("peftcli.rendering.template.MAX_TEXT", 1000)
    template = ChatTemplate(
        TemplateSource("{% for i in range(99) %}{{ 'abc' * 9 }}{% endfor %}", "t", {})
    )
    with pytest.raises(ArtefactError, match="million characters"):
        template.render(MESSAGES)


def test_dates_are_fixed_and_json_is_readable():
    text = "{{ strftime_now('%d %b %Y') }} {{ messages[0] | tojson }}"
    template = ChatTemplate(TemplateSource(text, "t", {}))
    row = json.dumps(MESSAGES[0], ensure_ascii=False)
    assert template.render(MESSAGES) == f"26 Jul 2024 {row}"
