"""A run: its loop, its evaluations, its folder and what is kept there."""
