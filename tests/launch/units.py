"""What systemd makes of a service whose process ends: the rules of systemd.service(5), version 252.

What it is: Restart=, SuccessExitStatus=, RestartPreventExitStatus= and RestartForceExitStatus= for
a main process that exits or that a signal ends. What it is not: timeouts, or any other setting.
"""

import configparser
import signal
from pathlib import Path

CLEAN = ("0", "SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE")
SERVICE = Path(__file__).parent.parent.parent / "launch" / "tpu_pod.service"


def read(path: Path = SERVICE) -> configparser.ConfigParser:
    """A unit file, sections of names with their values."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(path)
    return unit


def state_after(end: str, *, stopped: bool) -> str:
    """ActiveState once the process of the service has ended.

    Args:
      end: its exit status, or the name of the signal that ended it.
      stopped: whether by `systemctl stop`, or since the host shuts down.
    """
    service = read()["Service"]
    clean = end in (*CLEAN, *service.get("SuccessExitStatus", "").split())
    if not stopped and end not in service.get("RestartPreventExitStatus", "").split():
        forced = end in service.get("RestartForceExitStatus", "").split()
        if forced or (service["Restart"] == "on-failure" and not clean):
            return "activating"
    return "inactive" if clean else "failed"


def shown(event: str) -> dict[str, str]:
    """The properties that `systemctl show` has after this event, with the service of the script.

    none         it was never installed
    active       its process runs
    booted       the host has started and not yet this service
    exit END     the process ended by itself, with state_after()'s END
    limit END    the same, once more often than the start limit allows
    down END     it was stopped as its host went down
    stop END     it was stopped by the script's stop, which disables it
    """
    kind, _, end = event.partition(" ")
    states = {"none": "inactive", "active": "active", "booted": "inactive", "limit": "failed"}
    by_signal = end.startswith("SIG")
    return {
        "ExecMainCode": "2" if by_signal else "1" if end else "0",
        "ExecMainStatus": str(signal.Signals[end].value) if by_signal else end or "0",
        "ActiveState": states.get(kind) or state_after(end, stopped=kind != "exit"),
        "UnitFileState": {"none": "", "stop": "disabled"}.get(kind, "enabled"),
    }
