"""`python -m wave64.bench_serving`: load on a server, measured from outside, by the flags, labels and fields of
SGLang's benchmark. Imports no torch and nothing of the server."""
