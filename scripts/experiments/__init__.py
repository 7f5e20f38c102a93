"""The experiments that the method's claims rest on, for any model and data.

`settings` says what to run, `results` keeps what was found, `statistics` says how sure it is. Each
experiment has a file of its own, and a script under `scripts/` that calls it.
"""
