"""State, optimizer, step, telemetry, and the loop."""
