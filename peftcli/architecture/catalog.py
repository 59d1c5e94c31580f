"""Well-known models by name, so that `estimate` works without a network or a checkpoint.

The table at the end holds the sizes of each published config.json, and the number of parameters
that the checkpoint has; tests compute the latter from the former.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from peftcli.architecture.config import Architecture, architecture_from

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
GEMMA3_VISION = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}


@dataclass(frozen=True)
class Known:
    """A released model: its names on the hub and what its architecture follows from."""

    alias: str
    hub_ids: tuple[str, ...]
    config: dict[str, object]
    parameters: int


def find_model(name: str) -> Architecture | None:
    """The architecture of a model by alias or hub id; None if the catalog has no such name.

    The case does not matter, nor the organisation: mirrors keep the name.
    """
    known = _by_name().get(_short(name))
    return architecture_from(known.config, where=known.alias) if known else None


def find_config(name: str) -> dict[str, object]:
    """What the config.json of a model of the catalog says; raises KeyError for another name."""
    return dict(_by_name()[_short(name)].config)


def model_names() -> list[str]:
    """The aliases, in the order of the catalog."""
    return [known.alias for known in known_models()]


def nearest_names(name: str, most: int = 3) -> list[str]:
    """Aliases that look like `name`, best first, for a message about an unknown model."""
    from difflib import get_close_matches

    wanted, known = _short(name), list(_by_name())
    begun = [x for x in known if len(x) > 4 and (wanted.startswith(x) or x.startswith(wanted))]
    found = sorted(begun, key=len, reverse=True) if len(wanted) > 2 else []
    found += get_close_matches(wanted, known, n=3 * most, cutoff=0.5)
    return list(dict.fromkeys(_by_name()[short].alias for short in found))[:most]


@cache
def known_models() -> tuple[Known, ...]:
    """All rows of the table."""
    records = TABLE.strip().replace("\n  ", " ").splitlines()
    return tuple(_known(*record.split(": ")) for record in records)


def _known(alias: str, record: str) -> Known:
    words = record.split()
    at = next(i for i, word in enumerate(words) if word.isdigit())
    end = at + len(SIZES)
    config: dict[str, object] = {
        "model_type": words[at - 1],
        "dtype": "bfloat16",
        **dict(zip(SIZES, map(int, words[at:end]), strict=True)),
        "tie_word_embeddings": "tied" in words[end:],
    }
    for word in words[end + 1 :]:
        key, equals, value = word.partition("=")
        if key == "quantised":
            config["quantization_config"] = {"quant_method": value}
        elif equals:
            config[key] = int(value) if value.isdigit() else value
    if config["model_type"] == "gemma3":
        text = config | {"model_type": "gemma3_text"}
        config = {"model_type": "gemma3", "text_config": text, "vision_config": GEMMA3_VISION}
    return Known(alias, tuple(words[: at - 1]), config, parameters=int(words[end]))


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


@cache
def _by_name() -> dict[str, Known]:
    return {
        _short(name): known for known in known_models() for name in (known.alias, *known.hub_ids)
    }


# alias: hub ids, then model_type, the sizes above, parameters, and further keys
TABLE = """
llama-2-7b: meta-llama/Llama-2-7b-hf Llama-2-7b-chat-hf
  llama 4096 32 32 32 11008 32000 4096 6738415616 dtype=float16
llama-2-13b: meta-llama/Llama-2-13b-hf Llama-2-13b-chat-hf
  llama 5120 40 40 40 13824 32000 4096 13015864320 dtype=float16
llama-3-8b: meta-llama/Meta-Llama-3-8B Meta-Llama-3-8B-Instruct
  llama 4096 32 32 8 14336 128256 8192 8030261248
llama-3-70b: meta-llama/Meta-Llama-3-70B Meta-Llama-3-70B-Instruct
  llama 8192 80 64 8 28672 128256 8192 70553706496
llama-3.1-8b: meta-llama/Llama-3.1-8B Llama-3.1-8B-Instruct
  llama 4096 32 32 8 14336 128256 131072 8030261248
llama-3.1-70b: meta-llama/Llama-3.1-70B Llama-3.1-70B-Instruct Llama-3.3-70B-Instruct
  llama 8192 80 64 8 28672 128256 131072 70553706496
llama-3.1-405b: meta-llama/Llama-3.1-405B Llama-3.1-405B-Instruct
  llama 16384 126 128 8 53248 128256 131072 405853388800
llama-3.2-1b: meta-llama/Llama-3.2-1B Llama-3.2-1B-Instruct
  llama 2048 16 32 8 8192 128256 131072 1235814400 tied
