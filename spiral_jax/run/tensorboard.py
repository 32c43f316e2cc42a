"""TensorBoard events without the thread of tensorboardX's own writer.

When that thread meets a full disk it dies with a traceback, and the eleventh event after it waits for ever.
"""

import time
from collections.abc import Mapping
from types import ModuleType

from etils.epath import Path

from spiral_jax.data.staging import Staging


class Board:
    """Scalars of a run's steps."""

    def __init__(self, tensorboardx: ModuleType, folder: Path, first_step: int):
        """Opens a new file in `folder`; TensorBoard hides what older ones have from `first_step` on.

        On a bucket the file gets there when it is closed.
        """
        self._staging = Staging(folder)
        self._staging.folder.mkdir(parents=True, exist_ok=True)
        self._proto, self._summary = tensorboardx.proto.event_pb2, tensorboardx.summary
        self._file = tensorboardx.event_file_writer.EventsWriter(str(self._staging.folder / "events"))
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._file.write_event(self._proto.Event(step=first_step, file_version="brain.Event:2"))
        self._file.write_event(self._proto.Event(step=first_step, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            summary = self._summary.scalar(name, value)
            self._file.write_event(self._proto.Event(step=step, wall_time=time.time(), summary=summary))
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._staging.finish()
