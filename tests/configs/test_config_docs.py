"""The committed reference of settings is the one that the code gives."""

from pathlib import Path

from configs.reference import reference
from configs.run import RunConfig
from configs.section import settings_of


def test_the_reference_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == reference(), (
        "run `python -m configs.reference > docs/configuration.md`"
    )


def test_the_reference_names_every_setting():
    text = reference()
    for setting in settings_of(RunConfig):
        row = f"## `{setting.path}" if setting.group else f"| `{setting.path}` |"
        assert row in text, setting.path
