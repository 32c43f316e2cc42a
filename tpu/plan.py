"""What is checked, and what it will cost, before anything is created.

The framework is asked in child processes (`describe` for the configuration and its data, `aot` for the compiled step),
as the launcher itself runs without jax.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spiral_jax.errors import SpiralError, require
from spiral_jax.hardware import GIB
from spiral_jax.roofline.points import Model, chip_hours, nearest, read_points
from tpu import hosts
from tpu.code import Code, pack
from tpu.job import Job

ROOT = Path(__file__).resolve().parents[1]
LOCK = "tpu/lock.txt"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax")
# Of what `describe` says of memory.
PARTS = ("parameters", "optimizer", "gradients", "core", "gathered_rest", "activations_kept", "logits_block")
START_MINUTES = 10  # of a slice, from its being there to the first step: set-up, smoke test, compilation; assumed
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a launch was found to be.

    Attributes:
      steps: of the run.
      step_seconds: predicted.
      mfu: predicted.
      is_compiled: whether both come from the compiled step; otherwise from closed forms and a neighbour's MFU.
      training: chip-hours of all steps.
      evaluation: chip-hours of all evaluations on the validation store.
      start: chip-hours of every start.
    """

    steps: int
    step_seconds: float
    mfu: float
    is_compiled: bool
    training: float
    evaluation: float
    start: float

    @property
    def chip_hours(self) -> float:
        """Of the whole run, if nothing interrupts it."""
        return self.training + self.evaluation + self.start


def make_plan(job: Job, locate: Callable[[str], str], say: Say = print) -> Plan:
    """Checks a launch and says what was found, a line each. What is quick comes first, the compiler last.

    Args:
      job: the launch.
      locate: gives the region of a `gs://BUCKET/...`; raises SpiralError without credentials.
      say: takes the lines.

    Raises:
      SpiralError: whatever would have gone wrong after a slice was paid for.
    """
    slices = f"{job.num_slices} x " if job.num_slices > 1 else ""
    say(
        f"plan of {job.name}: {slices}{job.slice} ({job.slice.accelerator_type}), {job.chips} chips, {job.hosts} hosts"
        f", {job.zone}, {job.pricing.replace('_', '-')}, by {job.provider}"
    )
    code = pack(ROOT)
    check_files(job, code)
    say(f"  code           {code.name}, {len(code.files)} files, {len(code.data) / 1e6:.1f} MB")
    _check_region(job, locate, say)
    found = _described(job, say)
    model, train, data = found["model"], found["train"], found["data"]
    say(
        f"  configuration  {model['notation']} {model['topology']}, {found['parameters']['total'] / 1e6:,.0f}M "
        f"parameters; {train['steps']:,} steps of {train['batch_size']} x {train['sequence_length']} tokens"
    )
    say("  data           " + ", ".join(f"{name.replace('_', ' ')} {number:,.6g}" for name, number in data.items()))
    for field, package in found["extras"].items():
        allowed = f"false or empty, or a {LOCK} made with the extra that brings {package}, for the hosts"
        if package not in pins():
            raise SpiralError(f"--config.{field} is set; allowed: {allowed}")
    _check_places(job, found["reads"], code, locate, say)
    say(f"  dependencies   {_resolve()}")
    mfu, is_compiled = _mfu(job, found, code, say)
    plan = _costs(job, found, mfu, is_compiled)
    _say_costs(job, plan, say)
    return plan


def check_files(job: Job, code: Code) -> None:
    """Whether what says what is trained is there, and travels to the hosts: no start of theirs could find it else.

    Raises:
      SpiralError: it is not.
    """
    job.check_config()
    for field, file in [("--config", job.config.partition(":")[0]), *(("--import", file) for file in job.imports)]:
        require(file in code.files, field, file, f"a file of the tree {ROOT} that git does not ignore")


def plan_unless_skipped(job: Job, skip: bool, locate: Callable[[str], str], say: Say = print) -> None:
    """What verbs that create something do first; with `--skip_plan` they say what that means. See `make_plan`."""
    if not skip:
        make_plan(job, locate, say)
        return
    say("PLAN SKIPPED: nothing was checked; the step may not fit, the data may not open, and the costs are not known")


