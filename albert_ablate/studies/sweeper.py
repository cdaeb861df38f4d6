"""Run a sweep file with no server: any Hydra launcher carries the runs, and only their records are believed."""

import contextlib
import errno
import json
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albert_ablate.config import (
    Config,
    ConfigError,
    Identity,
    as_config_error,
    check,
    compose,
    conf_folder,
    identity,
    quoted,
)
from albert_ablate.config.secrets import HANDED_ON, masked
from albert_ablate.records.folder import RunFolder
from albert_ablate.records.keys import Keys
from albert_ablate.records.signals import stops_handled
from albert_ablate.records.tuning import LEARNING_RATE, read_tuning
from albert_ablate.studies.jobs import KILLED, job, whoami
from albert_ablate.studies.states import has_ended, is_done, is_held, last_line, read_record, state, states
from albert_ablate.studies.sweepfile import REFUSALS, Sweep, asked, of_arm, own_overrides, varied_labels

ATTEMPTS = 3
POLL_SECONDS = 2.0  # seconds between looks at runs that others are training
FRESH_LAUNCH_SECONDS = 60.0  # seconds within which a launch has written down what it is of


@dataclass(frozen=True)
class Planned:
    """A run of a sweep: how it is asked for and where it lies."""

    label: str  # what varies in its arm
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    arm: str
    cfg: Config = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.label} seed={self.seed}"


def plan(
    sweep: Sweep,
    settings: Sequence[Mapping[str, Any]],
    runs: Path,
    extra: Sequence[str] = (),
    tuned: dict[str, float | None] | None = None,
    kept: Keys | None = None,
) -> list[Planned]:
    """The runs of `settings`, each once. `extra` overrides count over the file's. Raises ConfigError for a setting that
    is not allowed, before anything is trained.

    With `tuned` an arm whose learning rate nobody sets takes the one that `albert-ablate tune` found; it is filled in
    with what was found, by label (None: never tuned). `kept` takes note of the arms' keys, for `status`.
    """
    planner = Planner(sweep, runs, extra, tuned)
    planned: dict[Path, Planned] = {}
    for setting in settings:
        run = planner.run(setting)
        planned.setdefault(run.folder, run)
    if kept is not None:
        kept.note(planner.keys)
    return list(planned.values())


def plan_random(
    sweep: Sweep,
    runs: Path,
    extra: Sequence[str] = (),
    tuned: dict[str, float | None] | None = None,
    kept: Keys | None = None,
) -> tuple[list[Planned], list[str], int]:
    """`plan` of a random sweep, the sentences on draws whose values do not go together, and how many runs are missing.

    The next draw takes the place of one that is refused, until REFUSALS in a row are. Raises ConfigError where
    no draw is allowed.
    """
    assert sweep.run_cap is not None
    planner = Planner(sweep, runs, extra, tuned)
    planned: dict[Path, Planned] = {}
    refused: list[str] = []
    allowed = index = in_a_row = 0
    while allowed < sweep.run_cap and in_a_row < REFUSALS:
        try:
            run = planner.run(sweep.draw(index))
            planned.setdefault(run.folder, run)
            allowed, in_a_row = allowed + 1, 0
        except ConfigError as error:
            refused.append(str(error))
            in_a_row += 1
        index += 1
    if not allowed:
        raise ConfigError(refused[0])
    if kept is not None:
        kept.note(planner.keys)
    return list(planned.values()), refused, sweep.run_cap - allowed


