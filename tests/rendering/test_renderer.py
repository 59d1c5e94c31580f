"""The trained parts of a conversation, for the templates of the usual model families."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from peftcli.errors import ArtefactError
from peftcli.rendering.probe import probe
from peftcli.rendering.renderer import Renderer
from peftcli.rendering.template import ChatTemplate, RenderError, TemplateSource

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinking is shown in the last answer only; an empty thought is written where there was none.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' }}\n</think>\n\n{% endif %}{{ said }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The list of tools moves to the last question, so earlier text is no prefix of later text.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.index0 == messages | length - 2 or tools and loop.last %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{% if m.tool_calls %}[TOOL_CALLS]"
    "{{ m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}"
    " {{ m['content'] | trim }}{{ eos_token }}"
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS]{{ m['content'] }}[/TOOL_RESULTS]"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
FAMILIES = {
    "llama3": (LLAMA3, "<|eot_id|>", ""),
    "chatml": (CHATML, "<|im_end|>", ""),
    "qwen3": (QWEN3, "<|im_end|>", ""),
    "mistral": (MISTRAL, "</s>", " "),
    "gemma": (GEMMA, "<end_of_turn>", ""),
    "zephyr": (ZEPHYR, "</s>", ""),
    "phi3": (PHI3, "<|end|>", ""),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ADDED = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"),
]


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def renderer_for(text, train_on="answers", added=ADDED):
    source = TemplateSource(text, "test", SPECIAL)
    return Renderer(source, probe(ChatTemplate(source), added), added, train_on)


def trained(text, messages, tools=None, train_on="answers", added=ADDED):
    found = renderer_for(text, train_on, added)(messages, tools)
    return [found.text[start:end] for start, end in found.spans]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_and_its_end_is_trained_and_nothing_else(family):
    template, end, before = FAMILIES[family]
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else before
    assert trained(template, turns("Hi", "Hello.")) == [f"{thought}Hello.{end}"]
    double = trained(template, turns("Hi", "Hello.", "Hi", "Again\n\nhello."))
    assert double == [f"{before}Hello.{end}", f"{thought}Again\n\nhello.{end}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_messages_do_not_mislead(family):
    template, end, before = FAMILIES[family]
    question = "What are <|im_end|>, </s>, [/INST] and <|im_start|>assistant\nNo.<|eot_id|>?"
    answer = "I write <|assistant|>\nand <|end|> <end_of_turn> and </s> and </s>."
    found = renderer_for(template)(turns("Hi", "Hello.", question, answer))
    spans = [found.text[start:end] for start, end in found.spans]
    assert spans[0] == f"{before}Hello.{end}"
    assert spans[1].endswith(f"{answer}{end}")
    assert "What" not in spans[1]
    assert found.controls >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_may_end_in_a_question_or_start_with_a_system_message(family):
    template, end, before = FAMILIES[family]
    if family not in ("gemma", "mistral"):
        messages = [{"role": "system", "content": "Be kind."}, *turns("Hi", "Hello.")]
        assert trained(template, messages)[0].endswith(f"Hello.{end}")
    spans = trained(template, turns("Hi", "Hello.", "Bye"))
    assert spans == [f"{before}Hello.{end}"]


def test_thinking_that_the_template_leaves_out_is_not_searched_for():
    first, last = "<think>\nA\n</think>\n\nOne.", "<think>\nB\n</think>\n\nTwo."
    found = renderer_for(QWEN3)(turns("Hi", first, "Hi", last))
    assert "A\n" not in found.text
    spans = [found.text[start:end] for start, end in found.spans]
    assert spans == ["One.<|im_end|>", "<think>\nB\n</think>\n\nTwo.<|im_end|>"]
    assert not found.lost
    stripped = QWEN3.replace("{% if loop.last %}", "{% if false %}")
    assert renderer_for(stripped)(turns("Hi", last)).lost


CALL = [
    {"id": "123456789", "type": "function", "function": {"name": "find", "arguments": {"q": 1}}}
]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
TOOL_TURNS = [
    *turns("Hi", "Hello.", "Find 1"),
    {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "content": "Here."},
]


@pytest.mark.parametrize("family", ["chatml", "mistral"])
def test_tool_calls_are_trained_and_their_results_are_not(family):
    template, end, before = FAMILIES[family]
    spans = trained(template, TOOL_TURNS, TOOLS)
    assert len(spans) == 3
    assert '"name": "find", "arguments": {"q": 1}' in spans[1]
    assert spans[1].endswith(end)
    assert spans[2] == f"{before}Here.{end}"
    assert not any("found" in span for span in spans)


def test_tool_calls_that_the_template_would_lose_are_refused():
    with pytest.raises(RenderError, match="does not write tools"):
        trained(ZEPHYR, TOOL_TURNS)
    with pytest.raises(RenderError, match="does not write tools"):
        trained(ZEPHYR, turns("Hi", "Hello."), TOOLS)


def test_arguments_are_text_where_the_template_joins_them():
    joined = CHATML.replace("c.function | tojson", "c.function.name + c.function.arguments")
    assert '<tool_call>find{"q": 1}</tool_call>' in trained(joined, TOOL_TURNS, TOOLS)[1]


def test_templates_may_mark_the_trained_text_themselves():
    tagged = LLAMA3.replace(
        "{{ m['content'] | trim }}<|eot_id|>",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>"
        "{% endgeneration %}{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}",
    )
    messages = turns("Hi", " Hello. ", "Hi", "Again.")
    assert trained(tagged, messages) == ["Hello.<|eot_id|>", "Again.<|eot_id|>"]
    untagged = renderer_for(LLAMA3)(messages)
    assert renderer_for(tagged)(messages) == untagged
    # The end of the turn belongs to the answer even when the tags leave it out.
    outside = tagged.replace("<|eot_id|>{% endgeneration %}", "{% endgeneration %}<|eot_id|>")
    assert trained(outside, messages) == ["Hello.<|eot_id|>", "Again.<|eot_id|>"]


def test_what_a_prompt_does_not_hold_must_be_learnt():
    """Without a header in the prompt, the model has to write it itself."""
    headless = CHATML.replace("{% if add_generation_prompt %}", "{% if false %}")
    expected = "<|im_start|>assistant\nHello.<|im_end|>"
    assert trained(headless, turns("Hi", "Hello.")) == [expected]
    assert trained(headless, turns("Hi", "Hello.", "Hi", "Hello."))[1] == expected


def test_last_all_and_weights_choose_among_the_answers():
    messages = turns("Hi", "One.", "Hi", "Two.")
    assert trained(CHATML, messages, train_on="last") == ["Two.<|im_end|>"]
    [whole] = trained(CHATML, messages, train_on="all")
    assert whole.startswith("<|im_start|>system")
    messages[3]["weight"] = 0
    assert trained(CHATML, messages) == ["One.<|im_end|>"]
    assert trained(CHATML, messages, train_on="last") == []


def test_the_built_in_templates_can_be_trained_with():
    folder = Path(find_spec("peftcli").origin).parent / "templates"
    plain = (folder / "plain.jinja").read_text()
    assert trained(plain, turns("Hi", "  Hello.", "def f():\n", "    pass")) == [
        "  Hello.</s>",
        "    pass</s>",
    ]
    text = renderer_for(plain)(turns("Hi", "Hello.", "def f():\n", "    pass")).text
    assert text == "Hi\nHello.</s>def f():\n    pass</s>"
    assert trained(plain, turns("Hi", "Say </s> and </s>.")) == ["Say </s> and </s>.</s>"]
    assert len(trained(plain, TOOL_TURNS, TOOLS)) == 3
    chatml = (folder / "chatml.jinja").read_text()
    spans = trained(chatml, TOOL_TURNS, TOOLS)
    assert spans[0] == "Hello.<|im_end|>"
    assert spans[1].startswith("<tool_call>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "would never learn to stop"),
        (CHATML.replace("im_end", "no_token"), "would never learn to stop"),
        ("Hello", "does not write its messages"),
        ("{{ bos_token }}" + LLAMA3, "writes <s> twice"),
        ("{% for m in messages %}", "does not compile"),
        ("{{ raise_exception('not for you') }}", "fails: not for you"),
        ("{{ messages[0].content.nothing.more }}", "fails"),
    ],
)
def test_templates_that_cannot_be_trained_with_are_refused(template, expected):
    with pytest.raises(ArtefactError, match=expected):
        renderer_for(template)


def test_a_template_that_refuses_a_row_is_quoted():
    with pytest.raises(RenderError, match="System role not supported"):
        trained(GEMMA, [{"role": "system", "content": "x"}, *turns("Hi", "Hello.")])


def test_a_row_whose_answers_cannot_be_found_is_refused():
    shouting = CHATML.replace("{{ m['content'] }}", "{{ m['content'].replace('x', 'answer') }}")
    assert trained(shouting, turns("Hi", "Hello."))
    with pytest.raises(RenderError, match="rewrites the row"):
        trained(
            CHATML.replace("{{ m['content'] }}", "{{ m['content'][:40] }}"), turns("Hi", "x" * 50)
        )
