"""`--workers auto`: how many processes of how many threads train most tokens a second here, by a short measurement."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from albert_ablate.config import ConfigError

AUTO = 0  # as a number of workers: to be measured
MEASURE_SECONDS = 1.0  # of each measurement
ROUNDS = 2


def read_workers(text: str) -> int:
    """The number of processes that --workers asks for, or AUTO."""
    return read_count("--workers", text, 1, "auto", AUTO)


def read_count(option: str, text: str, least: int, word: str, value: int) -> int:
    """The number from `least` on that is given to a command's option, or `value` where it is `word`."""
    if text.strip() == word:
        return value
    try:
        count = int(text)
    except ValueError:
        count = least - 1
    if count < least:
        raise ConfigError(f"{option}={text} is not allowed: a number from {least} on, or {word}.")
    return count


def candidates(cores: int) -> list[tuple[int, int]]:
    """(processes, threads of each): one thread each, then twice as many threads and so on, at last one process with all
    cores."""
    threads = [2**i for i in range(cores.bit_length()) if cores // 2**i > 1]
    return [(cores // t, t) for t in threads] + [(1, cores)]


_chosen: tuple[int, int] | None = None  # one command has one answer


def choose(overrides: Sequence[str], say: Callable[[str], None]) -> tuple[int, int]:
    """(processes, threads of each) at which training steps of the run with these overrides are fastest in sum.

    Measured once a command, in processes of its own that train nothing but a copy. ConfigError where a GPU would train
    the run: what is measured are the cores.
    """
    global _chosen
    if _chosen is None:
        options = candidates(os.cpu_count() or 1)
        speeds = _measure(overrides, options) if len(options) > 1 else [1.0]
        best = speeds.index(max(speeds))
        found = ", ".join(f"{_layout_text(*o)} {speed:,.0f}" for o, speed in zip(options, speeds, strict=True))
        say(f"--workers auto takes {_layout_text(*options[best])}; tokens a second: {found}.")
        _chosen = options[best]
    return _chosen


def _layout_text(processes: int, threads: int) -> str:
    plural = "process" if processes == 1 else "processes"
    return f"{processes} {plural} of {threads} {'thread' if threads == 1 else 'threads'}"


def _measure(overrides: Sequence[str], options: Sequence[tuple[int, int]]) -> list[float]:
    """Tokens a second of each option, over all its processes; the options forwards and backwards, so that what else the
    machine does falls on all alike."""
    spawn = multiprocessing.get_context("spawn")
    workers: list[tuple[Any, Connection]] = []
    try:
        for _ in range(max(processes for processes, _ in options)):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve_measurements, args=(list(overrides), there), daemon=True)
            process.start()
            there.close()
            workers.append((process, here))
        for _, pipe in workers:
            _answer(pipe)
        tokens = [0.0] * len(options)
        for turn in range(ROUNDS):
            order = range(len(options)) if turn % 2 == 0 else reversed(range(len(options)))
            for i in order:
                processes, threads = options[i]
                for _, pipe in workers[:processes]:
                    pipe.send(threads)
                tokens[i] += sum(_answer(pipe) for _, pipe in workers[:processes])
        return [t / ROUNDS for t in tokens]
    finally:
        for process, pipe in workers:
            pipe.close()
            process.terminate()
            process.join()


def _answer(pipe: Connection) -> float:
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError("--workers auto: a measuring process was killed, often because memory ran out.") from None
    if isinstance(answer, str):
        raise ConfigError(answer)
    return answer


def _serve_measurements(overrides: list[str], pipe: Connection) -> None:
    """One measuring process: 0 once it is ready, then for each number of threads its tokens a second."""
    try:
        step = _training_step(overrides)
        step()
    except Exception as error:
        pipe.send(f"--workers auto cannot measure this run: {error}")
        return
    pipe.send(0.0)
    import torch

    while True:
        try:
            threads = pipe.recv()
        except EOFError:
            return
        torch.set_num_threads(threads)
        step()
        begun, tokens = time.perf_counter(), 0
        while time.perf_counter() - begun < MEASURE_SECONDS:
            tokens += step()
        pipe.send(tokens / (time.perf_counter() - begun))


def _training_step(overrides: Sequence[str]) -> Callable[[], int]:
    """Forward, backward and optimizer on one micro-batch of drawn tokens; gives how many tokens it had."""
    import torch

    from albert_ablate.config import compose, construct
    from albert_ablate.model.build import build, build_model
    from albert_ablate.model.loss import objective
    from albert_ablate.optim.groups import decay_groups

    cfg = compose(list(overrides))
    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        raise ConfigError("it would be trained on a GPU, and auto measures CPU cores. Give a number.")
    torch.set_num_threads(1)
    model, loss = build_model(cfg).train(), construct(cfg.loss)
    optimizer = build(cfg.optimizer, decay_groups(model), False)
    rows = torch.randint(
        build(cfg.tokenizer).vocabulary, (max(1, cfg.data.batch // cfg.data.accumulate), cfg.model.context + 1)
    )

    def step() -> int:
        total, _ = objective(loss, model, rows)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return rows[:, 1:].numel()

    return step
