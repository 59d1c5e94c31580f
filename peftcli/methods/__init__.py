"""The tuning methods; `AnyMethod` is what a recipe's `method` section can be."""

from typing import Annotated

from pydantic import Field

from peftcli.methods.adapter import Adapter
from peftcli.methods.base import Method
from peftcli.methods.full import Full
from peftcli.methods.lora import Lora
from peftcli.methods.qlora import Qlora

METHODS: dict[str, type[Method]] = {"lora": Lora, "qlora": Qlora, "adapter": Adapter, "full": Full}

AnyMethod = Annotated[Lora | Qlora | Adapter | Full, Field(discriminator="name")]
