"""The server: an api process that speaks HTTP and an engine process that runs the model. Imports nothing itself."""
