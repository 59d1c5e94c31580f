"""Models that are more than one plain decoder: Nemotron-H's hybrid, Gemma 3's vision tower."""

from __future__ import annotations

from peftcli.architecture.build import Groups
from peftcli.architecture.keys import Keys
from peftcli.architecture.shapes import Experts, Linear, Tensor
from peftcli.architecture.sizes import Sizes
from peftcli.errors import ArtefactError

PATTERN = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
LEGACY = {"linear_attention": "mamba", "full_attention": "attention"}
MIXER = "model.layers.{}.mixer."


def nemotron_kinds(keys: Keys) -> list[str]:
    """The kind of each layer: mamba, attention, moe or mlp."""
    names = keys.texts("layers_block_type") or keys.texts("layer_types")
    pattern = keys.text("hybrid_override_pattern")
    if names is None and pattern is not None:
        names = [PATTERN.get(mark, mark) for mark in pattern]
    kinds = [LEGACY.get(name, name) for name in names or []]
    unknown = sorted(set(kinds) - set(PATTERN.values()))
    if unknown or not kinds:
        raise ArtefactError(
            f"{keys.where}: the layers' kinds are {', '.join(unknown) or 'missing'}",
            "Expected hybrid_override_pattern of M, E, * and -, or layers_block_type.",
        )
    return kinds


def nemotron_groups(keys: Keys, sizes: Sizes, kinds: list[str]) -> Groups:
    """NVIDIA's Nemotron-H: each layer is one mixer, Mamba-2, attention, MLP or experts."""
    where = {k: tuple(i for i, x in enumerate(kinds) if x == k) for k in PATTERN.values()}
    linears: list[Linear] = []
    experts: list[Experts] = []
    tensors = [
        Tensor("model.embeddings", (sizes.vocab, sizes.hidden), kind="embedding"),
        Tensor("model.layers.{}.norm.weight", (sizes.hidden,), tuple(range(len(kinds)))),
        Tensor("model.norm_f.weight", (sizes.hidden,)),
    ]
    if where["mamba"]:
        more, small = mamba(keys, sizes.hidden, where["mamba"])
        linears += more
        tensors += small
    if where["attention"]:
        widths = {"q": sizes.query, "k": sizes.key, "v": sizes.key}
        linears += [
            Linear(f"{MIXER}{x}_proj", sizes.hidden, n, False, where["attention"], "attention")
            for x, n in widths.items()
        ]
        shape = (sizes.query, sizes.hidden)
        linears.append(Linear(f"{MIXER}o_proj", *shape, False, where["attention"], "attention"))
    bias = keys.flag("mlp_bias", False)
    if where["mlp"]:
        linears += up_down(MIXER, sizes.hidden, sizes.intermediate, bias, where["mlp"])
    if where["moe"]:
        more, experts, small = nemotron_experts(keys, sizes.hidden, bias, where["moe"])
        linears += more
        tensors += small
    linears.append(Linear("lm_head", sizes.hidden, sizes.vocab, False, (), "head", False))
    return tuple(linears), tuple(experts), tuple(tensors)


def up_down(name: str, hidden: int, size: int, bias: bool, where: tuple[int, ...]) -> list[Linear]:
    return [
        Linear(f"{name}up_proj", hidden, size, bias, where, "mlp"),
        Linear(f"{name}down_proj", size, hidden, bias, where, "mlp"),
    ]


