"""How every verb runs: its own flags, one-line errors, honest exit codes."""

import collections
import contextlib
import functools
import importlib.util
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import flags, logging
from jax._src import xla_bridge
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from spiral_jax.errors import (
    Diverged,
    SpiralError,
    Unreachable,
    blamed,
    escape_unprintable,
    is_of_bucket,
    is_refusal,
    lines_in,
    require,
    shown,
)
from spiral_jax.hardware import has_accelerators
from spiral_jax.parallel import gloo
from spiral_jax.parallel.ending import Ending
from spiral_jax.parallel.join import Unjoined, join
from spiral_jax.parallel.leaving import HUNG, end_at_once
from spiral_jax.parallel.processes import Processes
from spiral_jax.run import failures, own_code
from spiral_jax.run.config import RunConfig
from spiral_jax.run.guards import Guards
from spiral_jax.run.overrides import as_typed

OK, FAILED, USAGE, DIVERGED = 0, 1, 2, 44

_LONGEST_LINE = 4000
# What a runtime says of a program that would fail again, and of everything else it says.
_OF_THE_PROGRAM = re.compile(
    "(RESOURCE_EXHAUSTED|INVALID_ARGUMENT|FAILED_PRECONDITION|UNIMPLEMENTED|NOT_FOUND):|.*callback", re.I
)
_NO_CONFIG = "--config is missing; for example --config=experiments/quickstart.py"


def run(
    verb: str, doc: str, define: Callable[[flags.FlagValues], None], main: Callable[[flags.FlagValues], None]
) -> None:
    """Parses the command line, runs `main`, and exits.

    A mistake of the user's is one line on stderr and status 2; `Interrupted` and `Diverged` have statuses of their
    own; a bucket that does not answer is 43; an interrupt is 128 + signal; anything else that is raised is a defect,
    with traceback and status 1.

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
    failures.silence()
    escape_unprintable()
    try:
        rest = _parse(values, verb)
        if values.help:
            print(f"python -m spiral_jax.{verb}\n\n{doc}\n{values.get_help()}")
            sys.exit(OK)
        if rest:
            raise SpiralError(f"the argument {rest[0]!r} belongs to no flag; allowed: flags, as in --name=value")
        own_code.import_files(getattr(values, "import"))
        _pass_over_absent_tpu()
        with _platforms_blamed():
            main(values)
    except BrokenPipeError:
        # The reader of our output left (`| head`); there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except (Exception, KeyboardInterrupt) as error:
        if not (isinstance(error, SpiralError | Diverged | Interrupted | KeyboardInterrupt) or is_of_bucket(error)):
            raise
        status, line = _outcome(error)
        print(line, file=sys.stderr)
        sys.exit(status)


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
        with _platforms_blamed(), gloo.silenced() if processes.several else contextlib.nullcontext():
            yield processes
            ending.finish()
    except Interrupted as interrupt:
        # All processes stop after the same step.
        processes.say(str(interrupt), file=sys.stderr)
        ending.finish()
        sys.exit(interrupt.status)
    except (Exception, KeyboardInterrupt) as error:
        expected = isinstance(error, SpiralError | Diverged | KeyboardInterrupt | BrokenPipeError)
        expected = expected or is_of_bucket(error)
        ending.leave(*_outcome(error), expected=expected)
        raise


def _pass_over_absent_tpu() -> None:
    """Keeps jax from libtpu, which the extra `tpu` brings for `aot`, on a machine without accelerators.

    jax would start it and wait, it would warn in ten lines, and its profiler would end the process.
    """
    asked: str | None = jax.config.values["jax_platforms"]
    if not asked and not has_accelerators() and importlib.util.find_spec("libtpu") is not None:
        jax.config.update("jax_platforms", "cpu")


def compute_in(dtype: str) -> None:
    """Has accelerators compute products of float32 in float32, where they would take bfloat16 or TF32 for it.

    It holds for this process, which computes in nothing else.
    """
    if dtype == "float32" and has_accelerators():
        jax.config.update("jax_default_matmul_precision", "highest")


@contextlib.contextmanager
def _platforms_blamed() -> Iterator[None]:
    """Makes one line of what jax raises where it cannot start the platforms that JAX_PLATFORMS names.

    Raises:
      SpiralError: it cannot.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        wanted = os.environ.get("JAX_PLATFORMS")
        if not wanted or not lines_in(error, os.path.realpath(xla_bridge.__file__)):
            raise
        if xla_bridge.backends_are_initialized():
            raise
        reason = _one_line(error).partition(" (set JAX_PLATFORMS")[0] or "no such device is found"
        raise SpiralError(
            f"JAX_PLATFORMS is {wanted!r}; allowed: a platform of this machine, or nothing for what there is ({reason})"
        ) from error


