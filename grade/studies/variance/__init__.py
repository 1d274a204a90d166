"""`grade variance`: bias and variance of the gradient estimators at fixed parameters."""
