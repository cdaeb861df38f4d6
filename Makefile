.PHONY: check diagram format test slow

check:  ## what a commit must pass
	ruff check .
	ruff format --check .
	mypy
	pytest -n auto --dist loadfile

format:
	ruff check --fix .
	ruff format .

test:  ## all that start no processes
	pytest -n auto --dist loadfile -m "not process"

diagram:
	python docs/packages.py

slow:  ## hundreds of kills, long simulations
	pytest -m slow
