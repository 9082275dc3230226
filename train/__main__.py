"""`python -m train --config=configs/NAME.py --workdir=DIR`: flags → config → task."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

if TYPE_CHECKING:
    from train.config import JobConfig

SECTIONS = (
    *("model", "mesh", "sharding", "data", "optimizer", "dpo", "checkpoint"),
    *("evaluation", "cispo", "sampling", "curriculum", "asynchronous", "alerts", "rewards"),
)
# Any key of the job may be set on the command line, whether or not the file names it; `build`
# knows them all and checks them.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Job: a file of configs/.", lock_config=False, accept_new_attributes=True
)
_GIN = flags.DEFINE_multi_string("gin_file", [], "gin overlay files, later ones win.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Ask the cluster (Slurm, Open MPI, Cloud TPU, Kubernetes) for the job's other processes.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0 (or JAX_COORDINATOR_ADDRESS)."
)
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the job (or JAX_NUM_PROCESSES)."
)
_PROCESS = flags.DEFINE_integer("process_id", None, "Of this process (or JAX_PROCESS_ID).")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, export.")


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser; a section that the config file leaves out can be set all the same."""
    parser = flags.FLAGS["config"].parser
    read = parser.parse

    def parse(argument: str) -> ConfigDict:
        try:
            config: ConfigDict = read(argument)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            sys.exit(_complain(_told_by_file(argument, error)))
        if not hasattr(config, "unlocked"):  # Of a file that is missing this says so.
            kind = type(config).__name__
            sys.exit(_complain(f"get_config() of {argument} returns no ConfigDict but a {kind}"))
        with config.unlocked():
            for section in SECTIONS:
                if section not in config:
                    config[section] = ConfigDict()
        return config

    parser.parse = parse  # type: ignore[method-assign]
    try:
        return list(app.parse_flags_with_usage(argv))
    except OSError as error:
        sys.exit(_complain(error))
    except (AttributeError, KeyError) as error:
        cause = error.args[0] if error.args else error
        text = cause.args[0] if isinstance(cause, KeyError) else cause
        sys.exit(_complain(f"unknown section in a --config flag: {' '.join(str(text).split())}"))


def _told_by_file(argument: str, error: Exception) -> str:
    """What a config file has raised, with its line.

    ml_collections puts the traceback of some errors into the text of another one.
    """
    cause = error.__context__ if isinstance(error, TypeError | ValueError) else error
    kind = "" if type(cause) is ValueError else f"{type(cause).__name__}:"
    name = Path(argument.partition(":")[0]).name
    frames = traceback.extract_tb(cause.__traceback__ if cause else None)
    lines = [f"line {f.lineno}:" for f in frames if Path(f.filename).name == name]
    return " ".join([f"{argument}:", *lines[-1:], *kind.split(), *str(cause).split()])


def _complain(error: object) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def job_config() -> JobConfig:
    """The job that the flags describe.

    Raises:
      ConfigError: they describe none.
    """
    from train.config import build
    from train.gin_overlay import apply_gin

    explicit = list(config_flags.get_override_values(flags.FLAGS["config"]))
    apply_gin(_CONFIG.value, _GIN.value, explicit)
    return build(_CONFIG.value)


def _check_workdir(path: Path) -> None:
    """Raises ConfigError for a folder that there is not and cannot be, before it is needed."""
    from mmjax.config import ConfigError

    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        what = "cannot be written to" if there.is_dir() else "is no folder"
        raise ConfigError(f"--workdir={path}: {there} {what}")


def main(argv: list[str]) -> None:
    """Runs the job; an error that the user can mend ends in one message and exit code 2."""
    if len(argv) > 1:
        sys.exit(f"unexpected argument {argv[1]!r}; a key is set by --config.KEY=VALUE")
    # Imported late, so that --help and a wrong flag answer at once.
    from train.allocator import keep_freed_memory
    from train.errors import USER_ERRORS

    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    keep_freed_memory()
    try:
        cfg = job_config()
        workdir = Path(str(_WORKDIR.value))
        _check_workdir(workdir)
        from train import distributed

        distributed.join(
            _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, detect=_DISTRIBUTED.value
        )
        from train.tasks import run_task  # after the checks: it takes seconds

        job = run_task(cfg, workdir)
    except USER_ERRORS as error:
        sys.exit(_complain(error))
    if job.stop_reason is not None:
        print(
            f"stopped after step {int(job.state.step)} with a checkpoint: {job.stop_reason}",
            file=sys.stderr,
        )
        sys.exit(3)
    if job.stop_signal is not None:
        print(
            f"stopped by a signal after step {int(job.state.step)} with a checkpoint; "
            "run the same command to go on",
            file=sys.stderr,
        )
        sys.exit(128 + job.stop_signal)


if __name__ == "__main__":
    # Warnings of XLA's thread pools and the like would break the progress line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