def _outcome(error: BaseException | None) -> tuple[int, str]:
    """The exit status of what was raised, and what is printed about it."""
    match error:
        case Unreachable():
            return HUNG, f"error: {_cut(error)}; the same command goes on"
        case SpiralError():
            return USAGE, f"error: {_cut(error)}"
        case Diverged():
            return DIVERGED, f"diverged: {error}"
        case Interrupted():
            return error.status, str(error)
        case _ if error is not None and is_of_bucket(error):
            status = USAGE if is_refusal(error) else HUNG
            return status, f"error: a bucket refuses, or does not answer ({type(error).__name__}: {_cut(error)})"
        case KeyboardInterrupt():
            return 128 + signal.SIGINT, "interrupted"
        case BrokenPipeError():
            return FAILED, "the reader of its output left"
        case jax.errors.JaxRuntimeError() if not _OF_THE_PROGRAM.match(str(error).partition("\n")[0]):
            # A chip that halted, a network that broke: no other try need meet it.
            return HUNG, "".join(traceback.format_exception(error))
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
    given = _given_config()
    config = values.config
    if config is None and not given:
        raise SpiralError(_NO_CONFIG)
    try:
        to_dict = getattr(config, "to_dict", None)
    except OSError as error:
        # ml_collections keeps it until the configuration is asked for.
        raise SpiralError(_unreadable(error)) from None
    if to_dict is None:
        raise SpiralError(f"--config={given}: get_config gives {shown(config)}; allowed: a ConfigDict")
    return RunConfig.from_dict(to_dict())


def _parse(values: flags.FlagValues, verb: str) -> list[str]:
    _check_arguments(values)
    arguments, empty = as_typed(sys.argv[1:])
    try:
        rest = values([verb, *arguments])[1:]
        _empty(values, empty)
    except flags.Error as error:
        raise SpiralError(_of_flags(values, error, verb)) from None
    except (SyntaxError, ImportError, OSError) as error:
        raise SpiralError(_unreadable(error)) from None
    except SystemExit as stop:
        raise SpiralError(f"--config={_given_config()}: SystemExit: {_one_line(stop)}") from None
    except SpiralError:
        raise
    except Exception as error:
        _blame_the_config_file(error)
        if "get_config" in str(error):
            raise SpiralError(
                f"--config={_given_config()} has no function get_config; allowed: a file with one"
            ) from None
        if isinstance(error, RecursionError | MemoryError):  # of Python's parser
            raise SpiralError("--config: a value is nested too deeply; allowed: numbers, texts and tuples") from None
        if not isinstance(error, AttributeError | KeyError):
            raise
        # The message names the part of the path that is unknown, quoted in several ways.
        given = next(filter(None, map(_override, re.findall(r"\w+", str(error)))), None)
        if given is None:
            raise
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"; did you mean {near[1]}?" if near else "; docs/config.md lists them all"
        raise SpiralError(f"{given} is not a field of the configuration{hint}") from None
    for name in values:
        value: object = values[name].value
        if isinstance(value, float):
            require(math.isfinite(value), f"--{name}", value, "a finite number")
    return rest


def _empty(values: flags.FlagValues, fields: Sequence[str]) -> None:
    """Sets fields of the configuration to None."""
    for field in fields:
        *path, name = field.split(".")
        setattr(functools.reduce(getattr, path, values.config), name, None)


