"""docs/reliability.md, from what the drill, the attacks and the fuzzers wrote to runs/reliability.

`make reliability` runs them all, and then this.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.reliability.drill import SETTLES

RUNS = Path("runs/reliability")


def read(name: str) -> str:
    """What a script wrote."""
    path = RUNS / name
    if not path.is_file():
        raise SystemExit(f"{path} is not there: `make reliability` runs all that the page shows.")
    return path.read_text(errors="replace")


def machine(found: dict[str, Any]) -> str:
    """What was drilled or attacked, and where."""
    return f"{found['bundle']} on {found['cores']} cores ({found['processor']})"


def drill(found: dict[str, Any]) -> str:
    """Load and faults together."""
    answered = sum(found["answered"].values())
    memory = "\n".join(
        f"| {phase['since']} | {phase['median']:.0f} | {phase['most']:.0f} | "
        f"{phase['slope_a_minute']:+.2f} |"
        for phase in found["megabytes"]
    )
    by_version = ", ".join(f"{count:,} by {name}" for name, count in found["answered"].items())
    since = "\n".join(
        f"| {row['since']} | {row['serves']} | "
        f"{', '.join(f'{n:,} by {name}' for name, n in sorted(row['answered'].items())) or 'none'}"
        f" | {row['a_second']:.0f} |"
        for row in found["answered_since"]
    )
    counters = ", ".join(f"`{name}` {count:g}" for name, count in found["counters"].items())
    refused = ", ".join(f"{count:,} {name}" for name, count in found["refused_503"].items())
    garbage = ", ".join(f"{count:,} with {s}" for s, count in sorted(found["garbage"].items()))
    events = "\n".join(f"| {at} s | {name} |" for at, name in found["events"])
    not_taken = ", ".join(found["faults_not_taken"])
    wrong = "none" if not found["wrong_in_all"] else f"**{found['wrong_in_all']:,}**"
    return f"""`python -m benchmarks.reliability.drill ../shared/data`:
{machine(found)}; {found["minutes"]:g} minutes, 32 clients,
{found["images"]} images whose answers lie at least 0.01 apart in either bundle.

| when | what |
|---|---|
{events}

| | |
|---|---|
| good requests answered, each compared (image by SHA-256, 1e-4) | {answered:,} ({by_version}) |
| wrong, lost, or another 5xx | {wrong} |
| good requests refused with 503 and `Retry-After` | {refused or "none"} |
| connections not accepted after SIGTERM | {found["not_let_in_after_sigterm"]:,} |
| requests whose caller hung up | {found["left"]:,} |
| garbage of thirty kinds | {garbage} |
| slowest good answer or refusal | {found["slowest_seconds"]:.1f} s |
| faults that no run met | {not_taken or "none"} |
| exit status after SIGTERM | {found["exit_status"]} |
| tracebacks in the log | {found["tracebacks"]} |

The service's own counters at the end: {counters}.

| since | served | good requests answered | a second |
|---|---|---|---|
{since}

Resident memory, from {SETTLES} seconds after each event that changes the network, to the next.
A run that hangs cannot be stopped: its thread, and the network that it holds, stay to the end,
which is why a fourth such run ends the process.

| since | median, MB | most, MB | slope, MB a minute |
|---|---|---|---|
{memory}
"""


def attacks(found: dict[str, Any]) -> str:
    """What an attacker costs the others."""
    rows = []
    for row in found["attacks"]:
        quiet, attacked = row["quiet"], row["attacked"]
        answers = ", ".join(f"{count} x {status}" for status, count in row["answers"].items())
        rows.append(
            f"| {row['attack']} | {answers} | "
            f"{quiet['megabytes']:.0f} | {attacked['megabytes']:.0f} | "
            f"{attacked['megabytes'] / quiet['megabytes']:.2f} | {quiet['p99_ms']:.0f} | "
            f"{attacked['p99_ms']:.0f} | {attacked['p99_ms'] / quiet['p99_ms']:.2f} | "
            f"{quiet['images_per_second']:.0f} | {attacked['images_per_second']:.0f} |"
        )
    failed = found["good_requests_failed"]
    return f"""`python -m benchmarks.reliability.attacks`: {machine(found)};
eight clients send good images, one in four of 24 megapixels, while each attack runs from four
processes, after as long without it. All share this machine's cores: a part of the clients' time is
the attackers' own work.

| attack | answers | MB quiet | MB attacked | ratio | p99 quiet, ms | p99 attacked, ms | ratio \
| images/s quiet | images/s attacked |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Good requests that failed: {json.dumps(failed) if failed else "none"}.
"""


def fuzzed(name: str) -> str:
    """The end of a fuzzer's log."""
    path = RUNS / f"fuzz-{name}.log"
    text = read(path.name)
    done = re.findall(r"Done (\d+) runs in (\d+) second", text)
    if not done or not text.rstrip().endswith("exit 0"):
        return f"{name}: **not finished, or something was found** (runs/reliability/{path.name})."
    runs, seconds = done[-1]
    return f"{name}: {int(runs):,} inputs in {int(seconds):,} s, nothing found."


def api() -> str:
    """The end of schemathesis's log."""
    text = read("fuzz-api.log")
    cases = re.findall(r"(\d+) generated|Test cases:\s*(\d+)", text)
    verdict = "nothing found" if text.rstrip().endswith("exit 0") else "**something was found**"
    number = next((a or b for a, b in cases), "?")
    return f"api (schemathesis over the whole description): {number} cases, {verdict}."


def main() -> None:
    """Print the page."""
    print(f"""# Reliability

<!-- Generated by `make reliability`; do not edit. -->

## Load and faults together

{drill(json.loads(read("drill.json")))}
## Attacks

{attacks(json.loads(read("attacks.json")))}
## Fuzzing

- {fuzzed("images")}
- {fuzzed("bundle")}
- {api()}
""")


if __name__ == "__main__":
    main()
