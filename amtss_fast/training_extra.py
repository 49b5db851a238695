"""Imported first by the training half: where the extra is not installed, the error says which one."""

from importlib.util import find_spec

_NEEDED = ("transformers", "datasets", "accelerate", "safetensors", "yaml", "pydantic", "matplotlib")

if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(f"the training half needs {', '.join(_missing)}: pip install 'amtss-fast[train]'")
