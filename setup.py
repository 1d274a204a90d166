"""Packaging of the two packages: `grade_kernels` (torch and triton only) and `grade` (the trainer)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version in `grade/__init__.py`, read as text because nothing it needs is installed yet."""
    text = (ROOT / "grade" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("grade/__init__.py does not set __version__.")
    return match.group(1)


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="grade",
    version=read_version(),
    description="Align language models by backpropagating a reward through generated tokens",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2601.11574"},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["grade", "grade.*", "grade_kernels", "grade_kernels.*"]),
    package_data={"grade": ["configs/*.yaml", "py.typed"], "grade_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.10",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "transformers>=5",
        "peft",
        "datasets",
        "accelerate",
        # Reads the docstrings of dataclass fields; before 4.45 its error for a wrong choice names no value.
        "jsonargparse[signatures]>=4.45",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "tensorboard",
    ],
    extras_require={
        "dev": ["pytest", "pytest-benchmark", "hypothesis", "matplotlib", "mypy", "ruff", "types-PyYAML"],
        "report": ["matplotlib"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["grade=grade.cli:main"]},
)
