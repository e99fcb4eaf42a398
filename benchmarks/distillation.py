"""Whether the distilled student beats its control: learning rates, then seeds.

    python -m benchmarks.distillation

The quickstart's teacher is trained once. The learning rate is tuned on the control, by its
held-out bits per byte; the student takes it as it is. Then control and student are trained from
each seed (initialisation, order and draws), and the margin is held against the spread.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.bare import evaluate_here, preset_config, train_here
from benchmarks.figures import Figure, show, tell
from configs.load import read_source
from workers.cache import keep_compiled_programs


@click.command()
@click.option("--rates", default="0.012,0.024,0.048", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
def main(rates: str, seeds: str) -> None:
    keep_compiled_programs()
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        teacher = _bits("quickstart-teacher", storage, "quickstart-teacher")
        tuning = {
            float(rate): _bits("quickstart-control", storage, f"rate-{rate}", float(rate), 0)
            for rate in rates.split(",")
        }
        best = min(tuning, key=lambda rate: tuning[rate])
        pairs = [
            (
                _bits("quickstart-control", storage, f"control-{seed}", best, int(seed)),
                _bits("quickstart-student", storage, f"student-{seed}", best, int(seed)),
            )
            for seed in seeds.split(",")
        ]
    show(
        "Control by learning rate", ["rate", "bits per byte"], [[*pair] for pair in tuning.items()]
    )
    rows = [[i, control, student, control - student] for i, (control, student) in enumerate(pairs)]
    show("Held-out bits per byte", ["seed", "control", "distilled", "margin"], rows)
    controls, students = zip(*pairs, strict=True)
    margin = statistics.mean(controls) - statistics.mean(students)
    spread = max(max(controls) - min(controls), max(students) - min(students))
    tell(
        {
            "teacher": Figure(teacher, "bits per byte"),
            "control": Figure(statistics.mean(controls), "bits per byte"),
            "distilled": Figure(statistics.mean(students), "bits per byte"),
            "margin": Figure(margin, "bits per byte", "> spread"),
            "spread": Figure(spread, "bits per byte"),
            "best_rate": Figure(best, "1"),
        }
    )


def _bits(preset: str, storage: Path, name: str, rate: float | None = None, seed: int = 0) -> float:
    """Held-out bits per byte of a preset's run with a learning rate and a seed."""
    changes: dict[str, Any] = {"seed": seed}
    if rate is not None:
        changes["optimizer"] = {**read_source(preset)["optimizer"], "peak_lr": rate}
    config = preset_config(preset, storage, name, **changes)
    run = train_here(config)
    bits = evaluate_here(run).bits_per_byte
    click.echo(f"{name}: {bits:.4f} bits per byte, {run.train_s:.0f} s", err=True)
    return bits


if __name__ == "__main__":
    main()
