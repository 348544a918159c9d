"""What an operator of a machine uses around the server: verbs of `python -m wave64`."""
