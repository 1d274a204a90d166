"""What is maximised: the head on the frozen base, a classifier, or a program."""
