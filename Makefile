.PHONY: check format test slow

check:  ## what a commit must pass
	ruff check .
	ruff format --check .
	mypy
	pytest

format:
	ruff check --fix .
	ruff format .

test:
	pytest

slow:  ## hundreds of kills, long simulations
	pytest -m slow
