PY := .venv/bin/python
OUT := out/demo
S := 0.30
KV := --kv keep --schedule $(OUT)/kv/schedule.json --forecaster $(OUT)/kv/forecaster.safetensors

.PHONY: demo test torture

# fetch the model, prune it at 30 % by the paper's three stages and by late keys and values, measure both, draw the figures: see README.md
demo: .venv/ready
	$(PY) prepare.py
	$(PY) search_scheduler.py --sparsity $(S) --out_dir $(OUT) --resume
	$(PY) train_router.py --schedule $(OUT)/schedule.json --out_dir $(OUT) --resume
	$(PY) finetune_static.py --schedule $(OUT)/schedule.json --router $(OUT)/router.safetensors --out_dir $(OUT) --resume
	$(PY) evaluate.py --dtype auto --schedule $(OUT)/schedule_ft.json --router $(OUT)/router.safetensors --out_dir $(OUT)
	$(PY) benchmark.py --schedule $(OUT)/schedule_ft.json --router $(OUT)/router.safetensors --lengths 256,1024 --rounds 5 --out_dir $(OUT)
	$(PY) search_scheduler.py --method late --flops_saved $(S) --kv keep --out_dir $(OUT)/kv
	$(PY) fit_forecaster.py --only_kv --keys 0.5 --data self,text --schedule $(OUT)/kv/schedule.json --tune 400 --out_dir $(OUT)/kv
	$(PY) evaluate.py --dtype auto --rows static $(KV) --out_dir $(OUT)/kv
	$(PY) benchmark.py $(KV) --lengths 256,1024 --rounds 5 --out_dir $(OUT)/kv
	$(PY) analysis/redundancy.py --out_dir $(OUT)
	$(PY) analysis/schedules.py $(OUT)/schedule.json $(OUT)/schedule_ft.json --out_dir $(OUT)
	$(PY) analysis/skips.py --schedule $(OUT)/schedule_ft.json --router $(OUT)/router.safetensors --out_dir $(OUT)
	@echo "artefacts, tables and figures are in $(OUT)"

test: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m coverage erase
	OMP_NUM_THREADS=1 $(PY) -m coverage run -m pytest -q -n 2 --dist worksteal
	$(PY) -m coverage combine -q
	$(PY) -m coverage report --fail-under=90

# the long forms of the property, damage, kill and soak tests: about 12 minutes on 2 CPU cores
torture: .venv/ready
	FTP_TORTURE=1 $(PY) -m pytest -q tests/test_properties.py tests/test_fuzz.py tests/test_kill.py tests/test_inputs.py

.venv/ready: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@