class Planner:
    """Settings of one sweep made into runs. What several of them share is composed and packed once."""

    def __init__(
        self, sweep: Sweep, runs: Path, extra: Sequence[str], tuned: dict[str, float | None] | None = None
    ) -> None:
        self.sweep, self.extra, self.tuned = sweep, extra, tuned
        self.place = f"paths.runs={quoted(str(runs.expanduser().resolve()))}"
        self.texts: dict[str, str] = {}
        # by the overrides that make an arm, what they compose to; None where they are refused
        self.keys: dict[tuple[str, ...], Mapping[str, Any] | None] = {}
        self.composed: dict[tuple[str, ...], tuple[tuple[str, ...], Config, Identity]] = {}

    def run(self, setting: Mapping[str, Any]) -> Planned:
        """The run of a setting; ConfigError if it is not allowed."""
        (label,) = varied_labels(self.sweep, [setting])
        own = asked(self.sweep, setting, [*self.extra, self.place])
        seed = own.pop("seed", "seed=0").partition("=")[2]
        try:
            overrides, cfg, who = self._arm(label, own)
            cfg = check({**cfg, "seed": _number(seed)})
        except ConfigError as error:
            self.keys.setdefault(of_arm(own), None)
            raise ConfigError(f"{self.sweep.path}: {label}: {error}") from None
        folder = Path(cfg.paths.runs) / who.setting / f"seed{cfg.seed}"
        return Planned(label, cfg.seed, (*overrides, f"seed={cfg.seed}"), folder, who.arm, cfg)

    def _arm(self, label: str, asked: Mapping[str, str]) -> tuple[tuple[str, ...], Config, Identity]:
        """The overrides of an arm, the tuned learning rate among them, and what they compose to."""
        arm = tuple(asked.values())
        if arm not in self.composed:
            overrides = arm
            cfg, who = self._settled(overrides)
            self.keys[of_arm(asked)] = cfg
            if self.tuned is not None and LEARNING_RATE not in asked:
                found = read_tuning(Path(cfg.paths.runs), who.arm)
                self.tuned[label] = found["rate"] if found else None
                if found:
                    overrides = (*arm, f"{LEARNING_RATE}={found['rate']!r}")
                    cfg, who = self._settled(overrides)
            self.composed[arm] = overrides, cfg, who
        return self.composed[arm]

    def _settled(self, asked: tuple[str, ...]) -> tuple[Config, Identity]:
        from albert_ablate.data.packed import cache_folder, pack
        from albert_ablate.data.tasks import fingerprint
        from albert_ablate.model.build import build

        cfg = check(compose([*asked]))
        text = json.dumps([cfg.data, cfg.tokenizer, cfg.task, cfg.paths.cache], default=dict)
        if text not in self.texts:
            cache = cache_folder(cfg.paths.cache)
            packed = pack(build(cfg.data), build(cfg.tokenizer), cache)
            self.texts[text] = fingerprint(cfg, build, packed.fingerprint, cache)
        return cfg, identity(cfg, self.texts[text])


def _number(text: str) -> Any:
    """A number that an override holds, to its last digit."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def estimates(planned: Iterable[Planned], runs: Path) -> dict[Planned, float | None]:
    """Seconds each run will take: as many per token as done runs of its model's size took; None: no such run."""

    def size(cfg: Mapping[str, Any]) -> str:  # a checked configuration, or that of a record
        parts = [cfg["model"], cfg["data"]["batch"], cfg["trainer"]["precision"]]
        return json.dumps(parts, sort_keys=True, default=dict)

    rates: dict[str, list[float]] = {}
    for record in states(runs) if runs.is_dir() else ():
        if is_done(record) and record["cost"].get("seconds") and record["summary"].get("tokens"):
            rates.setdefault(size(record["config"]), []).append(record["cost"]["seconds"] / record["summary"]["tokens"])
    return {
        p: statistics.median(rates[size(p.cfg)]) * p.cfg.budget.tokens if size(p.cfg) in rates else None
        for p in planned
    }


