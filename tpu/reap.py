"""Lists everything with our label, in all zones of the table; `--delete` deletes it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from spiral_jax.errors import require
from spiral_jax.hardware import GENERATIONS
from tpu.gcloud import Gcloud, GcloudError, configured_project, execute, shown
from tpu.job import LABEL, Parser, match
from tpu.providers.base import FREE, NODE_STATES, State, delete_command
from tpu.providers.queued import meaning
from tpu.telling import tell

# Spot nodes end the same way.
AGAIN = "; a `babysit` that lives takes it for a preemption: `python -m tpu.launch delete` ends both"


class Resource(NamedTuple):
    """Something of ours that a cloud has.

    Attributes:
      job: by its label.
      kind: `queued-resources` or `tpu-vm`.
      name: of the resource.
      zone: it is in.
      words: its state and accelerator.
      bills: whether chips may bill now; otherwise it may later, or keeps a name and quota.
    """

    job: str
    kind: str
    name: str
    zone: str
    words: str
    bills: bool


def main(arguments: Sequence[str], say: Callable[[str], None] = tell, **world: Any) -> int:
    """The verb `reap`.

    Args:
      arguments: what follows the verb.
      say: takes the lines.
      **world: of `Gcloud`.

    Returns:
      0, or 2 if there was a zone that could not be looked at, or something that could not be deleted.
    """
    parser = Parser(prog="python -m tpu.launch reap")
    parser.add_argument("name", nargs="?", help="of one job")
    parser.add_argument("--project", default="")
    parser.add_argument("--zone", action="append", help="default: all that are known")
    parser.add_argument("--delete", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    values = parser.parse_args(arguments)
    for field, given in (("NAME", values.name), ("--project", values.project)):
        if given:
            match(field, given)
    known = sorted({zone for generation in GENERATIONS for zone in generation.zones})
    for zone in values.zone or ():
        require(zone in known, "--zone", zone, f"{', '.join(known)} (spiral_jax/hardware.py)")
    project = values.project or ("" if values.dry_run else configured_project(world.get("execute", execute)))
    gcloud = Gcloud(project, values.dry_run, say, **world)
    zones = values.zone or known

    found, failed, left = list[Resource](), list[str](), list[str]()

    def look(zone: str) -> None:
        try:
            queued = gcloud.json("compute", "tpus", "queued-resources", "list", f"--zone={zone}") or []
            nodes = gcloud.json("compute", "tpus", "tpu-vm", "list", f"--zone={zone}") or []
            found.extend(one for one in _ours(queued, nodes, zone) if values.name in (None, one.job))
        except GcloudError as error:
            failed.append(f"{zone}: {error}")
        except (AttributeError, KeyError, TypeError) as error:
            failed.append(f"{zone}: gcloud's answer has another shape ({error})")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, zones))  # raises what was raised there
    for one in sorted(found):
        bills = "BILLS" if one.bills else "does not bill now, keeps its name and quota"
        command = delete_command(one.kind, one.name, one.zone)
        say(f"{one.job}: {one.kind} {one.name} in {one.zone}: {one.words}: {bills}; {shown(gcloud.command(*command))}")
        if values.delete:
            try:
                gcloud.run(*command)
                say(f"{one.name}: is being deleted{AGAIN if one.kind == 'tpu-vm' else ''}")
            except GcloudError as error:
                left.append(f"{one.name} in {one.zone}: {error}")
    for line in sorted(left):
        say(f"not deleted: {line}")
    for line in sorted(failed):
        say(f"not looked at: {line}")
    bill, where = sum(one.bills for one in found), f" of {project}" if project else ""
    say(f"{len(found)} found, {bill} of them bill, in {len(zones) - len(failed)} of {len(zones)} zones{where}")
    return 2 if failed or left else 0


def _ours(queued: list[dict[str, Any]], nodes: list[dict[str, Any]], zone: str) -> list[Resource]:
    """Queued resources with our label, and nodes with it that belong to none of those."""
    found = []
    for one in queued:
        node = (one.get("tpu", {}).get("nodeSpec") or [{}])[0].get("node", {})
        if label := node.get("labels", {}).get(LABEL):
            word = one.get("state", {}).get("state", "")
            words = f"{word} {node.get('acceleratorType', '')}"
            bills = meaning(word)[1] is not False
            found.append(Resource(label, "queued-resources", _last(one["name"]), zone, words, bills))
    owners = {one.name for one in found}
    for node in nodes:
        label = node.get("labels", {}).get(LABEL)
        if label and _last(node.get("queuedResource", "")) not in owners:
            word = node.get("state", "")
            words = f"{word} {node.get('acceleratorType', '')}"
            bills = NODE_STATES.get(word, State.UNKNOWN) not in FREE
            found.append(Resource(label, "tpu-vm", _last(node["name"]), zone, words, bills))
    return found


def _last(path: str) -> str:
    return path.rpartition("/")[2]
