"""The small engine that several tests share, and its tokenizer of single bytes."""

import functools

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kernels_pallas.paged_attention import chunked as paged
from mmjax import Engine
from mmjax.tokenizer import BOS, EOS, Tokenizer
from tests.mmjax.programs import random_model, small_config

SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 258}
CFG = small_config(**SMALL)
# For engines that are compiled for one test.
ONE_LAYER = SMALL | {"num_layers": 1, "layer_types": ("softmax",)}
# Four samples of up to 128 tokens would need 64 pages: there are 16.
SIZES = {
    "max_slots": 4,
    "max_length": 128,
    "page_size": 8,
    "num_pages": 16,
    "prefill_chunk": 32,
    "prefix_block": 16,
    "num_prefixes": 6,
}


# A row of 128 tokens takes four spans, a chunk of 32 two blocks of queries.
paged.CPU_SPAN, paged.CPU_QUERY_BLOCK = 32, 16


@functools.cache
def small_model():
    return random_model(CFG)


def byte_tokenizer():
    """Id i is the i-th byte of the alphabet, 256 the end token, 257 begins a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS, BOS])
    return Tokenizer(backend)


@functools.cache
def small_engine():
    """Warm, with a tokenizer."""
    engine = Engine(small_model(), byte_tokenizer(), **SIZES)
    engine.warm_up()
    return engine


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, CFG.vocab_size, length).tolist()
