"""Whether the optional dependencies of a package are installed."""

from importlib.util import find_spec

_TRAIN = (
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "psutil",
    "yaml",
    "pydantic",
    "matplotlib",
    "jinja2",
)


def need_training_extra(package: str) -> None:
    """Raise ImportError where a dependency of the extra `train` is missing; packages that need it call this first."""
    if missing := [name for name in _TRAIN if find_spec(name) is None]:
        raise ImportError(f"{package} needs {', '.join(missing)}: pip install 'amtss-fast[train]'")
