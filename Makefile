PYTHON ?= python3
BIN = .venv/bin

FROM =
.PHONY: setup demo demo-real test

setup: .venv/ready

.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

demo: setup
	$(BIN)/python mms_train.py --demo
	$(BIN)/python inference_mms.py --run runs/mms_demo

# Real scans of the spinal cord; FROM=FOLDER_OR_ZIP takes a copy of the open data instead of downloading them.
data/cord_raw: | setup
	$(BIN)/python scgm_dataloader.py open-data $@ $(addprefix --from ,$(FROM))

data/cord: | data/cord_raw
	$(BIN)/python scgm_dataloader.py prepare data/cord_raw --out $@

demo-real: data/cord
	$(BIN)/python scgm_train.py --data-root data/cord --test-domain 1 --ratio 1 --use-extra-unlabeled --image-size 64 \
	  --batch-size 16 --pretrained none --workers 0 --no-wandb --num-epoch 100 --max-steps 160 --cps-warmup 13 --cps-ramp 0 \
	  --robust --field 144 --run-name cord
	$(BIN)/python inference_scgm.py --run runs/cord

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
