"""Windtunnel from Python: simulate a deployment, search its capacity, plan a fleet; results as DataFrames.

    import windtunnel as wt
    run = wt.simulate(model="mistralai/Mistral-7B-v0.1", device="a100", max_model_len=8192, request_rate=2)
    print(run.summary["p99_itl_ms"], run.requests.describe())

Keywords have the names and defaults of the command line's flags. docs/python-api.md explains the results.
"""

from engine.errors import InputError
from windtunnel.api import load, plan, search, simulate
from windtunnel.results import Plan, Run, Search

__all__ = ["InputError", "Plan", "Run", "Search", "load", "plan", "search", "simulate"]
