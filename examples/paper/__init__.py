"""The experiments of "Learning to Optimize Quasi-Newton Methods" (TMLR 2023), sections 5.1 to 5.4.

`python -m examples.paper --help` runs them. One file for each part: `tasks/` (what is minimised), `baselines/`
(optimizers that torch lacks), `optimizers.py` (every optimizer by name, with its search space), `experiments.py` (which
optimizers run on which task, for how long), `search.py` (the genetic search), `runs.py` (training runs and their
results on disk), `pictures.py` and `report.py` (what comes out).
"""
