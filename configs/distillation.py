"""What a student minimises, and the teacher that it learns from."""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.fault import group_fault
from configs.section import NAME_PATTERN, Section, changeable
from model.config import DivergenceName, ValueType


class ObjectiveConfig(Section):
    """What the student minimises."""

    kind: Literal["distill", "next_token"] = Field(
        default="next_token",
        description="`distill` learns the teacher's distribution, `next_token` the text itself.",
    )
    divergence: DivergenceName = Field(
        default="forward_kl",
        description="From the teacher: `forward_kl`, `reverse_kl` or `jsd` of arXiv 2306.13649; "
        "the last two need codec `hidden` or `full`.",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Of `jsd` only, 0.5 unless set: towards 0 it behaves as `forward_kl`, towards "
        "1 as `reverse_kl`.",
    )
    label_weight: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the next-token loss in a distilled run's loss.",
    )
    final_label_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="That share at the last step, reached along a line; unset keeps it constant.",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="Weight of log² Σ exp logits, which keeps logits small; off by default.",
    )


# What each kind of codec takes beside the temperature, and what it is where nothing is said: of
# `gemma3` the 256 draws of its report, otherwise about as many entries as serve a student well.
CODEC_DEFAULTS: dict[str, dict[str, Any]] = {
    "hybrid": {"k": 16, "draws": 32, "values": "bfloat16"},
    "topk": {"k": 64, "values": "bfloat16"},
    "sampled": {"draws": 64},
    "gemma3": {"draws": 256, "values": "bfloat16"},
    "hidden": {},
    "full": {},
}


_VALUE_BYTES: dict[ValueType, int] = {"float32": 4, "bfloat16": 2, "uint8": 1}


