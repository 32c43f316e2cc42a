"""One launch: what runs, on which slice, where it writes, and how much it may cost. Checked when it is made."""

import argparse
import dataclasses
import hashlib
import math
import re
from typing import Any, NoReturn

from spiral_jax.errors import SpiralError, require
from spiral_jax.hardware import Slice, parse_slice, region_of
from tpu.bucket import URL

PROVIDERS = ("qr", "vm", "gke")
PRICINGS = ("spot", "reserved", "on_demand", "flex_start")

LABEL = "spiral-jax"  # of whatever is created for a job, with its name; `reap` looks for it
ROOT_LABEL = "spiral-jax-root"  # which folder on which bucket: two people may have had the same idea of a name

_FILE = r"(?!.*\.\./)\w[-\w./]*\.py"
# Of each field that goes into commands, paths and labels: what it may be, and in words. None may begin with a dash.
_TEXTS = {
    "NAME": (
        r"[a-z]([-a-z0-9]{0,26}[a-z0-9])?",
        "at most 28 lower-case letters, digits and dashes, a letter first, no dash last",
    ),
    "--bucket": (URL, "gs://BUCKET or gs://BUCKET/PREFIX, a bucket of lower-case letters, digits and -_."),
    "--project": (
        r"([a-z0-9][a-z0-9.-]*:)?[a-z][-a-z0-9]{4,28}[a-z0-9]",
        "a project's id, 6 to 30 lower-case letters, digits and dashes",
    ),
    "--network": (r"[a-z0-9]([-a-z0-9./_]{0,200}[a-z0-9])?", "a name, or projects/P/... as gcloud prints it"),
    "--service_account": (
        r"[a-z0-9][-a-z0-9]*@[a-z0-9][-a-z0-9.]*\.gserviceaccount\.com",
        "NAME@PROJECT.iam.gserviceaccount.com",
    ),
    "--config": (rf"{_FILE}(:[-\w.,=+/:]*)?", "a file in this tree and its argument, as in FILE.py:ARGUMENT"),
    "--import": (_FILE, "a file in this tree, as in topologies/mine.py"),
    "--image": (r"\w[\w./:@-]{0,300}", "a container image, as in REGISTRY/NAME:TAG"),
    "the argument": (
        r"--config(\.[A-Za-z_]\w*)+=[^\x00-\x1f\x7f]*",
        "flags of the launcher, and --config.FIELD=VALUE",
    ),
}