class Study:
    """Runs being completed by one launcher. `stopped` is the signal that ended it."""

    def __init__(self, launcher: Sequence[str], workers: int, say: Callable[[str], None] = print):
        self.overrides, self.workers, self.say = launcher, workers, say
        self.stopped: int | None = None
        self.desks: list[Path] = []  # of launches that may have workers: one that fails leaves some at work

    def complete(self, planned: Sequence[Planned]) -> dict[Planned, str]:
        """Train what is not done, up to three attempts a run; gives the runs that failed, each with its error."""
        with self._signals():
            errors = self._complete(planned)
        if planned:
            _clear_desks(_launches(planned[0]))
        for p in planned:  # killed between its last word and its tidying up
            folder = RunFolder(p.folder)
            if (folder.checkpoints / "resume.ckpt").exists() and has_ended(p.folder):
                folder.tidy()
        return {p: error for p, error in errors.items() if not has_ended(p.folder)}

    def _complete(self, planned: Sequence[Planned]) -> dict[Planned, str]:
        attempts: Counter[Planned] = Counter()  # of this command: asked again, a run gets three more
        killed: Counter[Planned] = Counter()
        errors: dict[Planned, str] = {}
        given_up: set[Planned] = set()
        fruitless, waiting = 0, False
        while self.stopped is None:
            open_ = [p for p in planned if p not in given_up and not has_ended(p.folder)]
            free = [p for p in open_ if not is_held(p.folder)]
            if not open_:
                break
            if not free:
                if not waiting:
                    self.say(f"{len(open_)} runs are being trained by another process; waiting for them.")
                waiting = True
                time.sleep(POLL_SECONDS)
                continue
            # a run that was in the air when workers died flies alone the third time, so that it takes none with it and
            # none takes it; not sooner, since a node of a cluster that dies has many in the air
            batch = [p for p in free if killed[p] < ATTEMPTS - 1] or free[:1]
            results, trouble, begun = self._launch(batch)
            for i, p in enumerate(batch):
                result = results[i] if results else None
                if result is None and i in begun and not is_held(p.folder):  # some launchers leave the others at work
                    attempts[p] += 1
                    killed[p] += 1
                    errors[p] = KILLED
                elif result and result["status"] in ("failed", "refused"):
                    attempts[p] += 1 if result["status"] == "failed" else ATTEMPTS
                    errors[p] = result["error"]
                if attempts[p] >= ATTEMPTS:
                    given_up.add(p)
                    if killed[p]:
                        note_killed(p, errors[p])
            fruitless = fruitless + 1 if trouble and not begun else 0
            if fruitless == ATTEMPTS:
                raise RuntimeError(f"The launcher failed {ATTEMPTS} times: {trouble}")
        return {p: errors[p] for p in planned if p in given_up}

    def _launch(self, batch: Sequence[Planned]) -> tuple[list[dict] | None, str, set[int]]:
        """One launch: the results of the jobs, or None and what the launcher said; the jobs that were cut short."""
        with _desk(batch) as desk:
            self.desks.append(desk)
            results, trouble = None, ""
            if self.stopped is None:
                with _launcher(self.overrides, desk) as launcher:
                    try:
                        returned = launcher.launch([[] for _ in batch], initial_job_idx=0)
                        results = [r.return_value for r in returned]
                        self.desks.remove(desk)
                    except Exception as error:
                        trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if self.stopped is None and (desk / "stop").exists():  # by a signal that a run in this process took
                self.stopped = int((desk / "stop").read_text() or signal.SIGINT)
            return results, trouble, {int(f.stem) for f in desk.glob("*.begun")}

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass Ctrl-C and SIGTERM on to the workers, whose runs then stop at a step's end; the second time, just go."""

        def stop(number: int, frame: Any) -> None:
            if self.stopped is not None:
                raise KeyboardInterrupt
            self.stopped = number
            self.say("Stopping; the same command goes on from here.")
            for desk in self.desks:
                with contextlib.suppress(OSError):  # a full disk
                    (desk / "stop").write_text(str(number))
                for file in desk.glob("*.begun"):  # on other nodes they look for themselves
                    with contextlib.suppress(OSError, ValueError):
                        node, process = file.read_text().split()
                        run = Path(json.loads((desk / "folders.json").read_text())[int(file.stem)])
                        # a killed one's number may be another's by now; of our own run is_held would lose the lock
                        if node == os.uname().nodename and (int(process) == os.getpid() or is_held(run)):
                            os.kill(int(process), signal.SIGTERM)

        with stops_handled(stop):
            yield


