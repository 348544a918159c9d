"""The api process: speaks HTTP. It imports no torch."""
