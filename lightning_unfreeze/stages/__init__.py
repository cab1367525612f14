"""A run's plan, its schedules, and the record of what happened: arithmetic first, Lightning last."""
