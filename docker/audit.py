"""Look known vulnerabilities of hash-locked requirements up; without a source, say "not run"."""

import subprocess
import sys
from pathlib import Path

SOURCES = ("pypi", "osv")
NOT_RUN = 3


def audit(requirements: str) -> int:
    """Print what is known; 0 for nothing, 1 for something, `NOT_RUN` where nobody was asked."""
    for source in SOURCES:
        done = subprocess.run(
            [
                Path(sys.executable).parent / "pip-audit",
                "--strict",
                "--require-hashes",
                "--disable-pip",
                "--progress-spinner=off",
                f"--vulnerability-service={source}",
                f"--requirement={requirements}",
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode == 0 and "No known vulnerabilities found" in done.stderr:
            print(f"{requirements}: no known vulnerabilities ({source})")
            return 0
        if done.stdout.strip():  # the table of what was found
            print(f"{requirements} ({source}):\n{done.stdout}")
            return 1
        # Else it could not ask: a mirror without advisories calls every package unknown.
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        print(f"{requirements}: {source} cannot be asked: {said[:200]}")
    print(f"{requirements}: NOT RUN")
    return NOT_RUN


if __name__ == "__main__":
    raise SystemExit(max([audit(path) for path in sys.argv[1:]]))
