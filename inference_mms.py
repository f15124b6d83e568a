"""Evaluate an M&Ms run on the vendor that its training never saw.

python inference_mms.py --run runs/mms_demo
"""

from mms_dataloader import DATASET
from network import build_network
from utils.evaluation.commands import run_inference

if __name__ == "__main__":
    run_inference(DATASET, build_network)
