"""What the tests of language models stand on: text, a tokenizer and a model, all made here, nothing downloaded."""

from __future__ import annotations

import inspect
import json
import textwrap
from functools import cache

import torch

# Docstrings of the standard library: English, of very different lengths.
TEXTS = [
    inspect.getdoc(value)
    for module in (inspect, json, textwrap)
    for name, value in sorted(vars(module).items())
    if inspect.isfunction(value) and value.__module__ == module.__name__ and value.__doc__
][:40]


@cache
def tokenizer(size: int = 300):
    """A byte-level BPE trained on TEXTS, in the form of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>", pad_token="<pad>")


def llama(vocab_size: int = 300, hidden: int = 32, seed: int = 0):
    """A randomly initialised Llama of two layers, with logits far enough from uniform to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
