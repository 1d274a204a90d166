"""The ahead-of-time compiler of the kernels: its command, what it reads from a binary, and its cases."""
