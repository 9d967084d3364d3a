"""What a run tells: metrics.csv, TensorBoard if asked for, and a line on stderr."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_swa.formats.files import find_inside, named_when_full, write_text
from lit_swa.utils import ProgressLine, format_number, print_line

if TYPE_CHECKING:
    from lit_swa.training.loop import Progress

LARGEST = 1e39  # float32 ends before it
METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "val_loss", "bits_per_byte")


def read_metrics(run: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv; NaN where there is no value. Raises FileNotFoundError or ValueError."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no metrics.csv: give directories that a finetuning script wrote.")
    rows = [[float(value or "nan") for value in line.split(",")] for line in read_lines(path)]
    return {name: [row[i] for row in rows] for i, name in enumerate(METRICS)}


def read_lines(path: Path, names: Sequence[str] = METRICS) -> list[str]:
    """The lines of a table below its header, each with a number of a step and numbers or nothing behind it.

    A last line without its end, which a full disk leaves, is not among them. Columns that an older version did not have
    are empty. Raises ValueError for anything else.
    """
    text = find_inside(path.parent, path.name).read_bytes().decode(errors="replace").replace("\r\n", "\n")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    given = lines[0].split(",") if lines else list(names)
    if len(given) < 2 or given != list(names[: len(given)]):
        raise ValueError(f"{path} is damaged: its first line must be {','.join(names)}; mend it or move it away.")
    lines = [line + "," * (len(names) - len(given)) for line in lines]
    for number, line in enumerate(lines[1:], start=2):
        step, *values = line.split(",")
        try:
            numbers = [abs(float(value or "nan")) for value in values]
            fits = 0 <= int(step) < LARGEST and len(numbers) == len(names) - 1
            fits = fits and all(number < LARGEST or not math.isfinite(number) for number in numbers)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{path} is damaged in line {number}, {line[:60]!r}: mend it or move it away.")
    return lines[1:]


class Table:
    """A .csv file with rows of numbers, each of a step. Only the first process writes it."""

    def __init__(self, path: Path, names: Sequence[str], active: bool) -> None:
        """names: of the columns; the first is step."""
        self.path, self.names, self.active = path, names, active

    def rewind(self, step: int) -> None:
        """Remove the rows of later steps than this one, which a resumed run makes again."""
        if self.path.exists():
            kept = [line for line in read_lines(self.path, self.names) if int(line.partition(",")[0]) <= step]
            if self.active:
                self.write_lines(kept)

    def write(self, step: int, **values: float) -> None:
        """Add a row. values: by the names of the columns; the others stay empty."""
        if not self.active:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write_lines([])
        line = ",".join([str(step), *(repr(values[n]) if n in values else "" for n in self.names[1:])])
        with named_when_full(self.path), open(self.path, "a", newline="") as stream:
            stream.write(line + "\n")

    def write_lines(self, lines: list[str]) -> None:
        """The whole table, in one step: a kill leaves what was there."""
        write_text(self.path, "\n".join([",".join(self.names), *lines]) + "\n")


class Log:
    """Writes metrics.csv and TensorBoard's files, and shows the progress line. Only the first process is active."""

    def __init__(self, out_dir: Path, args: Any, steps: int, active: bool) -> None:
        """args: has tensorboard and log_interval. Raises ValueError when TensorBoard is wanted and missing."""
        self.table, self.args, self.active = Table(out_dir / "metrics.csv", METRICS, active), args, active
        self.line, self.board = ProgressLine(steps, "step", interval=10.0), None
        self.beside: Callable[[float], dict[str, float]] = lambda val_loss: {}  # columns that follow from it
        self.token_share: float | None = None  # of what the devices compute in a second: what a token takes
        self.tokens: int | None = None  # before the last step
        self.validating = 0.0  # seconds that the validations take, for each step
        if active and args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard.") from None
            self.board = SummaryWriter(str(out_dir / "tensorboard"))

    def rewind(self, step: int) -> None:
        """See Table."""
        self.table.rewind(step)

    def step(self, progress: "Progress", loss: float, rate: float, norm: float, val_loss: float | None) -> None:
        """Tell of a step: a row every log_interval steps and where there is a validation loss, and the line."""
        if progress.step % self.args.log_interval == 0 or val_loss is not None:
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": progress.tokens}
            more = {} if val_loss is None else {"val_loss": val_loss}
            self.write(progress.step, **values, seconds=progress.step_seconds, **more)
        if self.active:
            text = f"loss {format_number(loss, 3)} | {progress.step_seconds * 1e3:.0f} ms{self.share(progress)}"
            later = (self.line.total - progress.step) * self.validating
            self.line.show(progress.step, text, tokens=progress.tokens, seconds=progress.seconds, later=later)

    def share(self, progress: "Progress") -> str:
        """The model FLOP utilisation of the step, where the devices' peak is known."""
        before, self.tokens = self.tokens, progress.tokens
        if self.token_share is None or before is None or progress.step_seconds <= 0:
            return ""
        return f" | MFU {self.token_share * (progress.tokens - before) / progress.step_seconds:.1%}"

    def write(self, step: int, **values: float) -> None:
        """A row of metrics.csv. values: by the names in METRICS; the others stay empty."""
        values |= self.beside(values["val_loss"]) if "val_loss" in values else {}
        self.table.write(step, **values)
        with named_when_full(self.table.path):
            for name, value in values.items() if self.board is not None else ():
                self.board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        if self.active:
            print_line(text)
