"""What a run reads: sources of text, the tokenizer, and the rows that are packed from them."""

from typing import Literal

from pydantic import Field, model_validator

from configs.fault import group_fault
from configs.section import Section

TextFormat = Literal["text", "jsonl", "parquet"]

# Endings of the files that each format reads where a source names no globs of its own.
FORMAT_ENDINGS: dict[TextFormat, tuple[str, ...]] = {
    "text": (
        *(".txt", ".md", ".rst", ".tex", ".sh", ".py", ".pyi", ".js", ".ts", ".go", ".rs"),
        *(".java", ".c", ".h", ".cc", ".cpp", ".hpp"),
    ),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}


class SourceConfig(Section):
    """One folder or file of text, and its share of the training rows."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Name of the source in metrics and file names.",
    )
    path: str = Field(
        min_length=1,
        description="A local folder or file, or any fsspec URL such as `gs://bucket/folder`; "
        "`{stdlib}` stands for the folder of the running Python's standard library.",
    )
    include: tuple[str, ...] = Field(
        default=(),
        description="Globs, relative to the path, of the files that are read; with none, the "
        "usual endings of the format are taken (`**/*.txt`, `**/*.md`, `**/*.py`, ...).",
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Globs, relative to the path, of files that are left out; hidden files and "
        "folders always are.",
    )
    format: Literal["auto", "text", "jsonl", "parquet"] = Field(
        default="auto",
        description="How files are read: `text` takes a file as one document, `jsonl` a line and "
        "`parquet` a record, and `auto` decides by each file's ending.",
    )
    text_field: str = Field(
        default="text",
        min_length=1,
        description="Field of a JSONL or Parquet record that holds the text.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Share of the training rows drawn from this source, relative to the others.",
    )
    max_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many bytes of files in sorted order; the file, line or row "
        "group that crosses the limit is still read.",
    )


class TokenizerConfig(Section):
    """Where the tokenizer comes from."""

    kind: Literal["train", "import", "teacher"] = Field(
        default="train",
        description="`train` makes one from the sources, `import` takes a SentencePiece `.model` "
        "file and `teacher` takes the teacher's.",
    )
    path: str | None = Field(
        default=None, description="SentencePiece `.model` file or URL, for `import` only."
    )
    vocab_size: int | None = Field(
        default=None,
        ge=300,
        le=2**20,
        description="Number of pieces, for `train` only.",
    )
    train_bytes: int = Field(
        default=10_000_000,
        ge=1,
        description="Bytes of training text that a new tokenizer is made from.",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> "TokenizerConfig":
        if self.kind == "train" and self.vocab_size is None:
            message = "kind `train` needs vocab_size; set it, for example to 8192"
            raise group_fault("vocab_size", message, "kind")
        if self.kind == "import" and self.path is None:
            message = "kind `import` needs path; set it to a SentencePiece .model file"
            raise group_fault("path", message, "kind")
        if self.kind != "import" and self.path is not None:
            message = f"kind `{self.kind}` reads no path; remove path or set kind to `import`"
            raise group_fault("path", message, "kind")
        if self.kind != "train" and self.vocab_size is not None:
            message = (
                f"kind `{self.kind}` brings its own vocabulary; remove vocab_size or set kind "
                "to `train`"
            )
            raise group_fault("vocab_size", message, "kind")
        return self


class DataConfig(Section):
    """The text a run learns from and is evaluated on."""

    sources: tuple[SourceConfig, ...] = Field(
        min_length=1, description="Sources of text, mixed by weight."
    )
    tokenizer: TokenizerConfig = Field(description="The tokenizer.")
    row_length: int = Field(
        default=1024,
        ge=2,
        le=2**20,
        description="Positions T in a row; a stored row holds T + 1 tokens.",
    )
    held_out_fraction: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Share of the documents that is kept from training for evaluation.",
    )
    held_out_rows: int = Field(
        default=256, ge=1, description="Most held-out rows that one evaluation reads."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed that decides which documents are held out."
    )

    @model_validator(mode="after")
    def _check_names(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            message = f"two sources are named {doubled[0]!r}; give each its own name"
            raise group_fault("sources", message)
        return self
