"""Short trial training that chooses among schedules."""
