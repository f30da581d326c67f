"""The search for the best growth schedules."""
