"""The configuration reference, generated from the dataclasses and their docstrings.

python -m spiral_jax.reference > docs/config.md
"""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from absl import flags

from spiral_jax import command
from spiral_jax.run.config import MUTABLE, RunConfig

_INTRODUCTION = """\
# Configuration

<!-- Generated: python -m spiral_jax.reference > docs/config.md -->

Every field of a run, with its type, default and meaning. An experiment file sets what differs from the defaults; a
command line sets what differs from the experiment:

```
python -m spiral_jax.train --config=experiments/quickstart.py --workdir=DIR \\
  --config.train.steps=500 --config.model.topology=anchor '--config.model.chunks=(4, 2, 1)'
```

An unknown field, a value of the wrong type and a value that is not allowed stop the command with one line that names
the field. `WORKDIR/config.json` holds what the run was last started with.
"""

# What `RunConfig.check_resume` refuses, and what a run says of stores with other tokens.
_RULES = """\
`train.steps` may change where the learning rate is at its constant peak, under the old and the new number:

- It cannot go below the steps that are done.
- With `optimizer.schedule` `cosine` it cannot change once a step is done: every learning rate depends on it.
- With `wsd` and `constant` it may change while the learning rate is constant. The step that the run resumes from must
  lie after warm-up and, with `wsd`, not after the start of the decay, counted with the old and with the new number.
  (`optimizer.warmup_fraction` and `optimizer.decay_fraction` are fractions of `train.steps`.)

`train.skip_steps` may change for the steps that are not done yet. A run that was imported and has no step yet may
change everything but the architecture. `upcycle.*` is read at the first start only, but has to be given again.

`data.stores` may name the same tokens elsewhere; their fingerprints are compared. `data.weights` and
`data.stage_starts` may change for the steps that are not done yet, and then with further stores at the end of
`data.stores`.

Any other difference stops the command with the field, the saved value and the given value."""


def markdown() -> str:
    """The whole reference, as in docs/config.md.

    Raises:
      ValueError: a field that its class docstring does not document, or a documented name that is not a field.
    """
    sections = [_INTRODUCTION, _on_resume(), f"## Top level\n\n{table(RunConfig)}\n"]
    for name, hint in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(hint):
            summary = " ".join((inspect.getdoc(hint) or "").partition("\n\n")[0].split())
            sections.append(f"## {name}\n\n{summary}{_room_on_resume(name)}\n\n{table(hint, f'{name}.')}\n")
    return "\n".join(sections)


def table(config_class: Any, prefix: str = "") -> str:
    """The fields of one dataclass as a Markdown table; fields that are dataclasses have tables of their own.

    Args:
      config_class: a dataclass in which every field has a default.
      prefix: what is put before the fields' names.

    Raises:
      ValueError: as for `markdown`.
    """
    hints, meanings, defaults = typing.get_type_hints(config_class), _meanings(config_class), config_class()
    class_name = config_class.__name__
    if unknown := sorted(meanings.keys() - hints.keys()):
        raise ValueError(f"{class_name}.{unknown[0]} is documented, but not a field")
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            continue
        if not meanings.get(name):
            raise ValueError(f"{class_name}.{name} has no meaning under Attributes: in its class docstring")
        codes = (prefix + name, _type_name(hint), _literal(getattr(defaults, name)))
        lines.append(f"| {' | '.join(map(_code, codes))} | {_text(meanings[name])} |")
    return "\n".join(lines)


def _meanings(config_class: Any) -> dict[str, str]:
    """What the docstring's `Attributes:` section says of each field; `a, b: text` covers both."""
    _, _, section = (inspect.getdoc(config_class) or "").partition("\nAttributes:\n")
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if entry := re.fullmatch(r"  (\w+(?:, \w+)*):\s*(.*)", line):
            names = entry[1].split(", ")
            meanings |= dict.fromkeys(names, entry[2])
        elif re.match(r"  \S", line):
            raise ValueError(f"{config_class.__name__}: no `name: meaning` under Attributes: in {line.strip()!r}")
        elif re.match(r"\S", line):
            break
        else:
            for name in names:
                meanings[name] = f"{meanings[name]} {line.strip()}".strip()
    return meanings


def _on_resume() -> str:
    rooms = [f"`{entry}*`" for entry in MUTABLE if entry.endswith(".")]
    fields = [f"`{entry}`" for entry in MUTABLE if not entry.endswith(".")]
    return (
        "## What may change on resume\n\n"
        "The same `--workdir` again resumes its run. These fields may then differ from what the run was saved with:\n"
        f"{', '.join(rooms + fields)}.\n"
        "They say where and how a run runs and what is watched. With another mesh or accumulation the batches are the\n"
        f"same and the loss is the same to rounding, not bit for bit.\n\n{_RULES}\n"
    )


def _room_on_resume(room: str) -> str:
    if f"{room}." in MUTABLE:
        return " May change on resume."
    fields = [f"`{entry}`" for entry in MUTABLE if entry.startswith(f"{room}.")]
    sentence = f" {', '.join(fields)} may change on resume." if fields else ""
    rules = {"train": " For `train.steps` see the rule above.", "data": " For the mixture see the rule above."}
    return sentence + rules.get(room, "")


def _type_name(hint) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(_literal, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    return hint.__name__ if typing.get_origin(hint) is None else str(hint)


def _literal(value) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _code(text: str) -> str:
    return f"`{_escape_pipes(text)}`"


def _text(text: str) -> str:
    """Prose in a cell: pipes would end it, and outside `code` angle brackets would be taken for HTML."""
    parts = _escape_pipes(text).split("`")
    parts[::2] = [part.replace("<", "&lt;").replace(">", "&gt;") for part in parts[::2]]
    return "`".join(parts)


def _escape_pipes(text: str) -> str:
    return text.replace("|", "\\|")


def define(values: flags.FlagValues) -> None:
    """No flags of its own."""
    del values


def main(values: flags.FlagValues) -> None:
    del values
    print(markdown(), end="")


if __name__ == "__main__":
    command.run("reference", __doc__, define, main)
