"""The tuning methods; `AnyMethod` is what a recipe's `method` section can be."""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from peftcli.methods.adapter import Adapter
from peftcli.methods.base import Method
from peftcli.methods.full import Full
from peftcli.methods.lora import Lora
from peftcli.methods.qlora import Qlora

METHODS: dict[str, type[Method]] = {"lora": Lora, "qlora": Qlora, "adapter": Adapter, "full": Full}

AnyMethod = Annotated[Lora | Qlora | Adapter | Full, Field(discriminator="name")]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "quantization": None},
    "dora": {"name": "lora", "quantization": None, "use_dora": True},
    "lora, fp8": {"name": "lora", "quantization": "fp8"},
    "qlora": {"name": "qlora"},
    "adapter": {"name": "adapter", "quantization": None},
    "adapter, 4-bit": {"name": "adapter", "quantization": "nf4"},
    "full": {"name": "full"},
}
"""What `estimate --compare` sets side by side, as `method` sections."""


def changed(method: Method, keys: dict[str, Any]) -> Method:
    """The method with other values; another `name` keeps what is right for both methods."""
    name = keys.get("name", type(method).model_fields["name"].default)
    other = METHODS[name]
    written = method.model_dump(exclude_unset=True)
    kept = {key: value for key, value in written.items() if _takes(other, key, value)}
    return other.model_validate(kept | {"name": name} | keys)


def _takes(method: type[Method], key: str, value: Any) -> bool:
    """Whether a method has the key, and the value as one of its choices if it lists them."""
    if key not in method.model_fields:
        return False
    choices: Any = method.model_fields[key].annotation
    try:
        TypeAdapter(choices).validate_python(value)
    except ValidationError:
        return False
    return True
