"""What a run tells: metrics.csv, TensorBoard if asked for, and a line on stderr."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_swa.utils import ProgressLine, print_line

if TYPE_CHECKING:
    from lit_swa.training.loop import Progress

METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "val_loss")


def read_metrics(run: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv; NaN where there is no value. Raises FileNotFoundError or ValueError."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no metrics.csv: give directories that a finetuning script wrote.")
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    try:
        return {name: [float(row[name] or "nan") for row in rows] for name in METRICS}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: it must have the columns {', '.join(METRICS)}.") from None


class Log:
    """Writes metrics.csv and TensorBoard's files, and shows the progress line. Only the first process is active."""

    def __init__(self, out_dir: Path, args: Any, steps: int, active: bool) -> None:
        """args: has tensorboard and log_interval. Raises ValueError when TensorBoard is wanted and missing."""
        self.path, self.args, self.active = out_dir / "metrics.csv", args, active
        self.line, self.board = ProgressLine(steps, "step", interval=10.0), None
        if active and args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard.") from None
            self.board = SummaryWriter(str(out_dir / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Remove the rows of later steps than this one, which a resumed run makes again."""
        if self.active and self.path.exists():
            with open(self.path, newline="") as stream:
                rows = list(csv.reader(stream))
            kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= step]
            with open(self.path, "w", newline="") as stream:
                csv.writer(stream).writerows(kept)

    def step(self, progress: "Progress", loss: float, rate: float, norm: float, val_loss: float | None) -> None:
        """Tell of a step: a row every log_interval steps and where there is a validation loss, and the line."""
        if progress.step % self.args.log_interval == 0 or val_loss is not None:
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": progress.tokens}
            more = {} if val_loss is None else {"val_loss": val_loss}
            self.write(progress.step, **values, seconds=progress.step_seconds, **more)
        if self.active:
            text = f"loss {loss:.3f} | {progress.step_seconds * 1e3:.0f} ms"
            self.line.show(progress.step, text, tokens=progress.tokens, seconds=progress.seconds)

    def write(self, step: int, **values: float) -> None:
        """A row of metrics.csv. values: by the names in METRICS; the others stay empty."""
        if not self.active:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(METRICS) + "\n")
        with open(self.path, "a", newline="") as stream:
            csv.writer(stream).writerow([step, *(repr(values[n]) if n in values else "" for n in METRICS[1:])])
        for name, value in values.items():
            if self.board is not None:
                self.board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        if self.active:
            print_line(text)
