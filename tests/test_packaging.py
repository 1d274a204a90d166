"""What is published: two distributions of one tree, each with what it needs and nothing of the other."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from grade import __version__

ROOT = Path(__file__).parents[1]
KERNELS, TRAINER = "grade-kernels", "grade-align"
PACKAGES = {KERNELS: "grade_kernels", TRAINER: "grade"}
NOT_CLONED = (  # hidden are environments and caches, and .github
    "runs",
    "build",
    "dist",
    "wandb",
    "*.egg-info",
    "PKG-INFO",
    "setup.cfg",
    "__pycache__",
    ".[!g]*",
    ".git",
    ".gitignore",
)


def build(what: str, tree: Path, distribution: str = "") -> subprocess.CompletedProcess[str]:
    """What pip and `build` ask of setuptools, without an environment of its own and so without the network."""
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(tree / 'dist')!r})"
    environment = {**os.environ, "GRADE_DISTRIBUTION": distribution}
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)


def copy_of_tree(tmp_path: Path) -> Path:
    """A clone of the tree, since a build writes into it."""
    return shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(*NOT_CLONED))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """By distribution, the folder of its unpacked source distribution, and the wheel that was built from that."""
    clone, found = copy_of_tree(tmp_path_factory.mktemp("tree")), {}
    for name, package in PACKAGES.items():
        done = build("sdist", clone, name)
        assert done.returncode == 0, done.stderr
        with tarfile.open(clone / "dist" / f"{name.replace('-', '_')}-{__version__}.tar.gz") as archive:
            archive.extractall(clone.parent / package, filter="data")
        (tree,) = (clone.parent / package).iterdir()
        done = build("wheel", tree)
        assert done.returncode == 0, done.stderr
        (wheel,) = (tree / "dist").iterdir()
        found[name] = tree, wheel
    return found


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def needed(message: Message) -> set[str]:
    """Names of what is installed with it, extras left out."""
    lines = [line for line in message.get_all("Requires-Dist", []) if "extra ==" not in line]
    return {re.split(r"[^\w-]", line)[0] for line in lines}


@pytest.mark.parametrize("distribution", PACKAGES)
def test_a_wheel_holds_its_package_whole_and_nothing_else(built, distribution):
    package = PACKAGES[distribution]
    with zipfile.ZipFile(built[distribution][1]) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()}
    assert files == {name for name in here if not name.endswith(".pyc")}
    assert f"{package}/py.typed" in files


@pytest.mark.parametrize("distribution", PACKAGES)
def test_a_source_distribution_holds_what_its_tests_read(built, distribution):
    tree = built[distribution][0]
    for folder in ("grade", "grade_kernels", "benchmarks", "tests", "docs", "examples", ".github"):
        here = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert here and not [path for path in here if not (tree / path.relative_to(ROOT)).is_file()]
    files = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    assert not {name for name in files if not (tree / name).is_file()}


def test_metadata(built):
    for distribution, (_, wheel) in built.items():
        said = metadata(wheel)
        assert (said["Name"], said["Version"]) == (distribution, __version__)
        assert said["License-Expression"] == "Apache-2.0" and said.get_all("License-File") == ["LICENSE"]
        assert said["Summary"] and said["Keywords"] and said["Requires-Python"] == ">=3.10,<3.14"
        assert said.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2601.11574"]
        assert not any(line.startswith("Private") for line in said.get_all("Classifier"))


def test_the_kernels_need_torch_and_triton_and_the_trainer_needs_these_kernels(built):
    kernels, trainer = (metadata(built[name][1]) for name in PACKAGES)
    assert needed(kernels) == {"torch", "triton"} and not kernels.get_all("Provides-Extra")
    (triton,) = (line for line in kernels.get_all("Requires-Dist") if line.startswith("triton"))
    assert 'platform_system == "Linux"' in triton
    assert f"grade-kernels=={__version__}" in trainer.get_all("Requires-Dist")
    assert set(trainer.get_all("Provides-Extra")) == {"dev", "peers", "report", "wandb"}
    lines = [*kernels.get_all("Requires-Dist"), *trainer.get_all("Requires-Dist")]
    assert not [line for line in lines if "extra ==" not in line and "<" not in line and "==" not in line]


def test_the_trainer_needs_every_library_that_it_imports(built):
    """By the names that are imported, which are those of the index but for YAML's."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "grade").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    imported = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
    installed = {name.replace("-", "_") for name in needed(metadata(built[TRAINER][1]))}
    optional = {"matplotlib", "wandb"}
    by_another = {"huggingface_hub", "tokenizers", "pyarrow"}  # of transformers, and the last of datasets
    assert imported - {"grade", "yaml"} - optional - by_another <= installed


@pytest.mark.parametrize("distribution", PACKAGES)
def test_the_long_description_leads_nowhere_that_the_index_has_not(built, distribution):
    said = metadata(built[distribution][1])
    text = said.get_payload()
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert said["Description-Content-Type"] == "text/markdown"
    assert "](" not in re.sub(r"\]\(https://", "", outside) and "<!--" not in outside and "![" not in outside
    page = "README.md" if distribution == TRAINER else "docs/kernels.md"
    blocks = re.findall(r"^```.*?^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks and all(block in text for block in blocks)


def test_the_wheel_of_the_kernels_works_alone(built, tmp_path):
    """The first example of the kernels page, with the wheel on the path and the tree not."""
    example = re.search(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"), re.M | re.S
    )
    code = (
        f"import sys; sys.path.insert(0, {str(built[KERNELS][1])!r})\n{example.group(1)}\n"
        "import importlib.util, grade_kernels\n"
        "assert '.whl' in grade_kernels.__file__ and 'transformers' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_clone_is_both_packages_for_development_only(tmp_path, unpacked):
    """An unpacked source distribution too, where `make install` asks for both."""
    clone = copy_of_tree(tmp_path)
    if unpacked:
        (clone / "PKG-INFO").write_text("Name: grade-kernels\n")
    done = build("wheel", clone, "both" if unpacked else "")
    assert done.returncode == 0, done.stderr
    (wheel,) = (clone / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} >= {"grade", "grade_kernels"}
    said = metadata(wheel)
    assert said["Name"] == TRAINER and KERNELS not in needed(said) and "triton" in needed(said)
    assert "Private :: Do Not Upload" in said.get_all("Classifier", [])
    assert "GRADE_DISTRIBUTION=both " in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "what, distribution, message",
    [
        ("sdist", "", "Set GRADE_DISTRIBUTION to grade-kernels or grade-align"),
        ("wheel", "grade", "GRADE_DISTRIBUTION is grade: it must be"),
    ],
)
def test_a_build_that_would_be_of_neither_is_refused(tmp_path, what, distribution, message):
    done = build(what, copy_of_tree(tmp_path), distribution)
    assert done.returncode != 0 and message in done.stderr
