"""How every verb runs: its own flags, one-line errors, honest exit codes."""

import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import flags, logging
from ml_collections import config_flags

from spiral_jax.errors import Diverged, SpiralError, blamed, lines_in
from spiral_jax.parallel import gloo
from spiral_jax.parallel.ending import Ending
from spiral_jax.parallel.join import Unjoined, join
from spiral_jax.parallel.leaving import end_at_once
from spiral_jax.parallel.processes import Processes
from spiral_jax.run import own_code
from spiral_jax.run.config import RunConfig
from spiral_jax.run.guards import Guards

OK, FAILED, USAGE, DIVERGED = 0, 1, 2, 44

_NO_CONFIG = "--config is missing; for example --config=experiments/quickstart.py"


def run(
    verb: str, doc: str, define: Callable[[flags.FlagValues], None], main: Callable[[flags.FlagValues], None]
) -> None:
    """Parses the command line, runs `main`, and exits.

    A mistake of the user's is one line on stderr and status 2; `Interrupted` and `Diverged` have statuses of their
    own; an interrupt is 128 + signal; anything else that is raised is a defect, with traceback and status 1.

    Args:
      verb: the command's name.
      doc: its help text.
      define: declares the verb's flags on a FlagValues of its own (nothing is registered globally).
      main: the command.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "show this help", flag_values=values, short_name="h")
    flags.DEFINE_multi_string(
        "import", [], "file of your own that registers topologies, optimizers ...; may be repeated", flag_values=values
    )
    define(values)
    values.set_gnu_getopt()
    # orbax logs every step of a save, and warns when a checkpoint is opened for reading only; what a user should see
    # is printed by the commands, and failures are raised.
    logging.set_verbosity(logging.ERROR)
    try:
        rest = _parse(values, verb)
        if values.help:
            print(f"python -m spiral_jax.{verb}\n\n{doc}\n{values.main_module_help() or values.get_help()}")
            sys.exit(OK)
        if rest:
            raise SpiralError(f"unexpected argument {rest[0]!r}; flags are written --name=value")
        own_code.import_files(getattr(values, "import"))
        main(values)
    except (SpiralError, Diverged, Interrupted, KeyboardInterrupt) as error:
        status, line = _outcome(error)
        print(line, file=sys.stderr)
        sys.exit(status)
    except BrokenPipeError:
        # The reader of our output left (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


@contextlib.contextmanager
def joined(values: flags.FlagValues, guards: Guards | None = None, *, silence: float = 60.0) -> Iterator[Processes]:
    """The processes of a command that runs on several: what ends one of them in here ends all, with its status.

    Args:
      values: with the flags of `parallel.process_flags.define_processes`.
      guards: of this process; they then end the others, too.
      silence: seconds after which a process that says nothing is gone.

    Raises:
      SpiralError: as for `join`.
    """
    try:
        processes = join(values, silence)
    except Unjoined as error:
        status, line = _outcome(error.__cause__)
        print(line, file=sys.stderr, flush=True)
        end_at_once(status)
    ending = Ending(processes, silence)
    if guards is not None:
        guards.end, guards.end_alone = ending.at_once, ending.alone
    try:
        with gloo.silenced() if processes.several else contextlib.nullcontext():
            yield processes
            ending.finish()
    except Interrupted as interrupt:
        # All processes stop after the same step.
        processes.say(str(interrupt), file=sys.stderr)
        ending.finish()
        sys.exit(interrupt.status)
    except (Exception, KeyboardInterrupt) as error:
        expected = isinstance(error, SpiralError | Diverged | KeyboardInterrupt | BrokenPipeError)
        ending.leave(*_outcome(error), expected=expected)
        raise


def _outcome(error: BaseException | None) -> tuple[int, str]:
    """The exit status of what was raised, and what is printed about it."""
    match error:
        case SpiralError():
            return USAGE, f"error: {error}"
        case Diverged():
            return DIVERGED, f"diverged: {error}"
        case Interrupted():
            return error.status, str(error)
        case KeyboardInterrupt():
            return 128 + signal.SIGINT, "interrupted"
        case BrokenPipeError():
            return FAILED, "the reader of its output left"
    return FAILED, "".join(traceback.format_exception(error))


class Interrupted(Exception):
    """The command was asked to stop, and kept what it had."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def define_config(values: flags.FlagValues) -> None:
    """`--config=FILE:ARGUMENT` and `--config.field=value`."""
    config_flags.DEFINE_config_file(
        "config", None, "experiment file and its argument, as in experiments/pile.py:1.4b,spiral_b", flag_values=values
    )


def config_of(values: flags.FlagValues) -> RunConfig:
    """The validated configuration of `--config`.

    Raises:
      SpiralError: no `--config`, or a field that is not allowed.
    """
    try:
        config = values.config
        if config is None:
            raise SpiralError(_NO_CONFIG)
        return RunConfig.from_dict(config.to_dict())
    except OSError as error:
        # ml_collections keeps a failure to load the file until the configuration is asked for.
        raise SpiralError(f"--config: {_one_line(error)}") from None


def _parse(values: flags.FlagValues, verb: str) -> list[str]:
    if any(arg.startswith("--config.") for arg in sys.argv) and not any(re.match("--config(=|$)", a) for a in sys.argv):
        raise SpiralError(_NO_CONFIG)
    try:
        return values([verb, *sys.argv[1:]])[1:]
    except flags.Error as error:
        message = str(error)
        if "Traceback" in message:  # of a config file's get_config, folded in by ml_collections
            message = f"--config: {message.strip().splitlines()[-1]}"
        raise SpiralError(_one_line(message)) from None
    except (SyntaxError, ImportError) as error:
        raise SpiralError(f"--config: {type(error).__name__}: {_one_line(error)}") from None
    except SpiralError:
        raise
    except Exception as error:
        _blame_the_config_file(error)
        if not isinstance(error, AttributeError | KeyError):
            raise
        # The message names the part of the path that is unknown, quoted in several ways.
        given = next(filter(None, map(_override, re.findall(r"\w+", str(error)))), None)
        if given is None:
            raise
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"; did you mean {near[1]}?" if near else "; docs/config.md lists them all"
        raise SpiralError(f"{given} is not a field of the configuration{hint}") from None


def _blame_the_config_file(error: Exception) -> None:
    """Raises SpiralError if something was raised in the file that --config names, or in what it called."""
    given = next((arg.partition("=")[2] for arg in sys.argv[1:] if arg.startswith("--config=")), "")
    file = os.path.realpath(given) if os.path.isfile(given) else os.path.realpath(given.rpartition(":")[0])
    if lines_in(error, file):
        raise blamed(error, f"--config={given}", file) from error


def _override(name: str) -> str | None:
    """The --config.a.b on the command line that has `name` as a part."""
    paths = (arg.split("=")[0] for arg in sys.argv[1:] if arg.startswith("--config."))
    return next((path for path in paths if name in path.split(".")), None)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
