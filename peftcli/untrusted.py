"""Files that may come from a stranger: read in bounded memory, refused with one message."""

from __future__ import annotations

import json
import math
import re
import signal
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from peftcli.errors import ArtefactError

MAX_JSON_BYTES = 64 << 20
MAX_SIZE = 65_536
PATTERN_SECONDS = 5.0
AGAIN = "fetch the file again from where it came from"
# Numbers in adapter_config.json that become sides of new tensors.
SIZES = (
    *("r", "rank_pattern", "bottleneck_size", "num_virtual_tokens", "encoder_hidden_size"),
    *("encoder_num_layers", "num_layers", "num_transformer_submodules", "token_dim"),
)
SCALES = ("lora_alpha", "alpha_pattern")


def read_json(file: Path, hint: str = AGAIN) -> Any:
    """The content of a JSON file; ArtefactError when it is damaged, too large or nested too far."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would be read without an end
            raise ArtefactError(f"{file}: damaged: no regular file", hint)
        if found.st_size > MAX_JSON_BYTES:
            raise ArtefactError(f"{file}: {found.st_size:,} bytes, too large for such a file", hint)
        return json.loads(file.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{file}: cannot be read: {error.strerror}", hint) from None
    except RecursionError:
        raise ArtefactError(f"{file}: damaged: nested too deeply", hint) from None
    except ValueError as error:
        raise ArtefactError(f"{file}: damaged: not JSON: {str(error)[:80]}", hint) from None


def read_object(file: Path, hint: str = AGAIN) -> dict[str, Any]:
    """The same, where the file holds a JSON object."""
    values = read_json(file, hint)
    if not isinstance(values, dict):
        raise ArtefactError(f"{file}: damaged: holds no JSON object", hint)
    return values


def custom_code(folder: Path) -> list[str]:
    """The Python classes that a model folder asks its loader to import, as `FILE: CLASSES`."""
    found: dict[str, list[str]] = {}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        values = read_json(file) if file.is_file() else None
        mapping = values.get("auto_map") if isinstance(values, dict) else None
        for reference in _texts(mapping):
            repository, _, place = reference.rpartition("--")
            module, _, own = place.rpartition(".")
            where = f"{module}.py" + (f" of {repository}" if repository else "")
            found.setdefault(where, []).append(own)
    return [f"{file}: {', '.join(dict.fromkeys(names))}" for file, names in found.items()]


def foreign_kernel(config: Mapping[Any, Any]) -> str | None:
    """The repository of native code that a configuration names as its attention, if it does."""
    for key, value in config.items():
        named = _texts(value) if "_implementation" in str(key) else ()
        for text in named:
            if "/" in text:
                return text
    return None


def check_adapter_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json that names Python modules, or numbers no adapter has."""
    _check_modules(name, config)
    for key in (*SIZES, *SCALES):
        value = config.get(key)
        parts = value if isinstance(value, dict) else {"": value}
        for part, inner in parts.items():
            if inner is not None and not _plausible(inner, key in SIZES):
                shown = f"{key}.{part[:60]}" if part else key
                raise ArtefactError(
                    f"{name}: {shown}: {str(inner)[:60]} in adapter_config.json is no value of a "
                    "trained adapter",
                    "restore the file from where the adapter came from",
                )


def check_patterns(name: str, config: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Refuse regular expressions in an adapter_config.json that are broken, or search for ever."""
    for key, pattern in _patterns(config):
        reason = ""
        try:
            with _cpu_seconds(PATTERN_SECONDS):
                compiled = re.compile(pattern)
                for module in modules:
                    compiled.fullmatch(module)
        except re.error as error:
            reason = f"no regular expression: {error}"
        except (_TooSlow, RecursionError, OverflowError):
            reason = "a regular expression that searches for ever"
        if reason:
            raise ArtefactError(
                f"{name}: {key} in adapter_config.json is {reason}",
                "restore the file from where the adapter came from",
            )


class _TooSlow(Exception):
    pass


@contextmanager
def _cpu_seconds(limit: float) -> Iterator[None]:
    """Raise _TooSlow after so much computing; in the main thread only, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What PEFT takes for a regular expression on module names."""
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(config.get(key), str):
            yield key, config[key]
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), dict):
            yield from ((key, rf"(.*\.)?({part})$") for part in config[key])
    for text in _texts(config.get("layers_pattern")):
        yield "layers_pattern", rf".*\.{text}\.(\d+)\."


def _plausible(value: object, is_size: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return 0 < value <= MAX_SIZE if is_size else True


def _check_modules(name: str, config: Mapping[str, Any]) -> None:
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    for key, module, allowed in (
        ("auto_mapping", library, "transformers"),
        ("megatron_core", config.get("megatron_core"), "megatron.core"),
    ):
        text = str(module or allowed)
        if text != allowed and not text.startswith(f"{allowed}."):
            raise ArtefactError(
                f"{name}: {key} names the Python module `{text[:80]}`, which was not imported",
                "do not trust this adapter; without that field it may load",
            )


def _texts(value: object) -> Iterator[str]:
    """Every text in nested lists and maps, two levels deep at most."""
    for item in _items(value):
        for inner in _items(item):
            if isinstance(inner, str):
                yield inner


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]
