"""Every documented public callable of the standard library and the installed packages, under its public name.

Source files are parsed, not imported, so nothing runs. `numpy.linalg._linalg.svd` is found as `numpy.linalg.svd`, by
following the `from … import …` statements of the packages. Callables written in C have no source; those of a few modules
known to be harmless are read from the imported module.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Folders and modules that are tests, vendored copies or programs rather than libraries.
_LEFT_OUT = """
    test tests testing _test conftest testing_utils benchmarks lib2to3 idlelib turtledemo site-packages dist-packages
    _vendor vendor vendored _vendored externals _external extern thirdparty third_party
    pip setuptools pkg_resources wheel distutils mypy mypyc torchgen pytest_timeout
"""
_REPETITIVE = {"transformers.models", "narwhals.stable"}  # near copies of one text many times over
_HIDDEN = {"ntpath", "genericpath", "this", "antigravity"}
_KNOWN_AS = {"posixpath": "os.path"}
_IN_C = """
    builtins math cmath itertools functools operator collections time datetime array struct zlib bisect heapq io json os sys gc
    socket select mmap sqlite3 re random string decimal hashlib binascii threading queue ssl unicodedata weakref types codecs
    marshal pickle csv signal errno statistics contextvars asyncio lzma bz2 tracemalloc
    numpy numpy.linalg numpy.fft numpy.random numpy.char numpy.strings scipy.special
    torch torch.linalg torch.fft torch.special
