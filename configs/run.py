"""The typed configuration of one run: everything that decides what is trained, and on what."""

from typing import Any, Literal

from pydantic import Field, field_validator

from configs.data import DataConfig
from configs.distillation import ObjectiveConfig, TeacherConfig
from configs.fault import group_fault
from configs.section import NAME_PATTERN, Section, changeable
from model.config import MODEL_PRESETS, KernelName, ModelConfig, Remat


class OptimizerConfig(Section):
    """AdamW with a linear warm-up and a cosine decay."""

    peak_lr: float = changeable(1e-3, gt=0, description="Learning rate after the warm-up.")
    final_lr_ratio: float = changeable(
        0.1, ge=0, le=1, description="Learning rate of the last step over the peak."
    )
    warmup_steps: int = changeable(0, ge=0, description="Steps of linear warm-up.")
    beta1: float = changeable(0.9, ge=0, lt=1, description="Decay of the gradient's mean.")
    beta2: float = changeable(0.95, ge=0, lt=1, description="Decay of the gradient's square.")
    epsilon: float = changeable(1e-8, gt=0, description="Added to the root of the square.")
    weight_decay: float = changeable(
        0.1, ge=0, description="Decoupled weight decay, on matrices only."
    )
    clip_norm: float = changeable(
        1.0, gt=0, description="Largest global norm of the gradient; larger ones are scaled down."
    )


class BatchConfig(Section):
    """The batch of one optimizer step."""

    rows: int = Field(default=16, ge=1, description="Rows in the global batch of one step.")
    microbatches: int = changeable(
        1, ge=1, description="Parts a step's batch is worked through in, to save memory."
    )


class MeshConfig(Section):
    """How one slice's devices are arranged; slices are an outer data axis."""

    data: int | None = changeable(
        None, ge=1, description="Whole copies of the student in a slice; unset takes what is left."
    )
    fsdp: int = changeable(1, ge=1, description="Devices that share parameters and rows (ZeRO-3).")
    model: int = changeable(1, ge=1, description="Devices that share each matrix product.")


class ClusterConfig(Section):
    """The machines that the student trains on."""

    accelerator: Literal["cpu", "v4", "v5e", "v5p", "v6e"] = changeable(
        "cpu", description="`cpu`, or the generation of the TPU slices."
    )
    topology: str | None = changeable(
        None, description="Chips of one TPU slice by dimension, such as `2x2x2`; unset on CPU."
    )
    num_slices: int = changeable(1, ge=1, description="Slices (on CPU: always 1).")
    min_slices: int | None = changeable(
        None,
        ge=1,
        description="Slices with which the run still goes on when others are lost; unset: all.",
    )
    resize_after_s: float = changeable(
        30.0,
        ge=0,
        description="How long slices may be missing, or be there again, before the run is started "
        "again with as many as there are.",
    )
    num_hosts: int = changeable(1, ge=1, description="Student processes, on CPU only.")
    devices_per_host: int = changeable(
        1, ge=1, description="JAX devices in each student process, on CPU only."
    )
    cpus_per_host: float = changeable(
        1, ge=0, description="CPUs that Ray books for each student process, on CPU only."
    )


class CheckpointConfig(Section):
    """When the state is saved, and which saves are kept."""

    every_steps: int = changeable(100, ge=1, description="Steps between two checkpoints.")
    snapshot_every_steps: int | None = changeable(
        10,
        ge=1,
        description="Steps between two snapshots in the memory of a process beside each host, from "
        "which a run goes on after a fault without reading storage; `null` takes none.",
    )
    keep_latest: int = changeable(2, ge=1, description="Newest checkpoints that are kept.")
    keep_best: int = changeable(
        1, ge=0, description="Checkpoints kept for the lowest held-out bits per byte."
    )


