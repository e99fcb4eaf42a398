"""`stillhouse generate` on a checkpoint of a real, tiny run."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model.tokenizer import Tokenizer
from orchestrator.cli import main

pytestmark = pytest.mark.slow

PROMPTS = ("the still house", "copper", "")


@pytest.fixture(autouse=True)
def surroundings(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_STORAGE", str(storage))
    # A setting of the whole process, which other tests share.
    monkeypatch.setattr("orchestrator.generate.keep_compiled_programs", lambda: None)


def call(*args: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, ["generate", *args], input=stdin)


def printed(*args: str, stdin: str = "") -> str:
    result = call(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def objects(*args: str, stdin: str = "") -> list[dict]:
    return [json.loads(line) for line in printed(*args, "--json", stdin=stdin).splitlines()]


def refused(*args: str) -> str:
    """The one message of a command that refuses to work."""
    result = call(*args)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


def test_json_tells_each_prompt_its_text_and_counts(storage: Path):
    tokenizer = Tokenizer.load(storage / "runs" / "teacher" / "tokenizer.model")
    lines = objects("teacher", *PROMPTS, "--max-new-tokens", "9")
    assert [line["prompt"] for line in lines] == list(PROMPTS)
    for line in lines:
        assert line["num_prompt_tokens"] == 1 + len(tokenizer.encode(line["prompt"]))  # <bos>
        assert line["num_new_tokens"] == 9 or line["ended"]
    assert any(line["text"] for line in lines)


def test_text_is_the_prompt_with_its_continuation():
    asked = ("teacher", *PROMPTS[:2], "--max-new-tokens", "9", "--seed", "4")
    expected = [line["prompt"] + line["text"] + "\n\n" for line in objects(*asked)]
    assert printed(*asked) == "".join(expected)


def test_prompts_come_as_arguments_from_a_file_or_on_stdin(tmp_path: Path):
    options = ("--max-new-tokens", "6", "--temperature", "0.8", "--top-k", "50", "--top-p", "0.9")
    expected = printed("teacher", *PROMPTS, *options)
    lines = "the still house\r\ncopper\n\n"
    (tmp_path / "prompts.txt").write_text(lines, newline="")
    assert printed("teacher", "--file", str(tmp_path / "prompts.txt"), *options) == expected
    assert printed("teacher", "--file", "-", *options, stdin=lines) == expected
    assert printed("teacher", *options, stdin=lines) == expected


def test_a_checkpoint_is_named_as_everywhere(storage: Path):
    newest = objects("teacher", "the", "--temperature", "0", "--max-new-tokens", "4")
    for name in ("teacher@4", str(storage / "runs" / "teacher" / "checkpoints" / "00000004")):
        assert objects(name, "the", "--temperature", "0", "--max-new-tokens", "4") == newest


def test_the_seed_decides_the_text():
    asked = ("teacher", "the", "--temperature", "5", "--max-new-tokens", "20")
    first = objects(*asked, "--seed", "1")
    assert objects(*asked, "--seed", "1") == first
    assert objects(*asked, "--seed", "2") != first
    same = objects("teacher", "the", "the", "--temperature", "5", "--max-new-tokens", "20")
    assert same[0] != same[1]


def test_a_text_ends_with_eos_or_with_the_context(storage: Path):
    # So hot that all of the 320 tokens are as likely: eos comes within 250 in about half the texts.
    asked = ("teacher", *[""] * 16, "--temperature", "1e9", "--max-new-tokens", "1000")
    lines = objects(*asked)
    ended = [line["num_new_tokens"] for line in lines if line["ended"]]
    cut = [line["num_new_tokens"] for line in lines if not line["ended"]]
    assert len(ended) > 1
    assert len(set(ended)) > 1
    assert len(cut) > 1
    assert set(cut) == {256}  # <bos> and 255 tokens fill the context, and one more follows


def test_what_does_not_fit_is_told_in_a_sentence(storage: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    assert "There is no prompt" in refused("teacher", "--file", str(tmp_path / "empty.txt"))
    assert "not both" in refused("teacher", "the", "--file", "-")
    assert "top_p=1.5" in refused("teacher", "the", "--top-p", "1.5")
    assert "temperature=-1.0" in refused("teacher", "the", "--temperature", "-1")
    assert "top_k=0" in refused("teacher", "the", "--top-k", "0")
    assert "no run 'nobody'" in refused("nobody", "the")
    assert "no checkpoint of step 3" in refused("teacher@3", "the")
    said = refused("teacher", "the", "still " * 300)
    assert "prompt 2 has" in said
    assert "context_length is 256" in said


def test_another_tokenizer_is_refused(storage: Path, monkeypatch: pytest.MonkeyPatch):
    own = storage / "runs" / "teacher" / "tokenizer.model"
    # With an empty field at the end: the same model in other bytes.
    other = own.read_bytes() + b"\x12\x00"
    monkeypatch.setattr("orchestrator.generate.read_bytes", lambda url: other)
    said = refused("teacher", "the")
    assert "was trained with tokenizer" in said
    assert str(own) in said
