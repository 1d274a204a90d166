"""`grade report`: a page about a run, a comparison or a folder of runs."""

from __future__ import annotations

from pathlib import Path

from grade.errors import GradeError


def run_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of `folder`.

    Args:
        folder: of a run, of a comparison, or holding several runs; finished or going on.
        output: folder for index.html, figures/ and tables/; None: `folder`/report.

    Returns:
        Path of index.html.

    Raises:
        GradeError: matplotlib is missing, there is no run, or `output` cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise GradeError(
            "grade report draws with matplotlib, and matplotlib is not installed: pip install 'grade-align[report]'."
        ) from error
    from grade.report.data import load_study
    from grade.report.page import write_page
    from grade.report.sections import all_sections

    study = load_study(Path(folder))
    return write_page(study.title, all_sections(study), Path(output) if output else Path(folder) / "report")