class EvaluationConfig(Section):
    """What the evaluation actor does with each committed checkpoint."""

    enabled: bool = changeable(True, description="Evaluate each checkpoint as it is committed.")
    rows_per_batch: int = changeable(8, ge=1, description="Held-out rows scored at once.")
    kl_to_teacher: bool = changeable(
        True, description="In a distilled run, also measure the divergence from the teacher."
    )
    cpus: float = changeable(0, ge=0, description="CPUs that Ray books for the evaluator.")


class TrackingConfig(Section):
    """Weights & Biases, as a mirror of the run's own record."""

    wandb: Literal["auto", "online", "offline", "off"] = changeable(
        "auto", description="`auto` is online where an API key is found and offline elsewhere."
    )
    project: str = changeable("stillhouse", min_length=1, description="W&B project.")
    entity: str | None = changeable(None, description="W&B team or user; unset takes the default.")


class RecordConfig(Section):
    """The run's own record of steps, events and logs."""

    flush_s: float = changeable(
        5.0, gt=0, description="Longest time that a step's line waits before it is on storage."
    )


class StartFromConfig(Section):
    """Where a new run's state comes from, instead of a random initialisation."""

    checkpoint: str = Field(description="`RUN`, `RUN@STEP` or a path to a checkpoint.")
    state: Literal["weights", "all"] = Field(
        default="weights",
        description="`weights` starts at step 0 from its parameters; `all` forks the other run "
        "at that step, optimizer and data position included.",
    )


class FaultConfig(Section):
    """How many faults of each kind a run outlives before it stops and says why."""

    forget_after_s: float = changeable(
        3600.0, gt=0, description="For how long a fault counts towards its budget and the pauses."
    )

    host_died: int = changeable(10, ge=0, description="Student hosts or slices lost.")
    preempted: int = changeable(100, ge=0, description="Slices taken back by the cloud.")
    driver_died: int = changeable(10, ge=0, description="Losses of the actor driving an attempt.")
    host_hung: int = changeable(10, ge=0, description="Attempts that the watchdog has ended.")
    evaluator_died: int = changeable(10, ge=0, description="Losses of the evaluation actor.")
    no_capacity: int = changeable(20, ge=0, description="Attempts that found no room to start.")
    storage: int = changeable(
        20, ge=0, description="Attempts that storage refused what they cannot go on without."
    )
    anomaly: int = changeable(3, ge=0, description="Anomalies that the run went back for.")
    unknown: int = changeable(3, ge=0, description="Errors of no known kind.")


class WatchdogConfig(Section):
    """How long the students may go without progress before they are ended and started again."""

    start_within_s: float = changeable(
        3600.0, gt=0, description="From an attempt's launch to its first step: machines, state."
    )
    compile_within_s: float = changeable(
        3600.0, gt=0, description="An attempt's first step, with the compilation of its program."
    )
    step_times: float = changeable(
        20.0, gt=1, description="A step may take so many times the longest of the last hundred."
    )
    step_at_least_s: float = changeable(
        120.0, gt=0, description="A step may take this long, however short the others were."
    )
    checkpoint_within_s: float = changeable(
        1800.0, gt=0, description="What a checkpoint may hold up the training."
    )
    silent_within_s: float = changeable(
        120.0, gt=0, description="From one sign of life of the first host to its next."
    )


class AnomalyConfig(Section):
    """What is done about a step whose loss or gradient is not finite, or whose loss leaps.

    No such step is in any checkpoint. `stop` ends the run and says where; `skip` leaves the state
    as it was and goes on, as long as `max_skips` allows; `rollback` starts again from the newest
    checkpoint and leaves out what led to the step, as long as `faults.anomaly` allows.
    """

    on_nan: Literal["skip", "rollback", "stop"] = changeable(
        "stop", description="What follows a loss or gradient that is infinite or not a number."
    )
    on_spike: Literal["ignore", "skip", "rollback", "stop"] = changeable(
        "ignore", description="What follows a loss far above those before it."
    )
    spike_deviations: float = changeable(
        6.0,
        gt=0,
        description="So many standard deviations above the mean of the last `window_steps` steps "
        "a loss is a spike.",
    )
    window_steps: int = changeable(
        100, ge=2, le=10_000, description="Steps that spikes and skips are judged by."
    )
    max_skips: int = changeable(
        5, ge=0, description="Skipped steps among the last `window_steps`; one more stops the run."
    )
    rollback_steps: int = changeable(
        100,
        ge=1,
        description="Steps that a rollback leaves out: the anomaly, and those before it back to "
        "the checkpoint.",
    )


