"""Talk to a run in the terminal, with the template and the stop tokens of its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from peftcli.architecture.config import architecture_from
from peftcli.errors import UsageError
from peftcli.evaluate.arms import Loaded, groups_of, load, switched
from peftcli.evaluate.generate import plain_decoding
from peftcli.evaluate.options import EvalOptions
from peftcli.evaluate.preparing import generation_stops
from peftcli.evaluate.run import device_of, quiet_libraries
from peftcli.evaluate.target import Target, find_target
from peftcli.models import go_offline, load_config, load_tokenizer
from peftcli.recipe.schema import Model
from peftcli.rendering.choose import choose_template, learn_turns
from peftcli.rendering.template import ChatTemplate

HELP = "/base and /adapter switch, /clear forgets the conversation, /quit ends"
Read = Callable[[], str | None]
"""The next line of the user; None at the end of the input."""
Write = Callable[[str], None]


@dataclass(frozen=True)
class ChatOptions:
    """How to talk; greedy unless a temperature is given."""

    base: bool = False
    """Start with the adapter off."""
    system: str | None = None
    """The system message; that of the recipe when absent."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    base_model: str | None = None
    device: str = "auto"
    offline: bool = False


class Chat:
    """A conversation with one arm or the other."""

    def __init__(
        self,
        loaded: Loaded,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        stops: tuple[int, ...],
        positions: int | None,
        options: ChatOptions,
        arms: tuple[str, ...],
    ) -> None:
        self.loaded = loaded
        self.tokenizer = tokenizer
        self.template = template
        self.stops = stops
        self.positions = positions
        self.options = options
        self.arms = arms
        self.arm = arms[0] if options.base or len(arms) == 1 else arms[-1]
        self.messages: list[dict[str, str]] = []

    def say(self, text: str, write: Write) -> str:
        """Ask, stream the answer to `write`, and keep both as history."""
        self.messages.append({"role": "user", "content": text})
        ids = self._prompt()
        config = GenerationConfig(
            do_sample=self.options.temperature > 0,
            temperature=self.options.temperature or None,
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=list(self.stops),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        model = self.loaded.model
        own = plain_decoding(model)
        try:
            with switched(model, self.arm), torch.inference_mode():
                given = torch.tensor([ids], device=model.device)
                written = model.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    generation_config=config,
                    streamer=_Pieces(self.tokenizer, write),
                )
        finally:
            model.generation_config = own
        answer = str(self.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer.strip()})
        return answer.strip()

    def _prompt(self) -> list[int]:
        """The conversation as in training; its oldest turns are left out when it is too long."""
        while True:
            system = [{"role": "system", "content": self.options.system}]
            messages = [*(system if self.options.system else ()), *self.messages]
            text = self.template.render(messages, prompt=True)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            room = (self.positions or 10**9) - self.options.max_new_tokens
            if len(ids) <= max(room, (self.positions or 10**9) // 2):
                return ids
            if len(self.messages) < 3:
                self.messages.clear()
                raise UsageError(
                    f"the message has {len(ids)} tokens, the model takes {self.positions}",
                    "write a shorter one",
                )
            del self.messages[:2]


def open_chat(source: Path, options: ChatOptions) -> Chat:
    """Load what `source` names; raises UsageError for what is no model, run or adapter."""
    target = find_target(source, base=options.base_model)
    if target.kind == "recipe":
        raise UsageError(f"{source}: is not trained yet", "train it, or name a model")
    quiet_libraries()
    if options.offline:
        go_offline()
    device = device_of(target, EvalOptions(device=options.device))
    groups = groups_of(target, device)
    group = next((group for group in groups if group.arms[0].name == "tuned"), groups[0])
    if options.base and group.adapter is None:
        group = groups[0]
    tokenizer = load_tokenizer(_tokenizer_model(target))
    wanted = target.loaded.recipe.data.chat_template if target.loaded else None
    source_of = choose_template(tokenizer, None if tokenizer.chat_template else wanted, Path.cwd())
    _, ends = learn_turns(tokenizer, source_of)
    torch.manual_seed(options.seed)
    if options.system is None and target.loaded is not None:
        options = replace(options, system=target.loaded.recipe.data.system)
    architecture = architecture_from(load_config(target.base).to_dict(), target.base.name)
    return Chat(
        load(group, device),
        tokenizer,
        ChatTemplate(source_of),
        generation_stops(target, tokenizer, ends),
        architecture.max_positions,
        options,
        tuple(arm.name for arm in group.arms),
    )


def talk(chat: Chat, read: Read, write: Write) -> None:
    """Answer line after line until /quit or the end of the input."""
    write(f"{chat.arm}: {HELP}\n")
    while (line := read()) is not None:
        command = line.strip()
        if command == "/quit":
            return
        if command.startswith("/"):
            write(_command(chat, command))
        elif command:
            try:
                chat.say(line, write)
            except KeyboardInterrupt:
                del chat.messages[-1:]
            except UsageError as error:
                write(f"{error.message}: {error.hint}")
            write("\n")


def _command(chat: Chat, command: str) -> str:
    name = command.removeprefix("/")
    if name == "clear":
        chat.messages.clear()
        return "the conversation starts anew\n"
    if name in chat.arms:
        chat.arm = name
        return f"now {name}\n"
    if name in ("base", "adapter"):
        return f"there is no {name} here, only {', '.join(chat.arms)}\n"
    return f"{HELP}\n"


def _tokenizer_model(target: Target) -> Model:
    """The tokenizer saved with the result, which holds the template of the training."""
    for folder in (target.adapter, target.tuned):
        if folder is not None and (folder / "tokenizer.json").is_file():
            return Model(name=str(folder))
    return target.base


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands text on as soon as it cannot change any more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of the answer."""
        if text:
            self.write(text)
