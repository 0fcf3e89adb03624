"""The plan of the house holds: arrows run one way, the model stays short, lines stay readable."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = {p.stem for p in ROOT.glob("*.py")} - {"model_ftp"}
BELOW = {"artefacts", "attention", "batch", "cache", "checkpoint", "config", "files", "finite", "gguf", "inputs", "last_block", "packing",
         "routing", "skipped"}  # of lib/: what the model reads
SOURCES = [p for p in ROOT.rglob("*.py") if not {".venv", "out", "tests", "models"} & set(p.relative_to(ROOT).parts)]


def imports(path):
    """Modules that a file imports anywhere, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] + [f"{node.module}.{a.name}" for a in node.names]
    return found


def ours(path):
    """The rooms of ours that a file imports: {("lib", "files"), ("model_ftp",), ...}."""
    rooms = {"lib", "analysis", "extras", "tests", "model_ftp", *STAGES}
    return {tuple(m.split(".")[:2]) if m.startswith("lib.") else (m.split(".")[0],) for m in imports(path) if m.split(".")[0] in rooms}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    """The model reads the lower rooms of lib/ alone; lib/ reads no stage; no stage reads another; nobody reads analysis, extras or tests but
    they themselves."""
    room, got = path.relative_to(ROOT).parts[0], ours(path)
    names = {g[0] for g in got}
    assert "tests" not in names
    if room == "lib":
        assert names <= {"lib", "model_ftp"}
        if path.stem in BELOW:
            assert names <= {"lib"} and {g[1] for g in got if len(g) > 1} <= BELOW
    elif path == ROOT / "model_ftp.py":
        assert names <= {"lib"} and {g[1] for g in got if len(g) > 1} <= BELOW
    elif len(path.relative_to(ROOT).parts) == 1:
        assert names <= {"lib", "model_ftp"}
    else:
        assert names <= {"lib", "model_ftp", room, *STAGES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_in_a_function_but_of_heavy_libraries(path):
    heavy = {"transformers", "datasets", "huggingface_hub", "gguf", "matplotlib", "lm_eval"}
    for f in ast.walk(ast.parse(path.read_text())):
        if isinstance(f, ast.FunctionDef):
            for node in ast.walk(f):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
                assert {n.split(".")[0] for n in names} <= heavy, f"{path.name}: {f.name}"


def test_the_model_is_short():
    assert len((ROOT / "model_ftp.py").read_text().splitlines()) <= 550
    assert len(list(ROOT.glob("*.py"))) <= 10


def test_the_loss_and_the_numbers_come_first():
    """A stage's first function holds its flags; every flag has a help text, and every number an interval."""
    for name in sorted(STAGES):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        first = next(n for n in tree.body if isinstance(n, ast.FunctionDef))
        assert first.name == "get_args", name
        calls = [n for n in ast.walk(first) if isinstance(n, ast.Call) and n.args and isinstance(n.args[0], ast.Constant)
                 and str(n.args[0].value).startswith("--")]
        assert calls, name
        for call in calls:
            kw = {k.arg: k.value for k in call.keywords}
            assert "help" in kw, f"{name} {call.args[0].value}"
            assert not (isinstance(kw.get("type"), ast.Name) and kw["type"].id in ("int", "float")), f"{name} {call.args[0].value} has no interval"


def test_documents_stay_short():
    assert len((ROOT / "README.md").read_bytes()) <= 16 * 1024 and len((ROOT / "RESULTS.md").read_bytes()) <= 30 * 1024


def test_functions_fit_a_screen():
    """At most 80 lines of code in a function, docstrings and blank lines aside."""
    for path in SOURCES:
        text = path.read_text()
        lines = text.splitlines()
        for f in ast.walk(ast.parse(text)):
            if isinstance(f, ast.FunctionDef):
                doc = f.body[0] if ast.get_docstring(f) else None
                skip = range(doc.lineno, doc.end_lineno + 1) if doc else ()
                code = [i for i in range(f.lineno, f.end_lineno + 1) if lines[i - 1].strip() and i not in skip]
                assert len(code) <= 80, f"{path.name}: {f.name} has {len(code)} lines"


def test_readme_names_what_there_is():
    """Every script that README and the Makefile run exists."""
    for doc in ("README.md", "RESULTS.md", "Makefile"):
        for script in re.findall(r"(?:python|\(PY\)) ((?:[\w/]+/)?\w+\.py)", (ROOT / doc).read_text()):
            assert (ROOT / script).exists(), f"{doc}: {script}"
