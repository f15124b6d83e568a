"""Train two networks on SCGM that teach each other, with one site held out.

python scgm_train.py --demo     # needs no data
python scgm_train.py --help     # every setting is a flag; the defaults are in config.py
"""

from config import SCGM, SCGM_DEMO, from_cli
from utils.errors import clear_errors


def main() -> None:
    with clear_errors():
        runs = from_cli(SCGM, SCGM_DEMO)
        # Imported here, so that --help and a mistyped flag do not wait for PyTorch.
        from network import build_network
        from scgm_dataloader import DATASET
        from utils.data.commands import make_demo_data
        from utils.data.loaders import build_loaders
        from utils.device import main_first, process_group
        from utils.engine import fit

        with process_group(runs[0].device) as process:
            with main_first(process):
                if runs[0].demo and process.is_main:
                    make_demo_data(runs[0].data_root, DATASET)
            for cfg in runs:
                loaders = build_loaders(cfg, DATASET, rank=process.rank, world_size=process.world_size)
                fit(cfg, loaders, build_network, process, last=cfg is runs[-1])


if __name__ == "__main__":
    main()
