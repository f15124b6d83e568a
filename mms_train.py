"""Train two networks on M&Ms that teach each other, with one vendor held out.

python mms_train.py --test-vendor D --ratio 0.02        # on data/mms, which mms_dataloader.py has prepared
python mms_train.py --demo                              # needs no data
python mms_train.py --help                              # every setting is a flag; the defaults are in config.py
"""

from config import MMS, MMS_DEMO, from_cli
from mms_dataloader import FACTS
from network import build_network
from utils.data.commands import train

if __name__ == "__main__":
    train(from_cli(MMS, MMS_DEMO), FACTS, build_network)
