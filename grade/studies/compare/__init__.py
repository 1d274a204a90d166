"""`grade compare`: several methods, several seeds, equal cost."""
