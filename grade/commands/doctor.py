"""`grade doctor`: what this machine has, which path every kernel takes here, and what is missing.

Looking never fails: what cannot be found out is reported as a problem, with the way to mend it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from grade import __version__
from grade.hub import check_hub
from grade.machine import cache_folder

# Distributions whose versions decide how a run behaves; the second column is what installs a missing one.
PACKAGES = {
    "torch": "pip install torch",
    "triton": "pip install triton (Linux only)",
    "transformers": "pip install transformers",
    "peft": "pip install peft",
    "datasets": "pip install datasets",
    "accelerate": "pip install accelerate",
    "jsonargparse": "pip install 'jsonargparse[signatures]'",
    "rich": "pip install rich",
    "safetensors": "pip install safetensors",
    "tensorboard": "pip install tensorboard",
}
OPTIONAL_PACKAGES = {
    "wandb": "pip install 'grade-align[wandb]'",
    "matplotlib": "pip install 'grade-align[report]'",
    "pytest": "pip install -e '.[dev]'",
}


def run_doctor(as_json: bool = False) -> None:
    """Look, and print tables or JSON."""
    report = examine()
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        show(report)


def examine() -> dict[str, Any]:
    """Everything the doctor knows, in types that JSON has.

    Returns:
        {"versions": {name: version or None}, "optional": {same}, "cuda", "rocm": version or None,
        "cpu": {"cores", "torch_threads"}, "devices": [{"name", "kind", "memory_gib"}],
        "kernels": {kernel: {device kind: backend or the reason for none}},
        "hub": {"reachable": bool or None, "detail"}, "caches": {name: folder}, "problems": [text]}
    """
    problems: list[str] = []
    report: dict[str, Any] = {
        "versions": {"grade": __version__, "python": platform.python_version(), **_versions(PACKAGES)},
        "optional": _versions(OPTIONAL_PACKAGES),
    }
    for name, remedy in PACKAGES.items():
        unsupported = name == "triton" and platform.system() != "Linux"
        if report["versions"][name] is None and not unsupported:
            problems.append(f"{name} is missing: {remedy}")
    torch = _import("torch", problems)
    report["cuda"] = torch.version.cuda if torch else None
    report["rocm"] = getattr(torch.version, "hip", None) if torch else None
    threads = torch.get_num_threads() if torch else None
    report["cpu"] = {"cores": os.cpu_count(), "torch_threads": threads}
    report["devices"] = _devices(torch, problems) if torch else []
    kinds = ["cpu"] + (["cuda"] if report["devices"] else [])
    report["kernels"] = _kernels(torch, kinds, problems) if torch else {}
    report["hub"] = check_hub()
    if report["hub"]["reachable"] is False:
        problems.append(
            f"the hub is not reachable ({report['hub']['detail']}): models and datasets must be local "
            "folders or already in the cache; behind a proxy set HTTPS_PROXY, with a mirror HF_ENDPOINT"
        )
    report["caches"] = _caches()
    report["problems"] = problems
    return report


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from rich.console import Console

    from grade.tables import Column, Table

    console = Console()

    def table(title: str, rows: list[list[Any]], headers: Sequence[str] = ("", "")) -> None:
        shown = Table(title, list(map(Column, headers)), rows)
        console.print(shown.rich(title_justify="left", show_header=any(headers)))

    versions = {**report["versions"], "CUDA": report["cuda"], "ROCm": report["rocm"]}
    rows = [[name, version or "-"] for name, version in versions.items()]
    rows += [[f"{name} (optional)", version or "-"] for name, version in report["optional"].items()]
    table("versions", rows)
    cpu = report["cpu"]
    devices = [["cpu", f"{cpu['cores']} cores, torch uses {cpu['torch_threads']} threads"]]
    devices += [[d["kind"], f"{d['name']}, {d['memory_gib']} GiB"] for d in report["devices"]]
    table("devices", devices)
    if report["kernels"]:
        kinds = list(next(iter(report["kernels"].values())))
        rows = [[name, *backends.values()] for name, backends in report["kernels"].items()]
        table("kernels", rows, ["kernel", *[f"on {kind}" for kind in kinds]])
    hub = report["hub"]
    state = {True: "reachable", False: "not reachable", None: "offline mode"}[hub["reachable"]]
    table("places", [["hub", f"{state}: {hub['detail']}"], *map(list, report["caches"].items())])
    for problem in report["problems"]:
        console.print(f"problem: {problem}", markup=False, highlight=False)
    if not report["problems"]:
        console.print("Nothing is missing.")


# --- parts -------------------------------------------------------------------------------------------------


def _versions(packages: dict[str, str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _import(name: str, problems: list[str]) -> Any:
    """A module, or None with a problem: a broken installation is what a doctor is asked about."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a broken library raises
        problems.append(f"{name} cannot be imported: {type(error).__name__}: {error}")
        return None


def _devices(torch: Any, problems: list[str]) -> list[dict[str, Any]]:
    """The accelerators that torch sees, CUDA and ROCm alike."""
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError as error:
            problems.append(f"accelerator {index} does not work: {error}")
            continue
        memory = round(properties.total_memory / 2**30, 1)
        devices.append({"name": properties.name, "kind": f"cuda:{index}", "memory_gib": memory})
    return devices


def _kernels(torch: Any, kinds: list[str], problems: list[str]) -> dict[str, dict[str, str]]:
    """The backend of every public operation of `grade_kernels`, on each kind of device."""
    kernels = _import("grade_kernels", problems)
    backend = _import("grade_kernels.backend", problems)
    products = _import("grade_kernels.common.cpu_products", problems)
    if kernels is None or backend is None or products is None:
        return {}
    try:
        products.forced_library()
    except ValueError as error:
        problems.append(f"kernels: {error}")
    table: dict[str, dict[str, str]] = {}
    for name in sorted(getattr(kernels, "__all__", [])):
        function = inspect.unwrap(getattr(kernels, name))
        # Classes and helpers have one implementation; what has several asks `backend_for`.
        if not inspect.isfunction(function) or not {"backend_for", "SoftTokenRule"} & {*function.__code__.co_names}:
            continue
        table[name] = {}
        for kind in kinds:
            try:
                table[name][kind] = backend.backend_for(name, torch.empty(0, device=kind))
            except (RuntimeError, ValueError) as error:
                table[name][kind] = "none"
                problem = f"kernels: {error}"
                if problem not in problems:
                    problems.append(problem)
    return table


def _caches() -> dict[str, str]:
    """Where downloads and compiled kernels are kept, whether or not the folders exist yet."""
    home = Path.home()
    hub_home = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface")
    hub_cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home / "hub")
    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or hub_home / "datasets")
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    return {
        "hub cache": str(hub_cache),
        "datasets cache": str(datasets),
        "triton cache": str(triton),
        "grade cache": str(cache_folder()),
    }