def _described(job: Job, say: Say) -> dict[str, Any]:
    """What `describe` says of the run, with its data opened.

    Raises:
      SpiralError: a configuration that is wrong or does not suit the slice, data that does not open, no jax.
    """
    if importlib.util.find_spec("jax") is None:
        raise SpiralError(
            f"jax is missing in {sys.executable}, so that nothing can be checked; allowed: an environment made with "
            f"uv pip install -r {LOCK}, or --skip_plan"
        )
    devices = f"--devices={job.slice.devices * job.num_slices}"
    return json.loads(_child("spiral_jax.describe", *job.config_arguments, devices, "--data", "--json", say=say))


def _check_region(job: Job, locate: Callable[[str], str], say: Say) -> None:
    """Raises SpiralError if the hosts would write into another region, or the bucket cannot be asked."""
    region = locate(job.bucket)
    if region != job.region:
        raise SpiralError(
            f"--bucket is {job.bucket!r}, which is in {region}, while {job.zone} is in {job.region}; allowed: one in "
            f"{job.region}, as traffic between regions costs money and time"
        )
    say(f"  bucket         {job.bucket} is in {region}, where the slice is")


def _check_places(job: Job, reads: dict[str, list[str]], code: Code, locate: Callable[[str], str], say: Say) -> None:
    """Raises SpiralError if the hosts would not see something that is read."""
    # Quickstart's text: the hosts have Python and its packages, too.
    python = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib")]
    for field, places in reads.items():
        for place in places:
            travels = any(name == place or fnmatch.fnmatch(name, f"{place.rstrip('/')}*") for name in code.files)
            seen = "://" in place or travels or any(map(Path(place).is_relative_to, python))
            require(
                seen, field, place, "gs://..., which the hosts see, or files of the tree, which travel with the code"
            )
    read = (place for places in reads.values() for place in places if place.startswith("gs://"))
    for bucket in sorted({f"gs://{place.split('/')[2]}" for place in read}):
        with contextlib.suppress(SpiralError):  # others' buckets can be read without the right to ask where they are
            if bucket != job.bucket and (other := locate(bucket)) != job.region:
                say(f"  note           {bucket}, which is read, is in {other}: traffic between regions costs money")


def _resolve() -> str:
    """Whether what the hosts will install can be had; says how that was found out.

    Raises:
      SpiralError: the lock does not resolve.
    """
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        return f"NOT CHECKED whether {LOCK} resolves: there is no uv here (pip install uv)"
    with tempfile.TemporaryDirectory() as folder:
        command = [uv, "pip", "install", "--dry-run", "--only-binary=:all:", "--python-version=3.11", "--color=never"]
        command += ["--python-platform=x86_64-manylinux_2_31", f"--target={folder}", "-r", LOCK]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    why = " ".join(done.stderr.split())[:300]
    if done.returncode == 0:
        return f"{len(pins())} packages of {LOCK} can be had for Python 3.11"
    if done.returncode == 1 and "network was disabled" not in why:  # 2 is a failure of the network
        raise SpiralError(f"{LOCK} does not resolve ({why}); allowed: one made as its first lines say")
    return f"NOT CHECKED whether {LOCK} resolves: uv could not reach the index ({why[:120]})"


def pins() -> dict[str, str]:
    """Packages of the lock and their versions."""
    lines = (ROOT / LOCK).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if line and line[0] not in "# ")


def _versions() -> dict[str, str]:
    """Of what compiles, as installed here; empty where a package is missing."""
    found = {name: next(iter(importlib.metadata.Distribution.discover(name=name)), None) for name in PACKAGES}
    return {name: package.version if package else "" for name, package in found.items()}


def _mfu(job: Job, found: dict[str, Any], code: Code, say: Say) -> tuple[float, bool]:
    """The predicted MFU, and whether the compiled step said it.

    Raises:
      SpiralError: the step does not fit the slice, or is refused otherwise.
    """
    generation, model, usable = job.slice.generation, found["model"], job.slice.generation.hbm_bytes / GIB
    if importlib.util.find_spec("libtpu") is not None:
        report, locked, here = _compiled(job, code, say), pins(), _versions()
        say(f"  memory         {report['memory']['peak_bytes'] / GIB:.1f} of {usable:.2f} GiB a device")
        other = [f"{name} {here[name]}, not {locked[name]}" for name in PACKAGES if here[name] != locked[name]]
        if other:
            say(f"  note           compiled with {'; '.join(other)} as in {LOCK}, which the hosts install")
        return report["prediction"]["mfu"], True
    needed = sum(found["memory"][part] for part in PARTS) / GIB
    say("  NOT COMPILED: there is no libtpu here; closed forms stand in, which are a lower bound of the memory")
    if needed > usable:
        raise SpiralError(
            f"--accelerator is {str(job.slice)!r}, of which a device needs {needed:.2f} GiB or more of {usable:.2f}; "
            "allowed: a larger slice, or a larger train.accumulation"
        )
    key = Model(model["notation"], model["topology"], found["parameters"]["total"], model["head_width"])
    points = read_points(ROOT / "tpu/predictions")
    point = nearest(points, generation.name, key) or min(points, key=lambda one: one.mfu)
    say(f"  memory         {needed:.1f} of {usable:.2f} GiB a device; MFU as predicted for {point.name}, the nearest")
    return point.mfu, False


