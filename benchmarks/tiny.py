"""What the bundled generalist can do before any tuning.    python -m benchmarks.tiny [--n 200]

Free running, greedy, on scenes that its training never showed. Pictures are scored by the exact reader. The last
line is JSON; `--out FILE` also writes it as a result file.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch

from weft.backbones import load_backbone
from weft.data.sources.picturebook import ATTRIBUTES, Reader, Scene, draw, held_out_scene, parse_caption, random_edit
from weft.document import Document, Image, Part, Turn, user
from weft.evaluation.interval import share
from weft.generation import SamplingConfig, generate
from weft.images import decode_image, encode_png

SEED = 7


def picture(scene: Scene) -> Image:
    return Image(encode_png(draw(scene)))


def scene_in(reader: Reader, parts: tuple[Part, ...]) -> Scene | None:
    """The scene of an answer that is one picture."""
    if len(parts) == 1 and isinstance(parts[0], Image) and parts[0].data:
        return reader.read(decode_image(parts[0].data))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--slots", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    backbone, reader, rng = load_backbone(args.model), Reader(), random.Random(SEED)
    scenes = [held_out_scene(rng) for _ in range(args.n)]
    edits = [(scene, *random_edit(rng, scene)) for scene in scenes]

    def answers(turns: list[Turn]) -> list[tuple[Part, ...]]:
        config = SamplingConfig(max_images=1, max_text_tokens=64)
        documents = [Document((turn,), id=f"prompt {i}") for i, turn in enumerate(turns)]
        return [tuple(a.parts) for a in generate(backbone, documents, config, slots=args.slots, context=256)]

    drawn = answers([user(scene.caption()) for scene in scenes])
    told = answers([user(picture(scene)) for scene in scenes])
    edited = answers([user(picture(before), sentence) for before, sentence, _ in edits])

    captions = [parse_caption("".join(getattr(part, "text", "") for part in parts).strip()) for parts in told]
    attributes = {
        name: share(
            [
                c is not None and c.attributes()[name] == s.attributes()[name]
                for c, s in zip(captions, scenes, strict=True)
            ]
        )
        for name in ATTRIBUTES
    }
    originals = [draw(scene) for scene in scenes]
    rebuilt = [backbone.decode_image(codes) for codes in backbone.encode_images(originals)]
    error = np.mean(
        [(np.asarray(a, float) - np.asarray(b, float)) ** 2 for a, b in zip(originals, rebuilt, strict=True)]
    )
    t2i = share([scene_in(reader, parts) == scene for parts, scene in zip(drawn, scenes, strict=True)])
    edit = share([scene_in(reader, parts) == after for parts, (*_, after) in zip(edited, edits, strict=True)])
    read = share([reader.read(picture) == scene for picture, scene in zip(rebuilt, scenes, strict=True)])
    rows = {"caption -> picture": t2i, "edit": edit, "codec, read back": read}
    for title, result in {**rows, **{f"picture -> caption: {name}": r for name, r in attributes.items()}}.items():
        low, high = result.interval
        print(f"{title:30} {result.value:6.1%}  [{low:.1%}, {high:.1%}]  n = {result.n}")
    result = {
        "t2i_exact": t2i.value,
        "caption_attributes": {name: r.value for name, r in attributes.items()},
        "edit_exact": edit.value,
        "psnr_db": round(10 * math.log10(255**2 / error), 2),
        "reader_exact": read.value,
        "n": args.n,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
