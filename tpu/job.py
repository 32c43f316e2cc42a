"""One launch: what runs, on which slice, where it writes, and how much it may cost. Checked when it is made."""

import argparse
import dataclasses
import math
import re
from typing import Any, NoReturn

from spiral_jax.errors import SpiralError, require
from spiral_jax.hardware import Slice, parse_slice, region_of

PROVIDERS = ("qr", "vm", "gke")
PRICINGS = ("spot", "reserved", "on_demand", "flex_start")

_FILE = r"(?!.*\.\./)\w[-\w./]*\.py"
# Of each field that goes into commands, paths and labels: what it may be, and in words. None may begin with a dash.
_TEXTS = {
    "NAME": (
        r"[a-z]([-a-z0-9]{0,26}[a-z0-9])?",
        "at most 28 lower-case letters, digits and dashes, a letter first, no dash last",
    ),
    "--bucket": (
        r"gs://[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9](/[A-Za-z0-9_][-\w.]*)*",
        "gs://BUCKET or gs://BUCKET/PREFIX of letters, digits and -_.",
    ),
    "--project": (
        r"([a-z0-9][a-z0-9.-]*:)?[a-z][-a-z0-9]{4,28}[a-z0-9]",
        "a project's id, 6 to 30 lower-case letters, digits and dashes",
    ),
    "--network": (r"[a-z0-9]([-a-z0-9./_]{0,200}[a-z0-9])?", "a name, or projects/P/... as gcloud prints it"),
    "--service_account": (
        r"[a-z0-9][-a-z0-9]*@[a-z0-9][-a-z0-9.]*\.gserviceaccount\.com",
        "NAME@PROJECT.iam.gserviceaccount.com",
    ),
    "--config": (rf"{_FILE}(:[-\w.,=+/]*)?", "a file in this tree and its argument, as in FILE.py:ARGUMENT"),
    "--import": (_FILE, "a file in this tree, as in topologies/mine.py"),
    "the argument": (
        r"--config(\.[A-Za-z_]\w*)+=[^\x00-\x1f\x7f]*",
        "flags of the launcher, and --config.FIELD=VALUE",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One launch, whose fields are the flags of the same names (`slice` is `--accelerator`).

    Attributes:
      name: of the queued resource, its node and the folder on the bucket.
      zone: of Google Cloud.
      slice: that it runs on.
      bucket: `gs://BUCKET` or `gs://BUCKET/PREFIX`; everything of the job lies under it.
      num_slices: connected by the data-center network.
      project: of Google Cloud; where it is empty, gcloud's own setting holds.
      provider: `qr` queued resources, `vm` created directly, `gke`.
      pricing: `spot`, `reserved`, `on_demand` or `flex_start`.
      network: where it is empty, the project's default; so `subnetwork` and `service_account`.
      config: of the run, as in `experiments/pile.py:1.4b,spiral_b`; it may be missing for verbs that start nothing.
      overrides: of the configuration, each as `--config.a.b=value`.
      imports: files of the user's own (`--import`).
      price: of a chip-hour, in whatever money.
      max_chip_hours: that end everything when they are spent.
      max_failures: of the job's own, after which it is not started again.
      max_preemptions: after which it is not started again.
      delete_at_success: whether a finished job gives its slice back.
      internal_ips: whether hosts have no addresses of their own outside the network.
      tunnel_through_iap: whether ssh goes through Google's proxy.
    """

    name: str
    zone: str
    slice: Slice
    bucket: str
    num_slices: int = 1
    project: str = ""
    provider: str = "qr"
    pricing: str = "spot"
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    price: float | None = None
    max_chip_hours: float | None = None
    max_failures: int = 3
    max_preemptions: int = 100
    delete_at_success: bool = True
    internal_ips: bool = False
    tunnel_through_iap: bool = False

    def __post_init__(self) -> None:
        """Raises SpiralError, one line, for the first field that is not allowed."""
        generation, zones = self.slice.generation, ", ".join(self.slice.generation.zones)
        _match("NAME", self.name)
        require(
            self.zone in generation.zones,
            "--zone",
            self.zone,
            f"for {generation.name}: {zones} (spiral_jax/hardware.py)",
        )
        require(1 <= self.num_slices <= 256, "--num_slices", self.num_slices, "1 to 256")
        _match("--bucket", self.bucket)
        require(self.provider in PROVIDERS, "--provider", self.provider, ", ".join(PROVIDERS))
        only_gke = not generation.runtime and self.provider != "gke"
        require(not only_gke, "--provider", self.provider, f"gke: nothing else rents out {generation.name}")
        require(self.pricing in PRICINGS, "the pricing", self.pricing, ", ".join(PRICINGS))
        if self.provider == "vm":
            require(
                self.num_slices == 1, "--num_slices", self.num_slices, "1 with --provider=vm; qr and gke join slices"
            )
            require(self.pricing != "flex_start", "--flex_start", True, "with --provider=qr or gke")
        for field in ("project", "network", "subnetwork", "service_account", "config"):
            if value := getattr(self, field):
                _match(f"--{field}", value)
        for file in self.imports:
            _match("--import", file)
        given = [_match("the argument", override).partition("=")[0] for override in self.overrides]
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
        """Of whatever is created for the job; `reap` looks for the key."""
        return {"spiral-jax": self.name}

    @property
    def arguments(self) -> tuple[str, ...]:
        """What every host runs after `python -m`. Raises SpiralError without a configuration."""
        return ("spiral_jax.train", *self.config_arguments, f"--workdir={self.root}/run")

    @property
    def config_arguments(self) -> tuple[str, ...]:
        """The part of `arguments` that says what is trained."""
        if not self.config:
            raise SpiralError("--config is missing; for example --config=experiments/pile.py:1.4b,spiral_b")
        return (f"--config={self.config}", *(f"--import={file}" for file in self.imports), *self.overrides)


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, like those of everything else here."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise SpiralError(f"{' '.join(message.split())}; allowed: what {self.prog} --help lists")


def define(parser: argparse.ArgumentParser) -> None:
    """Adds NAME and the flags of a job."""
    parser.add_argument("name", metavar="NAME", help="of the job: lower-case letters, digits and dashes")
    parser.add_argument("--accelerator", required=True, help="TPU slice, as in v5p-128 or v5p:4x4x4")
    parser.add_argument("--num_slices", type=int, default=1, help="how many of it, joined by the data-center network")
    parser.add_argument("--zone", required=True, help="as in us-east5-a")
    parser.add_argument("--bucket", required=True, help="gs://BUCKET or gs://BUCKET/PREFIX, in the region of the zone")
    parser.add_argument("--project", default="", help="of Google Cloud; default: gcloud's")
    parser.add_argument("--provider", default="qr", help=f"one of {', '.join(PROVIDERS)}; default: qr")
    pricing = parser.add_mutually_exclusive_group()
    for word in PRICINGS:
        pricing.add_argument(f"--{word}", dest="pricing", action="store_const", const=word, default="spot")
    for field in ("network", "subnetwork", "service_account"):
        parser.add_argument(f"--{field}", default="", help="default: the project's")
    parser.add_argument("--config", default="", help="of the run; followed by --config.FIELD=VALUE for what differs")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], help="file of your own; may be repeated"
    )
    parser.add_argument("--price", type=float, help="of a chip-hour, for the whole run's")
    parser.add_argument("--max_chip_hours", type=float, help="spent by all attempts together; then everything ends")
    parser.add_argument("--max_failures", type=int, default=3, help="of the job's own")
    parser.add_argument("--max_preemptions", type=int, default=100)
    parser.add_argument("--delete_at_success", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--internal_ips", action="store_true", help="hosts without addresses outside the network")
    parser.add_argument("--tunnel_through_iap", action="store_true", help="ssh through Google's proxy")


def job_of(values: argparse.Namespace, rest: list[str]) -> Job:
    """The job that flags describe.

    Args:
      values: with what `define` added; more does not matter.
      rest: what the parser did not know (`parse_known_args`): overrides of the configuration, and nothing else.

    Raises:
      SpiralError: a flag that is not allowed.
    """
    given = vars(values)
    same = {field.name: given[field.name] for field in dataclasses.fields(Job) if field.name in given}
    same["bucket"], same["imports"] = given["bucket"].rstrip("/"), tuple(given["imports"])
    return Job(**same, slice=parse_slice(given["accelerator"], "--accelerator"), overrides=tuple(rest))


def _match(field: str, value: str) -> str:
    pattern, allowed = _TEXTS[field.replace("subnetwork", "network")]
    require(re.fullmatch(pattern, value, re.ASCII) is not None, field, value, allowed)
    return value