def _check_arguments(values: flags.FlagValues) -> None:
    """Raises SpiralError for what the libraries that read the command line pass over, or say at length."""
    given = [arg.partition("=")[0].lstrip("-") for arg in sys.argv[1:] if arg.startswith("-")]
    overrides = [name for name in given if name.removeprefix("no").startswith("config.")]
    if overrides and "config" not in given:
        raise SpiralError(_NO_CONFIG)
    if overrides and given.index("config") > given.index(overrides[0]):
        raise SpiralError(f"--{overrides[0]} comes before --config; allowed: after it")
    for name, times in collections.Counter(given).items():
        is_several = name in values and isinstance(values[name], flags.MultiFlag)
        if times > 1 and not is_several and (name in values or name in overrides):
            raise SpiralError(f"--{name} is given {times} times; allowed: once")
    file = _given_config().partition(":")[0]
    if "config" in values and "config" in given and not os.path.isfile(file):
        raise SpiralError(f"--config is {_given_config()!r}; allowed: a file that exists, as in FILE.py:ARGUMENT")


def _of_flags(values: flags.FlagValues, error: flags.Error, verb: str) -> str:
    """What is wrong with the flags, in the words of this package rather than the library's."""
    message = str(error)
    if "Traceback" in message:  # of a config file's get_config, folded in by ml_collections
        return f"--config={_given_config()}: {_one_line(message.strip().splitlines()[-1])}"
    if isinstance(error, flags.UnrecognizedFlagError):
        near = re.search(r"Did you mean: (\w+)", message)
        hint = f"--{near[1]}, or another" if near else "those"
        return f"--{error.flagname} is no flag of {verb}; allowed: {hint} that python -m spiral_jax.{verb} --help lists"
    if found := re.match(r"flag --([^=\s]+)=(.*): ", message, re.DOTALL):
        name = found[1]
        given = next((arg.partition("=")[2] for arg in sys.argv if arg.lstrip("-").startswith(f"{name}=")), found[2])
        allowed = _allowed(values[name]) if name in values else ""
        return f"--{name} is {shown(given)}; allowed: {allowed or _one_line(message[found.end() :])}"
    return _one_line(message)


def _allowed(flag: flags.Flag) -> str:
    """What the value of a flag may be, or nothing where its parser says more."""
    if flag.boolean:
        return "true or false"
    if isinstance(flag.parser, flags.EnumParser):
        return ", ".join(flag.parser.enum_values)
    if isinstance(flag.parser, tuple_parser.TupleParser):
        return "a tuple, as in '(4, 2, 1)'"
    if type(flag.parser).__name__ == "_ConfigDictParser":  # of ml_collections, and private
        return f"its fields, as in --{flag.name}.FIELD=VALUE"
    return flag.parser.syntactic_help if isinstance(flag.parser, flags.IntegerParser | flags.FloatParser) else ""


def _unreadable(error: Exception) -> str:
    """What to say where the file of --config cannot be read to its end."""
    reason = error.__cause__ or error
    return f"--config={_given_config()}: {type(reason).__name__}: {_one_line(reason)}"


def _given_config() -> str:
    """What follows --config on the command line, or nothing."""
    for arg, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=False):
        if found := re.fullmatch(r"--?config(=(?P<value>.*))?", arg, re.DOTALL):
            return following if found["value"] is None else found["value"]
    return ""


def _blame_the_config_file(error: Exception) -> None:
    """Raises SpiralError if something was raised in the file that --config names, or in what it called."""
    given = _given_config()
    file = os.path.realpath(given) if os.path.isfile(given) else os.path.realpath(given.rpartition(":")[0])
    if lines_in(error, file):
        raise blamed(error, f"--config={given}", file) from error


def _override(name: str) -> str | None:
    """The --config.a.b on the command line that has `name` as a part."""
    paths = (arg.split("=")[0] for arg in sys.argv[1:] if arg.startswith("--config."))
    return next((path for path in paths if name in path.split(".")), None)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _cut(error: object) -> str:
    """A message as a line that can be read, whatever names and values are in it."""
    line = " ".join(str(error).splitlines())
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."
