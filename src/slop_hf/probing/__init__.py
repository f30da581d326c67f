"""Short trial runs that rank candidates: schedules, inits of a stage, or stages that could come next."""
