#!/usr/bin/env python3
"""`gcloud` as `Cloud` plays it, as a program for PATH. Its folder holds scenario.json and what has happened so far.

A scenario may say `speed`: seconds of the cloud's time in a second of ours.
"""

import fcntl
import json
import os
import pickle
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
        state = folder / "state"
        # Written and read by this program only.
        cloud, began = pickle.loads(state.read_bytes()) if state.exists() else (Cloud(scenario), time.time())
        cloud.call_seconds = 0
        cloud.now = max(cloud.now, cloud.start + (time.time() - began) * scenario.get("speed", 1))
        status, out, err = cloud.execute(["gcloud", *sys.argv[1:]])
        state.write_bytes(pickle.dumps((cloud, began)))
        (folder / "log").write_text("\n".join(line for _, line in cloud.log) + "\n")
        (folder / "there").write_text("\n".join(one.name for one in cloud.there()))
    sys.stdout.write(out)
    sys.stderr.write(err)
    return status


if __name__ == "__main__":
    sys.exit(main())
