"""The engine process: schedules, runs and commits steps."""
