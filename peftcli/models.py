"""Load what a recipe names: tokenizer, and base model, quantised or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
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

from peftcli.basefiles import base_folder, code_of, locate
from peftcli.errors import ArtefactError, ResourceError, UsageError
from peftcli.privacy import go_offline as go_offline
from peftcli.recipe.schema import Model
from peftcli.untrusted import foreign_kernel
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
    # None would hide from transformers how a checkpoint is stored that is quantised already
    stored = {} if quantization is None else {"quantization_config": quantization}
    try:
        with _loading(model):
            base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                locate(model),
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
                dtype=DTYPES[device.dtype],
                attn_implementation=attention if model.attention == "auto" else model.attention,
                device_map={"": 0 if device.kind == "cuda" else "cpu"},
                use_safetensors=True,
                **stored,
            )
    except torch.cuda.OutOfMemoryError:
        raise ResourceError(
            f"model: {model.name} does not fit on {device.name} ({device.memory_gib:.1f} GiB)",
            "write `method: qlora`, which holds the base in 4 bits, or use a larger GPU",
        ) from None
    if device.kind == "cpu" and hasattr(base.config, "quantization_config"):
        _keep_exact(base)
    return base


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


def _unloadable(model: Model, error: Exception) -> ArtefactError | UsageError:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RecursionError):
        text = "one of its JSON files is nested too deeply"
    if "trust_remote_code" in text or "custom code" in text:
        code = "; ".join(code_of(model)) or "files of its repository"
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
