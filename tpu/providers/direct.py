"""TPU VMs created directly, again and again until chips are free: what granted quotas get when queues do not move."""

from tpu.providers.base import Observation, Provider, observe_node


class Direct(Provider):
    """Who creates again, and when, is `babysit`'s to say."""

    kind = "tpu-vm"
    create_seconds = 1800

    def create_command(self, seconds: float) -> list[str]:
        del seconds  # what GA creates has no end of its own
        job = self.job
        return [
            *("compute", "tpus", self.kind, "create", job.name, f"--zone={job.zone}"),
            f"--accelerator-type={job.slice.accelerator_type}",
            f"--version={job.slice.generation.runtime}",
            *self._common_flags(),  # not --async: only who waits is told that there is no capacity
        ]

    def _observe(self) -> Observation:
        return observe_node(self.gcloud, self.job, self.job.name)

    def _on_hosts(self, verb: str) -> list[str]:
        # GA's ssh cannot go through the proxy.
        return [*(["alpha"] if self.job.tunnel_through_iap else []), *super()._on_hosts(verb)]