"""


_Home = tuple[str, str]  # defining module, name in it


class Documented(NamedTuple):
    """A module (`module` is its own name) or a callable, with its docstring."""

    name: str
    module: str
    doc: str


@dataclass
class _Source:
    """What one file defines and imports; names are as written, nothing is resolved."""

    module: str
    doc: str
    public: set[str] | None = None  # __all__, where the source spells it out
    defined: dict[str, str] = field(default_factory=dict)  # "svd", "Queue.get" → docstring
    imported: dict[str, str] = field(default_factory=dict)  # local name → full name
    starred: list[str] = field(default_factory=list)  # modules of `from … import *`


def documented(pool: Executor) -> list[Documented]:
    """Modules and callables with a docstring, sorted by name, every one under one name. Files are parsed in `pool`."""
    paths = sysconfig.get_paths()
    found = in_source({Path(paths[key]).resolve() for key in ("stdlib", "purelib", "platlib")}, pool)
    owners = {name.rpartition(".")[0] for name in found}  # torch.Tensor has methods with docstrings, and none of its own
    for entry in in_c(owners | set(found)):
        found.setdefault(entry.name, entry)
    return [found[name] for name in sorted(found)]


def in_source(roots: Iterable[Path], pool: Executor) -> dict[str, Documented]:
    """What the Python files of all packages in the folders `roots` define, by public name."""
    files = sorted(file for root in roots for file in _files(root))
    sources = {source.module: source for source in pool.map(_parse, files, chunksize=64) if source}
    return {entry.name: entry for entry in _public(sources)}


def in_c(known: set[str]) -> Iterator[Documented]:
    """Callables without source, and the methods in C of classes with (those in `known`) and without."""
    seen: set[int] = set()
    for module in _IN_C.split():
        space = importlib.import_module(module)
        entries = [(name, vars(space).get(name)) for name in getattr(space, "__all__", None) or dir(space)]
        entries = [(name, value) for name, value in entries if not name.startswith("_") and callable(value)]
        for name, value in sorted(entries, key=lambda e: (getattr(e[1], "__name__", "") != e[0], e[0])):
            full = name if module == "builtins" else f"{module}.{name}"
            if id(value) in seen or inspect.isfunction(value):
                continue
            seen.add(id(value))
            if inspect.isclass(value):
                if full not in known and _root(value.__module__.lstrip("_")) != _root(module):
                    continue  # of another package, only imported there
                yield from _c_methods(value, full, module, is_known=full in known)
            if doc := inspect.getdoc(value):
                yield Documented(full, module, _without_signature(doc))


def _files(root: Path) -> Iterator[tuple[str, str]]:
    """(module name, path) of the Python files of the packages in a folder."""
    left_out = set(_LEFT_OUT.split())
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        name = ".".join(parts)
        usable = not left_out & set(parts) and all(part.isidentifier() for part in parts)
        if usable and not any((name + ".").startswith(skip + ".") for skip in _REPETITIVE):
            yield _KNOWN_AS.get(name, name), str(path)


def _parse(file: tuple[str, str]) -> _Source | None:
    module, path = file
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return None  # a template, or syntax of another Python version
    source = _Source(module, ast.get_docstring(tree) or "")
    package = module if Path(path).name == "__init__.py" else module.rpartition(".")[0]
    exports: list[ast.expr] = []
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                if alias.name == "*":
                    source.starred.append(base)
                else:
                    source.imported[alias.asname or alias.name] = f"{base}.{alias.name}"
        elif isinstance(node, ast.ClassDef):
            _define(source, node.name, node)
            for method in node.body:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(method):
                    _define(source, f"{node.name}.{method.name}", method)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _define(source, node.name, node)
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Expr) and _changes_all(node):
            exports.append(node.value)
    lists = [value.elts for value in exports if isinstance(value, ast.List | ast.Tuple)]
    if exports and len(lists) == len(exports):
        source.public = {str(item.value) for items in lists for item in items if isinstance(item, ast.Constant)}
    return source


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The module's statements, with those inside `if` and `try`."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _statements(node.body + [stmt for handler in node.handlers for stmt in handler.body] + node.orelse)
        else:
            yield node


def _define(source: _Source, name: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    doc = ast.get_docstring(node, clean=False)
    if doc or "." not in name:
        source.defined[name] = doc or source.defined.get(name, "")


def _changes_all(node: ast.Assign | ast.AugAssign | ast.Expr) -> bool:
    """`__all__ = …`, `__all__ += …` or `__all__.extend(…)`."""
    target: ast.expr = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", node.value)
    if isinstance(target, ast.Call) and isinstance(target.func, ast.Attribute):
        target = target.func.value
    return isinstance(target, ast.Name) and target.id == "__all__"


def _is_property(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(d) or ast.unparse(d).endswith((".setter", ".deleter")) for d in method.decorator_list)


def _public(sources: dict[str, _Source]) -> Iterator[Documented]:
    imports = _Imports(sources)
    names: dict[_Home, list[str]] = {}  # definition → its public names
    for module in sorted(sources):
        if _is_public(module):
            for name in imports.namespace(module):
                home = imports.home(module, name)
                if home and not name.startswith("_") and _root(home[0]) == _root(module):
                    names.setdefault(home, []).append(f"{module}.{name}")
            if sources[module].doc:
                yield Documented(module, module, sources[module].doc)
    for (home_module, name), candidates in sorted(names.items()):
        best = _canonical(home_module, name, candidates)
        module = best.rpartition(".")[0]
        for member, doc in sources[home_module].defined.items():
            owner, _, method = member.partition(".")
            if owner == name and doc and not method.startswith("_"):
                yield Documented(f"{best}.{method}" if method else best, module, doc)


def _canonical(home: str, name: str, candidates: list[str]) -> str:
    """The shortest public name: that of the defining module or of a package around it if there is one."""
    around = [c for c in candidates if (home + ".").startswith(c.rpartition(".")[0] + ".")]
    return min(around or candidates, key=lambda c: (c.count("."), c.rpartition(".")[2] != name, c))


class _Imports:
    """Follows names from module to module, as `from … import …` passes them on."""

    def __init__(self, sources: dict[str, _Source]) -> None:
        self._sources = sources
        self._homes: dict[_Home, _Home | None] = {}
        self._namespaces: dict[str, set[str]] = {}

    def home(self, module: str, name: str) -> _Home | None:
        """The module that defines what `module` calls `name`, and its name there; None if no source defines it."""
        key = (module, name)
        if key not in self._homes:
            self._homes[key] = None  # also what a circle of imports comes back to
            self._homes[key] = self._find(module, name)
        return self._homes[key]

    def _find(self, module: str, name: str) -> _Home | None:
        source = self._sources.get(module)
        if source is None:
            return None
        if name in source.defined:
            return module, name
        if name in source.imported:
            origin, _, original = source.imported[name].rpartition(".")
            return self.home(origin, original)
        stars = [other for other in source.starred if name in self.namespace(other)]
        return self.home(stars[-1], name) if stars else None  # the last import wins

    def namespace(self, module: str) -> set[str]:
        """Names that `from module import *` would bring, as far as the source tells."""
        if module not in self._namespaces:
            self._namespaces[module] = set()
            source = self._sources.get(module)
            if source is not None:
                names = {name for name in source.defined if "." not in name} | set(source.imported)
                names = names.union(*(self.namespace(other) for other in source.starred))
                public = source.public
                self._namespaces[module] = {n for n in names if (not n.startswith("_") if public is None else n in public)}
        return self._namespaces[module]


def _c_methods(cls: type, full: str, module: str, is_known: bool) -> Iterator[Documented]:
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if name.startswith("_") or not isinstance(method, types.MethodDescriptorType | types.ClassMethodDescriptorType):
            continue
        owner = method.__objclass__  # a class with source may hide its C part in a private base, as torch.Tensor does
        private_base = is_known and owner.__module__.rpartition(".")[2].startswith("_")
        if (owner is cls or private_base) and (doc := inspect.getdoc(method)):
            yield Documented(f"{full}.{name}", module, _without_signature(doc))


def _without_signature(doc: str) -> str:
    """C functions state their signature in the first line."""
    first, _, rest = doc.strip().partition("\n")
    is_signature = "->" in first or ("(" in first and first.rstrip().endswith((")", "]")))
    return rest if is_signature else doc


def _is_public(module: str) -> bool:
    return not any(part.startswith("_") for part in module.split(".")) and module not in _HIDDEN


def _root(module: str) -> str:
    """The distribution's name space: the standard library counts as one."""
    top = module.partition(".")[0]
    return "" if top in sys.stdlib_module_names else top
