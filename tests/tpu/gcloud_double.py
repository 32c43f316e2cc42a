#!/usr/bin/env python3
"""`gcloud` as `Cloud` plays it, as a program for PATH. Its folder holds scenario.json and what has happened so far.

A scenario may say `speed`: seconds of the cloud's time in a second of ours.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.tpu.cloud import Cloud


def main() -> int:
    folder = Path(os.environ["GCLOUD_DOUBLE"])
    scenario = json.loads((folder / "scenario.json").read_text())
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # What has happened so far, every call again: the cloud has no chance in it.
        kept, now = folder / "calls.json", time.time()
        began, calls = json.loads(kept.read_text()) if kept.exists() else (now, [])
        cloud = Cloud(scenario)
        cloud.call_seconds = 0
        for when, arguments in calls:
            cloud.now = max(cloud.now, when)
            with contextlib.suppress(subprocess.TimeoutExpired):
                cloud.execute(arguments)
        cloud.now = max(cloud.now, cloud.start + (now - began) * scenario.get("speed", 1))
        calls.append((cloud.now, ["gcloud", *sys.argv[1:]]))
        kept.write_text(json.dumps((began, calls)))
        status, out, err = cloud.execute(calls[-1][1])
        (folder / "log").write_text("\n".join(line for _, line in cloud.log) + "\n")
        (folder / "there").write_text("\n".join(one.name for one in cloud.there()))
    sys.stdout.write(out)
    sys.stderr.write(err)
    return status


if __name__ == "__main__":
    sys.exit(main())