def _flag(what: str, default: Any = dataclasses.MISSING, **how: Any) -> Any:
    """A field of `Job` that is a flag: what it is, as `--help` says it, and how argparse takes it."""
    return dataclasses.field(default=default, metadata={"help": what, **how})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One launch. Its fields are its flags, and say what they are; all of them are checked when it is made."""

    name: str = _flag(
        "of the queued resource, its node and the folder on the bucket: letters, digits and dashes", metavar="NAME"
    )
    slice: Slice = _flag("TPU slice, as in v5p-128 or v5p:4x4x4", type=lambda text: parse_slice(text, "--accelerator"))
    num_slices: int = _flag("how many of it, joined by the data-center network", 1, type=int)
    zone: str = _flag("of Google Cloud, as in us-east5-a")
    bucket: str = _flag(
        "gs://BUCKET or gs://BUCKET/PREFIX, in the region of the zone; everything of the job lies under it",
        type=lambda url: url.rstrip("/"),
    )
    project: str = _flag("of Google Cloud; default: gcloud's", "")
    provider: str = _flag("qr (queued resources), vm (created directly) or gke", "qr")
    pricing: str = "spot"  # a flag for each
    network: str = _flag("default: the project's", "")
    subnetwork: str = _flag("default: the project's", "")
    service_account: str = _flag("of the hosts; default: the project's", "")
    config: str = _flag(
        "of the run; followed by --config.FIELD=VALUE for what differs; not for verbs that start none", ""
    )
    imports: tuple[str, ...] = _flag("file of your own; may be repeated", (), action="append")
    overrides: tuple[str, ...] = ()  # of the configuration, each as `--config.a.b=value`
    price: float | None = _flag("of a chip-hour, for the whole run's", None, type=float)
    max_chip_hours: float | None = _flag("spent by all attempts together; then everything ends", None, type=float)
    max_failures: int = _flag("of the job's own, after which it is not started again", 3, type=int)
    max_preemptions: int = _flag("after which it is not started again", 100, type=int)
    delete_at_success: bool = _flag(
        "whether a finished job gives its slice back", True, action=argparse.BooleanOptionalAction
    )
    internal_ips: bool = _flag("hosts without addresses outside the network", False, action="store_true")
    tunnel_through_iap: bool = _flag("ssh through Google's proxy", False, action="store_true")

    def __post_init__(self) -> None:
        """Raises SpiralError, one line, for the first field that is not allowed."""
        generation = self.slice.generation
        match("NAME", self.name)
        zones = f"for {generation.name}: {', '.join(generation.zones)} (spiral_jax/hardware.py)"
        require(self.zone in generation.zones, "--zone", self.zone, zones)
        require(1 <= self.num_slices <= 256, "--num_slices", self.num_slices, "1 to 256")
        match("--bucket", self.bucket)
        require(self.provider in PROVIDERS, "--provider", self.provider, ", ".join(PROVIDERS))
        only_gke = not generation.runtime and self.provider != "gke"
        require(not only_gke, "--provider", self.provider, f"gke: nothing else rents out {generation.name}")
        require(self.pricing in PRICINGS, "the pricing", self.pricing, ", ".join(PRICINGS))
        if self.provider == "vm":
            one = "1 with --provider=vm; qr and gke join slices"
            require(self.num_slices == 1, "--num_slices", self.num_slices, one)
            require(self.pricing != "flex_start", "--flex_start", True, "with --provider=qr or gke")
        for field in ("project", "network", "subnetwork", "service_account", "config"):
            if value := getattr(self, field):
                match(f"--{field}", value)
        for file in self.imports:
            match("--import", file)
        given = [match("the argument", override).partition("=")[0] for override in self.overrides]
        for field in given:
            if given.count(field) > 1:
                raise SpiralError(f"{field} is given {given.count(field)} times; allowed: once")
        for field in ("price", "max_chip_hours"):
            value = getattr(self, field)
            require(value is None or (value > 0 and math.isfinite(value)), f"--{field}", value, "a number above 0")
        for field in ("max_failures", "max_preemptions"):
            require(getattr(self, field) >= 0, f"--{field}", getattr(self, field), "0 or more")

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slice.chips * self.num_slices

    @property
    def hosts(self) -> int:
        """Of all slices."""
        return self.slice.hosts * self.num_slices

    @property
    def region(self) -> str:
        return region_of(self.zone)

    @property
    def root(self) -> str:
        """Where everything of the job lies."""
        return f"{self.bucket}/{self.name}"

    @property
    def labels(self) -> dict[str, str]:
        """Of whatever is created for it."""
        return {LABEL: self.name, ROOT_LABEL: hashlib.sha256(self.root.encode()).hexdigest()[:16]}

    @property
    def arguments(self) -> tuple[str, ...]:
        """What every host runs after `python -m`. Raises SpiralError without a configuration."""
        return ("spiral_jax.train", *self.config_arguments, f"--workdir={self.root}/run")

    @property
    def config_arguments(self) -> tuple[str, ...]:
        """The part of `arguments` that says what is trained."""
        self.check_config()
        return (f"--config={self.config}", *(f"--import={file}" for file in self.imports), *self.overrides)

    def check_config(self) -> None:
        """Raises SpiralError without a configuration, which not all verbs need."""
        if not self.config:
            raise SpiralError("--config is missing; for example --config=experiments/pile.py:1.4b,spiral_b")


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, like those of everything else here."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise SpiralError(f"{' '.join(message.split())}; allowed: what {self.prog} --help lists")


def define(parser: argparse.ArgumentParser) -> None:
    """Adds NAME and the flags of a job."""
    pricing = parser.add_mutually_exclusive_group()
    named = {"name": "name", "slice": "--accelerator", "imports": "--import"}  # the others have their field's name
    for field in dataclasses.fields(Job):
        if field.name == "pricing":
            for word in PRICINGS:
                pricing.add_argument(f"--{word}", dest="pricing", action="store_const", const=word, default="spot")
        elif field.metadata:
            flag, how = named.get(field.name, f"--{field.name}"), dict(field.metadata)
            if flag.startswith("--"):
                how |= {"dest": field.name, "required": field.default is dataclasses.MISSING}
            if field.default is not dataclasses.MISSING:
                how["default"] = [] if field.default == () else field.default
            parser.add_argument(flag, **how)


def job_of(values: argparse.Namespace, rest: list[str]) -> Job:
    """The job that flags describe.

    Args:
      values: with what `define` added; more does not matter.
      rest: what the parser did not know (`parse_known_args`): overrides of the configuration, and nothing else.

    Raises:
      SpiralError: a flag that is not allowed.
    """
    names = {field.name for field in dataclasses.fields(Job)}
    given = {name: value for name, value in vars(values).items() if name in names}
    return Job(**given | {"imports": tuple(values.imports)}, overrides=tuple(rest))


def match(field: str, value: str) -> str:
    """A value that goes into commands. Raises SpiralError if it is none that its field allows."""
    pattern, allowed = _TEXTS[field.replace("subnetwork", "network")]
    require(re.fullmatch(pattern, value, re.ASCII) is not None, field, value, allowed)
    return value
