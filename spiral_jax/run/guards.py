"""What stands around a run: signals, deadlines, and the claim on its directory."""

import threading

from spiral_jax.parallel.deadlines import DeadlineConfig, Watchdog
from spiral_jax.parallel.leaving import End, end_at_once
from spiral_jax.parallel.signals import StopRequest
from spiral_jax.run.hold import Hold

_SECONDS_TO_GIVE_BACK = 5.0


class Guards:
    """In a `with` statement: they are on duty; what they find ends the process from a thread.

    Attributes:
      request: what signals ask for.
      watchdog: what is expected until when.
      claim: of the run's directory; None until it is taken.
      end: ends the process with a status and a line, and then the others of its run.
      end_alone: the same without the others, and so without delay.
    """

    def __init__(self, deadlines: DeadlineConfig):
        """The start is expected from now on."""
        self.end: End = end_at_once
        self.end_alone: End = end_at_once
        self.claim: Hold | None = None
        self.request = StopRequest(self._end, self._continued)
        self.watchdog = Watchdog(deadlines, self._end)
        self.watchdog.expect("the start", "start_minutes")

    def __enter__(self) -> "Guards":
        self.request.__enter__()
        self.watchdog.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.watchdog.__exit__()
        self.request.__exit__()

    def check_claim(self) -> None:
        """Before anything is written: ends the process if the directory belongs to another start."""
        if self.claim is not None:
            self.claim.check()

    def look_at_claim(self) -> None:
        """The same, however sure that is."""
        if self.claim is not None:
            self.claim.look()

    def _end(self, status: int, line: str) -> None:
        # Where saves may be under way, the directory is another start's only when this process is surely gone.
        if self.claim is not None and not self.request.is_held:
            giving_back = threading.Thread(target=self.claim.release, daemon=True)
            giving_back.start()
            giving_back.join(_SECONDS_TO_GIVE_BACK)
        self.end(status, line)

    def _continued(self) -> None:
        self.look_at_claim()