class RunConfig(Section):
    """One run: a student trained on next tokens or distilled from a teacher."""

    name: str = Field(
        pattern=NAME_PATTERN,
        description="The run's name: small letters, digits, `.`, `_` and `-`.",
    )
    storage: str = Field(
        default="./stillhouse-runs",
        min_length=1,
        description="Folder or URL (`gs://…`) that holds runs, data sets and tokenizers.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Seed of the initialisation, the order and the draws.",
    )
    steps: int = changeable(ge=1, description="Optimizer steps; the schedule ends with them.")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Type of activations; master weights are always float32."
    )
    attention: KernelName = changeable(
        "auto",
        description="Kernel of the student's attention: `splash` (TPU), `tokamax` (GPU), `blocked` "
        "and `plain` (anywhere); `auto` takes what suits the platform and the rows' length.",
    )
    remat: Remat = changeable(
        "none",
        description="What the backward pass computes anew to save memory: nothing, all but the "
        "`projections`, or whole `layers`.",
    )
    model: ModelConfig = Field(description="The student's sizes.")
    data: DataConfig = Field(description="Text, tokenizer and rows.")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="What is learnt.")
    teacher: TeacherConfig | None = Field(default=None, description="Needed when distilling.")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="The optimizer.")
    batch: BatchConfig = Field(default=BatchConfig(), description="The batch.")
    mesh: MeshConfig = Field(default=MeshConfig(), description="The mesh of devices.")
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="The student's machines.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="Checkpoints.")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="Evaluation.")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="Weights & Biases.")
    record: RecordConfig = Field(default=RecordConfig(), description="The record.")
    start_from: StartFromConfig | None = Field(
        default=None, description="Weights or a run to start from."
    )
    faults: FaultConfig = Field(default=FaultConfig(), description="Budgets for faults.")
    anomalies: AnomalyConfig = Field(
        default=AnomalyConfig(), description="Losses and gradients that should not be."
    )
    watchdog: WatchdogConfig = Field(
        default=WatchdogConfig(), description="When students count as hung."
    )

    @field_validator("model", mode="before")
    @classmethod
    def _expand_model_preset(cls, model: Any) -> Any:
        if not isinstance(model, dict) or "preset" not in model:
            return model
        changes = dict(model)
        preset = changes.pop("preset")
        if not isinstance(preset, str) or preset not in MODEL_PRESETS:
            names = ", ".join(sorted(MODEL_PRESETS))
            raise group_fault("preset", f"is not a known size; choose one of {names}")
        base = MODEL_PRESETS[preset].model_dump()
        if "vocab_size" in changes and "num_embeddings" not in changes:
            base["num_embeddings"] = None
        return {**base, **changes}

    @property
    def distilled(self) -> bool:
        return self.objective.kind == "distill"


class RecipeConfig(Section):
    """Several ordinary runs, one after the other on one Ray, compared at the end."""

    name: str = Field(pattern=NAME_PATTERN, description="The recipe's name.")
    storage: str = Field(
        default="./stillhouse-runs",
        min_length=1,
        description="Folder or URL that holds all its runs.",
    )
    recipe: tuple[str, ...] = Field(min_length=1, description="Presets or files, in order.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Settings (`a.b: value`) that every run takes."
    )

    @field_validator("settings", mode="before")
    @classmethod
    def _flatten(cls, settings: Any) -> Any:
        return _flat(settings) if isinstance(settings, dict) else settings


def _flat(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups as dotted paths: a group in `settings` changes what it names, no more."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
