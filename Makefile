.PHONY: check claims-table diagram docs format outputs test slow

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

docs:  ## the manual as a site, in site/
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build

outputs:  ## of commands, in README and docs: half an hour; of one page: python docs/outputs.py docs/options.md
	python docs/outputs.py

claims-table:  ## of docs/claims_file.md
	python docs/claims_table.py

slow:  ## hundreds of kills, long simulations
	pytest -m slow
