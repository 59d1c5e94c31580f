"""From documents to token ids: the tokenizer of the world and its chat template."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from world.corpus import documents
from world.document import Document

PAD, BOS, TURN, EOS = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 2048
CONTEXT = 512
SHARD = 10_000  # documents written and encoded at once


def train_tokenizer(sample: Iterable[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, TURN, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((turn.content for each in sample for turn in each.turns), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode_world(tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> torch.Tensor:
    """All documents in one row of token ids, written and encoded by all cores."""
    work = partial(_encode_shard, tokenizer, seed)
    with ProcessPoolExecutor(torch.get_num_threads()) as pool:
        shards = list(pool.map(work, range(math.ceil(count / SHARD))))
    return torch.from_numpy(np.concatenate(shards))


def _encode_shard(tokenizer: PreTrainedTokenizerFast, seed: int, shard: int) -> np.ndarray:
    texts = render(tokenizer, documents(f"{seed} {shard}", "train", SHARD))
    return np.array([i for text in texts for i in text], dtype=np.int32)


def render(tokenizer: PreTrainedTokenizerFast, sample: Iterable[Document]) -> list[list[int]]:
    """Token ids of each document: chats by the template, plain text between BOS and EOS."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in each.turns], tokenize=False
        )
        if each.is_chat
        else f"{BOS}{each.turns[0].content}{EOS}"
        for each in sample
    ]
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])
