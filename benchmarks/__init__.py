"""What the system costs, measured: every command here writes a JSON that says how, where and at which commit."""
