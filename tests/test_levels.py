"""Imports point down, packages hold no cycles, the command line starts light, and some things are never done.

Everything is read from the source with `ast`; nothing is imported.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "weft"

LEVELS = {
    "errors": 0,
    "document": 1, "layout": 1, "config": 1, "atomic": 1, "images": 1,
    "ops": 2, "scorers": 2, "llm": 2,
    "adapters": 3, "synchronizer": 3, "codecs": 3,
    "backbones": 4, "data": 4,
    "training": 5, "generation": 5,
    "evaluation": 6, "serve": 6,
    "cli": 7,
}  # fmt: skip
"""Folder or file directly under src/weft -> level."""

HEAVY = {"torch", "transformers", "peft", "accelerate", "tokenizers", "matplotlib", "pyarrow", "numpy", "PIL"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "google": "protobuf",
    "google_crc32c": "google-crc32c",
    "huggingface_hub": "huggingface-hub",
    "markdown_it": "markdown-it-py",
    "prometheus_client": "prometheus-client",
    "sse_starlette": "sse-starlette",
    "starlette": "fastapi",
    "yaml": "pyyaml",
}
"""What is imported under another name than it is installed by."""
UNNAMED = {"lxml", "sentencepiece"}
"""Used by others on our behalf: Beautiful Soup parses, transformers converts tokenizers."""
UNSAFE_MODULES = {"pickle", "dill", "shelve", "marshal", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}
SAFE_ARGUMENTS = {("Loader", "yaml.SafeLoader"), ("Loader", "yaml.BaseLoader"), ("weights_only", "True")}


@dataclass(frozen=True)
class Import:
    target: str
    """A module of the package, such as weft.data.collate, or the first name of another one."""
    line: int
    runs_at_import: bool
    """At module level and not for type checkers only."""


@dataclass(frozen=True)
class Module:
    name: str
    file: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def unit(self) -> str:
        """The folder or file under the root that it belongs to; empty for the root's own __init__."""
        return [*self.name.split("."), ""][1]


def read_tree(root: Path) -> dict[str, Module]:
    files = {}
    for file in sorted(root.rglob("*.py")):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    modules = {}
    for name, file in files.items():
        tree = ast.parse(file.read_text(), str(file))
        package = name if file.stem == "__init__" else name.rpartition(".")[0]
        modules[name] = Module(name, file, tree, tuple(_imports(tree, package, files.keys())))
    return modules


def _imports(tree: ast.Module, package: str, known) -> Iterator[Import]:
    root = package.split(".")[0]

    def visit(node: ast.AST, runs: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    inside = alias.name.split(".")[0] == root
                    yield Import(alias.name if inside else alias.name.split(".")[0], node.lineno, runs)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                source = ".".join([*base, *([module] if module else [])])
                for alias in names:
                    longer = f"{source}.{alias.name}"
                    if source.split(".")[0] != root:
                        yield Import(source.split(".")[0], node.lineno, runs)
                    else:
                        yield Import(longer if longer in known else source, node.lineno, runs)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, False)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=orelse):
                for child in body:
                    yield from visit(child, False)
                for child in orelse:
                    yield from visit(child, runs)
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, runs)

    yield from visit(tree, True)


def wrong_directions(modules: dict[str, Module]) -> Iterator[str]:
    """Imports from the same level's siblings or from above. The root's __init__ only names what others hold."""
    for module in modules.values():
        if not module.unit:
            continue
        if module.unit not in LEVELS:
            yield f"{module.name}: {module.unit} has no level"
            continue
        for each in module.imports:
            target = modules.get(each.target)
            if target is None or target.unit == module.unit:
                continue
            where = f"{module.name}:{each.line}"
            if not target.unit:
                if module.unit != "cli":
                    yield f"{where}: imports the public names, which are above everything"
            elif LEVELS.get(target.unit, 99) >= LEVELS[module.unit]:
                yield f"{where}: {module.unit} (level {LEVELS[module.unit]}) imports {each.target}"


def cycles(modules: dict[str, Module]) -> Iterator[str]:
    """Import cycles, those inside functions and for type checkers included."""
    finished: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in finished:
            for target in sorted({each.target for each in modules[name].imports}):
                if target in modules and modules[target].unit:
                    yield from walk(target, (*path, name))
            finished.add(name)

    for name in modules:
        if modules[name].unit:
            yield from walk(name, ())


def heavy_at_start(modules: dict[str, Module]) -> Iterator[str]:
    """Chains of module-level imports that lead from the command line to a package that is slow to import."""
    for start in (name for name in modules if modules[name].unit == "cli"):
        seen, todo = set(), [(start,)]
        while todo:
            path = todo.pop()
            if path[-1] in seen:
                continue
            seen.add(path[-1])
            parents = path[-1].split(".")
            for package in (".".join(parents[:i]) for i in range(1, len(parents))):
                todo.append((*path, package))
            for each in modules[path[-1]].imports:
                if each.runs_at_import and each.target in HEAVY:
                    yield f"{' -> '.join(path)} -> {each.target}"
                elif each.runs_at_import and each.target in modules:
                    todo.append((*path, each.target))


