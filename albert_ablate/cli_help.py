"""Examples and next step that `albert-ablate COMMAND --help` shows below the options."""

GROUPS = {
    "Train": ("run", "sweep", "tune", "agent", "calibrate"),
    "Look": ("status", "show", "report", "ui", "evaluate", "generate"),
    "Judge": ("compare", "gate", "judge", "plan"),
    "Extend and list": ("methods", "measures", "init", "new", "check-component"),
    "Share": ("sync", "mcp"),
}

# command: its examples, and a sentence on what comes after it
EXAMPLES: dict[str, tuple[tuple[str, ...], str]] = {
    "run": (
        ("albert-ablate run norm=pre_ln dropout=depth_decay", "albert-ablate run -m norm=pre_ln,rezero seed=0,1,2,3"),
        "Next: `show` draws the run, `report` all runs of the folder.",
    ),
    "sweep": (
        ("albert-ablate sweep smoke --dry-run", "albert-ablate sweep study.yaml --workers 2 budget.tokens=100_000"),
        "Next: `status` shows progress, `report` the results.",
    ),
    "tune": (
        ("albert-ablate tune study.yaml --dry-run", "albert-ablate tune study.yaml --workers 2"),
        "Next: `sweep` and `judge` use the tuned learning rates.",
    ),
    "agent": (
        ("albert-ablate agent ENTITY/PROJECT/SWEEP", "albert-ablate agent ENTITY/PROJECT/SWEEP --workers 2 --count 10"),
        "Before: `wandb sweep FILE` creates the sweep. Next: `report` shows the results.",
    ),
    "calibrate": (
        ("albert-ablate calibrate study.yaml --dry-run", "albert-ablate calibrate study.yaml --count 24"),
        "Next: `plan` estimates what claims need at this noise.",
    ),
    "status": (
        ("albert-ablate status runs", "albert-ablate status runs --sweep study.yaml --watch"),
        "Next: `report` shows the results of finished runs.",
    ),
    "show": (
        ("albert-ablate show runs/SETTING/seed0 -o run.html", "albert-ablate show RUN_A RUN_B -o two.png"),
        "Next: `report` compares all runs of a folder.",
    ),
    "report": (
        ("albert-ablate report runs -o study.html", "albert-ablate report runs --baseline norm=pre_ln --format md"),
        "Next: `judge` tests a difference that you stated beforehand.",
    ),
    "evaluate": (
        (
            "albert-ablate evaluate runs corruption",
            "albert-ablate evaluate RUN_FOLDER sharpness --weights best",
        ),
        "Next: `report` and `judge` use the results; `measures` lists them.",
    ),
    "generate": (
        (
            'albert-ablate generate runs/SETTING/seed0 --prompt "The city of"',
            'albert-ablate generate runs/SETTING/seed0 --prompt "It" --temperature 0',
        ),
        "Next: `evaluate` measures the same weights, `show` draws the run.",
    ),
    "compare": (
        (
            'albert-ablate compare norm=pre_ln norm=rezero --common "model=nano budget.tokens=50_000"',
            "albert-ablate compare --from losses.csv --metric loss",
        ),
        "Next: `gate` tests one change after another, `judge` a file of claims.",
    ),
    "gate": (
        (
            "albert-ablate gate --session mine --baseline norm=pre_ln --candidate norm=rezero",
            "albert-ablate gate --session mine --candidate dropout=uniform --json",
        ),
        "Next: call it again with another candidate. An accepted candidate is the new baseline.",
    ),
    "judge": (
        ("albert-ablate judge claims.yaml --dry-run", "albert-ablate judge claims.yaml --run --budget 3600s"),
        "Next: `report` shows the verdicts and intervals, `judge --plot png` draws each claim.",
    ),
    "plan": (
        ("albert-ablate plan claims.yaml", "albert-ablate plan claims.yaml --effect 0.5% --spread 0.3%"),
        "Next: `judge --run` trains the pairs.",
    ),
    "methods": (
        ("albert-ablate methods norm", "albert-ablate methods --plot methods.png"),
        "Next: `run` takes any of them: norm=peri_ln.",
    ),
    "measures": (
        ("albert-ablate measures", "albert-ablate measures loss"),
        "Next: name one as `measure` in a claim, or as --metric of `compare`.",
    ),
    "init": (
        ("albert-ablate init", "albert-ablate init my_study"),
        "Next: the README in the folder explains each file.",
    ),
    "new": (
        ("albert-ablate new norm mine", "albert-ablate new optimizer my_adam --dir my_study"),
        "Next: `check-component` runs the package's checks on it.",
    ),
    "check-component": (
        (
            "albert-ablate check-component norm=mine --config-dir conf",
            "albert-ablate check-component norm=mine --try gain=0.5",
        ),
        "Next: `run` trains with it.",
    ),
    "sync": (
        ("albert-ablate sync runs --to wandb --project mine", "albert-ablate sync runs --to mlflow"),
        "Next: run it again after more training; only new runs are uploaded.",
    ),
    "mcp": (
        ("albert-ablate mcp", "albert-ablate mcp --runs my_runs"),
        "Next: add the command to the MCP settings of your agent. It never trains.",
    ),
    "ui": (
        ("albert-ablate ui runs", "albert-ablate ui runs --sweep study.yaml --port 8080"),
        "Next: `report` writes the same page to a file.",
    ),
}


def panel_of(command: str) -> str:
    """The group of commands below whose heading `albert-ablate --help` lists this one."""
    return next((group for group, commands in GROUPS.items() if command in commands), "Commands")


def epilog(command: str) -> str | None:
    """Examples and the next step, a paragraph a line."""
    if command not in EXAMPLES:
        return None
    examples, following = EXAMPLES[command]
    # [dim]...[/] would be markup, and so would a bracket of an example
    lines = ["Examples:", *(f"  {line}".replace("[", r"\[") for line in examples), following]
    return "\n\n".join(lines)
