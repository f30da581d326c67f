"""Training through a growth schedule."""
