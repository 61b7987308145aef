"""Finds the processes of actors on the cluster of this process, from outside Ray."""

import psutil


def actors_of(name: str) -> list[psutil.Process]:
    """Returns the processes of actors of this class name, oldest first."""
    # Ray titles them `ray::CLASS` or `ray::CLASS.method`.
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = process.cmdline()[:1]
            if title and title[0].removeprefix("ray::").split(".")[0] == name and title[0].startswith("ray::"):
                found.append((process.create_time(), process.pid, process))
        except psutil.NoSuchProcess:
            continue
    return [process for _, _, process in sorted(found)]
