"""Put a trained base and a codec together as the package's weights.

python -m pretraining.bundle --base DIR --codec DIR --out src/weft/backbones/tiny/weights
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from weft.backbones.tiny import read, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = read(args.base, "tiny")
    codec = load_file(args.codec / "codec.safetensors")
    for name in ("codebook.weight", *(key for key in codec if key.startswith("encoder."))):
        # another encoder would give the base codes it has never seen
        if not torch.equal(codec[name], model.codec.state_dict()[name]):
            raise SystemExit(f"{name} of {args.codec} is not that of the codec the base was trained with")
    model.codec.load_state_dict(codec)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, args.out)
    print(f"{sum(file.stat().st_size for file in args.out.iterdir()) / 2**20:.1f} MiB in {args.out}")


if __name__ == "__main__":
    main()
