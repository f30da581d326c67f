"""The search for the best growth schedule."""
