"""What a run will need, before it starts: activations measured on the model, the rest from shapes."""
