"""Processes of this machine, identified over reuse of their ids."""

import contextlib

import psutil


def created(pid: int) -> float | None:
    """Returns seconds from the machine's start to the process's; None when it is dead."""
    # The time of day would change for a live process when the clock is set or a virtual machine wakes up.
    with contextlib.suppress(psutil.Error):
        boot_time, process = psutil.boot_time(), psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return round(process.create_time() - boot_time, 2)  # the kernel counts in hundredths
    return None
