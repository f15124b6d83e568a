"""Evaluate an SCGM run on the site that its training never saw.

python inference_scgm.py --run runs/scgm_demo
"""

from network import build_network
from scgm_dataloader import DATASET
from utils.evaluation.commands import run_inference

if __name__ == "__main__":
    run_inference(DATASET, build_network)
