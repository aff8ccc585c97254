"""Lightning with LODO: a module's configure_optimizers, and a run that is resumed from a checkpoint.

Lightning gives `step` a closure, clips gradients inside it and steps the scheduler afterwards.
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lodo
from examples.frameworks.tiny import LEAN, network, points

EPOCHS, SAVED_AFTER = 8, 4


class Classifier(lightning.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = network(seed)
        self.losses: list[float] = []

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = lodo.LODO(self.parameters(), lr=1.0, meta_lr=3e-3, **LEAN)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS, eta_min=0.1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # stepped once per epoch

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.losses.append(float(loss.detach()))
        return loss


def fit(module: Classifier, folder: Path, resume_from: Path | None = None, **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=SAVED_AFTER, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(points(), batch_size=32), ckpt_path=resume_from)
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = Classifier()
        folder = Path(name)
        fit(whole, folder)
        print("training loss:", *(f"{loss:.3f}" for loss in whole.losses[::16]), f"{whole.losses[-1]:.3f}")

        resumed = Classifier(seed=1)
        fit(resumed, folder, resume_from=folder / f"epoch={SAVED_AFTER - 1}.ckpt")
        same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        print(f"resumed after epoch {SAVED_AFTER}: the parameters are the same, bit for bit: {same}")


if __name__ == "__main__":
    main()
