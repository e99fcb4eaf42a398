"""What is loaded: nothing heavy by commands that only read, and by each process what it needs.

Costs a process for all commands, and one for each kind of process of a run.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.load import parse_run
from orchestrator.run_folder import RunFolder
from tests.helpers.runs import text_folder, tiny_values
from tests.helpers.stored_targets import store
from workers.dataset import RowId
from workers.record import LOGS, STEPS, EventWriter, SegmentWriter
from workers.storage import join
from workers.targets_protocol import TargetSpec

HEAVY = {"grain", "jax", "orbax", "ray", "tensorstore", "wandb"}

# Calls the commands of stdin, one after the other; tells how each ended, and what is loaded then.
_CALL = """
import json, sys
from click.testing import CliRunner
from orchestrator.cli import main
for command in json.load(sys.stdin):
    result = CliRunner().invoke(main, command)
    output = result.output + repr(result.exception or "")
    print(json.dumps([result.exit_code, output, sorted(sys.modules)]))
"""


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage with one run that has ended, and with stored targets."""
    text_folder(tmp_path)
    folder = RunFolder(str(tmp_path), "run")
    folder.create(parse_run(tiny_values(tmp_path, "run"), "test"), {"run_id": "run-1"})
    status = {"name": "run", "state": "finished", "reason": None, "attempt": 1, "step": 1}
    status |= {"num_steps": 1, "line": {}, "preparing": None, "checkpoints": [], "faults": {}}
    status |= {"teachers": {"wanted": 0, "replicas": {}}, "bits_per_byte": {}, "digest": None}
    folder.write_status(status)
    steps = SegmentWriter(join(folder.url, STEPS), "a0001-h0000", 60)
    steps.append({"attempt": 1, "start_step": 0})
    line = {"step": 1, "attempt": 1, "loss": 2.0, "stall_s": {}, "step_s": 0.1, "tokens": 10}
    steps.append(line | {"ce_loss": 2.0, "kd_loss": 0.0, "grad_norm": 1.0, "lr": 0.1})
    steps.close()
    events = EventWriter(folder.url, "student-a0001-h0000")
    events.say("host_ready", attempt=1, host=0, step=0, start="fresh", machine="here", pid=1)
    events.close()
    logs = SegmentWriter(join(folder.url, LOGS), "student", 60)
    logs.append({"time_s": 1.0, "who": "student", "level": "INFO", "message": "here"})
    logs.close()
    store(tmp_path, TargetSpec("data", "teacher", "codec", 0, "class"), [RowId(0, 0)])
    return tmp_path


def called(storage: Path, commands: list[list[str]]) -> list[tuple[str, set[str]]]:
    """What each command printed, and the modules that were loaded by then."""
    done = subprocess.run(
        [sys.executable, "-c", _CALL],
        input=json.dumps([[*command, "--storage", str(storage)] for command in commands]),
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for command, (code, output, _) in zip(commands, told, strict=True):
        assert code == 0, (command, output)
    return [(output, set(modules)) for _, output, modules in told]


def test_commands_that_read_storage_or_configuration_load_nothing_heavy(storage: Path) -> None:
    file = storage / "file.yaml"
    student = tiny_values(storage, "student") | {
        "objective": {"kind": "distill"},
        "teacher": {"checkpoint": "run", "codec": {"kind": "hybrid"}},
    }
    file.write_text(yaml.safe_dump(student))
    commands = [
        ["list"],
        *(["status", "run", *more] for more in ([], ["--json"])),
        *([name, "run"] for name in ("log", "events", "logs")),
        ["checkpoints", "run", "--verify"],
        ["run", str(file), "--check"],
        *(
            ["targets", *more]
            for more in (["list"], ["verify"], ["prune", "--keep-bytes", "0", "--yes"])
        ),
        ["report", "run"],
        ["rm", "run", "--yes"],
    ]
    for command, (output, modules) in zip(commands, called(storage, commands), strict=True):
        assert output or command[0] == "rm"
        assert HEAVY.isdisjoint(modules), command


def test_help_loads_what_prints_it() -> None:
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from orchestrator.cli import main\n"
        "for command in (['--help'], ['run', '--help'], ['targets', 'build', '--help']):\n"
        "    assert CliRunner().invoke(main, command).exit_code == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    loaded = set(done.stdout.decode().split())
    assert (HEAVY | {"numpy", "pydantic", "fsspec", "yaml", "matplotlib"}).isdisjoint(loaded)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("orchestrator.launch", HEAVY - {"ray"} | {"ray.serve", "ray.train"}),
        ("orchestrator.controller_actor", HEAVY - {"ray"} | {"ray.serve", "ray.train"}),
        ("orchestrator.attempt", HEAVY - {"ray"} | {"ray.serve", "ray.train"}),
        ("orchestrator.tracking", HEAVY - {"ray"} | {"ray.serve", "ray.train"}),
        ("workers.preparer_actor", HEAVY),
        ("workers.evaluator_actor", HEAVY),
        ("workers.snapshot_keeper", HEAVY - {"ray"} | {"ray.serve", "ray.train"}),
        ("workers.serve_teacher", HEAVY - {"ray"} | {"ray.train"}),
        ("workers.teacher", {"grain", "ray", "wandb"}),
        ("workers.serve_replicas", HEAVY - {"ray"} | {"ray.train"}),
    ],
)
def test_a_process_of_a_run_loads_what_it_needs(module: str, without: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    loaded = set(done.stdout.decode().split())
    assert module in loaded
    assert without.isdisjoint(loaded)
