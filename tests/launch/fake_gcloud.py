"""A gcloud that plays a queued resource and the hosts of its slice, and notes what it is asked.

It reads $FAKE_GCLOUD/script.json, {"states": [...], "services": [...], "installs": [...]}, and
takes one entry from the front for each look at the queued resource, at the service on host 0, or
for each installation; the last one stays. Services are events of units.py. The entry "error" is a
call that fails. Calls are lines of calls.jsonl; the files that are copied go to copied/.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from tests.launch.units import shown

HOME = Path(os.environ["FAKE_GCLOUD"])


def take(name: str) -> str:
    """The next entry of the script."""
    path = HOME / "script.json"
    script = json.loads(path.read_text())
    entry: str = script[name][0]
    if len(script[name]) > 1:
        del script[name][0]
        path.write_text(json.dumps(script))
    return entry


def wait_for_log() -> None:
    """A run ends after its log was shown, so that a test can ask for both."""
    deadline = time.monotonic() + 30
    while not (HOME / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def queued_resources(verb: str) -> int:
    if verb == "list":
        state = take("states")
        if state == "error":
            print("ERROR: (gcloud) There was a problem refreshing your tokens", file=sys.stderr)
            return 1
        print(state)
    elif verb == "describe":
        print("state: {stateInitiator: SERVICE}")
    return 0


def tpu_vm(verb: str, arguments: list[str]) -> int:
    if verb == "scp":
        (HOME / "copied").mkdir(exist_ok=True)
        for file in arguments[: [a.endswith(":~/") for a in arguments].index(True)]:
            shutil.copy2(file, HOME / "copied")
        return 0
    command = next(a.removeprefix("--command=") for a in arguments if a.startswith("--command="))
    if "systemctl show" in command:
        service = take("services")
        if service == "active":
            (HOME / "started").touch()
        elif (HOME / "started").exists():
            wait_for_log()
        if service == "error":
            print("ssh: connect to host 10.0.0.2 port 22: Connection refused", file=sys.stderr)
            return 255
        asked = command.partition("--property=")[2].split(",")
        for name, value in shown(service).items():
            if name in asked:
                print(f"{name}={value}")
    elif "journalctl" in command:
        print("rl step 12  loss 0.5", flush=True)
        (HOME / "log").touch()
        time.sleep(60)
    elif "tpu_host.sh" in command:
        if take("installs") == "error":
            return 1
        (HOME / "started").touch()
    return 0


def main() -> int:
    arguments = sys.argv[1:]
    with (HOME / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    if arguments[2] == "queued-resources":
        return queued_resources(arguments[3])
    return tpu_vm(arguments[3], arguments[4:])


if __name__ == "__main__":
    sys.exit(main())