llama-3.2-3b: meta-llama/Llama-3.2-3B Llama-3.2-3B-Instruct
  llama 3072 28 24 8 8192 128256 131072 3212749824 tied
mistral-7b-v0.1: mistralai/Mistral-7B-v0.1 Mistral-7B-Instruct-v0.1
  mistral 4096 32 32 8 14336 32000 32768 7241732096 sliding_window=4096
mistral-7b-v0.2: mistralai/Mistral-7B-Instruct-v0.2
  mistral 4096 32 32 8 14336 32000 32768 7241732096
mistral-7b-v0.3: mistralai/Mistral-7B-v0.3 Mistral-7B-Instruct-v0.3
  mistral 4096 32 32 8 14336 32768 32768 7248023552
mistral-nemo-12b: mistralai/Mistral-Nemo-Base-2407 Mistral-Nemo-Instruct-2407
  mistral 5120 40 32 8 14336 131072 131072 12247782400 head_dim=128
mixtral-8x7b: mistralai/Mixtral-8x7B-v0.1 Mixtral-8x7B-Instruct-v0.1
  mixtral 4096 32 32 8 14336 32000 32768 46702792704 num_local_experts=8 num_experts_per_tok=2
mixtral-8x22b: mistralai/Mixtral-8x22B-v0.1
  mixtral 6144 56 48 8 16384 32000 65536 140620634112 num_local_experts=8 num_experts_per_tok=2
qwen2.5-0.5b: Qwen/Qwen2.5-0.5B Qwen2.5-0.5B-Instruct
  qwen2 896 24 14 2 4864 151936 32768 494032768 tied
qwen2.5-1.5b: Qwen/Qwen2.5-1.5B Qwen2.5-1.5B-Instruct
  qwen2 1536 28 12 2 8960 151936 131072 1543714304 tied
qwen2.5-3b: Qwen/Qwen2.5-3B Qwen2.5-3B-Instruct
  qwen2 2048 36 16 2 11008 151936 32768 3085938688 tied
qwen2.5-7b: Qwen/Qwen2.5-7B Qwen2.5-7B-Instruct
  qwen2 3584 28 28 4 18944 152064 131072 7615616512
qwen2.5-14b: Qwen/Qwen2.5-14B Qwen2.5-14B-Instruct
  qwen2 5120 48 40 8 13824 152064 131072 14770033664
qwen2.5-32b: Qwen/Qwen2.5-32B Qwen2.5-32B-Instruct
  qwen2 5120 64 40 8 27648 152064 131072 32763876352
qwen2.5-72b: Qwen/Qwen2.5-72B Qwen2.5-72B-Instruct
  qwen2 8192 80 64 8 29568 152064 131072 72706203648
qwen3-0.6b: Qwen/Qwen3-0.6B Qwen3-0.6B-Base
  qwen3 1024 28 16 8 3072 151936 40960 596049920 tied
qwen3-1.7b: Qwen/Qwen3-1.7B Qwen3-1.7B-Base
  qwen3 2048 28 16 8 6144 151936 40960 1720574976 tied
qwen3-4b: Qwen/Qwen3-4B Qwen3-4B-Base
  qwen3 2560 36 32 8 9728 151936 40960 4022468096 tied
qwen3-8b: Qwen/Qwen3-8B Qwen3-8B-Base
  qwen3 4096 36 32 8 12288 151936 40960 8190735360
qwen3-14b: Qwen/Qwen3-14B Qwen3-14B-Base
  qwen3 5120 40 40 8 17408 151936 40960 14768307200
qwen3-32b: Qwen/Qwen3-32B
  qwen3 5120 64 64 8 25600 151936 40960 32762123264
qwen3-30b-a3b: Qwen/Qwen3-30B-A3B Qwen3-30B-A3B-Base
  qwen3_moe 2048 48 32 4 6144 151936 40960 30532122624 head_dim=128 num_experts=128
    num_experts_per_tok=8 moe_intermediate_size=768
qwen3-235b-a22b: Qwen/Qwen3-235B-A22B
  qwen3_moe 4096 94 64 4 12288 151936 40960 235093634560 head_dim=128 num_experts=128
    num_experts_per_tok=8 moe_intermediate_size=1536
gemma-7b: google/gemma-7b gemma-7b-it
  gemma 3072 28 16 16 24576 256000 8192 8537680896 tied
gemma-2-2b: google/gemma-2-2b gemma-2-2b-it
  gemma2 2304 26 8 4 9216 256000 8192 2614341888 tied sliding_window=4096 dtype=float32
