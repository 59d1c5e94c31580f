"""The models that are compared; base and adapter are one set of weights, switched off and on."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

from peftcli.adapters import load_adapter
from peftcli.basefiles import base_folder, locate
from peftcli.errors import ArtefactError
from peftcli.evaluate.result import Arm
from peftcli.evaluate.score import AnyModel
from peftcli.evaluate.target import Target, check_base
from peftcli.fingerprint import fingerprint
from peftcli.fp8 import round_base
from peftcli.models import DTYPES, Device, load_base
from peftcli.recipe.schema import Model

GIB = 2**30


@dataclass(frozen=True)
class Group:
    """Arms that share one set of weights."""

    arms: tuple[Arm, ...]
    model: Model
    adapter: Path | None
    quantization: BitsAndBytesConfig | None
    in_fp8: bool = False
    """Whether the base's weights are rounded as the run held them."""


@dataclass(frozen=True)
class Loaded:
    """A group in memory."""

    model: AnyModel
    base_gib: float
    """The weights without the adapter."""
    gib: float

    def weights_gib(self, arm: str) -> float:
        """What the weights of an arm take."""
        return self.base_gib if arm == "base" else self.gib


def groups_of(target: Target, device: Device) -> list[Group]:
    """What is loaded in turn: base with adapter, then a tuned or merged model.

    Raises ArtefactError when the base is not the one that the adapter was trained on.
    """
    model = target.base
    if Path(locate(model)).is_dir():
        model = model.model_copy(update={"revision": None})
    check_base(target, base_folder(model))
    quantization, in_fp8 = quantization_of(target, device), trained_on_fp8(target)
    held = "4 bits" if quantization else f"fp8, computed in {device.dtype}"
    shown = f"{model.name} in {held if quantization or in_fp8 else device.dtype}"
    arms = [Arm("model" if target.kind == "model" else "base", shown, identity(model))]
    if target.adapter is not None:
        own = f"{arms[0].identity}+{_adapter_identity(target.adapter)}"
        arms.append(Arm("adapter", f"{target.adapter} on {shown}", own))
    groups = [Group(tuple(arms), model, target.adapter, quantization, in_fp8)]
    for name, folder in (("tuned", target.tuned), ("merged", target.merged)):
        if folder is not None:
            whole = Model(name=str(folder))
            arm = Arm(name, f"{folder} in {device.dtype}", identity(whole))
            groups.append(Group((arm,), whole, None, None))
    return groups


def quantization_of(target: Target, device: Device) -> BitsAndBytesConfig | None:
    """How the run quantised its base."""
    if target.loaded is None or target.tuned is not None:
        return None
    return target.loaded.recipe.method.quantization_config(device.dtype)


def trained_on_fp8(target: Target) -> bool:
    """Whether the adapter belongs to weights in fp8; their values are taken, not their speed."""
    if target.loaded is None or target.tuned is not None:
        return False
    return target.loaded.recipe.method.frozen_in_fp8


def identity(model: Model) -> str:
    """A hash of the weights, or the name of a model that is not downloaded yet."""
    folder = base_folder(model)
    if folder is None:
        return f"{model.name}@{model.revision or 'newest'}"
    return fingerprint(folder).digest[:16]


def load(group: Group, device: Device) -> Loaded:
    """The weights of a group, ready for inference; adapters in the dtype of the device.

    Training computes with them in that dtype too, by autocast.
    """
    before = _allocated(device)
    base = load_base(group.model, device, group.quantization)
    if group.in_fp8:
        round_base(base)
    base_gib = _size(base, before, device)
    model: AnyModel = base
    if group.adapter is not None:
        own = {id(parameter) for parameter in base.parameters()}
        model = load_adapter(base, group.adapter)
        for parameter in model.parameters():
            if id(parameter) not in own and parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[device.dtype])
    model.requires_grad_(False)
    return Loaded(model.eval(), base_gib, _size(model, before, device))


@contextmanager
def switched(model: AnyModel, arm: str) -> Iterator[AnyModel]:
    """The model as that arm: its adapter off for `base`."""
    if isinstance(model, PeftModel) and arm == "base":
        with model.disable_adapter():
            yield model
    else:
        yield model


def fits_beside(group: Group, device: Device) -> bool:
    """Whether the group's weights fit into memory beside what is there."""
    folder = base_folder(group.model)
    if folder is None:
        return False
    needed = 1.5 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.kind == "cuda":
        return needed < torch.cuda.mem_get_info()[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2 * needed < pages


def free_memory() -> None:
    """Give the memory of models that nothing names any more back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _adapter_identity(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = folder / name
        if not file.is_file():
            raise ArtefactError(
                f"{folder}: holds no {name}", "save the adapter with safetensors, PEFT's default"
            )
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _allocated(device: Device) -> int:
    return torch.cuda.memory_allocated() if device.kind == "cuda" else 0


def _size(model: torch.nn.Module, before: int, device: Device) -> float:
    """GiB on the GPU since `before`, or of parameters and buffers where there is none."""
    if device.kind == "cuda":
        return (torch.cuda.memory_allocated() - before) / GIB
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB
