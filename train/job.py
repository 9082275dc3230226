"""What every task shares: mesh, model, checkpoints, metrics, signals, the end of a job."""

from __future__ import annotations

import dataclasses
import gc
import operator
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

import mmjax
from mmjax.config import ConfigError, ModelConfig
from mmjax.convert.api import open_params
from mmjax.model import Decoder
from mmjax.sharding import DEFAULT_RULES, make_mesh, param_shardings
from mmjax.tokenizer import Tokenizer
from train import distributed
from train.checkpoint import Checkpoints
from train.config import JobConfig
from train.data.streams import Resumable
from train.metrics import Metrics
from train.optimizer import check_frozen, make_optimizer
from train.stages import Stage, resolve
from train.state import TrainState, init_state

type Scalars = Mapping[str, jax.Array | float]


class Job:
    """One running job.

    Args:
      cfg: Typed configuration.
      workdir: Folder of the job: checkpoints, metrics, tokenizer, export.
      tokenizer: Of the data; its size raises the model's vocabulary.
      updates: Optimizer updates of the whole job, for the schedule.
      devices: To train on; None for all.
    """

    def __init__(
        self,
        cfg: JobConfig,
        workdir: Path,
        tokenizer: Tokenizer,
        updates: int,
        devices: Sequence[Any] | None = None,
    ) -> None:
        self.cfg, self.workdir, self.tokenizer = cfg, workdir, tokenizer
        self.stop_signal: int | None = None
        self.metrics: Metrics | None = None  # While it runs.
        # Set by a step: why the job is to stop after it, with a checkpoint.
        self.stop_reason: str | None = None
        self.mesh = make_mesh(cfg.mesh, devices)
        batch_axes = DEFAULT_RULES.spec(("batch",), of="batch")
        self.batch_sharding = NamedSharding(self.mesh, batch_axes)
        model = self._initial_model()
        self.model_cfg = model.cfg
        self.frozen = cfg.optimizer.frozen
        check_frozen(nnx.state(model), self.frozen)
        if model.cfg.vision is not None and cfg.data.source != "pictures":
            self.frozen = (*self.frozen, "vision.*")  # Weight decay alone would move it.
        stages = resolve(cfg) if cfg.stages else ()
        self.optimizer = make_optimizer(cfg.optimizer, updates, self.frozen, stages)
        with jax.set_mesh(self.mesh):
            self.graphdef, self.state = init_state(model, self.optimizer, cfg.seed)
        self.state = self._replicate_scalars(self.state)

    def _initial_model(self) -> Decoder:
        if self.cfg.init_from:
            return self._loaded_model(Path(self.cfg.init_from))
        vocab = max(self.cfg.model.vocab_size, self.tokenizer.vocab_size)
        if vocab > self.cfg.model.vocab_size and distributed.is_primary():
            told = f"model.vocab_size {self.cfg.model.vocab_size} raised to the tokenizer's {vocab}"
            print(told, file=sys.stderr)
        shape = dataclasses.replace(
            self.cfg.model, vocab_size=vocab, eos_token_id=self.tokenizer.eos_id
        )

        def make() -> Decoder:
            return Decoder(shape, rngs=nnx.Rngs(self.cfg.seed), remat=self.cfg.remat)

        # Initialised under jit with sharded outputs, a large model never exists on one device.
        abstract = nnx.eval_shape(make)
        graphdef, params = nnx.split(abstract)
        shardings = param_shardings(params, self.mesh, self.cfg.sharding)
        # XLA's CPU compiler takes half a minute to optimise what runs once, for milliseconds.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        draw = jax.jit(
            lambda: nnx.split(make())[1], out_shardings=shardings, compiler_options=quick
        )
        made = draw()
        return nnx.merge(graphdef, made)

    def _loaded_model(self, source: Path) -> Decoder:
        """The parameters in a folder, under the settings that the job names beside it."""
        asked = {key: operator.attrgetter(key)(self.cfg.model) for key in self.cfg.model_keys}
        cfg = open_params(source, asked.get("param_dtype")).cfg
        if cfg.vocab_size < self.tokenizer.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids, the model in {source} only "
                f"{cfg.vocab_size}"
            )
        cfg = settled(cfg, asked, source)
        model = mmjax.load(
            source, mesh=self.mesh, rules=self.cfg.sharding, dtype=asked.get("param_dtype")
        )
        model = with_config(model, cfg)
        model.remat = self.cfg.remat
        return model

    def enter(self, stage: Stage) -> None:
        """Takes on the settings of a stage: the steps from here on are compiled for them."""
        self.cfg = dataclasses.replace(self.cfg, data=stage.data, optimizer=stage.optimizer)
        model = self.model
        changes: dict[str, Any] = dict(stage.model)
        model.cfg = dataclasses.replace(model.cfg, **changes)
        self.graphdef, self.model_cfg = nnx.graphdef(model), model.cfg

    def _replicate_scalars(self, state: TrainState) -> TrainState:
        """Puts what is not a parameter's twin (step, counts, key) on the whole mesh."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def place(x: jax.Array) -> jax.Array:
            on_mesh = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == self.mesh
            return x if on_mesh else jax.device_put(x, everywhere)

        return jax.tree.map(place, state)

    @property
    def model(self) -> Decoder:
        """The model with the parameters of the current state."""
        return nnx.merge(self.graphdef, self.state.params)

    @property
    def rows(self) -> np.ndarray:
        """Rows of a batch that lie on a device of this process; it need not read others.

        Raises:
          ConfigError: the batch does not divide over the mesh.
        """
        count = self.cfg.data.batch_size
        self.check_rows(count // self.cfg.optimizer.microbatches)
        placed = self.batch_sharding.addressable_devices_indices_map((count,))
        every = np.arange(count)
        return np.unique(np.concatenate([every[index] for index in placed.values()]))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Places a batch on the mesh, its first axis over the batch axes.

        Raises:
          ConfigError: the batch does not divide.
        """
        for x in batch.values():
            self.check_rows(x.shape[0])
        return {
            name: jax.make_array_from_callback(x.shape, self.batch_sharding, x.__getitem__)
            for name, x in batch.items()
        }

    def check_rows(self, rows: int) -> None:
        """Raises ConfigError where the mesh does not divide so many rows."""
        parts = int(np.prod([self.mesh.shape[a] for a in DEFAULT_RULES.batch]))
        if rows % parts:
            raise ConfigError(
                f"a batch of {rows} rows does not divide over data·expert = {parts} devices; "
                "change the batch size, the microbatches or the mesh"
            )

    def run(
        self,
        data: Resumable,
        step: Callable[[TrainState, Any], tuple[TrainState, Scalars]],
        *,
        finish_early: Callable[[Scalars], bool] = lambda _: False,
    ) -> Metrics:
        """The loop: resume, step, log one step late, checkpoint, stop cleanly on a signal.

        Args:
          data: Checkpointable iterator; each step consumes one item.
          step: `(state, item) -> (state, metrics)`.
          finish_early: Whether the job ends after a step with these metrics.

        Returns:
          The metrics, with the history of the whole job.
        """
        cfg = self.cfg
        distributed.wait_for_all("tokenizer")  # No process may still look for the workdir's.
        if distributed.is_primary():
            self.workdir.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(self.workdir)
        distributed.wait_for_all("workdir")
        checkpoints = Checkpoints(self.workdir, cfg.checkpoint)
        # Orbax brings scalars back on one device, whatever they were on.
        self.state = self._replicate_scalars(checkpoints.restore(self.state, data) or self.state)
        start = int(self.state.step)
        pending: tuple[int, Scalars] | None = None
        with (
            jax.set_mesh(self.mesh),
            closing(checkpoints),
            Metrics(
                self.workdir, cfg.task, start, cfg.steps, silent=not distributed.is_primary()
            ) as metrics,
            self._catch_signals(),
            _spared_by_collector() as spare,
        ):
            self.metrics = metrics
            if start:
                metrics.console.print(f"resumed from step {start} of {cfg.steps}")

            def flush() -> None:
                nonlocal pending
                if pending is not None:
                    values = {k: float(v) for k, v in jax.device_get(dict(pending[1])).items()}
                    metrics.log(pending[0], values, show=pending[0] % cfg.log_every == 0)
                pending = None

            number = start
            finished = any(finish_early(values) for values in metrics.history)
            while number < cfg.steps and not (finished or self.stop_signal or self.stop_reason):
                self.state, values = step(self.state, next(data))
                number += 1
                if number == start + 1:
                    spare()
                flush()
                pending = number, values
                finished = finish_early(values)
                if distributed.should_stop(number):
                    self.stop_signal = signal.SIGTERM
                if (every := cfg.checkpoint.export_every) and number % every == 0:
                    self.export(f"model-{number}")  # Before a checkpoint that would skip it.
                if number % cfg.checkpoint.every == 0:
                    # A resume starts after the checkpoint and would leave its step unlogged.
                    flush()
                    checkpoints.save(self.state, data)
            flush()
            checkpoints.save(self.state, data)
        return metrics

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the loop after the step; a second one kills.

        Several processes stop after the same step: JAX takes SIGTERM to any of them to all, see
        `distributed.should_stop`, and SIGINT kills.
        """

        def note(number: int, _: object) -> None:
            self.stop_signal = number
            signal.signal(number, signal.SIG_DFL)

        caught = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        before = {s: signal.signal(s, note) for s in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def export(self, name: str = "model") -> Path | None:
        """Writes the model folder that the config asks for, replacing an earlier one.

        Args:
          name: Of the folder, which appears in the workdir when it is whole.
        """
        match self.cfg.checkpoint.export:
            case "hf" | "hf-native" as layout:
                pass
            case _:
                return None
        folder, unfinished = self.workdir / name, self.workdir / f"{name}.unfinished"
        if distributed.is_primary():
            shutil.rmtree(unfinished, ignore_errors=True)
        distributed.wait_for_all("there is room to export")
        mmjax.save(self.model, unfinished, layout, tokenizer_from=self.workdir)
        if distributed.is_primary():
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        distributed.wait_for_all("exported")
        return folder


@contextmanager
def _spared_by_collector() -> Iterator[Callable[[], None]]:
    """Yields a call after which Python's collector leaves alone what there is by then.

    Compiled programs leave some 600,000 objects. Sampling makes enough new ones for a collection
    that looks through them all every few batches, and it stops a job for 0.3 to 0.5 s.
    """

    def spare() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield spare
    finally:
        gc.unfreeze()


# Keys of a trained model that a job may change, and those that say only how one begins.
_OF_A_JOB = (
    *("dtype", "rope_theta", "max_position_embeddings"),
    *("router_aux_loss_coef", "router_aux_loss_over", "expert_capacity_factor"),
)
_OF_A_START = ("param_dtype", "initializer_range", "bos_token_id", "eos_token_id")


def settled(cfg: ModelConfig, asked: Mapping[str, Any], source: Path) -> ModelConfig:
    """A loaded model's config with the settings that a job names beside init_from.

    Args:
      cfg: Of the model in `source`.
      asked: Keys of `model`, "vision.…" for the vision half's, and their values.
      source: Its folder.

    Raises:
      ConfigError: a setting that the parameters contradict.
    """
    has = flatten_dict(dataclasses.asdict(cfg), sep=".")
    wrong = [
        f"model.{key} {value!r} (there {has.get(key)!r})"
        for key, value in asked.items()
        if key not in (*_OF_A_JOB, *_OF_A_START)
        and has.get(key) != value
        # A tokenizer may have raised it.
        and not (key == "vocab_size" and has[key] > value)
    ]
    if wrong:
        raise ConfigError(
            f"init_from {source} holds another model than {', '.join(wrong)}; leave these keys "
            f"out, as a job that starts from a model can set {', '.join(_OF_A_JOB)} alone"
        )
    return dataclasses.replace(cfg, **{k: asked[k] for k in _OF_A_JOB if k in asked})


def with_config(model: Decoder, cfg: ModelConfig) -> Decoder:
    """The same parameters in a decoder of a config that differs in what has no shape."""
    if cfg == model.cfg:
        return model
    structure = nnx.graphdef(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(structure, nnx.state(model))
