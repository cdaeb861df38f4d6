"""Find the commit that an unfinished run resumes from. Lightning is not imported here."""

import os
import sys
from pathlib import Path

from albert_ablate.model.weights import Damaged, load_checkpoint
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.history import is_whole


def last_commit(folder: RunFolder, run: str | None) -> tuple[Path | None, int]:
    """The checkpoint to resume from and its step: the newer of the last two commits that is intact, or (None, 0).

    From an older commit, or from the start, a run ends with the same weights; it only takes longer."""
    trouble: list[str] = []
    for name in ("resume", "resume.previous"):
        committed = folder.checkpoints / f"{name}.ckpt"
        if not committed.exists():
            continue
        try:
            step = _checked(folder, committed, run)
        except Damaged as error:
            trouble.append(str(error))
            continue
        if trouble:
            print(f"{trouble[0]}: the run resumes from its previous commit, at step {step}.", file=sys.stderr)
        return committed, step
    if trouble:
        print(f"{'; '.join(dict.fromkeys(trouble))}: the run starts again from step 0.", file=sys.stderr)
    return None, 0


def _checked(folder: RunFolder, committed: Path, run: str | None) -> int:
    """The step of a commit; raises Damaged if its checkpoint, a history or the best weights are not as committed."""
    file = committed
    try:
        content = load_checkpoint(committed, run)
        step, state = content["global_step"], content["callbacks"].get("Recorder", {})
        for name, length in state.get("lengths", {}).items():
            file = folder.path / f"{name}.arrows"
            if not is_whole(folder.path, name, length, state.get("digests", {}).get(name)):
                raise Damaged("it is not what was committed" if file.exists() else "it is missing")
        best = state.get("best", {}).get("step", -1)
        if 0 <= best < step:  # the best one of this very step is written again
            file = folder.checkpoints / "best.ckpt"
            _require_best(file, best, run)
        return step
    except FileNotFoundError:
        why = "it is missing"
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch has no error of its own for a file that the disk has spoilt
        why = str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {error}".splitlines()[0]
    raise Damaged(f"{file} cannot be read ({why})") from None


def _require_best(file: Path, step: int, run: str | None) -> None:
    """Make best.ckpt hold the weights of `step`, from best.previous.ckpt if need be; raises Damaged if neither does.

    The latter has them if the run was killed between an improvement and the commit that follows it."""
    trouble: Exception | None = None
    for place in (file, file.with_name("best.previous.ckpt")):
        try:
            saved_step = load_checkpoint(place, run)["step"]
            if saved_step != step:
                raise Damaged(f"it is of step {saved_step}, not {step}")
        except (FileNotFoundError, KeyError, ValueError, RuntimeError) as error:
            trouble = trouble or error
        else:
            if place != file:
                os.replace(place, file)
            return
    assert trouble is not None
    raise trouble
