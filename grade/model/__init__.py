"""The contract with transformers and peft: a policy that is measured before it is trusted, loaded and kept."""
