"""Plumbing that every layer uses: YAML and JSON, atomic writes, retries, units, addresses on the Hub."""
