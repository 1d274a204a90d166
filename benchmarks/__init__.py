"""Measurements: every number on the pages is printed by a module of this package or by `grade` itself."""
