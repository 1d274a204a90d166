"""Packaging: two distributions from one source tree.

`grade-kernels` has the package `grade_kernels` and needs torch and triton only; `grade-align` has the trainer, `grade`,
and needs `grade-kernels` of the same version. `GRADE_DISTRIBUTION` chooses what is built. Without it a clone installs
both packages as one, under the trainer's name, which is for development (`pip install -e .`) and not for an index. A
source distribution holds what `SourceDistribution` lists, with all tests, and knows by its PKG-INFO which of the two it
is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
KERNELS, TRAINER = "grade-kernels", "grade-align"


def read_version() -> str:
    """The version in `grade/__init__.py`, read as text because nothing it needs is installed yet."""
    text = (ROOT / "grade" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("grade/__init__.py does not set __version__.")
    return match.group(1)


def chosen() -> str | None:
    """The distribution to build; None: both packages as one.

    Raises:
        SystemExit: GRADE_DISTRIBUTION names no distribution.
    """
    name, unpacked = os.environ.get("GRADE_DISTRIBUTION"), ROOT / "PKG-INFO"
    if not name and unpacked.is_file():
        found = re.search(r"^Name: (.+)$", unpacked.read_text(encoding="utf-8"), re.MULTILINE)
        name = found.group(1).replace("_", "-") if found else None
    if name and name not in (KERNELS, TRAINER, "both"):
        raise SystemExit(f"GRADE_DISTRIBUTION is {name}: it must be {KERNELS}, {TRAINER} or both.")
    return name if name and name != "both" else None


def long_description(page: Path) -> str:
    """A page for the index, where files beside it are not: their links become text, images and comments go."""
    parts = re.split(r"(^```.*?^```$)", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):  # between the blocks of code
        text = re.sub(r"<!--.*?-->\n*", "", parts[i], flags=re.DOTALL)
        text = re.sub(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)\n*|!\[[^\]]*\]\([^)]*\)\n*", "", text)
        parts[i] = re.sub(r"\[([^\]]*)\]\((?!\w+:)[^)]*\)", r"\1", text)
    end = "The files and pages named here are in the source distribution, and so are the tests.\n"
    return "".join(parts).rstrip() + "\n\n" + end


class SourceDistribution(sdist):
    """These folders and files whole: setuptools by itself would leave out what the tests and the pages read."""

    FOLDERS = ("grade", "grade_kernels", "benchmarks", "tests", "docs", "examples", ".github")
    FILES = (
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
    )

    def make_distribution(self) -> None:
        if chosen() is None:
            raise SystemExit(f"Set GRADE_DISTRIBUTION to {KERNELS} or {TRAINER}: a clone is two distributions.")
        os.chdir(ROOT)
        missing = [name for name in (*self.FOLDERS, *self.FILES) if not Path(name).exists()]
        if missing:
            raise SystemExit(f"{', '.join(missing)}: named in setup.py, and not there.")
        inside = (path for folder in self.FOLDERS for path in Path(folder).rglob("*") if path.is_file())
        self.filelist.extend([*self.FILES, *(str(path) for path in inside if path.suffix != ".pyc")])
        self.filelist.sort()
        self.filelist.remove_duplicates()
        super().make_distribution()


VERSION, NAME = read_version(), chosen()
TORCH = ["torch>=2.10,<2.14", "triton>=3.6,<3.10; platform_system == 'Linux'"]
PARTS = {
    KERNELS: {
        "description": "Sampling and differentiating through a language model's tokens, in bounded memory: "
        "Triton kernels and PyTorch",
        "long_description": long_description(ROOT / "docs" / "kernels.md"),
        "keywords": ["triton", "kernels", "gumbel-softmax", "straight-through", "kl-divergence", "vocabulary"],
        "packages": find_packages(include=["grade_kernels", "grade_kernels.*"]),
        "package_data": {"grade_kernels": ["py.typed"]},
        "install_requires": TORCH,
    },
    TRAINER: {
        "description": "Align language models by backpropagating a reward through generated tokens",
        "long_description": long_description(ROOT / "README.md"),
        "keywords": ["language model", "alignment", "rlhf", "gumbel-softmax", "lora", "ppo", "grpo", "reinforce"],
        "packages": find_packages(include=["grade", "grade.*"]),
        "package_data": {"grade": ["configs/*.yaml", "py.typed"]},
        # Of every library the major version that was tested is the last that is allowed; docs/development.md says which
        # versions those were.
        "install_requires": [
            f"{KERNELS}=={VERSION}",
            "torch>=2.10,<2.14",
            "transformers>=5,<6",
            "peft<1",
            "datasets<6",
            "accelerate<2",
            # Reads the docstrings of dataclass fields; before 4.45 its error for a wrong choice names no value.
            "jsonargparse[signatures]>=4.45,<5",
            "numpy<3",
            "pyyaml<7",
            "rich<16",
            "safetensors<1",
            "scipy<2",
            "tensorboard<3",
        ],
        "extras_require": {
            "dev": [
                "pytest",
                "pytest-benchmark",
                "hypothesis",
                "matplotlib<4",
                "mypy",
                "ruff",
                "setuptools>=77",
                "types-PyYAML",
            ],
            "report": ["matplotlib<4"],
            # What `python -m benchmarks.peers` measures beside the methods here; it has no release for Python 3.10.
            "peers": ["trl>=1.16,<2; python_version >= '3.11'"],
            # Older ones cannot be asked for a key without a question on the terminal.
            "wandb": ["wandb>=0.31,<1"],
        },
        "entry_points": {"console_scripts": ["grade=grade.cli:main"]},
    },
}
CLASSIFIERS = [
    "Development Status :: 3 - Alpha",
    "Environment :: GPU :: NVIDIA CUDA",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.10",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
]

part = dict(PARTS[NAME or TRAINER])
if NAME is None:
    kernels = PARTS[KERNELS]
    part["packages"] += kernels["packages"]
    part["package_data"] |= kernels["package_data"]
    part["install_requires"] = [*TORCH, *part["install_requires"][2:]]
    CLASSIFIERS.append("Private :: Do Not Upload")  # indexes refuse it

setup(
    name=NAME or TRAINER,
    version=VERSION,
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2601.11574"},
    classifiers=CLASSIFIERS,
    python_requires=">=3.10,<3.14",
    cmdclass={"sdist": SourceDistribution},
    options={"build": {"build_base": f"build/{NAME or 'both'}"}},  # a wheel takes all that lies in its build folder
    **part,
)
