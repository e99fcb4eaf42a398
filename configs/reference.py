"""Writes the reference of all settings: `python -m configs.reference > docs/configuration.md`."""

from collections.abc import Iterable

from pydantic import BaseModel

from configs.fault import shown
from configs.run import RecipeConfig, RunConfig
from configs.section import Setting, in_words, settings_of
from model.config import MODEL_PRESETS

_INTRODUCTION = """\
# Configuration

A run is described by one YAML file, or by the name of a preset:

```
stillhouse run student.yaml --set steps=2000 --set optimizer.peak_lr=3e-4
```

- `extends:` names a preset or another file, relative to the file that says it. Groups are merged \
setting by setting; lists are replaced whole. A `model:` group with a `preset` starts anew.
- `--set a.b=value` changes one setting and can be repeated. The value is read as YAML: `null` \
unsets, `[a, b]` is a list, and a number picks an item of a list, as in `data.sources.0.path=text`.
- `stillhouse run … --check` prints the whole configuration and its arithmetic, and starts nothing.
- All faults of a file are reported at once, each with its dotted path.

Settings marked "on resume" may be changed by `stillhouse resume RUN --set …`. All others are \
fixed for the life of a run; a new run with `start_from` takes over the weights of an old one.

This page is made from the code by `python -m configs.reference > docs/configuration.md`.
"""

_RECIPE = """\
A file with `recipe:` is no run: it names several, which are run in order and compared. \
`--set` changes a setting of all of them, beside the recipe's own below."""


def reference() -> str:
    """The reference as Markdown: a section for each group of settings."""
    parts = [_INTRODUCTION, *_sections("Run", "", RunConfig)]
    parts += [f"## Recipe\n\n{_RECIPE}\n", _table(settings_of(RecipeConfig))]
    return "\n".join(parts)


def _sections(title: str, prefix: str, section: type[BaseModel], *more: str) -> Iterable[str]:
    own = [s for s in settings_of(section, prefix) if "." not in s.path.removeprefix(prefix)]
    yield f"## {title}\n\n{' '.join([_about(section), *more])}\n"
    extra = _model_preset() if prefix == "model." else ""
    yield _table((s for s in own if s.group is None), extra)
    for setting in own:
        if setting.group is not None:
            is_list = setting.field.annotation not in (setting.group, setting.group | None)
            path = f"{setting.path}.N" if is_list else setting.path
            optional = setting.field.default is None
            needed = [_sentence(setting.field.description or "")] if optional else []
            yield from _sections(f"`{path}`", f"{path}.", setting.group, *needed)


def _about(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _model_preset() -> str:
    names = ", ".join(f"`{name}`" for name in sorted(MODEL_PRESETS))
    about = "Name of a size, which the other settings then change."
    return f"| `model.preset` | {names} | none | | {about} |\n"


def _table(settings: Iterable[Setting], first_rows: str = "") -> str:
    head = "| Setting | Takes | Default | On resume | |\n|---|---|---|---|---|\n"
    return head + first_rows + "".join(_row(setting) for setting in settings)


def _row(setting: Setting) -> str:
    about = _sentence(setting.field.description or "")
    resume = "yes" if setting.changeable else ""
    takes = _cell(in_words(setting.field))
    return f"| `{setting.path}` | {takes} | {_default(setting)} | {resume} | {_cell(about)} |\n"


def _default(setting: Setting) -> str:
    field = setting.field
    if field.is_required():
        return "required"
    return f"`{_cell(shown(field.get_default(call_default_factory=True)))}`"


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
