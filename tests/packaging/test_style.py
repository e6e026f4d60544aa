"""Size, layering and portability rules that no linter of ours knows."""

import ast
import re

import pytest

MAX_FILE, MAX_FUNCTION, MAX_JIT_BODY = 350, 60, 100  # non-blank lines

# Paths that exist on one machine only, and documents that are not in the repository.
FOREIGN = re.compile(r"(?<![\w./-])/(?:work|home|root|Users)/|\.\./shared|\bdesign(?:\.md| section)")

# A module may import its own layer and those before it. What is not named here (cli, demo, ...) is the last layer.
LAYERS = (
    {"kernels"},
    {"sequence", "diffusion", "data", "config", "files", "optional", "presets", "recipes"},
    {"model"},
    {"training", "generation", "evaluation"},
)


def non_blank(lines):
    return sum(bool(line.strip()) for line in lines)


def is_jit(function):
    return any(re.search(r"\bjit\b", ast.unparse(decorator)) for decorator in function.decorator_list)


def long_functions(source, name):
    """`file:line name lines` of each function that is too long."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = non_blank(lines[node.lineno - 1 : node.end_lineno])
            limit = MAX_JIT_BODY if is_jit(node) else MAX_FUNCTION
            if count > limit:
                yield f"{name}:{node.lineno} {node.name} has {count} lines, at most {limit} are allowed"


def layer(module):
    """The rank of `transfusion.<module>`."""
    return next((rank for rank, names in enumerate(LAYERS) if module in names), len(LAYERS))


def upward_imports(source, name, own):
    """`file imports module` of each import from a higher layer; `own` is the module's name under `transfusion`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "transfusion":
            imported = [f"transfusion.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        else:
            continue
        for target in imported:
            parts = target.split(".")
            if parts[0] == "transfusion" and layer(parts[1] if len(parts) > 1 else "") > layer(own):
                yield f"{name}:{node.lineno} imports {target}"


@pytest.fixture(scope="module")
def sources(root, python_files):
    return {str(name): (root / name).read_text(encoding="utf-8") for name in python_files}


def test_files_are_short(sources):
    counts = {name: non_blank(source.splitlines()) for name, source in sources.items()}
    assert {name: count for name, count in counts.items() if count > MAX_FILE} == {}


def test_functions_are_short(sources):
    assert [line for name, source in sources.items() for line in long_functions(source, name)] == []


def test_imports_point_downwards(sources):
    wrong = []
    for name, source in sources.items():
        folder, *rest = name.removesuffix(".py").split("/")
        if folder == "kernels":
            wrong += upward_imports(source, name, "kernels")
        elif folder == "transfusion" and rest != ["__init__"]:  # the public face may import everything
            wrong += upward_imports(source, name, rest[0])
    assert wrong == []


def test_nothing_imports_the_bare_folder_name(sources):
    bare = re.compile(r"^\s*(?:from|import) kernels\b", re.MULTILINE)
    assert [name for name, source in sources.items() if bare.search(source) and "packaging" not in name] == []


def test_no_file_names_a_foreign_path_or_document(root, repository_files):
    found = []
    for name in repository_files:
        path = root / name
        if path.is_dir() or b"\0" in (content := path.read_bytes()):
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if match := FOREIGN.search(line):
                found.append(f"{name}:{number} {match[0]}")
    assert found == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (lambda s: list(long_functions(s, "f")), "def f():\n" + "    x = 1\n" * MAX_FUNCTION),
        (lambda s: list(long_functions(s, "f")), "@triton.jit\ndef f():\n" + "    x = 1\n" * MAX_JIT_BODY),
        (lambda s: list(upward_imports(s, "f", "kernels")), "from transfusion.sequence import Batch"),
        (lambda s: list(upward_imports(s, "f", "data")), "from transfusion import Transfusion, model"),
        (lambda s: list(upward_imports(s, "f", "model")), "def f():\n    import transfusion.training.trainer"),
        (FOREIGN.search, "see " + "/".join(["", "work", "notes"])),
        (FOREIGN.search, "as the " + "design" + " section 3 says"),
    ],
)
def test_each_rule_can_fail(rule, source):
    assert rule(source)