def mamba(keys: Keys, hidden: int, where: tuple[int, ...]) -> tuple[list[Linear], list[Tensor]]:
    """One Mamba-2 mixer (arXiv 2405.21060) in each of the layers `where`."""
    heads = keys.integer("mamba_num_heads")
    inner = heads * keys.integer("mamba_head_dim")
    groups = keys.optional("n_groups", "mamba_n_groups") or 8
    conv = inner + 2 * groups * (keys.optional("ssm_state_size") or 128)
    kernel = keys.optional("conv_kernel", "mamba_d_conv") or 4
    bias = keys.flag("use_bias", False)
    linears = [
        Linear(f"{MIXER}in_proj", hidden, inner + conv + heads, bias, where, "attention"),
        Linear(f"{MIXER}out_proj", inner, hidden, bias, where, "attention"),
    ]
    tensors = [
        Tensor(f"{MIXER}{name}", (heads,), where, "other") for name in ("dt_bias", "A_log", "D")
    ]
    tensors.append(Tensor(f"{MIXER}conv1d.weight", (conv, 1, kernel), where, "other"))
    if keys.flag("use_conv_bias", True):
        tensors.append(Tensor(f"{MIXER}conv1d.bias", (conv,), where, "other"))
    tensors.append(Tensor(f"{MIXER}norm.weight", (inner,), where))
    return linears, tensors


def nemotron_experts(
    keys: Keys, hidden: int, bias: bool, where: tuple[int, ...]
) -> tuple[list[Linear], list[Experts], list[Tensor]]:
    """Routed experts without a gate, a shared one, and the optional latent projections."""
    count = keys.integer("n_routed_experts", "num_local_experts", high=100_000)
    active = keys.integer("num_experts_per_tok", high=count)
    size = keys.integer("moe_intermediate_size")
    shared = keys.integer("moe_shared_expert_intermediate_size")
    latent = keys.optional("moe_latent_size")
    linears = up_down(f"{MIXER}shared_experts.", hidden, shared, bias, where)
    if latent:
        linears += [
            Linear(f"{MIXER}fc1_latent_proj", hidden, latent, bias, where, "mlp"),
            Linear(f"{MIXER}fc2_latent_proj", latent, hidden, bias, where, "mlp"),
        ]
    width = latent or hidden
    shapes = {"up_proj": (size, width), "down_proj": (width, size)}
    experts = [
        Experts(f"{MIXER}experts.{name}", count, active, shape, where)
        for name, shape in shapes.items()
    ]
    return linears, experts, [Tensor(f"{MIXER}gate.weight", (count, hidden), where, "other")]


def siglip(keys: Keys, hidden: int) -> tuple[list[Linear], list[Tensor]]:
    """Gemma 3's vision tower and its projector to a text model of width `hidden`."""
    width = keys.integer("hidden_size")
    wide = keys.integer("intermediate_size")
    layers = tuple(range(keys.integer("num_hidden_layers", high=10_000)))
    patch = keys.integer("patch_size")
    channels = keys.optional("num_channels") or 3
    patches = (keys.integer("image_size") // patch) ** 2
    tower = "model.vision_tower."
    layer = f"{tower}encoder.layers.{{}}."
    linears = [
        Linear(f"{layer}self_attn.{x}", width, width, True, layers, "vision")
        for x in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    linears.append(Linear(f"{layer}mlp.fc1", width, wide, True, layers, "vision"))
    linears.append(Linear(f"{layer}mlp.fc2", wide, width, True, layers, "vision"))
    parts = ("weight", "bias")
    tensors = [
        Tensor(f"{layer}{norm}.{part}", (width,), layers)
        for norm in ("layer_norm1", "layer_norm2")
        for part in parts
    ]
    tensors += [Tensor(f"{tower}post_layernorm.{part}", (width,)) for part in parts]
    patch_shape = (width, channels, patch, patch)
    projector = "model.multi_modal_projector."
    return linears, [
        *tensors,
        Tensor(f"{tower}embeddings.patch_embedding.weight", patch_shape, kind="other"),
        Tensor(f"{tower}embeddings.patch_embedding.bias", (width,), kind="other"),
        Tensor(f"{tower}embeddings.position_embedding", (patches, width), kind="embedding"),
        Tensor(f"{projector}mm_input_projection_weight", (width, hidden), kind="other"),
        Tensor(f"{projector}mm_soft_emb_norm.weight", (width,)),
    ]
