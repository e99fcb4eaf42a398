"""This machine's own cache: compiled programs and copies of rows. May be removed at any time."""

import os
from pathlib import Path


def cache_dir() -> str:
    """`$STILLHOUSE_CACHE`, or `stillhouse` in the user's cache folder; made if missing."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("STILLHOUSE_CACHE") or home / "stillhouse")
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def keep_compiled_programs() -> None:
    """Lets JAX find what it compiled before, in this process or an earlier one."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(Path(cache_dir()) / "jax"))
    # The default keeps nothing under a second, and a start compiles many programs of less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
