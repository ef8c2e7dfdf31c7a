"""What a command says when something that it imports is not installed."""

from __future__ import annotations


def missing(error: ImportError, extra: str) -> str:
    """One line: the package that an import did not find and the `extra` of Fanin that brings it.

    Any other fault of an import speaks for itself, as that of the compiled kernels does.
    """
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}: pip install 'fanin[{extra}]'"
    return str(error)