@contextlib.contextmanager
def _desk(batch: Sequence[Planned]) -> Iterator[Path]:
    """A folder for this launch beside the runs, which all nodes see, held while it lasts.

    Raises ConfigError where the folder of runs cannot be written to, RuntimeError where the disk has no room.
    """
    root = _launches(batch[0])
    _clear_desks(root)
    with contextlib.ExitStack() as after:
        after.callback(_clear_desks, root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            desk = Path(tempfile.mkdtemp(dir=root))
            after.enter_context(RunFolder(desk).lock())
            (desk / "owner").write_text(whoami())
            (desk / "labels.json").write_text(json.dumps([p.name for p in batch]))
            (desk / "overrides.json").write_text(json.dumps([_handed_on(p.overrides) for p in batch]))
            (desk / "folders.json").write_text(json.dumps([str(p.folder) for p in batch]))  # last: all is there
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
                raise ConfigError(f"--runs={root.parent} cannot be written to: {error.strerror}.") from None
            raise RuntimeError(f"The sweep cannot go on: {root}: {error.strerror or error}.") from None
        try:
            yield desk
        finally:
            with contextlib.suppress(OSError):
                (desk / "closed").touch()


def _launches(planned: Planned) -> Path:
    return planned.folder.parents[1] / ".launches"


def _handed_on(overrides: Sequence[str]) -> list[str]:
    """A run's overrides for a worker's file: no password in a tracker's address, which the environment hands on."""
    for override in overrides:
        key, _, address = override.partition("=")
        if key.lstrip("+").startswith("logger.") and masked(address) != address:
            os.environ[HANDED_ON] = address.strip("'\"")
    return masked([*overrides])


def _clear_desks(root: Path) -> None:
    """Remove those of launches that are over, unless a run of theirs still goes on: a worker that outlives its launch,
    or its command, ends the run it has begun."""
    for desk in root.glob("*"):
        with contextlib.suppress(OSError, ValueError):
            listed = desk / "folders.json"
            if not listed.exists() and time.time() - desk.stat().st_mtime < FRESH_LAUNCH_SECONDS:
                continue  # somebody is about to write it
            folders = json.loads(listed.read_text()) if listed.exists() else []
            begun = [Path(folders[int(f.stem)]) for f in desk.glob("*.begun")]
            if not is_held(desk) and not any(is_held(f) and not has_ended(f) for f in begun):
                shutil.rmtree(desk, ignore_errors=True)


@contextlib.contextmanager
def _launcher(overrides: Sequence[str], desk: Path) -> Iterator[Any]:
    """The launcher that hydra/launcher=... names, as a Hydra sweeper is handed it."""
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    with _launcher_config([*overrides, f"hydra.sweep.dir={quoted(str(desk))}"]) as (main, cfg):
        context = HydraContext(config_loader=main.config_loader, callbacks=Callbacks(cfg))
        yield Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=cfg)


@contextlib.contextmanager
def _launcher_config(overrides: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Hydra and its configuration with a launcher's overrides; ConfigError for one that is not there or not allowed."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    os.environ["HYDRA_FULL_ERROR"] = "1"
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="sweep"):
        main = GlobalHydra.instance().hydra
        assert main is not None
        try:
            cfg = main.compose_config(
                config_name="job",
                overrides=[*overrides],
                run_mode=RunMode.MULTIRUN,
                from_shell=False,
                with_log_configuration=False,
            )
        except Exception as error:
            raise as_config_error(error) from None
        yield main, cfg


def note_killed(planned: Planned, error: str) -> None:
    """The record of a run that killed its process each time: failed, with the reason."""
    folder = RunFolder(planned.folder)
    with contextlib.suppress(ConfigError, OSError):  # somebody else's, or a full disk
        folder.create()
    with contextlib.suppress(ConfigError, OSError), folder.lock():
        record = read_record(planned.folder)
        if is_done(record):
            return
        known = {"label": planned.label, "seed": planned.seed, "setting": planned.folder.parent.name}
        kept = {k: v for k, v in planned.cfg.items() if k not in ("paths", "choices", "force", "debug")}
        fresh = {
            **known,
            "arm": None,
            "identity": None,
            "role": None,
            "config": kept,
            "choices": planned.cfg.choices,
        }
        fresh |= {"summary": {}, "cost": {}, "histories": {}}
        whole = folder.record() or fresh  # with its proof
        folder.write(whole | {"status": "failed", "error": error, "updated": time.time()})


def launched(sweep: Sweep, overrides: Sequence[str], workers: int) -> tuple[list[str], list[str]]:
    """Overrides of a command apart: those of the launcher (joblib with `workers` if none is named), those of a run."""
    overrides = own_overrides(overrides)
    launcher = [o for o in overrides if o.lstrip("+").startswith(("hydra/", "hydra."))]
    extra = [o for o in overrides if o not in launcher]
    engine = next((o.partition("=")[2] for o in launcher if o.startswith("hydra/launcher=")), None)
    if engine is None:
        launcher += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}", "hydra.launcher.batch_size=1"]
    elif engine == "ray":
        for key in ("remote.max_retries=0", "init.object_store_memory=null"):
            # Ray tries what ran out of memory again for ever: what is pending is launched again from here. And a memory
            # that the launcher asks for by default is refused by a cluster that is there already
            if not any(f"hydra.launcher.ray.{key.partition('=')[0]}" in o for o in launcher):
                launcher += [f"+hydra.launcher.ray.{key}"]
    if any(o in launcher for o in overrides):  # the user's own: a mistake in it is said before anything else
        with _launcher_config(launcher):
            pass
    given = {o.partition("=")[0] for o in [*sweep.fixed, *extra]} | {p.name for p in sweep.parameters}
    if engine != "basic" and "trainer.threads" not in given:
        extra = ["trainer.threads=1", *extra]
    return launcher, extra


