"""The type stubs are those of the module that was built, and type checkers find mistakes by them."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
PACKAGE = pathlib.Path(heed.__file__).parent


def run(*command, **options):
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, **options)
    return done.returncode, done.stdout + done.stderr


def test_core_stub_is_what_nanobind_says(tmp_path):
    pytest.importorskip("nanobind")
    made = tmp_path / "_core.pyi"
    code, text = run("nanobind.stubgen", "-q", "-m", "heed._core", "-o", str(made))
    assert code == 0, text
    command = "python -m nanobind.stubgen -m heed._core -o python/heed/_core.pyi"
    assert made.read_text() == (PACKAGE / "_core.pyi").read_text(), f"the module has changed; {command}"


def test_the_packages_stub_has_its_names_signatures_and_errors():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    functions = {}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(node.args)
        elif isinstance(node, ast.ClassDef) and node.name != "Array":
            kind = getattr(heed, node.name)
            assert [base.__name__ for base in kind.__bases__] == [base.id for base in node.bases], node.name
    assert set(functions) | {node.name for node in stub.body if isinstance(node, ast.ClassDef)} == set(heed.__all__)
    for name, overloads in functions.items():
        real = inspect.signature(getattr(heed, name))
        for arguments in overloads:
            words = [a.arg for a in arguments.args] + [a.arg for a in arguments.kwonlyargs]
            if arguments.kwarg is None and not any(p.kind is p.VAR_KEYWORD for p in real.parameters.values()):
                assert words == list(real.parameters), name
            defaults = dict(zip([a.arg for a in arguments.args][::-1], arguments.defaults[::-1]))
            defaults |= {a.arg: default for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults) if default}
            for word, default in defaults.items():
                assert ast.literal_eval(default) == real.parameters[word].default, f"{name}: {word}"


def test_a_type_checker_sees_types(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text('import heed\nimport numpy as np\nq = np.zeros((1, 2, 3, 4))\n'
                       'one: np.ndarray = heed.attention(q, q, q, causal=True)\n'
                       'out, lse = heed.attention(q, q, q, return_lse=True)\n'
                       'heed.attention(q, q, q, windows=(3, 0))\nheed.attention(q, q, q, layout="sbhd")\n')
    code, text = run("mypy", "--no-incremental", "--cache-dir", str(tmp_path), str(program),
                     env={**os.environ, "MYPYPATH": str(PACKAGE.parent)})
    lines = {line.split(":")[1] for line in text.splitlines() if ": error:" in line}
    assert lines == {"6", "7"}, text
