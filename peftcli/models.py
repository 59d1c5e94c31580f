"""Load what a recipe names: tokenizer, base model (quantised or not), adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftcli.bundled import bundled
from peftcli.errors import ArtefactError, ResourceError, UsageError
from peftcli.privacy import go_offline as go_offline
from peftcli.recipe.schema import Model
from peftcli.untrusted import (
    check_adapter_config,
    check_patterns,
    custom_code,
    foreign_kernel,
    read_object,
)
from peftcli.weightfiles import check_folder

# What a damaged file makes the libraries raise, torch's lack of memory apart.
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError),
    *(RuntimeError, ArithmeticError, MemoryError, SafetensorError),
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Device:
    """Where a run computes, and in what."""

    kind: str
    """`cuda` or `cpu`."""
    dtype: str
    """float32, bfloat16 or float16."""
    name: str
    memory_gib: float | None
    """Memory of the GPU; None without one."""


def choose_device(wanted: str, dtype: str) -> Device:
    """The device of a run; raises ResourceError when a GPU is demanded and there is none."""
    cuda = torch.cuda.is_available()
    if wanted == "cuda" and not cuda:
        raise ResourceError(
            "training.device: cuda, but PyTorch sees no GPU",
            "run on a machine with one, or write `device: auto`",
        )
    if not cuda or wanted == "cpu":
        return Device("cpu", "float32" if dtype == "auto" else dtype, "CPU", None)
    properties = torch.cuda.get_device_properties(0)
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return Device("cuda", dtype, properties.name, properties.total_memory / 2**30)


def locate(model: Model) -> str:
    """The folder of a bundled or local model, or the hub id as it stands."""
    try:
        own = bundled(model.name)
    except FileNotFoundError as error:
        raise UsageError(f"model: {error}", "write one of those") from None
    if own is not None:
        return str(own)
    path = Path(model.name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise UsageError(f"model: {path} is a file", "name the folder that holds config.json")
    if model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1)
        guess = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UsageError(f"model: {model.name}: no such folder{guess}", "name an existing folder")
    return model.name


def load_config(model: Model) -> PreTrainedConfig:
    """The model's config.json; raises ArtefactError where there is none or it needs code."""
    with _loading(model):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            locate(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    inner = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    kernels = [foreign_kernel(vars(part)) for part in (config, *inner)]
    kernel = next(filter(None, kernels), None)
    if kernel is not None and not model.trust_remote_code:
        raise ArtefactError(
            f"model: {model.name} asks for native code from {kernel} on the hub, which was not "
            "fetched",
            "remove attn_implementation from its config.json",
        )
    return config


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token that is not its end-of-text token if it has one."""
    with _loading(model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            locate(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    if tokenizer.eos_token is None:
        raise ArtefactError(
            f"model: the tokenizer of {model.name} has no end-of-text token",
            "set `eos_token` in its tokenizer_config.json",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_base(
    model: Model,
    device: Device,
    quantization: BitsAndBytesConfig | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The base model on `device`, in its dtype or quantised; weights from safetensors only.

    `attention` is the implementation that `attention: auto` stands for; transformers' choice when
    None.
    """
    load_config(model)
    folder = base_folder(model)
    if folder is not None:
        try:
            check_folder(folder)
        except ArtefactError as error:
            raise ArtefactError(f"model: {error.message}", error.hint) from None
    try:
        with _loading(model):
            base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                locate(model),
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                dtype=DTYPES[device.dtype],
                quantization_config=quantization,
                attn_implementation=attention if model.attention == "auto" else model.attention,
                device_map={"": 0} if device.kind == "cuda" else None,
                use_safetensors=True,
            )
    except torch.cuda.OutOfMemoryError:
        raise ResourceError(
            f"model: {model.name} does not fit on {device.name} ({device.memory_gib:.1f} GiB)",
            "write `method: qlora`, which holds the base in 4 bits, or use a larger GPU",
        ) from None
    if quantization is not None and device.kind == "cpu":
        _keep_exact(base)
    return base


def base_folder(model: Model) -> Path | None:
    """Where the base's files lie on this disk; None before a hub model was downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    located = locate(model)
    if Path(located).is_dir():
        return Path(located)
    try:
        return Path(snapshot_download(located, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def wrap(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The base with an untrained adapter; raises UsageError when nothing matches the targets."""
    hint = _targets_hint(base)
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise UsageError(f"method: {error}", hint) from None


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with a trained adapter; raises ArtefactError when the two do not belong together."""
    from peftcli.methods import bottleneck_tuner  # registers the method with PEFT

    config = check_adapter(folder)
    check_patterns(str(folder), config, [name for name, _ in base.named_modules()])
    try:
        return PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
    except LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ArtefactError(
            f"{folder}: does not load on this base: {first}",
            f"name the base it was trained on ({bottleneck_tuner.__name__} is registered)",
        ) from None


def check_adapter(folder: Path) -> dict[str, Any]:
    """Its adapter_config.json; raises ArtefactError for a folder that is damaged or holds code."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ArtefactError(f"{folder}: holds no adapter", "name a folder with adapter_config.json")
    config = read_object(file)
    check_adapter_config(str(folder), config)
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ArtefactError(
            f"{folder}: its weights are a pickle (.bin), which can hold code"
            if pickled
            else f"{folder}: holds no adapter_model.safetensors",
            "save the adapter with safetensors, PEFT's default",
        )
    check_folder(folder)
    return config


@contextmanager
def _loading(model: Model) -> Iterator[None]:
    """Turn what transformers raises for this model into an error that says what to do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        raise _unloadable(model, error) from None
    except BaseException as error:
        if type(error) is not Exception:  # the tokenizers library raises nothing more exact
            raise
        raise _unloadable(model, error) from None


def _keep_exact(base: PreTrainedModel) -> None:
    """On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, and rounds them."""
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _code_of(model: Model) -> list[str]:
    """What the code is that a model needs, as far as its files are on this disk."""
    from huggingface_hub import try_to_load_from_cache

    located = locate(model)
    if Path(located).is_dir():
        return custom_code(Path(located))
    cached = try_to_load_from_cache(located, "config.json", revision=model.revision)
    return custom_code(Path(cached).parent) if isinstance(cached, str) else []


def _targets_hint(base: PreTrainedModel) -> str:
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if _linear(module)}
    listed = ", ".join(sorted(names - {"lm_head"}))
    return f"write `target_modules: all-linear`, or a list of some of {listed}"


def _linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _unloadable(model: Model, error: Exception) -> ArtefactError | UsageError:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RecursionError):
        text = "one of its JSON files is nested too deeply"
    if "trust_remote_code" in text or "custom code" in text:
        code = "; ".join(_code_of(model)) or "files of its repository"
        return ArtefactError(
            f"model: {model.name} needs Python code of its own, which was not run: {code}",
            "read that code first; `model: {name: ..., trust_remote_code: true}` runs it",
        )
    if "backend tokenizer" in text and Path(locate(model)).is_dir():
        return ArtefactError(
            f"model: {model.name} holds no tokenizer that can be read",
            "put tokenizer.json and tokenizer_config.json beside its config.json",
        )
    if "safetensors" in text and Path(locate(model)).is_dir():
        return ArtefactError(
            f"model: {model.name} holds no intact safetensors weights: {text[:200]}",
            "convert the weights to safetensors",
        )
    if not Path(locate(model)).is_dir():
        return UsageError(
            f"model: {model.name} is neither a folder here nor a model the hub gave: {text[:200]}",
            "check the name, the network and, for gated models, your token (hf auth login)",
        )
    return ArtefactError(f"model: {model.name} does not load: {text[:300]}", "check the folder")
