PY := .venv/bin/python
# other libraries' progress bars and debug output are not for the reader
QUIET := HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false

.PHONY: demo reproduce test torture

# fetch the model, let a pruned one answer, then prune it by all stages: README.md tells more
demo: .venv/ready
	@$(QUIET) $(PY) prepare.py --fetch_only
	@$(QUIET) $(PY) analysis/demo.py

# the long form: full budgets, every table of RESULTS.md; goes on where it was interrupted
reproduce: .venv/ready
	@$(QUIET) $(PY) analysis/reproduce.py

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m coverage erase
	OMP_NUM_THREADS=1 $(PY) -m coverage run -m pytest -q -n 2 --dist worksteal
	$(PY) -m coverage combine -q
	$(PY) -m coverage report --fail-under=90

# the long forms of the property, damage, kill, soak and sweep tests, on 2 CPU cores
torture: .venv/dev
	FTP_TORTURE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal tests/test_properties.py tests/test_fuzz.py \
		tests/test_kill.py tests/test_inputs.py tests/test_trust.py

.venv/ready: requirements.txt
	@echo "making the environment .venv (1 to 3 minutes) ..."
	@python3 -m venv .venv
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/ready
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@