class CodecConfig(Section):
    """What the teacher says about a position, and how many bytes it takes.

    What a kind does not take is null.
    """

    kind: Literal["hybrid", "topk", "sampled", "gemma3", "hidden", "full"] = Field(
        default="hybrid",
        description="`hybrid` sends the k largest probabilities and unbiased draws of the rest, "
        "`topk` the k largest and the mass of the rest, `sampled` unbiased draws, `gemma3` "
        "distinct draws with their probabilities, renormalised (biased), `hidden` the final hidden "
        "state, of which the student makes all probabilities, and `full` all of them (for tests).",
    )
    k: int | None = Field(
        default=None,
        ge=1,
        description="Largest probabilities sent; 16 for `hybrid` and 64 for `topk` unless set.",
    )
    draws: int | None = Field(
        default=None,
        ge=1,
        description="Draws; 32 for `hybrid`, 64 for `sampled` and 256 for `gemma3` unless set.",
    )
    values: ValueType | None = Field(
        default=None,
        description="Type of the probabilities that are sent, rounded at random so that their mean "
        "stays; `bfloat16` unless set. `uint8` has steps of 7 %.",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Divides the logits of teacher and student in the distillation loss, which is "
        "multiplied by its square.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kind = values.get("kind", "hybrid")
        defaults = CODEC_DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}
        return defaults | {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _check_kind(self) -> "CodecConfig":
        takes = CODEC_DEFAULTS[self.kind]
        for name in ("k", "draws", "values"):
            if getattr(self, name) is not None and name not in takes:
                known = ", ".join([*takes, "temperature"])
                message = f"is nothing to codec `{self.kind}`, which takes {known}; set it to null"
                raise group_fault(name, message, "kind")
        return self

    def params(self) -> dict[str, Any]:
        """What the codec of this kind takes."""
        names = (*CODEC_DEFAULTS[self.kind], "temperature")
        return {name: getattr(self, name) for name in names}

    def bytes_per_token(self, vocab_size: int) -> int | None:
        """Bytes of targets per position, as `model.targets.bytes_per_token`, without JAX.

        None for hidden states, whose size follows from the teacher's width.
        """
        if self.kind == "hidden":
            return None
        if self.kind == "full":
            return 4 * vocab_size
        id_bits = max((vocab_size - 1).bit_length(), 1)
        num_ids = (self.k or 0) + (self.draws or 0)
        ids_bytes = 4 * -(-num_ids * id_bits // 32)
        if self.values is None:
            return ids_bytes
        num_values = self.k or self.draws or 0
        return ids_bytes + num_values * _VALUE_BYTES[self.values]


class TeacherGroupConfig(Section):
    """More replicas of the teacher, on another kind of machine."""

    name: str = Field(pattern=r"^[a-z0-9-]{1,20}$", description="Tells it from the other groups.")
    replicas: int = changeable(1, ge=1, description="Copies of the teacher in the group.")
    cpus_per_replica: float = changeable(1.0, ge=0, description="CPUs that Ray books per replica.")
    tpus_per_replica: int = changeable(
        0, ge=0, description="TPU chips that Ray books per replica, which is sharded over them."
    )
    gpus_per_replica: int = changeable(
        0, ge=0, description="GPUs that Ray books per replica, which is sharded over them."
    )


class TeacherConfig(Section):
    """The teacher and the pool of replicas that serves it."""

    checkpoint: str = Field(description="The teacher's weights: `RUN`, `RUN@STEP` or a path.")
    codec: CodecConfig = Field(default=CodecConfig(), description="How targets are encoded.")
    pool: str | None = changeable(
        None,
        pattern=NAME_PATTERN,
        description="Name of a pool that runs share, each by equal shares: it serves all that name "
        "it with the same teacher, codec and rows, and has the sum of their `replicas`. Unset, the "
        "run has a pool of its own.",
    )
    replicas: int = changeable(1, ge=1, description="Copies of the teacher that serve targets.")
    min_replicas: int = changeable(
        1, ge=1, description="The fewest copies, where their number follows the need."
    )
    max_replicas: int | None = changeable(
        None,
        ge=1,
        description="The most copies: their number follows the need, as the student's waits and "
        "the replicas' busy time show it. Unset, it stays at `replicas`.",
    )
    rows_per_batch: int = Field(
        default=8, ge=1, description="Rows a replica scores at once; its one compiled shape."
    )
    prefetch_steps: int = changeable(
        4, ge=1, description="Steps whose targets may be on their way at once."
    )
    prefetch_bytes: int = changeable(
        2_000_000_000,
        ge=1,
        description="Bytes of targets that a host may have on their way at once; one step always "
        "may.",
    )
    steps_per_request: int = changeable(
        1,
        ge=1,
        description="Most steps that a host asks for in one request: more cost the host less. It "
        "asks for fewer where its requests would not reach all replicas. At most `prefetch_steps`.",
    )
    cpus_per_replica: float = changeable(1.0, ge=0, description="CPUs that Ray books per replica.")
    tpus_per_replica: int = changeable(
        0, ge=0, description="TPU chips that Ray books per replica, which is sharded over them."
    )
    gpus_per_replica: int = changeable(
        0, ge=0, description="GPUs that Ray books per replica; without chips it runs on the CPU."
    )
    groups: tuple[TeacherGroupConfig, ...] = changeable(
        (),
        description="Further replicas on other kinds of machines, which get work by their speed; "
        "needs sameness `mixed`.",
    )
    answer_within_s: float = changeable(
        60.0, gt=0, description="How long one answer may take before another replica is asked."
    )
    retry_for_s: float = changeable(
        600.0, gt=0, description="How long a step waits for a teacher to answer before it fails."
    )
    labels_after_s: float | None = changeable(
        None,
        gt=0,
        description="How long after the last answer a run without teachers goes on with labels "
        "alone, until one answers again; unset waits.",
    )
    sameness: Literal["exact", "mixed"] = changeable(
        "exact",
        description="`exact` uses teachers of one kind of machine and software, whose answers are "
        "equal bit for bit; `mixed` uses any, equal within rounding.",
    )
    cache_bytes: int = changeable(
        8_000_000_000,  # small beside a disk, and some fifty million tokens of the default codec
        ge=0,
        description="Most bytes that this teacher's answers may take up below `storage`, where "
        "other epochs, attempts and runs find them; 0 keeps none.",
    )
