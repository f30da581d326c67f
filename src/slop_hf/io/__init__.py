"""Files, YAML and JSON, and addresses on the Hub."""
