"""GRADE: align a language model by backpropagating a reward through its own generated tokens.

The command line is `grade` or `python -m grade`; `grade.config.reading.load_config` gives programs its settings.
Importing this package loads nothing else, so that `grade --help` is quick.
"""

__version__ = "0.1.0"
