"""AdamW with M1's constants, warm-up, decay and clipping, from Optax; and how bfloat16 parameters
take updates that are smaller than their last bit.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mmjax.config import ConfigError
from train.config import OptimizerConfig
from train.stages import Stage, decay, staged_rate


def learning_rate(
    cfg: OptimizerConfig, updates: int, stages: Sequence[Stage] = ()
) -> optax.Schedule:
    """The rate at each update.

    Args:
      cfg: Warm-up, decay and peak.
      updates: Length of the job.
      stages: Of the job, whose own rates and decays then hold.
    """
    if stages:
        return staged_rate(cfg, stages)
    left = cfg.decay_steps or max(updates - cfg.warmup_steps, 1)
    peak = cfg.learning_rate
    final = peak if cfg.decay == "constant" else peak * cfg.final_ratio
    after = decay(cfg.decay, peak, final, left)
    if not cfg.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / cfg.warmup_steps, peak, cfg.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def is_frozen(params: Any, frozen: Sequence[str]) -> Any:
    """Whether a pattern matches each parameter, in the same tree.

    Args:
      params: Parameters.
      frozen: Patterns of names such as "vision.*", see `fnmatch`.
    """

    def one(path: tuple[Any, ...], _: Any) -> bool:
        return any(fnmatch.fnmatchcase(_name(path), pattern) for pattern in frozen)

    return jax.tree_util.tree_map_with_path(one, params)


def check_frozen(params: Any, frozen: Sequence[str]) -> None:
    """Raises ConfigError for a pattern that no parameter matches, and where all are frozen."""
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in frozen:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"optimizer.frozen: no parameter matches {pattern!r}; some of their names: "
                f"{', '.join(names[:: max(len(names) // 6, 1)])}"
            )
    if frozen and all(jax.tree.leaves(is_frozen(params, frozen))):
        raise ConfigError(f"optimizer.frozen {tuple(frozen)} leaves no parameter to train")


def _name(path: tuple[Any, ...]) -> str:
    """By which a pattern knows a parameter."""
    return ".".join(re.findall(r"\w+", jax.tree_util.keystr(path)))


def make_optimizer(
    cfg: OptimizerConfig,
    updates: int,
    frozen: Sequence[str] = (),
    stages: Sequence[Stage] = (),
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; norm scales and biases are not decayed.

    All of it is computed in float32, whatever the dtypes of gradients, parameters and moments.
    The updates are float32 and for `apply_updates`, which rounds to the parameters' dtype.

    Args:
      cfg: AdamW's settings.
      updates: Length of the job.
      frozen: Patterns of parameters that stay as they are and take no moments.
      stages: Of the job.

    Source: MiniMax-M1 report, section 3.2 (betas, eps).
    """

    def decayed(params: optax.Params) -> optax.Params:
        # Layers are stacked on two leading axes, so a norm scale has up to three or four.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not re.search("norm|bias", jax.tree_util.keystr(path)), params
        )

    adamw = optax.chain(
        _scale_by_adam(cfg),
        optax.add_decayed_weights(cfg.weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate(cfg, updates, stages)),
    )
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    trained = _ROUNDING[cfg.rounding](optax.chain(clip, adamw))
    if not frozen:
        return trained

    def labels(params: optax.Params) -> Any:
        names = {True: "frozen", False: "trained"}
        return jax.tree.map(names.__getitem__, is_frozen(params, frozen))

    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def apply_updates(params: Any, updates: Any) -> Any:
    """Parameters after updates, summed in float32 and rounded to their dtype."""
    return jax.tree.map(lambda p, u: (_float32(p) + _float32(u)).astype(p.dtype), params, updates)


