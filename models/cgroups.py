"""Control groups (cgroup v2): what the kernel lets this process have of the machine."""

from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def limits(name: str, root: Path = _ROOT, own: Path = _OWN) -> list[str]:
    """What a control file says in this process's group, and in each around it: all of them hold.

    A container sees its own group as the root of all; a service of systemd's is in several.

    Args:
        name: Of the file, such as `memory.max`.
        root: Where the groups are mounted.
        own: Names the process's group.

    Returns:
        The contents, the innermost first; none where there are no such groups.
    """
    inner = ""
    with suppress(OSError):
        groups = own.read_text().splitlines()
        inner = next((line[4:] for line in groups if line.startswith("0::/")), "")
    # Outside of what is mounted here (`/../x`) nothing is to be seen.
    folder = root if ".." in Path(inner).parts else root / inner
    found = []
    for each in (folder, *folder.parents):
        with suppress(OSError):
            found.append((each / name).read_text().strip())
        if each == root:
            break
    return found
