"""What `albert-ablate COMMAND --help` shows below the options: two examples, and what comes next."""

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
        "`show` draws a run, `report` all of them.",
    ),
    "sweep": (
        ("albert-ablate sweep smoke --dry-run", "albert-ablate sweep study.yaml --workers 2 budget.tokens=100_000"),
        "`status` shows how far it is, `report` what came out.",
    ),
    "tune": (
        ("albert-ablate tune study.yaml --dry-run", "albert-ablate tune study.yaml --workers 2"),
        "`sweep` and `judge` use the learning rates that it finds.",
    ),
    "agent": (
        ("albert-ablate agent ENTITY/PROJECT/SWEEP", "albert-ablate agent ENTITY/PROJECT/SWEEP --workers 2 --count 10"),
        "`wandb sweep FILE` makes the sweep that it asks for.",
    ),
    "calibrate": (
        ("albert-ablate calibrate study.yaml --dry-run", "albert-ablate calibrate study.yaml --count 24"),
        "`plan` says what claims will take with the noise that it found.",
    ),
    "status": (
        ("albert-ablate status runs", "albert-ablate status runs --sweep study.yaml --watch"),
        "`report` shows what the finished runs say.",
    ),
    "show": (
        ("albert-ablate show runs/SETTING/seed0 -o run.html", "albert-ablate show RUN_A RUN_B -o two.png"),
        "`report` puts all runs of a folder side by side.",
    ),
    "report": (
        ("albert-ablate report runs -o study.html", "albert-ablate report runs --baseline norm=pre_ln --format md"),
        "`judge` turns a difference that you named before into a verdict.",
    ),
    "evaluate": (
        (
            "albert-ablate evaluate runs corruption",
            "albert-ablate evaluate RUN_FOLDER sharpness --weights best",
        ),
        "`report` and claims use the figures; `measures` lists them.",
    ),
    "generate": (
        (
            'albert-ablate generate runs/SETTING/seed0 --prompt "The city of"',
            'albert-ablate generate runs/SETTING/seed0 --prompt "It" --temperature 0',
        ),
        "`show` draws the same run.",
    ),
    "compare": (
        (
            'albert-ablate compare norm=pre_ln norm=rezero --common "model=nano budget.tokens=50_000"',
            "albert-ablate compare --from losses.csv --metric loss",
        ),
        "`gate` asks one question after another, `judge` a family of them.",
    ),
    "gate": (
        (
            "albert-ablate gate --session mine --baseline norm=pre_ln --candidate norm=rezero",
            "albert-ablate gate --session mine --candidate dropout=uniform --json",
        ),
        "After an accept the candidate is the next baseline.",
    ),
    "judge": (
        ("albert-ablate judge claims.yaml --dry-run", "albert-ablate judge claims.yaml --run --budget 3600s"),
        "`report` shows the ledger with its intervals; `judge --plot png` draws each claim.",
    ),
    "plan": (
        ("albert-ablate plan claims.yaml", "albert-ablate plan claims.yaml --effect 0.5% --spread 0.3%"),
        "`judge --run` trains what is planned.",
    ),
    "methods": (
        ("albert-ablate methods norm", "albert-ablate methods --plot methods.png"),
        "`run` takes any of them: norm=peri_ln.",
    ),
    "measures": (
        ("albert-ablate measures", "albert-ablate measures loss"),
        "A claim names one as `measure`, `compare` as --metric.",
    ),
    "init": (
        ("albert-ablate init", "albert-ablate init my_study"),
        "The folder's README says what each file is for.",
    ),
    "new": (
        ("albert-ablate new norm mine", "albert-ablate new optimizer my_adam --dir my_study"),
        "`check-component` runs the package's own checks on it.",
    ),
    "check-component": (
        (
            "albert-ablate check-component norm=mine --config-dir conf",
            "albert-ablate check-component norm=mine --try gain=0.5",
        ),
        "`run` trains with it.",
    ),
    "sync": (
        ("albert-ablate sync runs --to wandb --project mine", "albert-ablate sync runs --to mlflow"),
        "What has arrived is noted, so that the same command sends the rest.",
    ),
    "mcp": (
        ("albert-ablate mcp", "albert-ablate mcp --runs my_runs"),
        "Name the command in your agent's settings; it reads and never trains.",
    ),
    "ui": (
        ("albert-ablate ui runs", "albert-ablate ui runs --sweep study.yaml --port 8080"),
        "`report` writes the same page to a file.",
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
