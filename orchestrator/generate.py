"""`stillhouse generate`: a checkpoint continues prompts, on this machine and without Ray."""

import dataclasses
import json
from collections.abc import Iterator, Sequence

import click

from model.execution import Execution
from model.sampling import Sampling, complete
from model.tokenizer import Tokenizer
from orchestrator.catalogue import find_checkpoint
from workers.cache import keep_compiled_programs
from workers.checkpoint import load_params
from workers.preparer import tokenizer_url
from workers.storage import read_bytes


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A prompt and what the model made of it."""

    prompt: str
    text: str
    """What follows the prompt."""
    num_prompt_tokens: int
    """<bos> included."""
    num_new_tokens: int
    """<eos> included, where the text came to its end."""
    ended: bool
    """True if the model ended the text; false if it was cut off."""


def continue_prompts(
    name: str,
    storage_url: str,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[Continuation]:
    """The checkpoint `RUN`, `RUN@STEP` or a path continues each prompt, as its own document.

    Raises:
        ValueError: there is no such checkpoint, it has no tokenizer or another one, there is no
            prompt, or one is too long.
        CorruptCheckpointError: damaged files.
    """
    if not prompts:
        raise ValueError("There is no prompt: give one as an argument, by --file, or on stdin")
    url, entry = find_checkpoint(name, storage_url)
    place = tokenizer_url(url)
    tokenizer = Tokenizer.load(read_bytes(place))
    if tokenizer.digest != entry["tokenizer_digest"]:
        raise ValueError(
            f"{url} was trained with tokenizer {entry['tokenizer_digest'][:12]}, but {place} is "
            f"{tokenizer.digest[:12]}: put the right SentencePiece model there"
        )
    keep_compiled_programs()
    model, params = load_params(url)
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    continued = complete(
        params,
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        seed=seed,
        sampling=sampling,
        stop_ids=[tokenizer.eos_id],
        how=Execution(entry["config"].get("compute_dtype", "float32")),
    )
    for prompt, ids, new in zip(prompts, encoded, continued, strict=True):
        ended = new[-1] == tokenizer.eos_id
        yield Continuation(prompt, tokenizer.decode(new), len(ids), len(new), ended)


def show(continuation: Continuation, as_json: bool) -> str:
    """What is printed: a line of JSON, or the whole text, its prompt in bold on a terminal."""
    if as_json:
        return json.dumps(dataclasses.asdict(continuation))
    return click.style(continuation.prompt, bold=True) + continuation.text + "\n"
