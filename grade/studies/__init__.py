"""Many runs or many gradients, measured against each other."""
