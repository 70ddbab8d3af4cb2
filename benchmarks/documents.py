"""Does an adapter learn real documents?    python -m benchmarks.documents RUN

RUN is a finished run of `weft train`. Measures both losses over all of its training documents, with the adapter as it
was before the first step and as it is now. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from weft.config import load_config
from weft.data.collate import collate
from weft.training import Losses, TrainConfig, Training, build, evaluate_loss


@torch.no_grad()
def measure(training: Training) -> Losses:
    training.backbone.decoder.eval()
    parts = [part for number in training.training for part in training.examples[number]]
    batches = (collate([part], training.backbone.tokens.pad) for part in parts)
    return evaluate_loss(training.objective, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    training = build(load_config(TrainConfig, args.run / "config.yaml"))
    before = measure(training)
    saved = load_file(args.run / "adapter" / "adapter_model.safetensors")
    for name, parameter in training.parameters.items():
        parameter.data.copy_(saved[name.replace(".default", "")])
    after = measure(training)
    result = {
        name: {"before": round(getattr(before, name), 4), "after": round(getattr(after, name), 4)}
        for name in ("text", "image")
    }
    print(f"{after.text_targets:,} text tokens and {after.image_targets:,} picture patches of {args.run}")
    for name, value in result.items():
        print(f"{name:6} {value['before']:7.3f} -> {value['after']:7.3f}  ({value['after'] / value['before']:.2f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
