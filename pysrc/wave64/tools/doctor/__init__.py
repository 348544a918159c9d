"""`python -m wave64 doctor`: what this machine needs before a server runs well on it, row by row, with the command."""
