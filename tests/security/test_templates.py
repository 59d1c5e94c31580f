"""Chat templates of strangers: no escape, and an end in bounded time and memory."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hostile_files import change_json, copied, peftcli, process, recipe, refused

from peftcli.errors import ArtefactError
from peftcli.rendering.template import ChatTemplate, RenderError, TemplateSource
from peftcli.rendering.time_limit import time_limit

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
GROW = (
    "{{% set n = namespace(s={start}) %}}"
    "{{% for i in range(60) %}}{{% set n.s = {step} %}}{{% endfor %}}"
)


def grow(step: str, start: str = "'a' * 1000", end: str = "") -> str:
    """A template that replaces a value by a larger one sixty times."""
    return GROW.format(start=start, step=step) + end


BOMBS = {
    "joined by ~": grow("n.s ~ n.s"),
    "added": grow("n.s + n.s"),
    "filter join": grow("[n.s, n.s] | join"),
    "method join": grow("''.join([n.s, n.s])"),
    "filter replace": grow("n.s | replace('a', 'aa')"),
    "method replace": grow("n.s.replace('a', 'aa')"),
    "replace at once": "{{ ('a' * 30000).replace('a', 'b' * 30000) }}",
    "percent": grow("'%s%s' % (n.s, n.s)"),
    "filter format": grow("'%s%s' | format(n.s, n.s)"),
    "method format": grow("'{0}{0}'.format(n.s)"),
    "method translate": grow("n.s.translate({97: 'aa'})"),
    "expanded tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "tabs by keyword": "{{ ('\t' * 1000000).expandtabs(tabsize=10000000) }}",
    "indented lines": "{{ ('a\n' * 100000) | indent(9999) }}",
    "width inside a width": "{{ '{:>{w}}'.format('a', w='1000000000') }}",
    "width by star": "{{ '%*d' % (1000000000, 1) }}",
    "centred": "{{ 'a' | center(width=1000000000) }}",
    "indented JSON": "{{ messages | tojson(indent=1000000000) }}",
    "separators of JSON": "{{ messages | tojson(separators=('a' * 1000000, 'b')) }}",
    "lists in lists": grow("[n.s, n.s]", "[0]", "{{ n.s }}"),
    "lists in lists as JSON": grow("[n.s, n.s]", "[0]", "{{ n.s | tojson }}"),
    "lists in lists as a string": grow("[n.s, n.s]", "[0]", "{{ n.s | string | length }}"),
    "lists in lists joined": grow("[n.s, n.s]", "[0]", "{{ 'a' ~ n.s }}"),
    "namespaces in namespaces": grow("namespace(a=n.s, b=n.s)", "[0]", "{{ n.s }}"),
    "lists added": grow("n.s + n.s", "[0]"),
    "lists summed": grow("[n.s, n.s] | sum(start=[])", "[0]"),
    "numbers squared": grow("n.s * n.s", "9"),
    "powers": "{{ 2 ** 100000000 }}",
    "a range": "{% for i in range(1000000000000) %}{% endfor %}",
    "ranges": "{% for i in range(5000) %}{% for j in range(5000) %}{% endfor %}{% endfor %}",
    "repeated text": "{{ 'a' * 1000000000 }}",
    "repeated lists": "{{ [0] * 1000000000 }}",
    "searched backwards": "{% set s = 'a' * 1000000 %}{{ (s ~ s ~ s).rfind('b' ~ s) }}",
    "macros that write": (
        "{% macro m(n) %}aaaaaaaaaaaaaaaa{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
        "{% endmacro %}{% set x = m(60) %}"
    ),
    "macros that do nothing": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loops over long lists": (
        "{% set a = [0] * 1000000 %}"
        "{% for i in a %}{% for j in a %}{% for k in a %}{% endfor %}{% endfor %}{% endfor %}"
    ),
    "many long lists": "{% set s = 'aab' * 300000 %}"
    + "".join(f"{{% set x{i} = s.split('b') %}}" for i in range(3000)),
    "many long slices": "{% set s = 'aab' * 300000 %}"
    + "".join(f"{{% set x{i} = s[1:] %}}" for i in range(3000)),
    "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep conditions": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "a template of two megabytes": "a" * (2 << 20),
}


def rendered(text: str) -> str:
    """What a template writes; raises as a run would."""
    with time_limit(3):
        return ChatTemplate(TemplateSource(text, "hostile.jinja", {})).render(MESSAGES)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_one_error(name: str) -> None:
    started = time.process_time()
    with pytest.raises((ArtefactError, RenderError)) as caught:
        rendered(BOMBS[name])
    assert time.process_time() - started < 8
    assert len(str(caught.value)) < 500


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ lipsum.__globals__['os'].popen('touch ran').read() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch ran') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | sort(attribute='__class__.__mro__') }}",
    "{{ '' | attr('__class__') }}",
    "{{ joined.__self__ }}{{ range.__self__.budget }}",
    "{{ range.__func__.__globals__ }}",
    "{{ raise_exception.__globals__ }}{{ dict.__globals__ }}{{ namespace.__init__.__globals__ }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
)


@pytest.mark.parametrize("text", ESCAPES)
def test_escapes_reach_nothing(text: str) -> None:
    before = [dict(message) for message in MESSAGES]
    try:
        found = rendered(text)
    except (ArtefactError, RenderError) as error:
        found = str(error)
    assert not re.search(r"<class|<function|<bound|<module|subclasses|root:", found)
    assert before == MESSAGES


def hostile_model(base: Path, target: Path, template: str) -> Path:
    """A model whose tokenizer brings this template."""
    folder = copied(base, target)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_json(folder / "tokenizer_config.json", chat_template=template)
    return folder


def test_a_tokenizer_that_never_ends_is_stopped_in_time_and_memory(
    base_model: Path, chats: Path, tmp_path: Path
) -> None:
    model = hostile_model(base_model, tmp_path / "slow", BOMBS["macros that do nothing"])
    started = time.monotonic()
    answer = process("train", recipe(tmp_path, model, chats), measured=True)
    refused(answer, 4, "the chat template (the tokenizer's own) was stopped", "10 seconds")
    assert time.monotonic() - started < 120
    assert int(answer.error.split()[-1]) < 1500


@pytest.mark.parametrize("name", ["joined by ~", "lists in lists as JSON", "repeated text"])
def test_bombs_of_a_tokenizer_and_of_a_recipe_are_refused(
    base_model: Path, chats: Path, tmp_path: Path, name: str
) -> None:
    model = hostile_model(base_model, tmp_path / "bomb", BOMBS[name])
    answer = peftcli("train", recipe(tmp_path, model, chats), "--dry-run")
    refused(answer, 4, "the chat template (the tokenizer's own) was stopped")
    (tmp_path / "bomb.jinja").write_text(BOMBS[name])
    setting = f"data.chat_template={tmp_path / 'bomb.jinja'}"
    answer = peftcli("train", recipe(tmp_path, base_model, chats), "--dry-run", "--set", setting)
    refused(answer, 4, "bomb.jinja", "data.chat_template")


def test_a_template_that_bites_one_row_only_is_stopped_too(
    base_model: Path, tmp_path: Path, chats: Path
) -> None:
    template = (
        "{% for m in messages %}{% if 'w7 ' in m.content %}" + BOMBS["joined by ~"] + "{% endif %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = hostile_model(base_model, tmp_path / "late", template)
    answer = peftcli("train", recipe(tmp_path, model, chats), "--dry-run")
    refused(answer, 4, "was stopped: it makes too much text")


def test_long_honest_rows_are_within_the_bounds() -> None:
    long = [{"role": "user", "content": "word " * 700_000}, {"role": "assistant", "content": "a"}]
    text = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{% endfor %}"
    template = ChatTemplate(TemplateSource(text, "t", {}))
    assert len(template.render(long)) > 3_000_000
