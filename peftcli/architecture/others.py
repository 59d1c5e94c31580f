"""Files and models that are no attention decoder, and how one sees that."""

from __future__ import annotations

from peftcli.architecture.keys import Keys
from peftcli.architecture.shapes import Architecture
from peftcli.errors import ArtefactError

OTHER_FILES = {
    "peft_type": ("an adapter", "Give the folder of its base model."),
    "tokenizer_class": ("a tokenizer", "Give the model's config.json."),
    "_class_name": ("an image model", "peftcli tunes language models."),
}
MIXERS = (  # keys of layers that mix tokens by a state or a convolution
    *("mamba_d_state", "mamba_state_dim", "ssm_state_size", "ssm_cfg", "state_size", "lru_width"),
    *("linear_num_value_heads", "linear_attn_config", "conv_L_cache", "time_mix_extra_dim"),
)
OTHER_LAYERS = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid")
OTHER_MODEL = (
    "Memory, packing and targets would be guesses: take another model, or train this one with TRL "
    "and PEFT themselves."
)


def refuse_other_files(keys: Keys) -> None:
    """Raise the ArtefactError of a file that names no type of model."""
    for key, (what, hint) in OTHER_FILES.items():
        if key in keys.values:
            raise ArtefactError(f"{keys.where}: the configuration of {what}, not a model", hint)
    raise ArtefactError(
        f"{keys.where}: model_type is missing", "Is this the config.json of a transformers model?"
    )


def refuse_other_models(keys: Keys, model_type: str) -> None:
    """Encoders and models of other kinds have the same keys; their class name tells."""
    names = keys.texts("architectures") or []
    generating = ("CausalLM", "ConditionalGeneration", "LMHead")
    wrong_class = names and not any(mark in name for name in names for mark in generating)
    if wrong_class or keys.flag("is_encoder_decoder", False):
        raise ArtefactError(
            f"{keys.where}: {names[0] if names else model_type!r} is no causal language model",
            "peftcli tunes decoders, which AutoModelForCausalLM loads.",
        )


def refuse_hybrids(architecture: Architecture, where: str) -> None:
    """Raise the ArtefactError of a model whose layers are not all known, so neither its memory."""
    if architecture.other_layers is not None:
        raise ArtefactError(
            f"{where}: {architecture.model_type!r} models are not estimated: not known here, and "
            f"not all of its layers are attention ({architecture.other_layers})",
            "Memory and time would be guesses; `train` takes it all the same.",
        )


def other_mixer(keys: Keys) -> str | None:
    """The key by which a config says that layers are recurrent, or convolutions."""
    named = next((key for key in MIXERS if keys.values.get(key) is not None), None)
    types = keys.texts("layer_types") or []
    kind = next((kind for kind in types if kind in OTHER_LAYERS), None)
    return named or (f"layer_types: {kind}" if kind else None)
