"""Optimizers compared on a GPT and on a ResNet that are larger than the tasks of `benchmarks.shootout`.

`tasks.py` has what a problem is, `gpt.py` and `resnet.py` the two; `contenders.py` the optimizers and what is searched;
`running.py` makes one run, `plan.py` says which runs there are, `report.py` and `pictures.py` tell what came out.
"""
