"""The experiments of "Learning to Optimize Quasi-Newton Methods" (TMLR 2023), sections 5.1 to 5.4.

`python -m examples.paper bowl` runs one; `--help` lists what can be shortened. What is where:

- `tasks/`: what is minimised. `baselines/`: optimizers that neither torch nor pytorch-optimizer has.
- `optimizers.py`: every optimizer by name, and what of it is tuned. `experiments.py`: which of them run on which task.
- `search.py`: the genetic search. `runs.py`: training runs and their results on disk. `plan.py`: an experiment as the
  command line shaped it. `tuning.py`: its searches over worker processes.
- `records.py`, `protocol.py`, `report.py`, `pictures.py`: what is made of the results.
"""
