"""The documentation does what it says: tagged blocks run, links lead somewhere, named files exist.

A block fenced as ```sh test``` runs in bash -e at the root of the repository with the built `heed` on PATH; one fenced as
```cpp test``` is compiled against the built library and run; one fenced as ```python test``` runs by itself beside the
built package. The build folder is HEED_TEST_BUILD, or build/release.
"""
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = pathlib.Path(os.environ.get("HEED_TEST_BUILD", ROOT / "build" / "release"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
FOLDERS = ("src", "include", "cli", "tests", "docs", "bench", "python", "examples", "cmake", ".ci")


def page_name(page):
    return page.relative_to(ROOT).as_posix()


def blocks(tag):
    """Every block fenced with this tag, with the page and line it starts at as its name."""
    found_blocks = []
    for page in PAGES:
        for found in re.finditer(rf"^```{tag}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            line = page.read_text()[:found.start()].count("\n") + 1
            found_blocks.append(pytest.param(found.group(1), id=f"{page_name(page)}:{line}"))
    return found_blocks


def prose(page):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """Headings as they are linked to: lower case, spaces as dashes, most punctuation gone."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def heed_folder():
    for folder in (BUILD, BUILD / "cli", BUILD / "bin"):
        if os.access(folder / "heed", os.X_OK) and (folder / "heed").is_file():
            return folder
    pytest.fail(f"no heed command under {BUILD}; build it or set HEED_TEST_BUILD")


def check(result):
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("script", blocks("sh test"))
def test_shell_block_runs(script, tmp_path):
    environment = dict(os.environ, PATH=f"{heed_folder()}:{os.environ['PATH']}", TMPDIR=str(tmp_path))
    check(subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], cwd=ROOT, env=environment, timeout=300,
                         capture_output=True, text=True))


@pytest.mark.parametrize("source", blocks("cpp test"))
def test_cpp_block_compiles_and_runs(source, tmp_path):
    (tmp_path / "block.cpp").write_text(source)
    compiler = os.environ.get("CXX", "g++")
    check(subprocess.run([compiler, "-std=c++20", "-Wall", "-Wextra", f"-I{ROOT / 'include'}", "block.cpp", "-o", "block",
                          f"-L{BUILD}", "-lheed", f"-Wl,-rpath,{BUILD}"], cwd=tmp_path, capture_output=True, text=True))
    check(subprocess.run([tmp_path / "block"], cwd=ROOT, timeout=300, capture_output=True, text=True))


@pytest.mark.parametrize("source", blocks("python test"))
def test_python_block_runs(source, tmp_path):
    needs = [name for name in re.findall(r"^(?:import|from) (torch|jax|transformers|cupy)\b", source, re.MULTILINE)]
    for name in needs:
        pytest.importorskip(name)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(BUILD / "python"),
                                                                            os.environ.get("PYTHONPATH")])))
    check(subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, timeout=300,
                         capture_output=True, text=True))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page_name(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page_name(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_exist(page):
    for name in re.findall(r"`([\w./*\-]+)`", prose(page)):
        if name.startswith(tuple(folder + "/" for folder in FOLDERS)) and "NAME" not in name:
            assert list(ROOT.glob(name)), f"{page_name(page)} names {name}"


def test_every_page_of_docs_is_linked_to():
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s#]+)", prose(page)):
            linked.add((page.parent / target).resolve())
    folders = {path for path in linked if path.is_dir()}
    for page in ROOT.glob("docs/**/*.md"):
        assert page in linked or page.parent in folders, f"nothing links to {page_name(page)}"
