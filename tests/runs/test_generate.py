"""`stillhouse generate` on a checkpoint of a real, tiny run."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from model.tokenizer import Tokenizer
from orchestrator.cli import main
from tests.helpers.runs import make_teacher, text_folder

PROMPTS = ("the still house", "copper", "")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage")
    make_teacher(path, text_folder(path), "tiny")
    return path


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
    tokenizer = Tokenizer.load(storage / "runs" / "tiny" / "tokenizer.model")
    lines = objects("tiny", *PROMPTS, "--max-new-tokens", "9")
    assert [line["prompt"] for line in lines] == list(PROMPTS)
    for line in lines:
        assert line["num_prompt_tokens"] == 1 + len(tokenizer.encode(line["prompt"]))  # <bos>
        assert line["num_new_tokens"] == 9 or line["ended"]
    assert any(line["text"] for line in lines)


def test_text_is_the_prompt_with_its_continuation():
    asked = ("tiny", *PROMPTS[:2], "--max-new-tokens", "9", "--seed", "4")
    expected = [line["prompt"] + line["text"] + "\n\n" for line in objects(*asked)]
    assert printed(*asked) == "".join(expected)


def test_prompts_come_as_arguments_from_a_file_or_on_stdin(tmp_path: Path):
    options = ("--max-new-tokens", "6", "--temperature", "0.8", "--top-k", "50", "--top-p", "0.9")
    expected = printed("tiny", *PROMPTS, *options)
    lines = "the still house\r\ncopper\n\n"
    (tmp_path / "prompts.txt").write_text(lines, newline="")
    assert printed("tiny", "--file", str(tmp_path / "prompts.txt"), *options) == expected
    assert printed("tiny", "--file", "-", *options, stdin=lines) == expected
    assert printed("tiny", *options, stdin=lines) == expected


def test_a_checkpoint_is_named_as_everywhere(storage: Path):
    newest = objects("tiny", "the", "--temperature", "0", "--max-new-tokens", "4")
    for name in ("tiny@4", str(storage / "runs" / "tiny" / "checkpoints" / "00000004")):
        assert objects(name, "the", "--temperature", "0", "--max-new-tokens", "4") == newest


def test_the_seed_decides_the_text():
    asked = ("tiny", "the", "--temperature", "5", "--max-new-tokens", "20")
    first = objects(*asked, "--seed", "1")
    assert objects(*asked, "--seed", "1") == first
    assert objects(*asked, "--seed", "2") != first
    same = objects("tiny", "the", "the", "--temperature", "5", "--max-new-tokens", "20")
    assert same[0] != same[1]


def test_a_text_ends_with_eos_or_with_the_context(storage: Path):
    # So hot that all of the 320 tokens are as likely: eos comes within 250 in about half the texts.
    asked = ("tiny", *[""] * 16, "--temperature", "1e9", "--max-new-tokens", "1000")
    lines = objects(*asked)
    ended = [line["num_new_tokens"] for line in lines if line["ended"]]
    cut = [line["num_new_tokens"] for line in lines if not line["ended"]]
    assert len(ended) > 1
    assert len(set(ended)) > 1
    assert len(cut) > 1
    assert set(cut) == {256}  # <bos> and 255 tokens fill the context, and one more follows


def test_what_does_not_fit_is_told_in_a_sentence(storage: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    assert "There is no prompt" in refused("tiny", "--file", str(tmp_path / "empty.txt"))
    assert "not both" in refused("tiny", "the", "--file", "-")
    assert "top_p=1.5" in refused("tiny", "the", "--top-p", "1.5")
    assert "temperature=-1.0" in refused("tiny", "the", "--temperature", "-1")
    assert "top_k=0" in refused("tiny", "the", "--top-k", "0")
    assert "no run 'nobody'" in refused("nobody", "the")
    assert "no checkpoint of step 3" in refused("tiny@3", "the")
    said = refused("tiny", "the", "still " * 300)
    assert "prompt 2 has" in said
    assert "context_length is 256" in said


def test_another_tokenizer_is_refused(storage: Path, monkeypatch: pytest.MonkeyPatch):
    own = storage / "runs" / "tiny" / "tokenizer.model"
    # With an empty field at the end: the same model in other bytes.
    other = own.read_bytes() + b"\x12\x00"
    monkeypatch.setattr("orchestrator.generate.read_bytes", lambda url: other)
    said = refused("tiny", "the")
    assert "was trained with tokenizer" in said
    assert str(own) in said