def forbidden(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for each in module.imports:
            if each.target in UNSAFE_MODULES:
                yield f"{module.name}:{each.line}: {each.target}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if any((k.arg, ast.unparse(k.value)) in SAFE_ARGUMENTS for k in node.keywords):
                    continue
                if called in UNSAFE_CALLS or (called == "print" and module.unit != "cli"):
                    yield f"{module.name}:{node.lineno}: {called}()"
                for keyword in node.keywords:
                    switched_on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                    if keyword.arg in ("trust_remote_code", "allow_pickle") and switched_on:
                        yield f"{module.name}:{node.lineno}: {keyword.arg}"


CHECKS = [wrong_directions, cycles, heavy_at_start, forbidden]


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_tree(SOURCE)


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_is_in_order(check, modules):
    assert len(modules) > 10, "the source was not found"
    assert list(check(modules)) == []


def test_what_is_imported_is_declared_and_pinned_and_the_other_way_round(modules):
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    extras = (lines for name, lines in project["optional-dependencies"].items() if name != "dev")
    declared = {re.match(r"[\w.-]+", line)[0] for lines in (project["dependencies"], *extras) for line in lines}
    named = {each.target.split(".")[0] for module in modules.values() for each in module.imports}
    imported = {DISTRIBUTIONS.get(name, name) for name in named - {"weft", "__future__"} - sys.stdlib_module_names}
    assert imported | UNNAMED == declared
    pinned = re.findall(r"^([\w.-]+)==", (SOURCE.parents[1] / "constraints.txt").read_text(), re.MULTILINE)
    assert declared <= set(pinned)


BROKEN = {
    "a sibling": (wrong_directions, {"data/a.py": "import weft.backbones.b", "backbones/b.py": ""}),
    "a sibling file of level 1": (wrong_directions, {"config.py": "from weft import atomic", "atomic.py": ""}),
    "from above": (wrong_directions, {"errors.py": "def f():\n    from weft.cli import main", "cli/__init__.py": ""}),
    "from above for types": (
        wrong_directions,
        {"adapters/a.py": "if TYPE_CHECKING:\n    from weft.training.t import T", "training/t.py": ""},
    ),
    "relative": (wrong_directions, {"training/a.py": "from ..generation import engine", "generation/engine.py": ""}),
    "public names": (wrong_directions, {"data/a.py": "from weft import Document"}),
    "no level": (wrong_directions, {"utils.py": ""}),
    "cycle": (cycles, {"data/a.py": "from weft.data import b", "data/b.py": "def f():\n    from weft.data.a import x"}),
    "torch in a verb": (heavy_at_start, {"cli/train.py": "import torch"}),
    "torch behind a verb": (
        heavy_at_start,
        {"cli/train.py": "from weft.layout import x", "layout.py": "import torch.nn"},
    ),
    "torch in a package's init": (
        heavy_at_start,
        {"cli/d.py": "import weft.data.a", "data/__init__.py": "from torch import nn", "data/a.py": ""},
    ),
    "pickle": (forbidden, {"data/a.py": "def f():\n    from pickle import loads"}),
    "torch.load": (forbidden, {"data/a.py": "torch.load('x')"}),
    "torch.load of more than weights": (forbidden, {"data/a.py": "torch.load('x', weights_only=flag)"}),
    "yaml.load": (forbidden, {"data/a.py": "yaml.load('x')"}),
    "yaml.load with any loader": (forbidden, {"data/a.py": "yaml.load('x', Loader=yaml.FullLoader)"}),
    "eval": (forbidden, {"data/a.py": "eval('x')"}),
    "print": (forbidden, {"data/a.py": "print('x')"}),
    "remote code": (forbidden, {"data/a.py": "load('x', trust_remote_code=flag)"}),
    "allow_pickle": (forbidden, {"data/a.py": "np.load('x', allow_pickle=True)"}),
}

FINE = {
    "data/a.py": "from weft.data import b\nmodel.eval()\nyaml.load('x', Loader=yaml.BaseLoader)",
    "data/c.py": "torch.load('x', weights_only=True)",
    "data/b.py": "def f():\n    import torch",
    "document.py": "if TYPE_CHECKING:\n    import torch",
    "cli/__init__.py": "from weft import __version__\nfrom weft.data.a import x\nprint('x')\nf(allow_pickle=False)",
}


def _write(root: Path, files: dict[str, str]) -> dict[str, Module]:
    for name, text in {"__init__.py": "", **files}.items():
        file = root / "weft" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    return read_tree(root / "weft")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_house_is_noticed(name, tmp_path):
    check, files = BROKEN[name]
    assert len(list(check(_write(tmp_path, files)))) >= 1


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_house_is_not_complained_about(check, tmp_path):
    assert list(check(_write(tmp_path, FINE))) == []
