"""One page about a run, a comparison or a folder of runs, from the files that they leave.

    data, groups      a folder -> runs, grouped by method over seeds
    statistics        Welch, Holm, bootstrap, windows, smoothing: pure functions
    measures          runs -> the numbers that figures and tables show
    sections_*        one part of the page: what it says, from figures_* and tables
    page              parts -> HTML, PNG, PDF, CSV, LaTeX

Nothing here needs torch. matplotlib is the extra `report`, and is imported when a report is made.
"""
