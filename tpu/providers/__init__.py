"""Ways to a slice behind one small interface, and the states of all of them in six words."""

import dataclasses
import datetime
import enum
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from tpu.gcloud import Gcloud, GcloudError
from tpu.job import Job

LABEL = "spiral-jax"


class State(enum.Enum):
    """What a slice is, as far as a launcher has to know."""

    GONE = "there is none"  # said explicitly
    WAITING = "waits for chips"
    READY = "ready"
    TRANSIENT = "not usable now, and comes back by itself"
    LEAVING = "being taken away"
    LOST = "lost: it keeps name and quota and never comes back"
    UNKNOWN = "not known"  # the question failed; nothing may be concluded


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the cloud says about a job's slice.

    Attributes:
      state: in our words.
      words: the cloud's own, as in `ACTIVE, pile-0 REPAIRING`.
      by_user: whether somebody of ours, not the service, brought it about.
      capacity: whether it was lost to others, not to a mistake in the request.
      message: of the cloud, about an error.
      symptoms: of nodes, as in `pile-0 2026-11-26T18:00:00Z OUT_OF_MEMORY worker 3`.
      billing: whether chips bill; None where that is not known, and what held before holds.
      since: Unix time from which the chips can have billed, as far as it is said.
      ours: whether it has the job's label, if it is there.
    """

    state: State
    words: str = ""
    by_user: bool = False
    capacity: bool = True
    message: str = ""
    symptoms: tuple[str, ...] = ()
    billing: bool | None = None
    since: float = 0
    ours: bool = True


class Provider(Protocol):
    """One way to a slice, for one job."""

    def create_command(self, seconds: float) -> list[str]:
        """Arguments of gcloud.

        Args:
          seconds: after which the cloud itself may take the slice away, where it can do so.
        """

    def delete_command(self) -> list[str]: ...

    def create(self, seconds: float) -> None:
        """Asks for the slice; returns when the request is taken, or (`vm`) the slice is there. Raises GcloudError."""

    def delete(self) -> None:
        """Asks for its end; what is not there is no error. Raises GcloudError."""

    def observe(self) -> Observation: ...

    def ssh(self, command: str, worker: str = "all", node: str = "all", output: str = "") -> list[str]:
        """Arguments of gcloud that run one shell command on hosts; `output`: a local folder for what each prints."""

    def scp(self, sources: Sequence[str], target: str, worker: str = "all", node: str = "all") -> list[str]:
        """Arguments of gcloud that copy local files to a path on hosts."""


def provider_of(job: Job, gcloud: Gcloud) -> Provider:
    """Of a job whose provider is `qr` or `vm`."""
    from tpu.providers.direct import Direct
    from tpu.providers.queued import Queued

    return Queued(job, gcloud) if job.provider == "qr" else Direct(job, gcloud)


_NODE_STATES = {
    "READY": State.READY,
    "CREATING": State.WAITING,
    **dict.fromkeys(["RESTARTING", "REIMAGING", "REPAIRING", "STARTING"], State.TRANSIENT),
    **dict.fromkeys(["HIDING", "HIDDEN", "UNHIDING", "UNKNOWN"], State.TRANSIENT),  # UNKNOWN: after a failed repair
    **dict.fromkeys(["DELETING", "STOPPING"], State.LEAVING),
    **dict.fromkeys(["STOPPED", "PREEMPTED", "TERMINATED"], State.LOST),
}


def observe_node(gcloud: Gcloud, job: Job, name: str) -> Observation:
    """The state of one node; one that is explicitly not there is GONE."""
    where = ("compute", "tpus", "tpu-vm", "describe", name, f"--zone={job.zone}")
    try:
        node = gcloud.json(*where, resource=f"nodes/{name}")
    except GcloudError as error:
        return unanswered(error, f"{name} NOT_FOUND")
    word, health = node.get("state", ""), node.get("health", "")
    state = _NODE_STATES.get(word, State.UNKNOWN)
    if state is State.READY and health in ("UNHEALTHY_MAINTENANCE", "TIMEOUT"):
        state, word = State.TRANSIENT, f"{word} {health}"
    return Observation(
        state,
        words=f"{name} {word or 'without a state'}",
        message=node.get("healthDescription", ""),
        symptoms=tuple(
            " ".join([name, s.get("createTime", ""), s.get("symptomType", ""), "worker", s.get("workerId", "?")])
            for s in node.get("symptoms", ())
        ),
        billing=state not in (State.LOST, State.WAITING),
        since=_seconds(node.get("createTime", "")),
        ours=node.get("labels", {}).get(LABEL) == job.name,
    )


def whole(nodes: Iterable[Observation]) -> Observation:
    """All nodes of a slice, or of several, as one: as good as the worst of them. A node that is gone is lost."""
    nodes = list(nodes)
    states = {State.LOST if node.state is State.GONE else node.state for node in nodes}
    worst = (State.LOST, State.UNKNOWN, State.LEAVING, State.TRANSIENT, State.WAITING, State.READY)
    billing = [node.billing for node in nodes]
    return Observation(
        next(state for state in worst if state in states),
        words=", ".join(node.words for node in nodes),
        message="; ".join(node.message for node in nodes if node.message),
        symptoms=tuple(line for node in nodes for line in node.symptoms),
        billing=True if True in billing else None if None in billing else False,
        since=min((node.since for node in nodes if node.since), default=0),
    )


def unanswered(error: GcloudError, words: str = "NOT_FOUND") -> Observation:
    """What a question that failed says: GONE only if it was told so."""
    gone = error.kind == "not_found"
    state = State.GONE if gone else State.UNKNOWN
    return Observation(state, words=words if gone else "", message=str(error), billing=False if gone else None)


@dataclasses.dataclass(frozen=True)
class Resource:
    """Something of ours that a cloud has.

    Attributes:
      job: by its label.
      kind: `queued-resources` or `tpu-vm`.
      name: of the resource.
      zone: it is in.
      words: its state and accelerator.
      bills: whether chips bill now; otherwise it may later, or keeps a name and quota.
    """

    job: str
    kind: str
    name: str
    zone: str
    words: str
    bills: bool

    @property
    def delete_command(self) -> list[str]:
        """Arguments of gcloud."""
        force = ["--force"] if self.kind == "queued-resources" else []
        return ["compute", "tpus", self.kind, "delete", self.name, f"--zone={self.zone}", "--async", *force]


def resources(gcloud: Gcloud, zones: Iterable[str]) -> tuple[list[Resource], list[str]]:
    """Everything with our label in some zones.

    Returns:
      What was found, and a line for every zone that could not be looked at.
    """

    def look(zone: str) -> tuple[list[Resource], list[str]]:
        try:
            queued = gcloud.json("compute", "tpus", "queued-resources", "list", f"--zone={zone}") or []
            nodes = gcloud.json("compute", "tpus", "tpu-vm", "list", f"--zone={zone}") or []
        except GcloudError as error:
            return [], [f"{zone}: {error}"]
        return _ours(queued, nodes, zone), []

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(look, zones))
    return [found for some, _ in answers for found in some], [line for _, lines in answers for line in lines]


def _ours(queued: list[dict[str, Any]], nodes: list[dict[str, Any]], zone: str) -> list[Resource]:
    """Queued resources with our label, and nodes with it that belong to none of those."""
    found = []
    for one in queued:
        spec = one.get("tpu", {}).get("nodeSpec") or [{}]
        label = spec[0].get("node", {}).get("labels", {}).get(LABEL)
        if label:
            word = one.get("state", {}).get("state", "")
            words = f"{word} {spec[0]['node'].get('acceleratorType', '')}"
            bills = word in ("PROVISIONING", "ACTIVE", "SUSPENDING", "DELETING")
            found.append(Resource(label, "queued-resources", _last(one["name"]), zone, words, bills))
    owners = {one.name for one in found}
    for node in nodes:
        label = node.get("labels", {}).get(LABEL)
        if label and _last(node.get("queuedResource", "")) not in owners:
            word = node.get("state", "")
            bills = _NODE_STATES.get(word) not in (State.LOST, State.WAITING)
            words = f"{word} {node.get('acceleratorType', '')}"
            found.append(Resource(label, "tpu-vm", _last(node["name"]), zone, words, bills))
    return found


def _seconds(stamp: str) -> float:
    """Unix time of `2026-11-26T18:00:00.123456789Z`; 0 if it is none."""
    try:
        return datetime.datetime.fromisoformat(stamp[:19] + "+00:00").timestamp()
    except ValueError:
        return 0


def _last(path: str) -> str:
    return path.rpartition("/")[2]