def _compiled(job: Job, code: Code, say: Say) -> dict[str, Any]:
    """The report of `aot`: kept from before, where code, configuration and versions are the same."""
    arguments = [*job.config_arguments, f"--topology={job.slice}", f"--num_slices={job.num_slices}"]
    flags = hosts.libtpu_arguments(job.slice.generation.name, job.num_slices)  # else it would be another program
    everything = [arguments, flags, code.name.rpartition("-")[2], _versions(), sys.version]
    key = hashlib.sha256(json.dumps(everything).encode()).hexdigest()
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spiral_jax" / "plans" / f"{key}.json"
    try:
        report = json.loads(kept.read_text(encoding="utf-8"))
        say(f"  compiled       before; its report was kept in {kept}")
        return report
    except (OSError, ValueError):
        pass
    text = _child("spiral_jax.aot", *arguments, "--json", say=say, LIBTPU_INIT_ARGS=flags)
    with contextlib.suppress(OSError):  # a cache; without it the next plan compiles again
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        part.replace(kept)
    return json.loads(text)


def _child(module: str, *arguments: str, say: Say | None = None, **variables: str) -> str:
    """What a verb of the framework prints; its progress is passed on, its one-line error raised.

    Args:
      module: the verb.
      *arguments: of its command line.
      say: takes lines of its progress.
      **variables: of its environment.

    Raises:
      SpiralError: it ended with another status than 0.
    """
    command: Sequence[str] = (sys.executable, "-m", module, *arguments)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | variables
    lines: collections.deque[str] = collections.deque(maxlen=3)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as child,
    ):
        assert child.stderr is not None
        for line in filter(None, map(str.rstrip, child.stderr)):
            lines.append(line)
            if say is not None and not line.startswith("error: "):
                say(f"  ... {line}")
        status = child.wait()
        if status == 0:
            out.seek(0)
            return out.read()
    line = lines[-1] if lines else "it said nothing"
    if line.startswith("error: "):
        raise SpiralError(line.removeprefix("error: "))
    raise SpiralError(
        f"python -m {module} ended with status {status}: {line}; allowed: a plan that can be made, or --skip_plan"
    )


def _costs(job: Job, found: dict[str, Any], mfu: float, is_compiled: bool) -> Plan:
    train, per_token = found["train"], found["flops"]["train_per_token_causal"]
    evaluated = train["evaluations"] * (train["tokens_per_evaluation"] or found["data"].get("validation_tokens", 0))
    training = chip_hours(per_token * train["tokens"], mfu, job.slice)
    evaluation = chip_hours(per_token / 3 * evaluated, mfu, job.slice)  # forward passes
    seconds, start = training * 3600 / job.chips / train["steps"], job.chips * START_MINUTES / 60
    return Plan(train["steps"], seconds, mfu, is_compiled, training, evaluation, start)


def _say_costs(job: Job, plan: Plan, say: Say) -> None:
    total = plan.chip_hours
    say(f"  step           {plan.step_seconds:.3f} s at a predicted MFU of {plan.mfu:.1%}; nothing has run on a TPU")
    say(
        f"  chip-hours     {total:,.1f}: training {plan.training:,.1f}, evaluation {plan.evaluation:,.1f}, and a start "
        f"{plan.start:,.1f} ({START_MINUTES} minutes for set-up and compilation, assumed)"
    )
    say(f"  time           {total / job.chips / 24:.2f} days with one start, on {job.chips} chips")
    if job.price is None:
        say("  money          not known: give --price, of a chip-hour")
    else:
        say(f"  money          {total * job.price:,.2f} at {job.price:g} a chip-hour, for the slice alone")
    if job.max_chip_hours is not None and job.max_chip_hours < total:
        step = int(plan.steps * max(job.max_chip_hours - plan.start, 0) / (total - plan.start))
        say(f"  note           --max_chip_hours={job.max_chip_hours:g} ends it near step {step:,} of {plan.steps:,}")
