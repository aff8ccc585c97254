"""LODO in the tools that people train with: one short file for each, run by `python -m examples.frameworks.NAME`.

hf_trainer       Hugging Face's Trainer, which makes an AutoLODO itself or is given a LODO; resuming
hf_accelerate    Accelerate: prepare, accumulate, clip_grad_norm_, save_state and load_state
hf_peft          LoRA with peft: most parameters are frozen, and which of them the optimizer should be given
lightning_module Lightning: configure_optimizers, with an LR scheduler and without; resuming from its checkpoints
swa              torch.optim.swa_utils: AveragedModel, SWALR, update_bn
compiled         a training step under torch.compile
amp              float16 with GradScaler and bfloat16, and the two ways in which a step may be skipped
accumulation     a plain loop with gradient accumulation and clipping
tiny             the models and data of all of them: made on the spot, nothing is downloaded

`pip install -e ".[frameworks]"` brings what the first four need; the others need torch alone. Each takes a few seconds
on a CPU, writes nothing outside a temporary folder, and is a test as well (tests/examples/test_frameworks.py).
"""
