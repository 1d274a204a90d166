"""`grade report`: one page about a run, a comparison or a folder of runs, from the files that they leave.

    data, groups      a folder -> runs, grouped by method over seeds
    statistics        Welch, Holm, bootstrap, windows, smoothing: pure functions
    measures          runs -> the numbers that figures and tables show
    sections_*        one part of the page: what it says, from figures_* and tables
    page              parts -> HTML, PNG, PDF, CSV, LaTeX

Nothing here needs torch. matplotlib is the extra `report`, and is imported when a report is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from grade.errors import GradeError


def run_report(folder: Path, output: Optional[Path] = None) -> Path:
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
            "grade report draws with matplotlib, and matplotlib is not installed: pip install 'grade[report]'."
        ) from error
    from grade.report.data import load_study
    from grade.report.page import write_page
    from grade.report.sections import all_sections

    study = load_study(Path(folder))
    return write_page(study.title, all_sections(study), Path(output) if output else Path(folder) / "report")
