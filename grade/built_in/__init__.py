"""The small models that the demo and Countdown train for themselves: one trainer, two grammars."""
