PYTHON ?= python3
BIN = .venv/bin

FROM =
CORD = --data-root data/cord --test-domain 1 --ratio 1 --use-extra-unlabeled --image-size 64 --batch-size 8 \
  --pretrained none --workers 0 --no-wandb --num-epoch 100 --lr 1e-3 --robust --field 144 --max-steps 160

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
	$(BIN)/python scgm_train.py $(CORD) --run-name cord_supervised --cps-weight 0
	$(BIN)/python scgm_train.py $(CORD) --run-name cord --cps-warmup 6.5 --cps-ramp 0
	$(BIN)/python inference_scgm.py --run runs/cord_supervised runs/cord --label supervised full

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
