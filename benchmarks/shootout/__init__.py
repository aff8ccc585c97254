"""A comparison of optimizers on many small tasks, each tuned within a stated budget.

`problem.py` says what a task is; `tasks.py` lists them all, with `images.py`, `text.py` and `synthetic.py` behind it.
`contenders.py` has the optimizers and what is tuned of each, `running.py` makes one run, `plan.py` and `tuning.py` say
which runs there are, `sharing.py` shares them out among processes. `scores.py` computes figures from the records,
`report.py` and `pictures.py` write them down. The protocol is in benchmarks/README.md.
"""
