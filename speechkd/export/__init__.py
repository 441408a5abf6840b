"""Students in formats that other tools read."""
