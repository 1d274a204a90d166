"""What a training step costs in time and memory, as formulas of the policy's shape; needs neither torch nor weights."""
