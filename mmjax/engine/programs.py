"""The compiled programs of the engine: prefill a chunk, decode a burst, move rows and pages."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas import dispatch
from kernels_pallas.numerics import einsum32
from mmjax.cache import PagedCache
from mmjax.config import LIGHTNING, SOFTMAX, ModelConfig
from mmjax.engine.sampling import MAX_LOGPROBS, Draw, Wanted, draw
from mmjax.model import Decoder, ImageTokens
from mmjax.sharding import constrain

# Most decode steps of one burst.
BURST = 16
# Stop ids and forced tokens that a row carries to the device; more are left to the host.
STOPS, FORCED = 8, 16
# Pages that one call moves to or from the host.
MOVED_PAGES = 16
# Samples whose beginnings one call copies.
FORKS = 32
# Most rows of a decode step that have programs for less than everything.
LEAN_ROWS = 16
# Rows whose chunks one call computes on a CPU, where small models take less time than a call.
CPU_PREFILL_ROWS = 64


class Pools(NamedTuple):
    """The pools of `PagedCache`: keys, values, state."""

    keys: jax.Array
    values: jax.Array
    state: jax.Array

    @classmethod
    def create(cls, cfg: ModelConfig, pages: int, page_size: int, states: int) -> Pools:
        """Pools of zeros, spread over the mesh in force."""
        kv = (cfg.kinds.count(SOFTMAX), pages, cfg.num_kv_heads, page_size, cfg.head_dim)
        state = (cfg.kinds.count(LIGHTNING), states, cfg.num_heads, cfg.head_dim, cfg.head_dim)

        def make() -> Pools:
            keys, values = jnp.zeros(kv, cfg.dtype), jnp.zeros(kv, cfg.dtype)
            return cls(keys, values, jnp.zeros(state, jnp.float32))._pinned()

        # Compiled, so that no device of a mesh ever holds all of them.
        return jax.jit(make)()

    def _pinned(self) -> Pools:
        kv = (None, None, "kv_heads", None, None)
        return Pools(
            constrain(self.keys, *kv),
            constrain(self.values, *kv),
            constrain(self.state, None, None, "heads", None, None),
        )


class Rows(NamedTuple):
    """The rows of a burst on the host, packed into one array for the way to the device.

    token: the last one, not yet in the cache; slot: of its state, negative for an idle row;
    length: tokens in the cache; steps: most new tokens of this burst; drawn: tokens drawn so far,
    which is what the draw of the next depends on beside the seed; seed: two words; temperature,
    top_p, min_p, top_k: see `Draw`; run, halt, sure: likely tokens in a row so far, how many end
    the sample, and the log-probability that makes a token likely; forced: number of tokens that
    are given instead of drawn; stop_ids [STOPS], negative for none; forced_ids [FORCED].
    """

    token: Any
    slot: Any
    length: Any
    steps: Any
    drawn: Any
    seed: Any
    temperature: Any
    top_p: Any
    min_p: Any
    top_k: Any
    run: Any
    halt: Any
    sure: Any
    forced: Any
    stop_ids: Any
    forced_ids: Any


_WIDTHS = (*[1] * 5, 2, *[1] * 8, STOPS, FORCED)
_FLOATS = ("temperature", "top_p", "min_p", "sure")
ROW_WORDS = sum(_WIDTHS)


def idle_rows(count: int) -> np.ndarray:
    """Rows [count, ROW_WORDS] int32 that do nothing."""
    return pack_rows([Rows(0, -1, 0, 0, 0, (0, 0), 1, 1, 0, 0, 0, 1, 0, 0, [], [])] * count)


def pack_rows(rows: list[Rows]) -> np.ndarray:
    """Rows as int32 [B, ROW_WORDS], floats by their bits."""
    packed = np.full((len(rows), ROW_WORDS), -1, np.int32)
    start = 0
    for name, width in zip(Rows._fields, _WIDTHS, strict=True):
        values = [getattr(row, name) for row in rows]
        if name in _FLOATS:
            packed[:, start] = np.array(values, np.float32).view(np.int32)
        elif width == 1:
            packed[:, start] = values
        else:
            for line, value in zip(packed, values, strict=True):
                line[start : start + len(value)] = value
        start += width
    return packed


def _unpack_rows(packed: jax.Array) -> Rows:
    fields, start = [], 0
    for name, width in zip(Rows._fields, _WIDTHS, strict=True):
        value = packed[:, start] if width == 1 else packed[:, start : start + width]
        if name in _FLOATS:
            value = jax.lax.bitcast_convert_type(value, jnp.float32)
        fields.append(value)
        start += width
    return Rows(*fields)


class Burst(NamedTuple):
    """What a burst drew.

    words [B, 2 + 2 BURST] int32: number of tokens, likely tokens in a row, tokens, and the bits of
    their log-probabilities; top_ids, top_logprobs [BURST, B, alternatives], if asked for.
    """

    words: Any
    top_ids: Any
    top_logprobs: Any


class _State(NamedTuple):
    step: jax.Array
    pools: Pools
    token: jax.Array
    done: jax.Array
    gained: jax.Array
    run: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


class Programs(NamedTuple):
    """Compiled calls on models of one structure; pools are donated and given back updated."""

    prefill: Any
    decode: Any
    features: Any


@lru_cache(maxsize=8)
def compiled(graphdef: Any, treedef: Any) -> Programs:
    """The calls for a decoder's structure, the same ones for every engine.

    Args:
      graphdef: Structure of the decoder.
      treedef: Of its parameters, whose leaves every call takes.
    """
    static = {"graphdef": graphdef, "treedef": treedef}
    return Programs(
        jax.jit(partial(_prefill, **static), donate_argnames="pools"),
        jax.jit(partial(_decode, **static), donate_argnames="pools", static_argnames="wanted"),
        jax.jit(partial(_features, **static)),
    )


def decode_programs(rows: int) -> tuple[Wanted, ...]:
    """What the programs are compiled for that decode so many rows, the last one for anything.

    At each conditional a GPU waits for the host, which few rows feel: 0.04 ms of their 1.
    """
    lean = dispatch.target().platform == "gpu" and rows <= LEAN_ROWS
    return tuple(Wanted) if lean else (Wanted.ANYTHING,)


def prefill_rows(tokens: int) -> int:
    """Rows of a call that computes so many tokens of all rows together, 1 or more tokens a row."""
    return min(tokens, CPU_PREFILL_ROWS) if dispatch.target().platform == "cpu" else 1


def _model(graphdef: Any, treedef: Any, leaves: list[jax.Array]) -> Decoder:
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def _prefill(
    leaves: list[jax.Array],
    pools: Pools,
    tokens: jax.Array,
    table: jax.Array,
    places: jax.Array,
    count: jax.Array,
    images: ImageTokens | None = None,
    *,
    graphdef: Any,
    treedef: Any,
) -> Pools:
    """Takes a chunk of each of `count` rows into the cache, one after another: a row's bits are
    those that it has alone, and the host is asked once.

    Args:
      leaves: Parameters.
      pools: Donated.
      graphdef: With treedef, the decoder's structure.
      treedef: Of its parameters.
      tokens: [R, T], padded on the right.
      table: [R, W], the rows' pages.
      places: [R, 3]: state slot, tokens so far, real tokens of the chunk.
      count: [], at most R.
      images: Of the chunk's tokens, [1, T, D] and [1, T], where R is 1.
    """
    model = _model(graphdef, treedef, leaves)

    def extend(row: jax.Array | int, pools: Pools) -> Pools:
        slot, length, real = places[row]
        cache = PagedCache(*pools, table[row][None], slot[None], length[None])
        out = model(
            tokens[row][None],
            segment_ids=(jnp.arange(tokens.shape[1]) < real)[None].astype(jnp.int32),
            cache=cache,
            images=images,
            compute_logits=False,
        )
        return Pools(*out.cache[:3])

    if len(tokens) == 1:
        return extend(0, pools)._pinned()
    return jax.lax.fori_loop(0, count, extend, pools)._pinned()


def _features(
    leaves: list[jax.Array], tiles: jax.Array, *, graphdef: Any, treedef: Any
) -> jax.Array:
    """`Vision.features` of tiles [N, S, S, 3]."""
    vision = _model(graphdef, treedef, leaves).vision
    assert vision is not None
    return _whole(vision.features(tiles))


def _decode(
    leaves: list[jax.Array],
    pools: Pools,
    packed: jax.Array,
    table: jax.Array,
    steps: jax.Array,
    want_top: jax.Array,
    wanted: Wanted,
    *,
    graphdef: Any,
    treedef: Any,
) -> tuple[Pools, Burst]:
    """Up to `steps` new tokens for each row, fewer once all rows are done.

    Args:
      leaves: Parameters.
      pools: Donated.
      graphdef: With treedef, the decoder's structure.
      treedef: Of its parameters.
      packed: [B, ROW_WORDS], see `Rows`.
      table: [B, W], the rows' pages.
      steps: [] int32, at most BURST.
      want_top: [] bool, whether to look for the likeliest alternatives.
      wanted: What the rows ask for at most.
    """
    model = _model(graphdef, treedef, leaves)
    rows = _unpack_rows(packed)
    batch = packed.shape[0]
    how = Draw(rows.temperature, rows.top_p, rows.min_p, rows.top_k)
    seeds = jax.random.wrap_key_data(
        jax.lax.bitcast_convert_type(rows.seed, jnp.uint32), impl="threefry2x32"
    )
    alternatives = min(MAX_LOGPROBS, model.cfg.vocab_size)

    def top_of(logp: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(logp, alternatives)
        return ids.astype(jnp.int32), values

    def no_top(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (batch, alternatives)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    def step(s: _State) -> _State:
        s = s._replace(done=s.done | (s.step >= steps))
        slots = jnp.where(s.done, -1, rows.slot)
        cache = PagedCache(*s.pools, table, slots, rows.length + s.gained)
        real = (~s.done)[:, None].astype(jnp.int32)
        out = model(s.token[:, None], segment_ids=real, cache=cache, compute_logits=False)
        logits = _last_logits(model, out.hidden)
        token, logp = draw(logits, seeds, rows.drawn + s.gained, how, wanted)
        forced = jnp.take_along_axis(
            rows.forced_ids, jnp.minimum(s.gained, FORCED - 1)[:, None], axis=1
        )
        token = jnp.where(s.gained < rows.forced, forced[:, 0], token)
        chosen = jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]
        top_ids, top_logprobs = s.top_ids, s.top_logprobs
        if wanted is Wanted.ANYTHING:
            ids, values = jax.lax.cond(want_top, top_of, no_top, logp)
            top_ids = top_ids.at[s.step].set(ids)
            top_logprobs = top_logprobs.at[s.step].set(values)
        live = ~s.done
        gained = s.gained + live.astype(jnp.int32)
        run = jnp.where(live, jnp.where(chosen > rows.sure, s.run + 1, 0), s.run)
        stopped = jnp.any(rows.stop_ids == token[:, None], axis=1)
        return _State(
            s.step + 1,
            Pools(*out.cache[:3]),
            jnp.where(live, token, 0),
            s.done | stopped | (run >= rows.halt) | (gained >= rows.steps),
            gained,
            run,
            s.tokens.at[s.step].set(token),
            s.logprobs.at[s.step].set(chosen),
            top_ids,
            top_logprobs,
        )

    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    start = _State(
        zeros(),
        pools,
        rows.token,
        (rows.slot < 0) | (rows.steps <= 0),
        zeros(batch),
        rows.run,
        zeros(BURST, batch),
        zeros(BURST, batch, dtype=jnp.float32),
        zeros(BURST, batch, alternatives),
        zeros(BURST, batch, alternatives, dtype=jnp.float32),
    )

    def looks(s: _State) -> _State:
        """Steps between two looks at whether there is more to do; those past the end do nothing."""
        return jax.lax.fori_loop(0, _steps_a_look(), lambda _, s: step(s), s)

    end = jax.lax.while_loop(lambda s: (s.step < steps) & ~jnp.all(s.done), looks, start)
    bits = jax.lax.bitcast_convert_type(end.logprobs, jnp.int32)
    words = jnp.concatenate([end.gained[None], end.run[None], end.tokens, bits]).T
    drawn = Burst(words, end.top_ids, end.top_logprobs)
    return end.pools._pinned(), jax.tree.map(_whole, drawn)


def _whole(x: jax.Array) -> jax.Array:
    """On every device of a mesh, so that each of its processes can read it."""
    return constrain(x, *[None] * x.ndim)


def _steps_a_look() -> int:
    # A GPU is left waiting for the host at each look.
    return 4 if dispatch.target().platform == "gpu" else 1


def _last_logits(model: Decoder, hidden: jax.Array) -> jax.Array:
    """The head's float32 logits [B, vocab] of hidden [B, 1, D].

    bfloat16 hidden times bfloat16 kernel with float32 sums is the float32 product, since a product
    of two such numbers is exact in float32; but the kernel is read once instead of written out.
    """
    if model.head is None or not hidden.dtype == model.head.kernel.dtype == jnp.bfloat16:
        return model.logits(hidden)[:, 0]
    return einsum32("bd,dv->bv", hidden[:, 0], model.head.kernel[...], hidden.dtype)


@partial(jax.jit, donate_argnums=0)
def fork(pools: Pools, copies: jax.Array, count: jax.Array) -> Pools:
    """For each of the first `count` of `copies` [FORKS, 2, 2], in turn: copies state [0, 0] to
    state [0, 1], and page [1, 0] to page [1, 1].
    """

    def copy(pool: jax.Array, pair: jax.Array) -> jax.Array:
        item = jax.lax.dynamic_slice_in_dim(pool, pair[0], 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(pool, item, pair[1], axis=1)

    def one(i: jax.Array, pools: Pools) -> Pools:
        states, pages = copies[i]
        return Pools(copy(pools.keys, pages), copy(pools.values, pages), copy(pools.state, states))

    return jax.lax.fori_loop(0, count, one, pools)._pinned()


class Moved(NamedTuple):
    """Part of a row on its way: keys, values [N, MOVED_PAGES, G, page, K]; state [M, H, K, V]."""

    keys: Any
    values: Any
    state: Any


@jax.jit
def extract(pools: Pools, slot: jax.Array, pages: jax.Array) -> Moved:
    """A row's state and MOVED_PAGES of its pages; any page where there are fewer."""
    moved = Moved(pools.keys[:, pages], pools.values[:, pages], pools.state[:, slot])
    return jax.tree.map(_whole, moved)


@partial(jax.jit, donate_argnums=0)
def insert(pools: Pools, slot: jax.Array, pages: jax.Array, moved: Moved) -> Pools:
    """Writes what `extract` gave; pages past the end are dropped."""
    return Pools(
        pools.keys.at[:, pages].set(moved.keys, mode="drop"),
        pools.values.at[:, pages].set(moved.values, mode="drop"),
        pools.state.at[:, slot].set(moved.state),
    )._pinned()
