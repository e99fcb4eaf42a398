"""What starting a process costs: imports by command and by process of a run, by package.

    python -m benchmarks.imports [--rounds N]

Commands that only read storage or configuration run on an empty storage. Then a small distilled
run on an embedded Ray has each of its processes report its imports (`PYTHONPROFILEIMPORTTIME`);
imports that happen on several threads at once count for each of them.
"""

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import Figure, show, tell

_COMMANDS = {
    "--help": ["--help"],
    "list": ["list"],
    "status": ["status", "teacher"],
    "targets list": ["targets", "list"],
    "run --check": ["run", "quickstart-teacher", "--check"],
}
_GOALS_S = {"--help": 0.5, "list": 1.5, "status": 1.5}
_HEAVY = {"grain", "jax", "orbax", "ray", "wandb"}
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")
_ACTOR = re.compile(r":(?:actor|task)_name:(\S+)")
_NUM_PACKAGES = 5
_NUM_STEPS = 8


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Calls of each command.")
def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="sh-") as scratch:
        storage = Path(scratch, "storage")
        _in_process("teacher", storage, scratch)
        figures = _measure_commands(storage, rounds)
        _in_process("student", storage, scratch)
        figures |= _measure_processes(Path(scratch, "ray"))
    tell(figures)


def _measure_commands(storage: Path, rounds: int) -> dict[str, Figure]:
    figures, rows = {}, []
    for name, arguments in _COMMANDS.items():
        command = [sys.executable, "-m", "orchestrator", *arguments]
        environment = os.environ | {"STILLHOUSE_STORAGE": str(storage)}
        cpu_s = [_cpu_s(command, environment) for _ in range(rounds)]
        profile = environment | {"PYTHONPROFILEIMPORTTIME": "1"}
        told = subprocess.run(command, env=profile, capture_output=True, text=True, check=True)
        packages = _by_package(told.stderr.splitlines())
        median_s = statistics.median(cpu_s)
        rows.append([f"stillhouse {name}", median_s, _heavy(packages), _shown(packages)])
        goal = f"<= {_GOALS_S[name]}" if name in _GOALS_S else ""
        figures[f"command_{name.strip('-').replace(' ', '_')}_cpu"] = Figure(median_s, "s", goal)
    columns = ["command", "CPU s", "heavy packages", "imports, ms"]
    show("Commands", columns, rows)
    return figures


def _cpu_s(command: list[str], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _measure_processes(ray_folder: Path) -> dict[str, Figure]:
    """By the logs of the processes that Ray started."""
    found: dict[str, list[Counter[str]]] = {}
    for log in ray_folder.glob("session_2*/logs/worker-*.err"):
        lines = log.read_text(errors="replace").splitlines()
        if packages := _by_package(lines):
            found.setdefault(_process_name(lines), []).append(packages)
    rows: list[list[Any]] = []
    total_s = 0.0
    for name, processes in sorted(found.items()):
        packages = sum(processes, Counter[str]())
        seconds = packages.total() / 1e6
        total_s += seconds
        shown = _shown(Counter({each: us // len(processes) for each, us in packages.items()}))
        row = [name, len(processes), seconds / len(processes), _heavy(packages), shown]
        rows.append(row)
    columns = ["process", "number", "imports, s each", "heavy packages", "imports, ms"]
    show("Processes that Ray started for the run", columns, rows)
    num = sum(map(len, found.values()))
    return {
        "run_processes": Figure(num, "1"),
        "run_imports": Figure(total_s, "s"),
    }


def _process_name(lines: Iterable[str]) -> str:
    """Of the first actor or task that it had."""
    for line in lines:
        if (name := _ACTOR.search(line)) is not None:
            return re.sub(r"#\w+$|:.*", "", name[1])
    return "idle"


def _by_package(lines: Iterable[str]) -> Counter[str]:
    """Microseconds that the modules of each package took, without what they import."""
    spent: Counter[str] = Counter()
    for self_us, module in _imports(lines):
        spent[module.partition(".")[0]] += self_us
    return spent


def _imports(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for line in lines:
        if (found := _LINE.search(line)) is not None:
            yield int(found[1]), found[2]


def _heavy(packages: Counter[str]) -> str:
    return " ".join(sorted(_HEAVY & packages.keys())) or "none"


def _shown(packages: Counter[str]) -> str:
    dearest = packages.most_common(_NUM_PACKAGES)
    return ", ".join(f"{name} {us / 1000:.0f}" for name, us in dearest)


# The runs, in processes of their own, whose environment Ray passes on.


def _in_process(what: str, storage: Path, scratch: str) -> None:
    environment = {
        **os.environ,
        "RAY_TMPDIR": scratch,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    command = [sys.executable, "-c", f"from benchmarks import imports; imports.{what}('{storage}')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The {what} failed:\n{done.stderr[-4000:]}")


def _config(preset: str, storage: str, name: str, **changes: Any) -> Any:
    """A run of seconds on a little of the preset's text."""
    from benchmarks.bare import preset_config
    from configs.load import read_source

    data = read_source(preset)["data"]
    data["sources"][0]["max_bytes"] = 2_000_000
    data["tokenizer"]["train_bytes"] = 1_000_000
    small = {
        "steps": _NUM_STEPS,
        "data": data | {"row_length": 64, "held_out_rows": 8},
        "optimizer": {"warmup_steps": 1},
        "checkpoint": {"every_steps": _NUM_STEPS},
        "evaluation": {"rows_per_batch": 4},
    }
    return preset_config(preset, Path(storage), name, **(small | changes))


def teacher(storage: str) -> None:
    from benchmarks.bare import train_here

    train_here(_config("quickstart-teacher", storage, "teacher"))


def student(storage: str) -> None:
    from benchmarks.runs import run_to_end
    from orchestrator.launch import connect, create_run

    asked = {"checkpoint": "teacher", "rows_per_batch": 4}
    mirrored = {"wandb": "offline"}
    config = _config("quickstart-student", storage, "student", teacher=asked, tracking=mirrored)
    address = connect(None)
    run_to_end(create_run(config), address, own_core=False)


if __name__ == "__main__":
    main()
