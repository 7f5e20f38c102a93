"""The experiments behind the project's claims, for any model and data; not part of the library.

An experiment is its settings, a run that adds records to a `results.jsonl`, and the tables and
plots made of that file. `registry` lists them; `scripts/run_experiment.py` runs them.
"""