gemma-2-9b: google/gemma-2-9b gemma-2-9b-it
  gemma2 3584 42 16 8 14336 256000 8192 9241705984 tied sliding_window=4096 dtype=float32
gemma-2-27b: google/gemma-2-27b gemma-2-27b-it
  gemma2 4608 46 32 16 36864 256000 8192 27227128320 tied head_dim=128 sliding_window=4096
gemma-3-1b: google/gemma-3-1b-pt gemma-3-1b-it
  gemma3_text 1152 26 4 1 6912 262144 32768 999885952 tied sliding_window=512
gemma-3-4b: google/gemma-3-4b-pt gemma-3-4b-it
  gemma3 2560 34 8 4 10240 262208 131072 4300079472 tied sliding_window=1024
gemma-3-12b: google/gemma-3-12b-pt gemma-3-12b-it
  gemma3 3840 48 16 8 15360 262208 131072 12187325040 tied sliding_window=1024
gemma-3-27b: google/gemma-3-27b-pt gemma-3-27b-it
  gemma3 5376 62 32 16 21504 262208 131072 27432406640 tied head_dim=128 sliding_window=1024
phi-3-mini: microsoft/Phi-3-mini-128k-instruct
  phi3 3072 32 32 32 8192 32064 131072 3821079552
phi-4: microsoft/phi-4
  phi3 5120 40 40 10 17920 100352 16384 14659507200
tinyllama-1.1b: TinyLlama/TinyLlama-1.1B-Chat-v1.0
  llama 2048 22 32 4 5632 32000 2048 1100048384
smollm-1.7b: HuggingFaceTB/SmolLM-1.7B SmolLM-1.7B-Instruct
  llama 2048 24 32 32 8192 49152 2048 1711376384 tied dtype=float32
smollm2-135m: HuggingFaceTB/SmolLM2-135M SmolLM2-135M-Instruct
  llama 576 30 9 3 1536 49152 8192 134515008 tied
smollm2-360m: HuggingFaceTB/SmolLM2-360M SmolLM2-360M-Instruct
  llama 960 32 15 5 2560 49152 8192 361821120 tied
smollm2-1.7b: HuggingFaceTB/SmolLM2-1.7B SmolLM2-1.7B-Instruct
  llama 2048 24 32 32 8192 49152 8192 1711376384 tied dtype=float32
gpt-oss-20b: openai/gpt-oss-20b
  gpt_oss 2880 24 64 8 2880 201088 131072 20914757184 sliding_window=128 num_local_experts=32
    num_experts_per_tok=4 quantised=mxfp4
gpt-oss-120b: openai/gpt-oss-120b
  gpt_oss 2880 36 64 8 2880 201088 131072 116829156672 sliding_window=128 num_local_experts=128
    num_experts_per_tok=4 quantised=mxfp4
deepseek-v3: deepseek-ai/DeepSeek-V3 DeepSeek-V3-Base
  deepseek_v3 7168 61 128 128 18432 129280 163840 671026404352 num_experts_per_tok=8
    moe_intermediate_size=2048 n_routed_experts=256 n_shared_experts=1 first_k_dense_replace=3
    q_lora_rank=1536 kv_lora_rank=512 qk_rope_head_dim=64 qk_nope_head_dim=128 v_head_dim=128
    quantised=fp8
nemotron-3-nano-30b: nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
  nemotron_h 2688 52 32 2 1856 131072 262144 31577937344 head_dim=128 num_experts_per_tok=6
    moe_intermediate_size=1856 n_routed_experts=128 n_shared_experts=1
    hybrid_override_pattern=MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME
    mamba_num_heads=64 mamba_head_dim=64 n_groups=8 ssm_state_size=128 conv_kernel=4
    moe_shared_expert_intermediate_size=3712
internlm2-7b: internlm/internlm2-7b
  internlm2 4096 32 32 8 14336 92544 32768 7737708544
stablelm-3b: stabilityai/stablelm-3b-4e1t
  stablelm 2560 32 32 32 6912 50304 4096 2795443200
gpt2: openai-community/gpt2
  gpt2 768 12 12 12 3072 50257 1024 124439808 tied dtype=float32
gpt2-medium: openai-community/gpt2-medium
  gpt2 1024 24 16 16 4096 50257 1024 354823168 tied dtype=float32
gpt-j-6b: EleutherAI/gpt-j-6b
  gptj 4096 28 16 16 16384 50400 2048 6050882784 dtype=float32
opt-125m: facebook/opt-125m
  opt 768 12 12 12 3072 50272 2048 125239296 tied ffn_dim=3072 dtype=float16
"""
