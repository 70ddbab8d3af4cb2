"""Write the folder that `weft` loads, in 16 bits.

python -m pretraining.mm_interleaved.bundle --run DIR --vae DIR --tokenizer DIR --out DIR
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

from pretraining.mm_interleaved.train import build
from weft.backbones.mm_interleaved import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="of `train`; its newest checkpoint is taken")
    parser.add_argument("--vae", type=Path, required=True, help="may be polished since: see `vae.py`")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = build(args.vae, args.tokenizer, seed=0)
    weights = load_file(args.run / "checkpoint" / "model.safetensors")
    model.load_state_dict({name: t for name, t in weights.items() if not name.startswith("vae.")}, strict=False)
    save(model.half(), args.out)
    step = json.loads((args.run / "checkpoint" / "step.json").read_text())["step"]
    print(f"step {step}, {sum(file.stat().st_size for file in args.out.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
