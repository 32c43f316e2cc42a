"""Turns text into token stores that training reads, on all cores; run it again to go on after a stop. Or inspects one.

python -m spiral_jax.prepare --input=my/texts --output=stores/mine --tokenizer=bpe
python -m spiral_jax.prepare --input='pile/*.jsonl.zst' --output=stores/pile --tokenizer=tokenizer.json --invalid=skip
python -m spiral_jax.prepare --inspect=stores/pile --show=3 --verify
"""

import re
from typing import Any

from absl import flags

from spiral_jax import command
from spiral_jax.corpus.prepare import prepare_folder
from spiral_jax.data.config import DataConfig
from spiral_jax.errors import SpiralError, require
from spiral_jax.parallel.signals import StopRequest

# What fields of the configuration are called here; the others have the same name.
_FLAGS = {"paths": "input", "validation_paths": "validation_input"}
_FIELDS = [
    "paths",
    "validation_paths",
    "validation_fraction",
    "exclude",
    "format",
    "text_field",
    "invalid",
    "longest_record",
    "tokenizer",
    "bpe_vocab_size",
    "separator",
    "workers",
]


def define(values: flags.FlagValues) -> None:
    default = DataConfig()
    kinds: dict[type, Any] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        tuple: flags.DEFINE_multi_string,
    }

    def flag(field: str, meaning: str) -> None:
        value = getattr(default, field)
        kinds[type(value)](_FLAGS.get(field, field), value, meaning, flag_values=values)

    flag("paths", "file, folder or glob pattern to read: text, .jsonl, .parquet, also .gz and .zst; may be repeated")
    flags.DEFINE_string("output", "", "folder to make, with train/, validation/ and the tokenizer", flag_values=values)
    flags.DEFINE_string("tokenizer", "", "bytes, bpe (trained on the input) or a tokenizer.json", flag_values=values)
    flag("validation_paths", "like --input, for validation; may be repeated")
    flag("validation_fraction", "share of the documents held out when there is no --validation_input")
    flag("exclude", "fnmatch pattern of full paths to leave out; may be repeated")
    flag("format", "what the files are: auto (by their names), text, jsonl or parquet")
    flag("text_field", "field of a jsonl record, or column of a parquet file, that holds the text")
    flag("invalid", "what to do with what is no text: error or skip")
    flag("longest_record", "most bytes of a line of jsonl, or of a text in a parquet file")
    flag("bpe_vocab_size", "entries of the tokenizer that --tokenizer=bpe trains")
    flag("separator", "text of the separator token of a tokenizer.json")
    flag("workers", "processes that tokenise; 0 for as many as there are cores")
    flags.DEFINE_string("inspect", "", "a store to look into; nothing is made", flag_values=values)
    flags.DEFINE_integer("show", 0, "with --inspect: documents to print", flag_values=values)
    flags.DEFINE_bool("verify", False, "with --inspect: read everything and check it", flag_values=values)


def main(values: flags.FlagValues) -> None:
    making = [f"--{flag}" for flag in ("input", "output") if getattr(values, flag)]
    require(values.show >= 0, "--show", values.show, "0 or more")
    if values.inspect:
        if making:
            raise SpiralError(f"{making[0]} does not go with --inspect; allowed: one of them")
        _inspect(values)
        return
    for flag in ("input", "output", "tokenizer"):
        if not getattr(values, flag):
            raise SpiralError(f"--{flag} is missing; for example --input=my/texts --output=store --tokenizer=bpe")
    for flag in ("show", "verify"):
        if getattr(values, flag):
            raise SpiralError(f"--{flag} goes with --inspect only")
    fields = {field: getattr(values, _FLAGS.get(field, field)) for field in _FIELDS}
    fields = {field: tuple(value) if isinstance(value, list) else value for field, value in fields.items()}
    with StopRequest() as stop:
        stop.hold()

        def check() -> None:
            if stop.signal is not None:
                message = f"stopped; the same command goes on from here ({values.output} is not complete)"
                raise command.Interrupted(message, 128 + stop.signal)

        try:
            prepare_folder(DataConfig(**fields), values.output, report=_report, check=check)
        except SpiralError as error:
            raise type(error)(_as_flags(str(error))) from error


def _inspect(values: flags.FlagValues) -> None:
    from spiral_jax.data.inspection import inspect

    try:
        inspect(
            values.inspect,
            show=values.show,
            verify=values.verify,
            tokenizer_file=values.tokenizer,
            separator=values.separator,
            report=_report,
        )
    except SpiralError as error:
        raise type(error)(_as_flags(str(error))) from error


def _report(line: str) -> None:
    print(line.removeprefix("data: "), flush=True)


def _as_flags(message: str) -> str:
    """A message about a field of the configuration as one about the flag."""
    return re.sub(rf"\bdata\.({'|'.join(_FIELDS)})\b", lambda found: f"--{_FLAGS.get(found[1], found[1])}", message)


if __name__ == "__main__":
    command.run("prepare", __doc__, define, main)