def _scale_by_adam(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's moments in float32, kept in the dtype of `cfg.moments` or of their parameter.

    Optax rounds the first moment alone, and computes the second in the parameters' dtype.
    """
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)

    def narrow(moments: Any, like: Any) -> Any:
        return jax.tree.map(lambda m, p: m.astype(cfg.moments or p.dtype), moments, like)

    def init(params: Any) -> Any:
        state = adam.init(params)
        return state._replace(mu=narrow(state.mu, params), nu=narrow(state.nu, params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = state._replace(mu=_wide(state.mu), nu=_wide(state.nu))
        updates, new = adam.update(grads, wide, params)
        narrowed = (
            jax.tree.map(lambda m, old: m.astype(old.dtype), moments, before)
            for moments, before in ((new.mu, state.mu), (new.nu, state.nu))
        )
        return updates, new._replace(mu=next(narrowed), nu=next(narrowed))

    return optax.GradientTransformation(init, update)


def _nearest(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` in float32."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = inner.update(_wide(grads), state, _wide(params))
        return updates, state

    return optax.GradientTransformation(inner.init, update)


class MasterState(NamedTuple):
    """master: the parameters in float32; inner: state of the optimizer."""

    master: Any
    inner: Any


def _master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Updates a float32 copy of the parameters, from which these are rounded."""

    def init(params: Any) -> MasterState:
        # Copies even of float32, since a step donates both.
        master = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return MasterState(master, inner.init(params))

    def update(grads: Any, state: MasterState, params: Any) -> tuple[Any, MasterState]:
        updates, inner_state = inner.update(_wide(grads), state.inner, state.master)
        master = jax.tree.map(jnp.add, state.master, updates)
        moved = jax.tree.map(lambda m, p: _float32(m.astype(p.dtype)) - _float32(p), master, params)
        return moved, MasterState(master, inner_state)

    return optax.GradientTransformation(init, update)


class StochasticState(NamedTuple):
    """updates: so far, of which the random bits follow; inner: state of the optimizer."""

    updates: jax.Array
    inner: Any


def _stochastic(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Rounds updated bfloat16 parameters up or down by chance, right on average.

    Source: as in Revisiting BFloat16 Training (arXiv 2010.06192), section 3.
    """

    def init(params: Any) -> StochasticState:
        return StochasticState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads: Any, state: StochasticState, params: Any) -> tuple[Any, StochasticState]:
        updates, inner_state = inner.update(_wide(grads), state.inner, _wide(params))
        leaves, structure = jax.tree.flatten(params)
        moved = [
            _float32(stochastic_round(_float32(p) + u, (state.updates, n))) - _float32(p)
            if p.dtype == jnp.bfloat16
            else u
            for n, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
        ]
        return jax.tree.unflatten(structure, moved), StochasticState(state.updates + 1, inner_state)

    return optax.GradientTransformation(init, update)


_ROUNDING = {"nearest": _nearest, "master": _master, "stochastic": _stochastic}


def stochastic_round(x: jax.Array, seeds: Sequence[jax.Array | int]) -> jax.Array:
    """x [*S] float32 to one of its two neighbours in bfloat16, x on average.

    The sixteen bits that bfloat16 drops carry into those that it keeps with a probability that is
    their value. Random bits come from a hash of the seeds and of each element's place: the same
    on any mesh, and made where they are used. `jax.random` would write them to memory first, four
    times the parameters.
    """
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hashed(x.shape, seeds) >> 16)
    kept = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
    return kept.astype(jnp.bfloat16)


def _hashed(shape: tuple[int, ...], seeds: Sequence[jax.Array | int]) -> jax.Array:
    """Uniform uint32 [*shape], another for each place and seeds."""
    hashed = jnp.zeros((1,) * len(shape), jnp.uint32)
    for seed in seeds:
        hashed = _mix(hashed + jnp.asarray(seed, jnp.uint32))
    for axis in range(len(shape)):
        hashed = _mix(
            hashed
            + jax.lax.broadcasted_iota(jnp.uint32, shape[: axis + 1], axis)[
                (..., *(None,) * (len(shape) - axis - 1))
            ]
        )
    return hashed


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of x turns half of the result's.

    Source: lowbias32 of Wellons, nullprogram.com/blog/2018/07/31.
    """
    x += jnp.uint32(0x9E3779B9)  # 0 is no fixed point.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _wide(tree: Any) -> Any:
    return jax.tree.map(_float32, tree)
