"""Measurements: every number in the README is printed by a module of this package or by `grade` itself."""
