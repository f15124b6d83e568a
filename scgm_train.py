"""Train two networks on SCGM that teach each other, with one site held out.

python scgm_train.py --test-domain 4 --ratio 0.2        # on data/scgm, which scgm_dataloader.py has prepared
python scgm_train.py --demo                              # needs no data
python scgm_train.py --help                              # every setting is a flag; the defaults are in config.py
"""

from config import SCGM, SCGM_DEMO, from_cli
from network import build_network
from scgm_dataloader import FACTS
from utils.data.commands import train

if __name__ == "__main__":
    train(from_cli(SCGM, SCGM_DEMO), FACTS, build_network)