def _say_tuned(tuned: Mapping[str, float | None], say: Callable[[str], None]) -> None:
    """Which arms take a tuned learning rate, said where any does."""
    if not any(tuned.values()):
        return
    for label, rate in tuned.items():
        say(f"{label}: {LEARNING_RATE}={rate:g}, tuned" if rate else f"{label}: not tuned, keeps its default rate")


def run_sweep(
    sweep: Sweep,
    runs: Path,
    workers: int,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    use_tuned: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Complete a sweep below `runs`: exit code 0 all done, 1 some failed, 130 and 143 stopped."""
    launcher, extra = launched(sweep, overrides, workers)
    tuned: dict[str, float | None] | None = {} if use_tuned else None
    if sweep.method == "bayes":
        from albert_ablate.studies.bayes import run_bayes

        return run_bayes(sweep, runs, workers, launcher, extra, dry_run, tuned, say)
    refused, missing, kept = list[str](), 0, Keys(runs)
    if sweep.method == "random":
        planned, refused, missing = plan_random(sweep, runs, extra, tuned, kept)
    else:
        planned = plan(sweep, sweep.settings(), runs, extra, tuned, kept)
    for sentence in refused:
        say(f"refused: {sentence}")
    _say_tuned(tuned or {}, say)
    open_ = [p for p in planned if not has_ended(p.folder)]
    if sweep.repeated:
        say(f"{sweep.repeated} combinations are left out: they are settings that others are already.")
    say(f"{sweep.path}: {len(planned)} runs, {len(planned) - len(open_)} done, {len(open_)} to do.")
    if dry_run:
        _show_plan(planned, runs, workers, say)
        return 0
    with contextlib.suppress(OSError):  # which the launch says
        runs.mkdir(parents=True, exist_ok=True)
        kept.save()
    study = Study(launcher, workers, say)
    failed = study.complete(planned)
    done = sum(has_ended(p.folder) for p in planned)
    for p, error in failed.items():
        say(f"failed: {p.name}: {last_line(error)} ({p.folder})")
    lacking = f"; {missing} are missing, {len(refused)} draws were refused" if missing else ""
    say(f"{done} of {len(planned)} runs are done, {len(failed)} failed{lacking}.")
    if study.stopped is not None:
        return 128 + study.stopped
    return 1 if failed or missing else 0


def say_price(
    planned: Sequence[Planned], runs: Path, workers: int, say: Callable[[str], None]
) -> dict[Planned, float | None]:
    """Say how long the runs that are not done will take; gives the estimate for each run as a whole."""
    from albert_ablate.training.console import duration

    times, total, unknown = estimates(planned, runs), 0.0, 0
    for p in planned:
        left, record = times[p], read_record(p.folder)
        if is_done(record):
            continue
        unknown += left is None
        total += (left or 0.0) * _share_left(record)
    if unknown:
        say(f"{unknown} runs have no estimate: no run of their model's size is done below {runs}.")
    if total:
        say(f"About {duration(total / workers)} with {workers} workers.")
    return times


def _share_left(record: Mapping[str, Any]) -> float:
    progress = record.get("progress") or {"step": 0, "steps": 1}
    return 1 - progress["step"] / progress["steps"]


def _show_plan(planned: Sequence[Planned], runs: Path, workers: int, say: Callable[[str], None]) -> None:
    from albert_ablate.training.console import duration

    closing: list[str] = []
    times = say_price(planned, runs, workers, closing.append)
    for p in planned:
        record, left = state(p.folder), times[p]
        said = record["status"]
        if not is_done(record) and left is not None:
            said += f", about {duration(left * _share_left(record))}"
        say(f"{p.name}: {said} ({p.folder})")
    for line in closing:
        say(line)
