"""What several tests of the trainer share: a tiny model, its tokenizer, optimizers, batches."""

import jax
import numpy as np
import optax

from tests.mmjax.programs import random_model, small_config
from train.config import OptimizerConfig
from train.data.reasoning import ReasoningProblems, prompt_text, worked_solution
from train.data.tokenizer import train_tokenizer
from train.optimizer import make_optimizer


def lenient(optimizer):
    """The same optimizer, free to promote dtypes: Optax does, and the code around must not."""

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def adamw(**changes):
    return lenient(make_optimizer(OptimizerConfig(**changes), 10))


def tiny_model(vocab_size=300):
    """One layer of each kind, random weights."""
    cfg = small_config(num_layers=2, layer_types=("lightning", "softmax"), vocab_size=vocab_size)
    return random_model(cfg)


def problems_and_tokenizer(size=40):
    problems = ReasoningProblems(("chain_sum",), size, seed=0)
    texts = [prompt_text(p) + worked_solution(p) for p in problems]
    return problems, train_tokenizer(texts, 300)


def assert_same(tree, other):
    """Bit for bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def copied(tree):
    """On the host, since a step eats the state that it is given."""
    return jax.tree.map(np.array, jax.device_get(tree))
