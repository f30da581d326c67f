"""Run directories: records of finished stages, snapshots, branches and rollbacks."""
