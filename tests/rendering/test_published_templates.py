"""Templates as models ship them, against the tags that TRL put into copies of them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from peftcli.rendering.probe import probe
from peftcli.rendering.renderer import Renderer
from peftcli.rendering.template import ChatTemplate, TemplateSource

MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.\n\nYou."},
    {"role": "user", "content": "Hi </s>"},
    {"role": "assistant", "content": "Again 100 %."},
]
TRL = Path(find_spec("trl").origin).parent / "chat_templates"
PAIRS = [
    *("cohere", "cohere2", "deepseekv3", "gemma", "gemma3", "gptoss", "lfm2", "llama3"),
    *("muse_glimmer", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"),
]
TOKENS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    *("<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>", "<｜tool▁outputs▁end｜>"),  # noqa: RUF001
    *("<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|message|>", "<|channel|>", "<|eot|>"),
]


def rendered(path):
    source = TemplateSource(path.read_text(), path.name, {"bos_token": "<s>", "eos_token": "</s>"})
    return Renderer(source, probe(ChatTemplate(source), TOKENS), TOKENS, "answers")(MESSAGES)


@pytest.mark.parametrize("name", PAIRS)
def test_places_agree_with_the_tags_that_trl_put_into_published_templates(name):
    published, tagged = TRL / f"{name}.jinja", TRL / f"{name}_training.jinja"
    if not (published.exists() and tagged.exists()):
        pytest.skip("this version of TRL does not ship the template")
    ours = rendered(published)
    theirs = rendered(tagged)
    assert ours.text == theirs.text
    for (start, end), (tag_start, tag_end) in zip(ours.spans, theirs.spans, strict=True):
        assert end == tag_end
        # TRL also trains what some prompts already hold: a line end, or the word "assistant".
        header = ours.text[tag_start:start]
        assert header in ("", "\n", "<｜Assistant｜>", "<|start|>assistant")  # noqa: RUF001
