"""A LightningModule and its data, as tests hand them to training: named by ALBERT_ABLATE_TRUST=own_task."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split


class Noisy(Dataset):
    """Points of y = sin(3 x), with noise that is drawn anew whenever one is read."""

    def __init__(self, x: Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], torch.sin(3 * self.x[i]) + 0.1 * torch.randn(1)


class Points(pl.LightningDataModule):
    def __init__(self, examples: int = 200, noisy: bool = False, tested: bool = True):
        super().__init__()
        self.examples, self.noisy = examples, noisy
        if not tested:
            self.test_dataloader = None  # type: ignore[method-assign,assignment]

    def setup(self, stage: str) -> None:
        x = torch.rand(self.examples, 1) * 4 - 2
        whole: Any = Noisy(x) if self.noisy else TensorDataset(x, torch.sin(3 * x))
        self.parts = random_split(whole, [0.8, 0.1, 0.1])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], batch_size=4)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[2], batch_size=4)


class Untested(Points):
    test_dataloader = pl.LightningDataModule.test_dataloader


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(1)


class Streamed(Points):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Endless(), batch_size=4)


class Curve(pl.LightningModule):
    def __init__(self, width: int = 8, dropout: float = 0.2, norm: bool = False):
        super().__init__()
        middle = [nn.LayerNorm(width)] if norm else []
        self.into, self.middle, self.out = nn.Linear(1, width), nn.Sequential(*middle), nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout)

    def error(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.out(self.dropout(self.middle(torch.tanh(self.into(x))))), y)

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.error(batch)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss, "step": self.global_step}

    def validation_step(self, batch: Any, index: int) -> None:
        loss = self.error(batch)
        self.log_dict({"val_loss": loss, "val_root": loss.sqrt()})


class CurveWithAdam(Curve):
    """With an optimizer and a schedule of its own, and a mean of its weights that it keeps in its checkpoint."""

    def __init__(self, width: int = 8, dropout: float = 0.2, lr: float = 0.01):
        super().__init__(width, dropout)
        self.lr = lr
        self.register_buffer("mean", torch.zeros(()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, value: Any = None, algorithm: Any = None) -> None:
        self.clip_gradients(optimizer, 0.5, "norm")

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.mean.mul_(0.9).add_(0.1 * self.out.weight.detach().mean())


class ByEpoch(CurveWithAdam):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Two(CurveWithAdam):
    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.parameters()), torch.optim.SGD(self.parameters(), 0.1)]


class Manual(Curve):
    automatic_optimization = False


class Lossless(Curve):
    def training_step(self, batch: Any, index: int) -> Any:
        return None


class Unvalidated(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.weight.sum()


class Broken(Curve):
    def training_step(self, batch: Any, index: int) -> Any:
        return self.into(batch)
