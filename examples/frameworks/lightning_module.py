"""Lightning with LODO: a module's configure_optimizers, and runs that are resumed from a checkpoint.

`ClassifierWithoutTuning` returns a `lodo.AutoLODO` there, `Classifier` the paper's LODO with an LR scheduler. A module
that leaves its optimizer to LightningCLI gets AutoLODO by its class path: `--optimizer=lodo.AutoLODO`, or
`optimizer: {class_path: lodo.AutoLODO}` in YAML.

`AveragesInValidation` is a callback that validates averages of the iterates, where the optimizer keeps them.

Lightning gives `step` a closure, clips gradients inside it and steps the scheduler afterwards.
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lodo
from examples.frameworks.tiny import LEAN, network, points

EPOCHS, SAVED_AFTER = 8, 4


class AveragesInValidation(Callback):
    """To be among the trainer's callbacks: validation sees the averages, training and checkpoints the iterates.

    The averages are in the checkpoints too, in the optimizer's state: to deploy those of a checkpoint, the best one
    say, load model and optimizer from it and call `optimizer.eval()`.
    """

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, lodo.LODO):
                optimizer.eval()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, lodo.LODO):
                optimizer.train()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.on_validation_end(trainer, module)


class Classifier(lightning.LightningModule):
    """Trained by the paper's LODO."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = network(seed)
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = lodo.LODO(self.parameters(), lr=1.0, meta_lr=3e-3, **LEAN)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=0.1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # stepped once per epoch

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.losses.append(float(loss.detach()))
        return loss


class ClassifierWithoutTuning(Classifier):
    def configure_optimizers(self) -> Any:
        return lodo.AutoLODO(self.parameters())


class ClassifierWithAverages(Classifier):
    """Sees in `validated` at which parameters it was validated."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.validated: list[list[Tensor]] = []

    def configure_optimizers(self) -> Any:
        return lodo.AutoLODO(self.parameters(), average_share=0.1)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("validation_loss", nn.functional.cross_entropy(self.network(x), y))
        self.validated.append([p.detach().clone() for p in self.parameters()])


def fit(module: Classifier, folder: Path, resume_from: Path | None = None, **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[
            AveragesInValidation(),
            ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=SAVED_AFTER, save_top_k=-1),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    validation = DataLoader(points(512, seed=1), batch_size=512) if isinstance(module, ClassifierWithAverages) else None
    trainer.fit(module, DataLoader(points(), batch_size=32), validation, ckpt_path=resume_from)
    return trainer


def main() -> None:
    makers = (("AutoLODO", ClassifierWithoutTuning), ("with averages", ClassifierWithAverages), ("LODO", Classifier))
    for title, make in makers:
        with tempfile.TemporaryDirectory() as name:
            whole, folder = make(), Path(name)
            fit(whole, folder)
            losses = [*whole.losses[::16], whole.losses[-1]]
            print(f"{title}: training loss:", *(f"{loss:.3f}" for loss in losses))

            resumed = make(seed=1)
            fit(resumed, folder, resume_from=folder / f"epoch={SAVED_AFTER - 1}.ckpt")
            same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
            print(f"resumed after epoch {SAVED_AFTER}: the parameters are the same, bit for bit: {same}")


if __name__ == "__main__":
    main()
